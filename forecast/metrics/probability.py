"""Scores of probabilities: Brier score and its parts, reliability diagram, area under the ROC curve.

Each pixel has a probability p of reaching a threshold, and o = 1 where the truth did (>=), else 0. The probability is the
forecast's own where it gives one, else the share of its members at or above the threshold; of a forecast without members
it is 0 or 1. Probabilities are counted in bins, the multiples k / M of one member's share: for ensembles nothing is lost.

With n pixels, and in bin k: n_k pixels, e_k events, o_k = e_k / n_k, p_k the mean of the n_k probabilities; c = sum e_k / n.

Axes: B batch, S forecast frames, M members, P thresholds, C channels, H W space.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Counts, Pixels, Scope, Score, Sum, ratio

_AT_ONCE = 2**20  # pixels looked at together, a sample at least: 8 MiB in float64, of which some copies live at a time
_BIN = "probability_bin"


def brier(brier_sum: Counts, pixels: Counts) -> Counts:
    """Brier score: mean of (p - o)^2, 0 to 1, best 0; from the probabilities themselves, not from the bins.

    Its integral over all thresholds is the CRPS.

    Reference: Brier (1950), Mon. Wea. Rev. 78, 1, doi 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    return ratio(brier_sum, pixels)


def reliability(count: xr.DataArray, events: xr.DataArray, probability: xr.DataArray) -> xr.DataArray:
    """Reliability, the part of the Brier score that calibration would mend: sum_k n_k (p_k - o_k)^2 / n, best 0.

    Args:
        count, events, probability: n_k, e_k and the sum of probabilities by probability_bin, as in the next functions.

    Reference: Murphy (1973), J. Appl. Meteorology 12, 595, doi 10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2.
    """
    # n_k (p_k - o_k)^2 = (sum p - e_k)^2 / n_k; that of an empty bin is NaN, which xarray's sum leaves out.
    return ratio(ratio((probability - events) ** 2, count).sum(_BIN), count.sum(_BIN))


def resolution(count: xr.DataArray, events: xr.DataArray) -> xr.DataArray:
    """Resolution, how far apart the bins tell events: sum_k n_k (o_k - c)^2 / n; the larger the better.

    Reference: Murphy (1973), J. Appl. Meteorology 12, 595, doi 10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2.
    """
    rate = ratio(events.sum(_BIN), count.sum(_BIN))
    return ratio(ratio((events - rate * count) ** 2, count).sum(_BIN), count.sum(_BIN))


def uncertainty(count: xr.DataArray, events: xr.DataArray) -> xr.DataArray:
    """Uncertainty, the Brier score of always forecasting the pool's own event frequency: c (1 - c).

    Reference: Murphy (1973), J. Appl. Meteorology 12, 595, doi 10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2.
    """
    rate = ratio(events.sum(_BIN), count.sum(_BIN))
    return rate * (1 - rate)


def brier_skill(score: Counts, climatology: Counts) -> Counts:
    """Brier skill score against the sample's climatology: 1 - brier / uncertainty, best 1; NaN where all or none are events.

    That climatology is known only afterwards, and is one for the whole pool: where storms and dry days are pooled, telling
    them apart already counts as skill (Hamill and Juras, 2006, Q. J. R. Meteorol. Soc. 132, 2905, doi 10.1256/qj.06.25).

    Reference: Wilks (2019), Statistical Methods in the Atmospheric Sciences, section 9.4, doi 10.1016/C2017-0-03921-6.
    """
    skill: Counts = 1 - ratio(score, climatology)
    return skill


def roc_area(count: xr.DataArray, events: xr.DataArray) -> xr.DataArray:
    """Area under the curve of hit rate against false alarm rate over all probabilities, 0 to 1, best 1, no skill 0.5.

    By trapezoids between the bins: the chance that an event was given a higher bin than a non-event, ties counting half,
    sum_k (n_k - e_k) (sum_{j>k} e_j + e_k / 2) / (E (n - E)) with E = sum_k e_k. NaN without events or without non-events.

    Reference: Mason and Graham (2002), Q. J. R. Meteorol. Soc. 128, 2145, doi 10.1256/003590002320603584.
    """
    # In floating point, because products of the counts of a large archive overflow int64.
    quiet, loud = 1.0 * (count - events), 1.0 * events
    every = loud.sum(_BIN)
    above = every - loud.cumsum(_BIN)
    return ratio((quiet * (above + loud / 2)).sum(_BIN), every * quiet.sum(_BIN))


