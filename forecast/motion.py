"""Motion of rain: optical flow between frames, and semi-Lagrangian advection along it, for whole batches on any device.

Axes: B batch, T past frames, S forecast frames, L frames, C channels, H W space; a velocity has its components x (to the
right) and y (down) in its channels, in pixels per frame.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PAIRS = 3
"""Pairs of neighbouring frames, the last ones, that share one velocity."""
COARSEST = 16
"""Least side of the coarsest level of the pyramid, in pixels."""
LEVELS = 4
ROUNDS = 3
"""Corrections at each level."""
WINDOW = 7
"""Radius of the box, passed three times, over which a velocity is shared, in pixels of a level."""
RIDGE = 1e-3
"""Keeps the velocity where it is, where the frames show no structure; in units of squared grey level per pixel."""


@torch.no_grad()
def velocity(frames: Float[Tensor, "B T H W"]) -> Float[Tensor, "B 2 H W"]:
    """The velocity of what is seen, by optical flow after Lucas and Kanade, from coarse to fine.

    At each level v minimises, over a window w around each pixel and over the last pairs of frames, the change along it,

        sum of w (I(x, t+1) - I(x - v, t))^2,

    linearised in v a few times. Where nothing is to be seen it is that of the surroundings, weighted by what is seen there;
    without anything at all it is 0.

    Reference: Lucas and Kanade (1981), Proc. IJCAI, 674; Bouguet (2001), pyramidal implementation.

    Args:
        frames: in model space, about 0 to 1. With T = 1 the velocity is 0.
    """
    B, T, H, W = frames.shape
    earlier, later = frames[:, :-1][:, -PAIRS:], frames[:, 1:][:, -PAIRS:]
    flow = frames.new_zeros(B, 2, H, W)
    if T == 1:
        return flow
    levels = [level for level in range(LEVELS) if min(H, W) >> level >= COARSEST] or [0]
    flow = frames.new_zeros(B, 2, 1, 1)
    for level in reversed(levels):
        past, future = (F.avg_pool2d(part, 2**level, ceil_mode=True) if level else part for part in (earlier, later))
        past, future = blur(past, 1), blur(future, 1)
        size = (past.shape[-2], past.shape[-1])
        flow = F.interpolate(flow, size, mode="bilinear") * (1.0 if flow.shape[-1] == 1 else 2.0)
        for _ in range(ROUNDS):
            flow, certain = _corrected(past, future, flow)
            flow = _spread(flow, certain)
        if level == 1:
            break
    if flow.shape[-2:] != (H, W):
        flow = F.interpolate(flow * 2.0 ** levels[min(1, len(levels) - 1)], (H, W), mode="bilinear")
    return flow


def _corrected(past: Tensor, future: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step of the velocity, and how much structure it rests on."""
    moved = advected(past, flow, padding="border")
    inside = advected(torch.ones_like(past[:1, :1]).expand(len(past), -1, -1, -1), flow) > 0.999
    change = future - moved
    dx, dy = _gradient(0.5 * (moved + future))
    products = (torch.stack([dx * dx, dx * dy, dy * dy, dx * change, dy * change], dim=1) * inside.unsqueeze(1)).sum(2)
    xx, xy, yy, xt, yt = blur(blur(products, WINDOW), WINDOW).unbind(1)
    xx, yy = xx + RIDGE, yy + RIDGE
    determinant = xx * yy - xy * xy
    step = torch.stack([-(yy * xt - xy * yt), -(xx * yt - xy * xt)], dim=1) / determinant.unsqueeze(1)
    return flow + step.clamp(-2, 2), (determinant / (xx + yy)).unsqueeze(1) - RIDGE / 2


def _spread(flow: Tensor, certain: Tensor) -> Tensor:
    """Smooths a velocity by its certainty."""
    weight = certain.clamp_min(0) + 1e-12
    for radius in (WINDOW, 3 * WINDOW):
        radius = min(radius, (min(flow.shape[-2:]) - 1) // 2)
        total = blur(torch.cat([flow * weight, weight], dim=1), radius)
        smooth = total[:, :2] / total[:, 2:]
        flow = flow + (smooth - flow) * (1 - (weight / (weight + 10 * RIDGE)))
    return flow


def displacement(velocity: Float[Tensor, "B 2 H W"], steps: int) -> Float[Tensor, "B S 2 H W"]:
    """How far what arrives at a pixel after 1 .. S frames has come along a velocity that does not change in time.

    d(x, 1) = v(x),  d(x, s+1) = d(x, s) + v(x - d(x, s))

    Reference: Germann and Zawadzki (2002), Mon. Wea. Rev. 130, 2859 (backward-in-time semi-Lagrangian advection).
    """
    come = [velocity]
    for _ in range(steps - 1):
        come.append(come[-1] + advected(velocity, come[-1], padding="border"))
    return torch.stack(come, dim=1)


def advected(
    fields: Float[Tensor, "B C H W"], come: Float[Tensor, "B 2 H W"], padding: str = "zeros"
) -> Float[Tensor, "B C H W"]:
    """Fields as they arrive: at x stands what was at x - come, between pixels bilinear; from outside comes 0.

    Args:
        padding: "border" lets the nearest pixel of the frame come from outside.
    """
    H, W = fields.shape[-2:]
    x = torch.arange(W, device=fields.device, dtype=fields.dtype) - come[:, 0]
    y = torch.arange(H, device=fields.device, dtype=fields.dtype)[:, None] - come[:, 1]
    # grid_sample's coordinates: -1 and 1 are the outer edges of the first and last pixel.
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)
    return F.grid_sample(fields, grid, padding_mode=padding, align_corners=False)


def carried(frames: Float[Tensor, "B L C H W"], come: Float[Tensor, "B L 2 H W"]) -> Float[Tensor, "B L C H W"]:
    """Frames, each along its own displacement; from outside comes what lies at the edge."""
    return advected(frames.flatten(0, 1), come.flatten(0, 1), padding="border").unflatten(0, frames.shape[:2])


def blur(fields: Tensor, radius: int) -> Tensor:
    """A box mean of (2 radius + 1)^2 pixels, passed twice; at the border over the pixels that there are."""
    for dim in (-2, -1):
        for _ in range(2):
            fields = _box(fields, radius, dim)
    return fields


def _box(fields: Tensor, radius: int, dim: int) -> Tensor:
    """The mean over 2 radius + 1 neighbours along an axis, by differences of running sums."""
    size = fields.shape[dim]
    sums = F.pad(fields.double().cumsum(dim), (0, 0) * (-1 - dim) + (1, 0))
    position = torch.arange(size, device=fields.device)
    low, high = (position - radius).clamp_min(0), (position + radius + 1).clamp_max(size)
    shape = (-1,) + (1,) * (-1 - dim)
    mean = (sums.index_select(dim, high) - sums.index_select(dim, low)) / (high - low).view(shape)
    return mean.to(fields.dtype)


def _gradient(fields: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y; 0 at the border."""
    padded = F.pad(fields, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
