"""The gap filler: frames before and after a gap are read from both sides, and every missing frame is answered.

Axes: B batch, T frames before the gap, S in it, A after it, X input channels, K head channels, C hidden channels, H W space.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.heads import Head, Point
from forecast.motion import carried, displacement, velocity
from forecast.networks.network import CellFactory, Output, check, convolutional
from forecast.networks.patches import cut, joined, with_static
from forecast.recurrence import Layer, Stack, each_frame


class GapFiller(nn.Module):
    """A bidirectional recurrence over the whole sequence, aligned in time: as many answers as there are missing frames.

        x(t) = [frame(t), 1] where a frame is given, [0, 0] in the gap           t = 1 ... T+S+A
        h(t) = forward and backward hidden states of all layers, which read x(1) ... x(T+S+A)
        raw(T+s) = blend(T+s) + W h(T+s)                                         s = 1 ... S

    W is a 1x1 convolution. The blend is that of the two frames around the gap, each carried to time T+s along the optical
    flow (`blended`): what moves is not learned, and the network says how the truth differs from it. The further channel
    that tells given frames from blank ones lets 0 be a value, too. Static fields are known in the gap as well.

    Frames are cut into patches that become channels; those of any size are taken, continued at the lower and right edge to
    the next size that divides. Any T, any S; the number of parameters depends on neither.

    References: Schuster, Paliwal (1997), IEEE Trans. Signal Process. 45, 2673, doi 10.1109/78.650093 (bidirectional
    recurrence); Anagnostou, Krajewski (1999), J. Atmos. Oceanic Technol. 16, 189 (rain between two scans, carried, blended).

    Args:
        cell: class of the recurrent cell with its options; each layer has one for each direction.
        hidden: channels of a direction in each layer, lowest first.
        after: frames after the gap, A: the last ones of those given.
        head: of the raw numbers, which have to be frames.
        inputs: channels of a frame, static fields included.
        outputs: channels that the head wants, K.
        input_kernel, recurrent_kernel: of the cells, for all layers or for each.
        patch: side of the patches that become channels (1: pixels as they are).
        recompute: steps between the states that are kept for gradients (`forecast.recurrence.through_time`); None: all.

    Raises:
        UserError: no frame after the gap, or another head.
    """

    frame_size: tuple[int, int] | None = None
    streams = False
    feeds_back = False

    def __init__(
        self,
        cell: CellFactory,
        hidden: Sequence[int],
        after: int,
        *,
        head: Head,
        inputs: int,
        outputs: int,
        input_kernel: int | Sequence[int] = 3,
        recurrent_kernel: int | Sequence[int] = 3,
        patch: int = 1,
        recompute: int | None = None,
    ) -> None:
        super().__init__()
        if after < 1:
            raise UserError(
                f"A gap filler reads frames on either side of a gap, but data.after is {after}; set data.after=1 or more, "
                "or take a model such as convlstm."
            )
        if not isinstance(head, Point):
            raise UserError(
                f"A gap filler adds to the frames around the gap, but the raw numbers of {type(head).__name__} are no "
                "frames; set model.head._target_=forecast.heads.Point."
            )
        check(hidden, patch)
        self.after = after
        self.patch = patch
        below = [inputs * patch**2 + 1, *(2 * width for width in hidden[:-1])]
        ways = (convolutional(cell, below, hidden, input_kernel, recurrent_kernel) for _ in range(2))
        self.stack = Stack([Layer(*both, recompute=recompute) for both in zip(*ways, strict=True)])
        self.output = nn.Conv2d(2 * sum(hidden), outputs * patch**2, 1)

    def forward(
        self,
        past: Float[Tensor, "B TA P H W"],
        steps: int,
        *,
        static: Float[Tensor, "B Q H W"],
        state: Sequence[State] | None = None,
        first: Tensor | None = None,
        future: Tensor | None = None,
        teach: Tensor | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Given frames in model space, those after the gap last -> raw output; the arguments are those of `Network`."""
        if state is not None or teach is not None or feed is not None:
            raise UserError("A gap filler carries no state and cannot be taught.")
        T = past.shape[1] - self.after
        if T < 1:
            raise UserError(
                f"A gap filler reads {self.after} frames after the gap and 1 or more before it; received {past.shape[1]} in "
                "all."
            )
        before, after = past[:, :T], past[:, T:]
        blank = past.new_zeros(past.shape[0], steps, *past.shape[2:])
        x = cut(with_static(torch.cat([before, blank, after], dim=1), static), self.patch)
        known = x.new_ones(x.shape[0], x.shape[1], 1, *x.shape[3:])
        known[:, T : T + steps] = 0
        outputs, _ = self.stack.sequence(torch.cat([x, known], dim=2))
        hidden = torch.cat(outputs, dim=2)[:, T : T + steps]
        change = joined(each_frame(self.output, hidden), self.patch, (past.shape[-2], past.shape[-1]))
        return Output(blended(before[:, :, : change.shape[2]], after[:, :, : change.shape[2]], steps) + change)


def blended(before: Float[Tensor, "B T C H W"], after: Float[Tensor, "B A C H W"], steps: int) -> Tensor:
    """The two frames around a gap, carried to each time in it and blended: B S C H W.

        blend(T+s) = (1 - a) advect( frame(T), s v ) + a advect( frame(T+S+1), -(S+1-s) v ),   a = s / (S+1)

    v is the mean of the velocities on both sides; that of the one where the other has a single frame, and that from the one
    to the other where both have.
    """
    sides = [velocity(side[:, :, 0]) for side in (before, after) if side.shape[1] > 1]
    across = [] if sides else [velocity(torch.cat([before, after], dim=1)[:, :, 0]) / (steps + 1)]
    v = torch.stack(sides + across).mean(0)
    begin = carried(before[:, -1:].expand(-1, steps, -1, -1, -1), displacement(v, steps))
    end = carried(after[:, :1].expand(-1, steps, -1, -1, -1), displacement(-v, steps).flip(1))
    share = torch.arange(1, steps + 1, device=begin.device, dtype=begin.dtype) / (steps + 1)
    return torch.lerp(begin, end, share.view(1, steps, 1, 1, 1))
