"""Heads: what the raw channels of a network mean.

Axes: B batch, S forecast steps, K head channels (C channels of the quantity times `Head.channels`), P thresholds, H W.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.errors import UserError


class Head(nn.Module):
    """Reads raw output as a forecast in model space."""

    channels: ClassVar[int] = 1
    """Raw channels for each channel of the quantity."""

    def point(self, raw: Float[Tensor, "B S K H W"]) -> Float[Tensor, "B S C H W"]:
        """The point forecast in model space."""
        raise UserError(f"{type(self).__name__} gives no point forecast.")

    def members(
        self, raw: Float[Tensor, "B S K H W"], n: int, generator: torch.Generator | None, temperature: float = 1.0
    ) -> Float[Tensor, "B M S C H W"] | None:
        """Equally likely futures in model space; None where the head knows of one only."""
        return None

    def exceedance(
        self, raw: Float[Tensor, "B S K H W"], thresholds: Float[Tensor, " P"]
    ) -> Float[Tensor, "B P S C H W"] | None:
        """The probability of reaching each threshold (in model space); None where the head knows of none."""
        return None


class Point(Head):
    """The raw number is the forecast."""

    def point(self, raw: Float[Tensor, "B S K H W"]) -> Float[Tensor, "B S C H W"]:
        return raw


class Bernoulli(Head):
    """The raw number is the logit of a pixel being lit; for frames in [0, 1], with the cross-entropy loss."""

    def point(self, raw: Float[Tensor, "B S K H W"]) -> Float[Tensor, "B S C H W"]:
        return torch.sigmoid(raw)

    def members(
        self, raw: Float[Tensor, "B S K H W"], n: int, generator: torch.Generator | None, temperature: float = 1.0
    ) -> Float[Tensor, "B M S C H W"]:
        probability = torch.sigmoid(raw / temperature).unsqueeze(1).expand(-1, n, -1, -1, -1, -1)
        return torch.bernoulli(probability, generator=generator)

    def exceedance(
        self, raw: Float[Tensor, "B S K H W"], thresholds: Float[Tensor, " P"]
    ) -> Float[Tensor, "B P S C H W"]:
        """A lit pixel is 1 and any other 0: all reach a threshold of 0 or less, none one above 1, the lit ones the rest."""
        lit = torch.sigmoid(raw).unsqueeze(1)
        events = thresholds.view(1, -1, 1, 1, 1, 1)
        return torch.where(events > 1, 0.0, torch.where(events > 0, lit, 1.0))
