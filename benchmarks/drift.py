"""How far forecasts drift when a state is carried for long: two small networks, one of which was trained to carry it.

    python benchmarks/drift.py                  # trains both, some minutes on a CPU; the next time it only scores them
    python benchmarks/drift.py --runs FOLDER    # keeps the trainings there

Both are the same ConvLSTM on one moving digit, trained with the same number of forecasts: once on windows of 10 frames, once
along streams of 200. On streams of digits that neither has seen, 510 frames long, each forecasts once from a state that it
has carried since the first frame, once from its last 10 frames. Prints a table and draws docs/images/drift.png.

Axes: N streams, L frames of each, S forecast frames, C = 1 channel, H W space.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from datamodules.moving_digits import MovingDigits, MovingDigitsData
from forecast import config, provenance
from forecast.checkpoint import Card, load_forecaster
from forecast.errors import UserError
from forecast.files import whole
from forecast.forecaster import NetworkForecaster
from forecast.plots import STYLE
from forecast.streaming import Stream, Trained

RECIPE = (
    *("model=convlstm", "model.network.hidden=[16,16]", "trainer=cpu", "trainer.max_epochs=9", "references=none"),
    *(
        "data.digits=1",
        "data.size=32",
        "data.digit_size=12",
        "data.speed=[1.0,2.0]",
        "data.validation=16",
        "data.test=16",
    ),
)
# 100 steps an epoch, with 16 forecasts each.
RUNS = {
    "windows": ("data.batch_size=16", "data.train=1600"),
    "streams": ("data.batch_size=8", "data.train=80", "tbptt.steps=20", "tbptt.every=10", "tbptt.length=200"),
}
STREAMS = 32  # scored
LAST = 500  # frame from which the last forecast is made
ISSUES = (*range(1, 51), *range(55, LAST + 1, 5))  # frames from which forecasts are made, the first being 1
PARTS = ((1, 10), (11, 50), (51, 200), (201, LAST))
KEPT = {"carried": "state carried", "window": "last 10 frames"}
COLOURS = {"carried": "#d55e00", "window": "#0072b2"}
PICTURE = provenance.SOURCES / "docs" / "images" / "drift.png"
Errors = NDArray[np.float64]
"""MSE by issue frame and stream: the mean over lead times and pixels."""


def trained_in(runs: Path, name: str) -> tuple[NetworkForecaster, Card]:
    """Trains a network, or goes on with its training, or takes it as it is when it has ended."""
    folder = runs / name
    command = [sys.executable, "train.py", *RECIPE, *RUNS[name], "resume=auto", f"hydra.run.dir={folder}"]
    if not (folder / "skill.nc").exists():
        ended = subprocess.run(command, cwd=provenance.SOURCES, check=False)
        if ended.returncode:
            raise UserError(f"The training in {folder} ended with code {ended.returncode}; see above what it says.")
    # The last weights: the best ones would be chosen by forecasts of windows alone.
    return load_forecaster(folder / "checkpoints" / "last.ckpt")


def unseen(card: Card) -> tuple[Tensor, Tensor]:
    """Streams of the test's digits and their mask, N L C H W."""
    data: MovingDigitsData = config.build(card.config["data"])
    data.setup()
    made = data.windows("test")
    assert isinstance(made, MovingDigits)
    packed = made.sequences(np.arange(STREAMS), 0, LAST + card.future)
    return data.quantity.decode(torch.from_numpy(packed).unsqueeze(2))


def errors(stream: Stream, frames: Tensor, valid: Tensor, steps: int) -> Errors:
    """Of the forecasts of a stream."""
    time = torch.zeros(len(frames), dtype=torch.int64)
    found = []
    for number in range(1, LAST + 1):
        stream.push(frames[:, number - 1], valid[:, number - 1], time)
        if number in ISSUES:
            found.append(mse(stream.forecast(steps).mean, frames[:, number : number + steps]))
    return np.array(found)


def persistence(frames: Tensor, steps: int) -> Errors:
    """Of forecasts that repeat the last frame."""
    return np.array([mse(frames[:, [number - 1]], frames[:, number : number + steps]) for number in ISSUES])


