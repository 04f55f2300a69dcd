"""Anything that answers a past with a Forecast: trained networks and baselines alike.

Axes: B batch, T past frames, S forecast steps, C channels, H W space.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from forecast.batch import Forecast
from forecast.heads import Head
from forecast.networks.network import Output
from forecast.units import Transform


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


class NetworkForecaster(nn.Module):
    """A trained network as a Forecaster: units, network and head in a row.

    Missing pixels reach the network as the quantity's floor: no echo, no rain.

    Args:
        network: in model space.
        head: what its raw output means.
        transform: physical values <-> model space.
    """

    def __init__(self, network: nn.Module, head: Head, transform: Transform) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.transform = transform

    def forward(self, past: Tensor, steps: int, static: Tensor) -> Output:
        """Past B T C H W in physical units -> the network's raw output; what training calls."""
        return self.network(self.transform.forward(past), steps, static=static)

    @torch.no_grad()
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
        """The forecast in physical units; the arguments are those of `Forecaster`."""
        raw = self(past, steps, static).raw[:, -steps:].float()
        return self.read(raw, members, generator)

    def read(self, raw: Tensor, members: int = 0, generator: torch.Generator | None = None) -> Forecast:
        """Raw output B S K H W as a forecast in physical units."""
        mean = self.transform.inverse(self.head.point(raw))
        if not members:
            return Forecast(mean)
        return Forecast(mean, members=self.transform.inverse(self.head.members(raw, members, generator)))
