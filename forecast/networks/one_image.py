"""One image to any number of frames: the states of a forecaster are made from a single frame.

Axes: B batch, S forecast frames, X input channels, K head channels, C hidden channels, H W space, h w patches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.networks.network import CellFactory, EncodeThenForecast, check, convolutional
from forecast.networks.patches import cut, joined
from forecast.recurrence import Layer, Stack, deepened, each_frame


class OneImage(EncodeThenForecast):
    """A convolutional encoder of one image, and the forecaster of a ConvLSTM encoder-forecaster, which has no input.

        e = convolutions( x(0) )                                                3x3, each with a leaky ReLU
        h_l(0) = tanh( V_l e ),   c_l(0) = W_l e                                1x1; for any further state as for c
        h_l(s), c_l(s) = cell_l( h_l-1(s), h_l(s-1), c_l(s-1) )                 s = 1 ... S; layer 1 reads nothing
        raw(s) = U [h_1(s), ..., h_L(s)]                                        1x1

    tanh puts h where hidden states lie. Frames are cut into patches that become channels, at whose resolution everything
    is; those of any size are taken, continued at the lower and right edge to the next size that divides. Any S; the number
    of parameters does not depend on it.

    Reference: Vinyals et al. (2015), arXiv 1411.4555 (one image to a sequence, there of words); Shi et al. (2015), arXiv
    1506.04214 (the forecaster).

    Args:
        frames: of the past, which must be one.
        cell: class of the recurrent cell with its options. Its learned initial state is left out: the image gives it.
        hidden: C of each layer, the one that has no input first.
        widths: channels of the encoder's convolutions.
        input_kernel, recurrent_kernel: of the cells, for all layers or for each.
        patch: side of the patches (1: pixels as they are).
        inputs: channels of a frame, static fields included.
        outputs: channels that the head wants, K.

    Raises:
        UserError: more than one frame, or a layer without channels.
    """

    streams = False

    def __init__(
        self,
        frames: int,
        cell: CellFactory,
        hidden: Sequence[int],
        widths: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        input_kernel: int | Sequence[int] = 3,
        recurrent_kernel: int | Sequence[int] = 3,
        patch: int = 1,
    ) -> None:
        super().__init__()
        if frames != 1:
            raise UserError(
                f"model=one_image reads one image, but data.past is {frames}; set data.past=1, or take a model such as "
                "convlstm."
            )
        self.frames = frames
        check(hidden, patch)
        if not widths or min(widths) < 1:
            raise UserError(
                f"model.network.widths is {list(widths)}; give one convolution or more of 1 channel or more."
            )
        self.patch = patch
        self.encoder = deepened([inputs * patch**2, *widths], spatial_dims=2)
        cells = convolutional(cell, [0, *hidden[:-1]], hidden, input_kernel, recurrent_kernel)
        self.begin = nn.ModuleList(nn.Conv2d(widths[-1], one.states * one.hidden_channels, 1) for one in cells)
        self.forecaster = Stack([Layer(one) for one in cells])
        self.forecaster.starts_from_given_states()
        self.output = nn.Conv2d(sum(hidden), outputs * patch**2, 1)

    def encode(
        self, past: Float[Tensor, "B T X H W"], state: Sequence[State] | None = None, first: Tensor | None = None
    ) -> list[State]:
        """The state that the image gives, one per layer; the arguments are those of `EncodeThenForecast`, T is 1."""
        if state is not None:
            raise UserError("A network of one image carries no state; take a model such as convlstm.")
        if past.shape[1] != self.frames:
            raise UserError(
                f"A network of one image reads one frame; received {past.shape[1]}: give the last one alone."
            )
        encoded = self.encoder(cut(past, self.patch)[:, 0])
        return [
            self._state(layer, begin(encoded)) for layer, begin in zip(self.forecaster.layers, self.begin, strict=True)
        ]

    def forecast(self, state: Sequence[State], steps: int, size: tuple[int, int]) -> Float[Tensor, "B S K H W"]:
        """The raw output of S steps from the image's state, for frames of H x W pixels."""
        outputs, _ = self.forecaster.sequence(None, state, steps)
        return joined(each_frame(self.output, torch.cat(outputs, dim=2)), self.patch, size)

    @staticmethod
    def _state(layer: Layer, made: Float[Tensor, "B GC h w"]) -> State:
        """A layer's state of what the image says; where there is dropout, with a mask of the cell's own."""
        cell = layer.forward_cell
        assert cell is not None
        h, *others = made.chunk(cell.states, dim=1)
        mask = cell.initial_state(len(made), tuple(made.shape[2:]), made)[cell.states :]
        return (torch.tanh(h), *others, *mask)
