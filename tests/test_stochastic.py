"""S-PROG, STEPS and LINDA: pysteps' own, on our units; the same members for a window, always; an answer for any past."""

import warnings

import numpy as np
import pytest
import torch
from showers import DBZ, GRID, RATE, STEPS_AHEAD, moving, of, predict

from forecast.baselines.extrapolation import Extrapolation, quiet, seed_of
from forecast.baselines.stochastic import LINDA, SPROG, STEPS, Evolving, pixel_in_km
from forecast.units import Grid


def test_nothing_of_pysteps_is_left_behind() -> None:
    """It seeds numpy's global generator and silences all RuntimeWarnings."""
    np.random.seed(3)  # noqa: NPY002  # the global one is meant
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    filters = list(warnings.filters)
    predict(STEPS(DBZ, 6, GRID, 300, members=1), moving(1)[:, :6])
    assert np.random.rand() == expected  # noqa: NPY002
    assert warnings.filters == filters


def test_sprog_equals_pysteps_and_is_smoother_than_extrapolation() -> None:
    from pysteps.motion.lucaskanade import dense_lucaskanade
    from pysteps.nowcasts import sprog

    past = of(RATE, moving(1)[:, :6])
    mean = predict(SPROG(RATE, 6), past).mean[0, :, 0].double().numpy()
    rain = np.where(past < 0.1, -15.0, 10 * torch.log10(past.clamp_min(0.1)).double())[0, :, 0]
    with quiet():
        motion = dense_lucaskanade(rain[-3:])
        expected = sprog.forecast(rain[-3:], motion, STEPS_AHEAD, precip_thr=-10.0, n_cascade_levels=6)
    expected = np.where(np.nan_to_num(expected, nan=-15.0) < -10.0, 0.0, 10 ** (expected / 10))
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)


def test_steps_equals_pysteps_and_its_mean_is_that_of_members_that_differ() -> None:
    from pysteps.motion.lucaskanade import dense_lucaskanade
    from pysteps.nowcasts import steps

    past = moving(1)[:, :6]
    mean, members, _ = predict(STEPS(DBZ, 6, GRID, 300), past, members=3)
    assert members is not None
    assert members.shape == (1, 3, STEPS_AHEAD, 1, 64, 64)
    torch.testing.assert_close(mean, members.mean(1))
    assert all((members[:, i] != members[:, i + 1]).float().mean() > 0.2 for i in range(2))
    assert members.min() == -10
    rate = of(RATE, past.double())
    rain = torch.where(rate < 0.1, -15.0, 10 * torch.log10(rate))[0, :, 0].numpy()
    with quiet():
        expected = steps.forecast(
            rain[-3:],
            dense_lucaskanade(rain[-3:]),
            STEPS_AHEAD,
            n_ens_members=3,
            precip_thr=-10.0,
            kmperpixel=1.0,
            timestep=5.0,
            seed=seed_of(0, 0),
        )
    expected = np.nan_to_num(expected, nan=-15.0)
    dbz = np.where(expected < -10.0, -10.0, 10 * np.log10(200) + 1.6 * expected)
    np.testing.assert_allclose(members[0, :, :, 0], dbz, rtol=1e-6, atol=1e-5)
    assert ((members == -10) | (members > 7)).all()  # no rain below 0.1 mm/h


def test_members_are_a_function_of_the_window_and_the_seed_and_of_nothing_else() -> None:
    steps = STEPS(DBZ, 6, GRID, 300, members=2)
    past = moving(2)[:, :6]
    both = predict(steps, past, members=2, seed=5).members
    again = predict(steps, past, members=2, seed=5).members
    alone = predict(steps, past[1:], members=2, seed=5, start=600).members
    other = predict(steps, past[1:], members=2, seed=6, start=600).members
    later = predict(steps, past[1:], members=2, seed=5, start=1200).members
    assert both is not None
    assert again is not None
    assert alone is not None
    assert other is not None
    assert later is not None
    assert torch.equal(both, again)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(alone, other)
    assert not torch.equal(alone, later)
    torch.testing.assert_close(predict(steps, past[1:], seed=5, start=600).mean, alone.mean(1))


