"""Spectra: against pysteps and numpy, and what sharpness, slope and resolution say of fields that we know."""

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import Scope
from forecast.metrics.spectral import Spectrum
from forecast.skill import Skill
from forecast.units import Quantity

RAIN = Quantity("rainfall_rate", "rain rate", "mm/h", thresholds=(1.0,))
STEPS = 2


def rough(size: tuple[int, int] = (32, 32), samples: int = 3, seed: int = 0) -> Tensor:
    """B S 1 H W float64, about a power law of -3 with some rain everywhere."""
    noise = torch.randn((samples, STEPS, 1, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, x = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])
    waves = torch.fft.rfft2(noise) * torch.hypot(y, x).clamp_min(1 / max(size)) ** -1.5
    return torch.fft.irfft2(waves, size) / 50 + 5


def low_pass(field: Tensor, shortest: float) -> Tensor:
    """Without waves shorter than so many pixels."""
    y, x = torch.fft.fftfreq(field.shape[-2])[:, None], torch.fft.rfftfreq(field.shape[-1])
    return torch.fft.irfft2(torch.fft.rfft2(field) * (torch.hypot(y, x) <= 1 / shortest), field.shape[-2:])


def blurred(field: Tensor, sigma: float) -> Tensor:
    """By a periodic Gaussian."""
    y, x = torch.fft.fftfreq(field.shape[-2])[:, None], torch.fft.rfftfreq(field.shape[-1])
    transfer = torch.exp(-2 * (np.pi * sigma * torch.hypot(y, x)) ** 2)
    return torch.fft.irfft2(torch.fft.rfft2(field) * transfer, field.shape[-2:])


def spectrum(
    forecast: Tensor, truth: Tensor, valid: Tensor | None = None, block: Tensor | None = None, quantity: Quantity = RAIN
) -> xr.Dataset:
    """Sums by block and scores, of two blocks."""
    size = (truth.shape[-2], truth.shape[-1])
    skill = Skill(["model"], Scope(quantity, STEPS, 2, size=size), None, {"spectrum": Spectrum})
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else valid
    block = torch.arange(len(truth)) % 2 if block is None else block
    skill.update("model", Forecast(forecast), truth, valid, block)
    return skill.dataset().isel(model=0)


