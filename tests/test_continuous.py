"""Mean errors and correlation: against numpy, pysteps and scores, and in the precision that was promised."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.metrics.continuous import Continuous, Cosine, correlation, cosine, mae, mean_error, mse, rmse
from forecast.metrics.coverage import Coverage
from forecast.metrics.metric import Scope
from forecast.units import Quantity

SUMS = tuple(Continuous.SUMS)


def scope(blocks: int = 3) -> Scope:
    return Scope(Quantity("x", "reflectivity", "dBZ", (20.0,), floor=-10.0), steps=4, blocks=blocks)


def fields(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forecast, truth, valid, block."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 4, 1, 9, 7)
    truth = torch.randn(shape, generator=generator) * 9 + 15
    mean = 0.7 * truth + torch.randn(shape, generator=generator) * 5
    return mean, truth, torch.rand(shape, generator=generator) > 0.1, torch.arange(samples) % 3


def sums(*batches: tuple[Tensor, Tensor, Tensor, Tensor], blocks: int = 3) -> dict[str, Tensor]:
    metrics = Coverage(scope(blocks)), Continuous(scope(blocks))
    for mean, truth, valid, block in batches:
        for metric in metrics:
            metric.update(Forecast(mean), truth, valid, block)
    return metrics[0].compute() | metrics[1].compute()


def scored(states: dict[str, Tensor]) -> dict[str, float]:
    """The scores of everything pooled."""
    pool = {name: np.asarray(float(state.sum())) for name, state in states.items()}
    n = pool["pixels"]
    moments = (pool[name] for name in SUMS[3:])
    return {
        "mse": float(mse(pool["squared_error_sum"], n)),
        "rmse": float(rmse(pool["squared_error_sum"], n)),
        "mae": float(mae(pool["absolute_error_sum"], n)),
        "mean_error": float(mean_error(pool["error_sum"], n)),
        "correlation": float(correlation(n, *moments)),
    }


def test_equals_numpy() -> None:
    mean, truth, valid, block = fields()
    f, o = mean[valid].double().numpy(), truth[valid].double().numpy()
    expected = {
        "mse": np.mean((f - o) ** 2),
        "rmse": np.sqrt(np.mean((f - o) ** 2)),
        "mae": np.mean(np.abs(f - o)),
        "mean_error": np.mean(f - o),
        "correlation": np.corrcoef(f, o)[0, 1],
    }
    assert scored(sums((mean, truth, valid, block))) == pytest.approx(expected, abs=1e-10)


def test_equals_pysteps() -> None:
    reference = pytest.importorskip("pysteps.verification.detcontscores", reason="pysteps is an extra")
    mean, truth, valid, block = fields()
    names = {"MSE": "mse", "RMSE": "rmse", "MAE": "mae", "ME": "mean_error", "corr_p": "correlation"}
    expected = reference.det_cont_fct(mean[valid].double().numpy(), truth[valid].double().numpy(), scores=list(names))
    ours = scored(sums((mean, truth, valid, block)))
    for theirs, name in names.items():
        assert ours[name] == pytest.approx(float(expected[theirs]), abs=1e-10), name


def test_equals_scores() -> None:
    reference = pytest.importorskip("scores.continuous", reason="scores is a development dependency")
    correlations = pytest.importorskip("scores.continuous.correlation", reason="scores is a development dependency")
    mean, truth, valid, block = fields()
    f, o = (xr.DataArray(field[valid].double().numpy(), dims="pixel") for field in (mean, truth))
    ours = scored(sums((mean, truth, valid, block)))
    for name in ("mse", "rmse", "mae", "mean_error"):
        assert ours[name] == pytest.approx(float(getattr(reference, name)(f, o)), abs=1e-10), name
    assert ours["correlation"] == pytest.approx(float(correlations.pearsonr(f, o)), abs=1e-10)


def test_sums_lie_in_their_block_and_lead_time() -> None:
    mean, truth, valid, block = fields()
    states = sums((mean, truth, valid, block))
    error = torch.where(valid, mean.double() - truth.double(), 0.0)
    for index in range(3):
        mine = block == index
        assert torch.equal(states["pixels"][index], valid[mine].sum((0, 2, 3, 4)))
        torch.testing.assert_close(
            states["absolute_error_sum"][index], error[mine].abs().sum((0, 2, 3, 4)), rtol=1e-13, atol=0
        )


def test_padded_samples_and_invalid_pixels_change_nothing() -> None:
    mean, truth, valid, block = fields()
    hidden = torch.where(valid, mean, torch.nan), torch.where(valid, truth, torch.inf), valid, block
    nothing = torch.full_like(mean, torch.nan), truth, valid, torch.full_like(block, -1)
    one, other = sums((mean, truth, valid, block)), sums(hidden, nothing)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_and_blocks_add_up() -> None:
    whole = fields()
    parts = [tuple(part[2:] for part in whole), tuple(part[:2] for part in whole)]
    one, two = sums(whole), sums(*parts)  # type: ignore[arg-type]  # tuples of four
    pool = sums((*whole[:3], torch.zeros_like(whole[3])), blocks=1)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(pool[name].sum(), one[name].sum(), rtol=1e-12, atol=0)


def test_perfect_forecast() -> None:
    _, truth, valid, block = fields()
    expected = {"mse": 0.0, "rmse": 0.0, "mae": 0.0, "mean_error": 0.0}
    scores = scored(sums((truth, truth, valid, block)))
    assert scores.pop("correlation") == pytest.approx(1.0, abs=1e-12)
    assert scores == expected


@pytest.mark.parametrize("value", [0.0, 0.1, -31.7])
def test_correlation_with_a_constant_is_nan(value: float) -> None:
    mean, truth, valid, block = fields()
    constant = torch.full_like(truth, value)
    for pair in ((mean, constant), (constant, truth), (constant, constant)):
        assert np.isnan(scored(sums((*pair, valid, block)))["correlation"])


def test_no_valid_pixel_is_nan() -> None:
    mean, truth, valid, block = fields()
    assert np.isnan(list(scored(sums((mean, truth, torch.zeros_like(valid), block))).values())).all()


def test_what_is_not_finite_adds_nothing_and_is_counted() -> None:
    mean, truth, valid, block = fields()
    spoilt = mean.clone()
    spoilt[0, 2, 0, 3, 3], spoilt[1, 1, 0, 0, :] = torch.nan, torch.inf
    unknown = valid & ~torch.isfinite(spoilt)
    one, other = sums((spoilt, truth, valid, block)), sums((mean, truth, valid & ~unknown, block))
    assert all(torch.equal(one[name], other[name]) for name in SUMS)
    assert int(one["undefined"].sum()) == int(unknown.sum()) > 0
    assert torch.equal(one["pixels"] - one["undefined"], other["pixels"])


def test_a_member_that_is_not_finite_is_undefined() -> None:
    mean, truth, valid, block = fields()
    members, exceedance = mean[:, None].repeat(1, 3, 1, 1, 1, 1), torch.zeros_like(mean)[:, None]
    members[2, 1, 0, 0, 4, 4], exceedance[3, 0, 1, 0, 5, 5] = torch.nan, torch.inf
    metric = Coverage(scope())
    metric.update(Forecast(mean, members, exceedance), truth, torch.ones_like(valid), block)
    assert metric.compute()["undefined"].nonzero().tolist() == [[0, 1], [2, 0]]


def test_samples_are_windows_with_a_valid_pixel() -> None:
    mean, truth, valid, block = fields()
    valid[0, 1:] = False
    assert sums((mean, truth, valid, block))["samples"].tolist() == [[2, 1, 1, 1], [2] * 4, [2] * 4]


def cosines(*batches: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Their sum and the number of frames, everything pooled."""
    metric = Cosine(scope())
    for mean, truth, valid, block in batches:
        metric.update(Forecast(mean), truth, valid, block)
    return metric.cosine_sum.sum().numpy(), metric.cosine_frames.sum().numpy()


