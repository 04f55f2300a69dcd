"""Intervals: they hold the true difference as often as they say, know what to draw, and say when events are too few."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

from forecast import intervals
from forecast.batch import Forecast
from forecast.intervals import LEAST_EVENTS, difference, widened
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.metric import Scope
from forecast.skill import Skill, derive
from forecast.units import Quantity

QUANTITY = Quantity("rainfall_rate", "rain rate", "mm/h", (2.0, 50.0))
MODELS = ("persistence", "good", "poor")
NOISE = dict(zip(MODELS, (4.0, 2.0, 4.0), strict=True))


def scored(
    blocks: int = 12, dry: int = 0, models: tuple[str, ...] = MODELS, undefined: str | None = None
) -> xr.Dataset:
    """Counts of forecasts with other noise, one window a block, 2 lead times; the last `dry` blocks have no rain."""
    generator = torch.Generator().manual_seed(1)
    skill = Skill(models, Scope(QUANTITY, 2, blocks), 600, {"values": Continuous, "events": Contingency})
    shape = (blocks, 2, 1, 6, 6)
    truth = 6 * torch.rand(shape, generator=generator) * torch.rand((blocks, 1, 1, 1, 1), generator=generator)
    truth[blocks - dry :] = 0
    noise = {model: torch.randn(shape, generator=generator) for model in MODELS}
    for model in models:
        mean = (truth + NOISE[model] * noise[model]).clamp_min(0)
        mean[blocks - dry :] = 0
        if model == undefined:
            mean[0, 1, 0, 0, 0] = torch.nan
        skill.update(model, Forecast(mean), truth, torch.ones(shape, dtype=torch.bool), torch.arange(blocks))
    return skill.dataset()


def counted(hits: Any, others: Any) -> xr.Dataset:
    """Counts by hand: hits, and misses and false alarms together; model block threshold, one lead time."""
    dims = ("model", "block", "lead_time", "threshold")
    hits, others = (np.asarray(each, dtype=np.int64)[:, :, None] for each in (hits, others))
    zeros = np.zeros(hits.shape[:3], dtype=np.int64)
    return xr.Dataset(
        {
            **dict.fromkeys(("pixels", "undefined", "samples"), (dims[:3], zeros)),
            **dict.fromkeys(("misses", "correct_negatives"), (dims, zeros[..., None] + 0 * hits)),
            "hits": (dims, hits),
            "false_alarms": (dims, others),
        },
        {"model": ["model", "persistence"], "lead_time": [10.0], "threshold": np.arange(hits.shape[3])},
    )


def simulated(events: int, sets: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Data sets of two models: hits, and hits, misses and false alarms together; model, event, set.

    Events have log-normal sizes and a difficulty that both models meet; the better one finds more.
    """
    observed = rng.poisson(rng.lognormal(4.0, 0.7, (events, sets))) + 1
    difficulty = rng.normal(0.0, 0.7, (events, sets))
    hits, total = [], []
    for shift in (0.3, 0.0):
        found = 1 / (1 + np.exp(-(difficulty + shift + rng.normal(0.0, 0.3, (events, sets)))))
        hits.append(rng.binomial(observed, found))
        total.append(observed + rng.poisson(observed * (1 - found)))
    return np.stack(hits), np.stack(total)


@pytest.mark.parametrize("events", [10, 40])
def test_an_interval_holds_the_true_difference_as_often_as_it_says(events: int) -> None:
    rng = np.random.default_rng(0)
    everything = simulated(300_000, 1, rng)
    csi = everything[0].sum((1, 2)) / everything[1].sum((1, 2))
    hits, total = simulated(events, 500, rng)
    pooled = difference(counted(hits, total - hits), "csi", "persistence", draws=1000).pooled.sel(model="model")
    held = (pooled["low"] <= csi[0] - csi[1]) & (csi[0] - csi[1] <= pooled["high"])
    # 0.95 is promised; 500 data sets tell it to 0.01, and skewed sizes cost few events a little.
    assert 0.91 <= float(held.mean()) <= 0.975
    unpaired = np.sqrt((hits[:1] / total[:1]).var() + (hits[1:] / total[1:]).var()) / np.sqrt(events)
    assert float((pooled["high"] - pooled["low"]).mean()) < 2 * 1.96 * unpaired