class Probability(AdditiveMetric):
    """Counts, events and probabilities by threshold and bin, over valid pixels whose probability (or members) is finite.

    A probability goes to the nearest k / members, half-way to the even k. For ensembles of that size (and forecasts without
    members) the bins are the possible probabilities, and brier = reliability - resolution + uncertainty. For continuous
    probabilities the rest is `brier_within_bins`, the variance of p within bins less twice its covariance with o: what
    binning hides (Stephenson et al., 2008, Weather and Forecasting 23, 752, doi 10.1175/2007WAF2006116.1).

    Args:
        scope: what is scored.
        members: size of the ensembles; bins are the members + 1 multiples of 1 / members.

    Raises:
        UserError: fewer than one member.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "probability_count": Sum("pixels by forecast probability", ("threshold", _BIN), dtype=torch.int64),
        "probability_events": Sum("events by forecast probability", ("threshold", _BIN), dtype=torch.int64),
        "probability_sum": Sum("sum of the forecast probabilities", ("threshold", _BIN)),
        "brier_sum": Sum("sum of (forecast probability - event)^2", ("threshold",)),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "brier": Score("Brier score", best=0.0, heading="Brier", log="brier"),
        "brier_skill": Score("Brier skill score against the sample's climatology", best=1.0),
        "brier_reliability": Score("reliability part of the Brier score", best=0.0),
        "brier_resolution": Score("resolution part of the Brier score"),
        "brier_uncertainty": Score("uncertainty part of the Brier score"),
        "brier_within_bins": Score("Brier score - (reliability - resolution + uncertainty)"),
        "roc_area": Score("area under the ROC curve", best=1.0, heading="ROC area", log="roc_area"),
        "mean_probability": Score("mean forecast probability in the bin"),
        "event_frequency": Score("frequency of events in the bin"),
    }

    def __init__(self, scope: Scope, members: int) -> None:
        if members < 1:
            raise UserError(f"members={members} for the scores of probabilities; it must be 1 or more.")
        self.members = members
        super().__init__(scope)

    def coordinates(self) -> dict[str, xr.Variable]:
        notes = {"long_name": "forecast probability, to the nearest", "units": "1"}
        bins = torch.arange(self.members + 1, dtype=torch.float64) / self.members
        return {"threshold": self.scope.threshold, _BIN: xr.Variable(_BIN, bins.numpy(), notes)}

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        members = forecast.mean.unsqueeze(1) if forecast.members is None else forecast.members
        evidence = members if forecast.exceedance is None else forecast.exceedance
        samples = max(1, _AT_ONCE // pixels.truth.shape[1:].numel())
        wholes = evidence, pixels.truth, pixels.counted, block
        for part in zip(*(whole.split(samples) for whole in wholes), strict=True):
            self._update(*part, given=forecast.exceedance is not None)

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        count, events, total = (counts[f"probability_{name}"] for name in ("count", "events", "sum"))
        score = brier(counts["brier_sum"], count.sum(_BIN))
        rel, res, unc = reliability(count, events, total), resolution(count, events), uncertainty(count, events)
        return {
            "brier": score,
            "brier_skill": brier_skill(score, unc),
            "brier_reliability": rel,
            "brier_resolution": res,
            "brier_uncertainty": unc,
            "brier_within_bins": score - (rel - res + unc),
            "roc_area": roc_area(count, events),
            "mean_probability": ratio(total, count),
            "event_frequency": ratio(events, count),
        }

    def _update(self, evidence: Tensor, truth: Tensor, counted: Tensor, block: Tensor, *, given: bool) -> None:
        """Some samples of a batch; the evidence is given probabilities, B P S C H W, or members, B M S C H W."""
        # A mean over members, or over thresholds, is finite where all of them are.
        defined = Pixels(evidence.mean(1), truth, counted).compared
        found = []
        for index, threshold in enumerate(self.scope.quantity.thresholds):
            probability = evidence[:, index].double() if given else _share(evidence, threshold, truth.dtype)
            found.append(self._sums(probability, truth >= threshold, defined))
        for name, by_threshold in zip(self.SUMS, zip(*found, strict=True), strict=True):
            self.add(name, block, torch.stack(by_threshold, dim=2))

    def _sums(self, probability: Tensor, event: Tensor, defined: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What one threshold adds to SUMS, in their order, B S (bins): from B S C H W each."""
        bins = self.members + 1
        nearest = (probability * self.members).round().clamp(0, self.members)
        # What does not count goes into a bin beyond the last, which is cut off.
        where = torch.where(defined, nearest, bins).long().flatten(2)
        zeros = torch.zeros(*where.shape[:2], bins + 1, dtype=torch.int64, device=where.device)
        count = zeros.scatter_add(2, where, torch.ones_like(where))
        events = zeros.scatter_add(2, where, event.flatten(2).long())
        total = zeros.double().scatter_add(2, where, probability.flatten(2))
        squares = torch.where(defined, (probability - event.double()).square(), 0.0).flatten(2).sum(2)
        return count[..., :bins], events[..., :bins], total[..., :bins], squares


def _share(members: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    """Members at or above the threshold, B M S C H W -> B S C H W float64, compared in the dtype of the truth."""
    reached = torch.zeros_like(members[:, 0], dtype=torch.float64)
    for member in members.unbind(1):  # one at a time: all at once would be another ensemble in memory
        reached += member.to(dtype) >= threshold
    return reached / members.shape[1]
