"""The command line: overrides are checked before Hydra acts on them, and what it says of them becomes one sentence."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forecast.config import COLLECTIONS, PARTS, SPECIAL, arguments, check, first_line, no_such_key, suggestion
from forecast.errors import UserError


def accept(conf: Path, overrides: Sequence[str]) -> list[str]:
    """Checks the overrides of a command line before Hydra acts on them.

    An argument that a class takes but its file in conf/ does not list can be given like any other (`trainer.max_time=...`).
    In a sweep every value is tried once.

    Returns:
        The overrides as Hydra wants them.

    Raises:
        UserError: one of them is not right; the sentence says which and what would be.
    """
    accepted = list(overrides)
    if any(one.lstrip("+").startswith("folder=") for one in accepted):
        raise UserError("folder is the run folder; set it by hydra.run.dir=FOLDER.")
    for one in accepted:
        try:
            OverridesParser.create().parse_override(one)
        except HydraException as error:
            raise UserError(f"{one} is no KEY=VALUE ({first_line(error)}); a list is 'KEY=[1,2]', in quotes.") from None
    for trial in _trials(accepted):
        for _ in range(len(trial) + 1):
            try:
                check(load(conf, trial))
                break
            except _UnlistedError as unlisted:
                for given in (trial, accepted):
                    given[:] = [f"++{one}" if one.startswith(f"{unlisted.key}=") else one for one in given]
    return accepted


def load(conf: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes conf/train.yaml with overrides.

    Raises:
        UserError: a key or a choice that does not exist, or text that is not an override.
    """
    for group in (*PARTS, *COLLECTIONS, "model"):
        if f"{group}=null" in overrides:
            raise UserError(f"{group} is null; choose one of the files in conf/{group}/.")
    try:
        return _compose(conf, overrides)
    except MissingConfigException as error:
        raise UserError(_no_such_choice(error)) from None
    except AssertionError:  # OmegaConf's own, of a key beneath null
        raise _beneath_nothing(conf, overrides) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _sentence(error, conf, overrides) from None


def _compose(conf: Path, overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return compose("train", list(overrides))


class _UnlistedError(UserError):
    """An argument that the class takes, but that its file does not list."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is an argument that the file does not list; give it as ++{key}=...")
        self.key = key


def _trials(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides with each value of a sweep once, instead of all their combinations."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [_values(one, text) for one, text in zip(parsed, overrides, strict=True)]
    first = [choices[0] for choices in values if choices]
    yield first
    for position, choices in enumerate(values):
        others = [each[0] for each in (*values[:position], *values[position + 1 :]) if each]
        for choice in choices[1:]:
            yield [*others, choice]


def _values(override: Override, text: str) -> list[str]:
    """The values of an override; none where only the sweeper knows them (intervals, globs)."""
    if not override.is_sweep_override():
        return [text]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _sentence(error: Exception, conf: Path, overrides: Sequence[str]) -> UserError:
    """Hydra's several lines about an override as one sentence."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    # Of a mistake in a file Hydra keeps the text alone, and puts a line of its own above it.
    lines = str(error).strip().splitlines()
    where = f"{lines.pop(0).partition(': ')[0]}: " if len(lines) > 1 and "raised while composing" in lines[0] else ""
    key = next((line.partition("full_key: ")[2] for line in lines if "full_key: " in line), None)
    if key and re.search(r"^Key '.*' (is not in struct|not in )", lines[0]):
        told = _unknown(key, conf, overrides)
        return told if isinstance(told, _UnlistedError) else UserError(f"{where}{told}")
    kind = re.search(r"^Value '(.*?)' .*(?:converted to|is not a valid) (\w+)", lines[0])
    if key and kind:
        return UserError(f"{where}{key} is {kind[1]!r}; give a value of type {kind[2]}.")
    return UserError(f"{where}{key + ': ' if key else ''}{lines[0].rstrip('.')}.")


def _beneath_nothing(conf: Path, overrides: Sequence[str]) -> UserError:
    """What to say where a key cannot be set, since what is to hold it is null."""
    ordered = sorted(overrides, key=lambda one: "." in one.partition("=")[0])  # choices first, as Hydra has it
    keys = [one.lstrip("+").partition("=")[0] for one in ordered]
    for last, key in enumerate(keys):
        composed = _compose(conf, ordered[:last])
        parts = key.split(".")
        parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        nothing = next((parent for parent in parents if OmegaConf.select(composed, parent, default=0) is None), None)
        if nothing:
            return UserError(
                f"{key} cannot be set, since {nothing} is null; choose another {parts[0]}, or leave it out."
            )
    return UserError(f"{', '.join(keys)} do not fit together; leave out what stands beneath null.")


def _unknown(key: str, conf: Path, overrides: Sequence[str]) -> UserError:
    """What to say of a key that the configuration does not have."""
    parent, _, last = key.rpartition(".")
    choices = [one for one in overrides if "." not in one.partition("=")[0] and not one.startswith(f"{key}=")]
    node = None
    for given in (choices, [one for one in choices if not one.startswith("experiment=")]):
        try:
            composed = _compose(conf, given)
        except (HydraException, OmegaConfBaseException):  # the experiment itself has the key
            continue
        node = OmegaConf.select(composed, parent) if parent else composed
        break
    known = [str(name) for name in node] if isinstance(node, DictConfig) else []
    if isinstance(node, DictConfig) and "_target_" in node:
        taken = arguments(key, str(node["_target_"]))
        if last in taken:
            return _UnlistedError(key)
        known = sorted({*known, *taken} - {*SPECIAL})
    return UserError(no_such_key(parent or "the configuration", last, known))


def _no_such_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    return f"There is no {group}={choice}; {suggestion(choice, options)}"
