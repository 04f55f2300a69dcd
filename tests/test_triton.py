"""The kernels in Triton give the numbers and gradients of the plain unroll: on a GPU if there is one, else interpreted."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kernels import KINDS, C, X, cell_of, equal, everything, normal, some_state
from torch import Tensor

from forecast.cells.cell import Cell, State
from forecast.kernels import frames, single_pass, unroll
from forecast.kernels.lstm import LSTMEquations
from forecast.recurrence import through_time

triton = pytest.importorskip("triton", reason="Triton is not installed; torch brings it where it is built for CUDA")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MODULE = "forecast.kernels.triton_gates"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}

kinds = pytest.mark.parametrize("kind", [kind for kind, (_, own) in KINDS.items() if own.get("reset") != "before"])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that ran, by name. A CPU interprets them, in blocks that are small enough to need several."""
    names: list[str] = []
    launch = single_pass.launch

    def noted(kernel: str, *arguments: Any, **options: Any) -> None:
        names.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(single_pass, "launch", noted)
    if not ON_GPU:
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        monkeypatch.setattr(single_pass, "available", lambda device: True)
        monkeypatch.setattr(single_pass, "BLOCK", 64)
    sys.modules.pop(MODULE, None)
    yield names
    sys.modules.pop(MODULE, None)


