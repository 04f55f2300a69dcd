"""The plain recurrence's equation in place, with its gradient; that of `forecast.cells.rnn`."""

from typing import ClassVar

from torch import Tensor

from forecast.kernels.activations import Activation
from forecast.kernels.unroll import Equations, States


class RNNEquations(Equations):
    """State h = act(gates)."""

    from_states: ClassVar[bool] = True

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self, gates: Tensor, recurrent: Tensor | None, kept: Tensor, before: States, after: States, own: States
    ) -> None:
        after[0].copy_(self.activation.in_place(gates))

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        self.activation.backward(state[0], after[0], gates)
        state[0].zero_()
