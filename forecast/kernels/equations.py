"""What a cell's equations are to the fast unroll.

Axes: N frames (B of one step, or T B of many), C hidden channels, G gates, *space: none for vectors, up to D H W.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor, ...]


class Equations(ABC):
    """A cell's equations and their gradients, in place, for any number of frames at once."""

    kept: ClassVar[int] = 0
    """Maps of C channels that the gradients need beside the gates and the states."""
    shared: ClassVar[bool] = True
    """Whether the gates open by the sum of the input's and the state's share alone, so that both have one gradient."""
    beyond: ClassVar[int] = 0
    """Gates, of C channels each, that W_h gives nothing to."""
    from_states: ClassVar[bool] = False
    """Whether the gradients need the states alone, and not the gates."""

    @abstractmethod
    def forward(
        self,
        projected: Tensor | None,
        recurrent: Tensor,
        gates: Tensor,
        kept: Tensor,
        before: States,
        after: States,
        own: States,
    ) -> None:
        """One step.

        Args:
            projected: the input's share of the gates, N GC *space; None where there is no input.
            recurrent: W_h * h + b.
            gates: where goes how far they opened, unless gradients come `from_states`; may be `projected` itself.
            kept: N (kept C) *space; where goes what the gradients need beside.
            before: the state before the step, N C *space each.
            after: where the state after it goes.
            own: the cell's own weights.
        """

    @abstractmethod
    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        """The gradients of a step.

        Args:
            gates: as `forward` left them, overwritten by the gradient of what it was given. Where gradients come
                `from_states` there is nothing in them yet.
            recurrent: where the gradient of W_h * h + b goes; the same tensor as `gates` where they are `shared`.
            kept, before, after, own: as `forward` left them.
            state: gradients of the state after the step, overwritten by those of the state before it, without what comes
                through W_h.
        """

    def carry(self, gates: Tensor, others: States) -> States:
        """The states beside h after a step once more, to the last bit, from those before it and how far the gates opened."""
        return ()

    def own(self, gates: Tensor, kept: Tensor, before: States, after: States, own: States) -> States:
        """The gradients of the cell's own weights, from those of the gates of many frames."""
        return ()


class Kernel(NamedTuple):
    """What a cell is to the fast unroll."""

    equations: Equations
    own: States = ()
    """Weights of its own, beside those of its two maps."""
    native: str | None = None
    """The function of torch that has the same equations for vectors."""


class Maps(NamedTuple):
    """The weights of a cell's two maps."""

    weight: Tensor
    bias: Tensor | None
    input_weight: Tensor | None = None
    input_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Maps":
        bias, input_weight, input_bias = (None if one is None else one.to(dtype) for one in self[1:])
        return Maps(self.weight.to(dtype), bias, input_weight, input_bias)


def add_shares(projected: Tensor | None, recurrent: Tensor, gates: Tensor) -> None:
    """The sum of the shares of the gates, into the gates."""
    if projected is None:
        gates.copy_(recurrent)
    else:
        torch.add(projected, recurrent, out=gates)
