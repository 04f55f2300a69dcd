"""Losses against torch and naive loops; what is missing weighs nothing, whatever stands there."""

from collections.abc import Callable
from math import log, prod

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forecast.errors import UserError
from forecast.heads import Bernoulli, Point
from forecast.losses import Balanced, CrossEntropy, Loss, MeanAbsoluteError, MeanSquaredError, Quantile

SHAPE = (2, 3, 1, 5, 4)  # B S C H W
LOSSES: dict[str, Callable[..., Loss]] = {
    "mse": lambda **options: MeanSquaredError(Point(), **options),
    "mae": lambda **options: MeanAbsoluteError(Point(), **options),
    "cross-entropy": lambda **options: CrossEntropy(Bernoulli(), **options),
    "balanced": lambda **options: Balanced(Point(), **options),
    "quantile": lambda **options: Quantile(Point(), **options),
}
losses = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
reductions = pytest.mark.parametrize("reduction", ["pixel", "frame", "sequence"])
Make = Callable[..., Loss]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """raw, target, valid, physical; two thirds are valid."""
    generator = torch.Generator().manual_seed(5)
    raw, target, chance = (torch.rand(*SHAPE, generator=generator) for _ in range(3))
    return raw.requires_grad_(), target, chance < 2 / 3, 40 * target


