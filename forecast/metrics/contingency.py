"""Categorical scores: hits, misses, false alarms and correct negatives, and what is read off them.

A pixel is an event where its value is at or above the threshold, in the forecast as in the truth:

                      truth: event     truth: none
    forecast: event   hit              false alarm
    forecast: none    miss             correct negative

The functions take counts that were pooled as the reader likes (numpy or xarray) and know nothing of how. An empty
denominator gives NaN, never 0: where it did not rain there is no probability of detection.

Reference: Wilks (2019), Statistical Methods in the Atmospheric Sciences, 4th ed., section 9.2,
doi 10.1016/C2017-0-03921-6.

Axes: F frames, C channels, H W space, P thresholds.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from forecast.metrics.metric import Counts, FrameMetric, Pixels, Score, Sum, ratio


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


def success_ratio(hits: Counts, false_alarms: Counts) -> Counts:
    """Success ratio (precision): hits / (hits + false alarms) = 1 - FAR, 0 to 1, best 1.

    Reference: Roebber (2009), Weather and Forecasting 24, 601, doi 10.1175/2008WAF2222159.1.
    """
    return ratio(hits, hits + false_alarms)


def frequency_bias(hits: Counts, misses: Counts, false_alarms: Counts) -> Counts:
    """Events forecast per event observed: (hits + false alarms) / (hits + misses), 0 to infinity, best 1.

    Reference: Wilks (2019), section 9.2, doi 10.1016/C2017-0-03921-6.
    """
    return ratio(hits + false_alarms, hits + misses)


def hss(hits: Counts, misses: Counts, false_alarms: Counts, correct_negatives: Counts) -> Counts:
    """Heidke skill score: the share correct beyond what chance gets right, -1 to 1, best 1, chance 0.

    With a hits, b false alarms, c misses, d correct negatives:
    HSS = 2 (a d - b c) / [(a + c) (c + d) + (a + b) (b + d)].

    Reference: Heidke (1926), Geografiska Annaler 8, 301, jstor.org/stable/519729.
    """
    # In floating point, because products of the counts of a large archive overflow int64.
    a, b, c, d = 1.0 * hits, 1.0 * false_alarms, 1.0 * misses, 1.0 * correct_negatives
    return ratio(2 * (a * d - b * c), (a + c) * (c + d) + (a + b) * (b + d))


def ets(hits: Counts, misses: Counts, false_alarms: Counts, correct_negatives: Counts) -> Counts:
    """Equitable threat score (Gilbert skill score): CSI without the hits of chance, -1/3 to 1, best 1, chance 0.

    With r = (hits + misses) (hits + false alarms) / n hits by chance among n pixels:
    ETS = (hits - r) / (hits + misses + false alarms - r).

    Reference: Gilbert (1884), American Meteorological Journal 1, 166; Hogan et al. (2010), Weather and Forecasting 25,
    710, doi 10.1175/2009WAF2222350.1.
    """
    a, b, c, d = 1.0 * hits, 1.0 * false_alarms, 1.0 * misses, 1.0 * correct_negatives
    chance = ratio((a + c) * (a + b), a + b + c + d)
    return ratio(a - chance, a + b + c - chance)


def peirce(hits: Counts, misses: Counts, false_alarms: Counts, correct_negatives: Counts) -> Counts:
    """Peirce skill score (true skill statistic, Hanssen and Kuipers' discriminant), -1 to 1, best 1, chance 0.

    Probability of detection less the false alarm rate: hits / (hits + misses) - false alarms / (false alarms + correct
    negatives).

    Reference: Peirce (1884), Science 4, 453, doi 10.1126/science.ns-4.93.453.b.
    """
    return pod(hits, misses) - ratio(false_alarms, false_alarms + correct_negatives)


def sedi(hits: Counts, misses: Counts, false_alarms: Counts, correct_negatives: Counts) -> Counts:
    """Symmetric extremal dependence index, for rare events: -1 to 1, best 1, chance 0.

    With the hit rate H = hits / (hits + misses) and the false alarm rate F = false alarms / (false alarms + correct
    negatives): SEDI = [ln F - ln H - ln(1 - F) + ln(1 - H)] / [ln F + ln H + ln(1 - F) + ln(1 - H)]. NaN where one of
    the four counts is 0: a logarithm of 0 has no value, not even for a perfect forecast.

    Reference: Ferro and Stephenson (2011), Weather and Forecasting 26, 699, doi 10.1175/WAF-D-10-05030.1.
    """
    log_h, log_not_h = _log(pod(hits, misses)), _log(ratio(misses, hits + misses))
    none = false_alarms + correct_negatives
    log_f, log_not_f = _log(ratio(false_alarms, none)), _log(ratio(correct_negatives, none))
    return ratio(log_f - log_h - log_not_f + log_not_h, log_f + log_h + log_not_f + log_not_h)


def _log(share: Counts) -> Counts:
    """Natural logarithm, and NaN for 0."""
    # xarray leaves `where` without types.
    logarithm: Counts = np.log(xr.where(share > 0, share, np.nan))  # type: ignore[no-untyped-call]  # xarray has no types for it
    return logarithm


class Contingency(FrameMetric):
    """Counts of hits, misses, false alarms and correct negatives by block, lead time and threshold."""

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "hits": Sum("events that were forecast", ("threshold",), dtype=torch.int64),
        "misses": Sum("events that were not forecast", ("threshold",), dtype=torch.int64),
        "false_alarms": Sum("forecast events that were none", ("threshold",), dtype=torch.int64),
        "correct_negatives": Sum("pixels without event, and none forecast", ("threshold",), dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "csi": Score("critical success index", best=1.0, heading="CSI", log="csi"),
        "pod": Score("probability of detection", best=1.0, heading="POD"),
        "far": Score("false alarm ratio", best=0.0, heading="FAR"),
        "success_ratio": Score("success ratio", best=1.0),
        "hss": Score("Heidke skill score", best=1.0, heading="HSS"),
        "ets": Score("equitable threat score", best=1.0),
        "peirce": Score("Peirce skill score", best=1.0),
        "sedi": Score("symmetric extremal dependence index", best=1.0),
        "frequency_bias": Score("frequency bias", best=1.0, heading="bias", log="bias"),
    }

    def coordinates(self) -> dict[str, xr.Variable]:
        return {"threshold": self.scope.threshold}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        hits, misses, false_alarms = table(few, self.scope.quantity.thresholds)
        rest = few.known.sum(1, keepdim=True) - hits - misses - false_alarms
        return {"hits": hits, "misses": misses, "false_alarms": false_alarms, "correct_negatives": rest}

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        a, b, c, d = (counts[name] for name in ("hits", "false_alarms", "misses", "correct_negatives"))
        return {
            "csi": csi(a, c, b),
            "pod": pod(a, c),
            "far": far(a, b),
            "success_ratio": success_ratio(a, b),
            "hss": hss(a, c, b, d),
            "ets": ets(a, c, b, d),
            "peirce": peirce(a, c, b, d),
            "sedi": sedi(a, c, b, d),
            "frequency_bias": frequency_bias(a, c, b),
        }


def table(few: Pixels, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, misses and false alarms of a few frames: F P int64 each, for P thresholds."""
    events = few.events(thresholds)
    hits, observed, forecasts = (one.sum(1) for one in (events.hits, events.observed, events.forecasts))
    return hits, observed - hits, forecasts - hits
