"""Learning-rate schedules."""

import pytest
import torch

from forecast.errors import UserError
from forecast.schedules import warmup_cosine


def rates(total: int, warmup: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warmup_cosine(optimizer, total, warmup)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("total", [1, 2, 10, 137])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_rises_then_falls_to_nothing_and_never_leaves_its_bounds(total: int, warmup: float) -> None:
    seen = rates(total, warmup)
    top = seen.index(max(seen))
    assert all(0 <= rate <= 2 for rate in seen)
    assert seen[: top + 1] == sorted(seen[: top + 1])
    assert seen[top:] == sorted(seen[top:], reverse=True)
    assert seen[0] > 0
    if warmup <= 0.5 and total > 1:
        assert seen[-1] == pytest.approx(0, abs=1e-12)


def test_without_warmup_it_starts_at_the_full_rate() -> None:
    assert rates(10, 0.0)[0] == 2.0


def test_warmup_of_the_whole_training_is_refused() -> None:
    with pytest.raises(UserError, match=r"scheduler\.warmup is 1"):
        rates(10, 1.0)
