"""The configuration: its typed top level, the checks before anything runs, and the one place that builds from it.

A part of the configuration with a `_target_` names a class; its other keys are arguments of that class's constructor, by
name, and nothing else. So every key is read by somebody, and a key nobody knows is refused with a sentence.
"""

import difflib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, get_type_hints

import pydantic
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forecast import schema
from forecast.errors import UserError
from forecast.forecaster import Prepared, check_given, reads_after

RUNS = ("fit", "test", "describe")
PARTS = ("data", "teaching", "loss", "optimizer", "scheduler", "trainer")  # each is built
COLLECTIONS = ("callbacks", "logger", "references", "metrics")  # each holds parts by name
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
# The least that the Trainer can work with; it does not say so itself.
LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0, "gradient_clip_val": 0}
LAGRANGIAN = "forecast.networks.lagrangian.Lagrangian"
ACCUMULATED = "forecast.baselines.accumulated.Accumulated"
# Where a constructor passes its **kwargs on to; other **kwargs take nothing.
PASSED_ON = {"lightning.pytorch.strategies.ddp.DDPStrategy": "torch.nn.parallel.DistributedDataParallel"}

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it says of a class that is not there, we say


ConfigStore.instance().store("schema", schema.Config)


def check(config: DictConfig) -> None:
    """Checks a composed configuration: choices, missing values, and every key and type against the classes they are for.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "The configuration"
        raise UserError(
            f"{where} cannot be resolved ({first_line(error)}); refer to a key that there is, as in ${{seed}}."
        ) from None
    if missing:
        raise UserError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    _check_keys("the configuration", schema.Config, plain)
    for group in (*PARTS, *COLLECTIONS):
        if config[group] is None:
            raise UserError(f"{group} is null; choose one of the files in conf/{group}/.")
    for where, part in schema.PARTS.items():
        _check_keys(where, part, plain[where])
    for name, part in plain["references"].items():
        _check_keys(f"references.{name}", schema.Model, part)
    for group in PARTS:
        if not config[group].get("_target_"):
            raise UserError(f"{group} names no class to build; choose one of the files in conf/{group}/.")
    for where, part in _named(plain):
        if not (isinstance(part, Mapping) and part.get("_target_")):
            raise UserError(f"{where} names no class to build; set {where}._target_, or take it out.")
    if config.run not in RUNS:
        raise UserError(f"run is {config.run!r}; it must be one of {', '.join(RUNS)}.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}; it must be from 0 to {2**32 - 1}.")
    if config.resume not in (None, "auto"):
        raise UserError(f"resume is {config.resume!r}; it must be auto or null, and ckpt_path names a checkpoint.")
    if config.monitor.mode not in ("min", "max"):
        raise UserError(f"monitor.mode is {config.monitor.mode!r}; it must be min or max.")
    for key, given in (("members", config.members), ("subsample.windows", config.subsample.windows)):
        if given < 1:
            raise UserError(f"{key} is {given}; it must be at least 1.")
    for key, given in config.accumulation.items():
        if any(one <= 0 for one in given) or list(given) != sorted(set(given)):
            raise UserError(f"accumulation.{key} are {list(given)}; give numbers above 0, each above the last.")
    for key in ("every", "length"):
        if config.tbptt[key] is not None and config.tbptt.steps is None:
            raise UserError(
                f"tbptt.{key} is {config.tbptt[key]}, but tbptt.steps is null: there are no streams; set it too."
            )
    if config.tbptt.length is not None and config.tbptt.length < config.tbptt.steps:
        raise UserError(
            f"tbptt.length is {config.tbptt.length}; a stream has one chunk of {config.tbptt.steps} frames or more."
        )
    if (config.model.network is None) == (config.model.baseline is None):
        raise UserError("A model is either a network or a baseline: set one of model.network and model.baseline.")
    for key, allowed, why in LIGHTNING:
        if key in config.trainer and config.trainer[key] not in allowed:
            raise UserError(f"trainer.{key} is {config.trainer[key]!r}, but {why}.")
    for key, least in LEAST.items():
        given = config.trainer.get(key)
        if isinstance(given, int | float) and given < least:
            raise UserError(f"trainer.{key} is {given}; it must be at least {least}.")
    for path, node in _targets(plain, ()):
        _check_arguments(".".join(path), node)


def _check_keys(where: str, kind: type, part: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(kind)]
    for key in part:
        if key not in known:
            raise UserError(no_such_key(where, str(key), known))


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
    package, _, name = plain["_target_"].rpartition(".")
    taken = arguments("", plain["_target_"])
    given = {key: value for key, value in given.items() if key in taken}
    for key, parameter in taken.items():
        if parameter.default is parameter.empty and not {key, "_partial_"} & {*plain, *given}:
            raise UserError(f"{name} is not told its argument {key!r}; set it in the file that names {name}.")
    try:
        made = instantiate({**plain, "_partial_": True}, _convert_="all")
        # What is given is handed over as it is: Hydra would make dictionaries of a Quantity and a Grid.
        if plain.get("_partial_"):
            return partial(made.func, *made.args, **{**made.keywords, **given})
        return made(**given)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if isinstance(cause, UserError):
            raise cause from None
        # A class of another package speaks for itself; one of ours has a mistake, unless a package or a number is wanting.
        ours = package.partition(".")[0] in ("forecast", "datamodules")
        told = first_line(cause)
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{name} needs a package that is not installed ({told}); install it.") from cause
        if isinstance(cause, ValueError) or not ours:
            raise UserError(f"{name} refuses its arguments ({told}); change those that are given to it.") from cause
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
        head=head,
    )
    if model["lagrangian"]:
        if reads_after(network):
            raise UserError(
                f"model.lagrangian carries rain on from the last frame, but model={model['name']} fills a gap between two; "
                "leave model.lagrangian out."
            )
        if network.feeds_back:
            raise UserError(
                f"model.lagrangian takes what a network forecasts for a change, but model={model['name']} reads it as the "
                "next frame; leave model.lagrangian out."
            )
        network = build({"_target_": LAGRANGIAN}, network=network, head=head)
    return network, head


def build_baseline(baseline: DictConfig | Mapping[str, Any], data: Any) -> Any:
    """A baseline, told what it asks for of the data (a `datamodules.frames.FrameData`).

    Where these ask for means of frames, they are taken of its forecasts; one that is prepared has seen means already.
    """
    told = {name: getattr(data, name) for name in ("quantity", "grid", "cadence", "past", "after")}
    made = build(baseline, **told)
    check_given(type(made).__name__, made, data.after)
    if data.accumulate == 1 or isinstance(made, Prepared):
        return made
    return build({"_target_": ACCUMULATED}, forecaster=made, frames=data.accumulate)


def arguments(where: str, target: str) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments that have a name, and those of the class that its **kwargs go to."""
    found = find(where, target)
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:
        return {}
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: one for name, one in parameters.items() if one.kind not in unnamed}
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    return {**arguments(where, PASSED_ON[home]), **named} if home in PASSED_ON else named


def find(where: str, target: str) -> Callable[..., Any]:
    try:
        return get_object(target)
    except Exception as error:
        raise UserError(
            f"{where}._target_ is {target!r}, which cannot be imported ({first_line(error)}); name a class with its module."
        ) from None


def no_such_key(where: str, key: str, known: Sequence[str]) -> str:
    return f"{where} has no key {key!r}; {suggestion(key, known)}"


def suggestion(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of {', '.join(known)}." if known else "take it out."


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _named(plain: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts that collections hold, with where they stand."""
    for group in ("callbacks", "logger"):
        yield from ((f"{group}.{name}", part) for name, part in plain[group].items())
    yield from ((f"references.{name}.baseline", part["baseline"]) for name, part in plain["references"].items())
    for kind, scores in plain["metrics"].items():
        yield from ((f"metrics.{kind}.{name}", part) for name, part in scores.items())


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
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except Exception:  # a package's own annotations may not resolve; its keys are checked all the same
        hints = {}
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key not in parameters:
            raise UserError(no_such_key(where, key, list(parameters)))
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
