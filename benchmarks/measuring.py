"""What is measured of a recurrence, and the gate before it: jobs, equal results, time, and memory.

Axes: T time, B batch, X input channels, C hidden channels, *space.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from math import ceil
from multiprocessing.connection import Connection
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from benchmarks.peers import Case, Modules, Recurrence, Weights, side_by_side
from forecast.errors import UserError

TURN = 0.02  # seconds that a way runs at least before it is the next one's turn
ROUNDS = 15
MIB = 2**20
FLOOR = "convolutions"


class Mode(NamedTuple):
    """Numbers and memory layout in which all ways are run."""

    name: str
    autocast: torch.dtype | None = None
    channels_last: bool = False
    tolerance: float = 1e-4
    """Between results, relative to the largest."""


EXACT = Mode("float64", tolerance=1e-9)


class Job(NamedTuple):
    """What is timed of a way."""

    forward: Callable[[], object]
    """Without gradients, as in a forecast."""
    step: Callable[[], object]
    """Forward, and the gradients of the input and of all weights, as in training."""


class Result(NamedTuple):
    """Of one kind of recurrence in one mode and size; by the name of each way, ours first."""

    maths: str
    mode: Mode
    case: Case
    forward: Mapping[str, Sequence[float]]
    """Seconds in each round."""
    step: Mapping[str, Sequence[float]]
    saved: Mapping[str, int]
    """Bytes."""


def given(case: Case, device: torch.device, mode: Mode) -> tuple[Tensor, Tensor]:
    """The input B T X *space, and the gradient of the outputs B T C *space, which stands for a loss linear in them."""
    generator = torch.Generator().manual_seed(1)
    space = (case.size,) * 2 if case.size else ()
    x, gradient = (torch.randn(case.B, case.T, size, *space, generator=generator) for size in (case.X, case.C))
    x, gradient = (one.to(device) for one in (x, gradient))
    if mode.channels_last:
        x, gradient = (
            one.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, one.shape[:2])
            for one in (x, gradient)
        )
    return x.requires_grad_(), gradient


def placed(way: Recurrence, device: torch.device, mode: Mode) -> Recurrence:
    """The same way, its weights on the device and in the layout of the mode."""
    network = way.network.to(device)
    if mode.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its types know no layouts
    return way._replace(network=network)


def run(way: Recurrence, x: Tensor, mode: Mode) -> Tensor:
    """The outputs."""
    with nullcontext() if mode.autocast is None else torch.autocast(x.device.type, mode.autocast):
        return way.outputs(way.network, x)


def step(way: Recurrence, x: Tensor, gradient: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """The outputs, and the gradients of the input and of the weights, in the order of the network's."""
    outputs = run(way, x, mode)
    weights = [weight for weight in way.network.parameters() if weight.requires_grad]
    to_x, *to_weights = torch.autograd.grad(outputs, [x, *weights], gradient.to(outputs.dtype))
    return outputs.detach(), to_x, to_weights


def job(way: Recurrence, x: Tensor, gradient: Tensor, mode: Mode) -> Job:
    """A way on its input."""
    return Job(torch.no_grad()(partial(run, way, x, mode)), partial(step, way, x, gradient, mode))


def floor(cell: nn.Module, x: Tensor, mode: Mode) -> Job:
    """The convolutions that no way can do without, without a gate between them.

    Where x and h have one map each and both reach as far, they go through one convolution at each step; else x goes through
    its own for all frames in one call. The first step starts from zeros, for which h needs none. Backward the gradients of
    what each of them read, and those of the weights for all frames in one call each.
    """
    B, T = x.shape[:2]
    maps = dict(cell.named_modules())
    first, *others = (
        maps[name].get_parameter("weight").detach().to(mode.autocast or x.dtype)
        for name in ("input_map", "recurrent_map", "candidate_map")
        if name in maps
    )
    padding = first.shape[-1] // 2
    layout = torch.channels_last if mode.channels_last else torch.contiguous_format

    def field(channels: int) -> Tensor:
        return first.new_ones(T * B, channels, *x.shape[3:]).normal_().contiguous(memory_format=layout)

    frames = field(x.shape[2])
    to_first = field(len(first))
    # What is read, by which weight, and the gradient that comes back to it.
    whole = [(frames, first, to_first)]
    steps = list(whole)
    if [one.shape[2:] for one in others] == [first.shape[2:]]:
        both = torch.cat([first, *others], dim=1).contiguous(memory_format=layout)
        seen = field(both.shape[1])
        whole = [(seen, both, to_first)]
        steps = [(frames[:B], first, to_first[:B])]
        steps += zip(seen[B:].split(B), [both] * (T - 1), to_first[B:].split(B), strict=True)
    else:
        for weight in others:
            read, gradient = field(weight.shape[1])[B:], field(len(weight))[B:]
            whole.append((read, weight, gradient))
            steps += zip(read.split(B), [weight] * (T - 1), gradient.split(B), strict=True)

    def forward() -> None:
        for read, weight, _ in steps:
            F.conv2d(read, weight, padding=padding)

    def step() -> tuple[list[Tensor], list[Tensor]]:
        forward()
        to_reads = [
            conv2d_input(read.shape, weight, gradient, padding=padding) for read, weight, gradient in reversed(steps)
        ]
        to_weights = [
            conv2d_weight(read, list(weight.shape), gradient, padding=padding) for read, weight, gradient in whole
        ]
        return to_reads, to_weights

    return Job(forward, step)


