"""The plain recurrent cell, for vectors and for fields."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from forecast.cells.cell import Cell, Gates, State
from forecast.errors import UserError
from forecast.kernels.activations import ACTIVATIONS
from forecast.kernels.equations import Kernel
from forecast.kernels.rnn import RNNEquations

CHOICES = ("tanh", "relu")


class RNN(Cell):
    """h(t) = act(W_x * x(t) + W_h * h(t-1) + b).

    `*` is a matrix product for `spatial_dims=0`, a convolution otherwise. With `activation="tanh"` and vectors this is
    torch.nn.RNN with the sum of its two biases.

    Reference: Elman (1990), Cognitive Science 14, 179, doi 10.1207/s15516709cog1402_1.

    Args:
        activation: "tanh" or "relu".
        input_channels, hidden_channels, spatial_dims, input_kernel, recurrent_kernel, learned_initial_state, zoneout,
            dropout, norm: see `Cell`.
    """

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        *,
        spatial_dims: int = 0,
        input_kernel: int = 3,
        recurrent_kernel: int = 3,
        learned_initial_state: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        dropout: float = 0.0,
        norm: int | None = None,
        activation: str = "tanh",
    ) -> None:
        super().__init__(
            input_channels,
            hidden_channels,
            spatial_dims=spatial_dims,
            input_kernel=input_kernel,
            recurrent_kernel=recurrent_kernel,
            learned_initial_state=learned_initial_state,
            zoneout=zoneout,
            dropout=dropout,
            norm=norm,
        )
        if activation not in CHOICES:
            raise UserError(f"Unknown activation {activation!r}; choose one of {', '.join(CHOICES)}.")
        self.activation = ACTIVATIONS[activation]

    def kernel(self) -> Kernel:
        return Kernel(RNNEquations(self.activation), native=f"rnn_{self.activation.name}")

    def equations(
        self, projected: Float[Tensor, "B C *space"] | None, state: State, seen: Tensor
    ) -> tuple[State, Gates]:
        return (self.activation.plain(self.add_input(projected, self.recurrent_map(seen))),), {}
