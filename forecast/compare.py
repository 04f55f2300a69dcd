"""Models of several runs side by side, each against a reference, with an interval for every difference.

    python -m forecast.compare RUN... [--reference NAME] [--score csi fss_20_8px ...] [--csv FILE] [--draws N]

A RUN is a folder with the skill.nc of a test. Runs that were not scored under one protocol are refused, with what differs.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forecast.errors import UserError
from forecast.files import whole
from forecast.intervals import DRAWS, LEAST_EVENTS, Pools, difference
from forecast.protocol import ROOT, Run, check_alike, read
from forecast.skill import catalogue, columns, derive
from forecast.tables import REFERENCES, middle_scale

SCORES = ("csi", "frequency_bias", "mse", "fss")
"""Those that are shown where none are chosen."""
LEAST_DRAWS = 1000


@dataclass
class Entry:
    """A model, and the runs that have the same counts of it."""

    model: str
    name: str
    """As it is shown: with its run, where another run has other counts of that model."""
    counts: xr.Dataset
    runs: list[Run]

    @property
    def own(self) -> Run | None:
        """The run that is about this model; None where it was only scored beside others."""
        return next((run for run in self.runs if run.provenance["model"]["name"] == self.model), None)


class Column(NamedTuple):
    """One score at one threshold and scale, all models beside the reference."""

    score: str
    suffix: str
    """Its threshold and scale: _20, _20_8px."""
    pools: Pools

    @property
    def name(self) -> str:
        """As in skill.csv."""
        return f"{self.score}{self.suffix}"

    def rows(self, most: int | None = None) -> list[tuple[str, xr.Dataset]]:
        """Lead times (of more than `most` every n-th and the last), then their mean, then all of them pooled."""
        by_lead = self.pools.lead_time
        leads = by_lead.sizes["lead_time"]
        chosen = range(leads - 1, -1, -max(1, -(-leads // (most or leads))))[::-1]
        parts = [by_lead.isel(lead_time=row) for row in chosen]
        labelled = [(f"{float(part['lead_time']):g}", part) for part in parts]
        return [*labelled, ("mean", self.pools.mean), ("pooled", self.pools.pooled)]


def join(runs: Sequence[Run]) -> list[Entry]:
    """All models of all runs: one of the same counts in several runs is there once, one of other counts tells its run."""
    entries: list[Entry] = []
    for run in runs:
        for model in map(str, run.counts["model"].values):
            counts = run.counts.sel(model=model, drop=True)
            same = [one for one in entries if one.model == model and _equal(one.counts, counts)]
            if same:
                same[0].runs.append(run)
            else:
                entries.append(Entry(model, model, counts, [run]))
    names = [entry.model for entry in entries]
    labels = labels_of([run.folder for run in runs])
    for entry in entries:
        if names.count(entry.model) > 1:
            entry.name = f"{entry.name} ({labels[entry.runs[0].folder]})"
    return entries


def unlike(entries: Sequence[Entry]) -> list[str]:
    """Says of which references the runs have other counts: what they were prepared on, or computed by, is not the same."""
    models = dict.fromkeys(entry.model for entry in entries)
    groups = ([entry.name for entry in entries if entry.model == model and not entry.own] for model in models)
    return [
        f"Not the same in these runs, though no run is about it: {', '.join(names)}."
        for names in groups
        if len(names) > 1
    ]


def labels_of(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder by as many of its last parts as tell all apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for length in range(1, 1 + max(map(len, parts.values()))):
        labels = {folder: "/".join(own[-length:]) for folder, own in parts.items()}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def chosen(skill: xr.Dataset, asked: Sequence[str] | None) -> dict[str, list[str]]:
    """The columns to show of each score, by their suffixes.

    Args:
        skill: sums.
        asked: names of scores, which stand for all their thresholds at the middle scale, and of columns as in skill.csv.

    Raises:
        UserError: a name that is neither.
    """
    pooled = derive(skill.sum(["block", "lead_time"]))
    middle = derive(middle_scale(skill).sum(["block", "lead_time"]))
    known = {f"{name}{suffix}": (str(name), suffix) for name in pooled for suffix in columns(pooled[name])}
    result: dict[str, list[str]] = {}
    for name in asked or [name for name in SCORES if name in pooled]:
        if name not in known and (name not in pooled or not columns(pooled[name])):
            raise UserError(f"There is no score {name!r} in all of these runs; choose among {', '.join(known)}.")
        score, suffixes = (known[name][0], [known[name][1]]) if name in known else (name, list(columns(middle[name])))
        result[score] = list(dict.fromkeys([*result.get(score, []), *suffixes]))
    return result


def compared(skill: xr.Dataset, reference: str, asked: Sequence[str] | None, draws: int) -> Iterator[Column]:
    """Every column that is asked for; the arguments are those of `chosen` and of `intervals.difference`."""
    middle = middle_scale(skill)
    for score, suffixes in chosen(skill, asked).items():
        # Other scales are resampled only where somebody asks for one.
        few = set(suffixes) <= set(columns(derive(middle.sum(["block", "lead_time"]))[score]))
        pools = difference(middle if few else skill, score, reference, draws)
        apart = [{name: columns(data) for name, data in pool.data_vars.items()} for pool in pools]
        for suffix in suffixes:
            own = (xr.Dataset({name: parts[suffix] for name, parts in pool.items()}) for pool in apart)
            yield Column(score, suffix, Pools(*own))


def table(column: Column, reference: str, lead_units: str) -> Table:
    """A row for each lead time and model, and below them the mean over lead times and all lead times pooled."""
    title = f"{column.name}: {catalogue()[column.score].long_name}, difference to {escape(reference)}"
    made = Table(title=title, title_justify="left")
    made.add_column(f"lead time ({lead_units})", justify="right")
    made.add_column("model", overflow="fold")
    for heading in (column.name, "difference", "95 % interval", ""):
        made.add_column(heading, justify="right", no_wrap=True)
    for label, pool in column.rows(most=12):
        made.add_row(label, escape(reference), f"{float(pool['reference']):.4g}")
        for model in pool["model"].values:
            one = {name: data.sel(model=model).item() for name, data in pool.data_vars.items() if "model" in data.dims}
            cells = [f"{one['value']:.4g}", f"{one['difference']:+.3g}"]
            if np.isfinite(one["low"]):
                interval = escape(f"[{one['low']:+.3g}, {one['high']:+.3g}]")
                cells += [interval, "*" if one["significant"] else "n.s."]
            made.add_row("", escape(str(model)), *cells)
        made.add_section()
    return made


def note(column: Column, draws: int) -> str:
    """How many events (blocks) the intervals rest on, and why there are none."""
    events = np.concatenate([pool["events"].values.ravel() for pool in column.pools])
    few, enough = events[events < LEAST_EVENTS], events[events >= LEAST_EVENTS]
    lines = []
    if enough.size:
        lines.append(f"{_range(enough)} events, drawn {draws:,} times; *: the interval excludes 0, n.s.: it does not.")
    if few.size:
        noun = "event is" if few.max() == 1 else "events are"
        lines.append(f"{_range(few)} {noun} too few for an interval, which takes {LEAST_EVENTS}.")
    return "\n".join(lines)


def origins(entries: Sequence[Entry], labels: Mapping[Path, str]) -> Table:
    """Where each model's scores come from."""
    made = Table(title="provenance", title_justify="left")
    for heading in ("model", "run", "version", "commit", "seed", "hardware", "scored (UTC)", "trained"):
        made.add_column(heading, overflow="fold")
    for entry in entries:
        known = (entry.own or entry.runs[0]).provenance
        trained = known["trained"] if entry.own else None
        cells = [entry.name, ", ".join(labels[run.folder] for run in entry.runs), known["version"]]
        cells += [_commit(known["commit"]), str((trained or known)["seed"])]
        cells += [
            ", ".join(known["hardware"]["gpus"]) or known["hardware"]["cpu"],
            known["time"][:16].replace("T", " "),
        ]
        cells += [f"epoch {trained['epoch']}, step {trained['step']}, data {trained['fingerprint']}" if trained else ""]
        made.add_row(*map(escape, cells))
    return made


