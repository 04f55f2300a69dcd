"""Anything that answers a past with a Forecast: trained networks and baselines alike.

Axes: B batch, T past frames, S forecast steps, C channels, H W space.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from forecast.batch import Forecast


@runtime_checkable
class Forecaster(Protocol):
    """Past in physical units -> Forecast in physical units; what metrics, figures and nowcasts call."""

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
        """Forecast `steps` frames.

        Args:
            past: B T C H W, physical values; invalid pixels hold the quantity's floor.
            valid: B T C H W bool.
            steps: number of frames to forecast, S.
            static: B K H W.
            time: B int64, issue time in seconds UTC (a sequence number for digits).
            members: ensemble members wanted; 0 for the point forecast alone.
            generator: source of randomness for the members.
        """
        ...
