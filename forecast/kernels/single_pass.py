"""A step's equations in a single pass over its numbers, on a GPU: launches the kernels of `forecast.kernels.triton_gates`.

Arithmetic is in float32, and in float64 where the gates are, whatever the numbers are stored in.

Axes: N frames, C hidden channels, G gates, *space: none for vectors, up to D H W.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = (7, 0)  # the least compute capability that Triton makes code for

BLOCK = 1024  # numbers of the state to a program; a power of two


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run there: on GPUs, where Triton is installed. CUDA's builds of torch for Linux bring it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def launch(
    kernel: str,
    gates: Tensor,
    reads: Sequence[Tensor | None],
    writes: Sequence[Tensor],
    weights: Sequence[Tensor | None] = (),
    **options: float | None,
) -> None:
    """Runs a kernel over all numbers of a step.

    Args:
        kernel: its name in `forecast.kernels.triton_gates`.
        gates: N GC *space; the arithmetic's precision is by theirs.
        reads: tensors N (multiples of C) *space, or None where there is none; copied where they lie otherwise than what is
            written.
        writes: tensors of such shapes, the last one of a state; the kernel may read them as well. All of them lie
            contiguous or all channels-last, apart from being slices of channels.
        weights: numbers of each channel, or None where there are none.
        options: the kernel's own.

    Raises:
        RuntimeError: what is to be written lies otherwise.
    """
    from forecast.kernels import triton_gates  # here, since machines where it is not `available` need no Triton

    last = not all(_side_by_side(one) for one in writes)
    read = [None if one is None else _in_rows(one, last, copied=True) for one in reads]
    written = [_in_rows(one, last) for one in writes]
    count, run = written[-1].shape
    with torch.cuda.device_of(gates):
        getattr(triton_gates, kernel)[(-(-count * run // BLOCK),)](
            *(*read, *written),
            *(None if one is None else one.contiguous() for one in weights),
            *(0 if one is None else one.stride(0) for one in (*read, *written)),
            count,
            run,
            1 if last else gates[0, 0].numel(),
            **options,
            COMPUTE=triton_gates.COMPUTE[gates.dtype],
            BLOCK=BLOCK,
        )


def _side_by_side(frames: Tensor) -> bool:
    """Whether the numbers of a channel are: not so in channels-last."""
    return (
        min((step for size, step in zip(frames.shape[2:], frames.stride()[2:], strict=True) if size > 1), default=1)
        == 1
    )


def _in_rows(frames: Tensor, last: bool, copied: bool = False) -> Tensor:
    """Rows of numbers that lie side by side: one of each frame, C *space, or in channels-last one of each place, C."""
    if last:
        frames = frames.movedim(1, -1)
    shape = (-1, frames.shape[-1]) if last else (len(frames), frames[0].numel())
    rows = frames.reshape(shape) if copied else frames.view(shape)
    if rows.stride(1) == 1 or rows.shape[1] == 1:
        return rows
    if copied:
        return rows.contiguous()
    raise RuntimeError("What a kernel writes must lie side by side: contiguous, or channels-last.")
