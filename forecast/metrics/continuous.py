"""Scores of the values themselves: mean squared and absolute error, mean error, correlation.

All are read off sums over pixels that add up over batches, blocks and processes, so that a score of any pool of
windows gives every valid pixel the same weight. f is the forecast, o the truth, n the number of valid pixels.

Reference: Wilks (2019), Statistical Methods in the Atmospheric Sciences, 4th ed., section 9.3,
doi 10.1016/C2017-0-03921-6.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torchmetrics import Metric

from forecast.batch import Forecast
from forecast.metrics.contingency import Counts, ratio

SUMS = (
    "error_sum",
    "absolute_error_sum",
    "squared_error_sum",
    "forecast_sum",
    "truth_sum",
    "forecast_square_sum",
    "truth_square_sum",
    "product_sum",
)

# Below this share of the mean square, a variance is rounding: 1e-6 of the values is some units in float32's last place.
_CONSTANT = 1e-12

_Self = TypeVar("_Self", bound="Continuous")


def mse(squared_error_sum: Counts, pixels: Counts) -> Counts:
    """Mean squared error: sum (f - o)^2 / n, in squared units.

    Reference: Wilks (2019), section 9.3, doi 10.1016/C2017-0-03921-6.
    """
    return ratio(squared_error_sum, pixels)


def rmse(squared_error_sum: Counts, pixels: Counts) -> Counts:
    """Root of the pooled mean squared error: sqrt(sum (f - o)^2 / n), in units.

    The root of the mean, which is not the mean of the roots of single windows.

    Reference: Chai and Draxler (2014), Geosci. Model Dev. 7, 1247, doi 10.5194/gmd-7-1247-2014.
    """
    root: Counts = mse(squared_error_sum, pixels) ** 0.5
    return root


def mae(absolute_error_sum: Counts, pixels: Counts) -> Counts:
    """Mean absolute error: sum |f - o| / n, in units.

    Reference: Willmott and Matsuura (2005), Climate Research 30, 79, doi 10.3354/cr030079.
    """
    return ratio(absolute_error_sum, pixels)


def mean_error(error_sum: Counts, pixels: Counts) -> Counts:
    """Mean error, the additive bias: sum (f - o) / n, in units; above 0 the forecast is too high.

    Reference: Wilks (2019), section 9.3, doi 10.1016/C2017-0-03921-6.
    """
    return ratio(error_sum, pixels)


def correlation(
    pixels: Counts,
    forecast_sum: Counts,
    truth_sum: Counts,
    forecast_square_sum: Counts,
    truth_square_sum: Counts,
    product_sum: Counts,
) -> Counts:
    """Pearson's correlation of f and o over all pooled pixels, -1 to 1, best 1; NaN where either is constant.

    r = cov(f, o) / sqrt(var f var o), with cov(f, o) = mean(f o) - mean(f) mean(o) and var x = cov(x, x).

    Reference: Pearson (1895), Proc. R. Soc. London 58, 240, doi 10.1098/rspl.1895.0041.
    """
    mean_forecast, mean_truth = ratio(forecast_sum, pixels), ratio(truth_sum, pixels)
    variance_forecast = _variance(ratio(forecast_square_sum, pixels), mean_forecast)
    variance_truth = _variance(ratio(truth_square_sum, pixels), mean_truth)
    covariance = ratio(product_sum, pixels) - mean_forecast * mean_truth
    # Rounding may bring a perfect forecast above 1 by a unit in the last place.
    coefficient: Counts = (covariance / (variance_forecast * variance_truth) ** 0.5).clip(-1.0, 1.0)
    return coefficient


def _variance(mean_square: Counts, mean: Counts) -> Counts:
    """mean(x^2) - mean(x)^2, and NaN where that is nothing but rounding: x is constant."""
    variance = mean_square - mean * mean
    # xarray leaves `where` without types.
    spread: Counts = xr.where(variance > _CONSTANT * mean_square, variance, np.nan)  # type: ignore[no-untyped-call]  # xarray has no types for it
    return spread


class Continuous(Metric):
    """Sums over valid pixels by block and lead time, in float64 whatever the precision of the training.

    A forecast that is not a finite number at a valid pixel makes the sums, and the scores read off them, NaN (or
    infinite): it names itself.

    Args:
        steps: forecast frames, S.
        blocks: number of rain events (or sequences).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    pixels: Tensor
    """Int64 [block, lead], valid pixels."""

    def __init__(self, steps: int, blocks: int) -> None:
        super().__init__()
        self.add_state("pixels", torch.zeros((blocks, steps), dtype=torch.int64), dist_reduce_fx="sum")
        for name in SUMS:
            self.add_state(name, torch.zeros((blocks, steps), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor) -> None:
        """Add one batch.

        Args:
            forecast: its `mean` is scored, B S C H W in physical units.
            truth: B S C H W, in the same units.
            valid: B S C H W bool; other pixels add nothing.
            block: B int64, 0 to blocks-1; a sample of block -1 is padding and adds nothing.
        """
        valid = valid & (block >= 0)[:, None, None, None, None]
        row = block.clamp_min(0)  # padding adds zeros to the first block
        # Chosen, not multiplied: NaN under the mask times 0 would be NaN.
        f = torch.where(valid, forecast.mean.double(), 0.0).flatten(2)
        o = torch.where(valid, truth.double(), 0.0).flatten(2)
        error = f - o

        self.pixels.index_add_(0, row, valid.flatten(2).sum(2))
        for name, values in zip(SUMS, (error, error.abs(), error * error, f, o, f * f, o * o, f * o), strict=True):
            getattr(self, name).index_add_(0, row, values.sum(2))

    def compute(self) -> dict[str, Tensor]:
        """The sums by name, added up over all processes. (A state of one single element comes back as a scalar.)"""
        return {name: getattr(self, name).clone() for name in ("pixels", *SUMS)}

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> _Self:
        """Move to another device, but never to another dtype.

        torchmetrics withstands .half() and .float(), but not .to(dtype), which is what Lightning's "16-true" and
        "bf16-true" call on the whole module: the sums of a test set do not fit into either.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, exclude_state)
        return self
