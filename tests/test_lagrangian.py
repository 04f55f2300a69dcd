"""Lagrangian coordinates: motion is taken out before the network and put back after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forecast.errors import UserError
from forecast.heads import Bernoulli, Point
from forecast.motion import advected, displacement, velocity
from forecast.networks.lagrangian import Lagrangian
from forecast.networks.network import Output


class Change(nn.Module):
    """Forecasts the same change everywhere, and keeps what it was shown."""

    frame_size = None
    streams = True

    def __init__(self, change: float = 0.0) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.tensor(change))
        self.shown = torch.empty(0)

    def forward(self, past: Tensor, steps: int, *, static: Tensor, **_: Any) -> Output:
        self.shown = past
        B, _, _, H, W = past.shape
        return Output(self.change.expand(B, steps, 1, H, W))


def lagrangian(network: nn.Module) -> Lagrangian:
    return Lagrangian(network, Point())


def blob(x: float, y: float, size: int = 64) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return 0.8 * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 60)


def moving(frames: int, x: float = 2.0, y: float = -1.0) -> Tensor:
    """1 T 1 H W: a blob on its way through the middle."""
    return torch.stack([blob(24 + x * t, 40 + y * t) for t in range(frames)]).view(1, frames, 1, 64, 64)


NOTHING = torch.zeros(1, 0, 64, 64)


def test_a_network_that_changes_nothing_extrapolates() -> None:
    past = moving(4)
    raw = lagrangian(Change())(past, 3, static=NOTHING).raw
    come = displacement(velocity(past[:, :, 0]), 3)
    for step in range(3):
        torch.testing.assert_close(raw[:, step], advected(past[:, -1], come[:, step], padding="border"))
    truth = moving(7)[:, 4:]
    persistence = (past[:, -1:] - truth).square().mean()
    assert (raw - truth).square().mean() < 0.05 * persistence


def test_the_network_sees_all_frames_where_the_last_one_is() -> None:
    inner = Change()
    past = moving(4)
    lagrangian(inner)(past, 1, static=NOTHING)
    assert torch.equal(inner.shown[:, -1], past[:, -1])
    for frame in range(3):
        before = (past[:, frame] - past[:, -1]).square().mean()
        assert (inner.shown[:, frame] - past[:, -1]).square().mean() < 0.1 * before


def test_a_change_is_carried_to_its_own_time() -> None:
    past = moving(3)
    with_change, without = (lagrangian(Change(change))(past, 2, static=NOTHING).raw for change in (0.1, 0.0))
    inside = (..., slice(16, 48), slice(16, 48))
    torch.testing.assert_close((with_change - without)[inside], torch.full((1, 2, 1, 32, 32), 0.1))


def test_rain_at_the_edge_goes_on_beyond_it() -> None:
    past = torch.stack([blob(2 + 2 * t, 32) for t in range(3)]).view(1, 3, 1, 64, 64)
    past[..., :32, :] = past[..., 31:32, :]  # a band that comes in over the left edge
    raw = lagrangian(Change())(past, 2, static=NOTHING).raw
    assert (raw[..., 8:24, 0] > 0.5 * past[:, -1:, :, 8:24, 0]).all()


def test_static_fields_reach_the_network_and_gradients_do_too() -> None:
    inner = Change()
    network = lagrangian(inner)
    network(moving(3), 2, static=torch.rand(1, 2, 64, 64)).raw.sum().backward()
    assert inner.change.grad is not None


def test_state_and_teaching_are_refused() -> None:
    network = lagrangian(Change())
    assert not network.streams
    with pytest.raises(UserError, match="carries no state"):
        network(moving(3), 2, static=NOTHING, teach=torch.ones(1, 3, dtype=torch.bool))


def test_a_head_whose_raw_numbers_are_no_frames_is_refused() -> None:
    with pytest.raises(UserError, match="raw numbers of Bernoulli are no frames"):
        Lagrangian(Change(), Bernoulli())
