"""How far back a loss reaches: the length of its gradient with respect to each state, against lag.

    python -m forecast.gradients RUN... --output FILE       # runs of callbacks=gradient_flow side by side

With h(t) the state of a recurrence after step t, and L the loss of a step T,

    dL/dh(t) = J(t+1)' ... J(T)' dL/dh(T),   J(t) = dh(t)/dh(t-1),   |dL/dh(t)| <= s^(T-t) |dL/dh(T)|,

where s is the largest singular value of any J. The bound may be far off: singular values say what one step can do, and
the eigenvalues of J what becomes of many like it (docs/gradients.md).

Reference: Bengio, Simard, Frasconi (1994), doi 10.1109/72.279181; Pascanu, Mikolov, Bengio (2013), arXiv 1211.5063.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from forecast.cells.cell import PARTS, Gates, State
from forecast.errors import UserError
from forecast.files import whole
from forecast.plots import STYLE
from forecast.recurrence import watched

NAME = "gradient_flow.csv"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@contextmanager
def recorded(network: nn.Module) -> Iterator[dict[str, list[State]]]:
    """Keeps the state after every step of each cell of a network, in the graph, for as long as the context lasts.

    The names are those of the layers: encoder.0, encoder.1, forecaster.0 ...
    """
    states: dict[str, list[State]] = {}

    def keep(layer: str, state: State, gates: Gates) -> None:
        for one in state:
            if not one.requires_grad:  # nothing before it is trained; what comes after may hang on it
                one.requires_grad_()
        states.setdefault(layer, []).append(state)

    with watched(network, keep):
        yield states


def flow(network: nn.Module, losses: Callable[[], tuple[Tensor, Tensor]], steps: int) -> pd.DataFrame:
    """The lengths of a network's gradients: of one loss by every state, of another by every weight.

    Weights, their gradients and the network's mode stay as they are. Lag counts the steps from a state to the last frame of
    the forecast: cells of an encoder end `steps` before it, all others with it.

    Args:
        network: made of cells (`forecast.cells`).
        losses: runs the network, and answers the loss of the last frame alone, and the loss of all.
        steps: frames of the forecast, S.

    Returns:
        Rows of kind (state or weight), name (encoder.0/h; of a weight its own), lag (of a state) and norm: the length of
        the gradient, over all samples, channels and places together.

    Raises:
        UserError: there is no cell, or none made a step.
    """
    modes = {module: module.training for module in network.modules()}
    # Validations run in inference mode; a compiled network would not see that its cells are watched.
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        try:
            network.eval()
            with recorded(network) as states:
                last, all_frames = losses()
        finally:
            for module, mode in modes.items():
                module.training = mode
        places = [
            (layer, part, _lag(layer, number, len(seen), steps), state[part])
            for layer, seen in states.items()
            for number, state in enumerate(seen)
            for part in range(len(state))
        ]
        if not places:
            raise UserError(
                "callbacks=gradient_flow watches the steps of recurrent cells, but this network makes none; take "
                "callbacks=default, or a model such as convlstm."
            )
        weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        of_states = _gradients(last, [state for *_, state in places])
        of_weights = _gradients(all_frames, list(weights.values()))
    rows: list[tuple[str, str, int | None, float]] = [
        ("state", f"{layer}/{PARTS[part]}", lag, _length(gradient))
        for (layer, part, lag, _), gradient in zip(places, of_states, strict=True)
    ]
    rows += [("weight", name, None, _length(one)) for name, one in zip(weights, of_weights, strict=True)]
    return pd.DataFrame(rows, columns=["kind", "name", "lag", "norm"]).astype({"lag": "Int64"})


def read(path: Path) -> pd.DataFrame:
    """The measurements of a run: those of `flow`, one after the other, with the training step of each in `step`."""
    return pd.read_csv(path, dtype={"lag": "Int64"})


def factors(table: pd.DataFrame) -> dict[str, float]:
    """By what the gradient is multiplied per step backwards, for each state: below 1 it vanishes, above 1 it explodes.

    It is exp(b) of the line a + b lag that lies closest to the logarithms of the norms. States of one step have none.

    Args:
        table: of `flow`.
    """
    found = {}
    seen = table[(table["kind"] == "state") & (table["norm"] > 0) & np.isfinite(table["norm"])]
    for name, rows in seen.groupby("name"):
        if len(rows) > 1:
            slope, _ = np.polyfit(rows["lag"].astype(float), np.log(rows["norm"]), 1)
            found[str(name)] = float(np.exp(slope))
    return found


def flow_figure(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """The norm of dLoss/dh(t) against lag (above), and of dLoss/dc(t) where cells have one (below), a column for each run.

    Dotted lines are the first rows of a run, before training, and solid ones the last.

    Args:
        tables: of `read`, by the run's name.
    """
    states = {run: table[table["kind"] == "state"] for run, table in tables.items()}
    names = sorted({str(name) for table in states.values() for name in table["name"]})
    parts = sorted({name[-1] for name in names}, key=PARTS.index)
    colours = dict(zip(sorted({name[:-2] for name in names}), cycle(_COLOURS), strict=False))
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(tables) + 2.0, 2.3 * len(parts) + 0.8), layout="constrained")
        axes = figure.subplots(len(parts), len(tables), squeeze=False, sharex=True, sharey=True)
        for column, (run, table) in enumerate(states.items()):
            axes[0, column].set_title(run, loc="left")
            for row, part in enumerate(parts):
                _lines(axes[row, column], table[table["name"].str.endswith(f"/{part}")], colours)
        for row, part in enumerate(parts):
            axes[row, 0].set_ylabel(f"|dLoss/d{part}(t)|")
        axes[0, 0].set_yscale("log")
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [Line2D([], [], color=colour, label=layer) for layer, colour in colours.items()]
        handles.append(Line2D([], [], color="0.4", linestyle=":", label="before training"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2 + len(tables), frameon=False)
        figure.supxlabel("lag: steps from t to the last frame of the forecast", fontsize=9)
    return figure


def _lines(ax: Axes, table: pd.DataFrame, colours: Mapping[str, str]) -> None:
    if table.empty:
        ax.text(0.5, 0.5, "has none", transform=ax.transAxes, ha="center", va="center", color="0.6")
    for step, style in ((table["step"].min(), ":"), (table["step"].max(), "-")):
        for name, rows in table[table["step"] == step].groupby("name"):
            positive = rows["norm"].where(rows["norm"] > 0)  # a logarithmic axis has no 0
            ax.plot(rows["lag"].astype(int), positive, style, color=colours[str(name)[:-2]])


def _lag(layer: str, number: int, count: int, steps: int) -> int:
    return count - 1 - number + (steps if "encoder" in layer.split(".") else 0)


def _gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


def _length(gradient: Tensor) -> float:
    return float(gradient.double().norm())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m forecast.gradients",
        description="The gradients of runs of callbacks=gradient_flow, side by side.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figure, PNG, SVG or PDF")
    options = parser.parse_args()
    tables = {}
    for run in options.runs:
        if not (run / NAME).exists():
            raise SystemExit(f"error: {run} has no {NAME}; train it with callbacks=gradient_flow.")
        tables[run.name] = read(run / NAME)
    with whole(options.output) as path:
        flow_figure(tables).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
