"""Scores of probabilities: other implementations, the decomposition, the CRPS, and what must not change a count."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics import probability
from forecast.metrics.ensemble import Ensemble
from forecast.metrics.metric import Scope
from forecast.metrics.probability import Probability
from forecast.units import Quantity

THRESHOLDS = (0.5, 1.7, 4.0)
MEMBERS, SAMPLES, STEPS, BLOCKS = 6, 4, 2, 3


class Windows(NamedTuple):
    forecast: Forecast
    truth: Tensor
    valid: Tensor
    block: Tensor


def windows(seed: int = 0) -> Windows:
    """Random fields in steps of 0.5 that have something in common, many of them 0, and a tenth missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLES, MEMBERS + 1, STEPS, 1, 7, 6)
    common = torch.randint(-6, 9, (SAMPLES, 1, *shape[2:]), generator=generator)
    values = ((common + torch.randint(-4, 5, shape, generator=generator)) / 2).clamp_min(0)
    valid = torch.rand(SAMPLES, *shape[2:], generator=generator) > 0.1
    return Windows(
        Forecast(values[:, 1:].mean(1), members=values[:, 1:]), values[:, 0], valid, torch.arange(SAMPLES) % BLOCKS
    )


def continuous(batch: Windows) -> Windows:
    """The same with a probability of its own, which is no multiple of a sixth."""
    generator = torch.Generator().manual_seed(5)
    shape = (SAMPLES, len(THRESHOLDS), *batch.truth.shape[1:])
    exceedance = torch.rand(shape, generator=generator).sort(1, descending=True).values
    return batch._replace(forecast=batch.forecast._replace(exceedance=exceedance))


def states(*batches: Windows, thresholds: tuple[float, ...] = THRESHOLDS, members: int = MEMBERS) -> dict[str, Tensor]:
    quantity = Quantity("rainfall_rate", "rain rate", "mm/h", thresholds)
    metric = Probability(Scope(quantity, STEPS, BLOCKS), members=members)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def scores(
    *batches: Windows, thresholds: tuple[float, ...] = THRESHOLDS, members: int = MEMBERS
) -> dict[str, xr.DataArray]:
    """Of everything pooled."""
    sums = {}
    for name, values in states(*batches, thresholds=thresholds, members=members).items():
        sums[name] = xr.DataArray(values.numpy(), dims=("block", "lead_time", *Probability.SUMS[name].dims))
    return Probability.scores(xr.Dataset(sums).sum(["block", "lead_time"]))


