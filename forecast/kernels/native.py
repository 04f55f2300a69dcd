"""Recurrences of vectors by torch's own functions, which are cuDNN's on a GPU, where a cell's equations are theirs.

Axes: B batch, T time, X input channels, C hidden channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}


def quicker(function: str, x: Tensor, h: Tensor) -> bool:
    """Whether torch's function is quicker than a kernel: on a GPU; on a CPU an LSTM's, unless it reads wide vectors."""
    return x.is_cuda or (function == "lstm" and x.shape[2] <= 2 * h.shape[1])


def unroll(
    function: str, maps: Sequence[Tensor | None], x: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All steps through torch's function of that name.

    Args:
        function: one of `FUNCTIONS`.
        maps: weight and bias of the recurrent map, and of the input map; a bias that is None is 0.
        x: B T X.
        state: before the first step, B C each.

    Returns:
        The hidden state after each step B T C, and the state after the last.
    """
    weight, bias, input_weight, input_bias = maps
    assert weight is not None
    biases = [weight.new_zeros(weight.shape[0]) if one is None else one for one in (input_bias, bias)]
    h, *others = (part.to(x.dtype).unsqueeze(0) for part in state)
    # One layer, without dropout, trainable, in one direction, batch first.
    options = True, 1, 0.0, True, False, True
    given = (h, *others) if others else h
    outputs, *last = FUNCTIONS[function](x, given, [input_weight, weight, *biases], *options)
    return outputs, tuple(one.squeeze(0).to(part.dtype) for one, part in zip(last, state, strict=True))
