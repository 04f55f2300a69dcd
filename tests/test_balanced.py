"""Balanced errors: against HKO-7's formulas in numpy, and against the loss that minimises them."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from forecast import losses
from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.heads import Point
from forecast.metrics.balanced import Balanced
from forecast.metrics.metric import Scope
from forecast.skill import Skill
from forecast.units import Decibel, Linear, Quantity

RAIN = Quantity("rainfall_rate", "rain rate", "mm/h", thresholds=(1.0,))
STEPS = 2


def rain(samples: int = 3) -> tuple[Tensor, Tensor]:
    """Forecast and truth in mm/h, dry to heavy, with truth on the thresholds, too."""
    generator = torch.Generator().manual_seed(0)
    truth = 10 ** (3 * torch.rand((samples, STEPS, 1, 9, 7), generator=generator, dtype=torch.float64) - 1.2)
    truth[..., 0, :6] = torch.tensor([0.0, 0.5, 2.0, 5.0, 10.0, 30.0], dtype=torch.float64)
    forecast = truth * (0.5 + torch.rand(truth.shape, generator=generator, dtype=torch.float64))
    forecast[..., 3, :] = 0
    return forecast, truth


def scores(
    forecast: Tensor,
    truth: Tensor,
    valid: Tensor | None = None,
    block: Tensor | None = None,
    quantity: Quantity = RAIN,
    **options: Any,
) -> xr.Dataset:
    skill = Skill(["model"], Scope(quantity, STEPS, 2), None, {"balanced": lambda scope: Balanced(scope, **options)})
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else valid
    skill.update(
        "model", Forecast(forecast), truth, valid, torch.zeros(len(truth), dtype=int) if block is None else block
    )
    return skill.dataset().isel(model=0)


def by_hko7(forecast: NDArray[Any], truth: NDArray[Any], valid: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """B-MSE and B-MAE by lead time, of B S 1 H W in mm/h, by the paper's numbers."""

    def pixel(rate: NDArray[Any]) -> NDArray[Any]:
        dbz = 10 * np.log10(58.53) + 1.56 * 10 * np.log10(np.maximum(rate, 1e-9))
        return np.clip((dbz + 10) / 70, 0, 1)

    weight = np.select([truth < 2, truth < 5, truth < 10, truth < 30], [1, 2, 5, 10], 30) * valid
    error = pixel(forecast) - pixel(truth)
    return tuple((weight * one).sum((2, 3, 4)).mean(0) for one in (error**2, np.abs(error)))


def test_equals_hko7() -> None:
    forecast, truth = rain()
    valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) > 0.2
    found = scores(forecast, torch.where(valid, truth, torch.nan), valid)
    mse, mae = by_hko7(forecast.numpy(), truth.numpy(), valid.numpy())
    np.testing.assert_allclose(found.balanced_mse, mse, rtol=1e-10)
    np.testing.assert_allclose(found.balanced_mae, mae, rtol=1e-10)


def test_is_what_the_balanced_loss_of_hko7_minimises() -> None:
    forecast, truth = (field.float() for field in rain())
    pixels = Decibel("hko7")
    loss = losses.Balanced(Point(), reduction="frame")
    value = loss(pixels.forward(forecast), pixels.forward(truth), torch.ones_like(truth, dtype=torch.bool), truth)
    found = scores(forecast, truth)
    assert float((found.balanced_mse + found.balanced_mae).mean()) == pytest.approx(float(value), rel=1e-5)


def test_a_perfect_forecast_has_no_error() -> None:
    _, truth = rain()
    found = scores(truth, truth)
    assert found.balanced_mse.values.tolist() == found.balanced_mae.values.tolist() == [0.0] * STEPS


def test_other_quantities_have_thresholds_weights_and_transform_of_their_own() -> None:
    quantity = Quantity("reflectivity", "reflectivity", "dBZ", thresholds=(20.0,))
    forecast, truth = torch.zeros(1, STEPS, 1, 1, 3), torch.tensor([10.0, 20.0, 40.0]).expand(1, STEPS, 1, 1, 3)
    options = {"thresholds": [20.0, 40.0], "weights": [3.0, 7.0], "transform": Linear(0.0, 10.0), "units": "dBZ"}
    found = scores(forecast, truth, quantity=quantity, **options)
    assert found.balanced_mae.values == pytest.approx(1 * 1 + 3 * 2 + 7 * 4)
    assert found.balanced_mse.values == pytest.approx(1 * 1 + 3 * 4 + 7 * 16)


def test_padding_empty_frames_and_undefined_pixels_add_nothing() -> None:
    forecast, truth = rain()
    forecast[0, 0, 0, 1, 1] = torch.inf
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[1] = False
    sums = scores(forecast, truth, valid, torch.tensor([0, 0, -1]))
    assert sums.balanced_frames.values.tolist() == [[1, 1], [0, 0]]
    known = torch.isfinite(forecast)
    expected = scores(torch.where(known, forecast, 0.0)[:1], truth[:1], known[:1])
    np.testing.assert_allclose(sums.balanced_squared_error_sum, expected.balanced_squared_error_sum, rtol=1e-12)
    assert np.isnan(sums.balanced_mse[0])
    assert np.isfinite(sums.balanced_mse[1])


def test_any_split_of_the_batches_gives_the_same_sums() -> None:
    forecast, truth = rain(samples=5)
    valid, block = torch.ones_like(truth, dtype=torch.bool), torch.arange(5) % 2
    states = []
    for batches in ([[0, 1, 2, 3, 4]], [[4, 1], [0], [2, 3]]):
        metric = Balanced(Scope(RAIN, STEPS, 2))
        for rows in batches:
            metric.update(Forecast(forecast[rows]), truth[rows], valid[rows], block[rows])
        states.append(metric.compute())
    for name in Balanced.SUMS:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("units", "options", "sentence"),
    [
        ("dBZ", {}, "has thresholds in mm/h, but these data are in units of 'dBZ'"),
        ("mm/h", {"thresholds": [5.0, 2.0], "weights": [1.0, 2.0]}, "must ascend"),
        ("mm/h", {"weights": [1.0, 2.0]}, "have a weight each"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(units: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Balanced(Scope(Quantity("q", "q", units, thresholds=(1.0,)), 1, 1), **options)
