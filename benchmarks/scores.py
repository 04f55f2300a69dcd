"""What the scores cost: beside a network's forward pass, and beside pysteps on equal results. All on the CPU.

    python benchmarks/scores.py                            # both
    python benchmarks/scores.py --cost                     # the default scores beside the forward pass
    python benchmarks/scores.py --pysteps --samples 1000   # CSI and FSS beside pysteps

Prints tables, and writes them to benchmarks/results/<hardware>_<date>.md.

Axes: B batch, S frames, H W space, P thresholds, N scales.
"""

import argparse
import math
import re
import resource
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import NormalDist, median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from forecast import config, provenance
from forecast.allocator import keep_freed_memory
from forecast.baselines.extrapolation import quiet
from forecast.batch import Forecast
from forecast.command_line import load
from forecast.errors import UserError
from forecast.files import whole
from forecast.forecaster import NetworkForecaster
from forecast.metrics.contingency import Contingency
from forecast.metrics.metric import Scope
from forecast.metrics.neighbourhood import Fractions
from forecast.scoring import metrics_of
from forecast.sections import Metrics
from forecast.skill import Skill
from forecast.units import Decibel, Linear, Quantity, Transform, z_r_relation

SHARE = 0.1  # of a forward pass: scores cost less, that is promised
FASTER = 10.0  # times faster than pysteps, or more, that is promised too
TOLERANCE = 1e-10  # between our scores and those of pysteps
ROUNDS = 5
LIMIT = 60.0  # seconds, after which no further round begins
TOGETHER = 2  # samples in a batch beside pysteps
MEMORY = "As in train.py the process keeps freed memory for the next request."
RATES = (0.5, 2.0, 5.0, 10.0, 30.0)  # mm/h, the thresholds of HKO-7
Jobs = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """A model of conf/model, on wet frames of one size."""

    model: str
    quantity: Quantity
    transform: Transform
    samples: int
    past: int
    future: int
    size: int


class Stream(NamedTuple):
    """Rain to be scored by us and pysteps."""

    wet: float  # the share of pixels with 0.5 mm/h or more, about
    size: int = 480
    steps: int = 20
    thresholds: tuple[float, ...] = RATES
    scales: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


CASES = (
    Case("convlstm", Quantity("digits", "intensity", "1", (0.5,)), Linear(), 8, 10, 10, 48),
    Case("convlstm", Quantity("dbz", "echo", "dBZ", (10, 20, 30, 40), -10.0), Linear(-10.0, 60.0), 8, 6, 6, 256),
    Case("hko7_convlstm", Quantity("rate", "rain rate", "mm/h", RATES), Decibel("hko7"), 1, 5, 20, 480),
)
STREAMS = (Stream(wet=0.1), Stream(wet=0.6))


class Fields(NamedTuple):
    """What a metric is given: rain that moves and changes, and a forecast that only moves it."""

    forecast: Tensor  # B S 1 H W, mm/h
    truth: Tensor  # B S 1 H W, mm/h
    valid: Tensor  # B S 1 H W bool; corners lie beyond the radar's reach
    block: Tensor  # B zeros


