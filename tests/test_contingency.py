"""Categorical scores: the published table, two other implementations, and what must not change a count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.metrics.contingency import (
    Contingency,
    csi,
    ets,
    far,
    frequency_bias,
    hss,
    peirce,
    pod,
    sedi,
    success_ratio,
)
from forecast.metrics.metric import Scope, count
from forecast.units import Quantity

THRESHOLDS = (5.0, 20.0, 30.5)


def scope(thresholds: tuple[float, ...] = THRESHOLDS, steps: int = 4, blocks: int = 3) -> Scope:
    return Scope(Quantity("x", "reflectivity", "dBZ", thresholds, floor=-10.0), steps, blocks)


class Windows(NamedTuple):
    forecast: Forecast
    truth: Tensor
    valid: Tensor
    block: Tensor


def windows(seed: int = 0, samples: int = 6, blocks: int = 3) -> Windows:
    """Random fields in steps of 0.5 dBZ, with many ties at the thresholds and a tenth missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 4, 1, 9, 7)
    truth = torch.randint(-20, 90, shape, generator=generator) / 2
    mean = truth + torch.randint(-20, 21, shape, generator=generator) / 2
    valid = torch.rand(shape, generator=generator) > 0.1
    return Windows(Forecast(mean), truth, valid, torch.arange(samples) % blocks)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (7, 9), (1, 300), (48, 48)])
def test_every_pixel_is_counted_once(size: tuple[int, int]) -> None:
    ones = (torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(0)) < 0.7).to(torch.int8)
    assert torch.equal(count(ones), ones.sum((2, 3)))
    assert torch.equal(count(torch.ones_like(ones)), torch.full((3, 2), size[0] * size[1]))


