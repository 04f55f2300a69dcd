"""Skill: labels, pools, names, and one answer from any number of processes."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import xarray as xr
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous, Cosine
from forecast.metrics.metric import AdditiveMetric, Scope
from forecast.metrics.neighbourhood import Fractions, PooledContingency
from forecast.metrics.spectral import Spectrum
from forecast.skill import Skill, catalogue, columns, derive
from forecast.units import Quantity

QUANTITY = Quantity("equivalent_reflectivity_factor", "radar reflectivity", "dBZ", (20.0, 35.0), floor=-10.0)
MODELS = ("convlstm.v2", "persistence")  # a name with a dot, which no ModuleDict takes
SAMPLES, STEPS, BLOCKS = 8, 5, 4
METRICS: Mapping[str, Callable[[Scope], AdditiveMetric]] = {
    "continuous": Continuous,
    "contingency": Contingency,
    "fractions": partial(Fractions, scales=(1, 2, 4)),
    "pooled": partial(PooledContingency, pools=(2,)),
    "cosine": Cosine,
}


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
    scores = Skill(MODELS, Scope(QUANTITY, STEPS, blocks), cadence, METRICS)
    forecasts, truth, valid, block = windows()
    for model, mean in forecasts.items():
        scores.update(model, Forecast(mean[part]), truth[part], valid[part], block[part].clamp(max=blocks - 1))
    return scores


def test_dataset_is_labelled() -> None:
    dataset = skill().dataset()
    assert dict(dataset.sizes) == {
        "model": 2,
        "block": BLOCKS,
        "lead_time": STEPS,
        "threshold": 2,
        "scale": 3,
        "pool": 1,
    }
    assert dataset["csi"].dims == ("model", "lead_time", "threshold")
    assert dataset["hits"].dims == ("model", "block", "lead_time", "threshold")
    assert dataset["fss"].dims == ("model", "lead_time", "threshold", "scale")
    assert dataset["scale"].attrs["units"] == dataset["pool"].attrs["units"] == "pixels"
    assert dataset["pixels"].dtype == np.int64
    assert list(dataset["lead_time"].values) == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert dataset["lead_time"].attrs["units"] == "min"
    assert dataset["threshold"].attrs["units"] == "dBZ"
    assert dataset["mse"].attrs["units"] == "(dBZ)^2"
    assert all({"long_name", "units"} <= set(dataset[name].attrs) for name in dataset.data_vars)
    assert "long_name" in dataset["model"].attrs
    assert {"quantity", "events", "pooled", "mean_over_leads"} <= set(dataset.attrs)


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


@pytest.mark.parametrize("make", [Continuous, Contingency, Fractions, PooledContingency, Spectrum])
def test_channels_are_added_up(make: Callable[[Scope], AdditiveMetric]) -> None:
    scope = Scope(QUANTITY, STEPS, BLOCKS, size=(8, 8))
    forecasts, truth, valid, block = windows()
    f, o = (torch.cat([field, field.flip(0)], dim=2) for field in (forecasts["persistence"], truth))
    v, block = torch.cat([valid, valid.flip(1)], dim=2), block.clamp_min(0)

    def sums(channels: slice) -> dict[str, Tensor]:
        metric = make(scope)
        metric.update(Forecast(f[:, :, channels]), o[:, :, channels], v[:, :, channels], block)
        return metric.compute()

    both, first, second = sums(slice(2)), sums(slice(1)), sums(slice(1, 2))
    for name, found in both.items():
        torch.testing.assert_close(found, first[name] + second[name], rtol=1e-12, atol=0)


def test_summary_pools_lead_times_and_blocks() -> None:
    scores = skill()
    numbers = scores.summary("persistence")
    assert list(numbers)[:6] == ["mse", "mae", "csi_20", "csi_35", "bias_20", "bias_35"]
    assert {"fss_20_1px", "fss_35_4px", "csi_pooled_35_2px"} <= set(numbers)
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
    curves = scores.summary("persistence", by_lead=True)
    assert [name for name in curves if name.startswith("csi_20/")][:2] == [f"csi_20/{label}" for label in labels]
    dataset = scores.dataset().sel(model="persistence")
    logged = {"csi_20": dataset["csi"][:, 0], "bias_35": dataset["frequency_bias"][:, 1], "mse": dataset["mse"]}
    for name, score in (logged | {"fss_35_4px": dataset["fss"][:, 1, 2]}).items():
        assert [value for key, value in curves.items() if key.startswith(f"{name}/")] == score.values.tolist()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_names_are_known_before_any_data() -> None:
    scores = skill()
    empty = Skill(MODELS, Scope(QUANTITY, STEPS, BLOCKS), 600, METRICS)
    assert empty.names() == list(scores.summary("persistence", by_lead=True))
    assert {"csi_20", "bias_35", "csi_20/30min", "fss_20_2px/50min", "mae/10min"} <= set(empty.names())


def test_every_pool_equals_the_scores_of_all_its_pixels_together() -> None:
    """Blocks 0 and 2 at the last three lead times, by packages that see the pixels themselves."""
    categorical = pytest.importorskip("scores.categorical", reason="scores is a development dependency")
    continuous = pytest.importorskip("scores.continuous", reason="scores is a development dependency")
    spatial = pytest.importorskip("pysteps.verification.spatialscores", reason="pysteps is an extra")
    pool = derive(skill().dataset().isel(block=[0, 2], lead_time=slice(2, None)).sum(["block", "lead_time"]))
    forecasts, truth, valid, block = windows()
    rows = (block == 0) | (block == 2)
    f, o, v = (x[rows][:, 2:] for x in (forecasts["persistence"], truth, valid))
    ours = pool.sel(model="persistence")
    pixels = [xr.DataArray(x[v].double().numpy(), dims="pixel") for x in (f, o)]
    for name in ("mse", "mae", "mean_error"):
        assert float(ours[name]) == pytest.approx(float(getattr(continuous, name)(*pixels)), abs=1e-10)
    events = categorical.ThresholdEventOperator(default_event_threshold=35).make_contingency_manager(*pixels)
    for name, theirs in (("csi", "threat_score"), ("sedi", "symmetric_extremal_dependence_index")):
        assert float(ours[name].sel(threshold=35)) == pytest.approx(float(getattr(events, theirs)()), abs=1e-10)
    sums = spatial.fss_init(35, 4)
    for one, other in zip(*(torch.where(v, x, -10).double().flatten(0, 2).numpy() for x in (f, o)), strict=True):
        spatial.fss_accum(sums, one, other)
    assert float(ours["fss"].sel(threshold=35, scale=4)) == pytest.approx(spatial.fss_compute(sums), abs=1e-10)


def test_sums_that_are_not_there_are_scores_that_are_not_there() -> None:
    """As in a skill.nc of an earlier version."""
    dataset = skill().dataset()
    older = dataset.drop_vars(["samples", "cosine_frames", *(name for name in dataset if "fractions" in str(name))])
    scores = derive(older.sum("block"))
    assert not {"fss", "cosine"} & set(scores)
    xr.testing.assert_identical(scores, derive(dataset.sum("block"))[list(scores)])
    assert {"mse", "csi", "csi_pooled"} <= set(scores)


def test_every_score_that_a_metric_declares_is_derived() -> None:
    declared = [name for metric in skill().metrics("persistence") for name in metric.SCORES]
    derived = derive(skill().dataset())
    assert list(derived) == declared
    assert set(declared) <= set(catalogue())


def test_scores_are_taken_apart_by_threshold_and_scale() -> None:
    scores = derive(skill().dataset().sum("block"))
    assert list(columns(scores["mse"])) == [""]
    assert list(columns(scores["csi"])) == ["_20", "_35"]
    assert list(columns(scores["fss"])) == [f"_{t}_{s}px" for t in (20, 35) for s in (1, 2, 4)]
    assert columns(scores["fss"])["_35_2px"].equals(scores["fss"].sel(threshold=35, scale=2, drop=True))
    assert columns(scores["mse"].expand_dims(wavenumber=3)) == {}


def test_a_metric_comes_once() -> None:
    twice = {"fine": partial(Fractions, scales=(1,)), "coarse": partial(Fractions, scales=(8,))}
    with pytest.raises(UserError, match="The metric fine is a Fractions, of which there can be only one"):
        Skill(MODELS, Scope(QUANTITY, STEPS, BLOCKS), 600, twice)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_models_do_not_share_states() -> None:
    scores = Skill(MODELS, Scope(QUANTITY, STEPS, BLOCKS), 600, METRICS)
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
    scores = Skill(["dry"], Scope(QUANTITY, 1, 1), 300, METRICS)
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
    metrics = {"continuous": Continuous, "contingency": Contingency}
    scores = Skill(["one"], Scope(Quantity("x", "grey level", "1", (0.5,)), 1, 1), None, metrics)
    ones = torch.ones(1, 1, 1, 2, 2)
    scores.update("one", Forecast(ones), ones, ones.bool(), torch.zeros(1, dtype=torch.int64))
    assert scores.summary("one") == {"mse": 0.0, "mae": 0.0, "csi_0.5": 1.0, "bias_0.5": 1.0}
    none = Skill(["one"], Scope(Quantity("x", "grey level", "1", ()), 1, 1), None, METRICS)
    none.update("one", Forecast(ones), ones, ones.bool(), torch.zeros(1, dtype=torch.int64))
    assert none.summary("one") == {"mse": 0.0, "mae": 0.0}
    assert none.names() == ["mse", "mae", "mse/frame1", "mae/frame1"]


def test_states_are_no_part_of_a_checkpoint() -> None:
    assert skill().state_dict() == {}


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
