"""The spatiotemporal LSTM: a memory that goes through time, and one that goes through depth."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import Cell, Gates, State, linear_map


class STLSTM(Cell):
    """Spatiotemporal LSTM (ST-LSTM) of PredRNN.

        i = sigmoid(W_xi * x + W_hi * h)        i' = sigmoid(W'_xi * x + W_mi * m)           input gates
        f = sigmoid(W_xf * x + W_hf * h + b)    f' = sigmoid(W'_xf * x + W_mf * m + b)       forget gates
        g = tanh(W_xg * x + W_hg * h)           g' = tanh(W'_xg * x + W_mg * m)              candidates
        c' = f . c + i . g                      m' = f' . m + i' . g'                        the two memories
        o = sigmoid(W_xo * x + W_ho * h + W_o * [c', m'])                                    output gate
        h' = o . tanh(W_1x1 * [c', m'])                                                      hidden state

    `*` is a matrix product for `spatial_dims=0`, a convolution otherwise; `.` is a product element by element; [,] stands
    for side by side. The input map gives i, f, g, i', f', g', o, the recurrent map i, f, g, o, and the memory's i', f', g'.
    State: (h, c, m). m is the memory that the cell is given: its own of the step before, or in PredRNN that of the layer
    below.

    As in the authors' code for Moving-MNIST, o looks at the new c and m, no map has a bias, the forget gates have a
    constant one, and there is no layer normalisation, whose weights there are one per pixel and fix the frame size.

    References: Wang et al. (2017), PredRNN, NeurIPS 30; Wang et al. (2023), IEEE TPAMI 45, 2208, arXiv 2103.09504.

    Args:
        forget_bias: b, a constant; 1 lets a new network remember.
        input_channels, hidden_channels, spatial_dims, input_kernel, recurrent_kernel, learned_initial_state: see `Cell`;
            maps of the memories have the recurrent kernel.
    """

    states: ClassVar[int] = 3

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        *,
        spatial_dims: int = 0,
        input_kernel: int = 3,
        recurrent_kernel: int = 3,
        learned_initial_state: bool = False,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__(
            input_channels,
            hidden_channels,
            spatial_dims=spatial_dims,
            input_kernel=input_kernel,
            recurrent_kernel=recurrent_kernel,
            learned_initial_state=learned_initial_state,
            gates=7,
            recurrent_gates=4,
            bias=False,
        )
        self.forget_bias = forget_bias
        C = hidden_channels

        def map_of(inputs: int, outputs: int, kernel: int) -> nn.Module:
            return linear_map(inputs, outputs, spatial_dims=spatial_dims, kernel=kernel, bias=False)

        self.memory_map = map_of(C, 3 * C, recurrent_kernel)
        self.output_map = map_of(2 * C, C, recurrent_kernel)
        self.fusion_map = map_of(2 * C, C, 1)

    def equations(
        self, projected: Float[Tensor, "B GC *space"] | None, state: State, seen: Tensor
    ) -> tuple[State, Gates]:
        _, c, m = state
        C = self.hidden_channels
        x_c, x_m, x_o = (None, None, None) if projected is None else projected.split([3 * C, 3 * C, C], dim=1)
        h_c, h_o = self.recurrent_map(seen).split([3 * C, C], dim=1)
        c, of_c = self._remember(c, self.add_input(x_c, h_c))
        m, of_m = self._remember(m, self.add_input(x_m, self.memory_map(m)))
        both = torch.cat([c, m], dim=1)
        o = torch.sigmoid(self.add_input(x_o, h_o) + self.output_map(both))
        gates = dict(zip(("i", "f", "i . g", "i'", "f'", "i' . g'", "o"), (*of_c, *of_m, o), strict=True))
        return (o * torch.tanh(self.fusion_map(both)), c, m), gates

    def _remember(self, memory: Tensor, gates: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The memory after the gates i, f, g; and i, f, and what was added to it."""
        i, f, g = gates.chunk(3, dim=1)
        i, f = torch.sigmoid(i), torch.sigmoid(f + self.forget_bias)
        added = i * torch.tanh(g)
        return f * memory + added, (i, f, added)
