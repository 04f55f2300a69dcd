"""The ConvLSTM encoder-forecaster in its two published forms, with any convolutional cell.

Axes: B batch, T past frames, S forecast frames, X input channels, K head channels, C hidden channels, H W space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.networks.network import CellFactory, EncodeThenForecast, per_layer
from forecast.networks.patches import cut, joined
from forecast.recurrence import SLOPE, Layer, Stack, deepened, each_frame, restart


@dataclass(frozen=True)
class Resampling:
    """A strided convolution on the way down, or its transpose on the way up."""

    channels: int
    """It gives."""
    kernel: int
    stride: int
    padding: int

    @classmethod
    def read(cls, name: str, given: Mapping[str, Any]) -> "Resampling":
        if set(given) != set(cls.__dataclass_fields__):
            raise UserError(
                f"model.network.{name} has the keys {', '.join(map(str, given)) or '(none)'}; "
                f"it takes just {', '.join(cls.__dataclass_fields__)}."
            )
        made = cls(**given)
        if min(made.channels, made.kernel, made.stride) < 1 or made.padding < 0:
            raise UserError(
                f"model.network.{name} needs channels, kernel and stride of 1 or more: received {dict(given)}."
            )
        return made

    def down(self, inputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, self.channels, self.kernel, self.stride, self.padding)
        return nn.Sequential(convolution, nn.LeakyReLU(SLOPE))

    def up(self, inputs: int) -> nn.Module:
        transposed = nn.ConvTranspose2d(inputs, self.channels, self.kernel, self.stride, self.padding, bias=False)
        return nn.Sequential(transposed, nn.LeakyReLU(SLOPE))

    def size_down(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def size_up(self, size: int) -> int:
        return (size - 1) * self.stride - 2 * self.padding + self.kernel


class EncoderForecaster(EncodeThenForecast):
    """Reads the past into the states of a stack of recurrent layers; a second stack, started from them, forecasts.

    The **2015 form** (Shi et al. 2015, arXiv 1506.04214; `down` and `up` absent): frames are cut into patches that become
    channels, all layers have the patches' resolution, the forecaster's layers stand in the encoder's order and take over
    their states, its first layer has no input, and a 1x1 convolution reads the hidden states of all its layers.

    The **2017 form** (Shi et al. 2017, arXiv 1706.03458; `down` and `up` given): a strided convolution before each encoder
    layer and its transpose after each forecaster layer, the forecaster in reverse order from the coarsest layer, which
    has no input; then 3x3 convolutions (`refine`) and a 1x1 convolution at full resolution.

    Where the cells have variational dropout, the forecaster goes on with its encoder's masks, as with its states: a mask
    is of a sequence, and past and forecast are one.

    Frames of any size are taken: they are continued at the lower and right edge to the next size that divides, and the
    forecast is cut back. Any T, any S; the number of parameters depends on neither.

    Args:
        cell: class of the recurrent cell with its options.
        hidden: C of each layer, first (finest) layer first.
        input_kernel, recurrent_kernel: of the cells, for all layers or for each.
        patch: side of the patches that become channels (1: pixels as they are).
        down, up: `Resampling` of each layer, finest first; both or neither.
        refine: channels of the 3x3 convolutions after the last up-sampling.
        above: channels of 3x3 convolutions on each hidden state, before the next layer (or the output) reads it.
        recompute: steps between the states that are kept for gradients (`forecast.recurrence.through_time`); None: all.
        coordinates: give every frame three more channels: x and y from -1 to 1, and ones (HKO-7 does).
        inputs: channels of a past frame, static fields included.
        outputs: channels that the head wants, K.
    """

    def __init__(
        self,
        cell: CellFactory,
        hidden: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        input_kernel: int | Sequence[int] = 3,
        recurrent_kernel: int | Sequence[int] = 3,
        patch: int = 1,
        down: Sequence[Mapping[str, Any]] | None = None,
        up: Sequence[Mapping[str, Any]] | None = None,
        refine: Sequence[int] = (),
        above: Sequence[int] = (),
        recompute: int | None = None,
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        depth = len(hidden)
        if depth == 0 or min(hidden) < 1:
            raise UserError(f"model.network.hidden is {list(hidden)}; give one layer or more of 1 channel or more.")
        if patch < 1:
            raise UserError(f"model.network.patch is {patch}; it must be at least 1 (pixels as they are).")
        if (down is None) != (up is None):
            raise UserError("model.network.down and model.network.up go together: give both or neither.")
        if not down and refine:
            raise UserError(
                "model.network.refine belongs to the form with down- and up-sampling; give down and up too."
            )
        self.patch = patch
        self.coordinates = coordinates
        input_kernels = per_layer(input_kernel, depth, "input_kernel")
        recurrent_kernels = per_layer(recurrent_kernel, depth, "recurrent_kernel")
        self.downs = downs = [Resampling.read(f"down[{i}]", given) for i, given in enumerate(down or [])]
        ups = [Resampling.read(f"up[{i}]", given) for i, given in enumerate(up or [])]
        self.multiple = patch * prod(step.stride for step in downs)
        self._check_geometry(depth, downs, ups)

        def layer(i: int, channels: int, before: nn.Module | None = None) -> Layer:
            made = cell(
                input_channels=channels,
                hidden_channels=hidden[i],
                spatial_dims=2,
                input_kernel=input_kernels[i],
                recurrent_kernel=recurrent_kernels[i],
            )
            return Layer(made, before=before, above=above, recompute=recompute)

        read = [above[-1]] * depth if above else list(hidden)  # of each layer, by the next one
        below = [(inputs + 3 * coordinates) * patch**2, *read[:-1]]
        self.output: nn.Module
        if downs:
            finer = range(depth - 2, -1, -1)
            self.encoder = Stack([layer(i, down.channels, down.down(below[i])) for i, down in enumerate(downs)])
            self.forecaster = Stack(
                [layer(depth - 1, 0), *(layer(i, ups[i + 1].channels, ups[i + 1].up(read[i + 1])) for i in finer)]
            )
            widths = [ups[0].channels, *refine]
            self.output = nn.Sequential(
                ups[0].up(read[0]),
                *deepened(widths, spatial_dims=2),
                nn.Conv2d(widths[-1], outputs * patch**2, 1),
            )
        else:
            self.encoder = Stack([layer(i, channels) for i, channels in enumerate(below)])
            self.forecaster = Stack([layer(i, channels) for i, channels in enumerate([0, *read[:-1]])])
            self.output = nn.Conv2d(sum(read), outputs * patch**2, 1)
        self.encoder.ends_in_its_states()
        self.forecaster.starts_from_given_states()

    @staticmethod
    def _check_geometry(depth: int, downs: Sequence[Resampling], ups: Sequence[Resampling]) -> None:
        if not downs:
            return
        if len(downs) != depth or len(ups) != depth:
            raise UserError(
                f"There are {depth} layers, but {len(downs)} entries in model.network.down and {len(ups)} in "
                "model.network.up; give one of each per layer."
            )
        size = 4 * prod(step.stride for step in downs)
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            smaller = down.size_down(size)
            if smaller * down.stride != size or up.size_up(smaller) != size:
                raise UserError(
                    f"model.network.down[{i}] takes {size} pixels to {smaller} and up[{i}] takes them to "
                    f"{up.size_up(smaller)}; choose kernels and paddings that divide by the stride and come back."
                )
            size = smaller

    def encode(
        self,
        past: Float[Tensor, "B T X H W"],
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
    ) -> list[State]:
        """The state after the past, one per encoder layer."""
        x = self._prepare(past)
        if state is not None and first is not None:
            fresh = self._initial(x)
            state = [restart(new, old, first) for new, old in zip(fresh, state, strict=True)]
        return self.encoder.sequence(x, state)[1]

    def forecast(self, state: Sequence[State], steps: int, size: tuple[int, int]) -> Float[Tensor, "B S K H W"]:
        """The raw output of S steps from the encoder's state, for frames of H x W pixels."""
        begin = list(reversed(state)) if self.downs else list(state)
        outputs, _ = self.forecaster.sequence(None, begin, steps)
        read = outputs[-1] if self.downs else torch.cat(outputs, dim=2)
        return joined(each_frame(self.output, read), self.patch, size)

    def _prepare(self, past: Tensor) -> Tensor:
        """Adds coordinates, and cuts the frames into patches."""
        if self.coordinates:
            B, T, _, H, W = past.shape
            y = torch.linspace(-1, 1, H, device=past.device, dtype=past.dtype).view(1, 1, 1, H, 1)
            x = torch.linspace(-1, 1, W, device=past.device, dtype=past.dtype).view(1, 1, 1, 1, W)
            fields = [field.expand(B, T, 1, H, W) for field in (x, y, torch.ones_like(y))]
            past = torch.cat([past, *fields], dim=2)
        return cut(past, self.patch, self.multiple)

    def _initial(self, x: Tensor) -> list[State]:
        """The states that a lane starts from."""
        states: list[State] = []
        H, W = x.shape[-2:]
        for i, layer in enumerate(self.encoder.layers):
            if self.downs:
                H, W = self.downs[i].size_down(H), self.downs[i].size_down(W)
            states.append(layer.initial_state(x.shape[0], (H, W), x))
        return states
