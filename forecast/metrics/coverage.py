"""How much was scored: windows, valid pixels, and those that cannot be scored because a forecast is not a finite number.

Axes: F frames, C channels, H W space.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from forecast.metrics.metric import FrameMetric, Pixels, Score, Sum, count


class Coverage(FrameMetric):
    """Part of every `Skill`: `pixels` is what means are divided by, and `undefined` spoils every score of its pool.

    Otherwise a network that answers NaN would earn correct negatives.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "pixels": Sum("valid pixels", dtype=torch.int64),
        "undefined": Sum("valid pixels where the forecast or the truth is not a finite number", dtype=torch.int64),
        "samples": Sum("windows with a valid pixel at this lead time", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        counted = count(few.counted.view(torch.int8)).sum(1)
        defined = few.known if few.told is None else count((few.compared & few.told).view(torch.int8))
        return {"pixels": counted, "undefined": counted - defined.sum(1), "samples": counted > 0}

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        return {}