def to_csv(shown: Sequence[Column], reference: str, path: Path) -> None:
    """All columns, lead times and models with all digits; lead_time is a number, mean or pooled."""
    names = ("value", "reference", "difference", "low", "high", "events", "significant")
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["score", "lead_time", "model", "against", *names])
        for column in shown:
            for label, pool in column.rows():
                for model in pool["model"].values:
                    values = [pool[name].sel(model=model).item() for name in names if name != "reference"]
                    values.insert(1, pool["reference"].item())
                    row = ("" if value != value else value for value in values)
                    writer.writerow([column.name, label, model, reference, *row])


def _equal(one: xr.Dataset, other: xr.Dataset) -> bool:
    """The same counts, and sums that differ by no more than the order in which processes add them up."""
    for name in one.data_vars.keys() & other.data_vars.keys():
        ours, theirs = one[name].values, other[name].values
        exact = ours.dtype.kind in "iu"
        scale = 0.0 if exact else 1e-9 * float(np.abs(ours).max(initial=0.0))
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=scale, equal_nan=True):
            return False
    return True


def _together(entries: Sequence[Entry]) -> xr.Dataset:
    """One Dataset of the sums that all have."""
    names = [name for name in entries[0].counts.data_vars if all(name in entry.counts for entry in entries)]
    parts = [entry.counts[names].expand_dims(model=[entry.name]) for entry in entries]
    joined = xr.concat(parts, "model", data_vars="all", coords="minimal", compat="override", join="exact")
    return joined.assign_coords(threshold=entries[0].counts["threshold"])


