"""Long short-term memory, for vectors and for fields (ConvLSTM), with or without peepholes."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import Cell, State, per_channel


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

    The peepholes w_c are one number per channel: the parameter counts printed in 2015 come out only so, and the network
    then takes fields of any size. (Public implementations have one per pixel.)

    References: Hochreiter, Schmidhuber (1997), doi 10.1162/neco.1997.9.8.1735; Gers, Schmidhuber, Cummins (2000), doi
    10.1162/089976600300015015 (forget gate); Gers, Schraudolph, Schmidhuber (2002), JMLR 3, 115 (peepholes); Shi et al.
    (2015), arXiv 1506.04214.

    Args:
        peephole: let i and f look at c(t-1), and o at c(t).
        forget_bias: initial value of b_f; 1 lets a new network remember.
        input_channels, hidden_channels, spatial_dims, input_kernel, recurrent_kernel, learned_initial_state: see `Cell`.
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
        peephole: bool = False,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__(
            input_channels,
            hidden_channels,
            spatial_dims=spatial_dims,
            input_kernel=input_kernel,
            recurrent_kernel=recurrent_kernel,
            learned_initial_state=learned_initial_state,
            gates=4,
        )
        self.peephole = nn.Parameter(torch.zeros(3, hidden_channels)) if peephole else None
        bias = self.recurrent_map.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[hidden_channels : 2 * hidden_channels].fill_(forget_bias)

    def step(self, projected: Float[Tensor, "B GC *space"] | None, state: State) -> State:
        h, c = state
        i, f, g, o = self.add_input(projected, self.recurrent_map(h)).chunk(4, dim=1)
        if self.peephole is not None:
            w_i, w_f, w_o = (per_channel(weight, c) for weight in self.peephole)
            i = i + w_i * c
            f = f + w_f * c
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.peephole is not None:
            o = o + w_o * c
        return torch.sigmoid(o) * torch.tanh(c), c
