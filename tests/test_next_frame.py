"""Frame by frame: the roll-out against one written by hand, what is fed where, what is carried, and published counts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.command_line import load
from forecast.config import build_network
from forecast.errors import UserError
from forecast.forecaster import NetworkForecaster
from forecast.heads import Bernoulli
from forecast.networks.next_frame import NextFrame, RollOut
from forecast.networks.predrnn import PredRNN
from forecast.units import Linear

CONF = Path(__file__).parents[1] / "conf"
B, T, S, H, W, Q, PATCH = 3, 4, 3, 5, 7, 2, 2


def convlstm() -> RollOut:
    return NextFrame(partial(LSTM, peephole=True), [4, 3], inputs=1 + Q, outputs=1, patch=PATCH)


def convgru() -> RollOut:
    return NextFrame(GRU, [3], inputs=1 + Q, outputs=1, patch=PATCH)


def predrnn() -> RollOut:
    return PredRNN([3, 3], inputs=1 + Q, outputs=1, kernel=3, decoupling=0.1, patch=PATCH)


Make = Callable[[], RollOut]
networks = pytest.mark.parametrize("make", [convlstm, convgru, predrnn])


def randomised(network: RollOut) -> RollOut:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.4)
    return network.double()


def frames(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """past, future and static."""
    return frames(B, T, 1, H, W), frames(B, S, 1, H, W, seed=3), frames(B, Q, H, W, seed=4)


def mask(seed: int, batch: int = B, future: int = S) -> Tensor:
    return torch.rand(batch, T + future - 2, generator=torch.Generator().manual_seed(seed)) < 0.6


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def one_by_one(
    network: RollOut, past: Tensor, future: Tensor, static: Tensor, teach: Tensor, feed: nn.Module
) -> Tensor:
    """Sample by sample and frame by frame: one choice at a time between the truth and the last answer."""
    answers = []
    for b in range(len(past)):
        truth, answer, states = [*past[b], *future[b]], [], None
        for t in range(T + future.shape[1] - 1):
            frame = truth[t] if t == 0 or teach[b, t - 1] else feed(answer[-1])
            x = F.pad(torch.cat([frame, static[b]]).unsqueeze(0), (0, -W % PATCH, 0, -H % PATCH), mode="replicate")
            x = F.pixel_unshuffle(x, PATCH)
            if isinstance(network, NextFrame):
                outputs, states = network.stack.step(x, states)
                h = outputs[-1]
            else:
                assert isinstance(network, PredRNN)
                zeros = x.new_zeros(1, 3, *x.shape[-2:])
                states = states or [(zeros, zeros, zeros)] * 2
                memory = states[-1][2]
                for depth, cell in enumerate(network.cells):
                    projected = cell.project(x.unsqueeze(1))[:, 0]
                    states[depth] = cell.step(projected, (*states[depth][:2], memory))
                    x, _, memory = states[depth]
                h = x
            answer.append(F.pixel_shuffle(network.output(h), PATCH)[0, :, :H, :W])
        answers.append(torch.stack(answer))
    return torch.stack(answers)


@networks
@pytest.mark.parametrize("seed", range(4))
def test_roll_out_equals_one_by_hand_wherever_it_is_taught(make: Make, seed: int) -> None:
    network, (past, future, static) = randomised(make()), sample()
    teach, feed = mask(seed), nn.Tanh()
    raw = network(past, S, static=static, future=future, teach=teach, feed=feed).raw
    assert raw.shape == (B, T + S - 1, 1, H, W)
    close(raw, one_by_one(network, past, future, static, teach, feed))


@networks
def test_nobody_teaches_after_the_past_unless_told(make: Make) -> None:
    network, (past, future, static) = randomised(make()), sample()
    told = torch.tensor([True] * (T - 1) + [False] * (S - 1)).expand(B, -1)
    free = network(past, S, static=static)
    close(free.raw, network(past, S, static=static, teach=told, future=future).raw)
    close(free.raw, network(past, S, static=static, teach=told, future=torch.full_like(future, torch.nan)).raw)
    close(free.raw, network(past, S, static=static, feed=lambda raw: raw).raw)
    forced = network(past, S, static=static, teach=torch.ones_like(told), future=future)
    close(forced.raw[:, :T], free.raw[:, :T])
    assert not torch.isclose(forced.raw[:, T:], free.raw[:, T:]).all(dim=(2, 3, 4)).any()
    close(forced.raw, network(torch.cat([past, future[:, :-1]], dim=1), 1, static=static).raw)


@networks
def test_future_frame_matters_exactly_where_it_is_taught(make: Make) -> None:
    network, (past, future, static) = randomised(make()), sample()
    teach = mask(5)
    past.requires_grad_()
    future.requires_grad_()
    network(past, S, static=static, future=future, teach=teach).raw.square().sum().backward()
    assert past.grad is not None
    assert future.grad is not None
    fed = torch.cat([torch.ones(B, 1, dtype=torch.bool), teach], dim=1)
    gradient = torch.cat([past.grad, future.grad], dim=1).abs().sum(dim=(2, 3, 4))
    assert (gradient[:, : T + S - 1] > 0).tolist() == fed.tolist()
    assert not gradient[:, -1].any()  # the last frame is forecast and never read
    assert 0 < teach[:, T - 1 :].sum() < teach[:, T - 1 :].numel()


@networks
def test_windows_that_carry_their_state_equal_one_uninterrupted_forward(make: Make) -> None:
    network = randomised(make())
    past, static = frames(B, 2 * T, 1, H, W), frames(B, Q, H, W, seed=4)
    whole = network(past, S, static=static)
    early = network(past[:, :T], S, static=static)
    late = network(past[:, T:], S, static=static, state=early.state)
    close(early.raw[:, :T], whole.raw[:, :T])
    close(late.raw, whole.raw[:, T:])
    for ours, theirs in zip(late.state, whole.state, strict=True):
        for part, their_part in zip(ours, theirs, strict=True):
            close(part, their_part)
    first = torch.tensor([True, False, True])
    anew = network(past[:, T:], S, static=static)
    mixed = network(past[:, T:], S, static=static, state=early.state, first=first)
    close(mixed.raw, torch.where(first.view(B, 1, 1, 1, 1), anew.raw, late.raw))


@networks
def test_state_is_that_after_the_past_whatever_is_taught_later(make: Make) -> None:
    network, (past, future, static) = randomised(make()), sample()
    states = [
        network(past, S, static=static, **more).state
        for more in ({}, {"teach": torch.ones(B, T + S - 2, dtype=torch.bool), "future": future})
    ]
    for ours, theirs in zip(*states, strict=True):
        for part, their_part in zip(ours, theirs, strict=True):
            close(part, their_part)


@networks
def test_one_frame_to_read_and_one_to_forecast_are_enough(make: Make) -> None:
    network, (past, _, static) = randomised(make()), sample()
    assert network(past[:, :1], 1, static=static).raw.shape == (B, 1, 1, H, W)
    assert network(past[:, :1], 4, static=static).raw.shape == (B, 4, 1, H, W)
    assert network(past, 1, static=static).raw.shape == (B, T, 1, H, W)


def test_forecaster_feeds_back_what_the_head_says() -> None:
    network, (past, future, static) = randomised(convlstm()), sample()
    forecaster = NetworkForecaster(network, Bernoulli(), Linear(0.0, 2.0), (1.0,))
    free = torch.tensor([True] * (T - 1) + [False] * (S - 1)).expand(B, -1)
    close(forecaster(2 * past, S, static).raw, one_by_one(network, past, future, static, free, nn.Sigmoid()))
    teach = mask(6)
    taught = forecaster(2 * past, S, static, 2 * future, teach).raw
    close(taught, one_by_one(network, past, future, static, teach, nn.Sigmoid()))


def test_convlstm_of_openstl_has_the_parameters_that_its_code_uses() -> None:
    with torch.device("meta"):
        model = load(CONF, ["experiment=moving_mnist_openstl"]).model
        network, _ = build_network(model, channels=1, static_channels=0, size=(64, 64))
    assert sum(weight.numel() for weight in network.parameters()) == 11_675_648


def test_what_cannot_be_is_refused() -> None:
    network, (past, future, static) = convlstm().double(), sample()
    with pytest.raises(ValueError, match=r"teach is \(3, 4\); for this batch it must be \(3, 5\)"):
        network(past, S, static=static, future=future, teach=mask(0)[:, 1:])
    with pytest.raises(ValueError, match="there is no future to feed"):
        network(past, S, static=static, teach=torch.ones(B, T + S - 2, dtype=torch.bool))
    for hidden, patch, said in (([], 1, r"hidden is \[\]"), ([4, 0], 1, r"hidden is \[4, 0\]"), ([4], 0, "patch is 0")):
        with pytest.raises(UserError, match=said):
            NextFrame(LSTM, hidden, inputs=1, outputs=1, patch=patch)
    moved = load(CONF, ["model=next_frame", "model.lagrangian=true"]).model
    with pytest.raises(UserError, match="model=next_frame reads it as the next frame"):
        build_network(moved, channels=1, static_channels=0, size=(8, 8))
    with pytest.raises(UserError, match="forget_bias is 1"):
        LSTM(2, 3, bias=False)
    assert LSTM(2, 3, bias=False, forget_bias=0.0).recurrent_map.bias is None
