"""What a recurrent network keeps: which channels of its states and gates go with motion, growth and decay of the frames.

With v the optical flow from frame x(t-1) to x(t) (`forecast.motion`), and a(t) the frame x(t-1) carried along it, frames
change by what moves, and by what becomes more or less on its way:

    x(t) - x(t-1) = (a(t) - x(t-1)) + growth(t) - decay(t)
    motion(t) = |a(t) - x(t-1)|,   growth(t) = max(0, x(t) - a(t)),   decay(t) = max(0, a(t) - x(t))

all in model space. For a small v, a(t) - x(t-1) is -v . grad x(t-1): motion is seen at edges, the ones ahead and the ones
behind alike, since its size is taken.

Axes: N times, C channels, J signals, P places, R shuffles, H W space, h w space of a layer.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from forecast.batch import Frames
from forecast.cells.cell import PARTS, Cell, Gates, State
from forecast.forecaster import NetworkForecaster, reads_after
from forecast.motion import advected, displacement, velocity
from forecast.networks.lagrangian import Lagrangian
from forecast.plots import STYLE
from forecast.recurrence import watched

NAME = "inside.csv"
SIGNALS = ("motion", "growth", "decay")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_COMPLETE = 0.999  # of a pixel that has come from known pixels alone


class Maps(NamedTuple):
    """What one layer had at each of its steps."""

    begin: int
    """The time of its first step; times count from the first frame of the window."""
    parts: dict[str, Tensor]
    """N C h w by part: h, c, m of the state, and the gates."""


class Seen(NamedTuple):
    """One window, and a network that goes through it; all that it reads and forecasts, N times."""

    frames: Tensor
    """N H W in model space, those that the network forecasts as they came."""
    known: Tensor
    """N H W bool."""
    signals: Tensor
    """N J H W; of time 0 there are none."""
    counts: Tensor
    """N H W bool, where they are known."""
    layers: dict[str, Maps]
    """By name: encoder.0, encoder.1, forecaster.0 ..."""


def has_maps(forecaster: object) -> bool:
    """Whether there is a recurrence over fields in it."""
    return isinstance(forecaster, NetworkForecaster) and any(
        isinstance(cell, Cell) and cell.spatial_dims == 2 for cell in forecaster.modules()
    )


@torch.no_grad()
def look(forecaster: NetworkForecaster, window: Frames) -> Seen:
    """Runs a network over a window, and keeps what its cells had at every step.

    At step t a cell that reads frames has read that of time t (its own forecast of it, where it is fed none); a cell of a
    forecaster, which reads none, has made it. A network in Lagrangian coordinates sees all frames at the places that they
    will have, or had, at the issue time: there frames and signals are given, too.

    Args:
        forecaster: in evaluation mode.
        window: a batch of one.
    """
    steps: dict[str, list[dict[str, Tensor]]] = {}

    def keep(layer: str, state: State, gates: Gates) -> None:
        if state[0].dim() == 4:
            parts = {**dict(zip(PARTS, state, strict=False)), **gates}
            steps.setdefault(layer, []).append({name: one[0].float() for name, one in parts.items()})

    network, future = forecaster.network, window.truth.shape[1]
    # A compiled network would not see that its cells are watched.
    with torch.compiler.set_stance("force_eager"), watched(network, keep):
        forecaster(window.past, future, window.static)
    given = window.past.shape[1] - (reads_after(network) or 0)
    physical, known = (
        torch.cat([past[0, :given, 0], between[0, :, 0], past[0, given:, 0]])
        for past, between in ((window.past, window.truth), (window.known, window.valid))
    )
    frames = forecaster.transform.forward(physical)
    shown, counts = signals(frames, known)
    if isinstance(network, Lagrangian):
        way = _to_issue_time(frames, given)
        fields = advected(torch.cat([frames.unsqueeze(1), shown], dim=1), way)
        frames, shown = fields[:, 0], fields[:, 1:]
        known, counts = (advected(one.float().unsqueeze(1), way)[:, 0] > _COMPLETE for one in (known, counts))
    layers = {}
    for layer, each in steps.items():
        path = layer.split(".")
        in_time = each[::-1] if "backward_cell" in path else each
        parts = {name: torch.stack([step[name] for step in in_time]) for name in each[0]}
        layers[layer.removeprefix("network.")] = Maps(given if "forecaster" in path else 0, parts)
    return Seen(frames, known, shown, counts, layers)


def signals(
    frames: Float[Tensor, "N H W"], known: Bool[Tensor, "N H W"]
) -> tuple[Float[Tensor, "N J H W"], Bool[Tensor, "N H W"]]:
    """Motion, growth and decay from each frame to the next, and where they are known: at time 0 nowhere.

    A pixel counts where it is known in both frames, and where what arrives at it comes from known pixels of the frame.

    Args:
        frames: in model space, about 0 to 1.
        known: which of their pixels are.
    """
    before, now = frames[:-1], frames[1:]
    come = velocity(torch.stack([before, now], dim=1))
    arrived = advected(before.unsqueeze(1), come)[:, 0]
    complete = advected(known[:-1].to(frames).unsqueeze(1), come)[:, 0] > _COMPLETE
    change = now - arrived
    found = torch.stack([(arrived - before).abs(), change.clamp_min(0), (-change).clamp_min(0)], dim=1)
    found = torch.cat([found.new_zeros(1, *found.shape[1:]), found])
    return found, torch.cat([torch.zeros_like(known[:1]), known[1:] & known[:-1] & complete])


def _to_issue_time(frames: Tensor, given: int) -> Tensor:
    """The displacement N 2 H W that takes each frame to where it is at the issue time, as `Lagrangian` has it."""
    flow = velocity(frames[None, :given])
    come = displacement(flow, given)[0, : given - 1].flip(0)
    gone = displacement(-flow, len(frames) - given)[0]
    return torch.cat([come, torch.zeros_like(flow), gone])


class Correlations:
    """How channels go with signals: Pearson's r over windows, times and places, beside what chance and place alone give.

    Of many channels the best one looks well by luck. So it is chosen by its largest |r| on every other window, the first
    included, and what is told is its r on the windows between.

    The null is the same with the signals of each window at shuffled times, in the same order at all places, R times; each
    time a channel is chosen anew. Place is kept: where rain is it grows, and a channel that only knows where rain is has
    its r in the null as well. What is above the null hangs on time: on when something moves or grows. Both are told, and
    the difference. (A shuffle takes the times for exchangeable. Where activity and signals both drift along the windows, as
    they may in the first steps of a recurrence, a difference can come of that alone. Nor does a difference say that
    training made the channel: random convolutions of frames have one, too.)

    Signals are averaged over the pixels of a layer's place, and count where more than half of them are known. Nothing is
    kept of a window but sums, in float64.

    Args:
        shuffles: R.
        seed: of the orders.
    """

    def __init__(self, shuffles: int, seed: int = 0) -> None:
        self.shuffles = shuffles
        self.seed = seed
        self._windows = 0
        # By half of the windows: 2 (1+R) C (J+2) of a layer's part, and 2 (1+2J) of a layer.
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._totals: dict[str, Tensor] = {}

    def add(self, seen: Seen) -> None:
        """Adds a window."""
        half = self._windows % 2
        for layer, (first, parts) in seen.layers.items():
            begin = max(first, 1)
            maps = {part: one[begin - first :] for part, one in parts.items()}
            steps, _, h, w = maps["h"].shape
            if not steps:  # of a single frame
                continue
            now = slice(begin, begin + steps)
            signal = _weighted(seen.signals[now], seen.counts[now], (h, w))
            draw = np.random.default_rng((self.seed, self._windows))
            orders = np.stack([np.arange(steps), *(draw.permutation(steps) for _ in range(self.shuffles))])
            _add(self._totals, layer, half, torch.cat([signal.sum((0, 2)), signal[:, 1:].square().sum((0, 2))]))
            for part, one in maps.items():
                _add(self._sums, (layer, part), half, _summed(one, signal, torch.from_numpy(orders).to(one.device)))
        self._windows += 1

    def table(self) -> pd.DataFrame:
        """The chosen channel of each layer, part and signal.

        Returns:
            Columns layer, part, signal, channel; chosen_by, its r on the windows on which it was chosen; correlation, its r
            on the others; null_mean and null_max of the same on shuffled times, where an r of the other sign than
            it was chosen by counts below 0; difference, of |correlation| (below 0 likewise) and null_mean.
        """
        rows = []
        for (layer, part), sums in self._sums.items():
            choosing, telling = (_pearson(*half) for half in zip(sums, self._totals[layer], strict=True))
            best = choosing.abs().argmax(dim=1, keepdim=True)
            chosen_by, told = choosing.gather(1, best)[:, 0], telling.gather(1, best)[:, 0]
            size = told * chosen_by.sign()
            for j, signal in enumerate(SIGNALS):
                null = size[1:, j]
                of_channel = (int(best[0, 0, j]), float(chosen_by[0, j]), float(told[0, j]))
                of_null = (float(null.mean()), float(null.max()), float(size[0, j] - null.mean()))
                rows.append((layer, part, signal, *of_channel, *of_null))
        columns = [
            "layer",
            "part",
            "signal",
            "channel",
            "chosen_by",
            "correlation",
            "null_mean",
            "null_max",
            "difference",
        ]
        return pd.DataFrame(rows, columns=columns)


def _weighted(signals: Tensor, counts: Tensor, size: tuple[int, int]) -> Float[Tensor, "N JJ P"]:
    """At a layer's resolution, 1 and the signals; all of them 0 where they are not known."""
    weight = counts.to(signals).unsqueeze(1)
    share = F.adaptive_avg_pool2d(weight, size)
    mean = F.adaptive_avg_pool2d(signals * weight, size) / share.clamp_min(1e-6)
    known = share > 0.5
    return (torch.cat([torch.ones_like(share), mean], dim=1) * known).flatten(2).double()


