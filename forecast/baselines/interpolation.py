"""Interpolation: what is missing between two frames changes evenly from the one to the other.

Axes: B batch, T frames before the gap, A frames after it, S missing frames, C channels, H W space, M members.
"""

import torch
from torch import Tensor, nn

from forecast.batch import Forecast
from forecast.errors import UserError


class Interpolation(nn.Module):
    """Linear in time between the frames around the gap, pixel by pixel.

        forecast(t + s) = past(t) + s / (S+1) * (past(t + S+1) - past(t))        s = 1 ... S

    A pixel that is missing in one of the two frames has the value of the other all the time; one that is missing in both
    keeps the quantity's floor, which is what `past` holds there.

    Args:
        after: frames after the gap that will be given, A.
        channels: of the target quantity, the first ones of `past`.

    Raises:
        UserError: none will be given.
    """

    def __init__(self, after: int, channels: int = 1) -> None:
        super().__init__()
        if after < 1:
            raise UserError(
                f"model=interpolation needs frames on either side of a gap, but data.after is {after}; set data.after=1 or "
                "more, or take model=persistence."
            )
        self.after = after
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
        """The `steps` frames of the gap; see `forecast.forecaster.Forecaster`. Members, where wanted, are all the same."""
        gap = past.shape[1] - self.after
        around = slice(gap - 1, gap), slice(gap, gap + 1)
        before, after = (past[:, one, : self.channels] for one in around)
        seen_before, seen_after = (valid[:, one, : self.channels] for one in around)
        mean = between(torch.where(seen_before, before, after), torch.where(seen_after, after, before), steps)
        return Forecast(mean, mean[:, None].expand(-1, members, -1, -1, -1, -1) if members else None)


def between(before: Tensor, after: Tensor, steps: int) -> Tensor:
    """The `steps` frames that lie evenly between two, both B 1 C H W: B S C H W."""
    share = torch.arange(1, steps + 1, device=before.device, dtype=before.dtype) / (steps + 1)
    return torch.lerp(before, after, share.view(1, steps, 1, 1, 1))
