"""A whole recurrence as one node of the graph: what a graph of steps repeats at every step is done once for all of them.

    gates(t) = W_x * x(t) + b_x + W_h * h(t-1) + b       W_x * x for all t in one call
    state(t) = equations(gates(t), state(t-1))           in place

and backward in time only what hangs on the step after:

    d gates(t), d state(t-1) = gradients of the equations, in place
    d h(t-1) += W_h^T * d gates(t)

W_x, W_h, the biases, x and the cell's own weights get their gradients afterwards, for all steps in one call each. The
numbers are those of `forecast.recurrence.unroll`, up to the order of sums.

Axes: B batch, T time, N frames (B of one step, or T B of all), C hidden channels, G gates, *space: none for vectors, up to
D H W.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from math import isqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from forecast.errors import UserError
from forecast.kernels import native
from forecast.kernels.equations import Equations, Kernel, Maps, States
from forecast.kernels.maps import mapped, to_bias, to_input, to_weight

BLOCK = 16  # channels, of oneDNN's convolutions with 512-bit vectors and of tensor cores in half precision


def unroll(
    kernel: Kernel, maps: Maps, x: Tensor | None, state: Sequence[Tensor], steps: int, again: bool = False
) -> tuple[Tensor, States]:
    """Steps a cell through time; gradients come back through one node. It has none of a higher order.

    Under autocast the maps and h are of its lower precision, all else that is carried from step to step stays in float32.

    Args:
        kernel: of the cell.
        maps: of the cell.
        x: the input, B T X *space; None for a cell without input.
        state: before the first step, B C *space each.
        steps: T.
        again: keep the states alone for gradients, and make the gates anew from them, for all steps at once.

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
            kernel.equations, steps, again, wanted, len(state), *given
        )
    return outputs, tuple(last)


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        equations: Equations,
        steps: int,
        again: bool,
        wanted: bool,
        states: int,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        input_weight: Tensor | None,
        input_bias: Tensor | None,
        *rest: Tensor,
    ) -> States:
        state, own = rest[:states], rest[states:]
        h = state[0]
        # What the map of each step reads: h, and with it x where that is quicker. Time first: a step's frames lie together.
        joined = _joined(equations, weight, input_weight)
        if joined and input_weight is not None:
            weight, input_weight = torch.cat([input_weight, weight], dim=1), None
        weight = _laid(weight)
        seen = _room(h, steps + 1, joined + h.shape[1])
        frames = None
        if x is not None and joined:
            seen[:-1, :, :joined] = x.transpose(0, 1)
        elif x is not None:
            frames = _laid(x.transpose(0, 1).reshape(-1, *x.shape[2:]))
            input_weight = None if input_weight is None else _laid(input_weight)
        # What nobody reads again has room for one step alone; of a state, for that before and that after.
        keeps = wanted and not again and not equations.from_states
        gates = _input_share(equations, frames, input_weight, input_bias, h, steps if keeps else 1, weight)
        kept = _room(h, steps if keeps else 1, equations.kept * h.shape[1])
        others = [_room(one, steps + 1 if wanted else 2, one.shape[1]) for one in state[1:]]
        history = seen[:, :, joined:], *others
        for one, first in zip(history, state, strict=True):
            one[0] = first
        for t in range(steps):
            before, after = (tuple(one[s % len(one)] for one in history) for s in (t, t + 1))
            recurrent, opened = mapped(seen[t], weight, bias), gates[t % len(gates)]
            projected = None if frames is None else opened
            equations.forward(projected, recurrent, opened, kept[t % len(kept)], before, after, own)
        if wanted:
            made = (gates, kept) if keeps else ()
            ctx.save_for_backward(frames, weight, bias, input_weight, input_bias, seen, *others, *own, *made)
            ctx.equations, ctx.steps, ctx.joined, ctx.keeps = equations, steps, joined, keeps
            ctx.others, ctx.own = len(others), len(own)
        return history[0][1:].transpose(0, 1), *(one[steps % len(one)].clone() for one in history)

    @staticmethod
    def backward(ctx: Any, outputs: Tensor, *last: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UserError("The fast unroll has no gradients of gradients; set backend=reference.")
        frames, weight, bias, input_weight, input_bias, seen, *saved = ctx.saved_tensors
        maps = Maps(weight, bias, input_weight, input_bias)
        others, own = saved[: ctx.others], tuple(saved[ctx.others : ctx.others + ctx.own])
        steps, length = ctx.steps, ctx.steps
        if ctx.keeps:
            # They are overwritten by their gradients; should one ask for gradients again, they are made anew.
            made, ctx.keeps = tuple(one.data for one in saved[-2:]), False
        else:
            made = None
            # Gates are made for some steps at a time, so that those of all steps are never there at once.
            length = isqrt(steps - 1) + 1
        state = tuple(one.clone(memory_format=_layout(one)) for one in last)
        inputs: list[Tensor | None] = []
        weights: list[tuple[Tensor | None, ...]] = []
        for end in range(steps, 0, -length):
            begin = max(0, end - length)
            stretch = _Stretch(
                None if frames is None else frames.unflatten(0, (steps, -1))[begin:end].flatten(0, 1),
                seen[begin : end + 1],
                tuple(one[begin : end + 1] for one in others),
                made,
                outputs[:, begin:end],
            )
            x, *found = _back(ctx.equations, maps, stretch, ctx.joined, own, state, ctx.needs_input_grad[5:10])
            inputs.insert(0, x)
            weights.append(tuple(found))
        d_x = None if inputs[0] is None else torch.cat(cast(list[Tensor], inputs)).transpose(0, 1)
        sums = [None if parts[0] is None else sum(parts[1:], parts[0]) for parts in zip(*weights, strict=True)]
        return *(None,) * 5, d_x, *sums[:4], *state, *sums[4:]


class _Stretch(NamedTuple):
    """Some steps of a recurrence, and what is known of them."""

    frames: Tensor | None
    """Of the input, where it has a map of its own."""
    seen: Tensor
    """What the map of each step reads, and what that after the last would."""
    others: States
    """The states beside h, before each step and after the last."""
    made: States | None
    """The gates, and what was kept beside; None if they are to be made anew."""
    outputs: Tensor
    """The gradients of the hidden states after each step, B T C *space."""


def _back(
    equations: Equations,
    maps: Maps,
    stretch: _Stretch,
    joined: int,
    own: States,
    state: States,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Goes back through a stretch.

    Args:
        maps: the recurrent one reads x too where they are `joined`.
        joined: channels of x in `seen`.
        state: gradients of the state after the stretch, overwritten by those of the state before it.
        needs: whether gradients are asked for of x, weight, bias, input weight and input bias.

    Returns:
        The gradients of x (T B X *space), the four of the maps, and those of the cell's own weights.
    """
    frames, seen, others, made, outputs = stretch
    weight, bias, input_weight, input_bias = maps
    steps = outputs.shape[1]
    history = seen[:, :, joined:], *others
    befores, afters = tuple(one[:-1] for one in history), tuple(one[1:] for one in history)
    flat_seen = seen[:-1].flatten(0, 1)
    h = history[0][0]
    if made is not None:
        gates, kept = made
    elif equations.from_states:
        gates, kept = _room(h, steps, weight.shape[0]), _room(h, steps, 0)
    else:
        gates = _input_share(equations, frames, input_weight, input_bias, h, steps, weight)
        kept = _room(h, steps, equations.kept * h.shape[1])
        before, recurrent = _flat(befores), mapped(flat_seen, weight, bias)
        scratch = tuple(torch.empty_like(one) for one in before)
        opened = gates.flatten(0, 1)
        projected = None if frames is None else opened
        equations.forward(projected, recurrent, opened, kept.flatten(0, 1), before, scratch, own)
    through = gates if equations.shared else _room(h, steps, weight.shape[0])
    needs_x, needs_weight, needs_bias, needs_input_weight, needs_input_bias = needs
    d_x = _room(h, steps, joined) if joined and needs_x else None
    for t in reversed(range(steps)):
        before, after = (tuple(one[t] for one in part) for part in (befores, afters))
        state[0].add_(outputs[:, t])
        equations.backward(gates[t], through[t], kept[t], before, after, state, own)
        d_seen = to_input(through[t], seen[t], weight)
        state[0].add_(d_seen[:, joined:])
        if d_x is not None:
            d_x[t] = d_seen[:, :joined]
    d_gates, d_recurrent = gates.flatten(0, 1), through.flatten(0, 1)
    d_weight = d_input_weight = d_input_bias = None
    if needs_weight or (joined and needs_input_weight):
        d_weight = to_weight(d_recurrent, flat_seen, weight)
    if joined and d_weight is not None:
        d_input_weight, d_weight = d_weight.tensor_split([joined], dim=1)
    if frames is not None and input_weight is not None:
        if needs_x:
            d_x = to_input(d_gates, frames, input_weight).unflatten(0, (steps, -1))
        if needs_input_weight:
            d_input_weight = to_weight(d_gates, frames, input_weight)
        if needs_input_bias:
            d_input_bias = to_bias(d_gates)
    d_bias = to_bias(d_recurrent) if needs_bias else None
    d_own = equations.own(d_gates, kept.flatten(0, 1), _flat(befores), _flat(afters), own) if own else ()
    return [d_x, d_weight, d_bias, d_input_weight, d_input_bias, *d_own]


def _joined(equations: Equations, weight: Tensor, input_weight: Tensor | None) -> int:
    """The channels of x if it goes through one map with h, which is quicker where it is fewer blocks of channels; else 0."""
    if input_weight is None or not equations.shared or input_weight.shape[2:] != weight.shape[2:]:
        return 0
    x, h = input_weight.shape[1], weight.shape[1]
    return x if -(-(x + h) // BLOCK) < -(-x // BLOCK) - (-h // BLOCK) else 0


def _layout(like: Tensor) -> torch.memory_format:
    """How frames and the weights of their maps lie: tensor cores take channels side by side, CPUs as well take places."""
    return torch.channels_last if like.is_cuda and like.dim() == 4 else torch.contiguous_format


def _laid(one: Tensor) -> Tensor:
    return one.contiguous(memory_format=_layout(one))


def _flat(states: States) -> States:
    """T B C *space -> T B together."""
    return tuple(one.flatten(0, 1) for one in states)


def _room(like: Tensor, steps: int, channels: int) -> Tensor:
    """T B channels *space, with nothing in it yet."""
    shape = steps * like.shape[0], channels, *like.shape[2:]
    room = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_layout(like))
    return room.unflatten(0, (steps, -1))


def _input_share(
    equations: Equations,
    frames: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
    steps: int,
    recurrent: Tensor,
) -> Tensor:
    """The input's share of the gates of all steps, T B GC *space; without one, room for theirs."""
    if frames is None or weight is None:
        return _room(h, steps, recurrent.shape[0] + equations.beyond * h.shape[1])
    return _laid(mapped(frames, weight, bias)).unflatten(0, (-1, h.shape[0]))
