"""The LSTM's equations in place, with their gradients; those of `forecast.cells.lstm`.

Axes: N frames, C hidden channels, *space: none for vectors, up to D H W.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from forecast.kernels import single_pass
from forecast.kernels.activations import sigmoid_backward, tanh_backward
from forecast.kernels.equations import Equations, States, add_shares
from forecast.kernels.frames import blank
from forecast.kernels.maps import to_bias


class LSTMEquations(Equations):
    """Gates i, f, g, o; state h, c; own weights: those of the peepholes (w_ci, w_cf, w_co), where there are some."""

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
        c, (h_after, c_after) = before[1], after
        if single_pass.available(gates.device):
            writes = gates, h_after, c_after
            single_pass.launch("lstm_forward", gates, (projected, recurrent, c), writes, own or (None,))
            return
        add_shares(projected, recurrent, gates)
        i, f, g, o = gates.chunk(4, dim=1)
        peepholes = _peepholes(own, c)
        if peepholes:
            i.addcmul_(peepholes[0], c)
            f.addcmul_(peepholes[1], c)
        gates.narrow(1, 0, 2 * c.shape[1]).sigmoid_()
        g.tanh_()
        torch.mul(f, c, out=c_after).addcmul_(i, g)
        if peepholes:
            o.addcmul_(peepholes[2], c_after)
        o.sigmoid_()
        torch.tanh(c_after, out=h_after).mul_(o)

    def backward(
        self, gates: Tensor, recurrent: Tensor, kept: Tensor, before: States, after: States, state: States, own: States
    ) -> None:
        c, c_after = before[1], after[1]
        dh, dc = state
        if single_pass.available(gates.device):
            single_pass.launch("lstm_backward", gates, (c, c_after), (gates, dh, dc), own or (None,))
            return
        i, f, g, o = gates.chunk(4, dim=1)
        peepholes = _peepholes(own, c)
        opened = torch.tanh(c_after)
        through = dh * o
        sigmoid_backward(dh.mul_(opened), o, o)
        tanh_backward(through, opened, through)
        dc.add_(through)
        if peepholes:
            dc.addcmul_(peepholes[2], o)
        torch.mul(dc, g, out=through)
        torch.mul(dc, i, out=opened)
        tanh_backward(opened, g, g)
        sigmoid_backward(through, i, i)
        torch.mul(dc, c, out=through)
        dc.mul_(f)
        sigmoid_backward(through, f, f)
        if peepholes:
            dc.addcmul_(peepholes[0], i).addcmul_(peepholes[1], f)
        dh.zero_()

    def carry(self, gates: Tensor, others: States) -> States:
        (c,) = others
        if single_pass.available(gates.device):
            c_after = blank(c)
            single_pass.launch("lstm_carry", gates, (gates, c), (c_after,))
            return (c_after,)
        i, f, g, _ = gates.chunk(4, dim=1)
        return (torch.mul(f, c).addcmul_(i, g),)

    def own(self, gates: Tensor, kept: Tensor, before: States, after: States, own: States) -> States:
        i, f, _, o = gates.chunk(4, dim=1)
        seen = zip((i, f, o), (before[1], before[1], after[1]), strict=True)
        return (torch.stack([to_bias(gate * c) for gate, c in seen]),)


def _peepholes(own: States, like: Tensor) -> Sequence[Tensor]:
    return [weight.view(1, -1, *(1,) * (like.dim() - 2)) for weight in own[0]] if own else ()