def test_the_draws_are_those_of_a_paired_bootstrap_of_whole_events() -> None:
    hits, total = (each[:, :, 0] for each in simulated(25, 1, np.random.default_rng(3)))
    ours = difference(counted(hits[..., None], (total - hits)[..., None]), "csi", "persistence", draws=20_000).pooled

    def change(a: Any, b: Any, c: Any, d: Any, axis: int) -> Any:
        return a.sum(axis) / b.sum(axis) - c.sum(axis) / d.sum(axis)

    theirs = scipy.stats.bootstrap(
        (hits[0], total[0], hits[1], total[1]), change, paired=True, n_resamples=20_000, rng=np.random.default_rng(5)
    ).bootstrap_distribution
    share = scipy.stats.norm.cdf(-np.sqrt(25 / 24) * scipy.stats.t.ppf(0.975, 24))
    low, high = np.quantile(theirs, [share, 1 - share])
    width = high - low
    assert ours["low"].item() == pytest.approx(low, abs=0.03 * width)
    assert ours["high"].item() == pytest.approx(high, abs=0.03 * width)


def test_few_events_widen_the_interval_as_students_t_does() -> None:
    events = np.array([[10, 11, 30], [9, 500, 0]])
    t = scipy.stats.t.ppf(0.975, events - 1)
    expected = scipy.stats.norm.cdf(-np.sqrt(events / (events - 1)) * t)
    shares = widened(events)
    np.testing.assert_allclose(shares[[0, 0, 0, 1], [0, 1, 2, 1]], expected[[0, 0, 0, 1], [0, 1, 2, 1]], rtol=2e-3)
    assert np.isnan(shares[1, [0, 2]]).all()


def test_values_are_those_of_the_pools() -> None:
    skill = scored()
    pools = difference(skill, "mse", "persistence", draws=100)
    by_lead = derive(skill.sum("block"))["mse"]
    xr.testing.assert_allclose(pools.lead_time["value"], by_lead.drop_sel(model="persistence"))
    xr.testing.assert_allclose(pools.mean["value"], by_lead.mean("lead_time").drop_sel(model="persistence"))
    everything = derive(skill.sum(["block", "lead_time"]))["mse"]
    xr.testing.assert_allclose(pools.pooled["value"], everything.drop_sel(model="persistence"))
    for pool in pools:
        xr.testing.assert_allclose(pool["difference"], pool["value"] - pool["reference"])


def test_significant_is_a_difference_whose_interval_excludes_zero() -> None:
    pooled = difference(scored(), "mse", "persistence", draws=1000).pooled
    good, poor = pooled.sel(model="good"), pooled.sel(model="poor")
    assert good["significant"]
    assert good["low"] < good["difference"] < good["high"] < 0
    assert not poor["significant"]
    assert poor["low"] < 0 < poor["high"]


def test_a_model_against_its_equal_differs_by_nothing_for_certain() -> None:
    skill = scored(models=("persistence", "good"))
    twin = xr.concat([skill, skill.sel(model=["good"]).assign_coords(model=["twin"])], "model")
    pooled = difference(twin, "csi", "good", draws=100).pooled.sel(model="twin", threshold=2)
    assert [pooled[name].item() for name in ("difference", "low", "high", "significant")] == [0, 0, 0, False]


def test_events_are_those_from_which_the_score_can_be_told() -> None:
    pools = difference(scored(blocks=14, dry=4), "csi", "persistence", draws=100)
    assert pools.pooled["events"].sel(threshold=2).values.tolist() == [10, 10]
    assert np.isfinite(pools.pooled["low"].sel(threshold=2)).all()
    # Nothing reaches 50 mm/h: no CSI, no event, no interval.
    assert pools.pooled["events"].sel(threshold=50).values.tolist() == [0, 0]
    assert pools.pooled[["difference", "low", "high"]].sel(threshold=50).to_array().isnull().all()


def test_too_few_events_get_no_interval() -> None:
    for pool in difference(scored(blocks=14, dry=5), "csi", "persistence", draws=100):
        few = pool.sel(threshold=2)
        assert (few["events"] < LEAST_EVENTS).all()
        assert few[["low", "high"]].to_array().isnull().all()
        assert few["difference"].notnull().all()
        assert not few["significant"].any()


def test_a_forecast_that_is_not_finite_has_no_difference_and_spoils_no_other() -> None:
    pools = difference(scored(undefined="good"), "mse", "persistence", draws=100)
    good, poor = (pools.lead_time.sel(model=name) for name in ("good", "poor"))
    assert good["difference"].isnull().values.tolist() == [False, True]
    assert good["low"].isnull().values.tolist() == [False, True]
    assert poor["low"].notnull().all()
    for pool in (pools.mean, pools.pooled):
        assert pool.sel(model="good")[["difference", "low", "high"]].to_array().isnull().all()


def test_draws_are_the_same_whichever_models_are_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = difference(scored(models=("persistence", "good")), "csi", "persistence", draws=300)
    monkeypatch.setattr(intervals, "_AT_ONCE", 2500)  # several chunks
    beside = difference(scored(), "csi", "persistence", draws=300)
    for one, other in zip(alone, beside, strict=True):
        xr.testing.assert_equal(one, other.sel(model=["good"]))
