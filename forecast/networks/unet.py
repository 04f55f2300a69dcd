"""The U-Net: frames as channels, down and up again with what was seen on the way; no recurrence.

Axes: B batch, T past frames, S forecast frames, X input channels, K head channels, H W space.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.networks.network import Output

SLOPE = 0.2  # of the leaky ReLU


def convolutions(inputs: int, outputs: int) -> nn.Module:
    """Two 3x3 convolutions at one resolution."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE)),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE)),
    )


class UNet(nn.Module):
    """The trained baseline without memory: a U-Net (Ronneberger et al. 2015) over the past frames as channels.

    As in RainNet (Ayzel et al. 2020), two 3x3 convolutions at each resolution, max-pooling on the way down,
    nearest-neighbour up-sampling and skip connections on the way up. It differs: all S frames are forecast at once, where
    RainNet forecasts one and is fed with it; the ReLU is leaky, there is no dropout, and frames may be cut into patches that
    become channels.

    Frames of any size are taken: they are continued at the lower and right edge to the next size that divides, and the
    forecast is cut back.

    Reference: Ayzel, Scheffer, Heistermann (2020), Geosci. Model Dev. 13, 2631, doi 10.5194/gmd-13-2631-2020; Ronneberger
    et al. (2015), arXiv 1505.04597.

    Args:
        frames: past frames that it reads, T; of a longer past the last ones.
        steps: frames that it forecasts at once, S.
        widths: channels at each resolution, finest first.
        patch: side of the patches that become channels (1: pixels as they are).
        inputs: channels of a past frame, static fields included.
        outputs: channels that the head wants, K.
    """

    frame_size: tuple[int, int] | None = None
    streams = False
    feeds_back = False

    def __init__(
        self,
        frames: int,
        steps: int,
        widths: Sequence[int] = (32, 64, 128),
        patch: int = 1,
        *,
        inputs: int,
        outputs: int,
    ) -> None:
        super().__init__()
        if min(frames, steps, patch, *widths, len(widths)) < 1:
            raise UserError(
                f"A U-Net needs frames, steps, patch and widths of 1 or more: received {frames}, {steps}, {patch} and "
                f"{list(widths)}."
            )
        self.frames = frames
        self.steps = steps
        self.patch = patch
        self.outputs = outputs
        self.multiple = patch * 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(
            convolutions(below, width) for below, width in pairwise([frames * inputs * patch**2, *widths])
        )
        self.up = nn.ModuleList(convolutions(fine + coarse, fine) for fine, coarse in pairwise(widths))
        self.output = nn.Conv2d(widths[0], steps * outputs * patch**2, 1)

    def forward(
        self,
        past: Float[Tensor, "B T P H W"],
        steps: int,
        *,
        static: Float[Tensor, "B Q H W"],
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
        future: Tensor | None = None,
        teach: Tensor | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Past frames in model space -> raw output; the arguments are those of `Network`."""
        if state is not None or teach is not None or feed is not None:
            raise UserError("A U-Net has no memory: it carries no state and cannot be taught.")
        if past.shape[1] < self.frames or steps > self.steps:
            raise UserError(
                f"This U-Net reads {self.frames} past frames and forecasts {self.steps} at most; received {past.shape[1]}, "
                f"and {steps} are asked for: set model.network.frames and model.network.steps, and train it anew."
            )
        if static.shape[1]:
            past = torch.cat([past, static.unsqueeze(1).expand(-1, past.shape[1], -1, -1, -1)], dim=2)
        raw = self._forecast(past[:, -self.frames :])
        return Output(raw[:, :steps])

    def _forecast(self, past: Tensor) -> Tensor:
        """S frames at once."""
        H, W = past.shape[-2:]
        x = F.pad(past.flatten(1, 2), (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        x = F.pixel_unshuffle(x, self.patch)
        seen: list[Tensor] = []
        for depth, convolve in enumerate(self.down):
            x = convolve(x if depth == 0 else F.max_pool2d(x, 2))
            seen.append(x)
        for fine, convolve in reversed(list(zip(seen[:-1], self.up, strict=True))):
            x = convolve(torch.cat([fine, F.interpolate(x, scale_factor=2.0)], dim=1))
        raw = F.pixel_shuffle(self.output(x), self.patch)[..., :H, :W]
        return raw.unflatten(1, (self.steps, self.outputs))
