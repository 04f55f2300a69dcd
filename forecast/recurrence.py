"""Cells in time and in depth: unroll, layers that look one way or both, and stacks of them.

Axes: B batch, T time, C channels, G gates, *space: none for vectors, up to D H W.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forecast.cells.cell import Cell, Gates, State, linear_map
from forecast.errors import UserError
from forecast.kernels import unroll as fast
from forecast.kernels.equations import Kernel, Maps

SLOPE = 0.2  # of the leaky ReLU between layers, as HKO-7 has it


BACKENDS = ("auto", "reference", "fused")


def unroll(
    cell: Cell, projected: Float[Tensor, "B T GC *space"] | None, state: State, steps: int
) -> tuple[Float[Tensor, "B T C *space"], State]:
    """Steps a cell through time: the plain reference.

    Args:
        cell: the cell.
        projected: `cell.project` of the whole input; None for a cell without input.
        state: the state before the first step.
        steps: number of steps, T.

    Returns:
        The hidden state after each step, and the state after the last.
    """
    # The gradient of each projected[:, t] would be as large as that of all; of what is unbound it is as large as its part.
    shares: Sequence[Tensor | None] = [None] * steps if projected is None else projected.unbind(1)
    outputs = []
    for share in shares:
        state = cell.step(share, state)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


def through_time(
    cell: Cell,
    x: Float[Tensor, "B T X *space"] | None,
    state: State,
    steps: int,
    *,
    rest: bool = False,
    backend: str = "auto",
    recompute: int | None = None,
) -> tuple[Float[Tensor, "B T C *space"], State]:
    """Runs a cell through its input: `unroll`, or `forecast.kernels.unroll` where the cell has a kernel. The seam of both.

    With `recompute` gradients find the state before each stretch of steps alone, and what lies between is computed once
    more (activation checkpointing; Chen et al. 2016, arXiv 1604.06174): less memory, more time, the same numbers.

    Args:
        cell, state, steps: as in `unroll`.
        x: the input, not projected; None for a cell without input.
        rest: the state is zeros, of which nobody asks gradients; a kernel makes use of that.
        backend: one of `BACKENDS`; all but "reference" take the kernel where there is one.
        recompute: steps between two states that are kept; the square root of T needs the least memory. None keeps all.
    """
    cell.check_input(x)
    # A compiler sees more in single steps.
    found = None if backend == "reference" or torch.compiler.is_compiling() else cell.fast()
    stretch = recompute if torch.is_grad_enabled() else None

    again = stretch == 1
    if stretch is None or (found is not None and again):
        return _part(cell, found, again, rest, x, steps, *state)
    outputs = []
    for begin in range(0, steps, stretch):
        count = min(stretch, steps - begin)
        own = None if x is None else x[:, begin : begin + count]
        resting = rest and begin == 0
        hidden, state = checkpoint(_part, cell, found, again, resting, own, count, *state, use_reentrant=False)
        outputs.append(hidden)
    return torch.cat(outputs, dim=1), state


def _part(
    cell: Cell, found: tuple[Kernel, Maps] | None, again: bool, rest: bool, x: Tensor | None, steps: int, *state: Tensor
) -> tuple[Tensor, State]:
    if found is None:
        return unroll(cell, cell.project(x), state, steps)
    return fast.unroll(*found, x, state, steps, again=again, rest=rest)


def each_frame(module: nn.Module, x: Tensor) -> Tensor:
    """A module that takes one frame, applied to B T frames at once."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def deepened(widths: Sequence[int], spatial_dims: int) -> nn.Sequential:
    """3x3 convolutions (of vectors: dense layers) from each number of channels to the next, each with a leaky ReLU."""
    maps = (linear_map(low, high, spatial_dims=spatial_dims, kernel=3, bias=True) for low, high in pairwise(widths))
    return nn.Sequential(*(nn.Sequential(linear, nn.LeakyReLU(SLOPE)) for linear in maps))


