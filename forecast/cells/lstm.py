"""Long short-term memory, for vectors and for fields (ConvLSTM), with or without peepholes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import Cell, Gates, State, per_channel
from forecast.errors import UserError
from forecast.kernels.equations import Kernel
from forecast.kernels.lstm import LSTMEquations


class LSTM(Cell):
    """Long short-term memory. With `spatial_dims=2` this is the ConvLSTM of Shi et al. (2015).

        i = sigmoid(W_xi * x + W_hi * h + w_ci . c + b_i)          input gate
        f = sigmoid(W_xf * x + W_hf * h + w_cf . c + b_f)          forget gate
        g = tanh(W_xg * x + W_hg * h + b_g)                        candidate
        c' = f . c + i . g                                         cell state
        o = sigmoid(W_xo * x + W_ho * h + w_co . c' + b_o)         output gate
        h' = o . tanh(c')                                          hidden state

    `*` is a matrix product for `spatial_dims=0`, a convolution otherwise; `.` is a product element by element. The maps
    give the gates in the order i, f, g, o, as torch.nn.LSTM does; without peepholes the vector cell is torch.nn.LSTM with
    the sum of its two biases. State: (h, c).

    With `norm` the cell state, too, is normalised before it goes out: h' = o . tanh(norm(c')), as in Ba et al. (2016).

    The peepholes w_c are one number per channel: the parameter counts printed in 2015 come out only so, and the network
    then takes fields of any size. (Public implementations have one per pixel.)

    References: Hochreiter, Schmidhuber (1997), doi 10.1162/neco.1997.9.8.1735; Gers, Schmidhuber, Cummins (2000), doi
    10.1162/089976600300015015 (forget gate); Gers, Schraudolph, Schmidhuber (2002), JMLR 3, 115 (peepholes); Shi et al.
    (2015), arXiv 1506.04214; Ba et al. (2016), arXiv 1607.06450 (normalisation).

    Args:
        peephole: let i and f look at c(t-1), and o at c(t).
        forget_bias: initial value of b_f; 1 lets a new network remember.
        bias: whether there are b_i, b_f, b_g and b_o.
        input_channels, hidden_channels, spatial_dims, input_kernel, recurrent_kernel, learned_initial_state, zoneout,
            dropout, norm: see `Cell`.
    """

    states: ClassVar[int] = 2

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
        peephole: bool = False,
        forget_bias: float = 1.0,
        bias: bool = True,
    ) -> None:
        if forget_bias and not bias:
            raise UserError(
                f"An LSTM with bias=false has no forget gate's bias, but forget_bias is {forget_bias}; set it to 0."
            )
        if norm is not None and not bias:
            raise UserError("Normalisation brings a bias: set norm to null, or bias to true.")
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
            gates=4,
            bias=bias,
        )
        self.peephole = nn.Parameter(torch.zeros(3, hidden_channels)) if peephole else None
        self.state_norm = None if norm is None else nn.GroupNorm(norm, hidden_channels)
        if bias:
            biases = self.recurrent_map.get_parameter("bias" if norm is None else "norm.bias")
            with torch.no_grad():
                biases[hidden_channels : 2 * hidden_channels].fill_(forget_bias)

    def kernel(self) -> Kernel:
        if self.peephole is None:
            return Kernel(LSTMEquations(), native="lstm")
        return Kernel(LSTMEquations(), (self.peephole,))

    def equations(
        self, projected: Float[Tensor, "B GC *space"] | None, state: State, seen: Tensor
    ) -> tuple[State, Gates]:
        _, c = state
        i, f, g, o = self.add_input(projected, self.recurrent_map(seen)).chunk(4, dim=1)
        if self.peephole is not None:
            w_i, w_f, w_o = (per_channel(weight, c) for weight in self.peephole)
            i = i + w_i * c
            f = f + w_f * c
        i, f = torch.sigmoid(i), torch.sigmoid(f)
        c = f * c + i * torch.tanh(g)
        if self.peephole is not None:
            o = o + w_o * c
        o = torch.sigmoid(o)
        h = o * torch.tanh(c if self.state_norm is None else self.state_norm(c))
        return (h, c), {"i": i, "f": f, "o": o}