def test_cosine_is_the_mean_over_frames_of_hko7() -> None:
    """On HKO-7's pixels, (dBZ + 10) / 70, frame by frame."""
    mean, truth, valid, block = fields()
    mean, truth = mean.clamp_min(-10), truth.clamp_min(-10)
    f, o = (np.where(valid, (field.double().numpy() + 10) / 70, 0) for field in (mean, truth))
    by_frame = [
        np.dot(x.ravel(), y.ravel()) / np.sqrt((x**2).sum() * (y**2).sum())
        for x, y in zip(f.reshape(24, -1), o.reshape(24, -1), strict=True)
    ]
    assert float(cosine(*cosines((mean, truth, valid, block)))) == pytest.approx(np.mean(by_frame), abs=1e-10)


def test_cosine_of_empty_frames() -> None:
    """Both empty: not counted. One empty: 0."""
    mean, truth, valid, block = fields()
    empty = torch.full_like(mean, -10.0)
    assert np.isnan(cosine(*cosines((empty, empty, valid, block))))
    assert float(cosine(*cosines((empty, truth, valid, block)))) == 0
    assert float(cosine(*cosines((truth, truth, valid, block), (empty, empty, valid, block)))) == pytest.approx(1)


def test_sums_stay_in_float64() -> None:
    """Whatever Lightning's precision plugins call on the module that holds the metric."""
    owner = torch.nn.Module()
    owner.metric = Continuous(scope())
    owner.linear = torch.nn.Linear(1, 1)
    mean, truth, valid, block = fields()
    owner.metric.update(Forecast(mean), truth, valid, block)
    before = owner.metric.compute()
    changes: tuple[Callable[[torch.nn.Module], torch.nn.Module], ...] = (
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to(dtype=torch.float16),
        lambda module: module.to("cpu", torch.float32),
    )
    for change in changes:
        change(owner)
        assert owner.metric.error_sum.dtype == torch.float64
    assert owner.linear.weight.dtype == torch.float32
    assert all(torch.equal(state, before[name]) for name, state in owner.metric.compute().items())
    owner.to(torch.bfloat16)
    owner.metric.reset()
    assert owner.metric.error_sum.dtype == torch.float64
    assert owner.linear.weight.dtype == torch.bfloat16
