"""How much was scored: windows, valid pixels, and those that cannot be scored because a forecast is not a finite number.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.metrics.metric import AdditiveMetric, Pixels, Score, Sum, by_frame, count, known


class Coverage(AdditiveMetric):
    """Part of every `Skill`: `pixels` is what means are divided by, and `undefined` spoils every score of its pool.

    Otherwise a network that answers NaN would earn correct negatives.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "pixels": Sum("valid pixels", dtype=torch.int64),
        "undefined": Sum("valid pixels where the forecast or the truth is not a finite number", dtype=torch.int64),
        "samples": Sum("windows with a valid pixel at this lead time", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {}

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        gap = pixels.gap
        for part in (forecast.members, forecast.exceedance):
            if part is not None:
                gap = torch.where(torch.isfinite(part).all(1), gap, torch.nan)
        counted = by_frame(lambda one: count(one.int()), pixels.counted)
        self.add("pixels", block, counted)
        self.add("undefined", block, counted - by_frame(known, gap))
        self.add("samples", block, counted > 0)

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        return {}
