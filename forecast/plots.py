"""The figure of one window forecast by every model; `film.py` and `curves.py` share the pieces.

Figures are made without pyplot: no global state, no display, and safe in a training process.

Axes: T past frames, S forecast frames, C channels, H W space.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from forecast.units import Grid, Quantity

# Drizzle in pale blue, so that what matters stands out; rain through green and yellow; hail in red and violet.
_RADAR = (
    "#d7e6f4", "#a9cde9", "#6aaedb", "#3787c4", "#2a9d8f", "#7fc15e",
    "#f2e34c", "#f9b233", "#ee7326", "#d22d3a", "#99186b", "#55146e",
)  # fmt: skip
_LEVELS: Mapping[str, tuple[float, ...]] = {
    "dBZ": (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60),
    "mm/h": (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
}
_MINUS = "\N{MINUS SIGN}"
# Any: the type that matplotlib gives to these spells out every key.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "0.4",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


def forecast_figure(
    past: NDArray[Any],
    truth: NDArray[Any],
    valid: NDArray[Any],
    forecasts: Mapping[str, NDArray[Any]],
    quantity: Quantity,
    cadence: int | None,
    grid: Grid | None = None,
    after: int = 0,
    span: int = 1,
) -> Figure:
    """One window: what was observed on top, each model below, time from left to right.

    Args:
        past: T C H W, what was given, physical values; NaN where missing.
        truth: S C H W, physical values.
        valid: S C H W bool; other pixels of the truth are shown in grey.
        forecasts: S C H W by model's name, in the order in which they are shown. First channels are shown.
        quantity: chooses colours and levels: a radar scale for dBZ and mm/h, grey for numbers without units.
        cadence: seconds between frames that were given; None counts frames.
        grid: sets which way is up and the shape of a pixel; None has the first row on top and square pixels.
        after: the last so many frames that were given follow the forecast ones, which fill a gap.
        span: cadences between forecast frames.
    """
    observed = np.where(valid, truth, np.nan)
    before = len(past) - after
    past_frames, lead_frames, after_frames = every(before, 3), every(len(truth), 6), every(after, 3)
    times = frame_times(before, len(truth), after, span)
    scale = colour_scale(quantity, observed)

    columns = len(past_frames) + len(lead_frames) + len(after_frames)
    rows = 1 + len(forecasts)
    side = 1.35
    with rc_context(STYLE):
        tall = side * panel_height(truth, grid)
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=(side * columns + 1.5, tall * rows + 0.55), layout=layout)
        # An empty column parts what was known from what was to come, or to be filled in.
        ratios = [1.0] * len(past_frames) + [0.12] + [1.0] * len(lead_frames)
        if after:
            ratios += [0.12] + [1.0] * len(after_frames)
        cells = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
        axes: list[Axes] = []

        def show(row: int, column: int, frame: NDArray[Any]) -> Axes:
            ax = figure.add_subplot(cells[row, column])
            show_frame(ax, frame, scale, grid)
            axes.append(ax)
            return ax

        for column, frame in enumerate(past_frames):
            ax = show(0, column, past[frame])
            ax.set_title(time_label(times[frame], cadence), color="0.45")
            if column == 0:
                ax.set_ylabel("observed")
        for column, frame in enumerate(lead_frames, start=len(past_frames) + 1):
            show(0, column, observed[frame]).set_title(time_label(times[before + frame], cadence))
            for row, forecast in enumerate(forecasts.values(), start=1):
                show(row, column, forecast[frame])
        for column, frame in enumerate(after_frames, start=len(ratios) - len(after_frames)):
            when = time_label(times[before + len(truth) + frame], cadence)
            show(0, column, past[before + frame]).set_title(when, color="0.45")
        for row, name in enumerate(forecasts, start=1):
            label = figure.add_subplot(cells[row, : len(past_frames)])
            label.set_axis_off()
            label.text(1.0, 0.5, name, ha="right", va="center", fontsize=10.5, transform=label.transAxes)
            if row == len(forecasts) and np.isnan(observed).any():
                label.legend([Patch(color=missing_colour(quantity))], ["no data"], loc="lower left", frameon=False)

        colour_bar(figure, axes, quantity, aspect=14 * rows)
    return figure


def show_frame(ax: Axes, frame: NDArray[Any], scale: tuple[Colormap, Normalize], grid: Grid | None) -> AxesImage:
    """Draws the first channel of a frame.

    Args:
        ax: where.
        frame: C H W, physical values; NaN where missing.
        scale: from `colour_scale`.
        grid: see `forecast_figure`.
    """
    aspect, origin = _shape(grid)
    image = np.ma.masked_invalid(frame[0])
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="0.75")
    # Where pixels of the screen are the larger, colours are blended, not values: no rain that was not there.
    return ax.imshow(image, cmap=scale[0], norm=scale[1], origin=origin, aspect=aspect, interpolation_stage="rgba")


def panel_height(frames: NDArray[Any], grid: Grid | None) -> float:
    """Height over width of the panel in which frames are drawn."""
    height, width = frames.shape[-2:]
    return float(np.clip(height / width * _shape(grid)[0], 0.4, 2.0))


def colour_scale(quantity: Quantity, values: NDArray[Any]) -> tuple[Colormap, Normalize]:
    """Colours and levels that a reader of that quantity expects.

    Args:
        quantity: known by its units.
        values: set the levels where the units set none.
    """
    colours: Colormap
    norm: Normalize
    if quantity.units in _LEVELS:
        levels = _LEVELS[quantity.units]
        colours = LinearSegmentedColormap.from_list("radar", _RADAR, N=len(levels))
        norm = BoundaryNorm(levels, len(levels), extend="max")
    elif quantity.units == "1":
        colours = LinearSegmentedColormap.from_list("grey", ("black", "white"))
        norm = Normalize(0.0, 1.0)
    else:
        colours = LinearSegmentedColormap.from_list("sequence", ("#f7fbff", "#6baed6", "#08306b"))
        finite = values[np.isfinite(values)]
        norm = Normalize(finite.min(), finite.max()) if finite.size else Normalize(0.0, 1.0)
    below = "white" if quantity.units in _LEVELS else None
    return colours.with_extremes(bad=missing_colour(quantity), under=below), norm


def missing_colour(quantity: Quantity) -> str:
    """Grey, or slate where grey is a value."""
    return "#5b7086" if quantity.units == "1" else "#b9b9b9"


def colour_bar(figure: Figure, axes: Sequence[Axes], quantity: Quantity, aspect: float) -> None:
    """Adds the scale of the frames in `axes`, named and with its units, `aspect` times as long as wide."""
    image = axes[0].images[0]
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.015, aspect=aspect)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(fill(axis_label(quantity.long_name, quantity.units), 40))
    if isinstance(image.norm, BoundaryNorm):
        bar.set_ticks(list(image.norm.boundaries), labels=[f"{level:g}" for level in image.norm.boundaries])


def frame_times(before: int, steps: int, after: int = 0, span: int = 1) -> list[int]:
    """When the frames of a window are, in their order, in cadences after the issue time.

    Args:
        before: frames given, of which the last one has the issue time.
        steps: frames to forecast.
        after: frames given that follow these.
        span: cadences between forecast frames.
    """
    gap = steps * span
    return [*range(1 - before, 1), *range(span, gap + 1, span), *range(gap + 1, gap + 1 + after)]


def time_label(frame: int, cadence: int | None) -> str:
    """The time of a frame after (before) the issue time, which is frame 0."""
    if cadence is None:
        return f"frame {frame:+d}".replace("-", _MINUS) if frame else "frame 0"
    return f"{frame * cadence / 60:+g} min".replace("-", _MINUS) if frame else "issue time"


def every(frames: int, most: int) -> list[int]:
    """Up to `most` of the frames 0 to frames-1, evenly spread, with the first and the last."""
    if frames <= most:
        return list(range(frames))
    return [round(i * (frames - 1) / (most - 1)) for i in range(most)]


def _shape(grid: Grid | None) -> tuple[float, Literal["upper", "lower"]]:
    """Height of a pixel over its width, and where the first row is drawn."""
    if grid is None:
        return 1.0, "upper"
    rise, run = grid.spacing
    aspect = abs(rise / run)
    if grid.units == "degrees":
        middle = grid.origin[0] + rise * (grid.size[0] - 1) / 2
        aspect /= float(np.cos(np.deg2rad(middle)))
    # Rows of an image count downwards, northings and latitudes upwards.
    return aspect, "lower" if rise > 0 and grid.units != "pixel" else "upper"


def axis_label(name: str, units: str) -> str:
    """The name of what stands along an axis, with its units."""
    for plain, raised in (("(mm/h)^2", "mm²/h²"), ("(dBZ)^2", "dBZ²"), ("^2", "²")):
        units = units.replace(plain, raised)
    return name if units == "1" else f"{name} ({units})"
