"""PredRNN and PredRNN-V2: next frames from two memories, one of each layer and one that goes through all of them.

Axes: B batch, T frames, C hidden channels, X input channels, h w patches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import State
from forecast.cells.stlstm import STLSTM
from forecast.errors import UserError
from forecast.networks.network import check
from forecast.networks.next_frame import RollOut


class PredRNN(RollOut):
    """A stack of spatiotemporal LSTMs (`forecast.cells.stlstm`) whose spatiotemporal memory goes in a zigzag.

        h_l(t), c_l(t), m_l(t) = ST-LSTM_l( h_l-1(t), h_l(t-1), c_l(t-1), m_l-1(t) )
        h_0(t) = x(t),   m_0(t) = m_N(t-1)                  up through the layers, then to the first of the next time

    V2 (`decoupling` above 0) adds to the loss, while training, how alike the two memories' increments are:

        decoupling * mean of | cos( A * (i . g), A * (i' . g') ) |      over times, layers, samples and channels

    with the cosine over the places of a channel, and A a 1x1 convolution that all layers share. (The paper sums.)

    With 4 x 128 channels, 5x5 kernels and patches of 4 it has the 23,838,720 parameters of the public code without layer
    normalisation, 23,855,104 in V2, and equals it with copied weights. The lane's state is (h, c) of each layer and (m,).

    References: Wang et al. (2017), PredRNN, NeurIPS 30; Wang et al. (2023), IEEE TPAMI 45, 2208, arXiv 2103.09504 (V2).

    Args:
        hidden: channels of each layer, all the same: the memory goes through all of them.
        kernel: of all maps but the 1x1 ones.
        forget_bias: a constant in both forget gates.
        decoupling: weight of the decoupling loss; 0 leaves it out.
        patch: side of the patches that become channels (1: pixels as they are).
        inputs: channels of a frame, static fields included.
        outputs: channels that the head wants, K.
    """

    def __init__(
        self,
        hidden: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        kernel: int = 5,
        forget_bias: float = 1.0,
        decoupling: float = 0.0,
        patch: int = 1,
    ) -> None:
        check(hidden, patch)
        if len(set(hidden)) > 1:
            raise UserError(
                f"model.network.hidden is {list(hidden)}, but PredRNN's memory goes through all layers; give them equally "
                "many channels."
            )
        if decoupling < 0:
            raise UserError(f"model.network.decoupling is {decoupling}; it must be at least 0 (no decoupling loss).")
        super().__init__(hidden=hidden[-1], outputs=outputs, patch=patch)
        self.decoupling = decoupling
        self.cells: Sequence[STLSTM] = nn.ModuleList(  # type: ignore[assignment]  # a ModuleList that holds STLSTMs only
            STLSTM(below, width, spatial_dims=2, input_kernel=kernel, recurrent_kernel=kernel, forget_bias=forget_bias)
            for below, width in zip([inputs * patch**2, *hidden[:-1]], hidden, strict=True)
        )
        self.adapter = nn.Conv2d(hidden[0], hidden[0], 1, bias=False) if decoupling else None

    def start(self, frame: Float[Tensor, "B X h w"]) -> list[State]:
        """Zeros: (h, c) of each layer, and at last (m,)."""
        size = (frame.shape[-2], frame.shape[-1])
        *_, (_, _, memory) = states = [cell.initial_state(frame.shape[0], size, frame) for cell in self.cells]
        return [*((h, c) for h, c, _ in states), (memory,)]

    def run(
        self, frames: Float[Tensor, "B T X h w"], states: list[State]
    ) -> tuple[Float[Tensor, "B T C h w"], list[State], list[Tensor]]:
        """Reads known frames, one after the other through all layers."""
        *layers, (memory,) = states
        hidden, likeness = [], []
        for x in frames.unbind(1):
            for depth, cell in enumerate(self.cells):
                projected = cell.project(x.unsqueeze(1))
                assert projected is not None
                h, c = layers[depth]
                state = (h, c, memory)
                (x, c, memory), gates = cell.step_and_gates(projected[:, 0], state)
                layers[depth] = (x, c)
                if self.adapter is not None and self.training:
                    both = self.adapter(gates["i . g"]), self.adapter(gates["i' . g'"])
                    likeness.append(self.decoupling * alike(*both))
            hidden.append(x)
        return torch.stack(hidden, dim=1), [*layers, (memory,)], likeness


def alike(a: Float[Tensor, "B C h w"], b: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
    """The mean of |cos(a, b)| over samples and channels, each channel a vector of its places: 0 orthogonal, 1 parallel."""
    return F.cosine_similarity(a.flatten(2), b.flatten(2), dim=2).abs().mean()
