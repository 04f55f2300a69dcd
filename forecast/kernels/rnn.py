"""The plain recurrence's equation in place, with its gradient; that of `forecast.cells.rnn`."""

from typing import ClassVar

from torch import Tensor

from forecast.kernels import single_pass
from forecast.kernels.activations import Activation
from forecast.kernels.equations import Equations, States, add_shares


class RNNEquations(Equations):
    """State h = act(gates)."""

    from_states: ClassVar[bool] = True

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

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
        if single_pass.available(gates.device):
            single_pass.launch("rnn_forward", gates, (projected, recurrent), after, SLOPE=self.activation.slope)
            return
        add_shares(projected, recurrent, gates)
        after[0].copy_(self.activation.in_place(gates))

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        if single_pass.available(gates.device):
            single_pass.launch("rnn_backward", gates, after, (gates, state[0]), SLOPE=self.activation.slope)
            return
        self.activation.backward(state[0], after[0], gates)
        state[0].zero_()
