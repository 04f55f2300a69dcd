"""Persistence: the last frame, and where that is missing, the one before."""

import torch
from torch import Tensor

from forecast.baselines.persistence import Persistence
from forecast.forecaster import Forecaster

FLOOR = -10.0


def window() -> tuple[Tensor, Tensor]:
    """Past B T C H W and its validity, with the floor where invalid."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 2, 5, 6)
    valid = torch.rand(shape, generator=generator) > 0.5
    valid[0, :, :, 0, 0] = False
    return torch.where(valid, torch.rand(shape, generator=generator) * 50, FLOOR), valid


def predict(channels: int = 1, members: int = 0, steps: int = 3) -> tuple[Tensor, Tensor | None]:
    past, valid = window()
    static, time = torch.zeros(3, 0, 5, 6), torch.zeros(3, dtype=torch.int64)
    forecast = Persistence(channels).predict(past, valid, steps, static=static, time=time, members=members)
    return forecast.mean, forecast.members


def test_is_a_forecaster() -> None:
    assert isinstance(Persistence(), Forecaster)


def test_equals_a_naive_loop() -> None:
    past, valid = window()
    for channels in (1, 2):
        mean, _ = predict(channels)
        assert mean.shape == (3, 3, channels, 5, 6)
        expected = torch.full_like(mean, FLOOR)
        for b, c, i, j in torch.cartesian_prod(*map(torch.arange, (3, channels, 5, 6))).tolist():
            for t in range(4):
                if valid[b, t, c, i, j]:
                    expected[b, :, c, i, j] = past[b, t, c, i, j]
        assert torch.equal(mean, expected)


def test_a_pixel_that_was_never_valid_keeps_the_floor() -> None:
    assert (predict(2)[0][0, :, :, 0, 0] == FLOOR).all()


def test_members_are_all_the_mean() -> None:
    mean, members = predict(members=4)
    assert members is not None
    assert members.shape == (3, 4, 3, 1, 5, 6)
    assert torch.equal(members, mean[:, None].expand_as(members))
    assert predict()[1] is None