def mse(forecast: Tensor, truth: Tensor) -> Errors:
    """Of each stream."""
    wrong: Errors = (forecast - truth).square().mean(dim=(1, 2, 3, 4)).double().numpy()
    return wrong


def table(found: Mapping[str, Mapping[str, Errors]], reference: Errors) -> str:
    """Mean errors by part of the stream, and what a carried state adds in the last part, in Markdown."""
    issues = np.array(ISSUES)
    parts = [(issues >= first) & (issues <= last) for first, last in PARTS]
    rows = [(name, KEPT[kind], one) for name, kinds in found.items() for kind, one in kinds.items()]
    lines = [
        f"| trained on | forecast from | {' | '.join(f'frames {first} to {last}' for first, last in PARTS)} |",
        f"|---|---|{'---:|' * len(PARTS)}",
    ]
    for name, kind, one in [*rows, ("", "persistence", reference)]:
        lines.append(f"| {name} | {kind} | {' | '.join(f'{one[part].mean():.4f}' for part in parts)} |")
    added = []
    for name, kinds in found.items():
        each = (kinds["carried"] - kinds["window"])[parts[-1]].mean(axis=0)  # of a stream
        error = each.std(ddof=1) / np.sqrt(len(each))
        added.append(f"{each.mean():+.4f} (standard error {error:.4f}) where trained on {name}")
    told = f"A carried state adds, in the last column, over {reference.shape[1]} streams: {'; '.join(added)}."
    return "\n".join([*lines, "", told])


def picture(found: Mapping[str, Mapping[str, Errors]], window: int, about: str) -> Figure:
    """Errors by issue frame, a panel for each network."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.3), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True)
        for ax, (name, kinds) in zip(panels, found.items(), strict=True):
            ax.axvline(window, color="0.6", linewidth=0.9, linestyle=(0, (2, 2)))
            for kind, one in kinds.items():
                ax.plot(ISSUES, one.mean(axis=1), color=COLOURS[kind], label=KEPT[kind])
            ax.set_title(f"trained on {name}", loc="left")
            ax.set_xlabel("frame of the stream at which the forecast is issued")
            ax.set_xscale("log")
            ax.set_xlim(1, LAST)
            ax.xaxis.set_major_locator(FixedLocator([1, 2, 5, window, 20, 50, 100, 200, LAST]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        panels[0].set_ylim(bottom=0.0)
        panels[0].set_ylabel("MSE of the forecast")
        panels[0].legend(frameon=False, loc="upper right")
        figure.supxlabel(fill(about, 160), fontsize=5.5, color="0.4")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description="Drift of a state that is carried for long.")
    parser.add_argument("--runs", type=Path, default=Path("runs/drift"), help="trainings (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: docs/images/drift.png")
    given = parser.parse_args(arguments)
    hardware = provenance.hardware()
    packages = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    command = shlex.join(["python", "benchmarks/drift.py", *(sys.argv[1:] if arguments is None else arguments)])
    machine = ", ".join([re.sub(r"\s+", " ", hardware["cpu"]), f"{hardware['cores']} cores"])
    about = f"{machine}; {datetime.now(UTC):%Y-%m-%d}; {packages}; commit {provenance.commit()}; {command}"
    found: dict[str, dict[str, Errors]] = {}
    try:
        for name in RUNS:
            forecaster, card = trained_in(given.runs.resolve(), name)
            frames, valid = unseen(card)
            static = frames.new_zeros(STREAMS, 0, *card.grid["size"])
            found[name] = {
                kind: errors(
                    Stream(forecaster, Trained(kind == "carried", card.past, card.cadence), static),
                    *(frames, valid, card.future),
                )
                for kind in KEPT
            }
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    reference = persistence(frames, card.future)
    print(f"# Drift of a carried state\n\n{about}\n\n{table(found, reference)}")
    with whole(given.picture) as temporary:
        picture(found, card.past, about).savefig(temporary, dpi=200)


if __name__ == "__main__":
    main()
