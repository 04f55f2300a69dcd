"""What a recurrent layer costs: our ways to run it beside each other, beside the bare convolutions, and beside peers.

    python -m benchmarks.recurrences                    # on the CPU: minutes
    python -m benchmarks.recurrences --quick            # fewer sizes: a minute
    python -m benchmarks.recurrences --peers checkouts  # peers from their checkouts in that folder
    python -m benchmarks.recurrences --device cuda

Prints tables, and writes them with a figure to benchmarks/results/recurrences_<hardware>_<date>.md and .png. Gated on
equal outputs and gradients: no time is told of results that differ.

Axes: T time, B batch, X input channels, C hidden channels.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from textwrap import fill
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.measuring import EXACT, FLOOR, MIB, Mode, Result, gate_exactly, measured, peaks_of
from benchmarks.peers import OURS, Case, Modules, find
from forecast import provenance
from forecast.allocator import keep_freed_memory
from forecast.errors import UserError
from forecast.files import whole
from forecast.plots import STYLE

TOLD = (
    "One layer reads T frames of X channels and gives the hidden state of C channels after each. A training step is the "
    "forward pass and the gradients of the input and of all weights, those of a fixed random linear function of all hidden "
    "states. The ways take turns in every round. The first column has the median in milliseconds; the others say how many "
    f"times as long a way took in the same round: median (quartiles). `{FLOOR}`: those that a way cannot do without, alone, "
    "without a gate between them; the gradients of weights are for all frames in one call. Kept: what "
    "autograd holds between the two passes, counted by its hooks, each storage once. All ways have the same weights; their "
    f"outputs and gradients agree to {EXACT.tolerance:g} of the largest in float64, and at each size in the numbers that "
    "are timed. As in train.py the process keeps freed memory for the next request, whatever the way."
)
Sizes = Mapping[str, Sequence[Case]]
"""By the kind of recurrence; the first of the first kind is the base, of which those of other T alone show the growth."""

BASE, ODD = Case(10, 8, 16, 32, 16, 3), Case(7, 3, 3, 20, 17, 3)
OPENSTL = Case(19, 16, 128, 128, 16, 5)
HKO7 = Case(25, 4, 8, 64, 96, 5), Case(25, 4, 192, 192, 32, 5), Case(25, 4, 192, 192, 16, 3)
VARIED = {"B": (1, 2, 16), "X": (1, 4, 64), "C": (8, 64), "size": (8, 32, 64), "kernel": (5,)}
VECTORS = Case(10, 8, 16, 32), Case(20, 32, 64, 128)


def of_lengths(base: Case, lengths: Sequence[int]) -> list[Case]:
    """The base, and the same with other lengths."""
    return [base, *(base._replace(T=T) for T in lengths)]


class Plan(NamedTuple):
    """What is run."""

    sizes: Sizes
    modes: Sequence[Mode] = (Mode("float32"),)
    limit: float = 8.0
    """Seconds for the training steps of one size."""

    def quick(self) -> "Plan":
        """The growth of the first kind, and the first size of each other."""
        sizes = {maths: cases[:1] for maths, cases in self.sizes.items()}
        first = next(iter(sizes))
        return Plan({**sizes, first: self.sizes[first][:4]}, self.modes, self.limit / 4)


PLANS = {
    "cpu": Plan(
        {
            "ConvLSTM": [
                *of_lengths(BASE, (5, 20, 40)),
                *(BASE._replace(**{axis: size}) for axis, sizes in VARIED.items() for size in sizes),
                ODD,
            ],
            "ConvLSTM with peepholes": [BASE, ODD],
            "ConvGRU": [BASE, ODD],
            "ConvGRU, reset before": [BASE, ODD],
            "LSTM of vectors": VECTORS,
            "GRU of vectors": VECTORS,
        }
    ),
    "cuda": Plan(
        {
            "ConvLSTM": [*of_lengths(OPENSTL, (5, 10, 40)), *HKO7],
            "ConvLSTM with peepholes": [OPENSTL, *HKO7],
            "ConvGRU": [OPENSTL, *HKO7],
            "ConvGRU, reset before": [OPENSTL, *HKO7],
            "LSTM of vectors": [Case(19, 16, 128, 128), Case(100, 64, 256, 512)],
            "GRU of vectors": [Case(19, 16, 128, 128), Case(100, 64, 256, 512)],
        },
        [
            # What PyTorch does with float32 there unless told otherwise: convolutions round their factors to 10 bits.
            Mode("float32 (TF32)", tolerance=1e-2),
            Mode("bf16", torch.bfloat16, tolerance=0.1),
            Mode("bf16, channels last", torch.bfloat16, channels_last=True, tolerance=0.1),
        ],
    ),
}


def tables(results: Sequence[Result]) -> str:
    """Of one kind of recurrence in one mode: training step, forward pass, and what is kept; in Markdown."""
    maths, mode, case, *_ = results[0]
    axes = case._fields if case.size else case._fields[:4]
    sizes = [[str(size) for size in one.case[: len(axes)]] for one in results]
    ways = list(results[0].saved)

    def beside(seconds: Sequence[Mapping[str, Sequence[float]]]) -> str:
        ours, *others = seconds[0]
        rows = [
            [*size, f"{1e3 * median(own[ours]):,.2f}", *(spread(ratios(own[name], own[ours])) for name in others)]
            for size, own in zip(sizes, seconds, strict=True)
        ]
        return table([*axes, f"{ours} (ms)", *others], rows)

    kept = [
        [*size, *(f"{own / MIB:,.2f}" for own in one.saved.values())] for size, one in zip(sizes, results, strict=True)
    ]
    parts = [
        f"## {maths}, {mode.name}",
        "Training step:",
        beside([one.step for one in results]),
        "Forward pass alone, without gradients:",
        beside([one.forward for one in results]),
        "Kept for the backward pass (MiB):",
        table([*axes, *ways], kept),
    ]
    return "\n\n".join(parts)


def ratios(seconds: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Of each round."""
    return [one / other for one, other in zip(seconds, beside, strict=True)]


