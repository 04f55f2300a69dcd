"""Persistence: the weather stays as it is.

Axes: B batch, T past frames, S forecast steps, C channels, H W space, M members.
"""

import torch
from torch import Tensor, nn

from forecast.batch import Forecast


class Persistence(nn.Module):
    """The last frame, repeated: forecast(t + s) = past(t).

    A pixel that is missing in the last frame takes its most recent valid value; one that was never valid keeps the
    quantity's floor, which is what `past` holds there.

    Reference: Germann and Zawadzki (2002), Mon. Wea. Rev. 130, 2859,
    doi 10.1175/1520-0493(2002)130<2859:SDOTPO>2.0.CO;2 (Eulerian persistence).

    Args:
        channels: of the target quantity, the first ones of `past`.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def predict(
        self,
        past: Tensor,
        valid: Tensor,
        steps: int,
        *,
        static: Tensor,
        time: Tensor,
        members: int = 0,
        generator: torch.Generator | None = None,
    ) -> Forecast:
        """Forecast `steps` frames; see `forecast.forecaster.Forecaster`. Members, where wanted, are all the same."""
        past, valid = past[:, :, : self.channels], valid[:, :, : self.channels]
        mean = latest(past, valid).expand(-1, steps, -1, -1, -1)
        # Equal members make the CRPS of this forecast its absolute error, as it should be.
        return Forecast(mean, mean[:, None].expand(-1, members, -1, -1, -1, -1) if members else None)


def latest(past: Tensor, valid: Tensor) -> Tensor:
    """The most recent valid value of each pixel, or what the last frame holds where there is none: B 1 C H W."""
    frames = past.shape[1]
    index = torch.arange(frames, device=past.device).view(1, frames, 1, 1, 1)
    chosen = torch.where(valid, index, -1).amax(dim=1, keepdim=True)
    return past.gather(1, torch.where(chosen < 0, frames - 1, chosen))
