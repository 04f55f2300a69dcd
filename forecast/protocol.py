"""What must be equal for two scores to stand side by side, where a score comes from, and the runs that tell both.

skill.nc keeps them as JSON, in its attributes `protocol` and `provenance`.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np
import xarray as xr

from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Scope
from forecast.provenance import commit, hardware, versions
from forecast.units import Transform, transform_to_dict

ROOT = "/"
"""The section of all windows: what NetCDF calls the outermost group."""

RULES: Mapping[str, str] = {
    "events": "a value >= the threshold, in the forecast as in the truth",
    "averaging": "sums over the valid pixels of all windows of a pool, divided once",
    "mask": "pixels where the truth is valid; no score where a forecast there is not finite",
}


@dataclass(frozen=True)
class Protocol:
    """The terms under which a test was scored. Plain containers only.

    What a model was given is none of them: not the number of past frames, nor static fields, nor its training data. A
    model that sees more is compared with one that sees less, as long as both are scored on the same windows, which the
    issue times say. What it is asked is: who sees frames after those to forecast fills a gap, and is no nowcaster.
    """

    data: Mapping[str, Any]
    """Which windows of what, as the datamodule's `terms` say."""
    future: int
    """Forecast frames."""
    cadence: int | None
    """Seconds between forecast frames; None where frames have no time."""
    grid: Mapping[str, Any]
    """Of the frames that are scored, after cropping."""
    quantity: Mapping[str, Any]
    """What is forecast, in which units, with its floor and its thresholds; not how it is packed."""
    rules: Mapping[str, str]
    """The same for every score."""
    scores: Mapping[str, Mapping[str, Any]]
    """The options of each metric, by the name of its class."""
    after: int = 0
    """Frames given that follow the forecast ones: where there are any, a gap is filled."""
    accumulate: int = 1
    """Frames of the data whose mean is one forecast frame."""

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), sort_keys=True)


class Run(NamedTuple):
    """What the skill.nc of a run folder tells."""

    folder: Path
    counts: xr.Dataset
    """Sums by model, block and lead time, and further axes."""
    protocol: Protocol
    provenance: Mapping[str, Any]


def of(data: Any, metrics: Mapping[str, Callable[[Scope], AdditiveMetric]]) -> Protocol:
    """The protocol of a test.

    Args:
        data: a `datamodules.frames.FrameData` that is set up.
        metrics: what is scored, by any name: classes, or `functools.partial` of one with its options.
    """
    quantity = data.quantity.to_dict()
    terms = {
        "data": data.terms("test"),
        "future": data.future,
        "cadence": data.lead,
        "grid": data.grid.to_dict(),
        "quantity": {key: quantity[key] for key in ("name", "units", "floor", "thresholds", "relation")},
        "rules": RULES,
        "scores": dict(_options(metric) for metric in metrics.values()),
        "after": data.after,
        "accumulate": data.accumulate,
    }
    # Through JSON, so that what is read again is equal: tuples become lists.
    return Protocol(**json.loads(json.dumps(terms)))


def differences(one: Protocol, other: Protocol) -> list[str]:
    """The terms that differ, each as a line "name: x | y"; none where scores may stand side by side.

    A metric that only one of them has is no difference: the scores that both have are compared.
    """
    shared = one.scores.keys() & other.scores.keys()
    sides = []
    for protocol in (one, other):
        scores = {name: protocol.scores[name] for name in sorted(shared)}
        sides.append(dict(_leaves({**asdict(protocol), "scores": scores})))
    lines = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        x, y = (side.get(name, "-") for side in sides)
        if x != y:
            lines.append(f"{name}: {x} | {y}")
    return lines


def provenance_of(config: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Where the scores of a run come from, as plain values.

    Args:
        config: the run's configuration as plain containers, without secrets.
        checkpoint: what was scored, with its `stormcell` card, `epoch` and `global_step`; None where nothing was trained.
    """
    trained = None
    if checkpoint is not None:
        card = checkpoint["stormcell"]
        trained = {
            "epoch": checkpoint["epoch"],
            "step": checkpoint["global_step"],
            "seed": card["config"]["seed"],
            **{key: card[key] for key in ("past", "fingerprint", "version", "commit")},
        }
    return {
        "folder": Path(config["folder"]).resolve().name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("stormcell"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "seed": config["seed"],
        "model": config["model"],
        "trained": trained,
    }


def read(folder: Path, section: str = ROOT) -> Run:
    """Reads the counts of a run, its protocol and its provenance.

    Args:
        folder: of the run.
        section: a group of its skill.nc.

    Raises:
        UserError: there is no skill.nc or no such group, or it was written without a protocol, or under one of another
            version.
    """
    path = folder / "skill.nc"
    if not path.is_file():
        raise UserError(f"There is no {path}; name the folder of a run that was scored, as run=test does.")
    sections = [section]
    try:
        with netCDF4.Dataset(path) as stored:
            sections = [ROOT, *stored.groups]
        with xr.open_dataset(path, group=section) as skill:
            counts = skill[[name for name, data in skill.data_vars.items() if "block" in data.dims]]
            counts = counts.assign_coords(threshold=skill["threshold"]).load()
            protocol, provenance = (json.loads(skill.attrs[name]) for name in ("protocol", "provenance"))
        return Run(folder, counts, Protocol(**protocol), provenance)
    except (OSError, TypeError, ValueError, KeyError):
        if section not in sections:
            raise UserError(f"{path} has no section {section!r}; choose one of {', '.join(sections)}.") from None
        raise UserError(
            f"{path} does not say under which protocol it was scored, as this version does; score its checkpoint again "
            "by run=test."
        ) from None


def check_alike(runs: Sequence[Run]) -> None:
    """Refuses runs whose scores may not stand side by side.

    Raises:
        UserError: the protocols differ; each difference is on a line of its own.
    """
    first, *others = runs
    said = []
    for other in others:
        if lines := [*differences(first.protocol, other.protocol), *_scored_differently(first.counts, other.counts)]:
            said += [f"{first.folder} | {other.folder}", *(f"  {line}" for line in lines)]
    if said:
        listed = "\n".join(said)
        raise UserError(f"These runs were scored under different protocols; score them alike by run=test:\n{listed}")


def _scored_differently(one: xr.Dataset, other: xr.Dataset) -> Iterator[str]:
    """What the protocol does not tell: other axes of a section, and a test that was cut short."""
    for name in (name for name in one.coords if name in other.coords and name != "model"):
        if not one[name].equals(other[name]):
            yield f"{name}: {one[name].values.tolist()} | {other[name].values.tolist()}"
            return
    # The truth's valid pixels are those of the windows that were scored, whatever the model.
    ours, theirs = (run["pixels"].isel(model=0).values for run in (one, other))
    if not np.array_equal(ours, theirs):
        yield f"valid pixels that were scored: {ours.sum()} | {theirs.sum()}"


def _options(metric: Callable[[Scope], AdditiveMetric]) -> tuple[str, dict[str, Any]]:
    """The class of a metric, and all its options, also those that nobody gave."""
    made = metric.func if isinstance(metric, partial) else metric
    parameters = inspect.signature(metric).parameters.values()
    options = {one.name: one.default for one in parameters if one.default is not one.empty}
    plain = {name: transform_to_dict(one) if isinstance(one, Transform) else one for name, one in options.items()}
    return made.__name__, plain


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, and values as JSON, in which NaN equals NaN."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
