"""Scores of the values themselves: mean squared and absolute error, mean error, correlation.

All but the cosine are read off sums over pixels that add up over batches, blocks and processes, so that a score of any
pool of windows gives every valid pixel the same weight. f is the forecast, o the truth, n the number of valid pixels.

Reference: Wilks (2019), Statistical Methods in the Atmospheric Sciences, 4th ed., section 9.3,
doi 10.1016/C2017-0-03921-6.

Axes: F frames, C channels, H W space, N values of a frame.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from forecast.metrics.metric import Counts, FrameMetric, Pixels, Score, Sum, ratio

# Below this share of the mean square, a variance is rounding: 1e-6 of the values is some units in float32's last place.
_CONSTANT = 1e-12


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


class Continuous(FrameMetric):
    """Sums of errors, values, squares and products over the valid pixels; `Coverage` counts the pixels."""

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "error_sum": Sum("sum of forecast - truth", power=1),
        "absolute_error_sum": Sum("sum of |forecast - truth|", power=1),
        "squared_error_sum": Sum("sum of (forecast - truth)^2", power=2),
        "forecast_sum": Sum("sum of the forecast", power=1),
        "truth_sum": Sum("sum of the truth", power=1),
        "forecast_square_sum": Sum("sum of forecast^2", power=2),
        "truth_square_sum": Sum("sum of truth^2", power=2),
        "product_sum": Sum("sum of forecast * truth", power=2),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "mse": Score("mean squared error", best=0.0, power=2, heading="MSE", log="mse"),
        "rmse": Score("root mean squared error", best=0.0, power=1, heading="RMSE"),
        "mae": Score("mean absolute error", best=0.0, power=1, heading="MAE", log="mae"),
        "mean_error": Score("mean error", best=0.0, power=1),
        "correlation": Score("Pearson correlation", best=1.0, heading="correlation"),
    }

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        values = _numbers(few.fields)
        f, o = _sum(values)
        # In place, in memory that is in the cache already.
        error = (values[:, :, 0] - values[:, :, 1]).abs_()
        absolute = error.sum((1, 2, 3))
        error_square = error.mul_(error).sum((1, 2, 3))
        f_square, o_square = _sum(values.mul_(values))
        return {
            "error_sum": f - o,
            "absolute_error_sum": absolute,
            "squared_error_sum": error_square,
            "forecast_sum": f,
            "truth_sum": o,
            "forecast_square_sum": f_square,
            "truth_square_sum": o_square,
            # (f - o)^2 = f^2 + o^2 - 2 f o
            "product_sum": (f_square + o_square - error_square) / 2,
        }

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        n = counts["pixels"]
        moments = ("forecast_sum", "truth_sum", "forecast_square_sum", "truth_square_sum", "product_sum")
        return {
            "mse": mse(counts["squared_error_sum"], n),
            "rmse": rmse(counts["squared_error_sum"], n),
            "mae": mae(counts["absolute_error_sum"], n),
            "mean_error": mean_error(counts["error_sum"], n),
            "correlation": correlation(n, *(counts[name] for name in moments)),
        }


def _numbers(fields: Tensor) -> Tensor:
    """In float64, and 0 where there was NaN."""
    return fields.nan_to_num(0.0).double()


def _sum(values: Tensor) -> tuple[Tensor, Tensor]:
    """F C 2 H W -> F and F."""
    f, o = values.sum((-2, -1)).sum(1).unbind(1)
    return f, o


def cosine(cosine_sum: Counts, cosine_frames: Counts) -> Counts:
    """Cosine of the angle between forecast and truth, the "correlation" of the ConvLSTM papers; 0 to 1, best 1.

    The mean over frames of sum f o / sqrt(sum f^2 sum o^2), with f and o counted from the quantity's floor, which is what
    HKO-7's pixels (dBZ + 10) / 70 do. Not centred: it is large wherever it rains a little everywhere. Each frame weighs the
    same, as in the papers, so that figures compare. A frame where only one of the two is empty gives 0, as there; one where
    both are is not counted.

    Reference: Shi et al. (2015), arXiv 1506.04214, section 4.2.
    """
    return ratio(cosine_sum, cosine_frames)


class Cosine(FrameMetric):
    """Cosines of single frames, added up."""

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "cosine_sum": Sum("sum of the cosines of frames"),
        "cosine_frames": Sum("frames with anything above the floor", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {"cosine": Score("cosine (uncentred correlation)", best=1.0)}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        floor = self.scope.quantity.floor
        values = _numbers(few.fields - floor)
        product = values.prod(2).sum((1, 2, 3))
        f_square, o_square = _sum(values.mul_(values))
        norm = (f_square * o_square).sqrt()
        cosine = torch.where(norm > 0, product / norm, 0.0)
        return {"cosine_sum": cosine, "cosine_frames": f_square + o_square > 0}

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"cosine": cosine(counts["cosine_sum"], counts["cosine_frames"])}
