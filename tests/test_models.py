"""Every network in conf/model learns with all of its parameters, keeps its samples apart and comes back from a file."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forecast.command_line import load
from forecast.config import build_network
from forecast.heads import Head

CONF = Path(__file__).parents[1] / "conf"


def has_network(name: str) -> bool:
    return load(CONF, [f"model={name}"]).model.network is not None


def has_cell(name: str) -> bool:
    return "learned_initial_state" in load(CONF, [f"model={name}"]).model.network.get("cell", {})


NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if has_network(path.stem))
LEARNED = "model.network.cell.learned_initial_state=true"
SLOW = ("hko7_convgru", "hko7_convlstm")
TASKS = {
    "gap_filler": ("data.past=1", "data.after=1"),
    "many_to_one": ("data.future=1",),
    "one_image": ("data.past=1",),
}
GIVEN = {"one_image": 1}
STEPS = {"many_to_one": 1}
"""What is asked for: of others to forecast two frames from two."""
models = pytest.mark.parametrize("name", NAMES)


def build(name: str, size: tuple[int, int], *overrides: str, seed: int = 0) -> tuple[nn.Module, Head]:
    torch.manual_seed(seed)
    model = load(CONF, [f"model={name}", "data.past=2", "data.future=2", *TASKS.get(name, ()), *overrides]).model
    return build_network(model, channels=1, static_channels=1, size=size)


def sample(name: str, B: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """past, static and a future that is smooth, so that coarse states can tell it."""
    S = STEPS.get(name, 2)
    generator = torch.Generator().manual_seed(7)
    past, static = (
        torch.rand(B, GIVEN.get(name, 2), 1, *size, generator=generator),
        torch.rand(B, 1, *size, generator=generator),
    )
    coarse = torch.rand(B * S, 1, 3, 3, generator=generator)
    return past, static, nn.functional.interpolate(coarse, size=size, mode="bilinear").view(B, S, 1, *size)


def cost(network: nn.Module, head: Head, past: Tensor, static: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
    """The error of the forecast, and with it what the network adds."""
    output = network(past, future.shape[1], static=static)
    wrong = (head.point(output.raw[:, -future.shape[1] :]) - future).square().mean()
    return wrong, wrong if output.aux is None else wrong + output.aux


@pytest.mark.parametrize(
    ("name", "overrides"),
    [*((name, ()) for name in NAMES), *((name, (LEARNED,)) for name in NAMES if has_cell(name))],
    ids=lambda one: "learned" if one == (LEARNED,) else one or "zeros",
)
def test_every_parameter_learns(name: str, overrides: tuple[str, ...]) -> None:
    size = (60, 60) if name.startswith(("hko7", "unet")) else (12, 8)
    network, head = build(name, size, *overrides)
    cost(network, head, *sample(name, 2, size))[1].backward()
    without = [key for key, weight in network.named_parameters() if weight.grad is None]
    assert not without
    dead = {key: float((weight.grad == 0).float().mean()) for key, weight in network.named_parameters()}
    assert {key: share for key, share in dead.items() if share > 0.001} == {}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in (*SLOW, "predrnn", "gap_filler") else ()) for name in NAMES],
)
def test_one_batch_can_be_learned_by_heart(name: str) -> None:
    size = (30, 30) if name.startswith("hko7") else (12, 8)
    network, head = build(name, size)
    past, static, future = sample(name, 2, size)
    if name.endswith("lagrangian"):  # nothing moves: what motion carries in from outside cannot be learned
        past = past[:, :1].expand_as(past)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4 if name in SLOW else 3e-3)
    for _ in range(600):
        loss, _ = cost(network, head, past, static, future)
        if loss < 0.01 * future.var():
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 600 steps the error is {float(loss) / float(future.var()):.2g} of the variance")


@models
def test_weights_come_back_from_a_file(name: str) -> None:
    size = (13, 7)
    network, _ = build(name, size)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other, _ = build(name, size, seed=1)
    past, static, future = sample(name, 2, size)
    steps = future.shape[1]
    with torch.no_grad():
        assert not torch.equal(other(past, steps, static=static).raw, network(past, steps, static=static).raw)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(past, steps, static=static).raw, network(past, steps, static=static).raw)


@models
def test_samples_of_a_batch_know_nothing_of_each_other(name: str) -> None:
    size = (13, 7)
    network, _ = build(name, size)
    past, static, future = sample(name, 3, size)
    steps = future.shape[1]
    past.requires_grad_()
    raw = network(past, steps, static=static).raw
    for i in range(3):
        alone = network(past[i : i + 1], steps, static=static[i : i + 1]).raw
        torch.testing.assert_close(raw[i : i + 1], alone, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(raw[1].sum(), past)
    assert gradient[1].abs().sum() > 0
    assert not gradient[[0, 2]].any()


@models
def test_every_network_says_what_it_can_take(name: str) -> None:
    network, head = build(name, (13, 7))
    given: Any = network.frame_size
    assert given is None or given == (13, 7)
    assert isinstance(network.streams, bool)
    past, static, future = sample(name, 2, (13, 7))
    steps = future.shape[1]
    output = network(past, steps, static=static)
    assert output.raw.shape[0] == 2
    assert output.raw.shape[1] >= steps
    assert output.raw.shape[2:] == (head.channels, 13, 7)
    assert (output.state is not None) == network.streams
