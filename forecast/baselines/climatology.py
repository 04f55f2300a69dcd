"""Climatology: what is usual, the same everywhere and at all times.

Axes: B batch, M members, P thresholds, S forecast steps, C channels, H W space.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.units import Quantity

BITS = 20
"""The first ones of a float32: sign, exponent and 11 of the mantissa. Values that share them share a bin, 0.05 % wide."""


class Climatology(nn.Module):
    """The distribution of what came in the training windows, all valid pixels together, as the forecast for each pixel.

    mean = sum of values / n;  exceedance(u) = share of values >= u;  member i of M = quantile at (i - 1/2) / M, which is
    the ensemble of M equally likely values with the least CRPS.

    Mean and exceedance are exact. A quantile is the mean of the bin that it falls in; a bin spans 0.05 % of its values, so
    that those of packed numbers have one each, and then the quantile is exact too. Memory does not grow with the data.

    Reference: Bröcker (2012), Q. J. R. Meteorol. Soc. 138, 1611, doi 10.1002/qj.1891 (the quantiles).

    Args:
        quantity: of the frames; its thresholds are those of the exceedance.
        channels: of the target quantity, the first ones of `past`.
    """

    after: int | None = None
    """Frames after a gap that it reads: any number is the same to it, as it looks at none."""

    def __init__(self, quantity: Quantity, channels: int = 1) -> None:
        super().__init__()
        self.quantity = quantity
        self.channels = channels
        self._counts: Tensor | None = None  # pixels up to each of self._values

    def prepare(self, batches: Iterable[Frames]) -> None:
        """Looks at the training split, once before a test; what was seen before is forgotten.

        Args:
            batches: decoded; their truth counts, where it is valid.

        Raises:
            UserError: there is no valid pixel.
        """
        counts = torch.zeros(2**BITS, dtype=torch.int64)
        sums = torch.zeros(2**BITS, dtype=torch.float64)
        events = torch.zeros(len(self.quantity.thresholds), dtype=torch.int64)
        for batch in batches:
            # Summed on the CPU, where the order is always the same.
            values = batch.truth[:, :, : self.channels][batch.valid[:, :, : self.channels]].float().cpu()
            bins = (values.view(torch.int32) >> (32 - BITS)) & (2**BITS - 1)
            counts += torch.bincount(bins, minlength=len(counts))
            sums += torch.bincount(bins, values.double(), minlength=len(sums))
            for number, threshold in enumerate(self.quantity.thresholds):
                events[number] += (values >= threshold).sum()
        total = int(counts.sum())
        if total == 0:
            raise UserError("The training split has no valid pixel, so there is no climatology; leave climatology out.")
        filled = counts > 0
        means = (sums[filled] / counts[filled]).float()
        order = means.argsort()
        self._values = means[order]
        self._counts = counts[filled][order].cumsum(0)
        self._mean = (sums.sum(0, keepdim=True) / total).float()
        self._exceedance = (events / total).float()

    def quantiles(self, members: int) -> Tensor:
        """Of the levels (i - 1/2) / M, i = 1..M: the least values that so many pixels do not exceed.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        counts = self._prepared()
        # In whole numbers, (2 i - 1) n / 2 M rounded up, so that no level falls on the wrong side of a step.
        ranks = ((2 * torch.arange(members) + 1) * counts[-1] + 2 * members - 1) // (2 * members)
        return self._values[torch.searchsorted(counts, ranks)]

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
        """Forecast `steps` frames; see `forecast.forecaster.Forecaster`. Members are quantiles: nothing is drawn.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        self._prepared()
        batch, size = past.shape[0], (steps, self.channels, *past.shape[-2:])

        def everywhere(levels: Tensor) -> Tensor:
            """N numbers as B N S C H W, without a copy for each pixel."""
            return levels.to(past.device).view(1, len(levels), 1, 1, 1, 1).expand(batch, -1, *size)

        return Forecast(
            everywhere(self._mean)[:, 0],
            everywhere(self.quantiles(members)) if members else None,
            everywhere(self._exceedance),
        )

    def _prepared(self) -> Tensor:
        if self._counts is None:
            raise RuntimeError("Climatology knows nothing before prepare(batches) has shown it the training split.")
        return self._counts
