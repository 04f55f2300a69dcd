"""Any network in Lagrangian coordinates: the motion is taken out before it and put back after it.

Axes: B batch, T past frames, S forecast frames, X input channels, K head channels, H W space.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.cell import State
from forecast.errors import UserError
from forecast.heads import Head, Point
from forecast.motion import carried, displacement, velocity
from forecast.networks.network import Output


class Lagrangian(nn.Module):
    """Optical flow carries the rain, the network only says how it grows, decays and blurs.

    The velocity of the past frames is estimated (not learned), all past frames are carried to the issue time along it, the
    inner network forecasts how the last of them changes, and what it forecasts is carried to its own time:

        x(t+s) = advect_s( x(t) + network( advect_T-1 x(t-T+1), ..., advect_1 x(t-1), x(t) )_s )

    With an inner network that answers 0 this is extrapolation, but for what comes in from outside the frame: that is what
    lies at its edge.

    Reference: Ritvanen et al. (2023), IEEE JSTARS 16, 1654, doi 10.1109/JSTARS.2023.3238016. Their L-CNN forecasts
    derivatives in time by a U-Net in Lagrangian coordinates; ours forecasts the change since the issue time, by any network.

    Args:
        network: the inner network.
        head: of its raw numbers, which have to be frames.

    Raises:
        UserError: another head.
    """

    streams = False
    feeds_back = False

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        if not isinstance(head, Point):
            raise UserError(
                f"model.lagrangian adds the forecast to the last frame, but the raw numbers of {type(head).__name__} are no "
                "frames; set model.head._target_=forecast.heads.Point."
            )
        self.network = network
        self.frame_size: tuple[int, int] | None = network.frame_size  # type: ignore[assignment]  # a Network is a Module with it

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
        if state is not None or teach is not None or feed is not None:
            raise UserError("A network in Lagrangian coordinates carries no state and cannot be taught.")
        earlier, last = past[:, :-1], past[:, -1:]
        age = earlier.shape[1]
        come = displacement(velocity(past[:, :, 0]), max(age, steps))
        aligned = torch.cat([carried(earlier, come[:, :age].flip(1)), last], dim=1)
        output = self.network(aligned, steps, static=static)
        change = output.raw[:, -steps:]
        raw = carried(last[:, :, : change.shape[2]] + change, come[:, :steps])
        return Output(raw, aux=output.aux)
