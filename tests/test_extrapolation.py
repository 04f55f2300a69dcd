"""Extrapolation: pysteps' own, on our units, for any past."""

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from showers import DBZ, GRID, RATE, STEPS_AHEAD, moving, of, predict

from forecast.baselines.extrapolation import Extrapolation, quiet
from forecast.baselines.persistence import Persistence
from forecast.baselines.stochastic import LINDA, SPROG, STEPS
from forecast.errors import UserError
from forecast.units import Grid, Quantity


def reference(values: NDArray[np.float64], quantity: Quantity, method: str) -> NDArray[np.float64]:
    """pysteps called by hand, as its examples do: motion of dBR over 0.1 mm/h, NaN where missing; S H W."""
    from pysteps.motion.darts import DARTS
    from pysteps.motion.lucaskanade import dense_lucaskanade
    from pysteps.nowcasts import extrapolation
    from pysteps.utils.transformation import dB_transform

    rate = (10 ** (values / 10) / 200) ** (1 / 1.6) if quantity is DBZ else values
    rain, _ = dB_transform(rate, threshold=0.1, zerovalue=-15.0)
    if method == "darts":
        motion = DARTS(np.nan_to_num(rain, nan=-15.0), N_x=2, N_y=2, N_t=2, verbose=False)
    else:
        motion = dense_lucaskanade(rain[-3:])
    assert np.abs(motion).max() > 0.1
    return np.nan_to_num(extrapolation.forecast(values[-1], motion, STEPS_AHEAD), nan=quantity.floor)


@pytest.mark.parametrize("method", ["lucas_kanade", "darts"])
@pytest.mark.parametrize("quantity", [DBZ, RATE], ids=["dBZ", "mm/h"])
def test_equals_pysteps(quantity: Quantity, method: str) -> None:
    past = of(quantity, moving()[:, :6])
    valid = torch.ones_like(past, dtype=torch.bool)
    valid[:, :-1, :, 10:20, 30:40] = False
    missing = torch.where(valid, past, quantity.floor)
    mean = predict(Extrapolation(quantity, 6, method), missing, valid).mean  # type: ignore[arg-type]  # from the list above
    for sample in range(len(past)):
        values = torch.where(valid, past, torch.nan)[sample, :, 0].double().numpy()
        with quiet():
            expected = reference(values, quantity, method)
        np.testing.assert_allclose(mean[sample, :, 0], expected, rtol=1e-6, atol=1e-6)


def test_showers_that_only_move_are_forecast_where_they_go() -> None:
    frames = moving()
    mean = predict(Extrapolation(DBZ, 6), frames[:, :6]).mean
    inside = (..., slice(8, -8), slice(16, -16))
    truth = frames[:, 6:][inside]
    assert (mean[inside] - truth).abs().mean() < 0.5
    assert (frames[:, 5:6][inside] - truth).abs().mean() > 5


def test_what_comes_in_from_outside_is_the_floor() -> None:
    """The showers move to the left: nothing is known of what enters from the right."""
    past = moving()[:, :6].clamp_min(1.0)
    for quantity in (DBZ, RATE):
        mean = predict(Extrapolation(quantity, 6), past).mean
        assert (mean[:, -1, :, :, -3:] == quantity.floor).all()
        assert (mean[:, -1, :, 20:-20, 20:-20] > quantity.floor).all()


def test_without_motion_it_is_persistence() -> None:
    past = moving()[:, 5:6].expand(-1, 6, -1, -1, -1)
    valid = torch.rand(past.shape, generator=torch.Generator().manual_seed(1)) > 0.2
    past = torch.where(valid, past, -10.0)
    forecaster = Extrapolation(DBZ, 6)
    forecaster.motion = lambda rain, valid: np.zeros((2, *rain.shape[1:]))  # type: ignore[method-assign]  # stands still
    assert torch.equal(predict(forecaster, past, valid).mean, predict(Persistence(), past, valid).mean)


