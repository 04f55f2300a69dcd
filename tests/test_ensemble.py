"""Ensemble scores: another implementation, what theory promises, and what must not change a sum."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics import ensemble
from forecast.metrics.ensemble import Ensemble
from forecast.metrics.metric import Scope
from forecast.units import Quantity

QUANTITY = Quantity("rainfall_rate", "rain rate", "mm/h", (0.5, 2.0))
MEMBERS, SAMPLES, STEPS, BLOCKS = 5, 4, 2, 3


class Windows(NamedTuple):
    forecast: Forecast
    truth: Tensor
    valid: Tensor
    block: Tensor


def windows(seed: int = 0, members: int = MEMBERS, samples: int = SAMPLES) -> Windows:
    """Random fields in steps of 0.5, many of them 0 and tied, and a tenth missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, members + 1, STEPS, 1, 7, 6)
    values = (torch.randint(-6, 9, shape, generator=generator) / 2).clamp_min(0)
    valid = torch.rand(samples, *shape[2:], generator=generator) > 0.1
    forecast = Forecast(values[:, 1:].mean(1), members=values[:, 1:])
    return Windows(forecast, values[:, 0], valid, torch.arange(samples) % BLOCKS)


def states(*batches: Windows, members: int = MEMBERS) -> dict[str, Tensor]:
    metric = Ensemble(Scope(QUANTITY, STEPS, BLOCKS), members=members)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def scores(*batches: Windows, members: int = MEMBERS) -> dict[str, xr.DataArray]:
    """Of everything pooled."""
    sums = {}
    for name, values in states(*batches, members=members).items():
        sums[name] = xr.DataArray(values.numpy(), dims=("block", "lead_time", *Ensemble.SUMS[name].dims))
    return Ensemble.scores(xr.Dataset(sums).sum(["block", "lead_time"]))


def pixels(batch: Windows) -> tuple[xr.DataArray, xr.DataArray]:
    """Members (member, pixel) and truth (pixel) where it is valid."""
    values = batch.forecast.members.double().movedim(1, 0)[:, batch.valid]
    return xr.DataArray(values, dims=("member", "pixel")), xr.DataArray(batch.truth.double()[batch.valid], dims="pixel")


