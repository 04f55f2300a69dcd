"""The settings that a sweep searches: read from a YAML file, checked, and turned into overrides."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from forecast import command_line, runs
from forecast.config import first_line, suggestion
from forecast.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution


@dataclass(frozen=True)
class Space:
    """What the trials of a study have in common, and what is searched.

    Args:
        fixed: overrides.
        search: by the key of the override. The choices are the text behind `=`.
    """

    fixed: tuple[str, ...]
    search: Mapping[str, Distribution]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of one trial."""
        return [*self.fixed, *(f"{key}={runs.text(values[key])}" for key in self.search)]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for a trial, by the study's sampler."""
        values: dict[str, Any] = {}
        for key, one in self.search.items():
            if isinstance(one, FloatDistribution):
                values[key] = trial.suggest_float(key, one.low, one.high, log=one.log)
            elif isinstance(one, IntDistribution):
                values[key] = trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
            else:
                values[key] = trial.suggest_categorical(key, one.choices)
        return values


def read_space(name: str, more: Sequence[str] = ()) -> Space:
    """Reads a space: a YAML file, by its path or by the name of one in conf/sweep/.

    Args:
        name: path or name.
        more: overrides that are added to the fixed ones.

    Raises:
        UserError: there is no such file, or the first thing in it that is wrong.
    """
    path = next((one for one in (Path(name), CONF / "sweep" / f"{name}.yaml") if one.is_file()), None)
    if path is None:
        known = sorted(one.stem for one in (CONF / "sweep").glob("*.yaml"))
        raise UserError(f"There is no space {name!r}; give the path of a YAML file, or one of {', '.join(known)}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {first_line(error)}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must have the keys fixed and search.")
    _known(str(path), content, ("fixed", "search"))
    fixed, search = content.get("fixed") or [], content.get("search")
    if not isinstance(fixed, list) or not all(isinstance(one, str) and "=" in one for one in fixed):
        raise UserError(f"fixed is {runs.text(fixed)}; it must be a list of overrides such as model=convlstm.")
    if not isinstance(search, dict) or not search:
        raise UserError(f"{path} searches nothing; give it a search such as optimizer.lr: {{choices: [0.01, 0.001]}}.")
    space = Space((*fixed, *more), {str(key): _distribution(str(key), one) for key, one in search.items()})
    twice = [key for key in space.search if any(one.lstrip("+").startswith(f"{key}=") for one in space.fixed)]
    if twice:
        raise UserError(f"{twice[0]} is both fixed and searched; leave one of them out.")
    return space


def _distribution(key: str, given: Any) -> Distribution:
    if _group(key) in ("hydra", "monitor", "folder", "run"):
        raise UserError(f"{key} cannot be searched: the trials of a study are compared by it; set it in fixed.")
    if not isinstance(given, dict):
        raise UserError(f"{key} is {runs.text(given)}; give it choices, or a type with low and high.")
    if "choices" in given:
        _known(key, given, ("choices",))
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{key}.choices is {runs.text(choices)}; it must be a list of values.")
        return CategoricalDistribution([runs.text(one) for one in choices])
    kind = given.get("type")
    if kind not in ("float", "int"):
        raise UserError(f"{key}.type is {runs.text(kind)}; it must be float or int, unless there are choices.")
    _known(key, given, ("type", "low", "high", "log", *(("step",) if kind == "int" else ())))
    low, high = (_number(f"{key}.{end}", given.get(end), kind) for end in ("low", "high"))
    step, log = _number(f"{key}.step", given.get("step", 1), "int"), given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{key}.log is {runs.text(log)}; it must be true or false.")
    if low >= high:
        raise UserError(f"{key}.low is {low} and {key}.high is {high}; low must be less than high.")
    if log and low <= 0:
        raise UserError(f"{key}.low is {low}; where log is true it must be greater than 0.")
    if log and step != 1:
        raise UserError(f"{key} has both log and a step of {step}; leave one of them out.")
    if step < 1 or (kind == "int" and (high - low) % step):
        raise UserError(f"{key}.step is {step}; so many steps from {low} must come to {high} exactly.")
    if kind == "int":
        return IntDistribution(int(low), int(high), log=log, step=int(step))
    return FloatDistribution(low, high, log=log)


def _number(key: str, value: Any, kind: str) -> float:
    if value is None:
        raise UserError(f"{key} is missing; give it a number.")
    with suppress(TypeError, ValueError):
        number = float(value)  # YAML reads 1e-3 as text
        if not isinstance(value, bool) and math.isfinite(number) and (kind == "float" or number == int(number)):
            return number if kind == "float" else int(number)
    raise UserError(f"{key} is {runs.text(value)}; it must be {'a number' if kind == 'float' else 'a whole number'}.")


def _group(override: str) -> str:
    """The part of the configuration that an override is for: optimizer of ++optimizer.lr=1."""
    return re.split(r"[./=@]", override.lstrip("+~"))[0]


def _known(where: str, given: Mapping[Any, Any], keys: Sequence[str]) -> None:
    for key in given:
        if key not in keys:
            raise UserError(f"{where} has no key {key!r}; {suggestion(str(key), keys)}")


def check(space: Space) -> tuple[str, str]:
    """Tries every choice and both ends of every range on train.py's configuration, without running anything.

    Returns:
        Name of the monitored value, and min or max.

    Raises:
        UserError: the first override that is not right.
    """
    if any(_group(one) == "hydra" for one in space.fixed):
        raise UserError("A sweep gives each trial its folder; leave the overrides of hydra out and use --folder.")
    tried = {
        key: list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]
        for key, one in space.search.items()
    }
    command_line.accept(CONF, [*space.fixed, *(f"{key}={','.join(map(runs.text, tried[key]))}" for key in tried)])
    monitor = command_line.load(CONF, space.overrides({key: values[0] for key, values in tried.items()})).monitor
    if monitor.metric.endswith("/loss") and any(_group(key) == "loss" for key in tried):
        raise UserError(
            "Values of different losses cannot be compared; give a score, as monitor.metric=validation/mse."
        )
    return str(monitor.metric), str(monitor.mode)
