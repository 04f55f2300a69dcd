"""Heads: what a raw number says, and members that agree with it."""

import pytest
import torch
from jaxtyping import TypeCheckError

from forecast.errors import UserError
from forecast.heads import Bernoulli, Head, Point


def test_a_point_is_the_raw_number() -> None:
    raw = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    assert Point().point(raw) is raw


def test_bernoulli_members_are_0_or_1_with_the_point_forecast_as_mean() -> None:
    raw = torch.linspace(-4, 4, 24).view(1, 2, 1, 3, 4)
    members = Bernoulli().members(raw, 20_000, torch.Generator().manual_seed(0))
    assert members.shape == (1, 20_000, 2, 1, 3, 4)
    assert set(members.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(members.mean(dim=1), Bernoulli().point(raw), rtol=0, atol=0.015)
    torch.testing.assert_close(Bernoulli().point(raw), 1 / (1 + (-raw).exp()))


def test_pixels_and_members_are_drawn_independently() -> None:
    members = Bernoulli().members(torch.zeros(1, 1, 1, 1, 2), 20_000, torch.Generator().manual_seed(0)).view(-1, 2)
    together = torch.stack([members[:, 0], members[:, 1]])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.03
    follow = torch.stack([members[1:, 0], members[:-1, 0]])
    assert abs(float(torch.corrcoef(follow)[0, 1])) < 0.03


def test_the_same_generator_draws_the_same_members() -> None:
    raw = torch.zeros(2, 3, 1, 4, 5)
    one, same, other = (Bernoulli().members(raw, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_temperature_flattens_the_odds() -> None:
    raw = torch.full((1, 1, 1, 1, 1), 2.0)
    for temperature in (0.5, 1.0, 4.0):
        members = Bernoulli().members(raw, 20_000, torch.Generator().manual_seed(0), temperature)
        expected = float(torch.sigmoid(torch.tensor(2.0 / temperature)))
        assert float(members.mean()) == pytest.approx(expected, abs=0.015)


def test_what_a_head_cannot_say_it_refuses_or_leaves_open() -> None:
    raw = torch.zeros(1, 1, 1, 2, 2)
    assert Point().members(raw, 2, None) is None
    assert Point().exceedance(raw, torch.tensor([0.5])) is None
    with pytest.raises(UserError, match="Head gives no point forecast"):
        Head().point(raw)
    assert Point.channels == Bernoulli.channels == 1


def test_a_lit_pixel_reaches_the_thresholds_up_to_1() -> None:
    raw = torch.linspace(-4, 4, 12).view(1, 2, 1, 3, 2)
    reached = Bernoulli().exceedance(raw, torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]))
    assert (reached[:, :2] == 1).all()
    assert torch.equal(reached[:, 2], torch.sigmoid(raw))
    assert torch.equal(reached[:, 3], torch.sigmoid(raw))
    assert not reached[:, 4].any()


def test_shapes_are_checked_while_testing() -> None:
    with pytest.raises(TypeCheckError):
        Point().point(torch.zeros(2, 3))
