"""Tables: what is printed, how models stand to a reference, and the wide table of the CSV."""

import io
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

from forecast.batch import Forecast
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.metric import Scope
from forecast.metrics.neighbourhood import Fractions
from forecast.skill import Skill, derive
from forecast.tables import headline, relative, tables, to_csv, wide
from forecast.units import Quantity

MODELS = ("convlstm", "persistence", "extrapolation")
METRICS = {"continuous": Continuous, "contingency": Contingency, "fractions": partial(Fractions, scales=(1, 2, 4))}


def skill(steps: int = 5, models: tuple[str, ...] = MODELS, thresholds: tuple[float, ...] = (20.0, 35.0)) -> xr.Dataset:
    quantity = Quantity("equivalent_reflectivity_factor", "radar reflectivity", "dBZ", thresholds, floor=-10.0)
    scores = Skill(models, Scope(quantity, steps, 2), 600, METRICS)
    generator = torch.Generator().manual_seed(0)
    shape = (4, steps, 1, 8, 8)
    truth = torch.rand(shape, generator=generator) * 60 - 10
    for spread, model in enumerate(models, start=3):
        mean = truth + spread * torch.randn(shape, generator=generator)
        scores.update(model, Forecast(mean), truth, torch.ones_like(truth, dtype=torch.bool), torch.arange(4) % 2)
    return scores.dataset()


def printed(shown: Table, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


def cells(shown: Table, row: str) -> list[list[str]]:
    """The rows of a lead time, a cell for each column."""
    columns = [list(column.cells) for column in shown.columns]
    start = columns[0].index(row)
    plain = [[str(cell).replace("[bold]", "").replace("[/bold]", "") for cell in column] for column in columns]
    return [[column[index] for column in plain] for index in range(start, start + len(set(columns[1])))]


def test_models_stand_side_by_side_by_lead_time() -> None:
    dataset = skill()
    values, low, high, *_ = tables(dataset)
    assert [str(column.header) for column in values.columns][:3] == ["lead time (min)", "model", "MSE"]
    assert [str(column.header) for column in high.columns][2:] == ["CSI", "POD", "FAR", "HSS", "bias", "FSS 2 px"]
    assert "at least 20 dBZ" in str(low.title)
    assert "at least 35 dBZ" in str(high.title)
    for shown in (values, low, high):
        assert shown.row_count == (5 + 2) * len(MODELS)
    row = cells(high, "50")[1]
    assert row[1] == "persistence"
    at = dataset.sel(model="persistence", lead_time=50, threshold=35)
    expected = [at[name] for name in ("csi", "pod", "far", "hss", "frequency_bias")] + [at["fss"].sel(scale=2)]
    assert row[2:] == [f"{float(value):.4g}" for value in expected]


def test_the_last_two_rows_are_the_mean_over_leads_and_all_leads_pooled() -> None:
    dataset = skill()
    events = tables(dataset)[1]
    mean, pooled = (float(cells(events, row)[0][2]) for row in ("mean", "pooled"))
    at = dataset.sel(model="convlstm", threshold=20)
    assert mean == pytest.approx(float(at["csi"].mean("lead_time")), abs=1e-4)
    together = derive(dataset.sum(["block", "lead_time"])).sel(model="convlstm", threshold=20)
    assert pooled == pytest.approx(float(together["csi"]), abs=1e-4)
    assert [str(cell) for cell in events.columns[0].cells if cell][-2:] == ["mean", "pooled"]


def test_skill_relative_to_each_reference_is_printed() -> None:
    dataset = skill()
    first, second = tables(dataset)[3:]
    assert "relative to extrapolation" in str(first.title)
    assert "relative to persistence" in str(second.title)
    assert [str(column.header) for column in second.columns][2:] == ["MSE", "MAE", "CSI", "FSS 2 px"]
    row = cells(second, "30")[0]
    model, reference = (dataset.sel(lead_time=30, threshold=35, scale=2, model=name) for name in MODELS[:2])
    expected = [1 - model[name] / reference[name] for name in ("mse", "mae")]
    expected += [(model[name] - reference[name]) / (1 - reference[name]) for name in ("csi", "fss")]
    assert row[1] == "convlstm"
    assert row[2:] == [f"{float(value):.4g}" for value in expected]
    assert "persistence" not in second.columns[1].cells


def test_without_a_reference_nothing_is_relative() -> None:
    assert len(tables(skill(models=("convlstm", "gru")))) == 3
    assert len(tables(skill(models=("persistence",)))) == 3


def test_relative_to_a_perfect_reference_is_nan() -> None:
    scores = xr.Dataset({"mse": ("model", [2.0, 0.0, 0.0]), "csi": ("model", [0.5, 1.0, 1.0])}, {"model": list("abc")})
    assert np.isnan(relative(scores, "b").to_array()).all()
    scores["mse"][1] = 4.0
    assert relative(scores, "b")["mse"].values.tolist() == [0.5, 1.0]


def test_tables_fit_the_page_and_mark_the_best() -> None:
    made = tables(skill(steps=20))
    for shown in made:
        assert all(len(line) <= 100 for line in printed(shown, width=300))
    values = made[0]
    leads = [str(cell) for cell in values.columns[0].cells if cell]
    assert len(leads) <= 12 + 2
    assert leads[-3:] == ["200", "mean", "pooled"]
    best = [cell for column in values.columns[2:] for cell in column.cells if "[bold]" in str(cell)]
    assert len(best) == len(leads) * (len(values.columns) - 2)
    assert "[bold]" in next(iter(values.columns[2].cells))  # the smallest MSE, the largest of other scores


def test_nothing_to_show_is_a_short_table() -> None:
    dataset = skill(models=("one",), thresholds=())
    assert [shown.row_count for shown in tables(dataset)] == [5 + 2]
    head = to_csv(dataset).splitlines()[0]
    assert head == "model,lead_time_min,mse,rmse,mae,mean_error,correlation"


def test_headline_has_what_is_printed() -> None:
    short = headline(skill())
    assert list(short) == ["mse", "rmse", "mae", "correlation", "csi", "pod", "far", "hss", "frequency_bias", "fss"]
    assert list(wide(short).columns)[-2:] == ["fss_20_2px", "fss_35_2px"]


def test_csv_has_a_row_per_model_and_lead_time() -> None:
    dataset = skill()
    head, *rows = [line.split(",") for line in to_csv(dataset).splitlines()]
    assert head[:3] == ["model", "lead_time_min", "mse"]
    assert {"csi_20", "csi_35", "frequency_bias_35", "correlation", "sedi_20", "fss_35_4px"} <= set(head)
    assert not {"hits", "undefined", "samples"} & set(head)
    assert [row[:2] for row in rows] == [[m, f"{lead}"] for m in MODELS for lead in (10, 20, 30, 40, 50)]
    at = dataset.sel(model="persistence", lead_time=20, threshold=35)
    for column, expected in (("csi_35", at["csi"]), ("fss_35_4px", at["fss"].sel(scale=4))):
        assert float(rows[6][head.index(column)]) == pytest.approx(float(expected), rel=1e-6)
