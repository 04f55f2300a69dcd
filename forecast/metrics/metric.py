"""What every score is made of: sums that add up over batches, blocks and processes, and what is read off any pool of them.

A score is one file in this folder: pure functions with its equation, and one class that names its sums, collects them on
the device, and reads its scores off them after they were pooled as the reader likes.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


class Pixels(NamedTuple):
    """The point forecast and the truth of a batch, with what all metrics ask of them."""

    forecast: Tensor
    """B S C H W, in physical units; any numbers may lie where there is nothing to compare."""
    truth: Tensor
    """B S C H W, in the same units."""
    counted: Tensor
    """B S C H W bool: valid, in a sample that is no padding."""
    gap: Tensor
    """B S C H W: 0 where forecast and truth can be compared, which are counted and finite; else NaN. Added to them, it hides
    the rest: NaN is no event, and `nan_to_num` makes it any number, both several times quicker than `torch.where`."""

    @property
    def compared(self) -> Tensor:
        """B S C H W bool: counted, and finite in both."""
        return self.gap == 0


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
            pixels: what `paired` makes of these, where it is known already.
        """
        self.collect(forecast, pixels or paired(forecast.mean, truth, valid, block), block)

    @abstractmethod
    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        """Adds one batch to the states; see `update`."""

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
        state.index_add_(0, block.clamp_min(0), values.to(state.dtype))

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


def paired(forecast: Tensor, truth: Tensor, valid: Tensor, block: Tensor) -> Pixels:
    """Point forecast and truth, once for all metrics.

    Args:
        forecast, truth: B S C H W.
        valid, block: as in `AdditiveMetric.update`.
    """

    def gaps(f: Tensor, o: Tensor, counted: Tensor) -> Tensor:
        # 0 times a number that is not finite is NaN, and so is 0 / 0.
        return ((f * 0 + o * 0) / counted.int()).to(o.dtype)

    counted = valid & (block >= 0).view(-1, 1, 1, 1, 1)
    return Pixels(forecast, truth, counted, by_frame(gaps, forecast, truth, counted))


def by_frame(compute: Callable[..., Tensor], *fields: Tensor) -> Tensor:
    """Applies a function of frames to a few frames at a time, so that what it makes on the way stays in a CPU's cache.

    Args:
        compute: takes some frames of each field, F C H W, and returns F ...; each frame for itself.
        fields: B S C H W.

    Returns:
        B S ...
    """
    size = fields[0].shape
    # An accelerator wants more to do at once; its memory still holds it.
    pixels = 2**16 if fields[0].device.type == "cpu" else 2**24
    few = 1 + pixels // max(1, size[2:].numel())
    parts = zip(*(field.flatten(0, 1).split(few) for field in fields), strict=True)
    return torch.cat([compute(*part) for part in parts]).unflatten(0, size[:2])


def count(ones: Tensor) -> Tensor:
    """Zeros and ones, F C H W -> F int64: exact, since no row is longer than float32 counts."""
    return ones.sum(3).long().sum((1, 2))


def known(gap: Tensor) -> Tensor:
    """Pixels that can be compared, by `Pixels.gap`: F C H W -> F int64."""
    return count(torch.eq(gap, 0, out=torch.empty_like(gap)))
