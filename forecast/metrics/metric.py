"""What every score is made of: sums that add up over batches, blocks and processes, and what is read off any pool of them.

A score is one file in this folder: pure functions with its equation, and one class that names its sums, collects them on
the device, and reads its scores off them after they were pooled as the reader likes. Most score each frame by itself, and
are given a few at a time (`FrameMetric`).

Axes: B batch, S forecast frames, F frames of a batch, C channels, H W space.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from forecast.batch import Forecast
from forecast.units import Quantity

Counts = TypeVar("Counts", NDArray[Any], xr.DataArray)
"""Counts and sums, pooled over whichever axes."""
_Self = TypeVar("_Self", bound="AdditiveMetric")
_THREADS = 32  # that get pixels of their own; more share these, so that memory has a bound
_LINES = 16  # that frames are cut into to count pixels: int8 holds as many ones, and the sums along a line cost little


def ratio(numerator: Counts, denominator: Counts) -> Counts:
    """numerator / denominator, and NaN where the denominator is 0."""
    if isinstance(denominator, xr.DataArray):
        return numerator / denominator.where(denominator != 0)
    return numerator / np.where(denominator != 0, denominator, np.nan)


@dataclass(frozen=True)
class Scope:
    """What is scored."""

    quantity: Quantity
    """Of forecast and truth; its thresholds are the events."""
    steps: int
    """Forecast frames, S."""
    blocks: int
    """Rain events (or sequences): the pools that can still be told apart afterwards."""
    size: tuple[int, int] | None = None
    """H, W of the frames."""

    @property
    def threshold(self) -> xr.Variable:
        """The coordinate of scores of events."""
        values = np.asarray(self.quantity.thresholds, dtype=np.float64)
        return xr.Variable("threshold", values, {"long_name": "event threshold", "units": self.quantity.units})


class Sum(NamedTuple):
    """A state: what is added up, by block, lead time and `dims`."""

    long_name: str
    dims: tuple[str, ...] = ()
    """Further axes, after block and lead_time; each has a coordinate."""
    power: int = 0
    """Its units are the quantity's to this power."""
    dtype: torch.dtype = torch.float64
    """int64 for counts."""


class Score(NamedTuple):
    """What is read off sums."""

    long_name: str
    best: float | None = None
    """The value of a perfect forecast; None where there is none."""
    power: int = 0
    """Its units are the quantity's to this power."""
    heading: str | None = None
    """In the printed tables; None keeps it out of them (skill.nc and skill.csv have it)."""
    log: str | None = None
    """Its name in the training log, to which the threshold and the scale are added (csi_20); None keeps it out."""
    units: str | None = None
    """Where they are no power of the quantity's."""


class Events(NamedTuple):
    """Events of frames, by threshold."""

    where: Tensor
    """F C P 2 H W int8: 1 where one is forecast, and where there is one, else 0."""
    forecasts: Tensor
    """F C P int64, how many are forecast."""
    observed: Tensor
    """F C P int64, how many there are."""
    hits: Tensor
    """F C P int64, how many of these are forecast."""


