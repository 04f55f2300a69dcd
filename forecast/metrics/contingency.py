"""Categorical scores: hits, misses, false alarms and correct negatives, and what is read off them.

A pixel is an event where its value is at or above the threshold, in the forecast as in the truth:

                      truth: event     truth: none
    forecast: event   hit              false alarm
    forecast: none    miss             correct negative

The functions take counts that were pooled as the reader likes (numpy or xarray) and know nothing of how. An empty
denominator gives NaN, never 0: where it did not rain there is no probability of detection.

Reference: Wilks (2019), Statistical Methods in the Atmospheric Sciences, 4th ed., section 9.2,
doi 10.1016/C2017-0-03921-6.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from forecast.batch import Forecast

Counts = TypeVar("Counts", NDArray[Any], xr.DataArray)


def ratio(numerator: Counts, denominator: Counts) -> Counts:
    """numerator / denominator, and NaN where the denominator is 0."""
    # xarray leaves `where` without types.
    quotient: Counts = numerator / xr.where(denominator != 0, denominator, np.nan)  # type: ignore[no-untyped-call]  # xarray has no types for it
    return quotient


def csi(hits: Counts, misses: Counts, false_alarms: Counts) -> Counts:
    """Critical success index (threat score): hits / (hits + misses + false alarms), 0 to 1, best 1.

    Reference: Schaefer (1990), Weather and Forecasting 5, 570, doi 10.1175/1520-0434(1990)005<0570:TCSIAA>2.0.CO;2.
    """
    return ratio(hits, hits + misses + false_alarms)


def pod(hits: Counts, misses: Counts) -> Counts:
    """Probability of detection (hit rate, recall): hits / (hits + misses), 0 to 1, best 1.

    Reference: Wilks (2019), section 9.2, doi 10.1016/C2017-0-03921-6.
    """
    return ratio(hits, hits + misses)


def far(hits: Counts, false_alarms: Counts) -> Counts:
    """False alarm RATIO: false alarms / (hits + false alarms), 0 to 1, best 0; 1 - FAR is the success ratio.

    Not the false alarm rate, whose denominator is the number of non-events.

    Reference: Barnes et al. (2009), Weather and Forecasting 24, 1452, doi 10.1175/2009WAF2222300.1.
    """
    return ratio(false_alarms, hits + false_alarms)


def frequency_bias(hits: Counts, misses: Counts, false_alarms: Counts) -> Counts:
    """Events forecast per event observed: (hits + false alarms) / (hits + misses), 0 to infinity, best 1.

    Reference: Wilks (2019), section 9.2, doi 10.1016/C2017-0-03921-6.
    """
    return ratio(hits + false_alarms, hits + misses)


def hss(hits: Counts, misses: Counts, false_alarms: Counts, correct_negatives: Counts) -> Counts:
    """Heidke skill score: the share correct beyond what chance gets right, -1 to 1, best 1, chance 0.

    With a hits, b false alarms, c misses, d correct negatives:
    HSS = 2 (a d - b c) / [(a + c) (c + d) + (a + b) (b + d)].

    Reference: Heidke (1926), Geografiska Annaler 8, 301, doi 10.1080/20014422.1926.11881138.
    """
    # In floating point, because products of the counts of a large archive overflow int64.
    a, b, c, d = 1.0 * hits, 1.0 * false_alarms, 1.0 * misses, 1.0 * correct_negatives
    return ratio(2 * (a * d - b * c), (a + c) * (c + d) + (a + b) * (b + d))


class Contingency(Metric):
    """Counts of hits, misses, false alarms and correct negatives by block, lead time and threshold.

    A valid pixel whose forecast (or truth) is not a finite number is neither event nor non-event: it enters none of
    the four counts, but `undefined`, and whoever reads scores off the counts must give NaN where that is not 0.
    Otherwise a network that answers NaN would earn correct negatives.

    Args:
        thresholds: of the events, in the units of the values.
        steps: forecast frames, S.
        blocks: number of rain events (or sequences).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    hits: Tensor
    """Int64 [block, lead, threshold], as the next three."""
    misses: Tensor
    false_alarms: Tensor
    correct_negatives: Tensor
    undefined: Tensor
    """Int64 [block, lead]."""

    def __init__(self, thresholds: Sequence[float], steps: int, blocks: int) -> None:
        super().__init__()
        self.thresholds = tuple(thresholds)
        shape = (blocks, steps, len(self.thresholds))
        for name in ("hits", "misses", "false_alarms", "correct_negatives"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros(shape[:2], dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor) -> None:
        """Count one batch.

        Args:
            forecast: its `mean` is scored, B S C H W in physical units.
            truth: B S C H W, in the same units.
            valid: B S C H W bool; other pixels are counted nowhere.
            block: B int64, 0 to blocks-1; a sample of block -1 is padding and counted nowhere.
        """
        # A comparison rounds the threshold to the dtype of the values: it has to be the same one for both sides.
        mean = forecast.mean.to(truth.dtype)
        valid = valid & (block >= 0)[:, None, None, None, None]
        defined = valid & torch.isfinite(mean) & torch.isfinite(truth)
        row = block.clamp_min(0)  # padding adds zeros to the first block

        pixels = _count(defined)
        self.undefined.index_add_(0, row, _count(valid) - pixels)
        for index, threshold in enumerate(self.thresholds):
            forecast_event = (mean >= threshold) & defined
            truth_event = (truth >= threshold) & defined
            hits = _count(forecast_event & truth_event)
            misses = _count(truth_event) - hits
            false_alarms = _count(forecast_event) - hits
            self.hits[..., index].index_add_(0, row, hits)
            self.misses[..., index].index_add_(0, row, misses)
            self.false_alarms[..., index].index_add_(0, row, false_alarms)
            self.correct_negatives[..., index].index_add_(0, row, pixels - hits - misses - false_alarms)

    def compute(self) -> dict[str, Tensor]:
        """The counts by name, added up over all processes. (A state of one single element comes back as a scalar.)"""
        names = ("hits", "misses", "false_alarms", "correct_negatives", "undefined")
        return {name: getattr(self, name).clone() for name in names}


def _count(where: Tensor) -> Tensor:
    """B S C H W bool -> B S int64."""
    return where.flatten(2).sum(2)
