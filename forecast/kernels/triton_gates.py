"""The equations of `forecast.kernels.lstm`, `gru` and `rnn` in Triton: one pass over the numbers of a step, each way.

Frames are rows of numbers that lie side by side: C *space of a frame, or in channels-last C of a place. A row of the gates
has a run of numbers for each gate, as long as a row of the state. A kernel is given the first row of each tensor, then the
strides from row to row; it reads each number before it writes there, so that results may take the place of what they are
made of. It reckons in COMPUTE, whatever the numbers are stored in.

`forecast.kernels.single_pass` launches them.
"""

import torch
import triton
import triton.language as tl

COMPUTE = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}


@triton.jit
def _here(rows, run, BLOCK: tl.constexpr):
    """Row and column of the numbers of this program, and which of them there are."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // run
    return row, index % run, row < rows


@triton.jit
def _read(at, there, COMPUTE: tl.constexpr):
    return tl.load(at, mask=there, other=0).to(COMPUTE)


@triton.jit
def _keep(at, value, there, COMPUTE: tl.constexpr):
    """Stores a number, and gives it as it is stored."""
    stored = value.to(at.dtype.element_ty)
    tl.store(at, stored, mask=there)
    return stored.to(COMPUTE)


@triton.jit
def _gate(projected, projected_at, recurrent, recurrent_at, there, COMPUTE: tl.constexpr):
    """A gate before it opens: the state's share, and the input's where there is one."""
    total = _read(recurrent + recurrent_at, there, COMPUTE)
    if projected is not None:
        total += _read(projected + projected_at, there, COMPUTE)
    return total


@triton.jit
def _weight(weights, which: tl.constexpr, column, run, side, there, COMPUTE: tl.constexpr):
    """A channel's number; `side` numbers of a channel lie side by side."""
    return _read(weights + which * (run // side) + column // side, there, COMPUTE)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """By exp; near 0, where few digits would be left of that, by its series."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.05, near, tl.where(x < 0, -far, far))


@triton.jit
def _activated(x, SLOPE: tl.constexpr):
    return _tanh(x) if SLOPE is None else tl.where(x > 0, x, SLOPE * x)


@triton.jit
def _before_activation(gradient, y, SLOPE: tl.constexpr):
    """The gradient of what went in, from that of the result y."""
    return gradient * (1 - y * y) if SLOPE is None else tl.where(y > 0, gradient, SLOPE * gradient)


@triton.jit
def lstm_forward(
    projected, recurrent, c, gates, h_after, c_after, peephole,
    projected_row, recurrent_row, c_row, gates_row, h_after_row, c_after_row,
    rows, run, side, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    p, q = row * projected_row + column, row * recurrent_row + column
    gates += row * gates_row + column
    i = _gate(projected, p, recurrent, q, there, COMPUTE)
    f = _gate(projected, p + run, recurrent, q + run, there, COMPUTE)
    g = _gate(projected, p + 2 * run, recurrent, q + 2 * run, there, COMPUTE)
    o = _gate(projected, p + 3 * run, recurrent, q + 3 * run, there, COMPUTE)
    before = _read(c + row * c_row + column, there, COMPUTE)
    if peephole is not None:
        i += _weight(peephole, 0, column, run, side, there, COMPUTE) * before
        f += _weight(peephole, 1, column, run, side, there, COMPUTE) * before
    # The gates as they are stored, from which `lstm_carry` makes c once more.
    i = _keep(gates, _sigmoid(i), there, COMPUTE)
    f = _keep(gates + run, _sigmoid(f), there, COMPUTE)
    g = _keep(gates + 2 * run, _tanh(g), there, COMPUTE)
    after = f * before + i * g
    if peephole is not None:
        o += _weight(peephole, 2, column, run, side, there, COMPUTE) * after
    o = _keep(gates + 3 * run, _sigmoid(o), there, COMPUTE)
    tl.store(h_after + row * h_after_row + column, o * _tanh(after), mask=there)
    tl.store(c_after + row * c_after_row + column, after, mask=there)


@triton.jit
def lstm_carry(
    gates, c, c_after,
    gates_row, c_row, c_after_row,
    rows, run, side, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    gates += row * gates_row + column
    i = _read(gates, there, COMPUTE)
    f = _read(gates + run, there, COMPUTE)
    g = _read(gates + 2 * run, there, COMPUTE)
    after = f * _read(c + row * c_row + column, there, COMPUTE) + i * g
    tl.store(c_after + row * c_after_row + column, after, mask=there)


@triton.jit
def lstm_backward(
    c, c_after, gates, dh, dc, peephole,
    c_row, c_after_row, gates_row, dh_row, dc_row,
    rows, run, side, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    gates += row * gates_row + column
    dh += row * dh_row + column
    dc += row * dc_row + column
    i = _read(gates, there, COMPUTE)
    f = _read(gates + run, there, COMPUTE)
    g = _read(gates + 2 * run, there, COMPUTE)
    o = _read(gates + 3 * run, there, COMPUTE)
    opened = _tanh(_read(c_after + row * c_after_row + column, there, COMPUTE))
    to_h = _read(dh, there, COMPUTE)
    to_o = to_h * opened * o * (1 - o)
    to_c = _read(dc, there, COMPUTE) + to_h * o * (1 - opened * opened)
    if peephole is not None:
        to_c += _weight(peephole, 2, column, run, side, there, COMPUTE) * to_o
    to_i = to_c * g * i * (1 - i)
    to_f = to_c * _read(c + row * c_row + column, there, COMPUTE) * f * (1 - f)
    to_before = to_c * f
    if peephole is not None:
        to_before += _weight(peephole, 0, column, run, side, there, COMPUTE) * to_i
        to_before += _weight(peephole, 1, column, run, side, there, COMPUTE) * to_f
    tl.store(gates, to_i, mask=there)
    tl.store(gates + run, to_f, mask=there)
    tl.store(gates + 2 * run, to_c * i * (1 - g * g), mask=there)
    tl.store(gates + 3 * run, to_o, mask=there)
    tl.store(dh, 0.0, mask=there)
    tl.store(dc, to_before, mask=there)


@triton.jit
def gru_with_reset_forward(
    projected, recurrent, h, gates, kept, h_after,
    projected_row, recurrent_row, h_row, gates_row, kept_row, h_after_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    p, q = row * projected_row + column, row * recurrent_row + column
    gates += row * gates_row + column
    r = _sigmoid(_gate(projected, p, recurrent, q, there, COMPUTE))
    z = _sigmoid(_gate(projected, p + run, recurrent, q + run, there, COMPUTE))
    candidate = _read(recurrent + q + 2 * run, there, COMPUTE)
    n = r * candidate
    if projected is not None:
        n += _read(projected + p + 2 * run, there, COMPUTE)
    n = _activated(n, SLOPE)
    before = _read(h + row * h_row + column, there, COMPUTE)
    tl.store(gates, r, mask=there)
    tl.store(gates + run, z, mask=there)
    tl.store(gates + 2 * run, n, mask=there)
    tl.store(kept + row * kept_row + column, candidate, mask=there)
    tl.store(h_after + row * h_after_row + column, n + z * (before - n), mask=there)


@triton.jit
def gru_with_reset_backward(
    h, kept, gates, recurrent, dh,
    h_row, kept_row, gates_row, recurrent_row, dh_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    gates += row * gates_row + column
    recurrent += row * recurrent_row + column
    dh += row * dh_row + column
    r = _read(gates, there, COMPUTE)
    z = _read(gates + run, there, COMPUTE)
    n = _read(gates + 2 * run, there, COMPUTE)
    to_h = _read(dh, there, COMPUTE)
    to_z = to_h * (_read(h + row * h_row + column, there, COMPUTE) - n) * z * (1 - z)
    to_n = _before_activation(to_h * (1 - z), n, SLOPE)
    to_r = to_n * _read(kept + row * kept_row + column, there, COMPUTE) * r * (1 - r)
    tl.store(gates, to_r, mask=there)
    tl.store(gates + run, to_z, mask=there)
    tl.store(gates + 2 * run, to_n, mask=there)
    tl.store(recurrent, to_r, mask=there)
    tl.store(recurrent + run, to_z, mask=there)
    tl.store(recurrent + 2 * run, to_n * r, mask=there)
    tl.store(dh, to_h * z, mask=there)


@triton.jit
def gru_without_reset_forward(
    projected, recurrent, h, gates, h_after,
    projected_row, recurrent_row, h_row, gates_row, h_after_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    p, q = row * projected_row + column, row * recurrent_row + column
    gates += row * gates_row + column
    z = _sigmoid(_gate(projected, p, recurrent, q, there, COMPUTE))
    n = _activated(_gate(projected, p + run, recurrent, q + run, there, COMPUTE), SLOPE)
    before = _read(h + row * h_row + column, there, COMPUTE)
    tl.store(gates, z, mask=there)
    tl.store(gates + run, n, mask=there)
    tl.store(h_after + row * h_after_row + column, n + z * (before - n), mask=there)


@triton.jit
def gru_without_reset_backward(
    h, gates, dh,
    h_row, gates_row, dh_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    gates += row * gates_row + column
    dh += row * dh_row + column
    z = _read(gates, there, COMPUTE)
    n = _read(gates + run, there, COMPUTE)
    to_h = _read(dh, there, COMPUTE)
    before = _read(h + row * h_row + column, there, COMPUTE)
    tl.store(gates, to_h * (before - n) * z * (1 - z), mask=there)
    tl.store(gates + run, _before_activation(to_h * (1 - z), n, SLOPE), mask=there)
    tl.store(dh, to_h * z, mask=there)


@triton.jit
def rnn_forward(
    projected, recurrent, h_after,
    projected_row, recurrent_row, h_after_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    p, q = row * projected_row + column, row * recurrent_row + column
    h = _activated(_gate(projected, p, recurrent, q, there, COMPUTE), SLOPE)
    tl.store(h_after + row * h_after_row + column, h, mask=there)


@triton.jit
def rnn_backward(
    h_after, gates, dh,
    h_after_row, gates_row, dh_row,
    rows, run, side, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, there = _here(rows, run, BLOCK)
    dh += row * dh_row + column
    to_h = _read(dh, there, COMPUTE)
    h = _read(h_after + row * h_after_row + column, there, COMPUTE)
    tl.store(gates + row * gates_row + column, _before_activation(to_h, h, SLOPE), mask=there)
    tl.store(dh, 0.0, mask=there)
