"""What keeps a recurrence from learning its data by heart, and its gates in their range: zoneout, dropout, normalisation.

Axes: B batch, C channels, *space: none for vectors, up to D H W.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.errors import UserError


def zone_out(
    old: Float[Tensor, "B C *space"], new: Float[Tensor, "B C *space"], probability: float, training: bool
) -> Float[Tensor, "B C *space"]:
    """Zoneout: some numbers of the state keep their old value.

        s = d . old + (1 - d) . new,   d ~ Bernoulli(p)            while training, drawn at every step for every number
        s = p old + (1 - p) new                                    in evaluation: the expectation

    Args:
        old, new: one tensor of the state before and after the step.
        probability: p, from 0 (nothing stays) to 1 (nothing moves).
        training: whether to draw.

    Reference: Krueger et al. (2017), arXiv 1606.01305.
    """
    if not training:
        return probability * old + (1 - probability) * new
    stays = torch.empty_like(new, dtype=torch.bool).bernoulli_(probability)
    return torch.where(stays, old, new)


def sequence_mask(batch: int, channels: int, dims: int, like: Tensor, dropout: float, training: bool) -> Tensor:
    """Variational dropout: what the hidden state is multiplied by on its way into the recurrent map, for a whole sequence.

        m ~ Bernoulli(1 - p) / (1 - p)                             while training; ones in evaluation

    Masks drawn anew at every step add up to a noise that drowns the memory; one for the whole sequence trains a thinned
    network of its own. Whole channels are hidden, not single pixels: neighbours tell the same, and rain would move
    through the holes.

    Args:
        batch, channels: B, C.
        dims: axes of space.
        like: has the device and dtype.
        dropout: p, the share of channels that is hidden.
        training: whether to draw.

    Returns:
        The mask, B C and an axis of size 1 for each of space.

    References: Gal, Ghahramani (2016), arXiv 1512.05287; Tompson et al. (2015), arXiv 1411.4280 (whole channels).
    """
    return F.dropout(like.new_ones(batch, channels, *(1,) * dims), dropout, training)


def normalised(linear: nn.Module, channels: int, groups: int) -> nn.Module:
    """A linear map without bias, followed by group normalisation, whose shift takes the place of the bias.

        y = gain . (W x - mean) / sqrt(variance + 1e-5) + bias     mean and variance over a group of channels and all space

    One group is layer normalisation. The gain and bias are per channel, so that fields of any size are taken.

    Args:
        linear: W.
        channels: that it gives.
        groups: of channels that are normalised together.

    References: Ba et al. (2016), arXiv 1607.06450 (layers in recurrences); Wu, He (2018), arXiv 1803.08494 (groups).
    """
    return nn.Sequential(OrderedDict(linear=linear, norm=nn.GroupNorm(groups, channels)))


def share_of_each(zoneout: float | Sequence[float], states: int) -> tuple[float, ...]:
    """Zoneout's probability for each tensor of a state: one for all, or one each.

    Raises:
        UserError: a probability that is none, or another number of them.
    """
    shares = (zoneout,) * states if isinstance(zoneout, int | float) else tuple(zoneout)
    if len(shares) != states:
        raise UserError(
            f"zoneout is {zoneout}, but this cell has a state of {states}; give one number, or one for each."
        )
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"zoneout is {zoneout}; it must be from 0 (nothing stays as it was) to 1.")
    return shares


def check(dropout: float, norm: int | None, channels: int) -> None:
    """Refuses a dropout that leaves nothing, and groups that a state's channels cannot be cut into.

    Raises:
        UserError: says which.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}; it must be at least 0 (nothing is hidden) and less than 1.")
    if norm is not None and (norm < 1 or channels % norm or channels == norm):
        raise UserError(
            f"norm is {norm}; it must be null (none), 1 (all channels together), or a number of groups that cuts the "
            f"{channels} hidden channels into equal parts of two or more."
        )
