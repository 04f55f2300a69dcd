"""The top level of the configuration: its keys and their types.

What stands below a key that holds `dict[str, Any]` is held against the constructors of the classes that it names.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Monitor:
    """The number that chooses the best checkpoint, and that a sweep looks at."""

    metric: str = "validation/loss"
    mode: str = "min"


@dataclass
class Model:
    """A network with its head, or a baseline that has nothing to train."""

    name: str = "???"
    network: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    lagrangian: bool = False
    """Optical flow carries what the network forecasts: see `forecast.networks.lagrangian`."""
    slow: bool = False
    """As a reference it forecasts the subsample of the test windows only."""


@dataclass
class TBPTT:
    """Truncated backpropagation through time, along streams of frames."""

    steps: int | None = None
    every: int | None = None
    length: int | None = None


@dataclass
class Metrics:
    """Scores by name: of each validation, of a test, of its accumulations, and of its subsample beside those of the test."""

    validation: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    accumulation: dict[str, Any] = field(default_factory=dict)
    subsample: dict[str, Any] = field(default_factory=dict)


@dataclass
class Accumulation:
    """Rain over longer times than a frame, which is scored too where frames hold rain rates."""

    minutes: list[int] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    """Events, mm."""


@dataclass
class Subsample:
    """The test windows on which slow references and slow scores are computed."""

    windows: int = 24


@dataclass
class Config:
    """The top level of conf/train.yaml."""

    run: str = "fit"
    seed: int = 0
    ckpt_path: str | None = None
    resume: str | None = None
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    compile: bool | str = False
    backend: str = "auto"
    tf32: bool = True
    folder: str = "."
    monitor: Monitor = field(default_factory=Monitor)
    data: dict[str, Any] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    teaching: dict[str, Any] = field(default_factory=dict)
    tbptt: TBPTT = field(default_factory=TBPTT)
    references: dict[str, Model] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    accumulation: Accumulation = field(default_factory=Accumulation)
    subsample: Subsample = field(default_factory=Subsample)
    members: int = 20
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


PARTS: dict[str, type] = {
    "monitor": Monitor,
    "model": Model,
    "tbptt": TBPTT,
    "metrics": Metrics,
    "accumulation": Accumulation,
    "subsample": Subsample,
}
"""The keys whose own keys are told here, too."""
