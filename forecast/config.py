"""The configuration: its typed top level, the checks before anything runs, and the one place that builds from it.

A part of the configuration with a `_target_` names a class; its other keys are arguments of that class's constructor, by
name, and nothing else. So every key is read by somebody, and a key nobody knows is refused with a sentence.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import pydantic
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forecast.errors import UserError

RUNS = ("fit", "test", "describe")
SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")

# Arguments of Lightning's Trainer that only some values go with: its key, those values, and why.
LIGHTNING: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "precision",
        (None, 32, "32", "32-true", "bf16-mixed", "16-mixed", "bf16", "16", 16),
        "frames are decoded to 32 bits: take 32-true, bf16-mixed or 16-mixed",
    ),
    ("use_distributed_sampler", (False,), "our own sampler deals the batches: leave it false"),
    ("overfit_batches", (0, 0.0), "our own sampler deals the batches: use trainer.limit_train_batches"),
    ("logger", (None,), "loggers are chosen by logger=csv, wandb, tensorboard or none"),
    ("callbacks", (None,), "callbacks are set in callbacks.*"),
)


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


@dataclass
class Config:
    """The top level of conf/train.yaml."""

    run: str = "fit"
    seed: int = 0
    ckpt_path: str | None = None
    resume: str | None = None
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    compile: bool = False
    folder: str = "."
    monitor: Monitor = field(default_factory=Monitor)
    data: dict[str, Any] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store("schema", Config)


def check(config: DictConfig) -> None:
    """Checks a composed configuration: choices, missing values, and every key and type against the classes they are for.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {first_line(error)}.") from None
    if missing:
        raise UserError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    for group in ("data", "loss", "optimizer", "scheduler", "trainer", "callbacks", "logger"):
        if config[group] is None:
            raise UserError(f"{group} is null; choose one of the files in conf/{group}/.")
    if config.run not in RUNS:
        raise UserError(f"run is {config.run!r}; it must be one of {', '.join(RUNS)}.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}; it must be from 0 to {2**32 - 1}.")
    if config.monitor.mode not in ("min", "max"):
        raise UserError(f"monitor.mode is {config.monitor.mode!r}; it must be min or max.")
    if (config.model.network is None) == (config.model.baseline is None):
        raise UserError("A model is either a network or a baseline: set one of model.network and model.baseline.")
    for key, allowed, why in LIGHTNING:
        if key in config.trainer and config.trainer[key] not in allowed:
            raise UserError(f"trainer.{key} is {config.trainer[key]!r}, but {why}.")
    for path, node in _targets(plain, ()):
        _check_arguments(".".join(path), node)


def build(part: Mapping[str, Any] | DictConfig, **given: Any) -> Any:
    """Builds what a part of the configuration names by `_target_`, and the parts inside it: the one place that does.

    Args:
        part: the part.
        given: arguments that are known only now (sizes of the data); those that the class does not name are left out.

    Raises:
        UserError: what the class itself finds wrong, and a package that is not installed.
    """
    plain = OmegaConf.to_container(part, resolve=True) if isinstance(part, DictConfig) else dict(part)
    assert isinstance(plain, dict)
    names = inspect.signature(get_object(plain["_target_"])).parameters
    try:
        return instantiate(plain, _convert_="all", **{name: value for name, value in given.items() if name in names})
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        # A class of another package speaks for itself: Lightning's MisconfigurationException, torch's ValueError.
        if isinstance(cause, (ValueError, ModuleNotFoundError)) or type(cause).__name__ == "MisconfigurationException":
            raise UserError(f"{plain['_target_'].rpartition('.')[2]}: {first_line(cause)}") from cause
        raise


def build_network(
    model: DictConfig | Mapping[str, Any], *, channels: int, static_channels: int, size: Sequence[int]
) -> Any:
    """The network of a `model` part, with its head: (network, head).

    Args:
        model: has `network` and `head`.
        channels: of a frame of the data.
        static_channels: static fields, K.
        size: H, W of the frames.
    """
    head = build(model["head"])
    network = build(
        model["network"],
        inputs=channels + static_channels,
        outputs=channels * head.channels,
        frame_size=(size[0], size[1]),
    )
    return network, head


def arguments(where: str, target: str) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments by name."""
    try:
        return inspect.signature(find(where, target)).parameters
    except ValueError:
        return {}


def find(where: str, target: str) -> Callable[..., Any]:
    try:
        return get_object(target)
    except Exception as error:
        raise UserError(f"{where}._target_ is {target!r}, which cannot be imported: {first_line(error)}.") from None


def no_such_key(where: str, key: str, known: Sequence[str]) -> str:
    return f"{where} has no key {key!r}; {suggestion(key, known)}"


def suggestion(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _targets(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every part that has a `_target_`, with where it stands."""
    if isinstance(node, Mapping):
        if node.get("_target_"):
            yield path, node
        for key, value in node.items():
            yield from _targets(value, (*path, str(key)))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _targets(value, (*path, str(position)))


def _check_arguments(where: str, node: Mapping[str, Any]) -> None:
    """Holds the keys and values of a part against the constructor that they are for."""
    target = find(where, str(node["_target_"]))
    parameters = arguments(where, str(node["_target_"]))
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except Exception:  # a package's own annotations may not resolve; its keys are checked all the same
        hints = {}
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key not in parameters and not anything:
            raise UserError(no_such_key(where, key, [name for name in parameters if name not in ("self", "kwargs")]))
        if key in hints and not any(True for _ in _targets(value, ())):
            _check_type(f"{where}.{key}", value, hints[key])


def _check_type(where: str, value: Any, hint: Any) -> None:
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True))
    except Exception:  # a type that only its own package can check
        return
    try:
        adapter.validate_json(
            json.dumps(value)
        )  # as JSON, so that a list will do for a tuple, but no text for a number
    except pydantic.ValidationError as error:
        wanted = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("collections.abc.", "")
        expected = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UserError(
            f"{where} is {value!r}, but must be {expected} ({str(wanted).replace('typing.', '')})."
        ) from None
