"""All runs below a folder as one table: the settings that differ, the best monitored value, the skill, the state.

    python -m forecast.runs FOLDER [--csv FILE]

Runs that differ in nothing but the seed are one row, with mean and standard deviation. A run that failed says why.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forecast.errors import UserError
from forecast.files import whole
from forecast.skill import derive

NO_SETTINGS = ("seed", "run", "resume", "ckpt_path")
"""Keys that make no other experiment of a run."""


@dataclass(frozen=True)
class Point:
    """One monitored value, and when it was logged."""

    step: int
    epoch: int | None
    value: float


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    settings: Mapping[str, Any]
    """Leaves of the configuration by dotted key, without the seed, the folder and the paths in it."""
    monitor: str | None
    """Name of the monitored value; None where the run failed before its configuration was written."""
    mode: str
    best: Point | None
    mse: float
    """Mean over lead times, of the model that was trained; NaN without skill.nc."""
    csi: float
    """At the middle threshold, mean over lead times; NaN without skill.nc."""
    threshold: float
    state: str
    """finished, unfinished, or `failed: ` and why."""


def read(folder: Path) -> Run:
    """Reads a run folder: config.yaml, metrics.csv, skill.nc and error.txt, as far as they are there.

    Raises:
        UserError: a file that is not what its name says.
    """
    config = _yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    monitor = config.get("monitor", {})
    metric, mode = monitor.get("metric"), monitor.get("mode", "min")
    leaves = dict(_leaves(config)) if config else _overrides(folder)
    own = str(config.get("folder", folder))
    settings = {
        key: value
        for key, value in leaves.items()
        if key.rpartition(".")[2] not in NO_SETTINGS and not f"{value}/".startswith(f"{own}/")
    }
    points = [point for point in history(folder, metric) if math.isfinite(point.value)] if metric else []
    best = (max if mode == "max" else min)(points, key=lambda point: point.value, default=None)
    mse = csi = threshold = math.nan
    state = "unfinished"
    if (folder / "skill.nc").exists():
        mse, csi, threshold = _skill(folder / "skill.nc", str(config.get("model", {}).get("name")))
        state = "finished"
    if (folder / "error.txt").exists():
        state = f"failed: {(folder / 'error.txt').read_text(encoding='utf-8').strip()}"
    return Run(folder, settings, metric, mode, best, mse, csi, threshold, state)


def history(folder: Path, metric: str) -> list[Point]:
    """All values of a metric in metrics.csv, in order; none where there is no such file yet."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [
                Point(int(row["step"]), int(float(row["epoch"])) if row.get("epoch") else None, float(row[metric]))
                for row in csv.DictReader(file)
                if row.get(metric)
            ]
        except (KeyError, ValueError):
            raise UserError(f"{path} is not a log of numbers by step; remove it, or name another folder.") from None


def find(folder: Path) -> list[Run]:
    """All runs below a folder, by name.

    Raises:
        UserError: there is none.
    """
    named = {path.parent for name in ("config.yaml", "error.txt") for path in folder.rglob(name)}
    # Hydra keeps a config.yaml in .hydra, W&B one of another kind below wandb/.
    shown = (one for one in sorted(named) if not any(part.startswith(".") for part in one.relative_to(folder).parts))
    runs = [read(one) for one in shown if (one / "error.txt").exists() or _is_ours(one / "config.yaml")]
    if not runs:
        raise UserError(f"There is no run below {folder}; a run is a folder with the config.yaml of train.py.")
    return runs


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed, and that ended alike, together; the best by the monitored value first."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps([run.settings, run.state], sort_keys=True, default=str), []).append(run)

    def rank(group: list[Run]) -> tuple[str, bool, float]:
        value = _mean([run.best.value for run in group if run.best])
        # A monitored value is compared with those of the same name only; no name comes last.
        return group[0].monitor or "~", math.isnan(value), -value if group[0].mode == "max" else value

    return sorted(alike.values(), key=rank)


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, as few as tell them apart.

    A setting of which two runs have other values; and, where that does not tell two runs apart, one that only some have.
    What comes with another choice, such as the peepholes of model=convlstm beside model=lstm, is not repeated.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    values = {key: [text(run.settings[key]) if key in run.settings else None for run in runs] for key in keys}
    chosen = [key for key in keys if len({*values[key]} - {None}) > 1]
    for key in keys:
        apart = len(set(zip(*(values[one] for one in chosen), strict=True))) if chosen else 1
        if len(set(zip(*(values[one] for one in [*chosen, key]), strict=True))) > apart:
            chosen.append(key)
    return [key for key in keys if key in chosen]


