"""A whole recurrence as one node of the graph: what a graph of steps repeats at every step is done once for all of them.

    gates(t) = W_x * x(t) + b_x + W_h * h(t-1) + b       W_x * x for all t in one call
    state(t) = equations(gates(t), state(t-1))           in place

and backward in time only what hangs on the step after:

    d gates(t), d state(t-1) = gradients of the equations, in place
    d h(t-1) += W_h^T * d gates(t)

W_x, W_h, the biases, x and the cell's own weights get their gradients afterwards, for all steps in one call each. The
numbers are those of `forecast.recurrence.unroll`, up to the order of sums.

For gradients x is kept, h after each step, and how far the gates opened; the other states are made from the gates once
more. Where the gates are not kept either, they are made anew for a stretch of steps at a time, each from the states before
it.

Axes: B batch, T time, X input channels, C hidden channels, *space: none for vectors, up to D H W.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from forecast.errors import UserError
from forecast.kernels import native
from forecast.kernels.equations import Equations, Kernel, Maps, States
from forecast.kernels.frames import laid_out, layout, room, time_first
from forecast.kernels.stretch import Asked, Recurrence, Stretch

BLOCK = 16  # channels, of oneDNN's convolutions with 512-bit vectors and of tensor cores in half precision


def unroll(
    kernel: Kernel,
    maps: Maps,
    x: Tensor | None,
    state: Sequence[Tensor],
    steps: int,
    *,
    again: bool = False,
    rest: bool = False,
) -> tuple[Tensor, States]:
    """Steps a cell through time; gradients come back through one node. It has none of a higher order.

    Under autocast the maps and h are of its lower precision, all else that is carried from step to step stays in float32.

    Args:
        kernel: of the cell.
        maps: of the cell.
        x: the input, B T X *space; None for a cell without input.
        state: before the first step, B C *space each.
        steps: T.
        again: keep no gates for gradients, and make them anew.
        rest: the state is zeros, of which nobody asks gradients: the first step has no use for W_h.

    Returns:
        The hidden state after each step B T C *space, and the state after the last.
    """
    h, *others = state
    device = h.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if mixed:
        low = torch.get_autocast_dtype(device)
        x, h = None if x is None else x.to(low), h.to(low)
        maps = maps.to(low)
        others = [one.float() for one in others]
    with torch.autocast(device, enabled=False) if mixed else nullcontext():
        if x is not None and h.dim() == 2 and not again and kernel.native and native.quicker(kernel.native, x, h):
            return native.unroll(kernel.native, maps, x, (h, *others))
        given = (x, *maps, h, *others, *kernel.own)
        wanted = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given)
        outputs, *last = _Unrolled.apply(  # type: ignore[no-untyped-call]  # torch says no type
            kernel.equations, steps, again, rest, wanted, len(state), *given
        )
    return outputs, tuple(last)


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        equations: Equations,
        steps: int,
        again: bool,
        rest: bool,
        wanted: bool,
        states: int,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        input_weight: Tensor | None,
        input_bias: Tensor | None,
        *given: Tensor,
    ) -> States:
        (h, *others), own = given[:states], given[states:]
        maps = Maps(weight, bias, input_weight, input_bias)
        joined = _joined(equations, maps)
        recurrence = _recurrence(equations, maps, own, joined)
        # Time first: a step's frames lie together.
        seen = room(h, steps + 1, joined + h.shape[1])
        if x is not None and joined:
            seen[:-1, :, :joined] = x.transpose(0, 1)
            x = None
        hidden = seen[:, :, joined:]
        hidden[0] = h
        keeps = wanted and not again and not equations.from_states
        # Gates that are made anew are those of some steps at a time, so that those of all are never there at once.
        length = isqrt(steps - 1) + 1 if again else steps
        kept: list[Tensor] = []
        for begin in range(0, steps, length):
            end = min(begin + length, steps)
            stretch = Stretch(seen[begin : end + 1], _frames(x, begin, end), tuple(others), rest and begin == 0)
            # What nobody reads again has room for one step alone.
            made = recurrence.room(stretch, end - begin if keeps else 1)
            # Zeros are one number, however many they are.
            start = [one.new_zeros(()).expand_as(one) for one in others] if stretch.rest else others
            kept += [*start, *(made if keeps else ())]
            for after in recurrence.forward(stretch, *made):
                others = list(after)
        if wanted:
            ctx.save_for_backward(x, *maps, seen, *own, *kept)
            ctx.equations, ctx.joined, ctx.rest = equations, joined, rest
            ctx.own, ctx.others, ctx.length, ctx.keeps = len(own), len(others), length, keeps
        return hidden[1:].transpose(0, 1), hidden[-1].clone(), *others

    @staticmethod
    def backward(ctx: Any, outputs: Tensor, *last: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UserError("The fast unroll has no gradients of gradients; set backend=reference.")
        x, weight, bias, input_weight, input_bias, seen, *saved = ctx.saved_tensors
        own, kept = tuple(saved[: ctx.own]), saved[ctx.own :]
        maps = Maps(weight, bias, input_weight, input_bias)
        recurrence = _recurrence(ctx.equations, maps, own, ctx.joined)
        begins = range(0, len(seen) - 1, ctx.length)
        each = len(kept) // len(begins)
        asked = Asked(*ctx.needs_input_grad[6:11])
        state = tuple(one.clone(memory_format=layout(one)) for one in last)
        inputs: list[Tensor] = []
        weights: list[list[Tensor | None]] = []
        for number, begin in reversed(list(enumerate(begins))):
            end = min(begin + ctx.length, len(seen) - 1)
            mine = tuple(kept[number * each : (number + 1) * each])
            # They are overwritten by their gradients; should one ask for gradients again, they are made anew.
            made = tuple(one.data for one in mine[ctx.others :]) if ctx.keeps else ()
            frames, rest = _frames(x, begin, end), ctx.rest and begin == 0
            stretch = Stretch(seen[begin : end + 1], frames, mine[: ctx.others], rest)
            d_x, found = recurrence.backward(stretch, made, outputs[:, begin:end], state, asked)
            if d_x is not None:
                inputs.insert(0, d_x)
            weights.append(found)
        ctx.keeps = False
        sums = [None if parts[0] is None else sum(parts[1:], parts[0]) for parts in zip(*weights, strict=True)]
        d_x = torch.cat(inputs).transpose(0, 1) if inputs else None
        return *(None,) * 6, d_x, *sums[:4], *state, *sums[4:]


def _frames(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    """Of some steps of the input."""
    return None if x is None else time_first(x[:, begin:end])


def _recurrence(equations: Equations, maps: Maps, own: States, joined: int) -> Recurrence:
    """With one map where they are joined, and with weights that lie as frames do."""
    weight, bias, input_weight, input_bias = maps
    if joined and input_weight is not None:
        weight, input_weight = torch.cat([input_weight, weight], dim=1), None
    read = None if input_weight is None else laid_out(input_weight)
    return Recurrence(equations, Maps(laid_out(weight), bias, read, input_bias), own, joined)


def _joined(equations: Equations, maps: Maps) -> int:
    """The channels of x if it goes through one map with h, where that is quicker; else 0.

    So it is where their channels fill fewer blocks together than apart; on a CPU also where they fill as many.
    """
    weight, _, input_weight, _ = maps
    if input_weight is None or not equations.shared or input_weight.shape[2:] != weight.shape[2:]:
        return 0
    x, h = input_weight.shape[1], weight.shape[1]
    together, apart = -(-(x + h) // BLOCK), -(-x // BLOCK) - (-h // BLOCK)
    full = not weight.is_cuda and (x + h) % BLOCK == 0
    return x if together < apart or (full and together == apart) else 0