def by_numpy(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean power of all cells of the full transform whose frequency rounds to a multiple of 1/longer side."""
    height, width = field.shape
    longer = max(height, width)
    power = np.abs(np.fft.fft2(field)) ** 2 / field.size
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    return np.array([power[np.round(radius * longer) == ring].mean() for ring in range((longer + 1) // 2)])


@pytest.mark.parametrize("side", [24, 25])
def test_equals_pysteps_on_square_frames(side: int) -> None:
    spectral = pytest.importorskip("pysteps.utils.spectral", reason="pysteps is an extra")
    truth = rough((side, side))
    ours = spectrum(truth, truth)
    for step in range(STEPS):
        expected = [spectral.rapsd(one.numpy(), fft_method=np.fft, return_freq=True) for one in truth[:, step, 0]]
        mean = np.mean([power for power, _ in expected], axis=0)
        np.testing.assert_allclose(ours.power_truth.isel(lead_time=step), mean, rtol=1e-10)
        np.testing.assert_allclose(ours.wavenumber, expected[0][1], rtol=1e-12)


@pytest.mark.parametrize("sigma", [0, 8])
@pytest.mark.parametrize("periodic", [False, True])
def test_in_float32_powers_are_those_of_pysteps_to_1e_5(sigma: float, periodic: bool) -> None:
    """Also where almost nothing is left: below 1e-5 of the variance to 1e-10 of it."""
    spectral = pytest.importorskip("pysteps.utils.spectral", reason="pysteps is an extra")
    rain = rough((64, 64)).exp().numpy()
    smooth = gaussian_filter(rain, (0, 0, 0, sigma, sigma), mode="wrap" if periodic else "reflect")
    field = torch.from_numpy(smooth).float()
    ours = spectrum(field, field)
    assert periodic or ours.power_truth.min() > 1e-5 * smooth.var()
    for step in range(STEPS):
        expected = [spectral.rapsd(one.double().numpy(), fft_method=np.fft) for one in field[:, step, 0]]
        found = ours.power_truth.isel(lead_time=step)
        np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-5, atol=1e-10 * smooth.var())


def test_in_float32_a_large_mean_leaves_nothing_in_the_waves() -> None:
    """The rounding of a mean of 300 would be more power than these waves have."""
    waves = rough() - 5
    exact = spectrum(waves + 300, waves + 300)
    found = spectrum((waves + 300).float(), (waves + 300).float())
    np.testing.assert_allclose(found.power_forecast, exact.power_forecast, rtol=1e-4)
    np.testing.assert_allclose(found.power_forecast[:, 0], exact.power_forecast[:, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [(20, 31), (31, 20), (24, 10), (9, 9)])
def test_equals_numpy_on_frames_of_any_shape(size: tuple[int, int]) -> None:
    truth = rough(size)
    expected = np.mean([by_numpy(one.numpy()) for one in truth[:, 1, 0]], axis=0)
    np.testing.assert_allclose(spectrum(truth, truth).power_truth.isel(lead_time=1), expected, rtol=1e-10)


def test_a_wave_lies_in_one_ring_whichever_way_it_runs() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(36.0), indexing="ij")
    for along in (y, x):
        wave = torch.cos(2 * torch.pi * along / 6).expand(2, STEPS, 1, -1, -1)
        power = spectrum(wave, wave).power_truth.isel(lead_time=0)
        assert float(power.wavenumber[power.argmax("wavenumber")]) == pytest.approx(1 / 6)
        assert float(power.max()) > 1e6 * float(power.sortby(power)[-2])


def test_a_perfect_forecast_is_as_sharp_as_the_truth() -> None:
    truth = rough()
    scores = spectrum(truth, truth)
    assert scores.sharpness.values == pytest.approx(1.0, abs=1e-12)
    assert scores.spectral_slope_error.values == pytest.approx(0.0, abs=1e-12)
    assert scores.effective_resolution.values.tolist() == [2.0] * STEPS
    assert scores.coherence.values == pytest.approx(1.0, abs=1e-12)
    assert scores.effective_resolution.units == "pixels"


def test_blurring_lowers_sharpness_and_slope_and_coarsens_the_resolution() -> None:
    truth = rough((64, 64))
    one, two = (spectrum(blurred(truth, sigma), truth) for sigma in (0.8, 1.6))
    assert (one.sharpness < 0.7).all()
    assert (two.sharpness < one.sharpness / 2).all()
    assert (one.spectral_slope_error < -0.5).all()
    assert (two.spectral_slope_error < one.spectral_slope_error).all()
    assert (two.effective_resolution > one.effective_resolution).all()
    # The transfer function is 1/2 in power where 4 (pi sigma k)^2 = ln 2.
    ideal = 2 * np.pi * 1.6 / np.sqrt(np.log(2))
    assert two.effective_resolution.values == pytest.approx(ideal, rel=0.1)


def test_noise_makes_a_forecast_sharper_than_the_truth_but_not_coherent() -> None:
    truth = rough()
    scores = spectrum(truth + torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)), truth)
    assert (scores.sharpness > 1.2).all()
    assert (scores.coherence.isel(wavenumber=-1) < 0.9).all()


def test_a_scaled_forecast_keeps_slope_and_coherence() -> None:
    truth = rough()
    scores = spectrum(0.5 * truth, truth)
    assert scores.spectral_slope_error.values == pytest.approx(0.0, abs=1e-12)
    assert scores.coherence.values == pytest.approx(1.0, abs=1e-12)
    assert scores.sharpness.values == pytest.approx(0.25, abs=1e-12)


def test_the_slope_is_the_fit_of_numpy() -> None:
    truth = rough()
    scores = spectrum(truth, truth).isel(lead_time=0)
    x, y = np.log(scores.wavenumber.values[1:]), np.log(scores.power_truth.values[1:])
    assert float(scores.spectral_slope_truth) == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-10)
    assert float(scores.spectral_slope_truth) == pytest.approx(-3.0, abs=0.3)


def test_the_resolution_is_the_shortest_wave_that_is_left() -> None:
    truth = rough()
    scores = spectrum(low_pass(truth, 32 / 6.4), truth)
    assert scores.effective_resolution.values == pytest.approx(32 / 6)
    # A wave that comes back beyond a gap is not resolved.
    gap = low_pass(truth, 32 / 6.4) + truth - low_pass(truth, 32 / 9.4)
    assert spectrum(gap, truth).effective_resolution.values == pytest.approx(32 / 6)
    assert spectrum(0.1 * truth, truth).effective_resolution.values == pytest.approx(32)


def test_missing_and_undefined_pixels_hold_the_floor_in_both() -> None:
    quantity = Quantity("reflectivity", "reflectivity", "dBZ", thresholds=(20.0,), floor=-10.0)
    truth, forecast = rough(seed=1), rough(seed=2)
    valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(3)) > 0.2
    holed = torch.where(torch.rand(truth.shape, generator=torch.Generator().manual_seed(4)) > 0.1, forecast, torch.nan)
    known = valid & holed.isfinite()
    expected = spectrum(
        torch.where(known, forecast, -10.0), torch.where(known, truth, -10.0), quantity=quantity
    ).forecast_power_sum
    found = spectrum(holed, torch.where(valid, truth, torch.nan), valid, quantity=quantity)
    np.testing.assert_allclose(found.forecast_power_sum, expected, rtol=1e-12)
    above = torch.where(known, forecast + 10, 0.0).mean((-3, -2, -1)).square() * 32 * 32
    by_block = torch.stack([above[[0, 2]].sum(0), above[1]])
    np.testing.assert_allclose(found.forecast_power_sum.isel(wavenumber=0), by_block, rtol=1e-12)
    assert np.isfinite(found.cross_power_sum).all()
    assert np.isnan(found.sharpness).all()  # the pool has undefined pixels


def test_padding_and_frames_without_a_pixel_count_nowhere() -> None:
    truth, forecast = rough(), rough(seed=1)
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[1, 1] = False
    sums = spectrum(forecast, truth, valid, torch.tensor([0, 0, -1]))
    first = spectrum(forecast[:1], truth[:1])
    for name in ("ring_cells", "truth_power_sum", "cross_power_sum"):
        np.testing.assert_allclose(sums[name][0, 1], first[name][0, 1], rtol=1e-12)
        assert not sums[name][1].any()
    assert (sums.ring_cells[0, 0] == 2 * first.ring_cells[0, 0]).all()


def test_any_split_of_the_batches_gives_the_same_sums() -> None:
    truth, forecast = rough(samples=6), rough(samples=6, seed=1)
    valid, block = torch.ones_like(truth, dtype=torch.bool), torch.arange(6) % 2
    states = []
    for batches in ([[0, 1, 2, 3, 4, 5]], [[5, 0, 3], [2], [1, 4]]):
        metric = Spectrum(Scope(RAIN, STEPS, 2, size=(32, 32)))
        for rows in batches:
            metric.update(Forecast(forecast[rows]), truth[rows], valid[rows], block[rows])
        states.append(metric.compute())
    for name in Spectrum.SUMS:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-12, atol=0)


def test_without_power_there_is_no_sharpness_slope_or_resolution() -> None:
    truth = rough((15, 21))
    dry = torch.zeros_like(truth)
    nothing = spectrum(truth, dry)
    for name in ("sharpness", "spectral_slope_truth", "effective_resolution", "coherence"):
        assert np.isnan(nothing[name]).all(), name
    for constant in (dry, dry + 0.7, dry.float() + 0.7, dry.float() + 1e6 / 3):  # their other waves are rounding
        flat = spectrum(constant, truth.to(constant.dtype))
        assert (flat.sharpness == 0).all()
        assert np.isnan(flat.spectral_slope_forecast).all()


def test_frames_without_waves_are_refused() -> None:
    with pytest.raises(UserError, match="2 x 2 pixels have no spectrum"):
        Spectrum(Scope(RAIN, STEPS, 1, size=(2, 2)))
    with pytest.raises(ValueError, match=r"Scope\.size"):
        Spectrum(Scope(RAIN, STEPS, 1))