def text(value: Any) -> str:
    """A value as one writes it in an override: null, true, 0.003, [32,32], {a:1}."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text, value)) + "]"
    return str(value)


def table(runs: Sequence[Run]) -> Table:
    """One row for each group of runs."""
    keys = differing([run for run in runs if run.monitor])
    monitors, thresholds = {run.monitor for run in runs if run.monitor}, _thresholds(runs)
    made = Table()
    for key in keys:
        made.add_column(escape(key), overflow="fold")
    made.add_column("seeds", justify="right")
    made.add_column(escape(monitors.pop()) if len(monitors) == 1 else "best monitored", justify="right")
    made.add_column("epoch", justify="right")
    made.add_column("MSE", justify="right")
    made.add_column(f"CSI >= {thresholds[0]:g}" if len(thresholds) == 1 else "CSI, middle threshold", justify="right")
    made.add_column("state", overflow="fold")
    made.add_column("folder", overflow="fold")
    for group in groups(runs):
        best = [run.best for run in group if run.best]
        cells = [text(group[0].settings[key]) if key in group[0].settings else "" for key in keys]
        cells += [str(len(group)), _spread([point.value for point in best])]
        cells += [", ".join(f"step {point.step}" if point.epoch is None else str(point.epoch) for point in best)]
        cells += [_spread([run.mse for run in group]), _spread([run.csi for run in group])]
        cells += [group[0].state, ", ".join(str(run.folder) for run in group)]
        made.add_row(*map(escape, cells))
    return made


def to_csv(runs: Sequence[Run], path: Path) -> None:
    """The same rows with all digits; mean and standard deviation have a column each."""
    keys = differing([run for run in runs if run.monitor])
    rows = []
    for group in groups(runs):
        first = group[0]
        row: dict[str, Any] = {key: text(first.settings[key]) for key in keys if key in first.settings}
        row |= {"seeds": len(group), "monitor": first.monitor}
        best = [run.best for run in group if run.best]
        measured = {
            "best": [point.value for point in best],
            "mse": [run.mse for run in group],
            "csi": [run.csi for run in group],
        }
        for name, values in measured.items():
            row |= {name: _mean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else math.nan}
        row |= {"threshold": first.threshold, "step": " ".join(str(point.step) for point in best)}
        row |= {"state": first.state, "folder": " ".join(str(run.folder) for run in group)}
        rows.append({name: "" if value != value else value for name, value in row.items()})
    names = {**dict.fromkeys(keys), **{name: None for row in rows for name in row}}
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not YAML; mend or remove it.") from None


def _is_ours(path: Path) -> bool:
    config = _yaml(path)
    monitor = config.get("monitor") if isinstance(config, dict) else None
    return isinstance(monitor, dict) and "metric" in monitor


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overrides(folder: Path) -> dict[str, Any]:
    """What was asked of a run that failed before its configuration was written."""
    path = folder / ".hydra" / "overrides.yaml"
    given = (one.lstrip("+").partition("=") for one in _yaml(path) or []) if path.exists() else ()
    return {key: value for key, _, value in given}


def _skill(path: Path, model: str) -> tuple[float, float, float]:
    """MSE, CSI and its threshold."""
    try:
        with xr.open_dataset(path) as skill:
            scores = derive(skill.sum("block", skipna=False)).sel(model=model)
            mean = scores.mean("lead_time", skipna=False)
            middle = skill.sizes["threshold"] // 2
            mse = float(mean["mse"]) if "mse" in mean else math.nan
            csi = float(mean["csi"].isel(threshold=middle)) if "csi" in mean else math.nan
            return mse, csi, float(skill["threshold"][middle])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no scores of {model} ({type(error).__name__}); score its checkpoint again by run=test."
        ) from None


def _thresholds(runs: Sequence[Run]) -> list[float]:
    return sorted({run.threshold for run in runs if not math.isnan(run.threshold)})


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _spread(values: Sequence[float]) -> str:
    mean = _mean(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.4g}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m forecast.runs", description="A table of all runs below a folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the runs may lie at any depth below it")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as comma-separated values too")
    options = parser.parse_args()
    try:
        runs = find(options.folder)
        # A file or a pipe has no width, and takes the lines as long as they are.
        Console(width=None if sys.stdout.isatty() else 1000).print(table(runs))
        if options.csv:
            to_csv(runs, options.csv)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
