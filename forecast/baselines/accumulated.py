"""Any baseline that forecasts frame by frame, where means of several frames are to be forecast.

Axes: B batch, M members, S means, N frames in each, C channels, H W space.
"""

import torch
from torch import Tensor, nn

from forecast.batch import Forecast
from forecast.forecaster import Forecaster


class Accumulated(nn.Module):
    """The mean of every N frames of a forecast that is N times as long; of members too.

    Probabilities of single frames tell nothing of their mean: it has none but its members'.

    Args:
        forecaster: of frames as they lie in the archive.
        frames: in a mean, N.
    """

    def __init__(self, forecaster: Forecaster, frames: int) -> None:
        super().__init__()
        self.forecaster = forecaster
        self.frames = frames

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
        """Forecast `steps` means; see `forecast.forecaster.Forecaster`."""
        each = self.forecaster.predict(
            past, valid, steps * self.frames, static=static, time=time, members=members, generator=generator
        )
        drawn = None if each.members is None else each.members.unflatten(2, (steps, self.frames)).mean(3)
        return Forecast(each.mean.unflatten(1, (steps, self.frames)).mean(2), drawn)
