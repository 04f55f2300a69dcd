"""The fast unroll gives the numbers and the gradients of the plain one, and refuses what it cannot do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from forecast.cells.cell import Cell, State
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.errors import UserError
from forecast.kernels import native
from forecast.kernels.lstm import LSTMEquations
from forecast.recurrence import BACKENDS, Layer, Stack, through_time, use_backend, watched

X, C = 3, 4
MakeCell = Callable[..., Cell]

KINDS: dict[str, tuple[type[Cell], dict[str, Any]]] = {
    "RNN": (RNN, {}),
    "RNN, ReLU": (RNN, {"activation": "relu"}),
    "LSTM": (LSTM, {}),
    "LSTM without bias": (LSTM, {"bias": False, "forget_bias": 0.0}),
    "LSTM with peepholes": (LSTM, {"peephole": True}),
    "GRU": (GRU, {}),
    "GRU, leaky ReLU": (GRU, {"activation": "leaky_relu"}),
    "GRU, reset before": (GRU, {"reset": "before"}),
    "GRU without reset gate": (GRU, {"reset": "none", "activation": "relu"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
SPACE = (7, 6, 5)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def cell_of(kind: str, inputs: int = X, hidden: int = C, dims: int = 2, **options: Any) -> Cell:
    make, own = KINDS[kind]
    made = make(inputs, hidden, spatial_dims=dims, **own, **options).double()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.4)
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def some_state(cell: Cell, batch: int, space: tuple[int, ...]) -> State:
    return tuple(normal(batch, cell.hidden_channels, *space) for _ in range(cell.states))


def everything(cell: Cell, x: Tensor | None, state: State, steps: int, **options: Any) -> dict[str, Tensor]:
    """What comes out, and all gradients of a random functional of it."""
    x = None if x is None else x.detach().requires_grad_()
    state = tuple(part.detach().requires_grad_() for part in state)
    cell.zero_grad()
    outputs, last = through_time(cell, x, state, steps, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in (outputs, *last)]
    sum((weight * part).sum() for weight, part in zip(weights, (outputs, *last), strict=True)).backward()  # type: ignore[union-attr]  # a sum of tensors is one
    found = {"outputs": outputs.detach()} | {f"last {i}": part.detach() for i, part in enumerate(last)}
    given = {f"state {i}": part for i, part in enumerate(state)} | ({} if x is None else {"x": x})
    for name, one in {**given, **dict(cell.named_parameters())}.items():
        assert one.grad is not None, name
        found[f"gradient of {name}"] = one.grad.clone()
    return found


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(
            ours[name], one, rtol=0, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@kinds
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("inputs", [X, 16, 0], ids=["one map of x and h", "two maps", "no input"])
@pytest.mark.parametrize("recompute", [None, 1, 2])
def test_numbers_and_all_gradients_are_those_of_the_plain_unroll(
    kind: str, dims: int, inputs: int, recompute: int | None
) -> None:
    cell, space = cell_of(kind, inputs, dims=dims), SPACE[:dims]
    assert cell.fast() is not None
    x = normal(2, 5, inputs, *space) if inputs else None
    state = some_state(cell, 2, space)
    fused = everything(cell, x, state, 5, backend="fused", recompute=recompute)
    equal(fused, everything(cell, x, state, 5, backend="reference"))


@kinds
@pytest.mark.parametrize("inputs", [X, 16], ids=["one map of x and h", "two maps"])
@pytest.mark.parametrize("recompute", [None, 1, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_first_step_from_rest_leaves_out_what_is_zero(
    kind: str, inputs: int, recompute: int | None, steps: int
) -> None:
    cell, x = cell_of(kind, inputs), normal(2, steps, inputs, 7, 6)
    found, multiplied = {}, {}
    for backend in ("fused", "reference"):
        layer = Layer(copy.deepcopy(cell), backend=backend, recompute=recompute)
        read = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            outputs, last = layer.sequence(read, None, steps)
            (outputs.square().sum() + sum(part.sin().sum() for part in last)).backward()
        multiplied[backend] = counter.get_total_flops()
        gradients = {name: weight.grad for name, weight in layer.named_parameters()} | {"x": read.grad}
        # Of a map of zeros the gradient is 0, or none.
        gradients = {name: torch.zeros(()) if one is None else one for name, one in gradients.items()}
        found[backend] = {"outputs": outputs.detach(), **gradients}
    equal(found["fused"], found["reference"])
    if recompute is None:
        assert multiplied["fused"] < multiplied["reference"]


@pytest.mark.parametrize("kind", ["RNN", "RNN, ReLU", "LSTM", "LSTM without bias", "GRU"])
@pytest.mark.parametrize("inputs", [X, 16])
def test_torchs_own_functions_for_vectors_give_the_same(
    kind: str, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are cuDNN's; on a CPU they are the quickest for some sizes only."""
    cell = cell_of(kind, inputs, dims=0)
    x, state = normal(2, 5, inputs), some_state(cell, 2, ())
    expected = everything(cell, x, state, 5, backend="reference")
    calls = []
    for quicker in (True, False):
        monkeypatch.setattr(native, "quicker", lambda *_, quicker=quicker: calls.append(quicker) or quicker)
        equal(everything(cell, x, state, 5), expected)
    assert calls == [True, False]