class Pixels:
    """The point forecast and the truth of a batch, or of a few of its frames, with what metrics ask of them.

    Args:
        forecast: ... C H W, in physical units; any numbers may lie where there is nothing to compare.
        truth: ... C H W, in the same units.
        counted: ... C H W bool: valid, in a sample that is no padding.
        told: ... C H W bool, where all members and probabilities of the forecast are finite; None where it has neither.
    """

    def __init__(self, forecast: Tensor, truth: Tensor, counted: Tensor, told: Tensor | None = None) -> None:
        self.forecast = forecast
        self.truth = truth
        self.counted = counted
        self.told = told
        self.sums: dict[int, dict[str, Tensor]] = {}
        """What the frames of a batch add to metrics that score each by itself, by their id, B S ...; see `score`."""
        self._events: dict[tuple[float, ...], Events] = {}

    @classmethod
    def of(cls, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor) -> "Pixels":
        """Those of a batch; the arguments are those of `AdditiveMetric.update`."""
        parts = (part for part in (forecast.members, forecast.exceedance) if part is not None)
        told = [torch.isfinite(part).all(1) for part in parts]
        # As uint8, which is several times quicker than bool.
        real = (block >= 0).view(torch.uint8).view(-1, 1, 1, 1, 1)
        counted = (valid.view(torch.uint8) & real).view(torch.bool)
        return cls(forecast.mean, truth, counted, torch.stack(told).all(0) if told else None)

    @cached_property
    def gap(self) -> Tensor:
        """... C H W: 0 where forecast and truth can be compared, which are counted and finite; else NaN.

        Added to them, it hides the rest: NaN is no event, and `nan_to_num` makes it any number, both several times quicker
        than `torch.where`.
        """
        # A number that is not finite, times 0, is NaN, and so is 0 / 0.
        return (self.forecast - self.truth).mul_(0).div_(ones(self.counted)).to(self.truth.dtype)

    @cached_property
    def compared(self) -> Tensor:
        """... C H W bool: counted, and finite in both."""
        return self.gap == 0

    @cached_property
    def known(self) -> Tensor:
        """Pixels that can be compared, of frames F C H W: F C int64."""
        # By way of float32, which is several times quicker than bool.
        return count(torch.eq(self.gap, 0, out=torch.empty_like(self.gap)).to(torch.int8))

    @cached_property
    def fields(self) -> Tensor:
        """... C 2 H W: the forecast and the truth, NaN where there is nothing to compare.

        Side by side in memory, and so is what is made of them: each thread then works on the same frames from one call to
        the next, and seldom reads what another core wrote, which may take several times as long.
        """
        *leading, height, width = self.gap.shape
        dtype = torch.result_type(self.forecast, self.truth)
        fields = self.gap.new_empty((*leading, 2, height, width), dtype=dtype)
        for field, values in zip(fields.unbind(-3), (self.forecast, self.truth), strict=True):
            torch.add(values, self.gap, out=field)
        return fields

    def events(self, thresholds: tuple[float, ...]) -> Events:
        """Of frames F C H W: where forecast and truth are at or above each threshold."""
        if thresholds not in self._events:
            # A comparison rounds the threshold to the dtype of the values: it has to be the same one for both sides.
            fields = self.fields.to(self.truth.dtype)
            frames, channels, *sides = fields.shape
            where = fields.new_empty((frames, channels, len(thresholds), *sides), dtype=torch.int8)
            # In float32 first, which is four times quicker than bool. NaN is no event.
            found = torch.empty_like(fields, dtype=torch.float32)
            for threshold, events in zip(thresholds, where.unbind(2), strict=True):
                events.copy_(torch.ge(fields, threshold, out=found))
            forecasts, observed = count(where).unbind(3)
            hits = count(where[..., 0, :, :] & where[..., 1, :, :])
            self._events[thresholds] = Events(where, forecasts, observed, hits)
        return self._events[thresholds]

    def few(self) -> Iterator["Pixels"]:
        """The frames F C H W of a batch, a few at a time."""
        # With fewer, the calls and the waiting of threads for each other take longer than the sums; more leave the caches.
        # An accelerator wants more to do at once.
        threads = torch.get_num_threads() if self.truth.device.type == "cpu" else _THREADS
        pixels = 2**18 * max(2, min(threads, _THREADS))
        samples, steps = self.truth.shape[:2]
        fields = self.forecast, self.truth, self.counted, *(() if self.told is None else (self.told,))
        for part in pieces(samples, steps, 1 + pixels // max(1, self.truth.shape[2:].numel())):
            yield Pixels(*(field[part].flatten(0, 1) for field in fields))

    def score(self, metrics: Iterable["AdditiveMetric"]) -> None:
        """Finds the sums for all metrics that score each frame by itself.

        A few frames at a time, so that they, and what metrics make of them on the way, stay in a CPU's cache.
        """
        chosen = [metric for metric in metrics if isinstance(metric, FrameMetric)]
        parts = [[metric.frames(few) for metric in chosen] for few in self.few()]
        size = self.truth.shape[:2]
        for metric, found in zip(chosen, zip(*parts, strict=True), strict=True):
            names = found[0]
            self.sums[id(metric)] = {name: _join([one[name] for one in found]).unflatten(0, size) for name in names}


class AdditiveMetric(Metric):
    """Sums by block and lead time over the valid pixels of batches, in int64 and float64 whatever the training's precision.

    A subclass declares SUMS and SCORES, gives the coordinates of its further axes, adds a batch in `collect` by `add`, and
    reads its scores in `scores`. Its constructor takes the scope first, then its options by name; an instance says
    nothing that its dataset does not say.

    Args:
        scope: what is scored.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    SUMS: ClassVar[Mapping[str, Sum]]
    SCORES: ClassVar[Mapping[str, Score]]

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        sizes = {name: coordinate.size for name, coordinate in self.coordinates().items()}
        for name, one in self.SUMS.items():
            shape = (scope.blocks, scope.steps, *(sizes[dim] for dim in one.dims))
            self.add_state(name, torch.zeros(shape, dtype=one.dtype), dist_reduce_fx="sum")

    def coordinates(self) -> dict[str, xr.Variable]:
        """Of the further axes: values with long_name and units. Called by the constructor: set options before it."""
        return {}

    def update(
        self, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor, pixels: Pixels | None = None
    ) -> None:
        """Add one batch.

        Args:
            forecast: in physical units.
            truth: B S C H W, in the same units.
            valid: B S C H W bool; other pixels add nothing, whatever numbers lie there.
            block: B int64, 0 to blocks-1; a sample of block -1 is padding and adds nothing.
            pixels: of these, where they are known already.
        """
        self.collect(forecast, pixels or Pixels.of(forecast, truth, valid, block), block.clamp_min(0))

    @abstractmethod
    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        """Adds one batch to the states; see `update`. Here padding belongs to block 0, to which it has to add zeros."""

    @classmethod
    @abstractmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        """The SCORES, from SUMS that were added up over whichever of block and lead_time; NaN without a denominator.

        Args:
            counts: has this metric's sums with their coordinates (and other metrics' too), on any further dimensions.
        """

    def add(self, name: str, block: Tensor, values: Tensor) -> None:
        """Adds a value for each sample to a state: values B S ..., the state's axes after block; padding must be zeros."""
        state: Tensor = getattr(self, name)
        state.index_add_(0, block, values.to(state.dtype))

    def compute(self) -> dict[str, Tensor]:
        """The sums by name, added up over all processes. (A state of one single element comes back as a scalar.)"""
        return {name: getattr(self, name).clone() for name in self.SUMS}

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> _Self:
        """Move to another device, but never to another dtype.

        torchmetrics withstands .half() and .float(), but not .to(dtype), which is what Lightning's "16-true" and
        "bf16-true" call on the whole module: the sums of a test set do not fit into either.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, exclude_state)
        return self


class FrameMetric(AdditiveMetric):
    """A metric that scores each frame by itself."""

    @abstractmethod
    def frames(self, few: Pixels) -> dict[str, Tensor]:
        """What each of a few frames adds to the SUMS: F ... by name, channels added up."""

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        if id(self) not in pixels.sums:
            pixels.score([self])
        for name, values in pixels.sums[id(self)].items():
            self.add(name, block, values)


def pieces(samples: int, steps: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a batch, as slices of samples and of steps: about equal, of at most `frames` frames (and at least one)."""
    leads = _share(steps, frames)
    rows = _share(samples, frames // leads)
    for row in range(0, samples, rows):
        for lead in range(0, steps, leads):
            yield slice(row, row + rows), slice(lead, lead + leads)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _share(whole: int, most: int) -> int:
    """The largest of the fewest equal parts of which none is larger than `most`."""
    return math.ceil(whole / math.ceil(whole / max(1, most)))


def ones(mask: Tensor) -> Tensor:
    """True and False as 1 and 0 in float32, by way of uint8, which is several times quicker."""
    return mask.view(torch.uint8).float()


def count(ones: Tensor) -> Tensor:
    """Zeros and ones, ... H W int8 -> ... int64."""
    pixels = ones.flatten(-2)
    line = pixels.shape[-1] // _LINES
    # One line upon another in int8, which is the quickest sum there is; what is left is short.
    lines = pixels[..., : _LINES * line].unflatten(-1, (_LINES, line)).sum(-2, dtype=torch.int8)
    counted = lines.sum(-1, dtype=torch.int64)
    rest = pixels[..., _LINES * line :]
    return counted + rest.sum(-1, dtype=torch.int64) if rest.shape[-1] else counted
