"""One window as a film: what was observed beside every model, the past that they were given and then their forecasts.

Axes: T past frames, S forecast frames, C channels, H W space.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from forecast.plots import STYLE, colour_bar, colour_scale, panel_height, show_frame, time_label
from forecast.units import Grid, Quantity

_SIDE = 2.2  # inches of a panel
_DPI = 100
_COLUMNS = 4  # panels in a row, at most
_COLOURS = 64
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
) -> None:
    """Write an animated GIF that begins anew without end. The same numbers give the same bytes.

    Args:
        path: of the file; the other arguments are those of `forecast.plots.forecast_figure`.
        past: T C H W, physical values; NaN where missing.
        truth: S C H W, physical values.
        valid: S C H W bool; other pixels of the truth are shown in grey.
        forecasts: S C H W by model's name.
        quantity: chooses colours and levels.
        cadence: seconds between frames; None counts frames.
        grid: sets which way is up and the shape of a pixel.
    """
    observed = np.where(valid, truth, np.nan)
    panels = {name: np.concatenate([past, after]) for name, after in {"observed": observed, **forecasts}.items()}
    first, *others = _indexed(_pictures(panels, len(past), quantity, cadence, grid))
    pauses = [_PAUSE] * len(others) + [_LAST]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=pauses, loop=0, optimize=False)


def _pictures(
    panels: Mapping[str, NDArray[Any]], given: int, quantity: Quantity, cadence: int | None, grid: Grid | None
) -> NDArray[np.uint8]:
    """One picture per frame (frames, height, width, 3); of the frames the first `given` are the past."""
    frames = panels["observed"]
    rows = -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)
    with rc_context(STYLE):
        size = (_SIDE * columns + 1.0, (_SIDE * panel_height(frames, grid) + 0.3) * rows + 0.4)
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
        scale = colour_scale(quantity, frames[given:])
        images = [show_frame(ax, one[0], scale, grid) for ax, one in zip(axes, panels.values(), strict=False)]
        for ax, name in zip(axes, panels, strict=False):
            ax.set_title(name)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        colour_bar(figure, axes, quantity, aspect=14 * rows)
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
        for index in range(len(frames)):
            for image, one in zip(images, panels.values(), strict=True):
                image.set_data(np.ma.masked_invalid(one[index][0]))
            when = time_label(index + 1 - given, cadence)
            title.set(text=f"{when}, given" if index < given else f"{when}, forecast")
            title.set_color("0.45" if index < given else "black")
            canvas.restore_region(still)  # type: ignore[no-untyped-call]  # as above
            for artist in moving:
                figure.draw_artist(artist)
            pictures.append(np.array(canvas.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]  # as above
    return np.stack(pictures)


def _indexed(pictures: NDArray[np.uint8]) -> list[Image.Image]:
    """Images with one palette, of the most frequent colours: these stay exact, others become the nearest of them.

    Pillow's own palettes blend white and grey with their neighbours.
    """
    packed = pictures.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    index, colours = pd.factorize(packed.ravel())  # by hashing: numpy would sort all the pixels
    counts = np.bincount(index)
    rgb = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
    palette = rgb[np.argsort(-counts, kind="stable")[:_COLOURS]]
    distance = (palette**2).sum(1) - 2 * rgb @ palette.T  # squared, but for what is the same in a row
    indices = distance.argmin(1).astype(np.uint8)[index].reshape(packed.shape)
    images = [Image.fromarray(one) for one in indices]
    for image in images:
        image.putpalette(palette.astype(np.uint8).tobytes())
    return images