def rain(samples: int, steps: int, size: int, wet: float, seed: int) -> Fields:
    """0.5 exp(1.5 (g - q)) mm/h of a smooth Gaussian field g whose share `wet` is above q; no rain below 0.1 mm/h."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 2, size // 16 + 2, size // 16 + 2, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic")
    now, later = (smooth / smooth.std((2, 3), keepdim=True)).unbind(1)
    q = NormalDist().inv_cdf(1 - wet)

    def sequence(change: float) -> Tensor:
        frames = []
        for step in range(1, steps + 1):
            angle = change * step / steps
            g = (math.cos(angle) * now + math.sin(angle) * later).roll((step, 2 * step), (1, 2))
            rate = 0.5 * torch.exp(1.5 * (g - q))
            frames.append(torch.where(rate >= 0.1, rate, 0.0)[:, None])
        return torch.stack(frames, 1)

    truth = sequence(change=1.0)
    squares = torch.linspace(-1, 1, size).square()
    valid = (squares[:, None] + squares < 1.6).expand_as(truth).contiguous()
    return Fields(sequence(change=0.0), truth, valid, torch.zeros(samples, dtype=torch.int64))


def beside_forward_pass(cases: Sequence[Case], every: Sequence[int]) -> str:
    """The default scores of a test and of a validation beside the forward pass, in Markdown.

    Args:
        cases: models as they are shipped, their weights untrained.
        every: numbers of threads.
    """
    parts, largest = [], 0.0
    for case in cases:
        jobs = _jobs(case)
        rows = [[name] for name in jobs]
        for threads in every:
            torch.set_num_threads(threads)
            seconds = _rounds(jobs)
            shares = {name: one / seconds["forward pass"] for name, one in seconds.items()}
            largest = max(largest, shares["test"], shares["validation"])
            for row in rows:
                row += [f"{seconds[row[0]] * 1e3:,.2f}", f"{shares[row[0]]:.1%}"]
        frames = f"{case.samples} x {case.future} x {case.size}x{case.size}"
        titles = [title for threads in every for title in (f"ms (threads: {threads})", "share")]
        parts += [
            f"model={case.model}, {case.past} frames given; {frames} scored, thresholds {case.quantity.thresholds}:",
            _table(["", *titles], rows),
        ]
    kept = f"Less than {SHARE:.0%} is promised; at most {largest:.1%}: {_verdict(largest < SHARE)}."
    return "\n\n".join(["## Beside the forward pass", *parts, kept])


def _jobs(case: Case) -> Jobs:
    """The forward pass, all scores of a test, all of a validation, and each metric of both alone."""
    cfg = load(provenance.SOURCES / "conf", [f"model={case.model}"])
    size = (case.size, case.size)
    network, head = config.build_network(cfg.model, channels=1, static_channels=0, size=size)
    forecaster = NetworkForecaster(network.eval(), head, case.transform, case.quantity.thresholds)
    rates = rain(case.samples, case.past + case.future, case.size, wet=0.6, seed=0)
    # An untrained network forecasts no event, which costs little to score: the forecast comes from elsewhere.
    forecast, truth = (_in_units(case.quantity, part) for part in rates[:2])
    past, truth = truth.split([case.past, case.future], 1)
    known, valid = rates.valid.split([case.past, case.future], 1)
    scored = Forecast(forecast[:, case.past :]), truth, valid, rates.block
    static = torch.zeros(case.samples, 0, *size)
    jobs: Jobs = {
        "forward pass": partial(forecaster.predict, past, known, case.future, static=static, time=rates.block)
    }
    alone: Jobs = {}
    for kind in ("test", "validation"):
        skill = Skill(
            [kind], Scope(case.quantity, case.future, 1, size=size), None, metrics_of(kind, cfg.metrics[kind], 0)
        )
        jobs[kind] = partial(skill.update, kind, *scored)
        alone |= {f"{kind}: {type(one).__name__}": partial(one.update, *scored) for one in skill.metrics(kind)}
    return jobs | alone


def _in_units(quantity: Quantity, rate: Tensor) -> Tensor:
    """mm/h as rain rate, as reflectivity, or as digits from 0 to 1."""
    if quantity.units == "dBZ":
        return z_r_relation("marshall_palmer").reflectivity(rate).clamp_min(quantity.floor)
    return rate if quantity.units == "mm/h" else (rate / 10).clamp_max(1.0)


def _rounds(jobs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each job: the median of rounds in which they take turns, so that what disturbs one disturbs all."""
    rounds: list[dict[str, float]] = []
    began = perf_counter()
    while len(rounds) <= ROUNDS and perf_counter() - began < LIMIT:
        rounds.append({name: _seconds(job) for name, job in jobs.items()})
    # The first one warms up.
    return {name: median(one[name] for one in rounds[1:] or rounds) for name in jobs}