def _summed(maps: Tensor, signal: Tensor, orders: Tensor) -> Float[Tensor, "RR C JJ"]:
    """Sums of the activity, times each signal and squared, over times and places, with the signals in each of the orders.

    Every pair of a time of the maps and one of the signals is multiplied once, however many orders there are.
    """
    activity = maps.flatten(2).double()
    products = torch.einsum("ncp,mjp->nmcj", activity, signal)
    squares = torch.einsum("ncp,mp->nmc", activity.square(), signal[:, 0])
    pairs = torch.cat([products, squares.unsqueeze(-1)], dim=-1)
    return pairs[torch.arange(len(maps), device=maps.device), orders].sum(dim=1)


def _add(sums: dict[Any, Tensor], key: object, half: int, found: Tensor) -> None:
    if key not in sums:
        sums[key] = found.new_zeros(2, *found.shape)
    sums[key][half] += found


def _pearson(sums: Float[Tensor, "RR C JJ"], totals: Float[Tensor, " K"]) -> Float[Tensor, "RR C J"]:
    """r of every channel with every signal; 0 for what is constant."""
    signals = sums.shape[-1] - 2
    number, s, s_squared = totals.split([1, signals, signals])
    a, products, a_squared = sums.split([1, signals, 1], dim=-1)
    covariance = products - a * s / number
    variances = (a_squared - a.square() / number) * (s_squared - s.square() / number)
    constant = variances <= 1e-12 * a_squared * s_squared
    return torch.where(constant, 0.0, covariance / variances.clamp_min(1e-300).sqrt())


