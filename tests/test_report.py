"""The folder of a test: what is written can be read, and every kind of figure can be drawn."""

import os
from pathlib import Path
from typing import Any

import commands
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import xarray as xr

from forecast import report
from forecast.baselines.persistence import Persistence
from forecast.batch import Forecast, Frames
from forecast.callbacks.scores import Report
from forecast.curves import skill_figure, spectrum_figure
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.metric import Scope
from forecast.metrics.spectral import Spectrum
from forecast.module import NowcastModule
from forecast.plots import forecast_figure
from forecast.protocol import Protocol
from forecast.references import Reference, References
from forecast.report import Sample, write
from forecast.scoring import Scoring
from forecast.sections import ROOT, Sections
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


METRICS = {"continuous": Continuous, "contingency": Contingency, "spectrum": Spectrum}


def skill(quantity: Quantity, cadence: int | None, steps: int = 3, metrics: Any = METRICS) -> xr.Dataset:
    one = sample(steps=steps)
    scores = Skill(list(one.forecasts), Scope(quantity, steps, 2, size=(12, 16)), cadence, metrics)
    truth, valid = torch.from_numpy(one.truth)[None].float(), torch.from_numpy(one.valid)[None]
    for model, mean in one.forecasts.items():
        scores.update(model, Forecast(torch.from_numpy(mean)[None].float()), truth, valid, torch.ones(1).long())
    return scores.dataset()


def test_written_files_can_be_read(tmp_path: Path) -> None:
    dataset = skill(DBZ, 600)
    more = {"subsample": skill(DBZ, 600, steps=2).assign(position=("window", [3, 8]))}
    write(tmp_path / "run", {ROOT: dataset, **more}, sample(), DBZ, 600)
    found = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*"))
    figures = [f"figures/{name}" for name in ("forecast.gif", "forecast.png", "skill.png", "spectrum.png")]
    assert found == [*figures, "skill.csv", "skill.nc", "skill_subsample.csv"]
    with xr.open_dataset(tmp_path / "run" / "skill.nc") as read:
        xr.testing.assert_identical(read.load(), dataset)
        xr.testing.assert_identical(derive(read.sum("block")), derive(dataset.sum("block")))
        assert read["hits"].dtype == np.int64
    with xr.open_dataset(tmp_path / "run" / "skill.nc", group="subsample") as read:
        xr.testing.assert_identical(read.load(), more["subsample"])
    for name in ("forecast", "skill", "spectrum"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_sample_there_is_no_forecast_figure(tmp_path: Path) -> None:
    write(tmp_path, {ROOT: skill(DIGITS, None)}, None, DIGITS, None)
    assert sorted(os.listdir(tmp_path / "figures")) == ["skill.png", "spectrum.png"]


def test_figures_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, {ROOT: skill(DIGITS, None)}, sample(), DIGITS, None, figures=False)
    assert sorted(os.listdir(tmp_path)) == ["skill.csv", "skill.nc"]


@pytest.mark.parametrize(("chosen", "panels"), [("contingency", 4), ("continuous", 3), ("spectrum", 0)])
def test_scores_that_were_not_chosen_are_not_drawn(chosen: str, panels: int, tmp_path: Path) -> None:
    scored = skill(DBZ, 600, metrics={chosen: METRICS[chosen]})
    write(tmp_path, {ROOT: scored}, None, DBZ, 600)
    assert (tmp_path / "figures" / "spectrum.png").exists() == (chosen == "spectrum")
    assert len(skill_figure(scored).axes) == panels


def test_spectrum_has_the_truth_and_every_model_at_the_first_and_last_lead_time() -> None:
    first, last = spectrum_figure(skill(DBZ, 600)).axes
    assert [ax.get_title(loc="left") for ax in (first, last)] == ["+10 min", "+30 min"]
    assert [line.get_label() for line in last.lines] == ["truth", "convlstm", "persistence"]
    scored = skill(DBZ, 600).isel(lead_time=-1, wavenumber=slice(1, None))
    np.testing.assert_array_equal(last.lines[0].get_ydata(), scored["power_truth"].isel(model=0))
    np.testing.assert_array_equal(last.lines[1].get_ydata(), scored["power_forecast"].sel(model="convlstm"))
    np.testing.assert_allclose(last.lines[0].get_xdata(), 1 / scored["wavenumber"])


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
    spectrum_figure(dataset.where(False)).draw_without_rendering()
    one = sample()
    forecast_figure(*one._replace(valid=np.zeros_like(one.valid)), KELVIN, 600).draw_without_rendering()


