"""Losses, all masked: a pixel that is missing, or a sample that is padding, weighs nothing.

Axes: B batch, S forecast steps, C channels, K head channels, H W space.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.errors import UserError
from forecast.heads import Bernoulli, Head

REDUCTIONS = ("pixel", "frame", "sequence")


class Loss(nn.Module):
    """A sum over pixels of some cost, averaged over what is valid.

    Args:
        head: what the raw numbers mean.
        reduction: "pixel": the mean over valid pixels. "frame" and "sequence": that mean times the number of pixels of
            a frame (of a sequence), so the sum over its pixels where all are valid; the papers' losses are such sums.
    """

    units: str | None = None
    """The only units of data that it makes sense for; None: any."""

    def __init__(self, head: Head, reduction: str = "pixel") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise UserError(f"Unknown loss.reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}.")
        self.head = head
        self.reduction = reduction

    @abstractmethod
    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        """The cost of each pixel, B S C H W."""

    def forward(
        self,
        raw: Float[Tensor, "B S K H W"],
        target: Float[Tensor, "B S C H W"],
        valid: Bool[Tensor, "B S C H W"],
        physical: Float[Tensor, "B S C H W"],
    ) -> Float[Tensor, ""]:
        """Scores a raw forecast.

        Args:
            raw: what the network answers.
            target: the truth in model space.
            valid: where the truth is known.
            physical: the truth in physical units; weights are chosen on it.
        """
        # Before the cost, too: 0 times NaN is NaN, and the gradient would have it.
        target, physical = (torch.where(valid, field, 0.0) for field in (target, physical))
        cost = torch.where(valid, self.cost(raw.float(), target, physical), 0.0)
        mean = cost.sum() / valid.sum().clamp_min(1)
        if self.reduction == "pixel":
            return mean
        return mean * (target[0, 0].numel() if self.reduction == "frame" else target[0].numel())


class MeanSquaredError(Loss):
    """(forecast - truth)^2 in model space."""

    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        return (self.head.point(raw) - target).square()


class MeanAbsoluteError(Loss):
    """|forecast - truth| in model space."""

    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        return (self.head.point(raw) - target).abs()


class CrossEntropy(Loss):
    """-(t log p + (1 - t) log(1 - p)) for frames t in [0, 1], with p the sigmoid of the raw number.

    Shi et al. (2015, arXiv 1506.04214) print its sum over a sequence: `reduction: sequence`. Goes with `heads.Bernoulli`.
    """

    units = "1"

    def __init__(self, head: Head, reduction: str = "pixel") -> None:
        super().__init__(head, reduction)
        if not isinstance(head, Bernoulli):
            raise UserError(
                f"The cross-entropy loss needs the head forecast.heads.Bernoulli, but model.head is {type(head).__name__}; "
                "set model.head._target_=forecast.heads.Bernoulli."
            )

    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(raw, target, reduction="none")


class Balanced(Loss):
    """B-MSE and B-MAE: squared and absolute error, weighted by how hard it rains.

        scale * mean of w(R) (mse (x - t)^2 + mae |x - t|)

    w is chosen on the true rain R in physical units, the errors are in model space. With the default weights, the
    transform `Decibel(relation=hko7)` and `reduction: frame` this is the loss of HKO-7 (Shi et al. 2017, arXiv 1706.03458):
    weights 1, 2, 5, 10, 30 at and above 0.5 (1 below), 2, 5, 10 and 30 mm/h. It over-forecasts: watch the frequency bias.

    Args:
        units: of the thresholds; other data are refused.
        thresholds: ascending.
        weights: at and above each threshold; below the first the weight is 1.
        mse, mae: share of the squared and of the absolute error.
        scale: of the whole; HKO-7 has 1e-5 to keep sums over frames small.
    """

    def __init__(
        self,
        head: Head,
        reduction: str = "pixel",
        thresholds: Sequence[float] = (0.5, 2.0, 5.0, 10.0, 30.0),
        weights: Sequence[float] = (1.0, 2.0, 5.0, 10.0, 30.0),
        mse: float = 1.0,
        mae: float = 1.0,
        scale: float = 1.0,
        units: str = "mm/h",
    ) -> None:
        super().__init__(head, reduction)
        self.units = units
        if len(thresholds) != len(weights) or list(thresholds) != sorted(thresholds):
            raise UserError(
                f"loss.thresholds must ascend and have one of loss.weights each; received {list(thresholds)} and "
                f"{list(weights)}."
            )
        self.register_buffer("thresholds", torch.tensor(list(thresholds)), persistent=False)
        self.register_buffer("weights", torch.tensor([1.0, *weights]), persistent=False)
        self.mse = mse
        self.mae = mae
        self.scale = scale

    thresholds: Tensor
    weights: Tensor

    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        error = self.head.point(raw) - target
        # right=True counts the thresholds that are at or below the value: `>=`, as everywhere.
        weight = self.weights[torch.bucketize(physical, self.thresholds, right=True)]
        return self.scale * weight * (self.mse * error.square() + self.mae * error.abs())


class Quantile(Loss):
    """Pinball loss: least where the forecast is the quantile of level tau of what may come.

        max(tau (t - x), (tau - 1) (t - x))

    A pixel then reaches a threshold where the probability of the event is above 1 - tau. CSI is largest where that is
    CSI / (1 + CSI), half of the F1 score (Lipton et al. 2014): tau above one half, by as much as the forecast is uncertain.
    With tau = 0.5 it is half the absolute error, whose forecast of rain fades.

    Reference: Koenker and Bassett (1978), Econometrica 46, 33, doi 10.2307/1913643; Lipton, Elkan, Naryanaswamy (2014),
    arXiv 1402.1892.

    Args:
        level: tau, between 0 and 1.
    """

    def __init__(self, head: Head, reduction: str = "pixel", level: float = 0.65) -> None:
        super().__init__(head, reduction)
        if not 0 < level < 1:
            raise UserError(f"loss.level is {level}; a quantile lies between 0 and 1.")
        self.level = level

    def cost(self, raw: Tensor, target: Tensor, physical: Tensor) -> Tensor:
        error = target - self.head.point(raw)
        return torch.maximum(self.level * error, (self.level - 1) * error)