def cloud(members: int, samples: int = 1, side: int = 100, seed: int = 0) -> Windows:
    """Members and truth drawn alike, from a standard normal distribution around a centre that differs by pixel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, members + 1, STEPS, 1, side, side)
    centre = 10 * torch.randn(samples, 1, *shape[2:], generator=generator, dtype=torch.float64)
    values = centre + torch.randn(shape, generator=generator, dtype=torch.float64)
    forecast = Forecast(values[:, 1:].mean(1), members=values[:, 1:])
    valid = torch.ones(samples, *shape[2:], dtype=torch.bool)
    return Windows(forecast, values[:, 0], valid, torch.zeros(samples, dtype=torch.int64))


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("name", "method"), [("crps", "ecdf"), ("crps_fair", "fair")])
def test_crps_equals_scores(name: str, method: str) -> None:
    reference = pytest.importorskip("scores.probability", reason="scores is a development dependency")
    batch = windows()
    expected = reference.crps_for_ensemble(*pixels(batch), "member", method=method)
    assert float(scores(batch)[name]) == pytest.approx(float(expected), abs=1e-12)


def test_a_truth_that_ties_with_a_member_has_its_share_of_the_crps() -> None:
    """Of members 0 and 1 and the truth 1, F is a half between them: a quarter, where some packages answer 0."""
    members = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1, 1).expand(1, 2, STEPS, 1, 1, 1)
    truth = torch.ones(1, STEPS, 1, 1, 1)
    batch = Windows(Forecast(members.mean(1), members), truth, truth > 0, torch.zeros(1, dtype=torch.int64))
    assert float(scores(batch, members=2)["crps"]) == 0.25
    assert float(scores(batch, members=2)["crps_fair"]) == 0.0


def test_the_crps_of_one_member_is_the_mean_absolute_error() -> None:
    batch = windows()
    mean = batch.forecast.mean
    error = (mean.double() - batch.truth.double())[batch.valid]
    alone, equal = Forecast(mean), Forecast(mean, mean.unsqueeze(1).repeat(1, MEMBERS, 1, 1, 1, 1))
    single = scores(batch._replace(forecast=alone))
    for one in (single, scores(batch._replace(forecast=equal))):
        assert float(one["crps"]) == pytest.approx(float(error.abs().mean()), rel=1e-12)
        assert float(one["ensemble_rmse"]) == pytest.approx(float(error.square().mean().sqrt()), rel=1e-12)
    assert all(np.isnan(single[name]) for name in ("crps_fair", "spread", "spread_skill_ratio"))


def test_the_energy_score_of_one_member_is_the_mean_of_the_frames_root_mean_squared_errors() -> None:
    batch = windows()
    errors = torch.where(batch.valid, batch.forecast.mean.double() - batch.truth.double(), 0.0).square()
    frames = (errors.flatten(2).sum(2) / batch.valid.flatten(2).sum(2)).sqrt()
    single = scores(batch._replace(forecast=Forecast(batch.forecast.mean)))
    assert float(single["energy_score"]) == pytest.approx(float(frames.mean()), rel=1e-12)


def test_a_perfect_ensemble_scores_0() -> None:
    batch = windows()
    members = batch.truth.unsqueeze(1).repeat(1, MEMBERS, 1, 1, 1, 1)
    perfect = scores(batch._replace(forecast=Forecast(batch.truth, members)))
    for name in ("crps", "crps_fair", "spread", "ensemble_rmse", "energy_score"):
        assert float(perfect[name]) == 0.0, name
    assert np.isnan(perfect["spread_skill_ratio"])


def test_fair_crps_of_draws_from_the_truths_distribution_does_not_depend_on_their_number() -> None:
    """The CRPS of a standard normal distribution for its own draws is 1 / sqrt(pi); that of M draws is 1 + 1/M times it."""
    expected = np.pi**-0.5
    for members in (2, 5, 20):
        result = scores(cloud(members), members=members)
        assert float(result["crps_fair"]) == pytest.approx(expected, abs=0.015)
        assert float(result["crps"]) == pytest.approx(expected * (1 + 1 / members), abs=0.015)


def test_the_spread_of_exchangeable_members_is_the_error_of_their_mean() -> None:
    for members in (2, 5, 20):
        result = scores(cloud(members), members=members)
        assert float(result["spread_skill_ratio"]) == pytest.approx(1.0, abs=0.015)
        assert float(result["spread"]) == pytest.approx((1 + 1 / members) ** 0.5, abs=0.015)


def test_spread_and_error_are_numpys() -> None:
    batch = windows()
    members, truth = pixels(batch)
    result = scores(batch)
    variance = members.var("member", ddof=1).mean() * (MEMBERS + 1) / MEMBERS
    assert float(result["spread"]) == pytest.approx(float(variance**0.5), rel=1e-12)
    error = ((members.mean("member") - truth) ** 2).mean() ** 0.5
    assert float(result["ensemble_rmse"]) == pytest.approx(float(error), rel=1e-12)


def test_rank_histogram_equals_scores() -> None:
    reference = pytest.importorskip("scores.probability", reason="scores is a development dependency")
    batch = windows()
    expected = reference.rank_histogram(*pixels(batch), "member")
    np.testing.assert_allclose(scores(batch)["rank_frequency"], expected, rtol=0, atol=1e-12)


def test_rank_histogram_of_exchangeable_members_is_flat() -> None:
    counted = states(cloud(MEMBERS), members=MEMBERS)["rank_sum"].sum((0, 1))
    n = float(counted.sum())
    assert n == STEPS * 100 * 100
    deviation = (n / 6 * 5 / 6) ** 0.5
    assert float((counted - n / 6).abs().max()) < 4 * deviation


def test_rank_histogram_of_a_single_member_has_the_truth_at_either_end_or_tied() -> None:
    batch = windows()
    mean, truth = batch.forecast.mean[batch.valid], batch.truth[batch.valid]
    counted = states(batch._replace(forecast=Forecast(batch.forecast.mean)))["rank_sum"].sum((0, 1))
    n, under, equal = len(truth), int((mean < truth).sum()), int((mean == truth).sum())
    assert equal > 0
    expected = torch.full((MEMBERS + 1,), equal / (MEMBERS + 1), dtype=torch.float64)
    expected[0] += n - under - equal
    expected[-1] += under
    torch.testing.assert_close(counted, expected)


def test_the_energy_score_is_that_of_its_definition() -> None:
    batch = windows()
    total = 0.0
    for sample in range(SAMPLES):
        for step in range(STEPS):
            valid = batch.valid[sample, step].numpy()
            x = [member[step].double().numpy()[valid] for member in batch.forecast.members[sample]]
            y = batch.truth[sample, step].double().numpy()[valid]
            error = np.mean([np.linalg.norm(one - y) for one in x])
            distance = np.mean([np.linalg.norm(one - other) for one in x for other in x])
            total += (error - distance / 2) / valid.sum() ** 0.5
    assert float(scores(batch)["energy_score"]) == pytest.approx(total / (SAMPLES * STEPS), rel=1e-12)


def test_the_energy_score_of_single_pixels_is_the_crps() -> None:
    batch = windows()
    corner = Forecast(batch.forecast.mean[..., :1, :1], batch.forecast.members[..., :1, :1])
    single = scores(Windows(corner, batch.truth[..., :1, :1], batch.valid[..., :1, :1], batch.block))
    assert float(single["energy_score"]) == pytest.approx(float(single["crps"]), rel=1e-12)


def test_padded_samples_invalid_pixels_and_broken_members_change_nothing() -> None:
    """What lies under the mask, and a pixel at which one member is no number, count as if they were not there."""
    batch = windows()
    broken = batch.forecast.members.clone()
    broken[0, 2, 0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    broken[1, :2, 1, 0, 3, 3] = torch.tensor([torch.inf, -torch.inf])
    left = batch.valid & torch.isfinite(broken).all(1)
    assert int(batch.valid.sum() - left.sum()) >= 2
    garbage = torch.where(batch.valid.unsqueeze(1), broken, torch.nan)
    hidden = Windows(Forecast(batch.forecast.mean, garbage), batch.truth.where(batch.valid, -torch.inf), *batch[2:])
    padding = windows(seed=9)._replace(block=torch.full((SAMPLES,), -1))
    assert_close(states(batch._replace(valid=left)), states(hidden, padding))


def test_batches_and_blocks_add_up_in_any_order() -> None:
    batch = windows()
    mean, members, _ = batch.forecast
    parts = [
        Windows(Forecast(mean[rows], members[rows]), *(part[rows] for part in batch[1:]))
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole = states(batch)
    assert_close(whole, states(*parts))
    assert_close(whole, states(*parts[::-1]))
    backwards = Windows(Forecast(mean.flip(0), members.flip(0, 1)), *(part.flip(0) for part in batch[1:]))
    assert_close(whole, states(backwards))
    one = states(batch._replace(block=torch.zeros_like(batch.block)))
    assert_close({name: state.sum(0) for name, state in whole.items()}, {name: state[0] for name, state in one.items()})


@pytest.mark.parametrize("at_once", [1, 2 * MEMBERS * 42, 3 * STEPS * MEMBERS * 42])
def test_a_large_ensemble_looked_at_in_pieces_gives_the_same_sums(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = states(windows())
    monkeypatch.setattr(ensemble, "_AT_ONCE", at_once)
    assert_close(whole, states(windows()))


def test_half_precision_and_flat_fields() -> None:
    """Dry frames score 0 in every way, and spread over all ranks."""
    dry = torch.zeros(1, MEMBERS, STEPS, 1, 7, 6, dtype=torch.bfloat16)
    truth = torch.zeros(1, STEPS, 1, 7, 6)
    result = scores(Windows(Forecast(dry.mean(1), dry), truth, truth == 0, torch.zeros(1, dtype=torch.int64)))
    assert [float(result[name]) for name in ("crps", "crps_fair", "spread", "energy_score")] == [0.0] * 4
    np.testing.assert_allclose(result["rank_frequency"], 1 / (MEMBERS + 1), rtol=1e-12)


def test_nothing_valid_is_nan() -> None:
    batch = windows()
    for score in scores(batch._replace(valid=torch.zeros_like(batch.valid))).values():
        assert np.isnan(score).all()


def test_another_number_of_members_is_refused() -> None:
    with pytest.raises(UserError, match="A forecast has 4 members where the scores of ensembles expect 5"):
        states(windows(members=4))
    with pytest.raises(UserError, match="members=0 for the scores of ensembles; it must be 1 or more"):
        Ensemble(Scope(QUANTITY, STEPS, BLOCKS), members=0)
