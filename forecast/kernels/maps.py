"""A cell's linear map and its gradients, for vectors and for fields, whole batches of frames at a time.

Axes: N frames, I input channels, O output channels, *space: none for vectors, up to D H W.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W * x + b: N I *space -> N O *space, of the same size; a matrix product for vectors."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return CONVOLVE[weight.dim()](x, weight, bias, padding=[side // 2 for side in weight.shape[2:]])


def to_input(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, from that of W * x."""
    if weight.dim() == 2:
        return gradient @ weight
    return _backward(gradient, x, weight, (True, False, False))[0]


def to_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of W, from that of W * x, summed over all frames."""
    if weight.dim() == 2:
        return gradient.T @ x
    return _backward(gradient, x, weight, (False, True, False))[1]


def to_bias(gradient: Tensor) -> Tensor:
    """The gradient of b, from that of W * x + b, summed over all frames and places."""
    return gradient.sum([0, *range(2, gradient.dim())])


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    dims = weight.dim() - 2
    padding = [side // 2 for side in weight.shape[2:]]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1] * dims, padding, [1] * dims, False, [0] * dims, 1, wanted
    )
    return found