def shown(folder: Path, batches: list[Frames], monkeypatch: pytest.MonkeyPatch) -> Sample | None:
    """What the report of a test over these batches shows."""
    written: list[Any] = []
    monkeypatch.setattr(report, "write", lambda folder, skill, sample, *more, **options: written.append(sample))
    scope, reference = Scope(DBZ, 2, 4), Reference("reference", Persistence())
    module = NowcastModule(
        *("persistence", Persistence(), DBZ, Grid((4, 4)), 600, 2),
        scoring=Scoring(
            Skill(["persistence"], scope, 600, {}),
            Sections(["persistence", "reference"], scope, 600, {"continuous": Continuous}),
            References([reference], list),
            Protocol({}, 2, 600, {}, {}, {}, {}),
            members=0,
            validation_members=0,
        ),
        card={"config": {"seed": 0, "folder": str(folder), "model": {}}},
    )
    callback = Report(str(folder))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.trainer = trainer
    callback.on_test_start(trainer, module)
    for index, one in enumerate(batches):
        callback.on_test_batch_end(trainer, module, None, one, index)
    module.results = module.sections.datasets()
    callback.on_test_end(trainer, module)
    [sample] = written
    return sample


def frames(level: list[float], time: list[int], block: list[int]) -> Frames:
    """Windows of one value each."""
    truth = torch.tensor(level).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 4, 4)
    everywhere = torch.ones_like(truth, dtype=torch.bool)
    static = torch.zeros(len(level), 0, 4, 4)
    lanes = torch.ones(len(level), dtype=torch.bool)
    return Frames(truth + 1, everywhere, truth, everywhere, static, torch.tensor(time), torch.tensor(block), lanes)


def test_heaviest_window_is_shown_and_the_earliest_of_equal_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level, time, block = [3.0, 9.0, 9.0, 9.5, 99.0], [10, 40, 30, 20, 50], [0, 1, 2, 3, -1]  # the last is padding
    for sizes in ([5], [1] * 5, [2, 3], [4, 1]):
        for order in (slice(None), slice(None, None, -1)):
            windows = list(zip(level, time, block, strict=True))[order]
            ends = np.cumsum(sizes).tolist()
            dealt = [windows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            sample = shown(tmp_path, [frames(*map(list, zip(*one, strict=True))) for one in dealt], monkeypatch)
            assert sample is not None
            assert (sample.truth == 9.5).all()
            assert list(sample.forecasts) == ["persistence", "reference"]
            assert (sample.forecasts["reference"] == 10.5).all()
    equal = frames([9.0, 9.0, 9.0], [40, 30, 30], [0, 3, 2])
    marked = equal._replace(past=torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1, 1, 1).expand(equal.past.shape))
    for deal in ([marked], [Frames(*(part[i : i + 1] for part in marked)) for i in (2, 0, 1)]):
        sample = shown(tmp_path, deal, monkeypatch)
        assert sample is not None
        assert (sample.past == 3).all()


def test_without_a_window_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(tmp_path, [frames([9.0], [0], [-1])], monkeypatch) is None


@pytest.mark.slow
def test_two_processes_show_the_window_that_one_shows(tmp_path: Path) -> None:
    """A baseline's forecast is the same to the last bit, so the pictures are. The eighth window is the second process's."""
    digits = ["model=persistence", "data.test=8", "data.future=3", "data.batch_size=3", "trainer.accelerator=cpu"]
    commands.run(*digits, "logger=none", folder=tmp_path / "one")
    commands.run(*digits, "logger=none", "trainer.strategy=ddp", "trainer.devices=2", folder=tmp_path / "two")
    for name in ("forecast.png", "forecast.gif"):
        assert (tmp_path / "one/figures" / name).read_bytes() == (tmp_path / "two/figures" / name).read_bytes()
