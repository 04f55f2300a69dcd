"""Streams: frames come one by one, as from a radar, and a forecast can be had after each.

A network that was trained along streams (`forecast.tbptt`) carries its state from frame to frame: each frame is read once,
and the forecast starts from a state that has seen the whole past. One that was trained on windows has never met a state
older than its window, and drifts when it is carried on; it reads its last frames anew for every forecast instead, as many
as it was trained on. benchmarks/drift.py measures both.

Axes: B batch (one radar each), T past frames, S forecast frames, C channels, K static fields, H W space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from forecast.batch import Forecast
from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.files import whole
from forecast.networks.network import EncodeThenForecast, Output
from forecast.units import Transform, transform_to_dict

KEY = "stormcell.stream"


@dataclass(frozen=True)
class Trained:
    """How a network was trained, as far as its streams hang on it."""

    on_streams: bool
    """With its state carried from window to window."""
    window: int
    """Past frames of a window, T."""
    cadence: int | None
    """Seconds between frames; None where frames have no time."""


class Source(Protocol):
    """What a stream asks of a `forecast.forecaster.NetworkForecaster`."""

    network: nn.Module
    transform: Transform

    def __call__(self, past: Tensor, steps: int, static: Tensor, *, state: Sequence[State] | None) -> Output: ...

    def fed_back(self, raw: Tensor) -> Tensor: ...

    def read(self, raw: Tensor, time: Tensor, members: int, generator: torch.Generator | None) -> Forecast: ...

    def predict(
        self,
        past: Tensor,
        valid: Tensor,
        steps: int,
        *,
        static: Tensor,
        time: Tensor,
        members: int,
        generator: torch.Generator | None,
    ) -> Forecast: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


class Carried(NamedTuple):
    """What is kept of the past by a network that carries its state."""

    state: list[State]
    raw: Tensor
    """The raw output of the next frame, B 1 K H W."""


class Window(NamedTuple):
    """What is kept of the past by a network that reads its last frames anew."""

    past: Tensor
    known: Tensor
    """Both B T C H W, as `Forecaster.predict` takes them; T grows up to the trained length."""


class Stream:
    """Reads frames one by one, and forecasts from the last one on whenever it is asked to.

    A network that carries its state reads each frame once, when it comes, and none for a forecast; the forecast is that of
    the whole past read from its first frame. Any other has the forecast of its last frames (a network that takes no fewer
    than it was trained on refuses until they are there).

    Frames follow each other without a gap: neither a state nor a window was trained across one. After a gap `restart`;
    a frame that came with every pixel missing is a frame, and is pushed as such. Radars of one batch share their gaps;
    those that do not have a stream each.

    Args:
        forecaster: in evaluation mode. Its stream lives on the device that its network is on now.
        trained: how it was.
        static: B K H W.
    """

    def __init__(self, forecaster: Source, trained: Trained, static: Tensor) -> None:
        self.forecaster = forecaster
        self.trained = trained
        self.carries = trained.on_streams and bool(forecaster.network.streams)
        self.static = static.to(next(forecaster.network.parameters()).device)
        self.memory: Carried | Window | None = None
        self.time: Tensor | None = None
        """Of the last frame, B int64."""

    @torch.no_grad()
    def push(self, frame: Tensor, valid: Tensor, time: Tensor) -> None:
        """Reads the next frame.

        Args:
            frame: B C H W, physical values; invalid pixels hold the quantity's floor.
            valid: B C H W bool.
            time: B int64, seconds UTC (a sequence number for digits).

        Raises:
            UserError: the frame does not follow the last one, is of another size, or holds what is no number. The stream
                is as it was.
        """
        self._check(frame, valid, time)
        frame, valid = (one.to(self.static.device).unsqueeze(1) for one in (frame, valid))
        before = self.memory
        if self.carries:
            state = before.state if isinstance(before, Carried) else None
            output = self.forecaster(frame, 1, self.static, state=state)
            assert output.state is not None
            self.memory = Carried(output.state, output.raw)
        elif isinstance(before, Window):
            begin = max(0, before.past.shape[1] + 1 - self.trained.window)
            both = zip(before, (frame, valid), strict=True)
            self.memory = Window(*(torch.cat([old[:, begin:], new], dim=1) for old, new in both))
        else:
            self.memory = Window(frame.clone(), valid.clone())
        self.time = time.clone()

    @torch.no_grad()
    def forecast(self, steps: int, members: int = 0, generator: torch.Generator | None = None) -> Forecast:
        """What follows the last frame, in physical units.

        Args:
            steps: number of frames, S.
            members, generator: as in `forecast.forecaster.Forecaster`; the issue time is that of the last frame.

        Raises:
            UserError: no frame was pushed, or too few of them for this network.
        """
        if self.memory is None or self.time is None:
            raise UserError("This stream has read no frame; push one before a forecast is asked for.")
        if steps < 1:
            raise UserError(f"A forecast of {steps} frames was asked for; give 1 or more.")
        if isinstance(self.memory, Carried):
            return self.forecaster.read(self._ahead(self.memory, steps).float(), self.time, members, generator)
        past, known = self.memory
        return self.forecaster.predict(
            past, known, steps, static=self.static, time=self.time, members=members, generator=generator
        )

    def restart(self) -> None:
        """Forgets the past, as after a gap in time: the next frame is the first."""
        self.memory = self.time = None

    def save(self, path: Path) -> None:
        """Writes what is kept of the past, whole or not at all."""
        memory = None if self.memory is None else tuple(self.memory)
        with whole(path) as temporary:
            torch.save({KEY: self._identity(), "time": self.time, "memory": memory}, temporary)

    def restore(self, path: Path) -> None:
        """Goes on from what `save` wrote, with the same forecasts to the last bit.

        Raises:
            UserError: there is no such file, or it is of another network, of other static fields, or no stream at all.
        """
        if not path.is_file():
            raise UserError(f"There is no stream {path}; save one there first, or start without it.")
        try:
            content = torch.load(path, map_location=self.static.device, weights_only=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{path} is not a whole file of tensors and plain values: {reason}") from None
        if not isinstance(content, dict) or KEY not in content:
            raise UserError(f"{path} is not the stream of a network; give the path that a stream was saved to.")
        if content[KEY] != self._identity():
            raise UserError(
                f"{path} was saved by a stream of another network, or of other radars or static fields; their states mean "
                "nothing to this one: start it without them."
            )
        memory = content["memory"]
        self.memory = None if memory is None else (Carried if self.carries else Window)(*memory)
        self.time = content["time"]

    def _ahead(self, memory: Carried, steps: int) -> Tensor:
        """The raw output of the next frames, B S K H W."""
        network = self.forecaster.network
        if isinstance(network, EncodeThenForecast):
            return network.forecast(memory.state, steps, (self.static.shape[-2], self.static.shape[-1]))
        if steps == 1:
            return memory.raw
        # A roll-out has forecast the next frame when it read the last one: that is what it reads now.
        feed = self.forecaster.fed_back
        numbers = feed(memory.raw[:, 0]).unsqueeze(1)
        rest = network(numbers, steps - 1, static=self.static, state=memory.state, feed=feed).raw
        return torch.cat([memory.raw, rest], dim=1)

    def _check(self, frame: Tensor, valid: Tensor, time: Tensor) -> None:
        B, _, H, W = self.static.shape
        if frame.dim() != 4 or (frame.shape[0], *frame.shape[2:]) != (B, H, W) or valid.shape != frame.shape:
            raise UserError(
                f"A frame of shape {tuple(frame.shape)} with a mask of {tuple(valid.shape)} was pushed; this stream reads "
                f"({B}, channels, {H}, {W}) of both, as its static fields have it."
            )
        if not frame.isfinite().all():
            raise UserError(
                "A frame with NaN or infinity was pushed, which would stay in the stream; give missing pixels the "
                "quantity's floor, as Quantity.decode does, and leave them out of the mask."
            )
        if time.shape != (B,):
            raise UserError(f"Times of shape {tuple(time.shape)} were pushed; give one for each of the {B} frames.")
        cadence = self.trained.cadence
        if cadence is None or self.time is None:
            return
        for last, now in zip(self.time.tolist(), time.tolist(), strict=True):
            if now - last != cadence:
                raise UserError(
                    f"A frame of {_clock(now)} was pushed after one of {_clock(last)}, but this network knows frames "
                    f"{cadence} s apart; push those between, or restart the stream."
                )

    def _identity(self) -> str:
        """16 hexadecimal digits of all that gives a memory its meaning: the weights, the units, and the static fields."""
        terms: Mapping[str, Any] = {**transform_to_dict(self.forecaster.transform), **asdict(self.trained)}
        digest = blake2b(repr(sorted(terms.items())).encode(), digest_size=8)
        for name, numbers in [*self.forecaster.state_dict().items(), ("static", self.static)]:
            digest.update(f"{name} {tuple(numbers.shape)} {numbers.dtype} ".encode())
            digest.update(numbers.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _clock(time: int) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"
