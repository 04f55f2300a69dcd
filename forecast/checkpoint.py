"""What a checkpoint carries beside its weights, how it is written, and how a Forecaster is rebuilt from it.

A checkpoint holds tensors and plain containers only, and is read with `weights_only=True`: opening one runs no code.
"""

import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import nn

from forecast import config, provenance
from forecast.errors import UserError
from forecast.files import whole
from forecast.forecaster import NetworkForecaster
from forecast.streaming import Trained
from forecast.units import Grid, Quantity, transform_from_dict, transform_to_dict

KEY = "stormcell"
TRUSTED = ("forecast.cells", "forecast.networks", "forecast.heads", "torch.nn")  # where a checkpoint's classes may live


@dataclass(frozen=True)
class Card:
    """What is needed to rebuild a forecaster and to know what it was trained on. Plain containers only."""

    model: Mapping[str, Any]
    """The `model` part of the configuration."""
    quantity: Mapping[str, Any]
    grid: Mapping[str, Any]
    transform: Mapping[str, Any]
    cadence: int | None
    past: int
    future: int
    static_channels: int
    config: Mapping[str, Any]
    """The whole resolved configuration."""
    fingerprint: str
    """Of the data."""
    version: str
    """Of stormcell."""
    commit: str | None
    """Of its source, where that lies in a git checkout."""


def card(cfg: DictConfig, data: Any) -> Card:
    """The card of a run: its configuration without secrets, and its datamodule (a `datamodules.frames.FrameData`)."""
    plain = told(cfg)
    return Card(
        model=plain["model"],
        quantity=data.quantity.to_dict(),
        grid=data.grid.to_dict(),
        transform=transform_to_dict(data.transform),
        cadence=data.cadence,
        past=data.past,
        future=data.future,
        static_channels=data.static_channels,
        config=plain,
        fingerprint=data.fingerprint,
        version=version("stormcell"),
        commit=provenance.commit(),
    )


