"""Gated recurrent units, for vectors and for fields (ConvGRU), in the three forms that are in use."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import Cell, Gates, State, linear_map
from forecast.errors import UserError
from forecast.kernels.activations import ACTIVATIONS
from forecast.kernels.equations import Kernel
from forecast.kernels.gru import GRUResetAfter, GRUResetBefore, GRUWithoutReset

RESETS = ("after", "before", "none")


class GRU(Cell):
    """Gated recurrent unit.

        z = sigmoid(W_xz * x + W_hz * h + b_z)                     update gate: 1 keeps the state
        r = sigmoid(W_xr * x + W_hr * h + b_r)                     reset gate
        n = act(W_xn * x + b_xn + r . (W_hn * h + b_hn))           candidate, reset="after"
        n = act(W_xn * x + W_hn * (r . h) + b_n)                   candidate, reset="before"
        n = act(W_xn * x + W_hn * h + b_n)                         candidate, reset="none", without r
        h' = z . h + (1 - z) . n                                   hidden state

    `*` is a matrix product for `spatial_dims=0`, a convolution otherwise; `.` is a product element by element. The gates
    come in the order r, z, n (z, n without a reset gate). "after" is torch.nn.GRU and HKO-7's ConvGRU: it alone has a
    bias on the input map too, since its candidate adds the two at different places. "before" is the form of Cho et al.

    References: Cho et al. (2014), arXiv 1406.1078; Ballas et al. (2016), arXiv 1511.06432 (convolutional); Shi et al.
    (2017), arXiv 1706.03458 (HKO-7; leaky ReLU of slope 0.2 as activation).

    Args:
        reset: "after" the recurrent map, "before" it, or "none".
        activation: of the candidate: "tanh", "relu" or "leaky_relu" (slope 0.2).
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
        reset: str = "after",
        activation: str = "tanh",
    ) -> None:
        if reset not in RESETS:
            raise UserError(f"Unknown reset {reset!r}; choose one of {', '.join(RESETS)}.")
        if activation not in ACTIVATIONS:
            raise UserError(f"Unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
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
            gates=2 if reset == "none" else 3,
            recurrent_gates=2 if reset == "before" else None,
            input_bias=reset == "after",
        )
        self.reset = reset
        self.activation = ACTIVATIONS[activation]
        self.candidate_map: nn.Module | None = None
        if reset == "before":
            self.candidate_map = linear_map(
                hidden_channels,
                hidden_channels,
                spatial_dims=spatial_dims,
                kernel=recurrent_kernel,
                bias=True,
                norm=norm,
            )

    def kernel(self) -> Kernel:
        if self.candidate_map is not None:
            weights = cast(nn.Linear, self.candidate_map)  # or a ConvNd
            return Kernel(GRUResetBefore(self.activation), (weights.weight, weights.bias))
        if self.reset == "none":
            return Kernel(GRUWithoutReset(self.activation))
        return Kernel(GRUResetAfter(self.activation), native="gru" if self.activation.name == "tanh" else None)

    def equations(
        self, projected: Float[Tensor, "B GC *space"] | None, state: State, seen: Tensor
    ) -> tuple[State, Gates]:
        (h,) = state
        recurrent = self.recurrent_map(seen)
        if self.reset == "none":
            z, n = self.add_input(projected, recurrent).chunk(2, dim=1)
            n = self.activation.plain(n)
            z = torch.sigmoid(z)
            return (n + z * (h - n),), {"z": z}
        C = self.hidden_channels
        gates_x, candidate_x = (None, None) if projected is None else projected.split([2 * C, C], dim=1)
        r, z = torch.sigmoid(self.add_input(gates_x, recurrent[:, : 2 * C])).chunk(2, dim=1)
        candidate_h = r * recurrent[:, 2 * C :] if self.candidate_map is None else self.candidate_map(r * seen)
        n = self.activation.plain(self.add_input(candidate_x, candidate_h))
        return (n + z * (h - n),), {"r": r, "z": z}
