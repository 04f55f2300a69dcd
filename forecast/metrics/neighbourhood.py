"""Scores that forgive a displacement: the fractions skill score, and the critical success index of block maxima.

A pixel is an event where its value is at or above the threshold. Missing pixels, and what lies beyond the border, are no
events.

Axes: F frames, C channels, H W space, N scales.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from forecast.errors import UserError
from forecast.metrics import contingency
from forecast.metrics.metric import Counts, FrameMetric, Pixels, Scope, Score, Sum, ratio

_TOGETHER = 2**22
"""Pixels of images whose windows are found at once, of one scale; fewer of more scales, which read them again and again."""
_AT_ONCE = 16
"""Numbers that are added up in one call; of more, first two and two."""
_LARGEST = 181
"""Pixels; sums over frames of the squares of larger counts could leave the whole numbers that float64 holds."""


def fss(difference: Counts, square: Counts) -> Counts:
    """Fractions skill score: 1 - sum (Pf - Po)^2 / sum (Pf^2 + Po^2), 0 to 1, best 1; NaN where there is no event at all.

    Pf and Po are the shares of events in a square window of n x n pixels around each pixel, of the forecast and of the
    truth. Windows reach beyond the border, where there are no events; one of even n reaches a pixel further up and left.
    Sums run over all pixels of all windows in time: counts of many fields are pooled before they are divided.

    Reference: Roberts and Lean (2008), Mon. Weather Rev. 136, 78, doi 10.1175/2007MWR2123.1.
    """
    return 1 - ratio(difference, square)


def useful_scale(score: xr.DataArray, frequency: xr.DataArray) -> xr.DataArray:
    """The smallest scale that was computed with FSS >= 0.5 + f0 / 2, f0 the observed frequency of events; NaN without one.

    Half way between a random forecast (f0) and a perfect one. Not interpolated between scales.

    Args:
        score: the FSS, with the axis scale.
        frequency: f0, events per pixel.

    Reference: Roberts and Lean (2008), Mon. Weather Rev. 136, 78, doi 10.1175/2007MWR2123.1.
    """
    useful = score >= 0.5 + frequency / 2
    return score["scale"].astype(float).where(useful).min("scale")


class Fractions(FrameMetric):
    """Sums of squared differences of the shares of events in windows, by threshold and scale.

    The shares are counts in whole numbers, so that each sum over an image is exact.

    Args:
        scope: what is scored; missing pixels hold no event, in the forecast and in the truth.
        scales: sides of the windows in pixels.

    Raises:
        UserError: a scale below 1 or above 181 pixels, or one twice.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "fractions_difference": Sum("sum of (forecast share - true share)^2", ("threshold", "scale")),
        "fractions_square": Sum("sum of forecast share^2 + true share^2", ("threshold", "scale")),
        "observed_events": Sum("events in the truth", ("threshold",), dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "fss": Score("fractions skill score", best=1.0, heading="FSS", log="fss"),
        "fss_useful_scale": Score("smallest useful scale by the fractions skill score", units="pixels"),
    }

    def __init__(self, scope: Scope, scales: Sequence[int] = (1, 8, 32)) -> None:
        self.scales = _sizes("scales", scales, _LARGEST)
        super().__init__(scope)

    def coordinates(self) -> dict[str, xr.Variable]:
        about = {"long_name": "side of the window", "units": "pixels"}
        return {"threshold": self.scope.threshold, "scale": xr.Variable("scale", np.asarray(self.scales), about)}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        events = few.events(self.scope.quantity.thresholds)
        either, both = events.forecasts + events.observed, 2 * events.hits
        images = events.where.flatten(0, 2)
        sums = images.new_zeros((len(images), 2, len(self.scales)), dtype=torch.float64)
        if self.scales[0] == 1:
            # Of one pixel (f - o)^2 is f + o - 2 f o, and (f + o)^2 is f + o + 2 f o.
            sums[:, :, 0] = torch.stack((either - both, either + both), -1).flatten(0, 2)
        # An image without events adds nothing, and costs nothing more.
        some = either.flatten().nonzero().flatten()
        wide = [scale for scale in self.scales if scale > 1]
        if wide and len(some):
            images = images if len(some) == len(images) else images.index_select(0, some)
            together = max(1, _TOGETHER // (len(wide) * images[0].numel()))
            sums[some, :, -len(wide) :] = torch.cat([_squares(part, wide) for part in images.split(together)])
        sums /= torch.tensor(self.scales, dtype=torch.float64, device=sums.device) ** 4
        difference, total = sums.unflatten(0, either.shape).sum(1).unbind(2)
        return {
            "fractions_difference": difference,
            # f^2 + o^2 = ((f - o)^2 + (f + o)^2) / 2
            "fractions_square": (difference + total) / 2,
            "observed_events": events.observed.sum(1),
        }

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        score = fss(counts["fractions_difference"], counts["fractions_square"])
        frequency = ratio(counts["observed_events"], counts["pixels"])
        return {"fss": score, "fss_useful_scale": useful_scale(score, frequency)}


def _squares(events: Tensor, scales: Sequence[int]) -> Tensor:
    """Sums over all windows, in whole numbers.

    Args:
        events: zeros and ones of forecast and truth, I 2 H W int8.
        scales: sides of the windows, ascending.

    Returns:
        I 2 N: of (f - o)^2 and (f + o)^2, with f and o the events in a window.
    """
    images, _, height, width = events.shape
    # Images lie one after another in a row of numbers, with zeros to the right of each line and below each image, which
    # are to the left of the next line and above the next image too. A window begins at its upper left corner, and is the
    # sum of smaller ones, scale by scale.
    margin = max(scales) // 2
    rows, line = height + margin, width + margin
    first = margin * line + margin
    strides = (2 * rows * line, rows * line, line, 1)
    ones = torch.zeros(first + 2 * images * rows * line, dtype=torch.int8, device=events.device)
    # f - o, and -f - o, whose square is that of f + o: a window of 8 x 8 has -128, which is the least that int8 holds.
    (forecast, truth), (difference, total) = events.unbind(1), ones.as_strided(events.shape, strides, first).unbind(1)
    torch.sub(forecast, truth, out=difference)
    torch.sub(difference, forecast, alpha=2, out=total)
    sums = []
    side, window = 1, ones
    for scale in scales:
        if scale % side:
            side, window = 1, ones
        times = scale // side
        # The narrowest whole numbers are the quickest.
        window = window.to(_whole(-2 * scale**2, scale**2))
        window = _runs(_runs(window, times, side), times, side * line)
        side = scale
        inside = window.as_strided(events.shape, strides, first - scale // 2 * (line + 1))
        exact = _whole(0, width * (2 * scale**2) ** 2)  # for the squares of a row
        squares = inside.to(exact, copy=True)
        sums.append(squares.mul_(squares).sum(3, dtype=exact).sum(2, dtype=torch.float64))
    return torch.stack(sums, -1)


def _whole(lowest: int, highest: int) -> torch.dtype:
    """The narrowest dtype that holds these whole numbers; float64 is exact below 2^53."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= lowest and highest <= torch.iinfo(dtype).max:
            return dtype
    return torch.float64


def _runs(values: Tensor, length: int, step: int) -> Tensor:
    """Sums of `length` values that lie `step` apart, beginning with each that has so many after it."""
    if length == 1:
        return values
    if length <= _AT_ONCE and step > 1:
        # In one call, which is quick only where what is added up are no neighbours in memory.
        rows = values.as_strided((length, len(values) - (length - 1) * step), (step, 1))
        return rows.sum(0, dtype=values.dtype)
    sums = _runs(values[:-step] + values[step:], length // 2, 2 * step)
    return sums if length % 2 == 0 else sums[:-step] + values[(length - 1) * step :]


class PooledContingency(FrameMetric):
    """Counts of hits, misses and false alarms of block maxima, as in the papers on generative nowcasting.

    Forecast and truth are replaced by their maxima over blocks of pool x pool pixels that do not overlap (stride = pool);
    blocks that the border cuts stay, smaller. A block counts if any of its pixels does.

    Args:
        scope: what is scored.
        pools: sides of the blocks in pixels.

    Raises:
        UserError: a pool below 1 pixel, or one twice.

    Reference: Gao et al. (2023), PreDiff, arXiv 2307.10422, CSI-pool4 and CSI-pool16; after the pooled scores of Ravuri et
    al. (2021), Nature 597, 672, doi 10.1038/s41586-021-03854-z.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "pooled_hits": Sum("blocks with an event that was forecast", ("threshold", "pool"), dtype=torch.int64),
        "pooled_misses": Sum("blocks with an event not forecast", ("threshold", "pool"), dtype=torch.int64),
        "pooled_false_alarms": Sum("blocks forecast with an event, without", ("threshold", "pool"), dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "csi_pooled": Score("critical success index of block maxima", best=1.0, log="csi_pooled"),
        "frequency_bias_pooled": Score("frequency bias of block maxima", best=1.0),
    }

    def __init__(self, scope: Scope, pools: Sequence[int] = (4, 16)) -> None:
        self.pools = _sizes("pools", pools)
        super().__init__(scope)

    def coordinates(self) -> dict[str, xr.Variable]:
        about = {"long_name": "side of the blocks", "units": "pixels"}
        return {"threshold": self.scope.threshold, "pool": xr.Variable("pool", np.asarray(self.pools), about)}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        # A maximum forgets minus infinity, unless there is nothing else, which is no event.
        fields = few.fields.to(few.truth.dtype).nan_to_num(-torch.inf).flatten(0, 1)
        by_pool = []
        for pool in self.pools:
            f, o = F.max_pool2d(fields, pool, ceil_mode=True).unflatten(0, few.truth.shape[:2]).unbind(2)
            blocks = Pixels(f, o, torch.ones_like(o, dtype=torch.bool))
            by_pool.append(contingency.table(blocks, self.scope.quantity.thresholds))
        return {name: torch.stack(found, -1) for name, found in zip(self.SUMS, zip(*by_pool, strict=True), strict=True)}

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        a, c, b = (counts[name] for name in cls.SUMS)
        return {
            "csi_pooled": contingency.csi(a, c, b),
            "frequency_bias_pooled": contingency.frequency_bias(a, c, b),
        }


def _sizes(name: str, sizes: Sequence[int], largest: int | None = None) -> tuple[int, ...]:
    """Sides in pixels, ascending."""
    whole = all(isinstance(size, int) and size >= 1 and size <= (largest or size) for size in sizes)
    if not sizes or not whole or len(set(sizes)) != len(sizes):
        limit = "1 or more" if largest is None else f"1 to {largest}"
        raise UserError(f"{name} are different whole numbers of pixels, {limit}; received {list(sizes)}.")
    return tuple(sorted(sizes))
