"""SSIM and PSNR: against scikit-image and torchmetrics, and their rules for missing pixels and perfect frames."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.image import Image
from forecast.metrics.metric import Scope
from forecast.skill import Skill
from forecast.units import Quantity

FRAMES = Quantity("frame", "grey level", "1", thresholds=(0.5,))
DBZ = Quantity("reflectivity", "reflectivity", "dBZ", thresholds=(20.0,), floor=-10.0)
STEPS = 2


def frames(samples: int = 3, size: tuple[int, int] = (23, 18)) -> tuple[Tensor, Tensor]:
    """Forecast and truth in [0, 1], B S 1 H W float64."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])
    phase = torch.rand((samples, STEPS, 1, 1, 1), generator=generator, dtype=torch.float64)
    truth = (torch.sin(0.5 * y + 6 * phase) * torch.cos(0.4 * x - 6 * phase)).clamp_min(0)
    noise = torch.rand(truth.shape, generator=generator, dtype=torch.float64)
    return (0.8 * truth + 0.3 * noise).clamp(0, 1), truth


def scores(
    forecast: Tensor,
    truth: Tensor,
    valid: Tensor | None = None,
    block: Tensor | None = None,
    quantity: Quantity = FRAMES,
    **options: Any,
) -> xr.Dataset:
    scope = Scope(quantity, STEPS, 2, size=(truth.shape[-2], truth.shape[-1]))
    skill = Skill(["model"], scope, None, {"image": lambda scope: Image(scope, **options)})
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else valid
    skill.update(
        "model", Forecast(forecast), truth, valid, torch.zeros(len(truth), dtype=int) if block is None else block
    )
    return skill.dataset().isel(model=0)


def test_ssim_is_that_of_torchmetrics_inside_of_the_border() -> None:
    forecast, truth = frames()
    found = scores(forecast, truth).ssim
    for step in range(STEPS):
        _, full = structural_similarity_index_measure(
            forecast[:, step], truth[:, step], data_range=1.0, return_full_image=True
        )
        assert float(found[step]) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-10)


@pytest.mark.parametrize("convention", ["wang", "openstl"])
def test_ssim_is_that_of_scikit_image(convention: str) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image comes with the extra pysteps")
    gaussian = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5, "data_range": 1.0}
    options = gaussian if convention == "wang" else {"data_range": 2.0}
    forecast, truth = frames()
    found = scores(forecast, truth, convention=convention).ssim
    for step in range(STEPS):
        each = [
            metrics.structural_similarity(o.numpy(), f.numpy(), **options)
            for f, o in zip(forecast[:, step, 0], truth[:, step, 0], strict=True)
        ]
        assert float(found[step]) == pytest.approx(np.mean(each), abs=1e-10)


def test_psnr_is_a_mean_over_frames_and_of_the_pooled_error() -> None:
    forecast, truth = frames()
    forecast[0] = truth[0] + 0.01  # one frame far better than the others
    found = scores(forecast.clamp(0, 1), truth)
    f = forecast.clamp(0, 1)
    for step in range(STEPS):
        each = [peak_signal_noise_ratio(f[row, step], truth[row, step], data_range=1.0) for row in range(3)]
        pooled = peak_signal_noise_ratio(f[:, step], truth[:, step], data_range=1.0)
        assert float(found.psnr[step]) == pytest.approx(np.mean(each), abs=1e-5)
        assert float(found.psnr_pooled[step]) == pytest.approx(float(pooled), abs=1e-5)
    assert (found.psnr > found.psnr_pooled + 1).all()
    assert found.psnr.units == "dB"


def test_a_perfect_frame_has_ssim_1_and_a_finite_psnr() -> None:
    _, truth = frames()
    found = scores(truth, truth)
    assert found.ssim.values == pytest.approx(1.0, abs=1e-12)
    assert found.psnr.values.tolist() == found.psnr_pooled.values.tolist() == [100.0] * STEPS


def test_the_data_range_scales_other_quantities() -> None:
    forecast, truth = frames()
    expected, found = (
        scores(forecast, truth),
        scores(forecast * 70 - 10, truth * 70 - 10, quantity=DBZ, data_range=70.0),
    )
    for name in ("ssim", "psnr", "psnr_pooled"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10)
    assert (scores(forecast * 2, truth).ssim == scores((forecast * 2).clamp(max=1), truth).ssim).all()


def test_missing_pixels_hold_the_floor_for_ssim_and_are_left_out_of_psnr() -> None:
    forecast, truth = frames()
    valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    found = scores(forecast, torch.where(valid, truth, torch.nan), valid)
    np.testing.assert_allclose(found.ssim, scores(forecast * valid, truth * valid).ssim, rtol=1e-12)
    error, known = (forecast - truth).square()[:, 0], valid[:, 0]
    each = [-10 * float(one[seen].mean().log10()) for one, seen in zip(error, known, strict=True)]
    assert float(found.psnr[0]) == pytest.approx(np.mean(each), abs=1e-10)
    assert float(found.psnr_pooled[0]) == pytest.approx(-10 * float(error[known].mean().log10()), abs=1e-10)


def test_an_undefined_forecast_leaves_the_sums_finite_and_the_scores_without_value() -> None:
    forecast, truth = frames()
    forecast[0, 0, 0, 2, 3] = torch.nan
    found = scores(forecast, truth)
    assert all(np.isfinite(found[name]).all() for name in Image.SUMS)
    assert np.isnan(found.ssim[0])
    assert np.isfinite(found.ssim[1])


def test_padding_and_frames_without_a_pixel_count_nowhere() -> None:
    forecast, truth = frames()
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[1] = False
    found = scores(forecast, truth, valid, torch.tensor([0, 0, -1]))
    assert found.image_frames.values.tolist() == [[1, 1], [0, 0]]
    np.testing.assert_allclose(found.ssim, scores(forecast[:1], truth[:1]).ssim, rtol=1e-12)
    np.testing.assert_allclose(found.psnr, scores(forecast[:1], truth[:1]).psnr, rtol=1e-12)


def test_any_split_of_the_batches_gives_the_same_sums() -> None:
    forecast, truth = frames(samples=5)
    valid, block = torch.ones_like(truth, dtype=torch.bool), torch.arange(5) % 2
    states = []
    for batches in ([[0, 1, 2, 3, 4]], [[4, 1], [0], [2, 3]]):
        metric = Image(Scope(FRAMES, STEPS, 2))
        for rows in batches:
            metric.update(Forecast(forecast[rows]), truth[rows], valid[rows], block[rows])
        states.append(metric.compute())
    for name in Image.SUMS:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("scope", "options", "sentence"),
    [
        (Scope(DBZ, 1, 1), {}, "need a data range"),
        (Scope(DBZ, 1, 1), {"data_range": -1.0}, "must be above 0"),
        (Scope(FRAMES, 1, 1), {"convention": "matlab"}, "must be one of wang, openstl"),
        (Scope(FRAMES, 1, 1, size=(10, 40)), {}, "windows of 11 x 11 pixels"),
    ],
)
def test_what_cannot_be_an_image_is_refused(scope: Scope, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Image(scope, **options)