def lie(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all frames and weights of two dimensions lie in one way."""
    how = LAYOUTS[layout]
    for module in (frames, unroll):
        monkeypatch.setattr(module, "layout", lambda like: how if like.dim() == 4 else torch.contiguous_format)


def given(kind: str, inputs: int, space: tuple[int, ...], hidden: int = C) -> tuple[Cell, Tensor | None, State]:
    torch.manual_seed(0)
    cell = cell_of(kind, inputs, hidden, dims=len(space)).to(DEVICE)
    x = normal(2, 3, inputs, *space).to(DEVICE) if inputs else None
    return cell, x, tuple(part.to(DEVICE) for part in some_state(cell, 2, space))


@kinds
@pytest.mark.parametrize(
    ("inputs", "recompute", "layout"),
    [(1, None, "channels-last"), (1, 1, "contiguous"), (16, 1, "channels-last"), (16, None, "contiguous")],
)
def test_numbers_and_all_gradients_are_those_of_the_plain_unroll(
    kind: str, inputs: int, recompute: int | None, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie(layout, monkeypatch)
    cell, x, state = given(kind, inputs, (5, 3))
    fused = everything(cell, x, state, 3, recompute=recompute)
    equal(fused, everything(cell, x, state, 3, backend="reference"))


@kinds
@pytest.mark.parametrize(
    ("layout", "space"),
    [
        *(("contiguous", space) for space in [(), (7,), (3, 2, 4)]),
        *(("channels-last", space) for space in [(1, 1), (1, 6), (6, 1)]),
    ],
)
@pytest.mark.parametrize("hidden", [1, C])
def test_every_space_without_input(
    kind: str, layout: str, space: tuple[int, ...], hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie(layout, monkeypatch)
    cell, x, state = given(kind, 0, space, hidden=hidden)
    equal(everything(cell, x, state, 2), everything(cell, x, state, 2, backend="reference"))


@kinds
@layouts
@pytest.mark.parametrize("inputs", [X, 16], ids=["one map of x and h", "two maps"])
def test_from_rest(kind: str, layout: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(layout, monkeypatch)
    cell, x, state = given(kind, inputs, (4, 5))
    found = []
    for backend, rest in (("fused", True), ("reference", False)):
        cell.zero_grad()
        outputs, _ = through_time(cell, x, tuple(map(torch.zeros_like, state)), 3, rest=rest, backend=backend)
        outputs.square().sum().backward()
        found.append({"outputs": outputs.detach()} | {name: one.grad for name, one in cell.named_parameters()})
    equal(*found)


@kinds
@layouts
def test_one_channel_of_each(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(layout, monkeypatch)
    cell, x, state = given(kind, 1, (4, 5), hidden=1)
    equal(everything(cell, x, state, 3), everything(cell, x, state, 3, backend="reference"))


@kinds
@pytest.mark.parametrize(("precision", "layout"), [("float32", "contiguous"), ("bfloat16", "channels-last")])
def test_lower_precisions_are_as_near_to_float64_as_without_triton(
    kind: str, precision: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32, and of bf16-mixed with weights in float32."""
    lie(layout, monkeypatch)
    cell, x, state = given(kind, X, (5, 4))
    assert x is not None
    exact = everything(cell, x, state, 3, backend="reference")
    cell.float()
    errors = []
    for triton_runs in (True, False):
        if not triton_runs:
            monkeypatch.setattr(single_pass, "available", lambda device: False)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            found = everything(cell, x.float(), tuple(part.float() for part in state), 3)
        errors.append({name: float((one - exact[name]).norm() / exact[name].norm()) for name, one in found.items()})
    for name, error in errors[0].items():
        # Triton's interpreter cuts bits off where GPUs round: up to twice the error.
        assert error < (5e-6 if precision == "float32" else 3 * errors[1][name]), name


@kinds
def test_a_step_is_one_kernel_each_way(kind: str, launched: list[str]) -> None:
    cell, x, state = given(kind, X, (5, 3))
    everything(cell, x, state, 3)
    name = launched[0].removesuffix("_forward")
    carried = ["lstm_carry"] * 3 if len(state) > 1 else []
    assert launched == [f"{name}_forward"] * 3 + carried + [f"{name}_backward"] * 3
    launched.clear()
    everything(cell, x, state, 3, backend="reference")
    assert not launched


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peephole", [False, True])
def test_the_cell_state_is_made_once_more_to_the_last_bit(precision: torch.dtype, peephole: bool) -> None:
    def frames_of(channels: int, dtype: torch.dtype) -> Tensor:
        return normal(2, channels, 3, 5).to(DEVICE, dtype)

    equations, c = LSTMEquations(), frames_of(C, torch.float32)
    gates, h_after, c_after = frames_of(4 * C, precision), frames_of(C, precision), torch.empty_like(c)
    own = (torch.ones(3, C, device=DEVICE),) if peephole else ()
    share, kept = frames_of(4 * C, precision), frames_of(0, precision)
    equations.forward(gates, share, gates, kept, (h_after.clone(), c), (h_after, c_after), own)
    (again,) = equations.carry(gates, (c,))
    assert torch.equal(again, c_after)


@pytest.mark.parametrize("far", [0.0, 1e-9, 0.049, 0.051, 20.0, 800.0])
def test_tanh_keeps_its_digits_near_0_and_far_from_it(far: float) -> None:
    """A plain recurrence of one number, whose map adds nothing to it."""
    cell = cell_of("RNN", 1, 1, dims=0).to(DEVICE)
    with torch.no_grad():
        for weight in cell.parameters():
            weight.zero_()
        cell.get_parameter("input_map.weight").fill_(1)
    x = torch.tensor([far, -far], dtype=torch.float64, device=DEVICE).view(2, 1, 1)
    equal_to = x.tanh()
    outputs, _ = unroll.unroll(*cell.fast(), x, cell.initial_state(2, (), x[:, 0]), 1)
    torch.testing.assert_close(outputs, equal_to, rtol=1e-11, atol=0)


def test_what_lies_otherwise_is_copied_to_be_read_and_refused_to_be_written() -> None:
    gates = torch.zeros(2, 4 * C, 3, 5, device=DEVICE)
    state = torch.randn(2, C, 3, 5, device=DEVICE)
    turned = state.contiguous(memory_format=torch.channels_last)
    found = []
    for one in (state, turned):
        h, c = torch.empty_like(state), torch.empty_like(state)
        recurrent = torch.ones(2, 4 * C, 3, 5, device=DEVICE)
        single_pass.launch("lstm_forward", gates, (None, recurrent, one), (gates.clone(), h, c), (None,))
        found.append((h, c))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="view"):
        single_pass.launch("lstm_forward", gates, (None, recurrent, state), (gates, turned, c), (None,))


def test_they_run_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not single_pass.available(torch.device("cpu"))
    assert not ON_GPU or single_pass.available(torch.device("cuda", 0))
