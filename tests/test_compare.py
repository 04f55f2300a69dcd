"""Comparing runs: one table of several runs' models, each beside a reference, or what keeps them from it."""

import csv
import json
import runpy
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forecast import compare
from forecast.batch import Forecast
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.metric import Scope
from forecast.metrics.neighbourhood import Fractions
from forecast.protocol import Protocol, provenance_of
from forecast.skill import Skill, derive
from forecast.units import Quantity

QUANTITY = Quantity("rainfall_rate", "rain rate", "mm/h", (2.0, 4.0))
METRICS = {"values": Continuous, "events": Contingency, "fractions": partial(Fractions, scales=(1, 2, 4))}
PROTOCOL = Protocol({"windows": 12}, 3, 600, {"size": [6, 6]}, {"units": "mm/h"}, {}, {})
Noise = Mapping[str, float]


def write_run(
    folder: Path,
    noise: Noise,
    *,
    blocks: int = 12,
    seed: int = 0,
    protocol: Protocol = PROTOCOL,
    metrics: Mapping[str, Any] = METRICS,
) -> Path:
    """A run of the first model, whose forecasts are the truth with more or less noise; 3 lead times."""
    generator = torch.Generator().manual_seed(1)
    shape = (blocks, 3, 1, 6, 6)
    truth = 6 * torch.rand(shape, generator=generator)
    error = torch.randn(shape, generator=generator)
    skill = Skill(list(noise), Scope(QUANTITY, 3, blocks), 600, metrics)
    for model, size in noise.items():
        forecast = Forecast((truth + size * error).clamp_min(0))
        skill.update(model, forecast, truth, torch.ones(shape, dtype=torch.bool), torch.arange(blocks))
    card = {"config": {"seed": seed}, "past": 5, "fingerprint": "0123", "version": "1.0", "commit": None}
    config = {"folder": str(folder), "seed": 99, "model": {"name": next(iter(noise))}}
    account = provenance_of(config, {"stormcell": card, "epoch": 4, "global_step": 55})
    folder.mkdir(parents=True)
    told = {"protocol": protocol.to_text(), "provenance": json.dumps(account)}
    skill.dataset().assign_attrs(told).to_netcdf(folder / "skill.nc")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments), "--draws", "1000"])
    compare.main()
    return capsys.readouterr().out


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert isinstance(ended.value.code, str)  # so that the exit code is 1
    return ended.value.code


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two seeds of one model, beside the same persistence."""
    folder, noise = tmp_path_factory.mktemp("runs"), {"convlstm": 1.0, "persistence": 2.0}
    return write_run(folder / "a", noise, seed=7), write_run(folder / "b", {**noise, "convlstm": 1.9}, seed=8)


def test_a_reference_of_several_runs_is_there_once_and_models_tell_their_run(pair: tuple[Path, Path]) -> None:
    entries = compare.join([compare.read(folder) for folder in pair])
    assert [entry.name for entry in entries] == ["convlstm (a)", "persistence", "convlstm (b)"]
    assert [len(entry.runs) for entry in entries] == [1, 2, 1]
    assert [entry.own is not None for entry in entries] == [True, False, True]
    assert compare.unlike(entries) == []


def test_sums_may_differ_by_their_order_but_counts_may_not(pair: tuple[Path, Path]) -> None:
    one, other = (compare.read(folder) for folder in pair)
    persistence = {"model": 1, "block": 0, "lead_time": 0}
    other.counts["squared_error_sum"][persistence] *= 1 + 1e-12
    assert len(compare.join([one, other])) == 3
    other.counts["hits"][{**persistence, "threshold": 0}] += 1
    entries = compare.join([one, other])
    assert [entry.name for entry in entries][1:] == ["persistence (a)", "convlstm (b)", "persistence (b)"]
    assert compare.unlike(entries) == [
        "Not the same in these runs, though no run is about it: persistence (a), persistence (b)."
    ]


def test_a_model_is_said_to_be_trained_as_its_own_run_says(tmp_path: Path) -> None:
    beside = write_run(tmp_path / "a", {"convlstm": 1.0, "persistence": 2.0}, seed=7)
    alone = write_run(tmp_path / "b", {"persistence": 2.0}, seed=8)
    entries = compare.join([compare.read(beside), compare.read(alone)])
    table = compare.origins(entries, {beside: "a", alone: "b"})
    cells = {column.header: list(column.cells) for column in table.columns}
    assert (cells["model"], cells["run"], cells["seed"]) == (["convlstm", "persistence"], ["a", "a, b"], ["7", "8"])


def test_folders_are_told_apart_by_as_few_parts_as_do(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "0", tmp_path / "y" / "0", tmp_path / "y" / "1"]
    assert list(compare.labels_of(folders).values()) == ["x/0", "y/0", "y/1"]
    assert list(compare.labels_of(folders[1:]).values()) == ["0", "1"]


def test_the_command_prints_provenance_and_a_table_for_each_score(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = command(monkeypatch, capsys, *pair)
    for title in ("csi_2:", "csi_4:", "frequency_bias_2:", "mse:", "fss_2_2px:", "fss_4_2px:"):
        assert f"\n{title}" in printed
    assert "fss_2_4px" not in printed  # the middle of three scales stands for them
    assert "difference to persistence" in printed
    assert "epoch 4, step 55, data 0123" in printed
    rows = [line for line in printed.partition("\nmse:")[2].splitlines() if "convlstm (a)" in line]
    assert all("*" in row for row in rows[:5])  # three lead times, their mean, and pooled
    assert " 7 " in next(
        line for line in printed.splitlines() if "convlstm (a)" in line
    )  # the seed it was trained with
    assert max(map(len, printed.splitlines())) <= 120
    assert "12 events, drawn 1,000 times" in printed


def test_what_is_written_is_what_the_counts_say(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "table.csv"
    asked = ("--score", "csi_4", "fss", "fss_2_4px", "--reference", "convlstm (b)", "--csv", target)
    command(monkeypatch, capsys, *pair, *asked)
    with target.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["score"] for row in rows)) == ["csi_4", "fss_2_2px", "fss_4_2px", "fss_2_4px"]
    assert list(dict.fromkeys(row["lead_time"] for row in rows)) == ["10", "20", "30", "mean", "pooled"]
    assert {row["model"] for row in rows} == {"convlstm (a)", "persistence"}
    counts = compare.read(pair[0]).counts
    by_lead = derive(counts.sum("block"))["csi"].sel(model="persistence", threshold=4)
    wanted = [*by_lead.values, by_lead.mean().item()]
    wanted.append(derive(counts.sum(["block", "lead_time"]))["csi"].sel(model="persistence", threshold=4).item())
    found = [row for row in rows if row["score"] == "csi_4" and row["model"] == "persistence"]
    np.testing.assert_allclose([float(row["value"]) for row in found], wanted)
    for row in found:
        assert float(row["value"]) - float(row["reference"]) == pytest.approx(float(row["difference"]))
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert (row["against"], row["events"]) == ("convlstm (b)", "12")


def test_too_few_events_are_said_and_get_no_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", {"convlstm": 1.0, "persistence": 2.0}, blocks=9)
    printed = command(monkeypatch, capsys, run, "--score", "mse")
    assert "9 events are too few for an interval, which takes 10." in printed
    assert not any(mark in printed for mark in ("n.s.", "*", ", +", ", -"))


def test_the_reference_is_extrapolation_where_it_was_scored(tmp_path: Path) -> None:
    noise = {"convlstm": 1.0, "persistence": 2.0}
    runs = [
        compare.read(write_run(tmp_path / "a", noise)),
        compare.read(write_run(tmp_path / "b", {"extrapolation": 1.5})),
    ]
    assert compare.reference_of(compare.join(runs[:1]), None) == "persistence"
    assert compare.reference_of(compare.join(runs), None) == "extrapolation"
    assert compare.reference_of(compare.join(runs), "convlstm") == "convlstm"


def test_mistakes_are_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_run(tmp_path / "a", {"convlstm": 1.0, "lstm": 2.0})
    other = write_run(tmp_path / "b", {"convlstm": 1.0}, protocol=replace(PROTOCOL, future=4, data={"windows": 13}))
    told = refusal(monkeypatch, one, other)
    assert told.splitlines()[1:] == [f"{one} | {other}", "  data.windows: 12 | 13", "  future: 3 | 4"]
    assert "choose one by --reference: convlstm, lstm." in refusal(monkeypatch, one)
    assert "no model 'gru'" in refusal(monkeypatch, one, "--reference", "gru")
    assert "the only model" in refusal(monkeypatch, other, "--reference", "convlstm")
    assert "choose among mse, " in refusal(monkeypatch, one, "--reference", "lstm", "--score", "csi_3")
    assert "at least 1000" in refusal(monkeypatch, one, "--draws", "10")
    assert "There is no " in refusal(monkeypatch, tmp_path)


def test_runs_with_other_metrics_are_compared_in_the_scores_that_both_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "a", {"convlstm": 1.0, "persistence": 2.0})
    other = write_run(tmp_path / "b", {"lstm": 1.5, "persistence": 2.0}, metrics={"values": Continuous})
    printed = command(monkeypatch, capsys, one, other)
    assert "\nmse:" in printed
    assert "csi" not in printed
    assert "lstm" in printed


def test_the_module_is_the_command(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, pair), "--score", "mse", "--draws", "1000"])
    monkeypatch.delitem(sys.modules, "forecast.compare")
    runpy.run_module("forecast.compare", run_name="__main__")
    assert "difference to persistence" in capsys.readouterr().out