def test_seeds_of_different_times_and_runs_differ() -> None:
    seeds = {seed_of(start, time) for start in (0, 1, -1, 2**64 - 2) for time in (-600, 0, 600, 2**40)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_member_costs_no_choice_of_the_generator() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    past = moving(1)[:, :6]
    rest = {"static": torch.zeros(1, 0, 64, 64), "time": torch.zeros(1, dtype=torch.int64)}
    STEPS(DBZ, 6, GRID, 300, members=1).predict(past, past > -20, 1, **rest, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_missing_pixels_of_the_last_frame_take_their_most_recent_value() -> None:
    past = moving(1)[:, 5:6].expand(-1, 6, -1, -1, -1)
    valid = torch.ones_like(past, dtype=torch.bool)
    valid[:, -1, :, 20:40, 20:40] = False
    forecaster = SPROG(DBZ, 6)
    forecaster.motion = lambda rain, valid: np.zeros((2, *rain.shape[1:]))  # type: ignore[method-assign]  # stands still
    mean = predict(forecaster, torch.where(valid, past, -10.0), valid).mean
    assert torch.equal(mean, predict(forecaster, past).mean)


@pytest.mark.parametrize("kind", [SPROG, STEPS, LINDA])
def test_a_past_without_rain_stays_as_it_is_and_nothing_is_said(
    kind: type[Evolving], caplog: pytest.LogCaptureFixture
) -> None:
    past = (moving(1)[:, :6] / 10).clamp_max(6.0)  # less than 0.1 mm/h
    forecaster = kind(DBZ, 6) if kind is SPROG else kind(DBZ, 6, GRID, 300)  # type: ignore[call-arg]  # an Ensemble
    mean, members, _ = predict(forecaster, past, members=2)
    assert torch.equal(mean, past[:, -1:].expand_as(mean))
    assert members is not None
    assert torch.equal(members, mean[:, None].expand_as(members))
    assert not caplog.messages


@pytest.mark.parametrize("kind", [SPROG, STEPS, LINDA])
@pytest.mark.parametrize("where", [(30, 30), (0, 0)], ids=["pixel", "corner"])
def test_too_little_rain_is_extrapolated_and_said_once(
    kind: type[Evolving], where: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    past = torch.full((3, 6, 1, 64, 64), -10.0)
    past[:, :, :, where[0], where[1]] = 30.0
    forecaster = kind(DBZ, 6) if kind is SPROG else kind(DBZ, 6, GRID, 300)  # type: ignore[call-arg]  # an Ensemble
    mean, members, _ = predict(forecaster, past, members=2)
    expected = predict(Extrapolation(DBZ, 6), past).mean
    assert torch.equal(mean, expected)
    assert members is not None
    assert torch.equal(members, mean[:, None].expand_as(members))
    (message,) = caplog.messages
    assert message.startswith(f"{kind.__name__} cannot be estimated where there is too little rain")


def test_linda_draws_members_around_the_rain_and_works_on_rain_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forecast.baselines.stochastic.LINDA_FEATURES", 1)  # each takes seconds
    past = moving(1)[:, :6]
    mean, members, _ = predict(LINDA(DBZ, 6, GRID, 300), past, members=2)
    assert members is not None
    assert (members[0, 0] != members[0, 1]).any()
    torch.testing.assert_close(mean, members.mean(1))
    observed = past[0, -1, 0, 16:-16, 16:-16].flatten()
    forecast = mean[0, 0, 0, 16:-16, 16:-16].flatten()
    assert torch.corrcoef(torch.stack([observed, forecast]))[0, 1] > 0.5


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(size=(10, 10), spacing=(-500.0, 2000.0), units="m"), 1.0),
        (Grid(size=(10, 10), spacing=(2.0, 2.0), units="km"), 2.0),
        (Grid(size=(11, 10), origin=(61.0, 5.0), spacing=(-0.2, 0.2), units="degrees"), 0.2 * 111.2 * 0.5**0.5),
    ],
    ids=["m", "km", "degrees"],
)
def test_the_size_of_a_pixel_is_in_km(grid: Grid, expected: float) -> None:
    np.testing.assert_allclose(pixel_in_km(grid), expected, rtol=1e-6)
