"""The GRU's equations in place, with their gradients; those of `forecast.cells.gru`.

Axes: N frames, C hidden channels, *space: none for vectors, up to D H W.
"""

from typing import ClassVar

import torch
from torch import Tensor

from forecast.kernels import single_pass
from forecast.kernels.activations import Activation, sigmoid_backward
from forecast.kernels.equations import Equations, States, add_shares
from forecast.kernels.maps import mapped, to_bias, to_input, to_weight


class GRUWithoutReset(Equations):
    """Gates z, n; state h."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self,
        projected: Tensor | None,
        recurrent: Tensor,
        gates: Tensor,
        kept: Tensor,
        before: States,
        after: States,
        own: States,
    ) -> None:
        (h,), (h_after,) = before, after
        if single_pass.available(gates.device):
            reads, writes = (projected, recurrent, h), (gates, h_after)
            single_pass.launch("gru_without_reset_forward", gates, reads, writes, SLOPE=self.activation.slope)
            return
        add_shares(projected, recurrent, gates)
        z, n = gates.chunk(2, dim=1)
        z.sigmoid_()
        self.activation.in_place(n)
        torch.sub(h, n, out=h_after).mul_(z).add_(n)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        if single_pass.available(gates.device):
            writes = gates, state[0]
            single_pass.launch("gru_without_reset_backward", gates, before, writes, SLOPE=self.activation.slope)
            return
        z, n = gates.chunk(2, dim=1)
        _open(z, n, before[0], state[0], self.activation)


class GRUResetAfter(Equations):
    """Gates r, z, n; state h; the reset gate comes after the map. Kept: W_hn * h + b_hn."""

    kept: ClassVar[int] = 1
    shared: ClassVar[bool] = False

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(
        self,
        projected: Tensor | None,
        recurrent: Tensor,
        gates: Tensor,
        kept: Tensor,
        before: States,
        after: States,
        own: States,
    ) -> None:
        (h,), (h_after,) = before, after
        if single_pass.available(gates.device):
            reads, writes = (projected, recurrent, h), (gates, kept, h_after)
            single_pass.launch("gru_with_reset_forward", gates, reads, writes, SLOPE=self.activation.slope)
            return
        C = h.shape[1]
        r, z, n = gates.chunk(3, dim=1)
        open_shares, candidate_share = recurrent.split([2 * C, C], dim=1)
        kept.copy_(candidate_share)
        if projected is None:
            gates.narrow(1, 0, 2 * C).copy_(open_shares).sigmoid_()
            torch.mul(r, kept, out=n)
        else:
            torch.add(projected.narrow(1, 0, 2 * C), open_shares, out=gates.narrow(1, 0, 2 * C)).sigmoid_()
            torch.addcmul(projected.narrow(1, 2 * C, C), r, kept, out=n)
        self.activation.in_place(n)
        torch.sub(h, n, out=h_after).mul_(z).add_(n)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        if single_pass.available(gates.device):
            reads, writes = (before[0], kept), (gates, recurrent, state[0])
            single_pass.launch("gru_with_reset_backward", gates, reads, writes, SLOPE=self.activation.slope)
            return
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
        self,
        projected: Tensor | None,
        recurrent: Tensor,
        gates: Tensor,
        kept: Tensor,
        before: States,
        after: States,
        own: States,
    ) -> None:
        (h,), (h_after,) = before, after
        C = h.shape[1]
        open_x, candidate_x = (None, None) if projected is None else projected.split([2 * C, C], dim=1)
        add_shares(open_x, recurrent, gates.narrow(1, 0, 2 * C))
        gates.narrow(1, 0, 2 * C).sigmoid_()
        r, z, n = gates.chunk(3, dim=1)
        torch.mul(r, h, out=kept)
        add_shares(candidate_x, mapped(kept, *(one.to(kept.dtype) for one in own)), n)
        self.activation.in_place(n)
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
