"""Some steps of a recurrence, there and back.

Axes: B batch, T time, N frames (those of all steps, time first), X input channels, C hidden channels, G gates, *space: none
for vectors, up to D H W.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from forecast.kernels.equations import Equations, Maps, States
from forecast.kernels.frames import blank, laid_out, room
from forecast.kernels.maps import mapped, to_bias, to_input, to_weight


class Asked(NamedTuple):
    """Of what gradients are asked for."""

    x: bool
    weight: bool
    bias: bool
    input_weight: bool
    input_bias: bool


class Stretch(NamedTuple):
    """Steps, and what is known of them."""

    seen: Tensor
    """What the recurrent map reads at each step, and what it would after the last: T+1 B C *space, or (X+C) with x."""
    frames: Tensor | None
    """The input N X *space, where it has a map of its own."""
    others: States
    """The states beside h before the first step."""
    rest: bool
    """Whether the state before the first step is zeros, of which nobody asks gradients."""


class Recurrence(NamedTuple):
    """A cell's equations and weights."""

    equations: Equations
    maps: Maps
    """The recurrent one reads x too where they are joined."""
    own: States
    """Weights of its own."""
    joined: int
    """Channels of x that the recurrent map reads before those of h."""

    def room(self, stretch: Stretch, steps: int) -> tuple[Tensor, Tensor]:
        """For gates, T B GC *space, with the input's share in it where that has a map; and for what is kept beside."""
        h, (weight, _, input_weight, input_bias) = stretch.seen[0, :, self.joined :], self.maps
        if stretch.frames is None or input_weight is None:
            gates = room(h, steps, weight.shape[0] + self.equations.beyond * h.shape[1])
        else:
            gates = laid_out(mapped(stretch.frames, input_weight, input_bias)).unflatten(0, (-1, h.shape[0]))
        return gates, room(h, steps, self.equations.kept * h.shape[1])

    def forward(
        self, stretch: Stretch, gates: Tensor, kept: Tensor, recurrent: Tensor | None = None
    ) -> Iterator[States]:
        """Goes through steps, one at a time.

        Args:
            stretch: the steps; h goes into `seen` after each, unless it is there already.
            gates, kept: what `room` gave; where it is for one step alone, each step takes the place of the one before.
            recurrent: W_h * h + b of all steps, T B GC *space, where h is there already.

        Yields:
            The states beside h after each step.
        """
        seen, _, others, rest = stretch
        hidden = seen[:, :, self.joined :]
        for t in range(len(seen) - 1):
            if recurrent is None:
                share, h_after = self._share(seen[t], rest and t == 0), hidden[t + 1]
            else:
                share, h_after = recurrent[t], blank(hidden[t])
            after = tuple(blank(one) for one in others)
            opened, beside = gates[t % len(gates)], kept[t % len(kept)]
            projected = None if self.maps.input_weight is None else opened
            self.equations.forward(projected, share, opened, beside, (hidden[t], *others), (h_after, *after), self.own)
            yield after
            others = after

    def backward(
        self, stretch: Stretch, made: States, outputs: Tensor, state: States, asked: Asked
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Goes back through steps.

        Args:
            stretch: the steps.
            made: how far the gates opened, T B GC *space, and what was kept beside, overwritten; or nothing.
            outputs: the gradients of h after each step, B T C *space.
            state: gradients of the state after the last step, overwritten by those of the state before the first; of one at
                rest, without what comes through W_h.
            asked: for what.

        Returns:
            The gradients of x, T B X *space, and of the weights: the maps', and the cell's own. None if not asked for.
        """
        seen, frames, _, rest = stretch
        equations, joined, (weight, _, input_weight, _) = self.equations, self.joined, self.maps
        hidden, steps = seen[:, :, joined:], len(seen) - 1
        gates, kept, trail = self._known(stretch, made)
        through = gates if equations.shared else room(hidden[0], steps, weight.shape[0])
        d_x = room(hidden[0], steps, joined) if joined and asked.x else None
        for t in reversed(range(steps)):
            state[0].add_(outputs[:, t])
            before, after = (hidden[t], *trail[t]), (hidden[t + 1], *trail[t + 1])
            equations.backward(gates[t], through[t], kept[t], before, after, state, self.own)
            if rest and t == 0:
                if d_x is not None:
                    d_x[t] = to_input(through[t], seen[t, :, :joined], weight[:, :joined])
                break
            d_seen = to_input(through[t], seen[t], weight)
            state[0].add_(d_seen[:, joined:])
            if d_x is not None:
                d_x[t] = d_seen[:, :joined]
        d_gates, d_recurrent = gates.flatten(0, 1), through.flatten(0, 1)
        d_weight = d_input_weight = d_input_bias = None
        if asked.weight or (joined and asked.input_weight):
            # Zeros give nothing to a weight's gradient.
            first = int(rest and not joined)
            d_weight = to_weight(through[first:].flatten(0, 1), seen[first:-1].flatten(0, 1), weight)
        if joined and d_weight is not None:
            d_input_weight, d_weight = d_weight.tensor_split([joined], dim=1)
        if frames is not None and input_weight is not None:
            d_x = to_input(d_gates, frames, input_weight).unflatten(0, (steps, -1)) if asked.x else None
            d_input_weight = to_weight(d_gates, frames, input_weight) if asked.input_weight else None
            d_input_bias = to_bias(d_gates) if asked.input_bias else None
        d_bias = to_bias(d_recurrent) if asked.bias else None
        d_own: States = ()
        if self.own:
            befores, afters = (
                (part.flatten(0, 1), *(torch.cat(one) for one in zip(*passed, strict=True)))
                for part, passed in ((hidden[:-1], trail[:-1]), (hidden[1:], trail[1:]))
            )
            d_own = equations.own(d_gates, kept.flatten(0, 1), befores, afters, self.own)
        return d_x, [d_weight, d_bias, d_input_weight, d_input_bias, *d_own]

    def _share(self, seen: Tensor, rest: bool) -> Tensor:
        """What the recurrent map gives at a step: from rest without W_h * 0."""
        weight, bias, *_ = self.maps
        if not rest:
            return mapped(seen, weight, bias)
        if self.joined:
            return mapped(seen[:, : self.joined], weight[:, : self.joined], bias)
        constant = weight.new_zeros(len(weight)) if bias is None else bias
        return constant.view(1, -1, *(1,) * (seen.dim() - 2)).expand(len(seen), -1, *seen.shape[2:])

    def _known(self, stretch: Stretch, made: States) -> tuple[Tensor, Tensor, list[States]]:
        """The gates, what is kept beside, and the states beside h before each step and after the last."""
        seen, _, others, _ = stretch
        steps, trail = len(seen) - 1, [others]
        if made:
            gates, kept = made
            for opened in gates:
                trail.append(self.equations.carry(opened, trail[-1]))
            return gates, kept, trail
        if self.equations.from_states:
            h = seen[0, :, self.joined :]
            return room(h, steps, len(self.maps.weight)), room(h, steps, 0), trail * (steps + 1)
        gates, kept = self.room(stretch, steps)
        recurrent = mapped(seen[:-1].flatten(0, 1), self.maps.weight, self.maps.bias).unflatten(0, (steps, -1))
        return gates, kept, trail + list(self.forward(stretch, gates, kept, recurrent))
