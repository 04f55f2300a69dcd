"""What every network offers, and what it answers.

Axes: B batch, T past frames, S forecast frames, L frames of raw output, X input channels, K head channels, H W space.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from forecast.cells.cell import Cell, State
from forecast.errors import UserError

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
    """A network. What it cannot do (carry state, be taught) it refuses with a sentence."""

    frame_size: tuple[int, int] | None
    """The only H, W that it takes; None: any."""
    streams: bool
    """Whether its state can be carried from window to window."""

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
            teach: B (T+S-2) bool, where truth is fed instead of the forecast.
            feed: raw of one time B K H W -> the frame that is fed back.
        """
        ...


def refuse_feedback(name: str, teach: Tensor | None, feed: Callable[[Tensor], Tensor] | None) -> None:
    """For networks that never see their own output."""
    if teach is not None or feed is not None:
        raise UserError(f"{name} feeds nothing back, so that it cannot be taught; remove the teaching schedule.")


def per_layer(value: int | Sequence[int], layers: int, name: str) -> list[int]:
    """One number for all layers, or one each."""
    values = [value] * layers if isinstance(value, int) else list(value)
    if len(values) != layers:
        raise UserError(
            f"model.network.{name} has {len(values)} entries for {layers} layers; give one, or one per layer."
        )
    return values