def beside_pysteps(streams: Sequence[Stream], samples: int, every: Sequence[int]) -> str:
    """CSI and FSS of many samples by us, and of the first batch of them by pysteps, which has no threads; in Markdown.

    Args:
        streams: kinds of rain.
        samples: of each; as many as fit into whole batches.
        every: numbers of threads; the promise is for the last, the others score a tenth of the samples.

    Raises:
        UserError: too few samples, no pysteps, or our scores are not those of pysteps.
    """
    if samples < 10 * TOGETHER:
        raise UserError(f"samples is {samples}; memory is compared after a tenth, so give {10 * TOGETHER} or more.")
    rows, least = [], math.inf
    for stream in streams:
        scope = Scope(Quantity("rate", "rain rate", "mm/h", stream.thresholds), stream.steps, 1)
        kinds: Metrics = {"contingency": Contingency, "fractions": partial(Fractions, scales=stream.scales)}
        names = [f"threads: {threads}" for threads in every]
        skill = Skill(names, scope, None, kinds)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        memory = []
        for seed in range(samples // TOGETHER):
            fields = rain(TOGETHER, stream.steps, stream.size, stream.wet, seed)
            forecast, *others = fields
            for name, threads in zip(names, every, strict=True):
                if name != names[-1] and seed >= samples // TOGETHER // 10:
                    continue
                torch.set_num_threads(threads)
                seconds[name].append(_seconds(partial(skill.update, name, Forecast(forecast), *others)) / TOGETHER)
            if seed == 0:
                theirs, slow = pysteps_scores(fields, stream)
                for name in names:
                    ours = skill.dataset().sel(model=name)
                    agree("csi", ours["csi"].transpose("lead_time", "threshold").values, theirs["csi"])
                    agree("fss", ours["fss"].transpose("lead_time", "threshold", "scale").values, theirs["fss"])
                wet = (fields.truth >= 0.5)[fields.valid].float().mean().item()
            memory.append(_peak())
        fast = [median(seconds[name]) for name in names]
        least = min(least, slow / fast[-1])
        frames = f"{wet:.0%} wet, {stream.steps} x {stream.size}x{stream.size}"
        sizes = f"{len(stream.thresholds)}, {len(stream.scales)}"
        cells = [frames, sizes, f"{slow:.3f}", *(cell for one in fast for cell in (f"{one:.3f}", f"{slow / one:.1f}"))]
        rows.append([*cells, f"{memory[len(memory) // 10 - 1]:,.0f}", f"{memory[-1]:,.0f}"])
    ours_of = [title for name in names for title in (f"ours ({name})", "times faster")]
    titles = ["frames", "thresholds, scales", "pysteps", *ours_of, "peak MiB after 10 %", "at the end"]
    told = (
        f"CSI and FSS by lead time, seconds a sample. We score {samples // TOGETHER * TOGETHER:,} samples of each kind, "
        f"pysteps {version('pysteps')}, which has no threads, the first {TOGETHER}, a field at a time; the scores of these "
        f"agree to {TOLERANCE:g}."
    )
    kept = f"{FASTER:g} times faster is promised with all threads; at least {least:.1f}: {_verdict(least >= FASTER)}."
    return "\n\n".join(["## Beside pysteps", told, _table(titles, rows), kept])


def pysteps_scores(fields: Fields, stream: Stream) -> tuple[dict[str, NDArray[np.float64]], float]:
    """CSI (S P) and FSS (S P N) of all samples pooled, by pysteps' own accumulators, and the seconds for a sample."""
    try:
        with quiet():
            from pysteps.verification import detcatscores, spatialscores
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'stormcell[pysteps]', or give --cost.") from None
    forecast, truth = (
        torch.where(fields.valid, part, torch.nan)[:, :, 0].numpy() for part in (fields.forecast, fields.truth)
    )
    csi = np.empty((stream.steps, len(stream.thresholds)))
    fss = np.empty((*csi.shape, len(stream.scales)))
    began = perf_counter()
    for s, (p, threshold) in product(range(stream.steps), enumerate(stream.thresholds)):
        # Events of its categorical scores are `>`, those of its FSS and all of ours `>=`.
        table = detcatscores.det_cat_fct_init(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
        windows = [spatialscores.fss_init(threshold, scale) for scale in stream.scales]
        for f, o in zip(forecast[:, s], truth[:, s], strict=True):
            detcatscores.det_cat_fct_accum(table, f, o)
            for window in windows:
                spatialscores.fss_accum(window, f, o)
        with np.errstate(invalid="ignore"):  # 0 / 0 where there is no event: NaN, as ours
            csi[s, p] = detcatscores.det_cat_fct_compute(table, "CSI")["CSI"]
            fss[s, p] = [spatialscores.fss_compute(window) for window in windows]
    return {"csi": csi, "fss": fss}, (perf_counter() - began) / len(forecast)


def agree(name: str, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    """The gate: numbers in the same places, and the same to 1e-10.

    Raises:
        UserError: they do not agree, or there is no number at all.
    """
    here, there = np.isfinite(ours), np.isfinite(theirs)
    difference = np.abs(ours - theirs)[here & there].max(initial=0.0)
    if not here.any() or (here != there).any() or difference > TOLERANCE:
        raise UserError(
            f"The {name} is a number in {here.sum()} places by us and in {there.sum()} by pysteps, with differences up to "
            f"{difference:.1e} ({TOLERANCE:g} is allowed); no time is told of scores that are not equal: mend them first."
        )


def _seconds(job: Callable[[], object]) -> float:
    began = perf_counter()
    job()
    return perf_counter() - began


def _peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _verdict(kept: bool) -> str:
    return "kept" if kept else "**not kept**"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in titles[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))


def main(
    arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES, streams: Sequence[Stream] = STREAMS
) -> None:
    """The command; prints the tables and writes them to a file."""
    parser = argparse.ArgumentParser(description="What the scores cost; without --cost and --pysteps both.")
    parser.add_argument("--cost", action="store_true", help="the default scores beside the forward pass")
    parser.add_argument("--pysteps", action="store_true", help="CSI and FSS beside pysteps, on equal results")
    parser.add_argument("--samples", type=int, default=100, help="that we score beside pysteps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<hardware>_<date>.md")
    given = parser.parse_args(arguments)
    both = given.cost == given.pysteps
    threads = torch.get_num_threads()
    every = sorted({1, threads})
    hardware, today = provenance.hardware(), f"{datetime.now(UTC):%Y-%m-%d}"
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]])
    packages = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    command = shlex.join(["python", "benchmarks/scores.py", *(sys.argv[1:] if arguments is None else arguments)])
    about = f"{machine}; {today}; {packages}; commit {provenance.commit()}; `{command}`"
    sections = []
    try:
        # First, since it asks for the most memory that was ever held.
        if both or given.pysteps:
            sections.append(beside_pysteps(streams, given.samples, every))
        if both or given.cost:
            sections.append(beside_forward_pass(cases, every))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        torch.set_num_threads(threads)
    text = "\n\n".join(["# What the scores cost", about, MEMORY, *sections])
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    with whole(given.out or Path(__file__).parent / "results" / f"{slug}_{today}.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    main()
