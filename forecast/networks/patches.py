"""Patches: squares of pixels that become channels, so that recurrences run at a lower resolution.

Axes: B batch, T time, C channels, H W space, h w patches.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def with_static(frames: Float[Tensor, "B T C H W"], static: Float[Tensor, "B Q H W"]) -> Float[Tensor, "B T CQ H W"]:
    """Frames, each with the static fields as further channels."""
    if not static.shape[1]:
        return frames
    return torch.cat([frames, static.unsqueeze(1).expand(-1, frames.shape[1], -1, -1, -1)], dim=2)


def cut(frames: Float[Tensor, "B T C H W"], patch: int, multiple: int | None = None) -> Float[Tensor, "B T CPP h w"]:
    """Frames of any size as patches.

    Args:
        frames: are continued at the lower and right edge to the next size that divides.
        patch: side of a patch, P.
        multiple: what has to divide the sides; None: the patch alone.
    """
    multiple = patch if multiple is None else multiple
    right, lower = -frames.shape[-1] % multiple, -frames.shape[-2] % multiple
    if right or lower:
        B, T = frames.shape[:2]
        frames = F.pad(frames.flatten(0, 1), (0, right, 0, lower), mode="replicate").unflatten(0, (B, T))
    return F.pixel_unshuffle(frames, patch)


def joined(patches: Float[Tensor, "B T CPP h w"], patch: int, size: tuple[int, int]) -> Float[Tensor, "B T C H W"]:
    """Patches as the frames of H x W pixels that they were cut from."""
    return F.pixel_shuffle(patches, patch)[..., : size[0], : size[1]]
