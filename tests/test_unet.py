"""The U-Net: frames of any size, what it reads and what it refuses."""

import pytest
import torch
from torch import Tensor

from forecast.errors import UserError
from forecast.networks.unet import UNet


def answer(network: UNet, past: Tensor, steps: int) -> Tensor:
    B, _, _, H, W = past.shape
    with torch.no_grad():
        return network(past, steps, static=past.new_zeros(B, 0, H, W)).raw


def test_parameters_are_those_of_its_convolutions() -> None:
    network = UNet(4, 6, (8, 16, 32), 2, inputs=1, outputs=1)
    maps = [(16, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (48, 16), (16, 16), (24, 8), (8, 8)]
    expected = sum(9 * below * width + width for below, width in maps) + 8 * 24 + 24
    assert sum(weight.numel() for weight in network.parameters()) == expected


@pytest.mark.parametrize("size", [(16, 16), (13, 21)])
def test_a_forecast_has_the_size_of_its_frames(size: tuple[int, int]) -> None:
    network = UNet(3, 5, (4, 8), 2, inputs=1, outputs=1)
    assert answer(network, torch.rand(2, 3, 1, *size), 5).shape == (2, 5, 1, *size)


def test_of_a_longer_past_the_last_frames_are_read_and_fewer_steps_are_the_first_ones() -> None:
    network, past = UNet(3, 5, (4, 8), inputs=1, outputs=1), torch.rand(1, 6, 1, 8, 8)
    assert torch.equal(answer(network, past, 2), answer(network, past[:, -3:], 5)[:, :2])


def test_moving_the_frames_by_its_coarsest_pixel_moves_the_forecast() -> None:
    network, past = UNet(2, 2, (4, 8), 2, inputs=1, outputs=1), torch.rand(1, 2, 1, 96, 96)
    here, there = answer(network, past, 2), answer(network, past.roll((4, 8), (-2, -1)), 2)
    inside = (..., slice(32, 64), slice(32, 64))  # the border, which stays where it is, reaches some pixels in
    torch.testing.assert_close(there[inside], here.roll((4, 8), (-2, -1))[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("frames", "steps"), [(2, 5), (3, 6)])
def test_other_lengths_than_it_was_made_for_are_refused(frames: int, steps: int) -> None:
    with pytest.raises(UserError, match="reads 3 past frames and forecasts 5 at most"):
        answer(UNet(3, 5, (4, 8), inputs=1, outputs=1), torch.rand(1, frames, 1, 8, 8), steps)


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(UserError, match="widths of 1 or more"):
        UNet(3, 5, (), inputs=1, outputs=1)
