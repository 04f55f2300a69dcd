"""The GRU's equations in place, with their gradients; those of `forecast.cells.gru`.

Axes: N frames, C hidden channels, *space: none for vectors, up to D H W.
"""

from typing import ClassVar

import torch
from torch import Tensor

from forecast.kernels.activations import Activation, sigmoid_backward
from forecast.kernels.maps import mapped, to_bias, to_input, to_weight
from forecast.kernels.unroll import Equations, States


class GRUWithoutReset(Equations):
    """Gates z, n; state h."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self, gates: Tensor, recurrent: Tensor | None, kept: Tensor, before: States, after: States, own: States
    ) -> None:
        (h,), (h_after,) = before, after
        z, n = gates.chunk(2, dim=1)
        z.sigmoid_()
        self.activation.in_place(n)
        torch.sub(h, n, out=h_after).mul_(z).add_(n)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        z, n = gates.chunk(2, dim=1)
        _open(z, n, before[0], state[0], self.activation)


class GRUResetAfter(Equations):
    """Gates r, z, n; state h; the reset gate comes after the map. Kept: W_hn * h + b_hn."""

    kept: ClassVar[int] = 1
    shared: ClassVar[bool] = False

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self, gates: Tensor, recurrent: Tensor | None, kept: Tensor, before: States, after: States, own: States
    ) -> None:
        (h,), (h_after,) = before, after
        C = h.shape[1]
        assert recurrent is not None
        kept.copy_(recurrent.narrow(1, 2 * C, C))
        gates.narrow(1, 0, 2 * C).add_(recurrent.narrow(1, 0, 2 * C)).sigmoid_()
        r, z, n = gates.chunk(3, dim=1)
        self.activation.in_place(n.addcmul_(r, kept))
        torch.sub(h, n, out=h_after).mul_(z).add_(n)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        C = kept.shape[1]
        r, z, n = gates.chunk(3, dim=1)
        _open(z, n, before[0], state[0], self.activation)
        torch.mul(n, r, out=recurrent.narrow(1, 2 * C, C))
        sigmoid_backward(n * kept, r, r)
        recurrent.narrow(1, 0, 2 * C).copy_(gates.narrow(1, 0, 2 * C))


class GRUResetBefore(Equations):
    """Gates r, z, n; state h; the reset gate comes before the candidate's map: own weights W_hn and b_hn. Kept: r . h."""

    kept: ClassVar[int] = 1
    beyond: ClassVar[int] = 1
    shared: ClassVar[bool] = False

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self, gates: Tensor, recurrent: Tensor | None, kept: Tensor, before: States, after: States, own: States
    ) -> None:
        assert recurrent is not None
        (h,), (h_after,) = before, after
        gates.narrow(1, 0, 2 * h.shape[1]).add_(recurrent).sigmoid_()
        r, z, n = gates.chunk(3, dim=1)
        torch.mul(r, h, out=kept)
        self.activation.in_place(n.add_(mapped(kept, *(one.to(kept.dtype) for one in own))))
        torch.sub(h, n, out=h_after).mul_(z).add_(n)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        (h,), (dh,) = before, state
        r, z, n = gates.chunk(3, dim=1)
        _open(z, n, h, dh, self.activation)
        through = to_input(n, kept, own[0].to(kept.dtype))
        dh.addcmul_(through, r)
        sigmoid_backward(through.mul_(h), r, r)
        recurrent.copy_(gates.narrow(1, 0, 2 * h.shape[1]))

    def own(self, gates: Tensor, kept: Tensor, before: States, after: States, own: States) -> States:
        n = gates.chunk(3, dim=1)[2]
        return to_weight(n, kept, own[0].to(kept.dtype)), to_bias(n)


def _open(z: Tensor, n: Tensor, h: Tensor, dh: Tensor, activation: Activation) -> None:
    """Gradients of n + z . (h - n), into z, n and dh."""
    dn = dh - dh * z
    dz = (h - n).mul_(dh)
    dh.mul_(z)
    activation.backward(dn, n, n)
    sigmoid_backward(dz, z, z)
