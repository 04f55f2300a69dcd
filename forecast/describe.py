"""What a run would be: its configuration, its sizes and its cost, without running it."""

import copy

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules.frames import SPLITS, FrameData
from datamodules.radar import RadarData
from datamodules.windows import utc
from forecast.checkpoint import told
from forecast.forecaster import NetworkForecaster
from forecast.module import NowcastModule


def multiply_adds(network: nn.Module, past: tuple[int, ...], static: tuple[int, ...], steps: int) -> int:
    """Multiply-adds of convolutions and matrix products for one forecast.

    Counted by torch on tensors without memory, so that it costs nothing at any size.

    Args:
        network: in model space.
        past: shape of the past frames, 1 T C H W.
        static: shape of the static fields, 1 K H W.
        steps: frames to forecast, S.
    """
    weightless = copy.deepcopy(network).eval().to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        weightless(torch.empty(past, device="meta"), steps, static=torch.empty(static, device="meta"))
    return counter.get_total_flops() // 2


def describe(config: DictConfig, module: NowcastModule, data: FrameData) -> None:
    """Prints the resolved configuration, what the splits hold, parameters, multiply-adds per forecast, and shapes."""
    console = Console()
    console.print(Syntax(OmegaConf.to_yaml(OmegaConf.create(told(config))), "yaml", background_color="default"))
    H, W = data.grid.size
    past, static = (1, data.past + data.after, 1, H, W), (1, data.static_channels, H, W)
    rows = {
        "quantity": f"{data.quantity.long_name} ({data.quantity.units}), events >= {data.quantity.thresholds}",
        "task": data.task,
        "past" if data.after == 0 else "before and after": " x ".join(map(str, past[1:])) + "  (T C H W)",
        "future": " x ".join(map(str, (data.future, 1, H, W))) + "  (S C H W)",
        "fingerprint of the data": data.fingerprint,
    }
    if isinstance(data, RadarData):
        rows["identical frames across splits"] = f"{len(data.leaks()):,}"
    if isinstance(module.forecaster, NetworkForecaster):
        network = module.forecaster.network
        parameters = sum(weight.numel() for weight in network.parameters())
        rows["parameters"] = f"{parameters:,}"
        rows["multiply-adds per forecast"] = f"{multiply_adds(network, past, static, data.future):,}"
    table = Table(title=config.model.name, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(table_of_splits(data))


def table_of_splits(data: FrameData) -> Table:
    """A row for each split: how many windows and events (or sequences); of radar, its time and its rain."""
    radar = isinstance(data, RadarData)
    table = Table(title="splits", title_justify="left")
    for heading in ("", *(("windows", "events", "from (UTC)", "until", "wet") if radar else ("sequences",))):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for split in SPLITS:
        windows = data.windows(split)
        cells = [split, f"{len(windows):,}"]
        if isinstance(data, RadarData):
            (first, last), wet = data.outline(split)
            cells += [f"{windows.blocks:,}", utc(first)[:16], utc(last)[:16], f"{wet:.1%}"]
        table.add_row(*cells)
    return table
