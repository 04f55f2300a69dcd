"""The flattened LSTM: the encoder-forecaster for those who do not know that pixels have neighbours.

Axes: B batch, T past frames, S forecast frames, X input channels, K head channels, H W space, N tiles, V numbers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.networks.network import CellFactory, EncodeThenForecast
from forecast.recurrence import Layer, Stack, each_frame, restart


class FlatEncoderForecaster(EncodeThenForecast):
    """The FC-LSTM of Srivastava et al. (2015, arXiv 1502.04681) as Shi et al. (2015, arXiv 1506.04214) compare with it.

    Each frame is flattened to a vector. An encoder stack of vector cells reads the past; a forecaster stack takes over
    its states, layer by layer, its first layer without input; a linear map of the last layer gives the frames.

    The weights grow with the square of the number of pixels, so that large grids are refused; with `tile` the grid is cut
    into squares of that side, each forecast by itself with the same weights.

    Args:
        cell: class of the recurrent cell with its options.
        hidden: units of each layer.
        above: units of dense layers on each hidden state, before the next layer (or the output) reads it.
        recompute: steps between the states that are kept for gradients (`forecast.recurrence.through_time`); None: all.
        tile: side of the tiles; None takes the frame whole.
        most_parameters: more than these are refused.
        inputs: channels of a past frame, static fields included.
        outputs: channels that the head wants, K.
        frame_size: H, W of the frames.
    """

    def __init__(
        self,
        cell: CellFactory,
        hidden: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        frame_size: Sequence[int],
        above: Sequence[int] = (),
        recompute: int | None = None,
        tile: int | None = None,
        most_parameters: int = 300_000_000,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1 or (tile is not None and tile < 1):
            raise UserError(
                f"A flattened network needs layers and tiles of 1 or more: hidden={list(hidden)}, tile={tile}."
            )
        self.frame_size = None if tile is not None else (frame_size[0], frame_size[1])
        self.window = (tile, tile) if tile is not None else self.frame_size
        assert self.window is not None
        pixels = self.window[0] * self.window[1]

        read = [above[-1]] * len(hidden) if above else list(hidden)  # of each layer, by the next one

        def stack(first: int) -> Stack:
            below = [first, *read[:-1]]
            cells = (
                cell(input_channels=x, hidden_channels=h, spatial_dims=0) for x, h in zip(below, hidden, strict=True)
            )
            made = Stack([Layer(cell, above=above, recompute=recompute) for cell in cells])
            if first:
                made.ends_in_its_states()
            else:
                made.starts_from_given_states()
            return made

        with torch.device("meta"):
            parts = (stack(inputs * pixels), stack(0), nn.Linear(read[-1], outputs * pixels))
            parameters = sum(weight.numel() for part in parts for weight in part.parameters())
        if parameters > most_parameters:
            raise UserError(
                f"A flattened network on {self.window[0]} x {self.window[1]} pixels has {parameters:,} parameters, more "
                f"than model.network.most_parameters={most_parameters:,}; cut the grid into tiles with "
                "model.network.tile=64, or make model.network.hidden smaller."
            )
        self.outputs = outputs
        self.encoder = stack(inputs * pixels)
        self.forecaster = stack(0)
        self.output = nn.Linear(read[-1], outputs * pixels)

    def encode(
        self, past: Float[Tensor, "B T X H W"], state: Sequence[State] | None = None, first: Tensor | None = None
    ) -> list[State]:
        """The state after the past, one per encoder layer; its batch axis counts tiles."""
        x = self._flatten(past)
        if state is not None and first is not None:
            lanes = first.repeat_interleave(x.shape[0] // first.shape[0])
            fresh = [layer.initial_state(x.shape[0], (), x) for layer in self.encoder.layers]
            state = [restart(new, old, lanes) for new, old in zip(fresh, state, strict=True)]
        return self.encoder.sequence(x, state)[1]

    def forecast(self, state: Sequence[State], steps: int, size: tuple[int, int]) -> Float[Tensor, "B S K H W"]:
        """The raw output of S steps from the encoder's state, for frames of H x W pixels."""
        outputs, _ = self.forecaster.sequence(None, state, steps)
        return self._unflatten(each_frame(self.output, outputs[-1]), size)

    def _flatten(self, past: Tensor) -> Tensor:
        """B T X H W -> BN T V, one row for each tile."""
        assert self.window is not None
        h, w = self.window
        right, lower = -past.shape[-1] % w, -past.shape[-2] % h
        if right or lower:
            past = F.pad(past.flatten(0, 1), (0, right, 0, lower), mode="replicate").unflatten(0, past.shape[:2])
        B, T, X, H, W = past.shape
        tiles = past.view(B, T, X, H // h, h, W // w, w).permute(0, 3, 5, 1, 2, 4, 6)
        return tiles.reshape(-1, T, X * h * w)

    def _unflatten(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """BN S V -> B S K H W."""
        assert self.window is not None
        (h, w), K, S = self.window, self.outputs, vectors.shape[1]
        rows, columns = -(-size[0] // h), -(-size[1] // w)
        tiles = vectors.view(-1, rows, columns, S, K, h, w).permute(0, 3, 4, 1, 5, 2, 6)
        return tiles.reshape(-1, S, K, rows * h, columns * w)[..., : size[0], : size[1]]
