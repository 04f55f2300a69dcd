"""Radar archives as a datamodule: what fits together, what is split where, and what must be said about it.

Axes: K static fields, H W space.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from datamodules.cf import FLOORS, THRESHOLDS
from datamodules.cutting import Crop, RadarStreams, RadarWindows, cropped
from datamodules.frames import FrameData, Split
from datamodules.reader import Archive, open_archive
from datamodules.statistics import fingerprint, statistics_of
from datamodules.unpacked import unpack
from datamodules.windows import (
    RAINY,
    Interval,
    Place,
    Times,
    WindowIndex,
    cadence_of,
    event_borders,
    index_runs,
    index_windows,
    repeated_frames,
    split_times,
    utc,
)
from forecast.errors import UserError
from forecast.units import Quantity, Transform, default_transform, z_r_relation

log = logging.getLogger(__name__)


class Outline(NamedTuple):
    """What a split holds."""

    span: Interval
    """From its first frame to its last, seconds UTC, both inclusive."""
    wet: float
    """Mean wet share of its frames."""


class RadarData(FrameData):
    """Windows from CF archives of rain rate or reflectivity (docs/data.md).

    Args:
        archive: path of a NetCDF file or a Zarr directory, or several.
        past, future, batch_size, workers, seed, after: as in `FrameData`.
        accumulate: frames of the archive, rain rates, whose mean is one frame to forecast.
        variable: the archive's variable, where its CF attributes do not tell.
        relation: name of a Z-R relation that turns dBZ into mm/h; none leaves dBZ.
        floor: the value of "no echo" or "no rain", in dBZ or mm/h; none is -10 dBZ, or no rain.
        thresholds: of the categorical scores, in dBZ or mm/h; none is 10 20 30 40 dBZ, or 0.5 2 5 10 30 mm/h.
        transform: physical values <-> what the network sees; none is the quantity's own.
        split: shares of the covered time for train, validation and test, or the dates of each; none is 0.7, 0.15, 0.15.
        guard_hours: least time between two splits, at least 6 h.
        stride: frames between the starts of training windows.
        eval_stride: the same for validation and test; none is the frames that are forecast, so that each is once.
        crop: pixels on a side of the squares cut from training windows, at random places; none is the whole frame.
        crop_draws: places drawn for each of those, of which the wettest is taken; 1 is none but chance.
        eval_crop: the same for validation and test, in the middle of the frame.
        static: variables of the archive over y and x alone, given to the network standardised.
        cache: unpack the frames once into a file in the user's cache, and cut windows from there; false cuts them from
            the archive, which takes longer and no room.
    """

    def __init__(
        self,
        archive: str | Sequence[str] | None,
        past: int,
        future: int,
        batch_size: int,
        workers: int,
        seed: int,
        after: int = 0,
        accumulate: int = 1,
        variable: str | None = None,
        relation: str | None = None,
        floor: float | None = None,
        thresholds: Sequence[float] | None = None,
        transform: Transform | None = None,
        split: Sequence[float] | Mapping[str, Sequence[str]] | None = None,
        guard_hours: float = 6.0,
        stride: int = 1,
        eval_stride: int | None = None,
        crop: int | None = None,
        crop_draws: int = 1,
        eval_crop: int | None = None,
        static: Sequence[str] = (),
        cache: bool = True,
    ) -> None:
        super().__init__(past, future, batch_size, workers, seed, after)
        if not archive:
            raise UserError("data.archive is not set; give the path of a NetCDF file or a Zarr directory, or several.")
        strides = {"stride": stride, "eval_stride": future * accumulate if eval_stride is None else eval_stride}
        crops = {"crop": crop, "crop_draws": crop_draws, "eval_crop": eval_crop}
        for name, value in {"accumulate": accumulate, **strides, **crops}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1.")
        if after and accumulate > 1:
            raise UserError(
                f"data.after={after} fills a gap frame by frame, but data.accumulate={accumulate} asks for means; "
                "set one of them only."
            )
        self.accumulate = accumulate
        self.paths = (archive,) if isinstance(archive, str) else tuple(archive)
        if len({Path(path).resolve() for path in self.paths}) < len(self.paths):
            raise UserError(f"data.archive names an archive twice ({', '.join(self.paths)}); name each once.")
        self.variable = variable
        self.relation = None if relation is None else z_r_relation(relation)
        self.floor = floor
        self.thresholds = thresholds
        self.given_transform = transform
        self.split = (0.7, 0.15, 0.15) if split is None else split
        self.guard_hours = guard_hours
        self.strides: Mapping[Split, int] = {
            "train": strides["stride"],
            "validation": strides["eval_stride"],
            "test": strides["eval_stride"],
        }
        self.crops: Mapping[Split, Crop] = {
            "train": Crop(crop, seed, crop_draws),
            "validation": Crop(eval_crop),
            "test": Crop(eval_crop),
        }
        self.static = tuple(static)
        self.static_channels = len(self.static)
        self.cache = cache
        self._windows: dict[Split, RadarWindows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the archives, check that they fit together, and lay out the splits; for a stage, unpack their frames."""
        if not self._windows:
            self._lay_out()
        if stage is not None and self.cache:
            own = next(iter(self._windows.values()))
            for archive, known, fields in zip(own.archives, self._known, own.fields, strict=True):
                if archive.unpacked is None:
                    unpack(archive, fingerprint([archive], [known], [fields[:0]]))

    def _lay_out(self) -> None:
        archives = [open_archive(path, self.variable) for path in self.paths]
        self.cadence = self._cadence(archives)
        self.quantity = self._quantity(archives, self.cadence)
        self.transform = self.given_transform or default_transform(self.quantity)
        self._check_sizes(archives)
        self.grid = cropped(archives[0].grid, self.crops["test"])
        fields = standardised([archive.fields(self.static) for archive in archives])
        times = np.concatenate([archive.times for archive in archives])
        self._intervals = intervals = split_times(times, self.split, self.guard_hours)
        self._known = [statistics_of(archive) for archive in archives]
        rainy = [archive.times[known.wet >= RAINY] for archive, known in zip(archives, self._known, strict=True)]
        borders = event_borders(np.concatenate(rainy))
        indices = {
            name: self._index(archives, self.cadence, name, within, borders) for name, within in intervals.items()
        }
        self._windows = {
            name: RadarWindows(archives, fields, index, self.past, self.following, self.crops[name])
            for name, index in indices.items()
        }
        self._fingerprint = fingerprint(archives, self._known, fields)
        self._warn(archives)

    def windows(self, split: Split) -> RadarWindows:
        """The windows of that split; the same object at each call."""
        self.setup()
        if split not in self._windows:
            raise UserError(f"data.split leaves nothing for {split}; give it a share or dates.")
        return self._windows[split]

    def unweighted(self, split: Split) -> RadarWindows:
        """The windows of that split at places drawn by chance alone, whatever `crop_draws` is."""
        own = self.windows(split)
        crop = own.crop._replace(draws=1)
        return RadarWindows(own.archives, own.fields, own.index, self.past, self.following, crop)

    def streams(self, chunk: int, length: int | None) -> RadarStreams:
        own = self.windows("train")
        assert self.cadence is not None
        runs = index_runs([archive.times for archive in own.archives], self.cadence, self._intervals["train"])
        made = RadarStreams(own.archives, own.fields, runs, chunk, self.future, own.crop, length)
        if not len(made):
            raise UserError(
                f"The longest run of frames without a gap in the train split has {runs.frames.max()}, but a chunk and what "
                f"follows it take {chunk + self.future} (tbptt.steps + data.future); lower tbptt.steps."
            )
        return made

    @property
    def fingerprint(self) -> str:
        """Of the archives, in order, and their static fields; not of how windows are cut from them."""
        self.setup()
        return self._fingerprint

    def terms(self, split: Split) -> dict[str, Any]:
        """The archives, and of which of them, when, and in which rain event forecasts are issued."""
        windows = self.windows(split)
        issues = windows.issue_times()
        pairs = np.stack([windows.index.archive, issues, windows.index.block])
        return {
            "archive": fingerprint(windows.archives, self._known, [fields[:0] for fields in windows.fields]),
            "windows": len(windows),
            "events": windows.blocks,
            "first_issue": utc(issues[0]),
            "last_issue": utc(issues[-1]),
            "stride": self.strides[split],
            "issues": hashlib.blake2b(pairs.astype("<i8").tobytes(), digest_size=8).hexdigest(),
        }

    def outline(self, split: Split) -> Outline:
        """What a split holds."""
        windows = self.windows(split)
        frames = windows.frames()
        times = np.concatenate([archive.times[own] for archive, own in zip(windows.archives, frames, strict=True)])
        wet = np.concatenate([known.wet[own] for known, own in zip(self._known, frames, strict=True)])
        return Outline(Interval(int(times.min()), int(times.max())), float(np.mean(np.nan_to_num(wet))))

    def leaks(self) -> list[tuple[Place, ...]]:
        """Frames with rain that are dealt in several splits, identical pixel by pixel; where, in each of them."""
        self.setup()
        dealt = {
            split: [own[known.wet[own] > 0] for own, known in zip(windows.frames(), self._known, strict=True)]
            for split, windows in self._windows.items()
        }
        return repeated_frames(dealt, [known.digest for known in self._known])

    def _warn(self, archives: Sequence[Archive]) -> None:
        """Says, once for all processes, what does not stop a run but spoils its scores."""
        if found := self.leaks():
            named = [
                " = ".join(
                    f"{utc(archives[number].times[frame])} of {Path(archives[number].path).name} ({split})"
                    for split, number, frame in places
                )
                for places in found[:3]
            ]
            rank_zero_only(log.warning)(
                "Frames with rain that are identical pixel by pixel lie in different splits, %d in all, so that scores "
                "come out too good: %s; drop them from the archive, or split elsewhere.",
                len(found),
                "; ".join(named) + (" ..." if len(found) > 3 else ""),
            )
        packed = torch.tensor(max(float(np.nanmax(known.greatest)) for known in self._known))
        raw = replace(self.quantity, scale=1.0, offset=0.0, missing=None)
        greatest = float(raw.decode(packed)[0])
        if unreached := [threshold for threshold in self.quantity.thresholds if threshold > greatest]:
            rank_zero_only(log.warning)(
                "No pixel reaches %s %s, since the largest value of the data is %g: nothing can be scored there; lower "
                "data.thresholds.",
                ", ".join(f"{threshold:g}" for threshold in unreached),
                self.quantity.units,
                greatest,
            )

    def _quantity(self, archives: Sequence[Archive], cadence: int) -> Quantity:
        first, *others = (archive.quantity for archive in archives)
        for path, other in zip(self.paths[1:], others, strict=True):
            if replace(other, name=first.name, long_name=first.long_name) != first:
                raise UserError(
                    f"{self.paths[0]} and {path} hold different numbers ({_packing(first)}, and {_packing(other)}); "
                    "use archives of one quantity that are packed alike."
                )
        if self.relation is not None:
            if first.units != "dBZ":
                raise UserError(
                    f"data.relation turns reflectivity into rain rate, but {self.paths[0]} holds {first.units} already; "
                    "set data.relation=null."
                )
            first = replace(
                first,
                name="rainfall_rate",
                long_name="rain rate from reflectivity",
                units="mm/h",
                thresholds=THRESHOLDS["mm/h"],
                floor=FLOORS["mm/h"],
                relation=self.relation,
            )
        if self.accumulate > 1:
            if first.units != "mm/h":
                raise UserError(
                    f"data.accumulate={self.accumulate} takes the mean of rain rates, but the archive is in {first.units}; "
                    "set data.relation=marshall_palmer for reflectivity, or data.accumulate=1."
                )
            minutes = self.accumulate * cadence / 60
            first = replace(first, long_name=f"{first.long_name}, mean over {minutes:g} min")
        if self.floor is not None:
            first = replace(first, floor=float(self.floor))
        if self.thresholds is not None:
            ascending = sorted(set(map(float, self.thresholds)))
            if not ascending or list(self.thresholds) != ascending:
                raise UserError(f"data.thresholds are {list(self.thresholds)}; give one or more, each above the last.")
            first = replace(first, thresholds=tuple(ascending))
        if first.thresholds[0] <= first.floor:
            raise UserError(
                f"data.thresholds begin at {first.thresholds[0]:g} {first.units}, which every pixel reaches, since "
                f"data.floor is {first.floor:g}; begin above it."
            )
        return first

    def _cadence(self, archives: Sequence[Archive]) -> int:
        cadences = {}
        for archive in archives:
            try:
                cadences[archive.path] = cadence_of(archive.times)
            except UserError as error:
                raise UserError(f"{archive.path}: {error}") from None
        if len(set(cadences.values())) > 1:
            listed = ", ".join(f"{path} {seconds} s" for path, seconds in cadences.items())
            raise UserError(
                f"The archives have different times between frames ({listed}); use archives of one cadence."
            )
        return cadences[archives[0].path]

    def _check_sizes(self, archives: Sequence[Archive]) -> None:
        sizes = {archive.path: archive.grid.size for archive in archives}
        for option, crop in (("crop", self.crops["train"]), ("eval_crop", self.crops["test"])):
            for path, size in sizes.items():
                if crop.size is not None and crop.size > min(size):
                    raise UserError(
                        f"data.{option} is {crop.size}, but the frames of {path} are {size[0]} x {size[1]} pixels; crop to "
                        f"{min(size)} at most."
                    )
            if crop.size is None and len(set(sizes.values())) > 1:
                listed = ", ".join(f"{path} {height} x {width}" for path, (height, width) in sizes.items())
                raise UserError(
                    f"The archives have frames of different sizes ({listed}), which do not fit into one batch; set "
                    f"data.{option}."
                )

    def _index(
        self, archives: Sequence[Archive], cadence: int, name: Split, within: Interval, borders: Times
    ) -> WindowIndex:
        length = self.past + self.following
        times = [archive.times for archive in archives]
        index = index_windows(times, cadence, self.past, self.following, self.strides[name], within, borders)
        if not len(index.start):
            frames = sum(int(((within.start <= each) & (each < within.end)).sum()) for each in times)
            several, given = " x data.accumulate" * (self.accumulate > 1), " + data.after" * (self.after > 0)
            raise UserError(
                f"The {name} split has {frames} frames but no {length} in a row (data.past + data.future{several}{given}) "
                f"between its gaps and guards of {self.guard_hours:g} h; give it more by data.split, ask for fewer frames, "
                "or take a longer archive."
            )
        return index


def standardised(fields: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Static fields of each archive, K H W, with zero mean and unit spread over all archives; missing becomes 0."""
    pooled = [np.concatenate([own[k].ravel() for own in fields]) for k in range(len(fields[0]))]
    means = np.array([np.nanmean(values, dtype=np.float64) for values in pooled]).reshape(-1, 1, 1)
    spreads = np.array([np.nanstd(values, dtype=np.float64) or 1.0 for values in pooled]).reshape(-1, 1, 1)
    return [np.nan_to_num((own - means) / spreads).astype(np.float32) for own in fields]


def _packing(quantity: Quantity) -> str:
    return f"{quantity.units} = {quantity.scale:g} * number + {quantity.offset:g}, missing {quantity.missing}"