def results(way: Recurrence, x: Tensor, gradient: Tensor, mode: Mode, weights: Weights) -> dict[str, Tensor]:
    """The outputs, and the gradients of the input and of those of our weights that the way has."""
    outputs, to_x, to_own = step(way, x, gradient, mode)
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    made = way.weights(leaves)
    own = [made[name] for name, weight in way.network.named_parameters() if weight.requires_grad]
    back = torch.autograd.grad(own, list(leaves.values()), to_own, allow_unused=True)
    to_ours = {f"gradients of {name}": one for name, one in zip(leaves, back, strict=True) if one is not None}
    return {"outputs": outputs, "gradients of the input": to_x, **to_ours}


def gate(ways: Mapping[str, Recurrence], x: Tensor, gradient: Tensor, mode: Mode, about: str) -> None:
    """All ways give what our reference gives; where a peer lacks weights of ours, as it does with zeros for these.

    Raises:
        UserError: one does not.
    """
    reference = ways["reference"]
    weights = dict(reference.network.get_submodule("forward_cell").named_parameters())
    expected: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name, way in ways.items():
        found = results(way, x, gradient, mode, weights)
        lacking = tuple(own for own in weights if f"gradients of {own}" not in found)
        if lacking not in expected:
            network = deepcopy(reference.network)
            for own in lacking:
                network.get_parameter(f"forward_cell.{own}").detach().zero_()
            plain = reference._replace(network=network)
            expected[lacking] = results(plain, x, gradient, mode._replace(autocast=None), weights)
        for part, one in found.items():
            right = expected[lacking][part]
            difference = float((one - right).abs().max() / right.abs().max())
            if not difference <= mode.tolerance:
                raise UserError(
                    f"The {part} of {name} ({about}) differ from our reference's by {difference:.1e} of the largest "
                    f"({mode.tolerance:g} is allowed); no time is told of results that are not equal: mend them first."
                )


def gate_exactly(maths: str, vectors: bool, device: torch.device, modules: Modules) -> None:
    """All ways of one kind agree in float64, at odd sizes.

    Raises:
        UserError: one does not.
    """
    case = Case(4, 3, 2, 5) if vectors else Case(4, 3, 2, 5, 7, 5)
    ways = side_by_side(maths, case, modules)
    for way in ways.values():
        way.network.to(device, torch.float64)
    x, gradient = (one.detach().double() for one in given(case, device, EXACT))
    gate(ways, x.requires_grad_(), gradient, EXACT, f"{maths}, {EXACT.name}, {case}")


def saved(forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward()
    del outputs  # not earlier: what is kept lies apart only as long as all of it is held
    return sum(kept.values())


def peaks_of(
    maths: str, mode: Mode, cases: Sequence[Case], device: torch.device, modules: Modules
) -> dict[str, list[float]]:
    """MiB that a training step of each way holds at most, at each size."""
    names = list(side_by_side(maths, cases[0], modules))
    return {name: [peak(maths, mode, case, name, device, modules) for case in cases] for name in names}


def peak(maths: str, mode: Mode, case: Case, name: str, device: torch.device, modules: Modules) -> float:
    """MiB that a training step holds at most: on the CPU of a process of its own, on a GPU beyond what lay there before."""

    def stepped(case: Case) -> None:
        way = placed(side_by_side(maths, case, modules)[name], device, mode)
        step(way, *given(case, device, mode), mode)

    def held() -> float:
        # The libraries' own memory comes with the first step, of one frame here.
        stepped(case._replace(T=1, B=1))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = _most(device)
        stepped(case)
        return _most(device) - before

    def child(sender: Connection) -> None:
        torch.set_num_threads(1)
        sender.send(held())

    if device.type == "cuda":
        return held()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        raise UserError(f"{name} with {case} ended without a result; give it more memory.") from None
    finally:
        process.join()


def _most(device: torch.device) -> float:
    """The most memory that this process, or PyTorch on the GPU, has held so far, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 2**10)


def taken(jobs: Mapping[str, Callable[[], object]], device: torch.device, limit: float) -> dict[str, list[float]]:
    """Seconds of each job in rounds in which they take turns, so that what disturbs one disturbs all.

    Args:
        jobs: by their names; a short one runs several times in its turn.
        device: on which they run.
        limit: seconds, after which no further round begins, but for the third.
    """
    names = list(jobs)
    calls = dict.fromkeys(names, 1)

    def turn(name: str) -> float:
        _finish(device)
        began = perf_counter()
        for _ in range(calls[name]):
            jobs[name]()
        _finish(device)
        return (perf_counter() - began) / calls[name]

    for name in names:
        calls[name] = max(1, ceil(TURN / turn(name)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = perf_counter()
    for number in range(ROUNDS):
        if number >= 3 and perf_counter() - began > limit:
            break
        for place in range(len(names)):
            name = names[(number + place) % len(names)]  # not always after the same one
            seconds[name].append(turn(name))
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(maths: str, mode: Mode, case: Case, device: torch.device, modules: Modules, limit: float) -> Result:
    """One line of each table.

    Raises:
        UserError: the ways' results are not equal.
    """
    ways = {name: placed(way, device, mode) for name, way in side_by_side(maths, case, modules).items()}
    x, gradient = given(case, device, mode)
    gate(ways, x, gradient, mode, f"{maths}, {mode.name}, {case}")
    jobs = {name: job(way, x, gradient, mode) for name, way in ways.items()}
    kept = {name: saved(partial(run, way, x, mode)) for name, way in ways.items()}
    if case.size:
        jobs[FLOOR] = floor(ways["reference"].network.get_submodule("forward_cell"), x, mode)
    forward = taken({name: one.forward for name, one in jobs.items()}, device, limit / 4)
    step = taken({name: one.step for name, one in jobs.items()}, device, limit)
    return Result(maths, mode, case, forward, step, kept)