def counts(*batches: Windows, blocks: int = 3) -> dict[str, Tensor]:
    metric = Contingency(scope(blocks=blocks))
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def event_of(mean: Tensor, truth: Tensor, threshold: float) -> str:
    """Where a single pixel was counted."""
    metric = Contingency(scope((threshold,), steps=1, blocks=1))
    metric.update(Forecast(mean), truth, torch.ones_like(truth, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    (name,) = (name for name, state in metric.compute().items() if state == 1)
    return name


def pooled(states: dict[str, Tensor], threshold: int) -> tuple[np.ndarray, ...]:
    """Hits, misses, false alarms, correct negatives of one threshold."""
    names = ("hits", "misses", "false_alarms", "correct_negatives")
    return tuple(states[name][..., threshold].sum().double().numpy() for name in names)


@pytest.mark.parametrize("wrap", [np.asarray, xr.DataArray], ids=["numpy", "xarray"])
def test_published_table(wrap: Callable[[float], Any]) -> None:
    """The worked example of the forecast verification literature: a year of rain or no rain, 365 days."""
    a, b, c, d = wrap(82.0), wrap(38.0), wrap(23.0), wrap(222.0)
    assert float(frequency_bias(a, c, b)) == pytest.approx(1.143, abs=5e-4)
    assert float(pod(a, c)) == pytest.approx(0.781, abs=5e-4)
    assert float(far(a, b)) == pytest.approx(0.317, abs=5e-4)
    assert float(csi(a, c, b)) == pytest.approx(0.573, abs=5e-4)
    assert float(hss(a, c, b, d)) == pytest.approx(0.609, abs=5e-4)
    assert float(peirce(a, c, b, d)) == pytest.approx(0.635, abs=5e-4)
    assert float(ets(a, c, b, d)) == pytest.approx(0.438, abs=5e-4)
    assert float(success_ratio(a, b)) == pytest.approx(1 - 0.317, abs=5e-4)


def test_scores_of_large_int64_counts_do_not_overflow() -> None:
    table = (82, 23, 38, 222)
    large = [np.asarray(count * 10**9, dtype=np.int64) for count in table]
    small = [np.asarray(float(count)) for count in table]
    for score in (hss, ets, peirce, sedi):
        assert float(score(*large)) == pytest.approx(float(score(*small)), rel=1e-12)


def test_nothing_to_divide_by_is_nan() -> None:
    none, some = np.zeros(2), np.ones(2)
    ratios = (pod(none, none), csi(none, none, none), far(none, none), success_ratio(none, none))
    for score in (*ratios, *(score(none, none, none, some) for score in (hss, ets, peirce, sedi))):
        assert np.isnan(score).all()
    assert np.isnan(sedi(some, none, none, some)).all()  # perfect, and yet ln 0
    assert np.isnan(frequency_bias(none, none, some)).all()  # and not infinity


def test_every_pixel_is_counted_as_a_reader_would() -> None:
    batch = windows()
    states = counts(batch)
    truth, mean, valid = batch.truth.numpy(), batch.forecast.mean.numpy(), batch.valid.numpy()
    expected = {name: np.zeros((3, 4, 3), int) for name in ("hits", "misses", "false_alarms", "correct_negatives")}
    for pixel in map(tuple, np.argwhere(valid)):
        for p, threshold in enumerate(THRESHOLDS):
            yes, rain = mean[pixel] >= threshold, truth[pixel] >= threshold
            name = ("hits" if rain else "false_alarms") if yes else ("misses" if rain else "correct_negatives")
            expected[name][int(batch.block[pixel[0]]), pixel[1], p] += 1
    for counted, value in expected.items():
        assert states[counted].dtype == torch.int64
        assert np.array_equal(states[counted].numpy(), value), counted


@pytest.mark.parametrize("threshold", range(len(THRESHOLDS)))
def test_equals_pysteps(threshold: int) -> None:
    """pysteps' events are `>`, ours `>=`: its threshold is ours less one unit in the last place."""
    reference = pytest.importorskip("pysteps.verification.detcatscores", reason="pysteps is an extra")
    batch = windows()
    a, c, b, d = pooled(counts(batch), threshold)
    below = np.nextafter(THRESHOLDS[threshold], -np.inf)
    expected = reference.det_cat_fct(
        batch.forecast.mean[batch.valid].double().numpy(), batch.truth[batch.valid].double().numpy(), below
    )
    ours = {"CSI": csi(a, c, b), "POD": pod(a, c), "FAR": far(a, b), "BIAS": frequency_bias(a, c, b)}
    chance = {"HSS": hss(a, c, b, d), "GSS": ets(a, c, b, d), "HK": peirce(a, c, b, d), "SEDI": sedi(a, c, b, d)}
    for name, value in (ours | chance).items():
        assert float(value) == pytest.approx(float(expected[name]), abs=1e-10), name


@pytest.mark.parametrize("threshold", range(len(THRESHOLDS)))
def test_equals_scores(threshold: int) -> None:
    """The package `scores` takes `>=` as we do, ties included; NaN is missing there."""
    reference = pytest.importorskip("scores.categorical", reason="scores is a development dependency")
    batch = windows()
    a, c, b, d = pooled(counts(batch), threshold)
    fields = [xr.DataArray(np.where(batch.valid, field, np.nan)) for field in (batch.forecast.mean, batch.truth)]
    operator = reference.ThresholdEventOperator(default_event_threshold=THRESHOLDS[threshold])
    expected = operator.make_contingency_manager(*fields)
    for value, name in (
        (ets(a, c, b, d), "equitable_threat_score"),
        (peirce(a, c, b, d), "peirce_skill_score"),
        (sedi(a, c, b, d), "symmetric_extremal_dependence_index"),
        (success_ratio(a, b), "success_ratio"),
        (csi(a, c, b), "critical_success_index"),
        (pod(a, c), "probability_of_detection"),
        (far(a, b), "false_alarm_ratio"),
        (frequency_bias(a, c, b), "frequency_bias"),
        (hss(a, c, b, d), "heidke_skill_score"),
    ):
        assert float(value) == pytest.approx(float(getattr(expected, name)()), abs=1e-10), name


def test_a_value_at_the_threshold_is_an_event() -> None:
    """Also for a threshold that float32 rounds up or down."""
    for threshold in (0.1, 0.3, 0.5, 0.7):
        at = torch.full((1, 1, 1, 1, 1), threshold)
        assert event_of(at, at, threshold) == "hits"


def test_a_forecast_of_half_precision_meets_the_whole_threshold() -> None:
    """bfloat16 knows 0.7 as 0.6992 only: that forecast is below 0.7, although it is not below bfloat16(0.7)."""
    at = torch.full((1, 1, 1, 1, 1), 0.7)
    assert event_of(at.bfloat16(), at, 0.7) == "misses"


def test_padded_samples_and_invalid_pixels_change_nothing() -> None:
    batch = windows()
    garbage = torch.where(batch.valid, batch.forecast.mean, torch.nan), torch.where(batch.valid, batch.truth, torch.nan)
    hidden = Windows(Forecast(garbage[0]), garbage[1], batch.valid, batch.block)
    padding = windows(seed=9, samples=2)._replace(block=torch.full((2,), -1))
    poisoned = padding._replace(forecast=Forecast(torch.full_like(padding.truth, torch.nan)))
    assert_same(counts(batch), counts(hidden, padding, poisoned))


def test_batches_add_up_in_any_order() -> None:
    batch = windows()
    first = Windows(Forecast(batch.forecast.mean[:2]), *(part[:2] for part in batch[1:]))
    rest = Windows(Forecast(batch.forecast.mean[2:]), *(part[2:] for part in batch[1:]))
    assert_same(counts(batch), counts(first, rest))
    assert_same(counts(batch), counts(rest, first))


def test_blocks_add_up() -> None:
    batch = windows()
    one = counts(batch._replace(block=torch.zeros_like(batch.block)), blocks=1)
    three = counts(batch)
    assert_same(one, {name: state.sum(0, keepdim=True) for name, state in three.items()})


def test_perfect_forecast() -> None:
    batch = windows()
    a, c, b, d = pooled(counts(batch._replace(forecast=Forecast(batch.truth))), 1)
    assert (float(csi(a, c, b)), float(pod(a, c)), float(far(a, b))) == (1.0, 1.0, 0.0)
    assert (float(frequency_bias(a, c, b)), float(hss(a, c, b, d))) == (1.0, 1.0)


def test_a_forecast_that_is_not_finite_is_in_none_of_the_counts() -> None:
    batch = windows()
    mean = batch.forecast.mean.clone()
    mean[0, 2] = torch.nan
    mean[1, 3, 0, 0, 0] = torch.inf
    states = counts(batch._replace(forecast=Forecast(mean)))
    unknown = int(batch.valid[0, 2].sum() + batch.valid[1, 3, 0, 0, 0])
    assert int(sum(state[..., 0].sum() for state in states.values())) == int(batch.valid.sum()) - unknown


def test_frames_larger_than_what_is_counted_at_a_time() -> None:
    """Frames are counted some at a time; here a batch needs several turns."""
    truth = torch.randint(0, 60, (2, 3, 1, 300, 301), generator=torch.Generator().manual_seed(0)).float()
    mean = truth.roll(1, -1)
    metric = Contingency(scope(steps=3, blocks=2))
    metric.update(Forecast(mean), truth, torch.ones_like(truth, dtype=torch.bool), torch.arange(2))
    both = (mean >= 20) & (truth >= 20)
    assert torch.equal(metric.compute()["hits"][..., 1], both.sum((2, 3, 4)))
    assert int(sum(state[..., 1].sum() for state in metric.compute().values())) == truth.numel()


def test_parts_of_a_longer_sequence_are_counted_like_copies_of_them() -> None:
    """Frames are taken in parts, without a copy of the whole."""
    longer = torch.randint(0, 60, (3, 7, 1, 160, 170), generator=torch.Generator().manual_seed(0)).float()
    mean, truth, valid = longer.roll(1, -1)[:, 3:], longer[:, 3:], (longer > 3)[:, 3:]
    block = torch.tensor([2, 0, -1])
    assert not truth.is_contiguous()
    both = torch.where(valid, (mean >= 20) & (truth >= 20), False)
    states = counts(Windows(Forecast(mean), truth, valid, block))
    assert torch.equal(states["hits"][..., 1], both[[1, 2, 0]].sum((2, 3, 4)) * torch.tensor([[1], [0], [1]]))
    assert int(sum(state[..., 0].sum() for state in states.values())) == int(valid[:2].sum())


def test_reset_and_what_was_computed_stays() -> None:
    metric = Contingency(scope())
    metric.update(*windows())
    before = metric.compute()
    kept = {name: state.clone() for name, state in before.items()}
    metric.update(*windows(seed=1))
    assert_same(before, kept)
    metric.reset()
    metric.update(*windows())
    assert_same(metric.compute(), kept)
