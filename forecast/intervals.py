"""How far the difference of two models' scores is chance: a paired bootstrap over rain events.

Pixels of one storm are alike, and so are its windows; rain events are what can be taken as independent. So whole events
(blocks) are drawn with replacement, the same for both models, and the score is computed anew from the pooled counts of
each draw.
"""

from collections.abc import Hashable
from math import sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from forecast.metrics.coverage import Coverage
from forecast.skill import derive, metric_of

LEVEL = 0.95
"""Of every interval."""
LEAST_EVENTS = 10
"""With fewer there is no interval: a handful of events does not tell how much events differ."""
DRAWS = 10_000
_AT_ONCE = 2**21  # numbers of a sum, in as many draws as are made at once

Array = NDArray[np.float64]


class Pools(NamedTuple):
    """One score of all models, each beside the reference.

    Each Dataset has the axis model (the reference is not on it) and the score's further axes, and these variables:
    `value`, `reference`, `difference` (value - reference), `low` and `high` (its 95 % interval; NaN where there is none),
    `events` (rain events from which the score can be told, for both) and `significant` (0 lies outside the interval).
    """

    lead_time: xr.Dataset
    """By lead time."""
    mean: xr.Dataset
    """Mean over lead times of the score, so that each weighs the same."""
    pooled: xr.Dataset
    """Counts of all lead times added up, then one score."""


def difference(skill: xr.Dataset, score: str, reference: str, draws: int = DRAWS, seed: int = 0) -> Pools:
    """The difference of each model's score to the reference's, with its 95 % interval.

    With the counts c_e of event e, and n_e how often it is drawn among as many as there are, a draw's difference is
    score(sum_e n_e c_e) of the model minus that of the reference. The interval is the expanded percentile interval: the
    quantiles q and 1 - q of the draws' differences, q = Phi(-sqrt(n / (n - 1)) t), with n events and t the 97.5 % quantile
    of Student's t with n - 1 degrees of freedom. The plain percentiles 2.5 and 97.5, which it approaches, are too narrow
    for few events. Draws in which there is nothing to divide by are left out.

    An event counts in n where the score can be computed from it alone, for both models: without rain above a threshold
    there is no CSI. With fewer than 10 there is no interval.

    Args:
        skill: counts and sums with the axes model, block and lead_time, as in skill.nc; select before what is not needed.
        score: a name that `forecast.skill.derive` gives.
        reference: a model's name.
        draws: how often all events are drawn.
        seed: of the draws, which are the same for all models, scores and lead times.

    Reference: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3, doi 10.1201/9780429246593;
    Hesterberg (2015), section 5.3, doi 10.1080/00031305.2015.1089789 (expanded percentile); Hamill (1999), doi
    10.1175/1520-0434(1999)014<0155:HTFENP>2.0.CO;2 (paired, whole cases).
    """
    # Dropped rather than selected: so the coordinates stay, whose units `derive` reads.
    counts = skill.drop_vars({*skill.data_vars} - {*Coverage.SUMS, *metric_of(score).SUMS}).astype(np.float64)
    pooled = _pools(counts.sum("block", skipna=False), score)
    events = _events(counts, score, reference)
    drawn = _resampled(counts, score, reference, draws, seed)
    return Pools(*(_compared(*parts, reference) for parts in zip(pooled, events, drawn, strict=True)))


def widened(events: NDArray[Any]) -> Array:
    """The share of draws below an expanded percentile interval, for each number of events; NaN for fewer than 10.

    Args:
        events: of any shape.
    """
    normal = NormalDist()
    z = normal.inv_cdf((1 + LEVEL) / 2)
    # The quantile of Student's t by its expansion in 1 / nu (Abramowitz and Stegun 1964, 26.7.5): 2e-5 off at 9 degrees.
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    known, place = np.unique(events, return_inverse=True)
    shares = [
        normal.cdf(-sqrt(n / (n - 1)) * sum(term / (n - 1) ** power for power, term in enumerate(terms)))
        if n >= LEAST_EVENTS
        else np.nan
        for n in known.tolist()
    ]
    return np.array(shares)[place].reshape(np.shape(events))


def _pools(counts: xr.Dataset, score: str) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """The score by lead time, its mean over lead times, and that of all lead times pooled."""
    by_lead = derive(counts)[score]
    return by_lead, by_lead.mean("lead_time", skipna=False), derive(counts.sum("lead_time", skipna=False))[score]


def _against(score: xr.DataArray, reference: str) -> xr.DataArray:
    return score.drop_sel(model=reference) - score.sel(model=reference, drop=True)


def _events(counts: xr.Dataset, score: str, reference: str) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """In each pool, how many events tell something of the difference; a mean has as many as its poorest lead time."""
    by_lead, _, pooled = (_against(one, reference).notnull().sum("block") for one in _pools(counts, score))
    return by_lead, by_lead.min("lead_time"), pooled


def _resampled(
    counts: xr.Dataset, score: str, reference: str, draws: int, seed: int
) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """The differences in every draw, with the axis draw first."""
    random, blocks = np.random.default_rng(seed), counts.sizes["block"]
    stacked = counts.transpose("block", ...)
    parts: tuple[list[xr.DataArray], ...] = ([], [], [])
    largest = max(data.size for data in stacked.data_vars.values()) // blocks
    chunk = max(1, _AT_ONCE // max(largest, blocks))
    for first in range(0, draws, chunk):
        rows = min(chunk, draws - first)
        chosen = random.integers(blocks, size=(rows, blocks)) + blocks * np.arange(rows)[:, None]
        # How often each block was drawn: then adding up is one product of matrices for each of the sums.
        weights = np.bincount(chosen.ravel(), minlength=rows * blocks).reshape(rows, blocks).astype(np.float64)
        sums: dict[Hashable, Any] = {
            name: (("draw", *one.dims[1:]), np.tensordot(weights, one.values, axes=1))
            for name, one in stacked.data_vars.items()
        }
        drawn = xr.Dataset(sums, stacked.drop_vars("block", errors="ignore").coords)
        for part, one in zip(parts, _pools(drawn, score), strict=True):
            part.append(_against(one, reference).transpose("draw", ...))
    by_lead, mean, pooled = (xr.concat(part, "draw") for part in parts)
    return by_lead, mean, pooled


def _compared(score: xr.DataArray, events: xr.DataArray, drawn: xr.DataArray, reference: str) -> xr.Dataset:
    base = score.sel(model=reference, drop=True)
    change = _against(score, reference)
    share = widened(events.transpose(*change.dims).values)
    ordered = np.sort(drawn.transpose("draw", *change.dims).values, axis=0)  # NaN comes last
    # No interval around a difference that is not defined.
    share = np.where(change.notnull().values, share, np.nan)
    low, high = (change.copy(data=_quantile(ordered, each)) for each in (share, 1 - share))
    return xr.Dataset(
        {
            "value": score.drop_sel(model=reference),
            "reference": base,
            "difference": change,
            "low": low,
            "high": high,
            "events": events,
            "significant": (low > 0) | (high < 0),
        }
    )


def _quantile(ordered: Array, share: Array) -> Array:
    """Of the finite numbers along the first axis, which ascend and end with NaN: for each column its own quantile."""
    finite = np.isfinite(ordered).sum(axis=0)
    defined = np.isfinite(share) & (finite > 0)
    place = np.where(defined, share, 0) * np.maximum(finite - 1, 0)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(finite - 1, 0))
    lower, upper = (np.take_along_axis(ordered, each[None], axis=0)[0] for each in (below, above))
    return np.where(defined, lower + (place - below) * (upper - lower), np.nan)