@pytest.mark.parametrize(
    "kind", ["LSTM with peepholes", "GRU, leaky ReLU", "GRU, reset before", "GRU without reset gate"]
)
def test_other_equations_are_left_to_the_kernels(kind: str) -> None:
    found = cell_of(kind, dims=0).fast()
    assert found is not None
    assert found[0].native is None


@kinds
@pytest.mark.parametrize(
    ("batch", "steps", "hidden", "size", "kernels"),
    [(1, 1, 1, (1, 1), (1, 3)), (3, 4, 5, (3, 2), (5, 3)), (2, 3, 2, (8, 1), (3, 5))],
)
def test_odd_sizes(
    kind: str, batch: int, steps: int, hidden: int, size: tuple[int, int], kernels: tuple[int, int]
) -> None:
    cell = cell_of(kind, 1, hidden, input_kernel=kernels[0], recurrent_kernel=kernels[1])
    x, state = normal(batch, steps, 1, *size), some_state(cell, batch, size)
    for recompute in (None, 1):
        fused = everything(cell, x, state, steps, backend="fused", recompute=recompute)
        equal(fused, everything(cell, x, state, steps, backend="reference"))


@kinds
def test_memory_that_nobody_wrote_is_never_read(kind: str) -> None:
    found = []
    for poisoned in (False, True):
        torch.manual_seed(1)
        cell = cell_of(kind)
        x, state = normal(2, 4, X, 5, 4), some_state(cell, 2, (5, 4))
        with Poison(poisoned):
            for recompute in (None, 1):
                found.append(everything(cell, x, state, 4, recompute=recompute))
            with torch.no_grad():
                found.append({"outputs": through_time(cell, x, state, 4)[0]})
    for clean, dirty in zip(found[:3], found[3:], strict=True):
        for name, one in clean.items():
            assert torch.equal(dirty[name], one), name