def inside_figure(table: pd.DataFrame) -> Figure:
    """The chosen channel of each layer, part and signal: its |r| as a dot, with its number, beside the null as a bar.

    Args:
        table: of `Correlations`.
    """
    names = list(dict.fromkeys(zip(table["layer"], table["part"], strict=True)))
    layers = list(dict.fromkeys(table["layer"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.2 + 0.19 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(SIGNALS), sharex=True, sharey=True)
        for ax, signal in zip(axes, SIGNALS, strict=True):
            rows = table[table["signal"] == signal].set_index(["layer", "part"]).loc[names]
            place = np.arange(len(names))
            sizes = rows["difference"] + rows["null_mean"]
            colours = [_COLOURS[layers.index(layer) % len(_COLOURS)] for layer, _ in names]
            ax.barh(place, rows["null_max"], height=0.7, color="0.87")
            ax.plot(rows["null_mean"], place, "|", color="0.5", markersize=7)
            ax.scatter(sizes, place, s=16, color=colours, zorder=3)
            for y, size, channel in zip(place, sizes, rows["channel"], strict=True):
                ax.annotate(str(channel), (size, y), (5, 0), textcoords="offset points", va="center", fontsize=6.5)
            ax.set_title(signal, loc="left")
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(names)), [f"{layer}  {part}" for layer, part in names], fontsize=8)
        axes[0].invert_yaxis()
        axes[0].margins(x=0.12, y=0.02)
        told = "|r| of the chosen channel (its number) on other windows; grey: times shuffled, mean and largest"
        figure.supxlabel(told, fontsize=9)
    return figure
