"""Networks that forecast the next frame, again and again, and are fed with what they forecast.

Axes: B batch, T frames of the past or of a part, S forecast frames, C channels, K head channels, H W space, h w patches.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.networks.network import CellFactory, Output, check, convolutional
from forecast.networks.patches import cut, joined, with_static
from forecast.recurrence import Layer, Stack, each_frame, restart


class RollOut(nn.Module):
    """Reads one frame after the other and answers each with the next one.

        x(t) = truth(t) where it is taught, else feed( raw(t-1) )           t = 0 ... T+S-2; x(0) is the truth
        raw(t) = W h(t),   h(t), state(t) = recurrence( x(t), state(t-1) )  the forecast of time t+1

    W is a 1x1 convolution without bias. Without `teach` the truth is fed over the past, and forecasts after it. All L =
    T+S-1 raw frames are answered, the last S of which are the forecast.

    Frames are cut into patches that become channels; those of any size are taken, continued at the lower and right edge to
    the next size that divides. Static fields are added to every frame that is read, observed or forecast. Pixels that are
    missing hold the quantity's floor, as they do in every past; where they are fed as truth, that is what is fed.

    A subclass is the recurrence: `start` and `run`.

    Args:
        hidden: channels of h.
        outputs: channels that the head wants, K.
        patch: side of the patches (1: pixels as they are).
    """

    frame_size: tuple[int, int] | None = None
    streams = True
    feeds_back = True

    def __init__(self, *, hidden: int, outputs: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.output = nn.Conv2d(hidden, outputs * patch**2, 1, bias=False)

    @abstractmethod
    def start(self, frame: Float[Tensor, "B X h w"]) -> list[State]:
        """The states before the first frame, for frames of patches like this one."""

    @abstractmethod
    def run(
        self, frames: Float[Tensor, "B T X h w"], states: list[State]
    ) -> tuple[Float[Tensor, "B T C h w"], list[State], list[Tensor]]:
        """Reads known frames.

        Args:
            frames: of patches.
            states: before the first of them.

        Returns:
            h after each frame; the states after the last; and what it costs beside the loss (`Output.aux` is its mean).
        """

    # What is read together hangs on what was drawn: torch.compile is to see what lies between.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch says no type
    def forward(
        self,
        past: Float[Tensor, "B T C H W"],
        steps: int,
        *,
        static: Float[Tensor, "B Q H W"],
        state: Sequence[State] | None = None,
        first: Bool[Tensor, " B"] | None = None,
        future: Float[Tensor, "B S C H W"] | None = None,
        teach: Bool[Tensor, "B N"] | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Past frames in model space -> raw output of T+S-1 next frames; the arguments are those of `Network`.

        Args:
            teach: B (T+S-2), on the CPU: entry j says whether the frame read at time j+1 is the truth.
            feed: without it the first C raw channels are the frame.

        Returns:
            `Output.state` is the state after the last frame of the past has been read, so that a window whose past goes on
            from there continues as one uninterrupted forward would.
        """
        B, T, C, H, W = past.shape
        length = T + steps - 1
        if teach is None:
            teach = (torch.arange(length - 1) < T - 1).expand(B, -1)
        elif teach.shape != (B, length - 1):
            raise ValueError(f"teach is {tuple(teach.shape)}; for this batch it must be {(B, length - 1)}.")
        if future is None and bool(teach[:, T - 1 :].any()):
            raise ValueError("Truth is to be fed after the past, but there is no future to feed.")
        truth = past if future is None else torch.cat([past, future], dim=1)
        known = [True, *teach.all(dim=0).tolist()]
        states = self._begin(past, static, state, first)
        after = states
        raw: list[Tensor] = []
        costs: list[Tensor] = []
        for begin, end in [*stretches(known, 0, T), *stretches(known, T, length)]:
            if known[begin]:
                frames = truth[:, begin:end]
            else:
                fed = raw[-1][:, -1]
                fed = fed[:, :C] if feed is None else feed(fed)
                taught = teach[:, begin - 1]
                if taught.any():
                    fed = torch.where(taught.to(fed.device).view(B, 1, 1, 1), truth[:, begin], fed)
                frames = fed.unsqueeze(1)
            hidden, states, more = self.run(self._patches(frames, static), states)
            raw.append(self._pixels(hidden, (H, W)))
            costs += more
            if end == T:
                after = states
        return Output(torch.cat(raw, dim=1), after, torch.stack(costs).mean() if costs else None)

    def _begin(self, past: Tensor, static: Tensor, state: Sequence[State] | None, first: Tensor | None) -> list[State]:
        fresh = self.start(self._patches(past[:, :1], static)[:, 0])
        if state is None:
            return fresh
        if first is None:
            return list(state)
        return [restart(new, old, first) for new, old in zip(fresh, state, strict=True)]

    def _patches(self, frames: Tensor, static: Tensor) -> Tensor:
        """B T C H W and static fields -> B T X h w."""
        return cut(with_static(frames, static), self.patch)

    def _pixels(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        """B T C h w -> B T K H W."""
        return joined(each_frame(self.output, hidden), self.patch, size)


class NextFrame(RollOut):
    """A stack of recurrent layers that forecasts the next frame: OpenSTL's ConvLSTM, with any convolutional cell.

    With LSTM cells of 4 x 128 channels, 5x5 kernels, patches of 4 and no bias it is "ConvLSTM-S" of OpenSTL (Tan et al.
    2023, arXiv 2306.11249), equal to its public code with copied weights: 11,675,648 parameters. OpenSTL counts 15.08 M;
    the rest are weights that it registers and never uses. Nor has its LSTM a forget bias, which it stores without adding.

    Args:
        cell: class of the recurrent cell with its options.
        hidden: channels of each layer, lowest first.
        input_kernel, recurrent_kernel: of the cells, for all layers or for each.
        patch: side of the patches that become channels (1: pixels as they are).
        inputs: channels of a frame, static fields included.
        outputs: channels that the head wants, K.
    """

    def __init__(
        self,
        cell: CellFactory,
        hidden: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        input_kernel: int | Sequence[int] = 3,
        recurrent_kernel: int | Sequence[int] = 3,
        patch: int = 1,
    ) -> None:
        check(hidden, patch)
        super().__init__(hidden=hidden[-1], outputs=outputs, patch=patch)
        cells = convolutional(cell, [inputs * patch**2, *hidden[:-1]], hidden, input_kernel, recurrent_kernel)
        self.stack = Stack([Layer(one) for one in cells])

    def start(self, frame: Float[Tensor, "B X h w"]) -> list[State]:
        """The states before the first frame, one per layer."""
        size = (frame.shape[-2], frame.shape[-1])
        return [layer.initial_state(frame.shape[0], size, frame) for layer in self.stack.layers]

    def run(
        self, frames: Float[Tensor, "B T X h w"], states: list[State]
    ) -> tuple[Float[Tensor, "B T C h w"], list[State], list[Tensor]]:
        """Reads known frames, layer by layer."""
        outputs, states = self.stack.sequence(frames, states)
        return outputs[-1], states, []


def stretches(known: Sequence[bool], begin: int, end: int) -> list[tuple[int, int]]:
    """The times from `begin` to `end` that are read in one go: all where every frame is known, else each by itself."""
    stride = max(1, end - begin) if all(known[begin:end]) else 1
    return [(t, t + stride) for t in range(begin, end, stride)]
