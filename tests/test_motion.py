"""Motion: the velocity of what is seen, and what arrives where."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from forecast.motion import advected, displacement, velocity

SIZE = 64


def texture(seed: int = 0, *, size: int) -> Tensor:
    """Smooth patches between 0 and 1, as rain is."""
    noise = np.random.default_rng(seed).normal(size=(size, size))
    smooth = ndimage.gaussian_filter(noise, 4)
    return torch.from_numpy(np.clip(smooth / smooth.std() / 4 + 0.3, 0, 1)).float()


def moving(x: float, y: float, frames: int = 4, size: int = SIZE) -> Tensor:
    """1 T H W: a texture that moves by x, y pixels a frame."""
    field = texture(size=size + 2 * SIZE).numpy()
    inside = (slice(SIZE, -SIZE), slice(SIZE, -SIZE))
    shown = [ndimage.shift(field, (y * t, x * t), order=3)[inside] for t in range(frames)]
    return torch.from_numpy(np.stack(shown)).unsqueeze(0)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (1.0, 0.0), (-0.6, 1.7), (5.0, -4.0)])
def test_velocity_is_that_of_a_texture_that_moves_as_a_whole(x: float, y: float) -> None:
    flow = velocity(moving(x, y))[0]
    expected = torch.tensor([x, y]).view(2, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow, expected, rtol=0, atol=0.05 + 0.02 * abs(x + 1j * y))
    torch.testing.assert_close(flow.mean((1, 2)), expected[:, 0, 0], rtol=0, atol=0.01 + 0.01 * abs(x + 1j * y))


def test_velocity_differs_from_place_to_place() -> None:
    up, down = moving(0, -1.5, size=192), moving(0, 1.5, size=192)
    flow = velocity(torch.where(torch.arange(192) < 96, up, down))[0, 1]
    assert (flow[:, :48].mean() + 1.5).abs() < 0.3
    assert (flow[:, -48:].mean() - 1.5).abs() < 0.3


def test_without_structure_the_velocity_is_that_of_the_surroundings_or_nothing() -> None:
    assert not velocity(torch.zeros(1, 3, SIZE, SIZE)).any()
    assert not velocity(torch.full((1, 3, SIZE, SIZE), 0.5)).any()
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    frames = torch.stack([torch.exp(-((x - 12 - 1.5 * t) ** 2 + (y - 20) ** 2) / 60) for t in range(4)])
    assert (velocity(frames.unsqueeze(0))[0, 0, :, -8:] - 1.5).abs().max() < 0.3


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (13, 7)])
def test_frames_of_any_size_have_a_velocity(size: tuple[int, int]) -> None:
    flow = velocity(torch.rand(2, 3, *size))
    assert flow.shape == (2, 2, *size)
    assert flow.isfinite().all()


def test_one_frame_stands_still() -> None:
    assert not velocity(torch.rand(1, 1, SIZE, SIZE)).any()


def test_samples_know_nothing_of_each_other() -> None:
    both = torch.cat([moving(1, 0), moving(0, -2)])
    torch.testing.assert_close(velocity(both)[1:], velocity(both[1:]), rtol=0, atol=1e-5)


def test_displacement_of_an_even_flow_is_time_times_velocity() -> None:
    flow = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    come = displacement(flow, 3)
    torch.testing.assert_close(come, torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1, 1) * flow.unsqueeze(1))


def test_displacement_goes_round_in_a_rotation() -> None:
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    turn = 2 * np.pi / 100  # a frame
    come = displacement(torch.stack([-turn * y, turn * x]).unsqueeze(0), 25)[0, -1]
    from_x, from_y = x - come[0], y - come[1]
    inner = x**2 + y**2 < 12**2
    # A quarter turn: what is at (r, 0) was at (0, -r); steps along the tangent drift outwards by turn / 2 each.
    assert ((from_x - y).abs()[inner] < 12 * (1 + turn**2 / 2) ** 25 - 12 + 0.7).all()
    assert ((from_y + x).abs()[inner] < 12 * (1 + turn**2 / 2) ** 25 - 12 + 0.7).all()


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_advection_is_scipys_linear_interpolation(padding: str) -> None:
    generator = torch.Generator().manual_seed(3)
    field = torch.rand(1, 1, 11, 17, generator=generator, dtype=torch.float64)
    come = 6 * torch.randn(1, 2, 11, 17, generator=generator, dtype=torch.float64)
    rows, columns = np.mgrid[:11, :17]
    places = [rows - come[0, 1].numpy(), columns - come[0, 0].numpy()]
    mode = {"zeros": "grid-constant", "border": "nearest"}[padding]
    expected = ndimage.map_coordinates(field[0, 0].numpy(), places, order=1, mode=mode)
    np.testing.assert_allclose(advected(field, come, padding)[0, 0].numpy(), expected, atol=1e-12)
