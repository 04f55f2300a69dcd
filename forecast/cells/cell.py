"""What every recurrent cell is: a share of the gates from the input, another from the state, and a step.

Axes: B batch, T time, C channels (of the input X or hidden), G gates, *space: none for vectors, up to D H W.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forecast.cells.regularity import check, normalised, sequence_mask, share_of_each, zone_out
from forecast.errors import UserError
from forecast.kernels.equations import Kernel, Maps

State = tuple[Tensor, ...]
"""What a cell carries from step to step, each B C *space; state[0] is the hidden state h, its output.

With variational dropout the mask of the sequence is its last part, B C with an axis of size 1 for each of space.
"""

PARTS = "hcm"
"""What the tensors of a state are called: hidden state, cell state, memory."""

Gates = dict[str, Tensor]
"""The gates of a step (in an STLSTM what they let in, too), each B C *space, by its name in the cell's equations."""

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def linear_map(
    inputs: int, outputs: int, *, spatial_dims: int, kernel: int, bias: bool, norm: int | None = None
) -> nn.Module:
    """The cell's W: a matrix for vectors, a convolution that keeps the size for fields; normalised in `norm` groups."""
    if norm is not None:
        plain = linear_map(inputs, outputs, spatial_dims=spatial_dims, kernel=kernel, bias=False)
        return normalised(plain, outputs, norm)
    if spatial_dims == 0:
        return nn.Linear(inputs, outputs, bias=bias)
    if spatial_dims not in CONVOLUTIONS:
        raise UserError(f"spatial_dims is {spatial_dims}; it must be 0 (vectors), 1, 2 or 3.")
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"A recurrence needs kernels of odd size, so that fields keep theirs; received {kernel}.")
    return CONVOLUTIONS[spatial_dims](inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class Cell(nn.Module):
    """One time step of a recurrence.

    All gates come from one input map and one recurrent map. The bias sits on the recurrent map, so that a cell without
    input (a forecaster's first layer) is the same cell with `input_channels=0`.

    `forecast.cells.regularity` has the equations of zoneout, dropout and norm.

    Args:
        input_channels: channels of the input X; 0 for a cell that has no input.
        hidden_channels: channels of the hidden state, C.
        spatial_dims: 0 for vectors (Linear), 1, 2 or 3 for fields (ConvNd).
        input_kernel, recurrent_kernel: kernel sizes of the two maps, odd; vectors have none.
        learned_initial_state: one trainable number per channel, and the same at each place, instead of zeros.
        zoneout: share of the state's numbers that a step leaves as they were, while training; one for each of its tensors,
            or one for all.
        dropout: share of the hidden channels that the recurrent map does not see, the same ones for a whole sequence,
            while training.
        norm: groups of channels in which the output of each map is normalised; 1 is layer normalisation, None is none.
        gates: how many maps of C channels the input map gives.
        recurrent_gates: how many the recurrent map gives, where that differs.
        input_bias: whether the input map has a bias as well.
        bias: whether the recurrent map has one.
    """

    states: ClassVar[int] = 1
    """How many tensors of the state the equations speak of."""

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        *,
        spatial_dims: int = 0,
        input_kernel: int = 3,
        recurrent_kernel: int = 3,
        learned_initial_state: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        dropout: float = 0.0,
        norm: int | None = None,
        gates: int = 1,
        recurrent_gates: int | None = None,
        input_bias: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.input_channels = input_channels
        self.hidden_channels = hidden_channels
        self.spatial_dims = spatial_dims
        self.zoneout = share_of_each(zoneout, self.states)
        self.dropout = dropout
        self.norm = norm
        check(dropout, norm, hidden_channels)
        self.input_map = (
            linear_map(
                input_channels,
                gates * hidden_channels,
                spatial_dims=spatial_dims,
                kernel=input_kernel,
                bias=input_bias,
                norm=norm,
            )
            if input_channels
            else None
        )
        self.recurrent_map = linear_map(
            hidden_channels,
            (gates if recurrent_gates is None else recurrent_gates) * hidden_channels,
            spatial_dims=spatial_dims,
            kernel=recurrent_kernel,
            bias=bias,
            norm=norm,
        )
        self.initial = nn.Parameter(torch.zeros(self.states, hidden_channels)) if learned_initial_state else None

    def project(self, x: Float[Tensor, "B T X *space"] | None) -> Float[Tensor, "B T GC *space"] | None:
        """The input's share of every gate, for all time steps at once; None where there is no input."""
        self.check_input(x)
        if x is None or self.input_map is None:
            return None
        return self.input_map(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def check_input(self, x: Tensor | None) -> None:
        """Refuses an input where there is none to be had, and none where there is one."""
        if (x is None) != (self.input_map is None):
            raise ValueError(
                f"A cell with {self.input_channels} input channels was given {'no input' if x is None else 'an input'}."
            )

    def step(self, projected: Float[Tensor, "B GC *space"] | None, state: State) -> State:
        """One step in time: the input's share of the gates and the state -> the next state."""
        return self.step_and_gates(projected, state)[0]

    def step_and_gates(self, projected: Float[Tensor, "B GC *space"] | None, state: State) -> tuple[State, Gates]:
        """`step`, and the gates by which it went."""
        before, mask = state[: self.states], state[self.states :]
        seen = before[0] * mask[0] if mask and self.training else before[0]
        after, gates = self.equations(projected, before, seen)
        if any(self.zoneout):
            kept = zip(before, after, self.zoneout, strict=True)
            after = tuple(zone_out(old, new, share, self.training) for old, new, share in kept)
        return after + mask, gates

    @abstractmethod
    def equations(
        self, projected: Float[Tensor, "B GC *space"] | None, state: State, seen: Tensor
    ) -> tuple[State, Gates]:
        """One step by the cell's own equations.

        Args:
            projected: the input's share of the gates.
            state: before the step, without a mask.
            seen: h as the recurrent map sees it: with variational dropout some channels are hidden.

        Returns:
            The state after the step, before zoneout, and the gates, which `forecast.recurrence.watched` shows.
        """

    def kernel(self) -> Kernel | None:
        """The same equations with gradients by hand, for `forecast.kernels`; None where nobody has written them."""
        return None

    def fast(self) -> tuple[Kernel, Maps] | None:
        """What the fast unroll needs of this cell; None where it has to be stepped.

        That is so where there is no kernel, with zoneout, dropout or norm, where a subclass has other equations, and while
        its steps are watched (`forecast.recurrence.watched`).
        """
        own = {name: next(one for one in type(self).__mro__ if name in vars(one)) for name in ("kernel", "equations")}
        stepped = own["kernel"] is not own["equations"] or "step_and_gates" in vars(self)
        kernel = None if stepped or any(self.zoneout) or self.dropout or self.norm is not None else self.kernel()
        if kernel is None:
            return None
        # Without norm they are a Linear or a ConvNd.
        read, recurrent = cast(nn.Linear | None, self.input_map), cast(nn.Linear, self.recurrent_map)
        maps = Maps(recurrent.weight, recurrent.bias)
        return kernel, maps if read is None else maps._replace(input_weight=read.weight, input_bias=read.bias)

    @property
    def carried(self) -> int:
        """How many tensors the state has, the mask of variational dropout included."""
        return self.states + (self.dropout > 0)

    def initial_state(self, batch: int, space: tuple[int, ...], like: Tensor) -> State:
        """The state before the first step, with the device and dtype of `like`."""
        C, ones = self.hidden_channels, (1,) * len(space)
        if self.initial is None:
            state: State = tuple(like.new_zeros(batch, C, *space) for _ in range(self.states))
        else:
            # Repeated, not expanded: a view of a weight must not outlive the layer that has it whole (`forecast.sharding`).
            state = tuple(row.to(like.dtype).view(1, C, *ones).repeat(batch, 1, *space) for row in self.initial)
        if self.dropout:
            state += (sequence_mask(batch, C, len(space), like, self.dropout, self.training),)
        return state

    def add_input(self, projected: Tensor | None, recurrent: Tensor) -> Tensor:
        """The gates' sum, or the recurrent share alone where there is no input."""
        return recurrent if projected is None else projected + recurrent


def per_channel(weight: Tensor, field: Tensor) -> Tensor:
    """A weight of C numbers, shaped to multiply a field B C *space."""
    return weight.view(1, -1, *(1,) * (field.dim() - 2))