class Poison:
    """torch fills new memory with NaN."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(self.on)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@kinds
def test_views_are_taken_as_they_lie(kind: str) -> None:
    cell = cell_of(kind)
    x = normal(4, 2, 6, 5, X).permute(1, 0, 4, 2, 3)
    state = tuple(normal(2, 6, 5, C).permute(0, 3, 1, 2) for _ in range(cell.states))
    assert not x.is_contiguous()
    equal(everything(cell, x, state, 4), everything(cell, x.contiguous(), state, 4, backend="reference"))


@kinds
def test_without_gradients_the_numbers_are_the_same(kind: str) -> None:
    for inputs in (X, 16, 0):
        cell = cell_of(kind, inputs)
        x, state = normal(2, 5, inputs, 6, 5) if inputs else None, some_state(cell, 2, (6, 5))
        expected, ending = through_time(cell, x, state, 5)
        with torch.no_grad():
            outputs, last = through_time(cell, x, state, 5)
        assert torch.equal(outputs, expected)
        assert all(torch.equal(one, other) for one, other in zip(last, ending, strict=True))


@kinds
def test_gradients_can_be_asked_for_twice(kind: str) -> None:
    cell = cell_of(kind)
    outputs, _ = through_time(cell, normal(2, 4, X, 5, 4), some_state(cell, 2, (5, 4)), 4)
    loss = outputs.square().sum()
    first = torch.autograd.grad(loss, list(cell.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(cell.parameters()))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@kinds
def test_what_is_frozen_or_unused_gets_no_gradient(kind: str) -> None:
    cell, plain = cell_of(kind), None
    plain = copy.deepcopy(cell)
    x, state = normal(2, 3, X, 5, 4), some_state(cell, 2, (5, 4))
    found = []
    for one, backend in ((cell, "fused"), (plain, "reference")):
        assert one.input_map is not None
        one.input_map.requires_grad_(False)
        outputs, _ = through_time(one, x, state, 3, backend=backend)
        outputs[:, 1].sum().backward()
        found.append({name: weight.grad for name, weight in one.named_parameters()})
    for name, theirs in found[1].items():
        ours = found[0][name]
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@kinds
def test_there_are_no_gradients_of_gradients(kind: str) -> None:
    cell = cell_of(kind)
    outputs, _ = through_time(cell, normal(2, 3, X, 5, 4), some_state(cell, 2, (5, 4)), 3)
    with pytest.raises(UserError, match=r"gradients of gradients.*backend=reference"):
        torch.autograd.grad(outputs.square().sum(), list(cell.parameters()), create_graph=True)


@kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lower_precisions_are_as_near_to_float64_as_the_plain_unroll(kind: str, precision: str) -> None:
    """Of float32, and of bf16-mixed with weights in float32."""
    cell = cell_of(kind)
    x, state = normal(2, 6, X, 7, 5), some_state(cell, 2, (7, 5))
    exact = everything(cell, x, state, 6, backend="reference")
    cell.float()
    errors = {}
    for backend in ("reference", "fused"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found = everything(cell, x.float(), tuple(part.float() for part in state), 6, backend=backend)
        errors[backend] = {
            name: (one.double() - exact[name]).norm() / exact[name].norm() for name, one in found.items()
        }
    assert max(errors["fused"].values()) < (5e-6 if precision == "float32" else 0.4)
    if precision == "bfloat16" and "relu" not in KINDS[kind][1].get("activation", ""):  # where gradients jump
        # Of single tensors it is chance: what is rounded comes back through six steps.
        ratio = torch.stack([error / errors["reference"][name] for name, error in errors["fused"].items()])
        assert ratio.log().mean().exp() < 1.5


def test_the_cell_state_stays_in_float32_under_autocast() -> None:
    cell = cell_of("LSTM").float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, (h, c) = Layer(cell).sequence(normal(1, 3, X, 4, 4).float(), None, 3)
    assert (outputs.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@kinds
def test_less_is_kept_than_by_the_plain_unroll(kind: str) -> None:
    cell = cell_of(kind, C)
    x, state = normal(2, 20, C, 8, 8), some_state(cell, 2, (8, 8))
    kept = {}
    for name, options in {
        "plain": {"backend": "reference"},
        "fused": {},
        "recomputed": {"recompute": 1},
    }.items():
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs, _ = through_time(cell, x, state, 20, **options)  # type: ignore[arg-type]  # each of its own type
        kept[name] = sum(storages.values())
        del outputs
    weights = sum(weight.numel() for weight in cell.parameters())
    frame = x[:, 0].numel()
    # The plain recurrence keeps nothing but x and its states either.
    assert kept["fused"] < (kept["plain"] if not isinstance(cell, RNN) else kept["plain"] + 8 * (weights + 2 * frame))
    assert kept["recomputed"] <= kept["fused"]
    # x and the states of each step, with room for one more.
    assert kept["recomputed"] <= 8 * ((1 + cell.states) * 21 * frame + weights)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peephole", [False, True])
def test_the_cell_state_is_made_once_more_to_the_last_bit(precision: torch.dtype, peephole: bool) -> None:
    gates, recurrent, h = (normal(2, channels, 5, 4).to(precision) for channels in (4 * C, 4 * C, C))
    c, own = normal(2, C, 5, 4).float(), (torch.ones(3, C),) if peephole else ()
    after = torch.empty_like(h), torch.empty_like(c)
    LSTMEquations().forward(gates, recurrent, gates, h[:, :0], (h, c), after, own)
    (again,) = LSTMEquations().carry(gates, (c,))
    assert torch.equal(again, after[1])


def test_a_learned_initial_state_and_both_directions() -> None:
    cells = [cell_of("LSTM with peepholes", learned_initial_state=True) for _ in range(2)]
    x, found = normal(2, 4, X, 6, 5), []
    for backend in ("fused", "reference"):
        layer = Layer(*copy.deepcopy(cells), backend=backend)
        outputs, _ = layer.sequence(x, None, 4)
        outputs.square().sum().backward()
        found.append([outputs, *(weight.grad for weight in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@kinds
@pytest.mark.parametrize("dims", [0, 2])
def test_costs_are_counted_without_memory(kind: str, dims: int) -> None:
    """As `run=describe` counts multiply-adds: by either way they are the same."""
    space = SPACE[:dims]
    for inputs in (X, 16):
        cell = cell_of(kind, inputs, dims=dims).to("meta")
        x = torch.empty(1, 4, inputs, *space, device="meta", dtype=torch.float64)
        counted = []
        for backend in ("auto", "reference"):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                outputs, _ = through_time(cell, x, cell.initial_state(1, space, x), 4, backend=backend)
            assert outputs.shape == (1, 4, C, *space)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("options", [{"zoneout": 0.1}, {"dropout": 0.1}, {"norm": 1}])
def test_what_has_no_kernel_is_stepped_and_refused_where_one_is_asked_for(options: dict[str, Any]) -> None:
    cell = GRU(X, C, spatial_dims=2, **options).double()
    assert cell.fast() is None
    network = Stack([Layer(cell)])
    outputs, _ = network.sequence(normal(2, 3, X, 5, 4))
    assert outputs[0].shape == (2, 3, C, 5, 4)
    use_backend(network, "auto")
    with pytest.raises(UserError, match=r"this GRU has no kernel.*backend=auto"):
        use_backend(network, "fused")


def test_a_backend_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="backend is 'quick'; choose one of auto, reference, fused"):
        use_backend(Stack([]), "quick")


def test_other_equations_are_not_taken_for_those_of_the_kernel() -> None:
    class Slow(LSTM):
        def equations(self, projected: Tensor | None, state: State, seen: Tensor) -> Any:
            after, gates = super().equations(projected, state, seen)
            return tuple(0.5 * (old + new) for old, new in zip(state, after, strict=True)), gates

    assert LSTM(X, C).fast() is not None
    assert Slow(X, C).fast() is None


def test_whoever_watches_sees_every_step() -> None:
    stack = Stack([Layer(cell_of("LSTM")), Layer(cell_of("GRU", C))])
    seen: list[str] = []
    with watched(stack, lambda layer, state, gates: seen.append(layer)):
        stack.sequence(normal(2, 3, X, 5, 4))
    assert seen == ["0"] * 3 + ["1"] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_changes_nothing_that_is_saved(backend: str) -> None:
    stack = Stack([Layer(cell_of("LSTM"))])
    before = stack.state_dict()
    use_backend(stack, backend)
    assert stack.layers[0].backend == backend
    assert stack.state_dict().keys() == before.keys()