@pytest.mark.parametrize("method", ["lucas_kanade", "darts"])
def test_a_past_without_rain_stays_as_it_is(method: str) -> None:
    rain = moving()[:, :6]
    drizzle = (rain / 10).clamp(-10.0, 6.0)  # dBZ; less than 0.1 mm/h
    missing = torch.zeros_like(rain, dtype=torch.bool)
    forecaster = Extrapolation(DBZ, 6, method)  # type: ignore[arg-type]  # from the list above
    assert (predict(forecaster, torch.full_like(rain, -10.0)).mean == -10).all()
    assert (predict(forecaster, torch.full_like(rain, -10.0), missing).mean == -10).all()
    assert torch.equal(predict(forecaster, drizzle).mean, drizzle[:, -1:].expand(-1, STEPS_AHEAD, -1, -1, -1))


@pytest.mark.parametrize("method", ["lucas_kanade", "darts"])
def test_any_past_is_answered(method: str) -> None:
    """Finite everywhere, without a warning: see `predict`."""
    rain = moving()[:, :6]
    forecaster = Extrapolation(DBZ, 6, method)  # type: ignore[arg-type]  # from the list above
    known = torch.ones_like(rain, dtype=torch.bool)
    only_last, all_but_last, half = known.clone(), known.clone(), known.clone()
    only_last[:, :-1] = False
    all_but_last[:, -1] = False
    half[..., ::2] = False
    for valid in (only_last, all_but_last, half):
        predict(forecaster, torch.where(valid, rain, -10.0), valid)
    predict(forecaster, torch.where(only_last, -10.0, rain))  # the rain has just gone
    predict(forecaster, torch.where(only_last, rain, -10.0))  # and just come
    predict(forecaster, torch.full_like(rain, 30.0))  # the same everywhere
    predict(forecaster, rain[..., :9, :21])


def test_members_are_all_the_mean() -> None:
    mean, members, _ = predict(Extrapolation(DBZ, 6), moving()[:, :6], members=3)
    assert members is not None
    assert torch.equal(members, mean[:, None].expand(-1, 3, -1, -1, -1, -1))


def test_the_rain_of_a_round_trip_through_decibels_is_the_same() -> None:
    for quantity in (DBZ, RATE):
        values = of(quantity, moving(1, 1)).double().numpy()
        forecaster = Extrapolation(quantity, 2)
        rate = forecaster.rain_rate(values)
        back = forecaster.from_decibels(forecaster.decibels(values))
        np.testing.assert_allclose(back, np.where(rate < 0.1, quantity.floor, values), atol=1e-9)
        assert (rate < 0.1).any()
        assert (rate > 1).any()


def test_what_cannot_be_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = Quantity("digits", "digits", "1", (0.5,))
    for make, sentence in (
        (lambda: Extrapolation(digits, 6), "in dBZ or mm/h.*leave it out"),
        (lambda: Extrapolation(DBZ, 1), "needs 2; set data.past=2"),
        (lambda: Extrapolation(DBZ, 4, "darts"), "needs 5; set data.past=5"),
        (lambda: Extrapolation(DBZ, 6, "vet"), "lucas_kanade or darts"),  # type: ignore[arg-type]  # a mistake
        (lambda: SPROG(DBZ, 2), "needs 3; set data.past=3"),
        (lambda: STEPS(DBZ, 6, GRID, None), "STEPS needs frames with a time"),
        (lambda: LINDA(DBZ, 6, Grid((64, 64)), 300), "size of a pixel"),
        (lambda: STEPS(DBZ, 6, GRID, 300, members=0), "0 members"),
        (lambda: predict(SPROG(DBZ, 6), moving()[:, :2]), "given 2 past frames"),
    ):
        with pytest.raises(UserError, match=sentence):
            make()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"needs cv2.*stormcell\[pysteps\]"):
        Extrapolation(DBZ, 6)
