"""Sections of a test: longer sums of rain, the subsample, and counts that come back to the last bit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast, Frames
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.ensemble import Ensemble
from forecast.metrics.metric import Scope
from forecast.sections import ROOT, SUBSAMPLE, Listed, Sections, spread, summed
from forecast.skill import Skill
from forecast.units import Quantity

RATE = Quantity("rainfall_rate", "rain rate", "mm/h", (1.0,))
METRICS = {"continuous": Continuous, "contingency": Contingency}
WINDOWS, STEPS, SIZE = 7, 7, (4, 5)
TIMES = tuple(range(600, 600 * (WINDOWS + 1), 600))


def frames() -> Frames:
    """Truth in steps of 0.5 mm/h, some of it missing; the last window is padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (WINDOWS, STEPS, 1, *SIZE)
    truth = torch.randint(0, 20, shape, generator=generator) / 2
    block = torch.tensor([0, 0, 1, 1, 2, 2, -1])
    valid = (torch.rand(shape, generator=generator) > 0.1) & (block >= 0).view(-1, 1, 1, 1, 1)
    lanes = torch.ones(WINDOWS, dtype=torch.bool)
    return Frames(truth, valid, truth, valid, torch.zeros(WINDOWS, 0, *SIZE), torch.tensor(TIMES), block, lanes)


def wrong(scale: float) -> Tensor:
    return scale * frames().truth + torch.arange(STEPS).view(STEPS, 1, 1, 1)


def sections(quantity: Quantity = RATE, cadence: int | None = 600, steps: int = STEPS, **more: Any) -> Sections:
    given: dict[str, Any] = {"minutes": [30, 60], "thresholds": [3.0], "long_metrics": METRICS, **more}
    return Sections(["model", "flow"], Scope(quantity, steps, 3, size=SIZE), cadence, METRICS, **given)


def scored(slow: Sequence[str] = (), positions: tuple[int, ...] = (1, 4), sizes: Sequence[int] = (7,)) -> Sections:
    """After the windows were given in batches of those sizes, to a slow model those of the subsample only."""
    made = sections(slow=slow, listed=Listed(positions, tuple(TIMES[one] for one in positions)))
    whole, place = frames(), 0
    for size in sizes:
        rows = slice(place, place + size)
        part = Frames(*(field[rows] for field in whole))
        listed = torch.tensor([one in positions for one in range(place, place + size)])
        for model, scale in (("model", 0.5), ("flow", 2.0)):
            mean = wrong(scale)[rows]
            if model not in slow:
                made.update(model, Forecast(mean), part, listed)
            elif listed.any():
                chosen = Frames(*(field[listed] for field in part))
                made.update(model, Forecast(mean[listed]), chosen, listed[listed])
        place += size
    return made


def alone(model: str, scale: float, rows: Any) -> xr.Dataset:
    """Scores of some windows by themselves."""
    skill = Skill([model], Scope(RATE, STEPS, 3, size=SIZE), 600, METRICS)
    part = Frames(*(field[rows] for field in frames()))
    skill.update(model, Forecast(wrong(scale)[rows]), part.truth, part.valid, part.block)
    return skill.dataset()


@pytest.mark.parametrize(("windows", "most"), [(5, 24), (24, 24), (25, 24), (1000, 24), (7, 1), (3, 2)])
def test_subsample_is_spread_evenly_over_all_windows(windows: int, most: int) -> None:
    positions = spread(windows, most)
    assert len(set(positions)) == len(positions) == min(windows, most)
    assert all(0 <= one < windows for one in positions)
    steps = np.diff(positions)
    assert steps.size == 0 or steps.max() - steps.min() <= 1
    assert abs(sum(positions) / len(positions) - (windows - 1) / 2) <= 1  # in the middle on average


def test_rain_over_longer_times_is_the_sum_of_its_frames() -> None:
    made = scored().datasets()
    assert list(made) == [ROOT, "accumulation_30min", "accumulation_60min"]
    truth, valid, block = (np.asarray(field) for field in (frames().truth, frames().valid, frames().block))
    long = made["accumulation_30min"].sel(model="flow")
    assert long["lead_time"].values.tolist() == [30, 60]  # the seventh frame is left over
    assert made["accumulation_60min"]["lead_time"].values.tolist() == [60]
    for lead, chosen in enumerate((slice(0, 3), slice(3, 6))):
        there = valid[:, chosen].all(1) & (block >= 0).reshape(-1, 1, 1, 1)
        o, f = (np.asarray(field)[:, chosen].sum(1) / 6 for field in (truth, wrong(2.0)))
        one = long.isel(lead_time=lead)
        assert int(one["pixels"].sum()) == there.sum()
        np.testing.assert_allclose(one["mse"], np.square(f - o)[there].mean(), rtol=1e-6)
        hits = ((f >= 3) & (o >= 3))[there].sum()
        assert int(one["hits"].sum()) == hits
        assert 0 < hits < there.sum()
    assert long["threshold"].values.tolist() == [3]
    assert long["threshold"].attrs["units"] == "mm"


