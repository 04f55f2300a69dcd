"""Many to one: the past is read into a state, and the state is answered by a single frame.

Axes: B batch, T past frames, X input channels, K head channels, H W space.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.networks.network import CellFactory, EncodeThenForecast, check, convolutional
from forecast.networks.patches import cut, joined
from forecast.recurrence import Layer, Stack, restart


class ManyToOne(EncodeThenForecast):
    """A stack of recurrent layers over the past; the last hidden states of all of them become one frame.

        raw = W [h_1(T), ..., h_L(T)]

    W is a 1x1 convolution. There is no recurrence over what is to come: the frame may be that of any lead time, or a mean
    over a longer time (`data.accumulate`).

    Frames are cut into patches that become channels; those of any size are taken, continued at the lower and right edge to
    the next size that divides. Any T; the number of parameters does not depend on it.

    Args:
        cell: class of the recurrent cell with its options.
        hidden: channels of each layer, lowest first.
        steps: frames to forecast, which must be 1.
        inputs: channels of a past frame, static fields included.
        outputs: channels that the head wants, K.
        input_kernel, recurrent_kernel: of the cells, for all layers or for each.
        patch: side of the patches that become channels (1: pixels as they are).
        recompute: steps between the states that are kept for gradients (`forecast.recurrence.through_time`); None: all.

    Raises:
        UserError: more than one frame is to be forecast.
    """

    def __init__(
        self,
        cell: CellFactory,
        hidden: Sequence[int],
        steps: int,
        *,
        inputs: int,
        outputs: int,
        input_kernel: int | Sequence[int] = 3,
        recurrent_kernel: int | Sequence[int] = 3,
        patch: int = 1,
        recompute: int | None = None,
    ) -> None:
        super().__init__()
        self._check(steps)
        check(hidden, patch)
        self.patch = patch
        cells = convolutional(cell, [inputs * patch**2, *hidden[:-1]], hidden, input_kernel, recurrent_kernel)
        self.stack = Stack([Layer(one, recompute=recompute) for one in cells])
        self.output = nn.Conv2d(sum(hidden), outputs * patch**2, 1)

    def encode(
        self,
        past: Float[Tensor, "B T X H W"],
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
    ) -> list[State]:
        """The state after the past, one per layer."""
        x = cut(past, self.patch)
        if state is not None and first is not None:
            size = (x.shape[-2], x.shape[-1])
            fresh = [layer.initial_state(x.shape[0], size, x) for layer in self.stack.layers]
            state = [restart(new, old, first) for new, old in zip(fresh, state, strict=True)]
        return self.stack.sequence(x, state)[1]

    def forecast(self, state: Sequence[State], steps: int, size: tuple[int, int]) -> Float[Tensor, "B S K H W"]:
        """The raw output of one step from a state, for a frame of H x W pixels."""
        self._check(steps)
        hidden = torch.cat([layer[0] for layer in state], dim=1)
        return joined(self.output(hidden).unsqueeze(1), self.patch, size)

    @staticmethod
    def _check(steps: int) -> None:
        if steps != 1:
            raise UserError(
                f"A many-to-one network forecasts one frame, but {steps} are asked for; set data.future=1, or take a model "
                "such as convlstm."
            )
