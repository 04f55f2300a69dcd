"""Skill: labels, pools, the table, the CSV, and one answer from any number of processes."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import xarray as xr
from rich.console import Console
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from forecast.batch import Forecast
from forecast.skill import Skill, derive, tables, to_csv
from forecast.units import Quantity

QUANTITY = Quantity("equivalent_reflectivity_factor", "radar reflectivity", "dBZ", (20.0, 35.0), floor=-10.0)
MODELS = ("convlstm.v2", "persistence")  # a name with a dot, which no ModuleDict takes
SAMPLES, STEPS, BLOCKS = 8, 5, 4


def windows() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Forecasts by model, truth, valid, block; the last sample is padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES, STEPS, 1, 8, 8)
    truth = torch.rand(shape, generator=generator) * 60 - 10
    forecasts = {m: truth + k * torch.randn(shape, generator=generator) for k, m in enumerate(MODELS, start=3)}
    block = torch.tensor([0, 1, 2, 3, 0, 1, 2, -1])
    return forecasts, truth, torch.rand(shape, generator=generator) > 0.1, block


def skill(blocks: int = BLOCKS, cadence: int | None = 600, part: slice = slice(None)) -> Skill:
    """After an update with the samples in `part`."""
    scores = Skill(MODELS, QUANTITY, STEPS, blocks, cadence)
    forecasts, truth, valid, block = windows()
    for model, mean in forecasts.items():
        scores.update(model, Forecast(mean[part]), truth[part], valid[part], block[part].clamp(max=blocks - 1))
    return scores


def test_dataset_is_labelled() -> None:
    dataset = skill().dataset()
    assert dict(dataset.sizes) == {"model": 2, "block": BLOCKS, "lead_time": STEPS, "threshold": 2}
    assert dataset["csi"].dims == ("model", "lead_time", "threshold")
    assert dataset["hits"].dims == ("model", "block", "lead_time", "threshold")
    assert dataset["pixels"].dtype == np.int64
    assert list(dataset["lead_time"].values) == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert dataset["lead_time"].attrs["units"] == "min"
    assert dataset["threshold"].attrs["units"] == "dBZ"
    assert dataset["mse"].attrs["units"] == "(dBZ)^2"
    assert all({"long_name", "units"} <= set(dataset[name].attrs) for name in dataset.data_vars)
    assert "long_name" in dataset["model"].attrs
    assert {"quantity", "events", "pooling"} <= set(dataset.attrs)


def test_without_cadence_frames_are_counted() -> None:
    lead_time = skill(cadence=None).dataset()["lead_time"]
    assert (list(lead_time.values), lead_time.attrs["units"]) == ([1, 2, 3, 4, 5], "frames")


def test_scores_of_blocks_pooled_equal_scores_of_one_block() -> None:
    many, one = skill(), skill(blocks=1)
    pooled, expected = derive(many.dataset().sum("block")), derive(one.dataset().isel(block=0, drop=True))
    xr.testing.assert_allclose(pooled, expected, rtol=1e-12)
    xr.testing.assert_allclose(many.dataset()[list(pooled)], pooled, rtol=1e-12)


def test_derive_keeps_what_was_not_pooled() -> None:
    dataset = skill().dataset()
    by_block = derive(dataset)
    assert by_block["csi"].dims == ("model", "block", "lead_time", "threshold")
    wettest = derive(dataset.isel(block=[1, 1, 3]).sum("block"))
    hits, misses, alarms = (
        dataset[name].isel(block=[1, 1, 3]).sum("block") for name in ("hits", "misses", "false_alarms")
    )
    np.testing.assert_allclose(wettest["csi"], hits / (hits + misses + alarms))


def test_summary_pools_lead_times_and_blocks() -> None:
    scores = skill()
    numbers = scores.summary("persistence")
    assert list(numbers) == ["mse", "mae", "csi_20", "csi_35", "bias_20", "bias_35"]
    forecasts, truth, valid, block = windows()
    scored = valid & (block >= 0)[:, None, None, None, None]
    f, o = forecasts["persistence"][scored].double(), truth[scored].double()
    assert numbers["mse"] == pytest.approx(float((f - o).square().mean()), rel=1e-12)
    both, either = (f >= 20) & (o >= 20), (f >= 20) | (o >= 20)
    assert numbers["csi_20"] == pytest.approx(float(both.sum() / either.sum()), rel=1e-6)
    assert numbers["bias_20"] == pytest.approx(float((f >= 20).sum() / (o >= 20).sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("cadence", "labels"), [(150, ["2.5min", "5min"]), (600, ["10min", "20min"]), (None, ["frame1", "frame2"])]
)
def test_curves_are_the_scores_of_the_dataset_by_name(cadence: int | None, labels: list[str]) -> None:
    scores = skill(cadence=cadence)
    curves = scores.curves("persistence")
    assert list(curves)[:2] == [f"csi_20/{label}" for label in labels]
    assert len(curves) == 2 * 2 * STEPS
    dataset = scores.dataset().sel(model="persistence")
    for name, score in (("csi", "csi"), ("bias", "frequency_bias")):
        for threshold in (20, 35):
            logged = [value for key, value in curves.items() if key.startswith(f"{name}_{threshold}/")]
            assert logged == dataset[score].sel(threshold=threshold).values.tolist()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_models_do_not_share_states() -> None:
    scores = Skill(MODELS, QUANTITY, STEPS, BLOCKS, 600)
    forecasts, truth, valid, block = windows()
    scores.update("persistence", Forecast(forecasts["persistence"]), truth, valid, block)
    pixels = scores.dataset()["pixels"].sum(["block", "lead_time"])
    assert pixels.sel(model="convlstm.v2") == 0
    assert pixels.sel(model="persistence") == int(valid[:-1].sum())


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_reset_forgets() -> None:
    scores = skill()
    scores.reset()
    assert int(scores.dataset()["pixels"].sum()) == 0
    assert np.isnan(scores.summary("persistence")["csi_20"])


def test_no_rain_at_all_is_nan_not_0() -> None:
    scores = Skill(["dry"], QUANTITY, 1, 1, 300)
    dry = torch.full((1, 1, 1, 4, 4), -10.0)
    scores.update("dry", Forecast(dry), dry, torch.ones_like(dry, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    dataset = scores.dataset().isel(model=0, lead_time=0)
    for name in ("csi", "pod", "far", "frequency_bias", "hss", "correlation"):
        assert np.isnan(dataset[name]).all(), name
    assert dataset["mse"] == 0


def test_a_nan_forecast_spoils_its_own_lead_time_and_every_pool_with_it() -> None:
    scores = skill()
    forecasts, truth, valid, block = windows()
    mean = forecasts["persistence"].clone()
    mean[:, 2] = torch.nan
    scores.update("persistence", Forecast(mean), truth, valid, block)
    dataset = scores.dataset()
    spoilt = [False, False, True, False, False]
    for name in ("csi", "pod", "far", "frequency_bias", "hss"):
        assert dataset[name].sel(model="persistence").isnull().all("threshold").values.tolist() == spoilt
    for name in ("mse", "mae", "rmse", "mean_error", "correlation"):
        assert dataset[name].sel(model="persistence").isnull().values.tolist() == spoilt
    assert dataset["mse"].sel(model="convlstm.v2").notnull().all()
    # xarray's sum skips NaN, and yet the pool is not a number.
    everything = derive(dataset.sum(["block", "lead_time"])).sel(model="persistence")
    assert all(everything[name].isnull().all() for name in everything)
    assert all(np.isnan(value) for value in scores.summary("persistence").values())


def test_smallest_of_everything() -> None:
    """torchmetrics squeezes states of one element."""
    scores = Skill(["one"], Quantity("x", "grey level", "1", (0.5,)), 1, 1, None)
    ones = torch.ones(1, 1, 1, 2, 2)
    scores.update("one", Forecast(ones), ones, ones.bool(), torch.zeros(1, dtype=torch.int64))
    assert scores.summary("one") == {"mse": 0.0, "mae": 0.0, "csi_0.5": 1.0, "bias_0.5": 1.0}
    none = Skill(["one"], Quantity("x", "grey level", "1", ()), 1, 1, None)
    none.update("one", Forecast(ones), ones, ones.bool(), torch.zeros(1, dtype=torch.int64))
    assert none.summary("one") == {"mse": 0.0, "mae": 0.0}
    assert to_csv(none.dataset()).splitlines()[0] == "model,lead_time_frames,mse,rmse,mae,mean_error,correlation"
    assert [shown.row_count for shown in tables(none.dataset())] == [2]


def test_states_are_no_part_of_a_checkpoint() -> None:
    assert skill().state_dict() == {}


def test_table_sets_models_side_by_side() -> None:
    dataset = skill().dataset()
    values, *events = tables(dataset)
    assert len(events) == dataset.sizes["threshold"]
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    for shown in (values, *events):
        assert shown.row_count == (STEPS + 1) * len(MODELS)
        console.print(shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "35 dBZ" in text
    assert f"{float(dataset['csi'].sel(model='persistence', lead_time=50, threshold=35)):.4g}" in text
    for name in ("pod", "far", "hss", "frequency_bias"):
        assert f"{float(dataset[name].sel(model='persistence', lead_time=50, threshold=35)):.4g}" in text
    assert f"{float(dataset['mae'].sel(model='convlstm.v2').mean()):.4g}" in text


def test_csv_has_a_row_per_model_and_lead_time() -> None:
    dataset = skill().dataset()
    head, *rows = [line.split(",") for line in to_csv(dataset).splitlines()]
    assert head[:3] == ["model", "lead_time_min", "mse"]
    assert {"csi_20", "csi_35", "frequency_bias_35", "correlation"} <= set(head)
    assert [row[:2] for row in rows] == [[m, f"{lead}"] for m in MODELS for lead in (10, 20, 30, 40, 50)]
    expected = float(dataset["csi"].sel(model="persistence", lead_time=20, threshold=35))
    assert float(rows[6][head.index("csi_35")]) == pytest.approx(expected, rel=1e-6)


def _rank(rank: int, folder: str, score: Callable[..., Any]) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    dataset = score(part=slice(rank, None, 2)).dataset()
    dataset.to_netcdf(os.path.join(folder, f"{rank}.nc"))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path), skill), nprocs=2)
    alone = skill().dataset()
    for rank in range(2):
        with xr.open_dataset(tmp_path / f"{rank}.nc") as both:
            for name in alone.data_vars:
                if alone[name].dtype == np.int64:
                    assert np.array_equal(both[name], alone[name]), name
                else:
                    np.testing.assert_allclose(both[name], alone[name], rtol=1e-12, err_msg=str(name))
