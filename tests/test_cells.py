"""One time step: ours equals torch's, the convolutional cell equals the dense one, and both equal their equations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import Cell
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.cells.stlstm import STLSTM
from forecast.errors import UserError
from forecast.recurrence import Layer, Stack, unroll

FORMS: dict[str, tuple[type[Cell], dict[str, Any]]] = {
    "lstm": (LSTM, {}),
    "lstm-peephole": (LSTM, {"peephole": True}),
    "gru-after": (GRU, {"reset": "after"}),
    "gru-before": (GRU, {"reset": "before", "activation": "relu"}),
    "gru-none": (GRU, {"reset": "none", "activation": "leaky_relu"}),
    "rnn-tanh": (RNN, {}),
    "rnn-relu": (RNN, {"activation": "relu"}),
}
TORCH: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru-after": nn.GRU,
    "rnn-tanh": nn.RNN,
    "rnn-relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
forms = pytest.mark.parametrize("form", FORMS)


def make(form: str, inputs: int, hidden: int, **options: Any) -> Cell:
    """A cell in float64 with every weight random, also those that start as zero."""
    made, fixed = FORMS[form]
    cell = made(inputs, hidden, **fixed, **options).double()
    with torch.no_grad():
        for weight in cell.parameters():
            weight.normal_(std=0.4)
    return cell


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def run(cell: Cell, x: Tensor | None, steps: int, start: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return unroll(cell, cell.project(x), start, steps)


def close(ours: Tensor | None, theirs: Tensor | None, atol: float = 1e-10) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both-ways"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("form", TORCH)
def test_dense_equals_torch_in_outputs_state_and_all_gradients(form: str, depth: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    B, T, X, C, ways = 3, 5, 4, 6, 1 + bidirectional
    theirs = TORCH[form](X, C, num_layers=depth, bidirectional=bidirectional, batch_first=True).double()
    layers, pairs = [], []
    for level in range(depth):
        cells = []
        for suffix in ("", "_reverse")[:ways]:
            cell = make(form, X if level == 0 else ways * C, C)
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w_x, w_h, b_x, b_h = (getattr(theirs, f"{name}_l{level}{suffix}") for name in names)
            assert cell.input_map is not None
            with torch.no_grad():
                cell.input_map.weight.copy_(w_x)
                cell.recurrent_map.weight.copy_(w_h)
                if form == "gru-after":
                    cell.input_map.bias.copy_(b_x)
                    cell.recurrent_map.bias.copy_(b_h)
                else:
                    cell.recurrent_map.bias.copy_(b_x + b_h)
            pairs += [(cell.input_map.weight, w_x), (cell.recurrent_map.weight, w_h), (cell.recurrent_map.bias, b_h)]
            pairs += [(cell.input_map.bias, b_x)] if form == "gru-after" else []
            cells.append(cell)
        layers.append(Layer(*cells))
    x, parts = normal(B, T, X), layers[0].forward_cell.states  # type: ignore[union-attr]  # the layers here all have a forward cell, and states are tensors
    x_too = x.detach().clone().requires_grad_()
    start = [normal(depth * ways, B, C) for _ in range(parts)]
    start_too = [part.detach().clone().requires_grad_() for part in start]
    state = [tuple(part[ways * i + way] for way in range(ways) for part in start) for i in range(depth)]

    outputs, last = Stack(layers).sequence(x, state)
    their_outputs, their_last = theirs(x_too, tuple(start_too) if parts == 2 else start_too[0])
    their_last = their_last if parts == 2 else (their_last,)
    close(outputs[-1], their_outputs)
    ours_last = [torch.stack([layer[k + parts * w] for layer in last for w in range(ways)]) for k in range(parts)]
    for ours, their in zip(ours_last, their_last, strict=True):
        close(ours, their)

    weigh = torch.randn_like(their_outputs)
    ends = [torch.randn_like(part) for part in their_last]
    for output, ending in ((outputs[-1], ours_last), (their_outputs, their_last)):
        total = (output * weigh).sum() + sum((a * b).sum() for a, b in zip(ending, ends, strict=True))
        total.backward()
    close(x.grad, x_too.grad)
    for ours, their in [*pairs, *zip(start, start_too, strict=True)]:
        close(ours.grad, their.grad)
    assert len(pairs) == sum(1 for layer in layers for _ in layer.parameters())


@pytest.mark.parametrize("dims", [1, 2, 3])
@forms
def test_1x1_kernels_on_a_1x1_image_equal_the_dense_cell(form: str, dims: int) -> None:
    torch.manual_seed(0)
    dense = make(form, 3, 4)
    conv = make(form, 3, 4, spatial_dims=dims, input_kernel=1, recurrent_kernel=1)
    ones = (1,) * dims
    conv.load_state_dict({k: v.reshape(conv.state_dict()[k].shape) for k, v in dense.state_dict().items()})
    x, start = normal(2, 5, 3), tuple(normal(2, 4) for _ in range(dense.states))
    outputs, last = run(dense, x, 5, start)
    field_outputs, field_last = run(conv, x.view(2, 5, 3, *ones), 5, tuple(part.view(2, 4, *ones) for part in start))
    close(field_outputs.flatten(2), outputs)
    for ours, theirs in zip(field_last, last, strict=True):
        close(ours.flatten(1), theirs)


@pytest.mark.parametrize("dims", [1, 2])
@forms
def test_an_axis_of_size_1_changes_nothing(form: str, dims: int) -> None:
    """What the kernel holds beside its middle meets the zeros around the field only."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"input_kernel": 5, "recurrent_kernel": 3}
    flat = make(form, 2, 3, spatial_dims=dims, **options)
    deep = make(form, 2, 3, spatial_dims=dims + 1, **options)
    with torch.no_grad():
        for ours, theirs in zip(deep.parameters(), flat.parameters(), strict=True):
            (ours[:, :, ours.shape[2] // 2] if ours.dim() > 2 else ours).copy_(theirs)
    size = (5, 4)[:dims]
    x, start = normal(2, 3, 2, *size), tuple(normal(2, 3, *size) for _ in range(flat.states))
    outputs, _ = run(flat, x, 3, start)
    deep_outputs, _ = run(deep, x.unsqueeze(3), 3, tuple(part.unsqueeze(2) for part in start))
    close(deep_outputs.squeeze(3), outputs)


sizes = pytest.mark.parametrize(("inputs", "hidden", "steps"), [(1, 1, 1), (2, 3, 4)])


def convolve(weight: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@sizes
def test_convlstm_equals_its_equations_gate_by_gate(inputs: int, hidden: int, steps: int) -> None:
    torch.manual_seed(0)
    cell = make("lstm-peephole", inputs, hidden, spatial_dims=2, input_kernel=3, recurrent_kernel=5)
    weights = cell.state_dict()
    x, h, c = normal(2, steps, inputs, 7, 5), normal(2, hidden, 7, 5), normal(2, hidden, 7, 5)
    outputs, (_, last) = run(cell, x, steps, (h, c))
    W_xi, W_xf, W_xg, W_xo = weights["input_map.weight"].chunk(4)
    W_hi, W_hf, W_hg, W_ho = weights["recurrent_map.weight"].chunk(4)
    b_i, b_f, b_g, b_o = (b.view(-1, 1, 1) for b in weights["recurrent_map.bias"].chunk(4))
    w_ci, w_cf, w_co = (w.view(-1, 1, 1) for w in weights["peephole"])
    for t in range(steps):
        i = torch.sigmoid(convolve(W_xi, x[:, t]) + convolve(W_hi, h) + w_ci * c + b_i)
        f = torch.sigmoid(convolve(W_xf, x[:, t]) + convolve(W_hf, h) + w_cf * c + b_f)
        g = torch.tanh(convolve(W_xg, x[:, t]) + convolve(W_hg, h) + b_g)
        c = f * c + i * g
        o = torch.sigmoid(convolve(W_xo, x[:, t]) + convolve(W_ho, h) + w_co * c + b_o)
        h = o * torch.tanh(c)
        close(outputs[:, t], h)
    close(last, c)


@pytest.mark.parametrize("reset", ["after", "before", "none"])
@sizes
def test_convgru_equals_its_equations_gate_by_gate(inputs: int, hidden: int, steps: int, reset: str) -> None:
    torch.manual_seed(0)
    cell = make(f"gru-{reset}", inputs, hidden, spatial_dims=2, input_kernel=3, recurrent_kernel=5)
    act = {"after": torch.tanh, "before": F.relu, "none": lambda a: F.leaky_relu(a, 0.2)}[reset]
    weights = cell.state_dict()
    x, h = normal(2, steps, inputs, 7, 5), normal(2, hidden, 7, 5)
    outputs, _ = run(cell, x, steps, (h,))
    W_x = weights["input_map.weight"].split(hidden)
    W_h = weights["recurrent_map.weight"].split(hidden)
    b = [part.view(-1, 1, 1) for part in weights["recurrent_map.bias"].split(hidden)]
    for t in range(steps):
        x_t = x[:, t]
        if reset == "none":
            z = torch.sigmoid(convolve(W_x[0], x_t) + convolve(W_h[0], h) + b[0])
            n = act(convolve(W_x[1], x_t) + convolve(W_h[1], h) + b[1])
        elif reset == "before":
            r = torch.sigmoid(convolve(W_x[0], x_t) + convolve(W_h[0], h) + b[0])
            z = torch.sigmoid(convolve(W_x[1], x_t) + convolve(W_h[1], h) + b[1])
            bias = weights["candidate_map.bias"].view(-1, 1, 1)
            n = act(convolve(W_x[2], x_t) + convolve(weights["candidate_map.weight"], r * h) + bias)
        else:
            b_x = [part.view(-1, 1, 1) for part in weights["input_map.bias"].split(hidden)]
            r = torch.sigmoid(convolve(W_x[0], x_t) + b_x[0] + convolve(W_h[0], h) + b[0])
            z = torch.sigmoid(convolve(W_x[1], x_t) + b_x[1] + convolve(W_h[1], h) + b[1])
            n = act(convolve(W_x[2], x_t) + b_x[2] + r * (convolve(W_h[2], h) + b[2]))
        h = z * h + (1 - z) * n
        close(outputs[:, t], h)


def test_the_hand_weighted_rnn_finds_repeated_ones() -> None:
    cell = RNN(1, 3, activation="relu")
    assert cell.input_map is not None
    with torch.no_grad():
        cell.input_map.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
        cell.recurrent_map.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
        cell.recurrent_map.bias.zero_()
    x = torch.tensor([0.0, 1, 0, 1, 1, 1, 0, 1, 1]).view(1, -1, 1)
    hidden, _ = run(cell, x, 9, (torch.tensor([[0.0, 0.0, 1.0]]),))
    y = torch.relu(hidden @ torch.tensor([1.0, 1.0, -1.0]))
    assert y[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1]


@forms
def test_no_input_equals_an_input_that_weighs_nothing(form: str) -> None:
    torch.manual_seed(0)
    without, given = make(form, 0, 3, spatial_dims=2), make(form, 2, 3, spatial_dims=2)
    given.load_state_dict(without.state_dict(), strict=False)
    assert given.input_map is not None
    for weight in given.input_map.parameters():
        nn.init.zeros_(weight)
    start = tuple(normal(2, 3, 4, 4) for _ in range(without.states))
    close(run(without, None, 3, start)[0], run(given, normal(2, 3, 2, 4, 4), 3, start)[0])


@pytest.mark.parametrize("space", [(), (4,), (4, 3)])
@forms
def test_a_learned_initial_state_is_one_number_per_channel_everywhere(form: str, space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    like = torch.zeros(1, dtype=torch.float64)
    cell = make(form, 2, 3, spatial_dims=len(space), learned_initial_state=True)
    assert cell.initial is not None
    state = cell.initial_state(5, space, like)
    assert len(state) == cell.states
    for part, row in zip(state, cell.initial, strict=True):
        assert part.shape == (5, 3, *space)
        close(part, row.view(1, 3, *(1,) * len(space)).expand_as(part))
    sum(part.sum() for part in state).backward()  # type: ignore[union-attr]  # the layers here all have a forward cell, and states are tensors
    pixels = torch.Size(space).numel()
    close(cell.initial.grad, torch.full_like(cell.initial, 5 * pixels))
    for part in make(form, 2, 3, spatial_dims=len(space)).initial_state(5, space, like.float()):
        assert part.dtype == torch.float32
        assert not part.any()


def test_only_the_forget_gate_starts_with_the_forget_bias() -> None:
    bias = LSTM(2, 3, forget_bias=7.0).recurrent_map.bias.detach()
    assert (bias == 7).tolist() == [False] * 3 + [True] * 3 + [False] * 6


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: GRU(1, 1, reset="sometimes"), "Unknown reset 'sometimes'; choose one of after, before, none"),
        (lambda: GRU(1, 1, activation="gelu"), "Unknown activation 'gelu'; choose one of tanh, relu, leaky_relu"),
        (lambda: RNN(1, 1, activation="gelu"), "Unknown activation 'gelu'; choose one of tanh, relu"),
        (lambda: LSTM(1, 1, spatial_dims=4), "spatial_dims is 4; it must be 0"),
        (lambda: LSTM(1, 1, spatial_dims=2, input_kernel=4), "kernels of odd size.*received 4"),
        (lambda: LSTM(1, 1, spatial_dims=2, recurrent_kernel=0), "kernels of odd size.*received 0"),
    ],
)
def test_wrong_choices_are_refused(make_wrong: Callable[[], Cell], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_wrong()


def test_input_where_there_is_none_and_none_where_there_is_are_refused() -> None:
    with pytest.raises(ValueError, match="0 input channels was given an input"):
        LSTM(0, 2).project(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="2 input channels was given no input"):
        LSTM(2, 2).project(None)


@forms
def test_gates_are_told_by_their_names_in_the_equations(form: str) -> None:
    torch.manual_seed(0)
    cell = make(form, 3, 4)
    assert cell.input_map is not None
    x, state = normal(2, 3), tuple(normal(2, 4) for _ in range(cell.states))
    projected = cell.project(x.unsqueeze(1))[:, 0]  # type: ignore[index]  # it has an input
    after, gates = cell.step_and_gates(projected, state)
    from_x, from_h = cell.input_map(x), cell.recurrent_map(state[0])
    expected: dict[str, Tensor] = {}
    if isinstance(cell, LSTM):
        i, f, _, o = (from_x + from_h).chunk(4, dim=1)
        w_i, w_f, w_o = torch.zeros(3, 4, dtype=torch.float64) if cell.peephole is None else cell.peephole
        c, c_after = state[1], after[1]
        expected = {"i": i + w_i * c, "f": f + w_f * c, "o": o + w_o * c_after}
    elif form == "gru-none":
        expected = {"z": (from_x + from_h)[:, :4]}
    elif isinstance(cell, GRU):
        expected = {"r": from_x[:, :4] + from_h[:, :4], "z": from_x[:, 4:8] + from_h[:, 4:8]}
    assert list(gates) == list(expected)
    for name, gate in gates.items():
        close(gate, torch.sigmoid(expected[name]))
    for one, other in zip(cell.step(projected, state), after, strict=True):
        assert torch.equal(one, other)


def test_gates_of_an_st_lstm_make_its_memories() -> None:
    torch.manual_seed(0)
    cell = STLSTM(3, 4).double()
    h, c, m = (normal(2, 4) for _ in range(3))
    (after, new_c, new_m), gates = cell.step_and_gates(cell.project(normal(2, 1, 3))[:, 0], (h, c, m))  # type: ignore[index]  # as above
    close(new_c, gates["f"] * c + gates["i . g"])
    close(new_m, gates["f'"] * m + gates["i' . g'"])
    close(after, gates["o"] * torch.tanh(cell.fusion_map(torch.cat([new_c, new_m], dim=1))))
    for name in ("i", "i'"):
        assert (gates[f"{name} . g{name[1:]}"].abs() < gates[name]).all()