def told(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, without secrets: what may be written and logged."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return provenance.masked({str(key): value for key, value in plain.items()})


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, however the program ends. (Lightning's own passes through /tmp.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with whole(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of ours.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint {path}; a run keeps its own in checkpoints/best.ckpt and last.ckpt.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path} is not a whole checkpoint of tensors and plain values: {reason}") from None
    if not isinstance(content, dict) or KEY not in content or "state_dict" not in content:
        raise UserError(f"{path} is not a checkpoint of stormcell.")
    if set(content[KEY]) != {one.name for one in fields(Card)}:
        raise UserError(f"{path} is of another version of stormcell ({content[KEY].get('version')}); train it anew.")
    return content


def check_matches(path: str | Path, now: Card, *, frame_size: tuple[int, int] | None, resume: bool) -> None:
    """Refuses to load a checkpoint into another network, or onto another quantity.

    Args:
        path: of the checkpoint.
        now: the card of this run.
        frame_size: the only size that the network takes, if there is one.
        resume: whether the training goes on, with its optimizer.

    Raises:
        UserError: it does not fit; the sentence names the first difference.
    """
    then = read(path)[KEY]
    if frame_size is not None and tuple(then["grid"]["size"]) != frame_size:
        raise UserError(
            f"{path} was trained on frames of {then['grid']['size']}, the only size that it takes; give it those."
        )
    if resume:
        for part in ("optimizer", "scheduler", "loss", "teaching", "tbptt"):
            if then["config"][part] != now.config[part]:
                name, old, new = _difference(part, then["config"][part], now.config[part])
                raise UserError(
                    f"{path} was trained with {name}={old}, but this run has {name}={new}; go on with the same, or train "
                    "anew from its weights by init_from."
                )
        if then["fingerprint"] != now.fingerprint:
            raise UserError(
                f"{path} was trained on other data (fingerprint {then['fingerprint']}, now {now.fingerprint}); go on with "
                "the same, or train anew from its weights by init_from."
            )
    means = [known["data"].get("accumulate", 1) for known in (then["config"], now.config)]
    if means[0] != means[1]:
        raise UserError(
            f"{path} was trained with data.accumulate={means[0]}, but this run has {means[1]}; make them equal."
        )
    for part in ("model", "quantity", "transform", "cadence", "static_channels"):
        before, after = then[part], getattr(now, part)
        if part == "model":  # what is asked of a reference is no matter to a network
            before, after = ({**model, "slow": False} for model in (before, after))
        if part == "quantity":  # a network sees physical values: how they are packed and scored is no matter to it
            before, after = (
                {key: quantity[key] for key in ("units", "floor", "relation")} for quantity in (before, after)
            )
        if before != after:
            name, old, new = _difference(part, before, after)
            raise UserError(f"{path} was trained with {name}={old}, but this run has {name}={new}; make them equal.")


def start_from(path: str | Path, forecaster: NetworkForecaster) -> None:
    """Gives a forecaster the weights of a checkpoint, and nothing else of it: fine-tuning.

    Raises:
        UserError: the weights are those of another network; the sentence names the first that does not fit.
    """
    theirs, ours = _weights(read(path)), forecaster.state_dict()
    for name in dict.fromkeys([*ours, *theirs]):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (theirs, ours)]
        if shapes[0] != shapes[1]:
            there, here = ("none" if shape is None else f"one of shape {shape}" for shape in shapes)
            raise UserError(
                f"init_from={path} does not fit: for the weight {name} it has {there}, and this model has {here}; choose "
                "the model that it was trained with."
            )
    forecaster.load_state_dict(theirs)


def freeze(forecaster: NetworkForecaster, names: Sequence[str]) -> None:
    """Takes parts of a forecaster out of the training.

    Args:
        forecaster: its weights stay as they are.
        names: of modules in it, such as "network.encoder".

    Raises:
        UserError: there is no such part, or nothing is left to train.
    """
    parts = dict(forecaster.named_modules())
    for name in names:
        if name not in parts:
            known = [part for part, module in parts.items() if part and any(True for _ in module.parameters())]
            raise UserError(f"freeze names {name!r}, which is no part of the network; {config.suggestion(name, known)}")
        parts[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in forecaster.parameters()):
        raise UserError(f"freeze={list(names)} leaves nothing to train; freeze fewer parts.")


def load_forecaster(path: str | Path) -> tuple[NetworkForecaster, Card]:
    """Rebuilds the forecaster of a checkpoint, in evaluation mode, with what is known of it.

    Raises:
        UserError: the file is none of ours, or names classes from elsewhere.
    """
    content = read(path)
    known = Card(**content[KEY])
    _check_trusted(known.model)
    grid = Grid.from_dict(known.grid)
    network, head = config.build_network(known.model, channels=1, static_channels=known.static_channels, size=grid.size)
    forecaster = NetworkForecaster(network, head, transform_from_dict(known.transform), quantity_of(known).thresholds)
    forecaster.load_state_dict(_weights(content))
    forecaster.trained = Trained(known.config["tbptt"]["steps"] is not None, known.past, known.cadence)
    return forecaster.eval(), known


def quantity_of(known: Card) -> Quantity:
    """The quantity that the forecaster of this card speaks of."""
    return Quantity.from_dict(known.quantity)


def _weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of the forecaster, by their names in it."""
    prefix = "forecaster."
    stored = content["state_dict"].items()
    return {name.removeprefix(prefix): value for name, value in stored if name.startswith(prefix)}


def _check_trusted(node: Any) -> None:
    """A checkpoint from a stranger must not choose which code runs: it may name our modules, and torch's, only."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            named = config.find("checkpoint", str(node["_target_"]))
            home = getattr(named, "__module__", "")
            ours = any(home == place or home.startswith(f"{place}.") for place in TRUSTED)
            if not (inspect.isclass(named) and issubclass(named, nn.Module) and ours):
                raise UserError(f"The checkpoint names {node['_target_']}, which is no module of {', '.join(TRUSTED)}.")
        for value in node.values():
            _check_trusted(value)
    elif isinstance(node, list):
        for value in node:
            _check_trusted(value)


def _difference(name: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    """The first place where two nested mappings differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                return _difference(f"{name}.{key}", before.get(key), after.get(key))
    return name, before, after
