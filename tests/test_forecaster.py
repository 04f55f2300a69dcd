"""A trained network as a Forecaster: physical units in, physical units out, the same every time."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from forecast.cells.lstm import LSTM
from forecast.forecaster import Forecaster, NetworkForecaster
from forecast.heads import Bernoulli, Head, Point
from forecast.networks.encoder_forecaster import EncoderForecaster
from forecast.networks.network import Output
from forecast.units import Decibel, Linear, Quantity, Transform

QUANTITY = Quantity("dbz", "reflectivity", "dBZ", (20.0,), floor=-10.0, scale=0.5, offset=-10.0, missing=255.0)
TRANSFORM = Linear(-10.0, 60.0)


class Repeat(nn.Module):
    feeds_back = False

    """Answers its past's frames and then its last one, and keeps what it was given."""

    def forward(self, past: Tensor, steps: int, *, static: Tensor) -> Output:
        self.seen, self.static = past, static
        return Output(torch.cat([past[:, 1:], past[:, -1:].expand(-1, steps, -1, -1, -1)], dim=1))


def make(head: Head | None = None, transform: Transform = TRANSFORM) -> NetworkForecaster:
    torch.manual_seed(0)
    network = EncoderForecaster(partial(LSTM, peephole=True), [4], inputs=1, outputs=1, patch=2)
    return NetworkForecaster(network, head or Point(), transform, QUANTITY.thresholds)


def data() -> tuple[Tensor, Tensor, SimpleNamespace]:
    """A decoded past, its mask, and what every forecaster is given beside them."""
    packed = torch.randint(0, 140, (2, 3, 1, 7, 5), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed[:, :, :, 2:4, 1] = 255
    past, valid = QUANTITY.decode(packed)
    rest = SimpleNamespace(static=torch.zeros(2, 0, 7, 5), time=torch.zeros(2, dtype=torch.int64))
    return past, valid, rest


def test_missing_pixels_reach_the_network_as_the_floor_and_the_rest_in_model_space() -> None:
    past, valid, rest = data()
    network = Repeat()
    NetworkForecaster(network, Point(), TRANSFORM, QUANTITY.thresholds).predict(past, valid, 2, **vars(rest))
    assert not valid.all()
    assert (network.seen[~valid] == TRANSFORM.forward(torch.tensor(QUANTITY.floor))).all()
    torch.testing.assert_close(network.seen, (past + 10) / 70)
    assert network.static is rest.static


def test_the_forecast_is_the_last_frames_of_the_answer_in_physical_units() -> None:
    past, valid, rest = data()
    forecast = NetworkForecaster(Repeat(), Point(), TRANSFORM, QUANTITY.thresholds).predict(
        past, valid, 2, **vars(rest)
    )
    torch.testing.assert_close(forecast.mean, past[:, -1:].expand(-1, 2, -1, -1, -1), rtol=0, atol=1e-4)
    assert forecast.members is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_forecast_is_float32_and_has_no_gradient(autocast: bool) -> None:
    past, valid, rest = data()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        forecast = make(Bernoulli()).predict(past, valid, 4, members=2, **vars(rest))
    for field in (forecast.mean, forecast.members):
        assert field is not None
        assert field.dtype == torch.float32
        assert not field.requires_grad
    assert forecast.mean.shape == (2, 4, 1, 7, 5)


@pytest.mark.parametrize("transform", [TRANSFORM, Decibel()])
def test_no_forecast_is_below_nothing(transform: Transform) -> None:
    past, valid, rest = data()
    forecaster = make(transform=transform)
    with torch.no_grad():
        for weight in forecaster.parameters():
            weight.mul_(30)
    mean = forecaster.predict(past.clamp_min(0), valid, 4, **vars(rest)).mean
    least = -10.0 if transform == TRANSFORM else 0.0
    assert torch.isfinite(mean).all()
    assert mean.min() == least
    assert mean.max() > least


def test_the_same_past_gives_the_same_forecast() -> None:
    past, valid, rest = data()
    forecaster = make(Bernoulli(), Linear())
    before = [field.clone() for field in (past, valid)]
    one, same, other = (
        forecaster.predict(past, valid, 2, members=3, generator=torch.Generator().manual_seed(seed), **vars(rest))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.mean, same.mean)
    assert one.members is not None
    assert same.members is not None
    assert other.members is not None
    assert one.members.shape == (2, 3, 2, 1, 7, 5)
    assert torch.equal(one.members, same.members)
    assert not torch.equal(one.members, other.members)
    assert torch.equal(past, before[0])
    assert torch.equal(valid, before[1])


def test_head_that_gives_a_point_only_gives_no_members() -> None:
    past, valid, rest = data()
    assert make().predict(past, valid, 2, members=3, **vars(rest)).members is None


def test_members_are_those_of_their_issue_time_in_any_batch() -> None:
    past, valid, rest = data()
    rest.time = torch.tensor([600, 1200])
    forecaster = make(Bernoulli(), Linear())
    both = forecaster.predict(past, valid, 2, members=3, **vars(rest)).members
    assert both is not None
    for order in ([1, 0], [1]):
        turned = {name: field[order] for name, field in vars(rest).items()}
        members = forecaster.predict(past[order], valid[order], 2, members=3, **turned).members
        assert members is not None
        assert torch.equal(members, both[order])
    same = torch.zeros(2, dtype=torch.int64)
    alike = forecaster.predict(past[:1].repeat(2, 1, 1, 1, 1), valid[:1].repeat(2, 1, 1, 1, 1), 2, members=3,
                               static=rest.static, time=same + rest.time).members  # fmt: skip
    assert alike is not None
    assert not torch.equal(alike[0], alike[1])


def test_training_reaches_the_weights_that_predict() -> None:
    past, _, rest = data()
    forecaster = make()
    assert isinstance(forecaster, Forecaster)
    forecaster(past, 2, rest.static).raw.sum().backward()
    assert all(weight.grad is not None for weight in forecaster.parameters())
