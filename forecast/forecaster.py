"""Anything that answers a past with a Forecast: trained networks and baselines alike.

Axes: B batch, T past frames, S forecast steps, C channels, H W space.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from forecast.batch import Forecast, Frames
from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.heads import Head
from forecast.networks.network import Output
from forecast.streaming import Stream, Trained
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
            past: B T C H W, physical values; invalid pixels hold the quantity's floor. Of a gap that is to be filled first
                the frames before it, then the `after` frames after it.
            valid: B T C H W bool.
            steps: number of frames to forecast, S.
            static: B K H W.
            time: B int64, issue time in seconds UTC (a sequence number for digits).
            members: ensemble members wanted; 0 for the point forecast alone. A forecaster that knows of none gives none.
            generator: its seed and the issue time are the seed of a window's members; nothing is drawn from it, so that
                they are the same in any batch of any process. None: 0.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """A forecaster that must see the past before it can forecast."""

    def prepare(self, batches: Iterable[Frames]) -> None:
        """Sees windows of the training split, once before a test, the same ones in each process."""
        ...


def reads_after(reader: Any) -> int | None:
    """How many frames after those that it forecasts a network or a baseline reads; None: any number is the same to it.

    Its attribute `after` says so; whoever has none knows of no such frames.
    """
    after: int | None = getattr(reader, "after", 0)
    return after


def check_given(name: str, reader: Any, after: int) -> None:
    """Refuses a network or a baseline that would take frames after a gap for its past, or wait for some in vain.

    Raises:
        UserError: it reads more or fewer than the `after` that the data give.
    """
    reads = reads_after(reader)
    if reads not in (None, after):
        raise UserError(
            f"data.after is {after}, but {name} reads {reads} frames after those that it forecasts; set data.after={reads}, "
            "or take model=gap_filler and references=interpolation."
        )


class NetworkForecaster(nn.Module):
    """A trained network as a Forecaster: units, network and head in a row.

    Missing pixels reach the network as the quantity's floor: no echo, no rain.

    Args:
        network: in model space.
        head: what its raw output means.
        transform: physical values <-> model space, increasing.
        thresholds: of the quantity's events; a head that knows their probabilities says them.
    """

    def __init__(self, network: nn.Module, head: Head, transform: Transform, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.transform = transform
        self.thresholds = tuple(thresholds)
        self.trained: Trained | None = None
        """How, as its checkpoint says; None for one that comes from none."""

    def forward(
        self,
        past: Tensor,
        steps: int,
        static: Tensor,
        truth: Tensor | None = None,
        teach: Tensor | None = None,
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
    ) -> Output:
        """Past B T C H W in physical units -> the network's raw output; what training calls.

        Args:
            past, steps, static: as in `predict`.
            truth: B S C H W, physical values, for teaching; invalid pixels hold the quantity's floor.
            teach: B (T+S-2) bool, where the network is fed the truth (`forecast.teaching`); never given in a forecast.
            state: carried from the window before (`forecast.tbptt`).
            first: B bool, lanes that start anew, whatever `state` says.
        """
        more: dict[str, Any] = {} if state is None else {"state": state, "first": first}
        if self.network.feeds_back:
            more["feed"] = self.fed_back
        if teach is not None:
            assert truth is not None
            more |= {"teach": teach, "future": self.transform.forward(truth)}
        return self.network(self.transform.forward(past), steps, static=static, **more)

    def fed_back(self, raw: Tensor) -> Tensor:
        """The frame that raw numbers of one time mean, in model space: B K H W -> B C H W."""
        return self.head.point(raw.unsqueeze(1)).squeeze(1)

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
        return self.read(raw, time, members, generator)

    def read(self, raw: Tensor, time: Tensor, members: int = 0, generator: torch.Generator | None = None) -> Forecast:
        """Raw output B S K H W as a forecast in physical units; the other arguments are those of `Forecaster`."""
        mean = self.transform.inverse(self.head.point(raw))
        exceedance = self.head.exceedance(raw, self.transform.forward(raw.new_tensor(self.thresholds)))
        if not members:
            return Forecast(mean, exceedance=exceedance)
        seed = 0 if generator is None else generator.initial_seed()
        drawn = [
            self.head.members(one, members, torch.Generator(raw.device).manual_seed(_mixed(seed, issue)))
            for one, issue in zip(raw.split(1), time.tolist(), strict=True)
        ]
        known = [one for one in drawn if one is not None]
        return Forecast(mean, self.transform.inverse(torch.cat(known)) if known else None, exceedance)

    def stream(self, static: Tensor) -> Stream:
        """Forecasts of frames that come one by one; carries its state from frame to frame if it was trained to.

        Args:
            static: B K H W, for a batch of radars; K is 0 where the network was trained without.

        Raises:
            UserError: it fills gaps, or comes from no checkpoint, so that nobody knows how it was trained.
        """
        if reads_after(self.network):
            raise UserError(
                "This network fills gaps: it reads frames after those that it forecasts, which no stream has; call predict."
            )
        if self.trained is None:
            raise UserError(
                "This network comes from no checkpoint, so that nobody knows whether it was trained along streams; take it "
                "from forecast.checkpoint.load_forecaster, or say so by forecast.streaming.Stream."
            )
        return Stream(self, self.trained, static)


def _mixed(seed: int, issue: int) -> int:
    """One seed of two numbers; a prime between the seeds keeps neighbouring ones apart."""
    return (seed * 4_294_967_311 + issue) & 0x7FFF_FFFF_FFFF_FFFF