def pairs(batch: Windows, index: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability and event of each valid pixel, for one threshold."""
    if batch.forecast.exceedance is None:
        chance = (batch.forecast.members >= THRESHOLDS[index]).double().mean(1)
    else:
        chance = batch.forecast.exceedance[:, index].double()
    return chance[batch.valid].numpy(), (batch.truth >= THRESHOLDS[index])[batch.valid].numpy()


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        exact = not one[name].is_floating_point()
        tolerance = 0 if exact else 1e-12
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


def test_brier_score_equals_scores() -> None:
    reference = pytest.importorskip("scores.probability", reason="scores is a development dependency")
    batch = windows()
    members = xr.DataArray(batch.forecast.members.movedim(1, 0)[:, batch.valid], dims=("member", "pixel"))
    truth = xr.DataArray(batch.truth[batch.valid], dims="pixel")
    expected = reference.brier_score_for_ensemble(members, truth, "member", list(THRESHOLDS), fair_correction=False)
    np.testing.assert_allclose(scores(batch)["brier"], expected, rtol=0, atol=1e-12)


def test_the_integral_of_the_brier_score_over_thresholds_is_the_crps() -> None:
    """Values in steps of 0.5 reach every threshold between two of them alike: the integral is a sum."""
    batch = windows()
    thresholds = tuple(0.5 * step for step in range(1, 20))
    assert float(batch.truth.max()) < 9.5
    metric = Ensemble(Scope(Quantity("rain", "rain", "mm/h", THRESHOLDS), STEPS, BLOCKS), members=MEMBERS)
    metric.update(*batch)
    sums = metric.compute()
    crps = float(sums["crps_sum"].sum() / sums["ensemble_pixels"].sum())
    assert float(0.5 * scores(batch, thresholds=thresholds)["brier"].sum()) == pytest.approx(crps, rel=1e-12)


def test_without_members_the_brier_score_is_the_share_of_wrong_events() -> None:
    batch = windows()
    mean = batch.forecast.mean
    result = scores(batch._replace(forecast=Forecast(mean)))["brier"]
    for index, threshold in enumerate(THRESHOLDS):
        wrong = ((mean >= threshold) != (batch.truth >= threshold))[batch.valid].double().mean()
        assert float(result[index]) == pytest.approx(float(wrong), rel=1e-12)


def test_reliability_less_resolution_and_uncertainty_is_the_brier_score() -> None:
    """The bins of an ensemble are its possible probabilities: nothing is left within them."""
    result = scores(windows())
    parts = result["brier_reliability"] - result["brier_resolution"] + result["brier_uncertainty"]
    np.testing.assert_allclose(parts, result["brier"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(result["brier_within_bins"], 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ensemble", "continuous"])
def test_parts_of_the_brier_score_are_those_of_their_definitions(kind: str) -> None:
    """With the two terms of Stephenson et al. (2008) for what happens within bins."""
    batch = windows() if kind == "ensemble" else continuous(windows())
    result = scores(batch)
    for index in range(len(THRESHOLDS)):
        p, o = pairs(batch, index)
        bins = np.round(p * MEMBERS).astype(int)
        reliability = resolution = variance = covariance = 0.0
        for k in np.unique(bins):
            pk, ok = p[bins == k], o[bins == k]
            reliability += len(pk) * (pk.mean() - ok.mean()) ** 2
            resolution += len(pk) * (ok.mean() - o.mean()) ** 2
            variance += ((pk - pk.mean()) ** 2).sum()
            covariance += 2 * ((pk - pk.mean()) * (ok - ok.mean())).sum()
            assert float(result["mean_probability"][index, k]) == pytest.approx(pk.mean(), rel=1e-12)
            assert float(result["event_frequency"][index, k]) == pytest.approx(ok.mean(), rel=1e-12)
        for name, expected in (
            ("brier", ((p - o) ** 2).sum()),
            ("brier_reliability", reliability),
            ("brier_resolution", resolution),
            ("brier_uncertainty", len(o) * o.mean() * (1 - o.mean())),
            ("brier_within_bins", variance - covariance),
        ):
            assert float(result[name][index]) == pytest.approx(expected / len(o), abs=1e-12), name
    assert (kind == "ensemble") == bool(np.allclose(result["brier_within_bins"], 0.0, atol=1e-12))


def test_roc_area_equals_sklearn() -> None:
    for batch in (windows(), continuous(windows())):
        area = scores(batch)["roc_area"]
        for index in range(len(THRESHOLDS)):
            p, o = pairs(batch, index)
            assert float(area[index]) == pytest.approx(roc_auc_score(o, np.round(p * MEMBERS)), abs=1e-12)


def test_no_skill_has_half_the_roc_area_and_a_perfect_forecast_the_whole() -> None:
    batch = windows()
    truth = batch.truth
    perfect = scores(batch._replace(forecast=Forecast(truth)))
    np.testing.assert_array_equal(perfect["roc_area"], 1.0)
    np.testing.assert_array_equal(perfect["brier"], 0.0)
    np.testing.assert_array_equal(perfect["brier_skill"], 1.0)
    opposite = Forecast(truth, exceedance=torch.stack([(truth < threshold).float() for threshold in THRESHOLDS], 1))
    np.testing.assert_array_equal(scores(batch._replace(forecast=opposite))["roc_area"], 0.0)
    rates = [(truth >= threshold)[batch.valid].double().mean() for threshold in THRESHOLDS]
    same = torch.stack([torch.full_like(truth, float(rate), dtype=torch.float64) for rate in rates], 1)
    climatology = scores(batch._replace(forecast=Forecast(truth, exceedance=same)))
    np.testing.assert_array_equal(climatology["roc_area"], 0.5)
    np.testing.assert_allclose(climatology["brier_skill"], 0.0, atol=1e-12)


def test_large_counts_do_not_overflow() -> None:
    sums = {name: xr.DataArray(state.sum((0, 1)).numpy()) for name, state in states(windows()).items()}
    small = xr.Dataset({name: one.rename(dim_0="threshold") for name, one in sums.items()})
    small = small.rename(dim_1="probability_bin")
    for name, score in Probability.scores(small * 10**14).items():
        np.testing.assert_allclose(score, Probability.scores(small)[name], atol=1e-12)


def test_probabilities_given_come_before_those_of_members_and_a_threshold_is_reached_by_its_equal() -> None:
    batch = windows()
    truth = torch.full_like(batch.truth, 0.1)
    at = Forecast(truth, members=truth.unsqueeze(1).repeat(1, MEMBERS, 1, 1, 1, 1))
    assert float(scores(batch._replace(forecast=at, truth=truth), thresholds=(0.1,))["event_frequency"][0, -1]) == 1.0
    given = at._replace(exceedance=torch.full_like(truth, 0.5).unsqueeze(1))
    assert float(scores(batch._replace(forecast=given, truth=truth), thresholds=(0.1,))["brier"][0]) == 0.25


def test_members_of_half_precision_meet_the_whole_threshold() -> None:
    """bfloat16 knows 0.7 as 0.6992 only, which is below 0.7, although it is not below bfloat16(0.7)."""
    batch = windows()
    truth = torch.full_like(batch.truth, 0.7)
    near = Forecast(truth, members=truth.bfloat16().unsqueeze(1))
    assert float(scores(batch._replace(forecast=near, truth=truth), thresholds=(0.7,))["brier"][0]) == 1.0


@pytest.mark.parametrize("kind", ["ensemble", "continuous"])
def test_padded_samples_invalid_pixels_and_broken_forecasts_change_nothing(kind: str) -> None:
    batch = windows() if kind == "ensemble" else continuous(windows())
    part = "members" if kind == "ensemble" else "exceedance"
    broken = getattr(batch.forecast, part).clone()
    broken[0, 1, 0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    left = batch.valid & torch.isfinite(broken).all(1)
    assert int(batch.valid.sum() - left.sum()) >= 2
    garbage = torch.where(batch.valid.unsqueeze(1), broken, torch.nan)
    forecast = batch.forecast._replace(**{part: garbage})
    hidden = batch._replace(forecast=forecast, truth=batch.truth.where(batch.valid, torch.nan))
    padding = windows(seed=9)._replace(block=torch.full((SAMPLES,), -1))
    assert_close(states(batch._replace(valid=left)), states(hidden, padding))


def test_batches_and_blocks_add_up_in_any_order() -> None:
    batch = continuous(windows())
    parts = [
        Windows(Forecast(*(field[rows] for field in batch.forecast)), *(part[rows] for part in batch[1:]))
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole = states(batch)
    assert_close(whole, states(*parts))
    assert_close(whole, states(*parts[::-1]))
    one = states(batch._replace(block=torch.zeros_like(batch.block)))
    assert_close({name: state.sum(0) for name, state in whole.items()}, {name: state[0] for name, state in one.items()})


@pytest.mark.parametrize("at_once", [1, 3 * STEPS * 42])
def test_a_large_batch_looked_at_in_pieces_gives_the_same_sums(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = states(windows())
    monkeypatch.setattr(probability, "_AT_ONCE", at_once)
    assert_close(whole, states(windows()))


def test_where_nothing_or_everything_is_an_event_there_is_no_skill_to_speak_of() -> None:
    batch = windows()
    dry = torch.zeros_like(batch.truth)
    for thresholds in ((0.5,), (0.0,)):  # never and always reached
        result = scores(batch._replace(truth=dry), thresholds=thresholds)
        assert float(result["brier_uncertainty"][0]) == 0.0
        assert np.isnan(result["brier_skill"]).all()
        assert np.isnan(result["roc_area"]).all()
    for score in scores(batch._replace(valid=torch.zeros_like(batch.valid))).values():
        assert np.isnan(score).all()


def test_fewer_than_one_member_is_refused() -> None:
    with pytest.raises(UserError, match="members=0 for the scores of probabilities; it must be 1 or more"):
        states(members=0)
