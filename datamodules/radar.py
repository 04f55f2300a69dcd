"""Radar archives as windows: packed frames as they lie on disk, cropped as they are read, split in absolute time.

Axes: B batch, T past frames, S forecast frames, C = 1 channel, K static fields, H W space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.cf import FLOORS, THRESHOLDS
from datamodules.frames import FrameData, Split
from datamodules.reader import Archive, open_archive
from datamodules.sampler import Draw
from datamodules.windows import Interval, WindowIndex, cadence_of, index_windows, split_times
from forecast.batch import Batch
from forecast.errors import UserError
from forecast.units import Grid, Quantity, Transform, default_transform, z_r_relation


class Crop(NamedTuple):
    """A square of `size` pixels: at random where there is a seed, in the middle otherwise. No size: the whole frame."""

    size: int | None
    seed: int | None = None

    def place(self, frame: tuple[int, int], epoch: int, position: int) -> tuple[slice, slice]:
        """Its rows and columns in a frame of H, W; a function of (seed, epoch, position)."""
        if self.size is None:
            return slice(0, frame[0]), slice(0, frame[1])
        room = [length - self.size for length in frame]
        if self.seed is None:
            corner = [free // 2 for free in room]
        else:
            random = np.random.default_rng([self.seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, position])
            corner = random.integers(0, room, endpoint=True).tolist()
        return slice(corner[0], corner[0] + self.size), slice(corner[1], corner[1] + self.size)


class RadarWindows:
    """The windows of one split, read as they are asked for, a batch at a time."""

    def __init__(
        self,
        archives: Sequence[Archive],
        fields: Sequence[NDArray[np.float32]],
        index: WindowIndex,
        past: int,
        future: int,
        crop: Crop,
    ) -> None:
        self.archives = archives
        self.fields = fields
        """K H W of each archive."""
        self.index = index
        self.blocks = index.blocks
        self.past = past
        self.future = future
        self.crop = crop

    def __len__(self) -> int:
        return len(self.index.start)

    def __getitem__(self, draw: Draw) -> Batch:
        frames, fields, times, blocks = [], [], [], []
        for position in draw.positions:
            window = max(position, 0)  # padding shows the first window, and its block says that it counts for nothing
            number, start = int(self.index.archive[window]), int(self.index.start[window])
            archive = self.archives[number]
            rows, columns = self.crop.place(archive.grid.size, draw.epoch, window)
            frames.append(archive.read(slice(start, start + self.past + self.future), rows, columns))
            fields.append(self.fields[number][:, rows, columns])
            times.append(int(archive.times[start + self.past - 1]))
            blocks.append(int(self.index.block[window]) if position >= 0 else -1)
        sequence = torch.from_numpy(np.stack(frames)).unsqueeze(2)
        return Batch(
            past=sequence[:, : self.past],
            future=sequence[:, self.past :],
            static=torch.from_numpy(np.stack(fields)),
            time=torch.tensor(times),
            block=torch.tensor(blocks),
            first=torch.ones(len(blocks), dtype=torch.bool),
        )


class RadarData(FrameData):
    """Windows from CF archives of rain rate or reflectivity (docs/data.md).

    Args:
        archive: path of a NetCDF file or a Zarr directory, or several.
        past, future, batch_size, workers, seed: as in `FrameData`.
        variable: the archive's variable, where its CF attributes do not tell.
        relation: name of a Z-R relation that turns dBZ into mm/h; none leaves dBZ.
        floor: the value of "no echo" or "no rain", in dBZ or mm/h; none is -10 dBZ, or no rain.
        thresholds: of the categorical scores, in dBZ or mm/h; none is 10 20 30 40 dBZ, or 0.5 2 5 10 30 mm/h.
        transform: physical values <-> what the network sees; none is the quantity's own.
        split: shares of the covered time for train, validation and test, or the dates of each; none is 0.7, 0.15, 0.15.
        guard_hours: least time between two splits, at least 6 h.
        stride: frames between the starts of training windows.
        eval_stride: the same for validation and test; none is `future`, so that a frame is forecast once.
        crop: pixels on a side of the squares cut from training windows, at random places; none is the whole frame.
        eval_crop: the same for validation and test, in the middle of the frame.
        static: variables of the archive over y and x alone, given to the network standardised.
    """

    def __init__(
        self,
        archive: str | Sequence[str] | None,
        past: int,
        future: int,
        batch_size: int,
        workers: int,
        seed: int,
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
        eval_crop: int | None = None,
        static: Sequence[str] = (),
    ) -> None:
        super().__init__(past, future, batch_size, workers, seed)
        if not archive:
            raise UserError("data.archive is not set; give the path of a NetCDF file or a Zarr directory, or several.")
        strides = {"stride": stride, "eval_stride": future if eval_stride is None else eval_stride}
        for name, value in (*strides.items(), ("crop", crop), ("eval_crop", eval_crop)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1.")
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
            "train": Crop(crop, seed),
            "validation": Crop(eval_crop),
            "test": Crop(eval_crop),
        }
        self.static = tuple(static)
        self.static_channels = len(self.static)
        self._windows: dict[Split, RadarWindows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the archives, check that they fit together, and lay out the splits; once, whatever the stage."""
        if self._windows:
            return
        archives = [open_archive(path, self.variable) for path in self.paths]
        self.quantity = self._quantity(archives)
        self.transform = self.given_transform or default_transform(self.quantity)
        self.cadence = self._cadence(archives)
        self._check_sizes(archives)
        self.grid = cropped(archives[0].grid, *self.crops["test"].place(archives[0].grid.size, 0, 0))
        fields = standardised([archive.fields(self.static) for archive in archives])
        times = np.concatenate([archive.times for archive in archives])
        intervals = split_times(times, self.split, self.guard_hours)
        indices = {name: self._index(archives, self.cadence, name, within) for name, within in intervals.items()}
        self._windows = {
            name: RadarWindows(archives, fields, index, self.past, self.future, self.crops[name])
            for name, index in indices.items()
        }

    def windows(self, split: Split) -> RadarWindows:
        """The windows of that split; the same object at each call."""
        self.setup()
        if split not in self._windows:
            raise UserError(f"data.split leaves nothing for {split}; give it a share or dates.")
        return self._windows[split]

    def _quantity(self, archives: Sequence[Archive]) -> Quantity:
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

    def _index(self, archives: Sequence[Archive], cadence: int, name: Split, within: Interval) -> WindowIndex:
        length = self.past + self.future
        times = [archive.times for archive in archives]
        index = index_windows(times, cadence, length, self.strides[name], within)
        if not len(index.start):
            frames = sum(int(((within.start <= each) & (each < within.end)).sum()) for each in times)
            raise UserError(
                f"The {name} split has {frames} frames but no {length} in a row (data.past + data.future) between its "
                f"gaps and guards of {self.guard_hours:g} h; give it more by data.split, ask for fewer frames, or take a "
                "longer archive."
            )
        return index


def cropped(grid: Grid, rows: slice, columns: slice) -> Grid:
    """The part of a grid that a crop keeps."""
    (y, x), (dy, dx) = grid.origin, grid.spacing
    origin = (y + rows.start * dy, x + columns.start * dx)
    return replace(grid, size=(rows.stop - rows.start, columns.stop - columns.start), origin=origin)


def standardised(fields: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Static fields of each archive, K H W, with zero mean and unit spread over all archives; missing becomes 0."""
    pooled = [np.concatenate([own[k].ravel() for own in fields]) for k in range(len(fields[0]))]
    means = np.array([np.nanmean(values, dtype=np.float64) for values in pooled]).reshape(-1, 1, 1)
    spreads = np.array([np.nanstd(values, dtype=np.float64) or 1.0 for values in pooled]).reshape(-1, 1, 1)
    return [np.nan_to_num((own - means) / spreads).astype(np.float32) for own in fields]


def _packing(quantity: Quantity) -> str:
    return f"{quantity.units} = {quantity.scale:g} * number + {quantity.offset:g}, missing {quantity.missing}"