class Layer(nn.Module):
    """One recurrent layer: a map of each frame by itself (or none), a recurrence through time, and maps of each frame again.

    What stands above the recurrence deepens a single step, and leaves the way through time as short as it was (the deep
    output of Pascanu et al. 2014, arXiv 1312.6026): the state is the recurrence's own, the output what is made of it.

    With both directions the hidden states stand side by side in the channels, the forward ones first, and the state is
    the forward cell's followed by the backward cell's.

    Args:
        forward_cell: reads from the first frame to the last.
        backward_cell: reads from the last frame to the first.
        before: applied to each frame first (down- or up-sampling between layers).
        above: channels of 3x3 convolutions (vectors: of dense layers), each with a leaky ReLU, that each hidden state goes
            through before anyone reads it.
        recompute: steps between the states that are kept for gradients (`through_time`); None keeps all there is.
        backend: one of `BACKENDS`; see `through_time` and `use_backend`.
    """

    def __init__(
        self,
        forward_cell: Cell | None = None,
        backward_cell: Cell | None = None,
        *,
        before: nn.Module | None = None,
        above: Sequence[int] = (),
        recompute: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if recompute is not None and recompute < 1:
            raise UserError(f"recompute is {recompute}; give 1 or more steps, or null to keep everything.")
        cells = [cell for cell in (forward_cell, backward_cell) if cell is not None]
        if not cells:
            raise UserError("A recurrent layer needs a forward cell, a backward cell or both.")
        if min(above, default=1) < 1:
            raise UserError(f"above is {list(above)}; give channels of 1 or more, or an empty list for none.")
        self.before = before
        self.forward_cell = forward_cell
        self.backward_cell = backward_cell
        self.recompute = recompute
        self.backend = backend
        hidden = sum(cell.hidden_channels for cell in cells)
        self.above = deepened([hidden, *above], cells[0].spatial_dims) if above else None

    def initial_state(self, batch: int, space: tuple[int, ...], like: Tensor) -> State:
        """The state before the first step, at the resolution of the recurrence."""
        state: State = ()
        for cell in (self.forward_cell, self.backward_cell):
            if cell is not None:
                state += cell.initial_state(batch, space, like)
        return state

    def sequence(self, x: Tensor | None, state: State | None, steps: int) -> tuple[Tensor, State]:
        """B T X *space (or None) -> the output of every step B T C *space, and the last state."""
        if x is not None and self.before is not None:
            x = each_frame(self.before, x)
        halves: list[Tensor] = []
        last: State = ()
        for cell, backward in ((self.forward_cell, False), (self.backward_cell, True)):
            if cell is None:
                continue
            read = x.flip(1) if backward and x is not None else x
            rest = state is None and cell.initial is None
            if state is not None:
                begin = state[len(last) : len(last) + cell.carried]
            elif read is not None:
                begin = cell.initial_state(read.shape[0], tuple(read.shape[3:]), read)
            else:
                raise ValueError("A layer without input needs a state to start from.")
            outputs, end = through_time(
                cell, read, begin, steps, rest=rest, backend=self.backend, recompute=self.recompute
            )
            halves.append(outputs.flip(1) if backward else outputs)
            last += end
        hidden = halves[0] if len(halves) == 1 else torch.cat(halves, dim=2)
        return (hidden if self.above is None else each_frame(self.above, hidden)), last

    def step(self, x: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """B X *space (or None) -> the output B C *space, and the state."""
        if self.forward_cell is None or self.backward_cell is not None:
            raise UserError(
                "A layer that reads backward in time cannot step forward in it; make it of a forward cell alone."
            )
        outputs, state = self.sequence(None if x is None else x.unsqueeze(1), state, 1)
        return outputs[:, 0], state


class Stack(nn.Module):
    """Recurrent layers on top of each other.

    `sequence` goes layer by layer over a known input, all time steps of a layer at once where that is possible; `step`
    goes through all layers for one time, for outputs that are fed back. They give the same numbers.
    """

    layers: Sequence[Layer]

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]  # a ModuleList that holds Layers only

    def starts_from_given_states(self) -> None:
        """Drops learned initial states: a forecaster takes over its encoder's, so that its own would never be trained."""
        for layer in self.layers:
            for cell in (layer.forward_cell, layer.backward_cell):
                if cell is not None:
                    cell.initial = None

    def ends_in_its_states(self) -> None:
        """Drops what stands above the last layer: where nothing but the states is read, it would never be trained."""
        self.layers[-1].above = None

    def sequence(
        self, x: Tensor | None, states: Sequence[State] | None = None, steps: int | None = None
    ) -> tuple[list[Tensor], list[State]]:
        """Runs through known input.

        Args:
            x: B T X *space; None where the first layer has no input.
            states: of each layer before the first step; None starts from the cells' initial states.
            steps: number of steps, needed only where there is no input.

        Returns:
            The output B T C *space of every layer, first layer first; and the last state of every layer.
        """
        if steps is None:
            if x is None:
                raise ValueError("Without input the number of steps must be given.")
            steps = x.shape[1]
        outputs, last = [], []
        for depth, layer in enumerate(self.layers):
            x, state = layer.sequence(x, None if states is None else states[depth], steps)
            outputs.append(x)
            last.append(state)
        return outputs, last

    def step(self, x: Tensor | None, states: Sequence[State] | None) -> tuple[list[Tensor], list[State]]:
        """One time step: B X *space (or None) -> the output of every layer, and the state of every layer."""
        outputs, last = [], []
        for depth, layer in enumerate(self.layers):
            x, state = layer.step(x, None if states is None else states[depth])
            outputs.append(x)
            last.append(state)
        return outputs, last


def use_backend(network: nn.Module, backend: str) -> None:
    """How the recurrent layers of a network are run from now on; the numbers are the same, up to rounding.

    Args:
        network: what has no recurrent layers stays as it is.
        backend: "auto": by a kernel (`forecast.kernels`) where the cell has one, else step by step; "reference": step by
            step; "fused": by kernels alone.

    Raises:
        UserError: there is no such backend, or "fused" is asked of a cell without a kernel.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}.")
    for module in network.modules():
        if isinstance(module, Layer):
            module.backend = backend
        elif isinstance(module, Cell) and backend == "fused" and module.fast() is None:
            raise UserError(
                f"backend=fused, but this {type(module).__name__} has no kernel: there are none with zoneout, dropout or "
                "norm, and for an ST-LSTM; set backend=auto."
            )


@contextmanager
def watched(network: nn.Module, see: Callable[[str, State, Gates], None]) -> Iterator[None]:
    """Shows every step of each cell of a network to `see`, for as long as the context lasts.

    Args:
        network: made of cells. A compiled one must be made eager, or it will not see that it is watched.
        see: is told the layer (encoder.0, encoder.1, forecaster.0 ...), its state after the step, without a mask, and its
            gates.
    """
    cells = {name: cell for name, cell in network.named_modules() if isinstance(cell, Cell)}

    def shown(layer: str, cell: Cell) -> Callable[[Tensor | None, State], tuple[State, Gates]]:
        plain = cell.step_and_gates

        def step_and_gates(projected: Tensor | None, state: State) -> tuple[State, Gates]:
            after, gates = plain(projected, state)
            see(layer, after[: cell.states], gates)
            return after, gates

        return step_and_gates

    for name, cell in cells.items():
        layer = ".".join(part for part in name.split(".") if part not in ("layers", "forward_cell"))
        vars(cell)["step_and_gates"] = shown(layer, cell)
    try:
        yield
    finally:
        for cell in cells.values():
            del vars(cell)["step_and_gates"]


def restart(initial: State, carried: State, first: Tensor) -> State:
    """The state of lanes that go on, and the initial state of those that start anew (`first`, B bool)."""
    return tuple(
        torch.where(first.view(-1, *(1,) * (kept.dim() - 1)), fresh, kept)
        for fresh, kept in zip(initial, carried, strict=True)
    )