def test_half_an_hour_at_the_rate_of_a_threshold_reaches_it() -> None:
    """Six mm/h for half an hour are three mm, whatever the cadence: an event, not a rounding below it."""
    for frame, count in ((300, 6), (600, 3), (900, 2), (420, 3)):
        total = summed(torch.full((1, count, 1, 1, 1), 6.0), count, frame)
        assert float(total) == np.float32(6.0 * frame * count / 3600)


@pytest.mark.parametrize(
    ("quantity", "cadence", "steps", "found"),
    [
        (RATE, 600, 3, ["accumulation_30min"]),
        (RATE, 1200, 7, ["accumulation_60min"]),  # which does not divide half an hour
        (RATE, 1800, 7, ["accumulation_30min", "accumulation_60min"]),  # a frame is the sum of its own half hour
        (RATE, 3600, 1, ["accumulation_60min"]),
        (RATE, 600, 2, []),
        (Quantity("z", "reflectivity", "dBZ", (20.0,), floor=-10.0), 600, 7, []),
        (Quantity("x", "grey level", "1", (0.5,)), None, 7, []),
    ],
)
def test_rain_is_summed_where_frames_are_rates_and_fit(
    quantity: Quantity, cadence: int | None, steps: int, found: list[str]
) -> None:
    assert list(sections(quantity, cadence, steps).lengths) == [ROOT, *found]


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_members_are_summed_one_by_one() -> None:
    ensembles = {"ensemble": lambda scope: Ensemble(scope, members=2)}
    made = sections(long_metrics=ensembles)
    members = torch.stack([wrong(0.5), wrong(2.0)], 1)
    made.update("model", Forecast(members.mean(1), members), frames(), torch.zeros(WINDOWS, dtype=torch.bool))
    direct = Skill(["model"], Scope(RATE, 2, 3, size=SIZE), 1800, ensembles)
    long = [summed(field, 3, 600) for field in (members[:, 0], members[:, 1], frames().truth)]
    valid = frames().valid[:, :6].unflatten(1, (2, 3)).all(2)
    direct.update("model", Forecast((long[0] + long[1]) / 2, torch.stack(long[:2], 1)), long[2], valid, frames().block)
    found = made.datasets()["accumulation_30min"]["crps"].sel(model="model")
    np.testing.assert_allclose(found, direct.dataset()["crps"].isel(model=0), rtol=1e-6)


def test_all_models_are_scored_on_the_subsample_and_slow_ones_only_there() -> None:
    made = scored(slow=["flow"]).datasets()
    assert made[ROOT]["model"].values.tolist() == ["model"]
    sample = made[SUBSAMPLE]
    assert sample["model"].values.tolist() == ["model", "flow"]
    for model, scale in (("model", 0.5), ("flow", 2.0)):
        expected = alone(model, scale, [1, 4]).isel(model=0)
        xr.testing.assert_allclose(sample.sel(model=model)[list(expected)], expected, rtol=1e-12)
    assert sample["position"].values.tolist() == [1, 4]
    assert sample["issue_time"].values.tolist() == [TIMES[1], TIMES[4]]
    assert sample["issue_time"].attrs["units"] == "seconds since 1970-01-01"


@pytest.mark.parametrize("sizes", [[1] * 7, [4, 3]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    one, many = scored(slow=["flow"]).datasets(), scored(slow=["flow"], sizes=sizes).datasets()
    for section in one:
        counts = [name for name in one[section] if one[section][name].dtype.kind == "i"]
        xr.testing.assert_equal(one[section][counts], many[section][counts])
        xr.testing.assert_allclose(one[section], many[section], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_counts_come_back_to_the_last_bit() -> None:
    made = scored(slow=["flow"])
    found = made.datasets()
    other = sections(slow=["flow"], listed=made.listed)
    for model in ("model", "flow"):
        other.restore(model, made.counts(model, found))
    for section, dataset in other.datasets().items():
        xr.testing.assert_identical(dataset, found[section])


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_counts_of_other_scores_are_refused_and_change_nothing() -> None:
    made = scored()
    counts = dict(made.counts("flow", made.datasets()))
    other = sections()
    for broken in ({}, {**counts, f"{ROOT}.hits": counts[f"{ROOT}.hits"][:2]}):
        with pytest.raises((KeyError, ValueError)):
            other.restore("flow", broken)
        assert int(other.datasets()[ROOT]["pixels"].sum()) == 0
