"""Balanced errors: B-MSE and B-MAE, in which heavy rain weighs more because there is so little of it.

Reference: Shi et al. (2017), Deep Learning for Precipitation Nowcasting: A Benchmark and a New Model, arXiv 1706.03458.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Pixels, Scope, Score, Sum, ratio
from forecast.units import Decibel, Transform


class Balanced(AdditiveMetric):
    """Weighted errors of frames, summed over pixels and averaged over frames, as HKO-7 prints them.

        B-MSE = mean over frames of sum over pixels of w(o) (p(f) - p(o))^2,   B-MAE: |p(f) - p(o)| instead

    p takes rain to a pixel of HKO-7: (dBZ + 10) / 70 in [0, 1], with Z = 58.53 R^1.56; w is chosen on the true rain: 1 below
    2 mm/h, and 2, 5, 10 and 30 at and above 2, 5, 10 and 30 mm/h. Sums over pixels depend on the size of the frames, and on
    how much of them is valid: compare with HKO-7 on 480 x 480 pixels only. Over-forecasting is cheap: see the bias.

    Reference: Shi et al. (2017), section 5.1, arXiv 1706.03458.

    Args:
        scope: what is scored.
        thresholds: ascending, in `units`.
        weights: at and above each threshold; below the first the weight is 1.
        transform: p, from physical values to those that are compared; None is HKO-7's.
        units: of the thresholds and of what p takes; other data are refused.

    Raises:
        UserError: the data are in other units, or the thresholds do not ascend with a weight each.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "balanced_squared_error_sum": Sum("weighted squared error, over pixels"),
        "balanced_absolute_error_sum": Sum("weighted absolute error, over pixels"),
        "balanced_frames": Sum("frames with a pixel to compare", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "balanced_mse": Score("balanced squared error, sum over pixels, mean over frames", 0.0, heading="B-MSE"),
        "balanced_mae": Score("balanced absolute error, sum over pixels, mean over frames", 0.0, heading="B-MAE"),
    }

    def __init__(
        self,
        scope: Scope,
        thresholds: Sequence[float] = (0.5, 2.0, 5.0, 10.0, 30.0),
        weights: Sequence[float] = (1.0, 2.0, 5.0, 10.0, 30.0),
        transform: Transform | None = None,
        units: str = "mm/h",
    ) -> None:
        super().__init__(scope)
        if scope.quantity.units != units:
            raise UserError(
                f"The metric Balanced has thresholds in {units}, but these data are in units of {scope.quantity.units!r}; "
                "give it thresholds, weights, transform and units of its own, or leave it out."
            )
        if len(thresholds) != len(weights) or list(thresholds) != sorted(thresholds):
            raise UserError(
                f"The thresholds of the metric Balanced must ascend and have a weight each; received {list(thresholds)} "
                f"and {list(weights)}."
            )
        self.thresholds = tuple(thresholds)
        self.weights = (1.0, *weights)
        self.transform = Decibel("hko7") if transform is None else transform

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        compared, truth = pixels.compared, pixels.truth
        floor = self.scope.quantity.floor
        f, o = (
            self.transform.forward(torch.where(compared, field.double(), floor)) for field in (pixels.forecast, truth)
        )
        # right=True counts the thresholds that are at or below the value: `>=`, as everywhere.
        level = torch.bucketize(truth.contiguous(), truth.new_tensor(self.thresholds), right=True)
        weight = f.new_tensor(self.weights)[level]
        error = (f - o).abs()  # 0 where both hold the floor
        self.add("balanced_squared_error_sum", block, (weight * error.square()).flatten(2).sum(2))
        self.add("balanced_absolute_error_sum", block, (weight * error).flatten(2).sum(2))
        self.add("balanced_frames", block, compared.flatten(3).any(3).sum(2))

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        frames = counts["balanced_frames"]
        return {
            "balanced_mse": ratio(counts["balanced_squared_error_sum"], frames),
            "balanced_mae": ratio(counts["balanced_absolute_error_sum"], frames),
        }