def scored(loss: Loss, raw: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient on the raw forecast."""
    raw = raw.detach().clone().requires_grad_()
    value = loss(raw, *others)
    value.backward()
    assert raw.grad is not None
    return value.detach(), raw.grad


@losses
@reductions
@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.inf, torch.nan])
def test_missing_pixels_weigh_nothing_whatever_stands_there(make: Make, reduction: str, garbage: float) -> None:
    raw, target, valid, physical = data()
    loss = make(reduction=reduction)
    expected, gradient = scored(loss, raw, target, valid, physical)
    soiled = [torch.where(valid, field, garbage) for field in (target, physical)]
    value, other = scored(loss, raw, soiled[0], valid, soiled[1])
    assert value == expected
    assert torch.equal(other, gradient)
    assert not gradient[~valid].any()
    assert gradient[valid].all()


@losses
@reductions
def test_reductions_are_the_mean_over_valid_pixels_times_their_number(make: Make, reduction: str) -> None:
    raw, target, valid, physical = data()
    cost = make().cost(raw, target, physical).detach()
    mean = sum(float(c) for c, known in zip(cost.flatten(), valid.flatten(), strict=True) if known) / int(valid.sum())
    pixels = {"pixel": 1, "frame": prod(SHAPE[2:]), "sequence": prod(SHAPE[1:])}[reduction]
    assert float(make(reduction=reduction)(raw.detach(), target, valid, physical)) == pytest.approx(
        mean * pixels, rel=1e-5
    )
    everywhere = torch.ones_like(valid)
    whole = make(reduction=reduction)(raw.detach(), target, everywhere, physical)
    count = cost.numel() / pixels  # pixels, frames or sequences
    assert float(whole) == pytest.approx(float(cost.sum()) / count, rel=1e-5)


@losses
@reductions
def test_a_batch_of_missing_pixels_gives_0_and_no_gradient(make: Make, reduction: str) -> None:
    raw, target, valid, physical = data()
    value, gradient = scored(make(reduction=reduction), raw, target, torch.zeros_like(valid), physical)
    assert value == 0
    assert not gradient.any()


def test_squared_and_absolute_error_equal_torch() -> None:
    raw, target, valid, physical = data()
    everywhere = torch.ones_like(valid)
    for loss, theirs in ((MeanSquaredError, F.mse_loss), (MeanAbsoluteError, F.l1_loss)):
        torch.testing.assert_close(loss(Point())(raw, target, everywhere, physical), theirs(raw, target))
        torch.testing.assert_close(loss(Point())(raw, target, valid, physical), theirs(raw[valid], target[valid]))


def test_cross_entropy_equals_torch() -> None:
    raw, target, valid, physical = data()
    raw = 20 * raw - 10
    ours = CrossEntropy(Bernoulli())(raw, target, valid, physical)
    torch.testing.assert_close(ours, torch.nn.BCEWithLogitsLoss()(raw[valid], target[valid]))


def test_not_knowing_costs_2839_a_frame_of_64x64() -> None:
    raw, target = torch.zeros(2, 10, 1, 64, 64), torch.rand(2, 10, 1, 64, 64).round()
    everywhere = torch.ones_like(target, dtype=torch.bool)
    frame = float(CrossEntropy(Bernoulli(), "frame")(raw, target, everywhere, target))
    assert frame == pytest.approx(4096 * log(2), rel=1e-5)
    assert round(frame) == 2839
    sequence = CrossEntropy(Bernoulli(), "sequence")(raw, target, everywhere, target)
    assert float(sequence) == pytest.approx(10 * frame, rel=1e-5)


def test_balanced_equals_hko7_pixel_by_pixel() -> None:
    raw, target, valid, _ = data()
    rain = torch.tensor([0.0, 0.49, 0.5, 1.99, 2.0, 4.9, 5.0, 9.9, 10.0, 29.9, 30.0, 200.0]).repeat(10).view(SHAPE)
    total = 0.0
    for x, t, r, known in zip(raw.flatten(), target.flatten(), rain.flatten(), valid.flatten(), strict=True):
        weight = 1
        for threshold, heavier in ((0.5, 1), (2, 2), (5, 5), (10, 10), (30, 30)):
            if r >= threshold:
                weight = heavier
        error = float(x.detach() - t)
        total += weight * (2 * error**2 + 3 * abs(error)) if known else 0
    ours = Balanced(Point(), mse=2.0, mae=3.0, scale=1e-2)(raw, target, valid, rain)
    assert float(ours.detach()) == pytest.approx(1e-2 * total / int(valid.sum()), rel=1e-5)


def test_an_event_is_at_or_above_its_threshold() -> None:
    thresholds = torch.tensor([0.5, 2.0, 5.0, 10.0, 30.0])
    below = torch.nextafter(thresholds, torch.zeros(5))
    rain = torch.stack([thresholds, below]).view(1, 1, 1, 2, 5)
    weighted = Balanced(Point(), mae=0.0).cost(torch.ones_like(rain), torch.zeros_like(rain), rain)
    assert weighted[0, 0, 0].tolist() == [[1, 2, 5, 10, 30], [1, 1, 2, 5, 10]]


@losses
def test_a_loss_is_counted_in_float32_whatever_the_network_gives(make: Make) -> None:
    raw, target, valid, physical = data()
    assert make()(raw.bfloat16(), target, valid, physical).dtype == torch.float32


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (
            lambda: MeanSquaredError(Point(), "sum"),
            "Unknown loss.reduction 'sum'; choose one of pixel, frame, sequence",
        ),
        (lambda: CrossEntropy(Point()), "needs the head forecast.heads.Bernoulli, but model.head is Point"),
        (
            lambda: Balanced(Point(), thresholds=[1.0, 2.0], weights=[1.0]),
            "must ascend and have one of loss.weights each",
        ),
        (lambda: Balanced(Point(), thresholds=[2.0, 1.0], weights=[1.0, 2.0]), "must ascend"),
    ],
)
def test_wrong_choices_are_refused(make_wrong: Callable[[], Loss], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_wrong()


def test_losses_name_the_units_they_make_sense_for() -> None:
    assert (MeanSquaredError(Point()).units, CrossEntropy(Bernoulli()).units, Balanced(Point()).units) == (
        None,
        "1",
        "mm/h",
    )


@pytest.mark.parametrize("level", [0.2, 0.5, 0.8])
def test_the_quantile_loss_is_least_at_that_quantile(level: float) -> None:
    truth = torch.randn(1, 1, 1, 1, 2001, generator=torch.Generator().manual_seed(1)).exp()
    loss, everywhere = Quantile(Point(), level=level), torch.ones_like(truth, dtype=torch.bool)
    candidates = torch.linspace(0.05, 6, 600)
    costs = torch.stack([loss(value.expand_as(truth), truth, everywhere, truth) for value in candidates])
    assert float(candidates[costs.argmin()]) == pytest.approx(float(truth.quantile(level)), abs=0.02)


def test_half_of_the_absolute_error_is_the_quantile_loss_of_the_median() -> None:
    raw, target, valid, physical = data()
    absolute = MeanAbsoluteError(Point())(raw, target, valid, physical)
    torch.testing.assert_close(2 * Quantile(Point(), level=0.5)(raw, target, valid, physical), absolute)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(UserError, match="a quantile lies between 0 and 1"):
        Quantile(Point(), level=level)
