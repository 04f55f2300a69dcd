"""What every network offers, and what it answers.

Axes: B batch, T past frames, S forecast frames, L frames of raw output, X input channels, K head channels, H W space.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import Cell, State
from forecast.errors import UserError
from forecast.networks.patches import with_static

CellFactory = Callable[..., Cell]
"""A cell's class with its options filled in: still takes input_channels, hidden_channels, kernel sizes, spatial_dims."""


class Output(NamedTuple):
    """What a network answers."""

    raw: Tensor
    """B L K H W, the head's parameters; the last S are the forecast, earlier ones next-frame predictions of the past."""
    state: list[State] | None = None
    """The state after the past, which the next window of the lane may start from; None where none can be carried."""
    aux: Tensor | None = None
    """A scalar term that the network adds to the loss."""


class Network(Protocol):
    """A network. What it cannot do (carry state, be taught) it refuses with a sentence.

    One that fills gaps says by an attribute `after` how many of the frames that it is given, the last ones, follow the gap.
    """

    frame_size: tuple[int, int] | None
    """The only H, W that it takes; None: any."""
    streams: bool
    """Whether its state can be carried from window to window."""
    feeds_back: bool
    """Whether it reads its own forecasts, and can be taught by truth in their place."""

    def __call__(
        self,
        past: Tensor,
        steps: int,
        *,
        static: Tensor,
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
        future: Tensor | None = None,
        teach: Tensor | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Past frames in model space -> raw output.

        Args:
            past: B T X H W.
            steps: frames to forecast, S.
            static: B K H W, added to every frame.
            state: carried from the lane's window before.
            first: B bool, lanes that start anew, whatever `state` says.
            future: B S X H W, the truth, for teaching.
            teach: B (T+S-2) bool, on the CPU, where truth is fed instead of the forecast.
            feed: raw of one time B K H W -> the frame that is fed back.
        """
        ...


class EncodeThenForecast(nn.Module):
    """A network that reads the past into a state, and forecasts from that state alone."""

    frame_size: tuple[int, int] | None = None
    streams = True
    feeds_back = False

    @abstractmethod
    def encode(self, past: Tensor, state: Sequence[State] | None = None, first: Tensor | None = None) -> list[State]:
        """Past B T X H W -> the state after it; `state` and `first` as in `Network`."""

    @abstractmethod
    def forecast(self, state: Sequence[State], steps: int, size: tuple[int, int]) -> Tensor:
        """The raw output B S K H W of S steps from a state, for frames of H x W pixels."""

    def forward(
        self,
        past: Float[Tensor, "B T P H W"],
        steps: int,
        *,
        static: Float[Tensor, "B Q H W"],
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
        future: Tensor | None = None,
        teach: Tensor | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Past frames in model space -> raw output; the arguments are those of `Network`."""
        if teach is not None or feed is not None:
            name = type(self).__name__
            raise UserError(f"{name} feeds nothing back, so that it cannot be taught; remove the teaching schedule.")
        size = (past.shape[-2], past.shape[-1])
        if self.frame_size not in (None, size):
            H, W = self.frame_size
            raise UserError(f"This network takes frames of {H} x {W}; received {size[0]} x {size[1]}.")
        after = self.encode(with_static(past, static), state, first)
        return Output(self.forecast(after, steps, size), after if self.streams else None)


def check(hidden: Sequence[int], patch: int) -> None:
    """Refuses layers without channels and patches without pixels."""
    if not hidden or min(hidden) < 1:
        raise UserError(f"model.network.hidden is {list(hidden)}; give one layer or more of 1 channel or more.")
    if patch < 1:
        raise UserError(f"model.network.patch is {patch}; it must be at least 1 (pixels as they are).")


def per_layer(value: int | Sequence[int], layers: int, name: str) -> list[int]:
    """One number for all layers, or one each."""
    values = [value] * layers if isinstance(value, int) else list(value)
    if len(values) != layers:
        raise UserError(
            f"model.network.{name} has {len(values)} entries for {layers} layers; give one, or one per layer."
        )
    return values


def convolutional(
    cell: CellFactory,
    inputs: Sequence[int],
    hidden: Sequence[int],
    input_kernel: int | Sequence[int],
    recurrent_kernel: int | Sequence[int],
) -> list[Cell]:
    """A cell over fields for each layer.

    Args:
        cell: its class with its options.
        inputs, hidden: channels that each layer reads and keeps, lowest layer first.
        input_kernel, recurrent_kernel: for all layers or for each.
    """
    wide = per_layer(input_kernel, len(hidden), "input_kernel")
    deep = per_layer(recurrent_kernel, len(hidden), "recurrent_kernel")
    return [
        cell(input_channels=x, hidden_channels=h, spatial_dims=2, input_kernel=i, recurrent_kernel=r)
        for x, h, i, r in zip(inputs, hidden, wide, deep, strict=True)
    ]
