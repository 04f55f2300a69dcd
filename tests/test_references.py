"""References: which there are, what they are prepared with, and that nothing is computed twice."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import xarray as xr
from commands import ROOT

from forecast import checkpoint, command_line, config, memory
from forecast.baselines.climatology import Climatology
from forecast.baselines.persistence import Persistence
from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.module import NowcastModule
from forecast.references import references_of
from forecast.scoring import HISTORY, scoring_of
from forecast.sections import SUBSAMPLE

SMALL = ["model=persistence", "data.train=6", "data.test=7", "data.batch_size=2", "data.past=2", "data.future=2"]
FEW = ["~metrics.test.fractions", "~metrics.test.spectrum", "subsample.windows=3"]
MINE = ["+model@references.mine=persistence", "references.mine.name=mine"]


class Calls(list[Any]):
    """Which forecasters were asked, with how many windows."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    for kind in (Persistence, Climatology):

        def predict(self: Any, past: Any, *args: Any, asked: Any = kind.predict, **more: Any) -> Forecast:
            made.append((type(self).__name__, len(past)))
            forecast: Forecast = asked(self, past, *args, **more)
            return forecast

        monkeypatch.setattr(kind, "predict", predict)
    return made


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STORMCELL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def settings(*overrides: str) -> Any:
    return command_line.load(ROOT / "conf", [*SMALL, *FEW, *overrides])


def data_of(cfg: Any) -> Any:
    data = config.build(cfg.data)
    data.setup()
    return data


def run_test(*overrides: str, **trainer: Any) -> dict[str, xr.Dataset]:
    """The results of a test in this process."""
    cfg = settings(*overrides)
    data = data_of(cfg)
    card = {"config": checkpoint.told(cfg)}
    scoring = scoring_of(card["config"], data)
    module = NowcastModule(
        *(cfg.model.name, config.build_baseline(cfg.model.baseline, data), data.quantity, data.grid, None, data.future),
        scoring=scoring,
        card=card,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made = pl.Trainer(accelerator="cpu", use_distributed_sampler=False, **quiet, **trainer)
    made.test(module, data, verbose=False)
    return module.results


def test_what_was_scored_once_is_recalled_to_the_last_bit(calls: Calls) -> None:
    first = run_test(*MINE)
    assert {name for name, _ in calls} == {"Persistence", "Climatology"}
    once = len(calls)
    second = run_test(*MINE)
    # The model under test forecasts four batches again, and its references none.
    assert calls[once:] == [("Persistence", 2)] * 3 + [("Persistence", 2)]
    for section in first:
        xr.testing.assert_identical(first[section], second[section])


def test_damaged_memory_is_computed_anew(calls: Calls, kept: Path) -> None:
    first = run_test()
    [path] = kept.iterdir()
    whole = path.read_bytes()
    turned = bytearray(whole)
    turned[len(whole) // 3] ^= 0xFF
    for content in (whole[: len(whole) // 2], bytes(turned)):
        path.write_bytes(content)
        before = len(calls)
        for section, dataset in run_test().items():
            xr.testing.assert_identical(dataset, first[section])
        assert ("Climatology", 2) in calls[before:]
        assert path.read_bytes() != content


def test_test_of_a_part_is_not_kept(kept: Path) -> None:
    run_test(limit_test_batches=1)
    assert not kept.exists()


def test_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("STORMCELL_CACHE", str(tmp_path / "file"))
    memory.keep("key", {"hits": np.zeros(2)})
    assert "STORMCELL_CACHE" in caplog.text
    assert memory.recall("key") is None


def test_slow_reference_forecasts_the_subsample_alone(calls: Calls) -> None:
    found = run_test(*MINE, "references.mine.slow=true", "~references.climatology")
    assert list(found) == ["/", SUBSAMPLE]
    assert found["/"]["model"].values.tolist() == ["persistence", "oracle"]
    sample = found[SUBSAMPLE]
    assert sample["model"].values.tolist() == ["persistence", "mine", "oracle"]
    assert sum(windows for _, windows in calls) == 7 + 1 + 3  # the last batch has one sample of padding
    for name in ("hits", "squared_error_sum"):
        np.testing.assert_array_equal(sample[name].sel(model="mine"), sample[name].sel(model="persistence"))
    assert sample["position"].values.tolist() == [1, 3, 5]
    assert int(sample["samples"].sel(model="mine").isel(lead_time=0).sum()) == 3


def test_climatology_sees_evenly_spread_windows_of_the_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    prepare = Climatology.prepare

    def watched(self: Climatology, batches: Iterable[Frames]) -> None:
        def noted() -> Iterator[Frames]:
            for frames in batches:
                seen.extend(frames.time.tolist())
                yield frames

        prepare(self, noted())

    monkeypatch.setattr(Climatology, "prepare", watched)
    run_test()
    assert seen == list(range(6))
    seen.clear()
    run_test("data.train=1500", "data.batch_size=100")
    assert len(seen) == HISTORY
    assert {int(step) for step in np.diff(seen)} == {3}
    seen.clear()
    run_test("model=climatology", "data.train=7")  # as the model itself
    assert seen == list(range(7))


def names(*overrides: str) -> list[str]:
    cfg = settings(*overrides)
    return [one.name for one in references_of(checkpoint.told(cfg), data_of(cfg), {})]


def test_model_is_not_its_own_reference_and_the_data_has_some() -> None:
    assert names() == ["climatology", "oracle"]
    assert names("model=climatology") == ["persistence", "oracle"]
    assert names("references=none") == ["oracle"]
    assert names("~references.climatology", *MINE) == ["mine", "oracle"]


def test_two_references_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"references\.mine is the second one of the name climatology"):
        names("+model@references.mine=climatology")


def keys(*overrides: str) -> dict[str, str | None]:
    cfg = settings(*MINE, *overrides)
    return {one.name: one.key for one in scoring_of(checkpoint.told(cfg), data_of(cfg)).references.each}


def test_what_is_kept_hangs_on_what_is_scored_and_on_nothing_else() -> None:
    usual = keys()
    assert usual["oracle"] is None
    assert len({usual["mine"], usual["climatology"]}) == 2
    assert keys("data.batch_size=3", "optimizer.lr=1", "monitor.mode=max") == usual
    changed = {
        "data.test=8": {"mine", "climatology"},
        "subsample.windows=4": {"mine", "climatology"},
        "~metrics.test.continuous": {"mine", "climatology"},
        "++references.mine.baseline.channels=2": {"mine"},
        "seed=1": {"climatology"},  # other training sequences
    }
    for override, others in changed.items():
        now = keys(override)
        assert {name for name in usual if now[name] != usual[name]} == others, override


def test_members_are_asked_for_where_ensembles_are_scored() -> None:
    for overrides, members in (([], 0), (["+metrics.test.crps._target_=forecast.metrics.ensemble.Ensemble"], 20)):
        cfg = settings(*overrides)
        assert scoring_of(checkpoint.told(cfg), data_of(cfg)).members == members
    found = run_test("+metrics.test.crps._target_=forecast.metrics.ensemble.Ensemble", "members=3")["/"]
    model = found.sel(model="persistence")
    torch.testing.assert_close(model["crps"].values, model["mae"].values)
    assert found.sizes["rank"] == 4
