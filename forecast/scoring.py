"""All that scores a run, put together from its configuration: the metrics, the sections of a test, the references."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from forecast import config, protocol
from forecast.batch import Frames
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Scope
from forecast.protocol import Protocol
from forecast.references import References, references_of
from forecast.sections import Listed, Metrics, Sections, spread
from forecast.skill import Skill

HISTORY = 500
"""Windows of the training split, evenly spread, that references see at most."""


@dataclass(frozen=True)
class Scoring:
    """What a run is scored by."""

    validation: Skill
    """Of the model alone, after each epoch."""
    sections: Sections
    """Of a test."""
    references: References
    protocol: Protocol
    members: int
    """Of the ensembles that are asked for in a test; 0 where no score is of ensembles."""
    validation_members: int
    """The same in validation."""


def scoring_of(plain: Mapping[str, Any], data: Any) -> Scoring:
    """The scoring that a configuration asks for.

    Args:
        plain: the configuration in plain containers.
        data: its `datamodules.frames.FrameData`, set up.

    Raises:
        UserError: what a metric or a reference finds wrong.
    """
    wanted = plain["metrics"]
    if not wanted["test"]:
        raise UserError("metrics.test names no score, so that nothing could be said of a test; take metrics=default.")
    metrics = {kind: metrics_of(kind, parts, plain["members"]) for kind, parts in wanted.items()}
    ensembles = {kind for kind, parts in wanted.items() if any(map(takes_members, parts.values()))}
    accumulation, subsample, windows = plain["accumulation"], plain["subsample"], data.windows("test")
    terms = protocol.of(data, metrics["test"])
    positions = spread(len(windows), subsample["windows"])
    # The protocol is that of all windows; counts are kept of all sections together.
    scored = {kind: parts for kind, parts in wanted.items() if kind != "validation"}
    more = {"metrics": scored, "accumulation": accumulation, "subsample": subsample, "members": plain["members"]}
    known = references_of(plain, data, {"protocol": asdict(terms), **more})
    scope = Scope(data.quantity, data.future, windows.blocks, size=data.grid.size)
    alone = Scope(data.quantity, data.future, 1, size=data.grid.size)
    name = plain["model"]["name"]
    return Scoring(
        validation=Skill([name], alone, data.lead, metrics["validation"]),
        sections=Sections(
            [name, *(reference.name for reference in known)],
            scope,
            data.lead,
            metrics["test"],
            slow=[reference.name for reference in known if reference.slow],
            minutes=accumulation["minutes"],
            thresholds=accumulation["thresholds"],
            long_metrics=metrics["accumulation"],
            listed=Listed(positions, tuple(windows.issue_times()[list(positions)].tolist())),
            slow_metrics=metrics["subsample"],
        ),
        references=References(known, partial(history, data)),
        protocol=terms,
        members=plain["members"] if ensembles - {"validation"} else 0,
        validation_members=plain["members"] if "validation" in ensembles else 0,
    )


def history(data: Any) -> Iterator[Frames]:
    """The windows of the training split that references see, decoded."""
    positions = spread(len(data.windows("train")), HISTORY)
    decoded: Iterator[Frames] = data.decoded("train", positions)
    return decoded


def metrics_of(kind: str, parts: Mapping[str, Any], members: int) -> Metrics:
    """What makes each metric of a part of the configuration; those that ask for the ensembles' size are told it.

    Raises:
        UserError: one is no metric.
    """
    for name, part in parts.items():
        place = f"metrics.{kind}.{name}"
        target = config.find(place, part["_target_"])
        if not (isinstance(target, type) and issubclass(target, AdditiveMetric)):
            raise UserError(f"{place} is {part['_target_']}, which is no score; name a class of forecast/metrics.")
    return {
        name: config.build({**part, "_partial_": True}, **({} if "members" in part else {"members": members}))
        for name, part in parts.items()
    }


def takes_members(part: Mapping[str, Any]) -> bool:
    """Is this metric one of ensembles?"""
    return "members" in config.arguments("metrics", part["_target_"])
