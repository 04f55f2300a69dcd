"""What a network keeps of motion, growth and decay, looked at after a test: a table, a figure and a film of channels."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, Normalize
from numpy.typing import NDArray
from torch import Tensor

from forecast.batch import Frames
from forecast.errors import UserError
from forecast.files import whole
from forecast.film import Panel, write_maps
from forecast.forecaster import NetworkForecaster
from forecast.inside import NAME, SIGNALS, Correlations, Seen, has_maps, inside_figure, look
from forecast.module import NowcastModule
from forecast.plots import colour_scale
from forecast.sections import spread

BLANK = "0.9"
ONE_SIGN = LinearSegmentedColormap.from_list("one", ("#f7fbff", "#6baed6", "#08306b"), N=12).with_extremes(bad=BLANK)
BOTH_SIGNS = LinearSegmentedColormap.from_list("both", ("#2166ac", "#f7f7f7", "#b2182b"), N=15).with_extremes(bad=BLANK)


class Inside(pl.Callback):
    """After a test, correlates the channels of states and gates with motion, growth and decay (`forecast.inside`).

    What is looked at are the tested weights: after a training its best ones, with run=test those of ckpt_path. inside.csv
    has the chosen channel of each layer, part and signal beside its null, figures/inside.png draws them, and
    figures/inside.gif shows the window in which most moves: the frames, the signals, and the channels that go with them
    most. test/inside/<signal> is logged: the largest difference from the null among hidden states.

    The first process looks, one window at a time, and no other hears of it.

    Args:
        folder: of the run.
        windows: of the test split, evenly spread; channels are chosen on half of them, and told by the other half.
        shuffles: of the null.
    """

    def __init__(self, folder: str, windows: int = 32, shuffles: int = 20) -> None:
        if windows < 2 or shuffles < 1:
            raise UserError(
                f"callbacks.inside.windows is {windows} and shuffles {shuffles}; it takes 2 windows or more, to choose "
                "channels and to tell of them, and 1 shuffle or more."
            )
        self.folder = Path(folder)
        self.windows = windows
        self.shuffles = shuffles

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, NowcastModule)
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it where mypy does not look
        if pl_module.device_mesh is not None:
            raise UserError("callbacks=inside needs whole weights, but trainer=fsdp shards them; leave one out.")
        if not has_maps(pl_module.forecaster):
            raise UserError(
                f"callbacks=inside shows maps of recurrent layers, but model={pl_module.name} has none; take "
                "callbacks=default, or a model such as convlstm."
            )
        if len(data.windows("test")) < 2:
            raise UserError(
                "callbacks=inside chooses channels on one test window and tells of them on another, but there is only one; "
                "take callbacks=default, or a larger test split."
            )
        if data.past + data.future < 3:
            raise UserError(
                "callbacks=inside looks at steps after the first frame, but data.past and data.future are 1; raise one, or "
                "take callbacks=default."
            )
        if data.accumulate > 1:
            raise UserError(
                f"callbacks=inside follows motion from frame to frame, but data.accumulate is {data.accumulate}, so that "
                "forecast frames are means of several; set it to 1, or take callbacks=default."
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, NowcastModule)
        forecaster = pl_module.forecaster
        assert isinstance(forecaster, NetworkForecaster)
        data = trainer.datamodule  # type: ignore[attr-defined]  # as above

        def window(position: int) -> Seen:
            (frames,) = data.decoded("test", (position,))
            with trainer.precision_plugin.forward_context():
                return look(forecaster, Frames(*(field.to(trainer.strategy.root_device) for field in frames)))

        correlations = Correlations(self.shuffles)
        moved: dict[int, float] = {}
        for position in spread(len(data.windows("test")), self.windows):
            seen = window(position)
            correlations.add(seen)
            moved[position] = float((seen.signals[:, 0] * seen.counts).sum())
        table = correlations.table()
        seen = window(max(moved, key=moved.__getitem__))
        physical = forecaster.transform.inverse(seen.frames)
        observed = np.where(_numbers(seen.known), _numbers(physical), np.nan)
        quantity = pl_module.quantity
        title = "observed" if quantity.units == "1" else f"observed ({quantity.units})"
        rows = film_rows(seen, table, Panel(title, observed, colour_scale(quantity, observed)))
        with whole(self.folder / NAME) as path:
            table.to_csv(path, index=False, float_format="%.6g")
        with whole(self.folder / "figures" / "inside.png") as path:
            inside_figure(table).savefig(path, dpi=150)
        with whole(self.folder / "figures" / "inside.gif") as path:
            ahead = range(data.past, data.past + data.future)
            write_maps(path, rows, ahead, pl_module.cadence, pl_module.grid)
        hidden = table[table["part"] == "h"].groupby("signal")["difference"].max()
        for logger in trainer.loggers:
            metrics = {f"test/inside/{signal}": float(hidden[signal]) for signal in SIGNALS}
            logger.log_metrics(metrics, step=trainer.global_step)


def film_rows(seen: Seen, table: pd.DataFrame, frames: Panel) -> dict[str, list[Panel]]:
    """The frames and signals of a window; below, for each stack of layers, the channels that go with each signal most.

    Args:
        seen: the window.
        table: of `Correlations`, of more than this window.
        frames: the panel of the frames themselves.
    """
    counts = _numbers(seen.counts)
    panels = [frames]
    for one, name in zip(_numbers(seen.signals).swapaxes(0, 1), SIGNALS, strict=True):
        panels.append(_panel(name, np.where(counts, one, np.nan)))
    rows = {"frames": panels}
    stacks = table["layer"].str.replace(r"\.\d+", "", regex=True)
    for stack in dict.fromkeys(stacks):
        own = table[stacks == stack]
        for states in (True, False):
            some = own[(own["part"] == "h") == states]
            if some.empty:
                continue
            named = ", ".join(dict.fromkeys(some["part"]))
            by_signal = (some[some["signal"] == signal] for signal in SIGNALS)
            best = [each.iloc[int(each["chosen_by"].abs().to_numpy().argmax())] for each in by_signal]
            rows[f"{stack}\n{named}"] = [_channel_panel(seen, row) for row in best]
    return rows


def _channel_panel(seen: Seen, row: pd.Series) -> Panel:
    begin, parts = seen.layers[row["layer"]]
    one = _numbers(parts[row["part"]][:, row["channel"]])
    shown = np.full((len(seen.frames), *one.shape[1:]), np.nan, one.dtype)
    shown[begin : begin + len(one)] = one
    told = f"r {row['correlation']:.2f}, null {row['null_mean']:.2f}, at most {row['null_max']:.2f}"
    return _panel(f"{row['layer']} {row['part']}, channel {row['channel']}\n{told}", shown)


def _panel(title: str, shown: NDArray[Any]) -> Panel:
    """A map, red and blue around 0 where it has both signs, blank where it is not known."""
    low, high = np.nanpercentile(shown, [0.5, 99.5]) if np.isfinite(shown).any() else (0.0, 1.0)
    if low < 0 < high:
        high = max(-low, high)
        low = -high
    colours = BOTH_SIGNS if low < 0 < high else ONE_SIGN
    return Panel(title, shown, (colours, Normalize(low, high if high > low else low + 1)))


def _numbers(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()
