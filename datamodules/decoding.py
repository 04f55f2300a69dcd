"""What packed numbers mean, looked up where that is quicker than to compute it."""

from functools import lru_cache

import torch
from torch import Tensor

from forecast.units import Quantity

SHORT = frozenset({torch.uint8, torch.int8, torch.int16})
"""Of these there are so few numbers that a table of all is small."""


def decode(quantity: Quantity, packed: Tensor) -> tuple[Tensor, Tensor]:
    """`quantity.decode(packed)`, but where short numbers become rain rates by a relation, they are looked up.

    The two powers would take most of the time that a step of training waits for its batch. Torch rounds the last bit of a
    power one way or the other by where in a tensor it stands; looked up, it is always the same.

    Args:
        quantity: what the numbers mean.
        packed: of any shape.

    Returns:
        Physical values, and which of them were observed.
    """
    if quantity.relation is None or packed.dtype not in SHORT:
        return quantity.decode(packed)
    values, valid = _table(quantity, packed.dtype, packed.device)
    places = packed.to(torch.int32, memory_format=torch.contiguous_format).view(-1)
    places -= torch.iinfo(packed.dtype).min
    return values.index_select(0, places).view(packed.shape), valid.index_select(0, places).view(packed.shape)


@lru_cache(maxsize=4)
def _table(quantity: Quantity, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All numbers of a type, decoded."""
    limits = torch.iinfo(dtype)
    return quantity.decode(torch.arange(limits.min, limits.max + 1, dtype=dtype, device=device))