def reference_of(entries: Sequence[Entry], asked: str | None) -> str:
    """The model that the others are set against.

    Raises:
        UserError: there is no such model, or no other.
    """
    names = [entry.name for entry in entries]
    wanted = [asked] if asked is not None else [name for name in REFERENCES if name in names]
    if not wanted or wanted[0] not in names:
        said = f"There is no model {asked!r} in these runs" if asked is not None else "No model is the usual reference"
        raise UserError(f"{said}; choose one by --reference: {', '.join(names)}.")
    if len(names) == 1:
        raise UserError(f"{names[0]} is the only model in these runs; add a run, or score one beside a reference.")
    return wanted[0]


def _commit(commit: str | None) -> str:
    head, changed, _ = (commit or "").partition("+")
    return f"{head[:10]}{changed}"


def _range(numbers: Any) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m forecast.compare", description="Models of several runs side by side."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run that was tested")
    parser.add_argument("--reference", metavar="NAME", help="of a model; else extrapolation or persistence")
    parser.add_argument("--section", default=ROOT, metavar="NAME", help="of skill.nc: subsample, accumulation_60min")
    parser.add_argument("--score", nargs="+", metavar="NAME", help="csi for all thresholds, or a column of skill.csv")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows as comma-separated values too")
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the bootstrap; {DRAWS:,}")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file or a pipe has no width
    try:
        if options.draws < LEAST_DRAWS:
            raise UserError(f"--draws is {options.draws}; it must be at least {LEAST_DRAWS}.")
        runs = [read(folder, options.section) for folder in dict.fromkeys(options.runs)]
        check_alike(runs)
        entries = join(runs)
        reference = reference_of(entries, options.reference)
        skill = _together(entries)
        console.print(origins(entries, labels_of([run.folder for run in runs])))
        for line in unlike(entries):
            console.print(line, markup=False, highlight=False)
        shown = list(compared(skill, reference, options.score, options.draws))
        for column in shown:
            console.print(table(column, reference, str(skill["lead_time"].attrs["units"])))
            console.print(note(column, options.draws), markup=False, highlight=False)
        if options.csv:
            to_csv(shown, reference, options.csv)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
