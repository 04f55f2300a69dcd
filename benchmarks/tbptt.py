"""What backpropagation through time keeps: bytes saved for the backward pass, and peak memory, by length of the stream.

    python benchmarks/tbptt.py

Prints a table, and writes it with a figure to benchmarks/results/tbptt_<hardware>_<date>.md and .png. Gated on equal
gradients where the ways are to be equal.

Axes: B lanes, L frames of a stream, S forecast frames, H W space.
"""

import argparse
import multiprocessing
import re
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isqrt
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from forecast import config, provenance
from forecast.batch import Frames
from forecast.command_line import load
from forecast.errors import UserError
from forecast.files import whole
from forecast.plots import STYLE
from forecast.tbptt import TruncatedBPTT

LENGTHS = (20, 40, 100, 200, 500, 1000, 2000)
EVERY = 10  # frames between forecasts, and frames of each
STEPS = 20  # of truncated backpropagation
SIZE = 32
MODEL = ("model=convlstm", "model.network.hidden=[8,8]")
TOLERANCE = 1e-6  # between gradients, relative to the largest


class Way(NamedTuple):
    """How gradients come back."""

    name: str
    steps: int | None
    """tbptt.steps; None: the whole stream."""
    recompute: bool
    """model.network.recompute=sqrt(L)."""


WAYS = (
    Way("whole stream", None, False),
    Way("whole stream, recomputed", None, True),
    Way(f"tbptt.steps={STEPS}", STEPS, False),
)


class Cost(NamedTuple):
    """Of one stream."""

    saved: int
    """Bytes, the most that were kept for gradients at a time."""
    peak: float
    """MiB that the process held beyond what it began with."""


def network_of(way: Way, length: int) -> nn.Module:
    """The same weights for each way."""
    torch.manual_seed(0)
    recompute = [f"model.network.recompute={isqrt(length)}"] if way.recompute else []
    model = load(provenance.SOURCES / "conf", [*MODEL, *recompute]).model
    network, _ = config.build_network(model, channels=1, static_channels=0, size=(SIZE, SIZE))
    assert isinstance(network, nn.Module)
    return network


def backpropagate(network: nn.Module, way: Way, length: int) -> int:
    """Squared error of the forecasts along a stream of noise, chunk by chunk, into the gradients; the bytes kept at most."""
    generator = torch.Generator().manual_seed(1)
    stream = torch.rand(1, length + EVERY, 1, SIZE, SIZE, generator=generator)
    steps = length if way.steps is None else way.steps
    tbptt = TruncatedBPTT(steps, EVERY)
    ones = torch.ones(1, dtype=torch.long)
    most = 0
    for begin in range(0, length, steps):
        past, truth = stream[:, begin : begin + steps], stream[:, begin + steps : begin + steps + EVERY]
        chunk = Frames(
            past, past >= 0, truth, truth >= 0, past.new_zeros(1, 0, SIZE, SIZE), ones, ones, torch.tensor([begin == 0])
        )
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state = tbptt.carried(past.device)
            losses = []
            for window in tbptt.windows(chunk):
                output = network(window.past, EVERY, static=window.static, state=state, first=window.first)
                losses.append((output.raw - window.truth).square().mean())
                state = output.state
        most = max(most, sum(kept.values()))
        (torch.stack(losses).sum() * EVERY / length).backward()
        tbptt.carry(state)
    return most


def measured(way: Way, length: int) -> Cost:
    """In a process of its own, whose memory is its own."""

    def child(sender: Connection) -> None:
        torch.set_num_threads(1)
        network = network_of(way, length)
        before = _peak()
        saved = backpropagate(network, way, length)
        sender.send(Cost(saved, _peak() - before))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return Cost(*receiver.recv())
    except EOFError:
        raise UserError(f"{way.name} over {length} frames ended without a result; give it more memory.") from None
    finally:
        process.join()


def gate(length: int = 3 * STEPS) -> None:
    """The gradients of the ways that must be equal are.

    Raises:
        UserError: they are not.
    """
    found = []
    for way in (WAYS[0], WAYS[1], Way("one chunk", length, False)):
        network = network_of(way, length)
        backpropagate(network, way, length)
        found.append(torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]))
    difference = max(float((one - found[0]).abs().max() / found[0].abs().max()) for one in found)
    if difference > TOLERANCE:
        raise UserError(f"The gradients differ by {difference:.1e} ({TOLERANCE:g} is allowed); mend them first.")


def drawn(costs: dict[Way, list[Cost]], lengths: Sequence[int], about: str) -> Figure:
    """Bytes and memory against the length."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.7), layout="constrained")
        panels = figure.subplots(1, 2)
        for way, own in costs.items():
            panels[0].plot(lengths, [one.saved / 2**20 for one in own], marker="o", label=way.name)
            panels[1].plot(lengths, [one.peak for one in own], marker="o", label=way.name)
        for ax, title in zip(panels, ("saved for the backward pass (MiB)", "peak memory (MiB)"), strict=True):
            ax.set(xscale="log", yscale="log", xlabel="frames of the stream")
            ax.set_title(title, loc="left")
        panels[0].legend(frameon=False)
        figure.text(0.99, -0.02, about, ha="right", va="top", fontsize=6, color="0.45")
    return figure


def _peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: Sequence[str] | None = None, lengths: Sequence[int] = LENGTHS) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What backpropagation through time keeps, by length of the stream.")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/tbptt_<hardware>_<date>.md")
    given = parser.parse_args(arguments)
    hardware, today = provenance.hardware(), f"{datetime.now(UTC):%Y-%m-%d}"
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]])
    packages = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    about = f"{machine}; {today}; {packages}; commit {provenance.commit()}; python benchmarks/tbptt.py"
    try:
        gate()
        costs = {way: [measured(way, length) for length in lengths] for way in WAYS}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    titles = ["frames", *(f"{way.name}: saved, peak MiB" for way in WAYS)]
    rows = [
        [f"{length:,}", *(f"{own[i].saved / 2**20:,.1f}, {own[i].peak:,.0f}" for own in costs.values())]
        for i, length in enumerate(lengths)
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---:"] * len(titles), *rows))
    told = (
        f"One lane of {SIZE} x {SIZE} pixels, {' '.join(MODEL)}, a forecast of {EVERY} frames every {EVERY}. Saved: the "
        "tensors that autograd keeps, counted by its hooks, each storage once. Peak: of the process beyond its start, "
        "the stream itself included (8 MiB for 2,000 frames). "
        f"The gradients of the whole stream are equal to {TOLERANCE:g}, recomputed or not, and in one chunk."
    )
    text = "\n\n".join(["# What backpropagation through time keeps", about, told, table])
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = given.out or Path(__file__).parent / "results" / f"tbptt_{slug}_{today}.md"
    with whole(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    with whole(path.with_suffix(".png")) as temporary:
        drawn(costs, lengths, about).savefig(temporary, dpi=150, bbox_inches="tight", format="png")


if __name__ == "__main__":
    main()
