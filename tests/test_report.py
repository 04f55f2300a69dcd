"""The folder of a test: what is written can be read, and every kind of figure can be drawn."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from forecast.batch import Forecast
from forecast.plots import forecast_figure, skill_figure
from forecast.report import Sample, write
from forecast.skill import Skill, derive
from forecast.units import Grid, Quantity

DBZ = Quantity("equivalent_reflectivity_factor", "radar reflectivity", "dBZ", (20.0, 35.0), floor=-10.0)
RAIN = Quantity("rainfall_rate", "rain rate", "mm/h", (1.0,))
DIGITS = Quantity("digits", "grey level", "1", ())
KELVIN = Quantity("air_temperature", "temperature", "K", (273.15,))


def sample(models: tuple[str, ...] = ("convlstm", "persistence"), past: int = 4, steps: int = 3) -> Sample:
    random = np.random.default_rng(0)
    frames = random.random((past + steps, 1, 12, 16)) * 50
    valid = random.random((steps, 1, 12, 16)) > 0.2
    return Sample(frames[:past], frames[past:], valid, dict.fromkeys(models, frames[past:] + 1))


def skill(quantity: Quantity, cadence: int | None, steps: int = 3) -> xr.Dataset:
    one = sample(steps=steps)
    scores = Skill(list(one.forecasts), quantity, steps, 2, cadence)
    truth, valid = torch.from_numpy(one.truth)[None].float(), torch.from_numpy(one.valid)[None]
    for model, mean in one.forecasts.items():
        scores.update(model, Forecast(torch.from_numpy(mean)[None].float()), truth, valid, torch.ones(1).long())
    return scores.dataset()


def test_written_files_can_be_read(tmp_path: Path) -> None:
    dataset = skill(DBZ, 600)
    write(tmp_path / "run", dataset, sample(), DBZ, 600)
    found = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*"))
    assert found == ["figures/forecast.png", "figures/skill.png", "skill.csv", "skill.nc"]
    with xr.open_dataset(tmp_path / "run" / "skill.nc") as read:
        xr.testing.assert_identical(read.load(), dataset)
        xr.testing.assert_identical(derive(read.sum("block")), derive(dataset.sum("block")))
        assert read["hits"].dtype == np.int64
    for name in ("forecast", "skill"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_sample_there_is_no_forecast_figure(tmp_path: Path) -> None:
    write(tmp_path, skill(DIGITS, None), None, DIGITS, None)
    assert os.listdir(tmp_path / "figures") == ["skill.png"]


@pytest.mark.parametrize("quantity", [DBZ, RAIN, DIGITS, KELVIN], ids=lambda quantity: quantity.units)
def test_figures_of_every_quantity(quantity: Quantity) -> None:
    cadence = None if quantity is DIGITS else 300
    figure = forecast_figure(*sample(), quantity, cadence)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == (
        ["frame \N{MINUS SIGN}3", "frame \N{MINUS SIGN}1", "frame 0", "frame +1", "frame +2", "frame +3"]
        if quantity is DIGITS
        else ["\N{MINUS SIGN}15 min", "\N{MINUS SIGN}5 min", "issue time", "+5 min", "+10 min", "+15 min"]
    )
    label = figure.axes[-1].get_ylabel()
    assert label == (quantity.long_name if quantity is DIGITS else f"{quantity.long_name} ({quantity.units})")
    panels = len(skill_figure(skill(quantity, cadence)).axes)
    assert panels == 3 + 2 * len(quantity.thresholds)


@pytest.mark.parametrize(("past", "steps", "columns"), [(1, 1, 2), (10, 20, 9), (5, 12, 9)])
def test_any_number_of_frames(past: int, steps: int, columns: int) -> None:
    figure = forecast_figure(*sample(("one",), past, steps), DBZ, 600)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == columns
    assert titles[-1] == f"+{10 * steps} min"


def test_north_is_up() -> None:
    rising = Grid((12, 16), origin=(42.0, 6.0), spacing=(0.01, 0.01), units="degrees")
    falling = Grid((12, 16), origin=(42.0, 6.0), spacing=(-0.01, 0.01), units="degrees")
    for grid, origin in ((rising, "lower"), (falling, "upper"), (None, "upper")):
        assert forecast_figure(*sample(), DBZ, 600, grid).axes[0].images[0].origin == origin


def test_nothing_but_nan_can_be_drawn() -> None:
    dataset = skill(DBZ, 600)
    skill_figure(dataset.where(False)).draw_without_rendering()
    one = sample()
    forecast_figure(*one._replace(valid=np.zeros_like(one.valid)), KELVIN, 600).draw_without_rendering()
