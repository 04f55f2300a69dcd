"""Time and depth: layer by layer equals step by step, halves equal the whole, and lanes restart cleanly."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from forecast.cells.cell import Cell
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.recurrence import Layer, Stack, each_frame, restart, unroll

B, T, X, C, H, W = 3, 6, 2, 4, 8, 6


def conv_lstm(inputs: int) -> Cell:
    return LSTM(inputs, C, spatial_dims=2, peephole=True, learned_initial_state=True)


def conv_gru(inputs: int) -> Cell:
    return GRU(inputs, C, spatial_dims=2, reset="before", learned_initial_state=True)


cells = pytest.mark.parametrize("cell", [conv_lstm, conv_gru])
MakeCell = Callable[[int], Cell]


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.3)
    return module.double()


def two_layers(cell: MakeCell) -> Stack:
    """Each after a map of its own that halves the size."""
    halve = [nn.Conv2d(X, 5, 2, stride=2), nn.Conv2d(C, 3, 2, stride=2)]
    stack = Stack([Layer(cell(5), before=halve[0]), Layer(cell(3), before=halve[1])])
    randomise(stack)
    return stack


def frames() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(B, T, X, H, W, dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@cells
def test_layer_by_layer_equals_step_by_step(cell: MakeCell) -> None:
    stack, x = two_layers(cell), frames()
    outputs, last = stack.sequence(x)
    assert [tuple(output.shape) for output in outputs] == [(B, T, C, 4, 3), (B, T, C, 2, 1)]
    states = None
    for t in range(T):
        now, states = stack.step(x[:, t], states)
        for depth in range(2):
            close(now[depth], outputs[depth][:, t])
    assert states is not None
    for ours, theirs in zip(states, last, strict=True):
        for part, their_part in zip(ours, theirs, strict=True):
            close(part, their_part)


@cells
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_parts_with_carried_state_equal_one_run(cell: MakeCell, cut: int) -> None:
    stack, x = two_layers(cell), frames()
    whole, last = stack.sequence(x)
    early, state = stack.sequence(x[:, :cut])
    late, end = stack.sequence(x[:, cut:], state)
    for depth in range(2):
        close(torch.cat([early[depth], late[depth]], dim=1), whole[depth])
        for ours, theirs in zip(end[depth], last[depth], strict=True):
            close(ours, theirs)


@cells
def test_both_ways_equal_two_runs_one_of_them_reversed(cell: MakeCell) -> None:
    ahead, back = cell(X), cell(X)
    both = Layer(ahead, back)
    randomise(both)
    x = frames()
    outputs, last = both.sequence(x, None, T)
    forward, forward_last = Layer(ahead).sequence(x, None, T)
    reversed_, backward_last = Layer(back).sequence(x.flip(1), None, T)
    close(outputs, torch.cat([forward, reversed_.flip(1)], dim=2))
    close(Layer(None, back).sequence(x, None, T)[0], reversed_.flip(1))
    for ours, theirs in zip(last, forward_last + backward_last, strict=True):
        close(ours, theirs)
    given = both.initial_state(B, (H, W), x)
    assert len(given) == 2 * ahead.states
    close(both.sequence(x, given, T)[0], outputs)


@cells
def test_unroll_without_input_equals_stepping_by_hand(cell: MakeCell) -> None:
    alone = cell(0)
    randomise(alone)
    state = alone.initial_state(B, (H, W), frames())
    outputs, last = unroll(alone, None, state, 4)
    for t in range(4):
        state = alone.step(None, state)
        close(outputs[:, t], state[0])
    for ours, theirs in zip(last, state, strict=True):
        close(ours, theirs)


@cells
def test_a_stack_without_input_runs_the_steps_that_are_asked_for(cell: MakeCell) -> None:
    stack = Stack([Layer(cell(0)), Layer(cell(C))])
    randomise(stack)
    begin = [layer.initial_state(B, (H, W), frames()) for layer in stack.layers]
    outputs, _ = stack.sequence(None, begin, 4)
    assert outputs[1].shape == (B, 4, C, H, W)
    states = begin
    for t in range(4):
        now, states = stack.step(None, states)
        close(now[1], outputs[1][:, t])


@cells
def test_lanes_that_start_anew_forget_and_train_the_initial_state(cell: MakeCell) -> None:
    stack, x = two_layers(cell), frames()
    _, before = stack.sequence(x.flip(0))
    carried = [tuple(part.detach().requires_grad_() for part in state) for state in before]
    fresh = [layer.initial_state(B, size, x) for layer, size in zip(stack.layers, [(4, 3), (2, 1)], strict=True)]
    first = torch.tensor([True, False, True])
    outputs, _ = stack.sequence(x, [restart(a, b, first) for a, b in zip(fresh, carried, strict=True)])
    anew, _ = stack.sequence(x)
    on, _ = stack.sequence(x, carried)
    for depth in range(2):
        close(outputs[depth], torch.where(first.view(B, 1, 1, 1, 1), anew[depth], on[depth]))
    outputs[1].square().sum().backward()
    for layer, state in zip(stack.layers, carried, strict=True):
        assert layer.forward_cell is not None
        assert layer.forward_cell.initial is not None
        grad = layer.forward_cell.initial.grad
        assert grad is not None
        assert (grad != 0).all()
        for part in state:
            assert part.grad is not None
            assert not part.grad[first].any()
            assert part.grad[~first].abs().sum() > 0


def test_a_learned_initial_state_gets_a_gradient_of_zero_where_all_lanes_go_on() -> None:
    """So that no parameter is ever without a gradient when processes add theirs up."""
    layer = Layer(conv_lstm(X))
    x = frames().float()
    carried = layer.sequence(x, None, T)[1]
    state = restart(layer.initial_state(B, (H, W), x), tuple(p.detach() for p in carried), torch.zeros(B) > 0)
    layer.sequence(x, state, T)[0].sum().backward()
    assert layer.forward_cell is not None
    assert layer.forward_cell.initial is not None
    assert layer.forward_cell.initial.grad is not None
    assert not layer.forward_cell.initial.grad.any()


def test_each_frame_treats_every_frame_alone() -> None:
    module, x = nn.Conv2d(X, 5, 3).double(), frames()
    together = each_frame(module, x)
    for t in range(T):
        close(together[:, t], module(x[:, t]))


def test_impossible_layers_and_calls_are_refused() -> None:
    with pytest.raises(UserError, match="a forward cell, a backward cell or both"):
        Layer()
    for layer in (Layer(None, conv_gru(X)), Layer(conv_gru(X), conv_gru(X))):
        with pytest.raises(UserError, match="cannot step forward"):
            layer.step(torch.zeros(B, X, H, W), None)
    with pytest.raises(ValueError, match="number of steps must be given"):
        Stack([Layer(conv_gru(0))]).sequence(None)
    with pytest.raises(ValueError, match="needs a state to start from"):
        Stack([Layer(conv_gru(0))]).sequence(None, None, 3)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "zoneout": 0.2}], ids=["plain", "noisy"])
@pytest.mark.parametrize("stretch", [1, 3, 7, 20])
def test_recomputing_changes_no_number_and_keeps_less(stretch: int, options: dict[str, float]) -> None:
    x = torch.randn(2, 7, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    made = LSTM(3, 4, spatial_dims=2, peephole=True, learned_initial_state=True, **options).double()
    cells = made, copy.deepcopy(made)
    found = []
    for cell, recompute in zip(cells, (None, stretch), strict=True):
        torch.manual_seed(3)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs, state = Layer(cell, recompute=recompute, backend="reference").sequence(x, None, 7)
        loss = outputs.square().sum() + sum(part.sum() for part in state)
        gradients = torch.autograd.grad(loss, [x, *cell.parameters()])
        found.append((kept, [outputs, *state, *gradients]))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert found[1][0] < found[0][0] / 3
