"""One window as a film: what was observed beside every model, what they were given and what they forecast; or maps of it.

Axes: T past frames, S forecast frames, C channels, H W space.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from forecast.plots import STYLE, colour_bar, colour_scale, frame_times, panel_height, show_frame, time_label
from forecast.units import Grid, Quantity

_SIDE = 2.2  # inches of a panel
_DPI = 100
_COLUMNS = 4  # panels in a row, at most
_COLOURS = 64
_MOST_COLOURS = 256  # of a GIF
_PAUSE = 300  # milliseconds that a frame is shown
_LAST = 1500


def write_film(
    path: Path,
    past: NDArray[Any],
    truth: NDArray[Any],
    valid: NDArray[Any],
    forecasts: Mapping[str, NDArray[Any]],
    quantity: Quantity,
    cadence: int | None,
    grid: Grid | None = None,
    after: int = 0,
    span: int = 1,
) -> None:
    """Write an animated GIF that begins anew without end. The same numbers give the same bytes.

    Args:
        path: of the file; the other arguments are those of `forecast.plots.forecast_figure`.
        past: T C H W, what was given, physical values; NaN where missing.
        truth: S C H W, physical values.
        valid: S C H W bool; other pixels of the truth are shown in grey.
        forecasts: S C H W by model's name.
        quantity: chooses colours and levels.
        cadence: seconds between frames that were given; None counts frames.
        grid: sets which way is up and the shape of a pixel.
        after: the last so many frames that were given follow the forecast ones.
        span: cadences between forecast frames.
    """
    observed = np.where(valid, truth, np.nan)
    begin = len(past) - after
    panels = {
        name: np.concatenate([past[:begin], frames, past[begin:]])
        for name, frames in {"observed": observed, **forecasts}.items()
    }
    labels = [time_label(time, cadence) for time in frame_times(begin, len(truth), after, span)]
    _save(path, _indexed(_pictures(panels, range(begin, begin + len(truth)), labels, quantity, grid)))


class Panel(NamedTuple):
    """What is shown at one place, at every time."""

    title: str
    frames: NDArray[Any]
    """Frames H W; NaN where there is nothing."""
    scale: tuple[Colormap, Normalize]


def write_maps(
    path: Path,
    rows: Mapping[str, Sequence[Panel]],
    ahead: range,
    cadence: int | None,
    grid: Grid | None = None,
) -> None:
    """Write an animated GIF of rows of maps, each with a scale of its own. The same numbers give the same bytes.

    Args:
        path: of the file.
        rows: by their names, which stand before those that have fewer panels than the first.
        ahead: of their frames those that are forecast.
        cadence: seconds between frames; None counts frames.
        grid: sets which way is up and the shape of a pixel.
    """
    columns = max(map(len, rows.values()))
    first = next(iter(rows.values()))[0]
    with rc_context(STYLE):
        tall = (_SIDE * panel_height(first.frames, grid) + 0.45) * len(rows) + 0.4
        figure = Figure(figsize=((_SIDE + 0.5) * columns, tall), dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        images, shown = [], []
        for axes, (name, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
            free = columns - len(panels)
            for ax in axes[:free]:
                ax.set_axis_off()
            if free:
                axes[0].text(1.0, 0.5, name, ha="right", va="center", fontsize=10, transform=axes[0].transAxes)
            for ax, panel in zip(axes[free:], panels, strict=True):
                ax.set_title(panel.title)
                image = show_frame(ax, panel.frames[:1], panel.scale, grid)
                bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, ticks=MaxNLocator(4))
                bar.outline.set_visible(False)
                bar.ax.tick_params(length=0, labelsize=7)
                images.append(image)
                shown.append(panel.frames)
        labels = [time_label(number + 1 - ahead.start, cadence) for number in range(len(shown[0]))]
        pictures = _drawn(canvas, images, shown, ahead, labels)
    _save(path, _indexed(pictures, colours=_MOST_COLOURS))


def _save(path: Path, images: Sequence[Image.Image]) -> None:
    first, *others = images
    pauses = [_PAUSE] * len(others) + [_LAST]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=pauses, loop=0, optimize=False)


def _pictures(
    panels: Mapping[str, NDArray[Any]], ahead: range, labels: Sequence[str], quantity: Quantity, grid: Grid | None
) -> NDArray[np.uint8]:
    """One picture per frame (frames, height, width, 3); the frames `ahead` were forecast, the others given."""
    frames = panels["observed"]
    rows = -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)
    with rc_context(STYLE):
        size = (_SIDE * columns + 1.0, (_SIDE * panel_height(frames, grid) + 0.3) * rows + 0.4)
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
        scale = colour_scale(quantity, frames[ahead.start : ahead.stop])
        images = [show_frame(ax, one[0], scale, grid) for ax, one in zip(axes, panels.values(), strict=False)]
        for ax, name in zip(axes, panels, strict=False):
            ax.set_title(name)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        colour_bar(figure, axes, quantity, aspect=14 * rows)
        return _drawn(canvas, images, [one[:, 0] for one in panels.values()], ahead, labels)


def _drawn(
    canvas: FigureCanvasAgg,
    images: Sequence[AxesImage],
    shown: Sequence[NDArray[Any]],
    ahead: range,
    labels: Sequence[str],
) -> NDArray[np.uint8]:
    """One picture per time of a figure, in whose images something else is shown at each, (frames, H, W).

    The frames `ahead` were forecast, the others given; the labels tell their times.
    """
    figure = canvas.figure
    title = figure.suptitle("issue time", x=0.01, ha="left", fontsize=11)
    # Laid out and drawn once, but for what moves, which is drawn upon it: the frames, their borders, and the time.
    moving: list[Artist] = [title]
    for image in images:
        moving += [image, *image.axes.spines.values()]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib types no backend
    still = canvas.copy_from_bbox(figure.bbox)  # type: ignore[no-untyped-call]  # as above
    pictures = []
    for index in range(len(shown[0])):
        for image, one in zip(images, shown, strict=True):
            image.set_data(np.ma.masked_invalid(one[index]))
        title.set(text=f"{labels[index]}, {'forecast' if index in ahead else 'given'}")
        title.set_color("black" if index in ahead else "0.45")
        canvas.restore_region(still)  # type: ignore[no-untyped-call]  # as above
        for artist in moving:
            figure.draw_artist(artist)
        pictures.append(np.array(canvas.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]  # as above
    return np.stack(pictures)


def _indexed(pictures: NDArray[np.uint8], colours: int = _COLOURS) -> list[Image.Image]:
    """Images with one palette, of the most frequent colours: these stay exact, others become the nearest of them.

    Pillow's own palettes blend white and grey with their neighbours.
    """
    packed = pictures.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    index, seen = pd.factorize(packed.ravel())  # by hashing: numpy would sort all the pixels
    counts = np.bincount(index)
    rgb = np.stack([seen >> 16, seen >> 8 & 255, seen & 255], axis=1)
    palette = rgb[np.argsort(-counts, kind="stable")[:colours]]
    distance = (palette**2).sum(1) - 2 * rgb @ palette.T  # squared, but for what is the same in a row
    indices = distance.argmin(1).astype(np.uint8)[index].reshape(packed.shape)
    images = [Image.fromarray(one) for one in indices]
    for image in images:
        image.putpalette(palette.astype(np.uint8).tobytes())
    return images