def spread(numbers: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(numbers)
    return f"{middle:.2f} ({low:.2f}, {high:.2f})"


def quartiles(numbers: Sequence[float]) -> list[float]:
    """The three of them."""
    return quantiles(numbers, n=4, method="inclusive")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---:"] * len(titles), *rows))


def by_length(results: Sequence[Result]) -> list[Result]:
    """Those that differ from the first in T alone, the shortest first."""
    base = results[0].case
    return sorted((one for one in results if one.case == base._replace(T=one.case.T)), key=lambda one: one.case.T)


def slope(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """What a further frame costs, by least squares."""
    return float(np.polyfit(lengths, costs, 1)[0])


def growth(results: Sequence[Result], peaks: Mapping[str, Sequence[float]], lengths: Sequence[int]) -> str:
    """Time and memory by T of one kind of recurrence in one mode, in Markdown.

    Args:
        results: of all sizes.
        peaks: MiB of each way.
        lengths: to which they belong.
    """
    maths, mode, *_ = results[0]
    own = by_length(results)
    frames = [one.case.T for one in own]
    rows = []
    for name in own[0].step:
        row = [name, f"{1e3 * slope(frames, [min(one.step[name]) for one in own]):,.2f}"]
        if name in peaks:
            kept = slope(frames, [one.saved[name] for one in own])
            row += [f"{kept / MIB:,.3f}", *(f"{one:,.0f}" for one in peaks[name])]
        rows.append([*row, *[""] * (3 + len(lengths) - len(row))])
    titles = ["", "step, ms", "kept, MiB", *(f"peak with T {T}, MiB" for T in lengths)]
    told = (
        f"What a further frame costs, over T {', '.join(map(str, frames))} (the least time of each, a straight line through "
        "all), and the most memory that a step holds:"
    )
    return "\n\n".join([f"## {maths}, {mode.name}: by length", told, table(titles, rows)])


def drawn(results: Sequence[Result], about: str) -> Figure:
    """The time of each way beside the fastest peer's, by size; time and memory by T.

    Args:
        results: of one kind of recurrence, in every mode.
        about: where they are from.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.8 + 0.34 * max(len(results), 8)), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1.0))
        left, upper, lower = (figure.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1)))
        names = list(results[0].step)
        colours = {name: "0.55" if name == FLOOR else f"C{number}" for number, name in enumerate(names)}
        peers = [name for name in names if name not in (*OURS, FLOOR)] or ["reference"]
        offsets = np.linspace(-0.25, 0.25, len(names))
        for row, one in enumerate(results):
            fastest = [min(seconds) for seconds in zip(*(one.step[name] for name in peers), strict=True)]
            for name, offset in zip(names, offsets, strict=True):
                low, middle, high = quartiles(ratios(one.step[name], fastest))
                place = row + offset
                left.plot([low, high], [place, place], color=colours[name], linewidth=1.0)
                left.plot(middle, place, "o", color=colours[name], label=name if row == 0 else None)
        left.axvline(1.0, color="0.3", linewidth=0.8, zorder=0)
        modes = len({one.mode for one in results}) > 1
        labels = [label(one.case, results[0].case) + (f", {one.mode.name}" if modes else "") for one in results]
        left.set_yticks(range(len(results)), labels)
        left.invert_yaxis()
        left.set_title(
            f"{results[0].maths}: time of a step over\nthat of the fastest of {', '.join(peers)}", loc="left"
        )
        figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
        own = by_length([one for one in results if one.mode == results[0].mode])
        lengths = [one.case.T for one in own]
        for name in names:
            upper.plot(lengths, [1e3 * min(one.step[name]) for one in own], "o-", color=colours[name])
            if name != FLOOR:
                lower.plot(lengths, [one.saved[name] / MIB for one in own], "o-", color=colours[name])
        upper.set_title("least time of a step (ms)", loc="left")
        lower.set_title("kept for the backward pass (MiB)", loc="left")
        lower.set_xlabel("frames")
        for ax in (upper, lower):
            ax.set(xlim=(0, None), ylim=(0, None))
        left.set_xlim(0, None)
        figure.text(0.99, -0.02, fill(about, 170), ha="right", va="top", fontsize=6, color="0.45")
    return figure


def run(plan: Plan, device: torch.device, modules: Modules) -> tuple[list[Result], list[str]]:
    """All results of the first kind, which are drawn, and the sections of the report.

    Raises:
        UserError: the ways' results are not equal.
    """
    first, own = next(iter(plan.sizes.items()))
    base = own[0]
    lengths = sorted({base.T, max(case.T for case in own if case == base._replace(T=case.T))})
    ends = [base._replace(T=T) for T in lengths]
    # Before all else, while this process, from which theirs are forked, holds next to nothing.
    peaks = {mode: peaks_of(first, mode, ends, device, modules) for mode in plan.modes}
    for maths, cases in plan.sizes.items():
        gate_exactly(maths, vectors=not cases[0].size, device=device, modules=modules)
    drawn: list[Result] = []
    sections = []
    for maths, cases in plan.sizes.items():
        # Vectors have one layout alone.
        for mode in [mode for mode in plan.modes if cases[0].size or not mode.channels_last]:
            results = [measured(maths, mode, case, device, modules, plan.limit) for case in cases]
            sections.append(tables(results))
            if maths == first:
                sections.append(growth(results, peaks[mode], lengths))
                drawn += results
    return drawn, sections


def label(case: Case, base: Case) -> str:
    """What differs from the base; all sizes where it is not one."""
    axes = zip(case._fields, case, base, strict=True)
    different = [f"{axis} {size}" for axis, size, usual in axes if size != usual]
    if len(different) == 1:
        return different[0]
    sizes = [f"{axis} {size}" for axis, size in zip(case._fields, case, strict=True)]
    return f"{', '.join(sizes[:3])},\n{', '.join(sizes[3:])}"


def main(arguments: Sequence[str] | None = None, plans: Mapping[str, Plan] = PLANS) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="What a recurrent layer costs, beside the bare convolutions and peers."
    )
    parser.add_argument("--peers", type=Path, help="folder with checkouts of peers (default: those that are installed)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few sizes, a minute on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/recurrences_<hardware>_<date>.md")
    wanted = parser.parse_args(arguments)
    device = torch.device(wanted.device)
    plan = plans[wanted.device].quick() if wanted.quick else plans[wanted.device]
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("There is no CUDA device here; run this where there is one, or with --device cpu.")
        found = find(wanted.peers)
        results, sections = run(plan, device, found.modules)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    hardware, today = provenance.hardware(), f"{datetime.now(UTC):%Y-%m-%d}"
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"][: device.type == "cuda"]])
    packages = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    command = ["python", "-m", "benchmarks.recurrences", *(sys.argv[1:] if arguments is None else arguments)]
    about = (
        f"{machine}, threads: {torch.get_num_threads()}; {today}; {packages}; commit {provenance.commit()}; "
        f"`{shlex.join(command)}`"
    )
    text = "\n\n".join(["# What a recurrent layer costs", about, TOLD, f"Peers. {found.told}.", *sections])
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = wanted.out or Path(__file__).parent / "results" / f"recurrences_{slug}_{today}.md"
    with whole(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    with whole(path.with_suffix(".png")) as temporary:
        drawn(results, about).savefig(temporary, dpi=150, bbox_inches="tight", format="png")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    main()
