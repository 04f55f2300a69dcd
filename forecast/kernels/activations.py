"""Activations: plain, in place, and their gradients from what they gave."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of single numbers."""

    name: str
    plain: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], None]
    """Takes the gradient of the result, the result, and where the gradient of what went in is to go."""
    slope: float | None
    """Below 0, where it is a straight line on both sides of 0; None for tanh."""


def sigmoid_backward(gradient: Tensor, result: Tensor, out: Tensor) -> None:
    aten.sigmoid_backward.grad_input(gradient, result, grad_input=out)


def tanh_backward(gradient: Tensor, result: Tensor, out: Tensor) -> None:
    aten.tanh_backward.grad_input(gradient, result, grad_input=out)


def relu_backward(gradient: Tensor, result: Tensor, out: Tensor) -> None:
    aten.threshold_backward.grad_input(gradient, result, 0, grad_input=out)


def leaky_relu_backward(gradient: Tensor, result: Tensor, out: Tensor, slope: float) -> None:
    aten.leaky_relu_backward.grad_input(gradient, result, slope, True, grad_input=out)


def _leaky_relu(slope: float) -> Activation:
    return Activation(
        "leaky_relu",
        partial(F.leaky_relu, negative_slope=slope),
        partial(F.leaky_relu_, negative_slope=slope),
        partial(leaky_relu_backward, slope=slope),
        slope,
    )


ACTIVATIONS: Mapping[str, Activation] = {
    "tanh": Activation("tanh", torch.tanh, torch.tanh_, tanh_backward, None),
    "relu": Activation("relu", torch.relu, torch.relu_, relu_backward, 0.0),
    "leaky_relu": _leaky_relu(0.2),
}
