"""How the frames of a recurrence lie in memory: those of a step together.

Axes: B batch, T time, N frames (those of T steps, time first), *space: none for vectors, up to D H W.
"""

import torch
from torch import Tensor


def layout(like: Tensor) -> torch.memory_format:
    """Tensor cores take channels side by side, CPUs as well take places."""
    return torch.channels_last if like.is_cuda and like.dim() == 4 else torch.contiguous_format


def laid_out(frames: Tensor) -> Tensor:
    """Frames, or the weights of a map of them."""
    return frames.contiguous(memory_format=layout(frames))


def blank(like: Tensor) -> Tensor:
    """Frames of the same shape with nothing in them yet."""
    return torch.empty_like(like, memory_format=layout(like))


def room(like: Tensor, steps: int, channels: int) -> Tensor:
    """T B channels *space with nothing in it yet, for frames B ... *space."""
    shape = steps * like.shape[0], channels, *like.shape[2:]
    empty = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))
    return empty.unflatten(0, (steps, -1))


def time_first(x: Tensor) -> Tensor:
    """B T ... -> N ..."""
    return laid_out(x.transpose(0, 1).flatten(0, 1))
