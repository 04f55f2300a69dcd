"""The film: every frame in its order, in the colours of the figures, and the same bytes each time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from forecast.film import write_film
from forecast.plots import colour_scale, missing_colour
from forecast.units import Grid, Quantity

DBZ = Quantity("equivalent_reflectivity_factor", "radar reflectivity", "dBZ", (20.0, 35.0), floor=-10.0)
DIGITS = Quantity("digits", "grey level", "1", ())
PAST, STEPS = 3, 4


def fields(past: float, observed: float, *models: float) -> tuple[Any, ...]:
    """Even fields: the past, what came, and what each model said."""
    frame = np.ones((1, 12, 12))
    said = {f"model {index}": np.stack([value * frame] * STEPS) for index, value in enumerate(models)}
    truth = np.stack([observed * frame] * STEPS)
    return np.stack([past * frame] * PAST), truth, np.ones_like(truth, dtype=bool), said


def film(path: Path) -> list[NDArray[np.uint8]]:
    with Image.open(path) as opened:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]


def has(picture: NDArray[np.uint8], colour: tuple[float, ...]) -> bool:
    """A tenth of the picture at least."""
    sought = np.round(np.array(colour[:3]) * 255)
    return bool((np.abs(picture - sought).max(-1) <= 1).mean() > 0.1)


def test_past_is_followed_by_what_came_and_what_was_forecast(tmp_path: Path) -> None:
    write_film(tmp_path / "film.gif", *fields(12, 27, 42), DBZ, 600)
    colours, norm = colour_scale(DBZ, np.zeros(1))
    past, observed, forecast = (colours(norm(value)) for value in (12, 27, 42))
    frames = film(tmp_path / "film.gif")
    assert len(frames) == PAST + STEPS
    for number, picture in enumerate(frames):
        # Two panels side by side; the scale at the right has all colours.
        left, right = picture[:, : picture.shape[1] * 2 // 5], picture[:, picture.shape[1] // 2 : -100]
        assert has(left, past if number < PAST else observed)
        assert has(right, past if number < PAST else forecast)
        assert not has(picture, forecast if number < PAST else past)


@pytest.mark.parametrize("quantity", [DBZ, DIGITS], ids=lambda quantity: quantity.units)
def test_missing_pixels_have_the_colour_of_missing(quantity: Quantity, tmp_path: Path) -> None:
    past, truth, valid, forecasts = fields(0.2, 0.8, 0.4)
    valid[1:] = False
    past[0] = np.nan
    write_film(tmp_path / "film.gif", past, truth, valid, forecasts, quantity, None)
    missing = tuple(int(missing_colour(quantity)[at : at + 2], 16) / 255 for at in (1, 3, 5))
    assert [has(picture, missing) for picture in film(tmp_path / "film.gif")] == [
        True,
        False,
        False,
        False,
        *[True] * 3,
    ]


def test_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.gif", "two.gif"):
        write_film(tmp_path / name, *fields(12, 27, 42), DBZ, 600)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()


def test_every_frame_has_a_title_of_its_own(tmp_path: Path) -> None:
    write_film(tmp_path / "film.gif", *fields(12, 12, 12), DBZ, 600)
    frames = film(tmp_path / "film.gif")
    assert len({picture[:25].tobytes() for picture in frames}) == len(frames)
    assert len({picture[25:].tobytes() for picture in frames}) == 1


def test_film_begins_anew_and_rests_at_its_end(tmp_path: Path) -> None:
    write_film(tmp_path / "film.gif", *fields(12, 27), DBZ, 600)
    with Image.open(tmp_path / "film.gif") as opened:
        assert opened.info["loop"] == 0
        pauses = [frame.info["duration"] for frame in ImageSequence.Iterator(opened)]
    assert len(set(pauses[:-1])) == 1
    assert pauses[-1] > 2 * pauses[0]


def test_north_is_up_and_any_number_of_models_has_room(tmp_path: Path) -> None:
    past, truth, valid, forecasts = fields(0, 0, 0, 0, 0, 0)
    truth[:, :, 6:] = 52  # the upper half of a grid whose rows count upwards
    north = Grid((12, 12), origin=(0.0, 6.0), spacing=(0.01, 0.01), units="degrees")
    write_film(tmp_path / "film.gif", past, truth, valid, forecasts, DBZ, 600, north)
    last = film(tmp_path / "film.gif")[-1]
    colours, norm = colour_scale(DBZ, np.zeros(1))
    heavy = np.round(np.array(colours(norm(52.0))[:3]) * 255)
    rows, columns = np.nonzero((np.abs(last - heavy).max(-1) <= 1) & (np.arange(last.shape[1]) < last.shape[1] // 3))
    # Five panels in two rows: the observed one is at the top left.
    assert rows.max() < last.shape[0] / 3
    assert columns.max() - columns.min() > 1.8 * (rows.max() - rows.min())
