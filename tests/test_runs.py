"""The table of runs, on run folders written by hand: what train.py leaves, small."""

import csv
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml
from commands import ENVIRONMENT, ROOT

from forecast import runs
from forecast.errors import UserError


def write_run(
    folder: Path,
    values: list[float] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    metric: str = "validation/loss",
    mode: str = "min",
) -> Path:
    """config.yaml and metrics.csv, with a row of a training loss between the monitored values."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "folder": str(folder),
        "monitor": {"metric": metric, "mode": mode},
        "data": {"seed": seed, "size": 48},
        "model": {"name": "convlstm", "network": {"hidden": [4], "cell": {"peephole": True}}},
        "optimizer": {"lr": 0.01},
        "logger": {"csv": {"path": f"{folder}/metrics.csv"}},
        **(settings or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rows = [f"step,train/loss,epoch,{metric}"]
    for epoch, value in enumerate(values or []):
        rows += [f"{10 * epoch},9.0,{epoch},", f"{10 * epoch + 5},,{epoch},{value}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_skill(folder: Path, hits: np.ndarray) -> None:
    """Counts of two models, two blocks, two lead times and three thresholds, as Skill.dataset writes them.

    Args:
        hits: 2 2 2 3; of ten pixels, the others are misses.
    """
    by_lead = ("model", "block", "lead_time")
    ones = np.ones((2, 2, 2))
    counts = {"pixels": 10 * ones, "undefined": 0 * ones, "squared_error_sum": hits[..., 0]}
    sums = ("error", "absolute_error", "forecast", "truth", "forecast_square", "truth_square", "product")
    variables: dict[str, Any] = {name: (by_lead, value) for name, value in counts.items()}
    variables |= {f"{name}_sum": (by_lead, ones) for name in sums}
    for name, value in (("hits", hits), ("misses", 10 - hits), ("false_alarms", 0 * hits)):
        variables[name] = ((*by_lead, "threshold"), value)
    variables["correct_negatives"] = variables["false_alarms"]
    coordinates = {"model": ["persistence", "convlstm"], "threshold": [10.0, 20.0, 30.0]}
    xr.Dataset(variables, coordinates).to_netcdf(folder / "skill.nc")


@pytest.mark.parametrize(("mode", "value", "epoch"), [("min", 0.25, 1), ("max", 0.75, 2)])
def test_best_value_is_the_finite_one_that_the_mode_asks_for(
    mode: str, value: float, epoch: int, tmp_path: Path
) -> None:
    run = runs.read(write_run(tmp_path / "run", [0.5, 0.25, 0.75, math.nan], mode=mode))
    assert run.best == runs.Point(step=10 * epoch + 5, epoch=epoch, value=value)


def test_settings_are_leaves_without_the_seed_and_what_lies_in_the_folder(tmp_path: Path) -> None:
    assert runs.read(write_run(tmp_path / "run", [1.0])).settings == {
        "monitor.metric": "validation/loss",
        "monitor.mode": "min",
        "data.size": 48,
        "model.name": "convlstm",
        "model.network.hidden": [4],
        "model.network.cell.peephole": True,
        "optimizer.lr": 0.01,
    }


def test_skill_is_of_the_trained_model_at_the_middle_threshold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0])
    assert math.isnan(runs.read(folder).mse)
    assert runs.read(folder).state == "unfinished"
    hits = np.arange(24.0).reshape(2, 2, 2, 3) % 10
    write_skill(folder, hits)
    run = runs.read(folder)
    # Pooled over blocks of 10 pixels each, then averaged over lead times.
    assert run.csi == pytest.approx(np.mean(hits[1, :, :, 1].sum(0) / 20))
    assert run.mse == pytest.approx(np.mean(hits[1, :, :, 0].sum(0) / 20))
    assert (run.threshold, run.state) == (20, "finished")
    with xr.open_dataset(folder / "skill.nc") as skill:
        chosen = skill.load().drop_vars(["hits", "misses"])
    chosen.to_netcdf(folder / "skill.nc")  # a run that was not scored by events
    assert math.isnan(runs.read(folder).csi)
    assert runs.read(folder).mse == run.mse


def test_failed_run_says_why_and_what_was_asked_of_it(tmp_path: Path) -> None:
    (tmp_path / "run/.hydra").mkdir(parents=True)
    (tmp_path / "run/error.txt").write_text("optimizer.lr is too high.\n", encoding="utf-8")
    (tmp_path / "run/.hydra/overrides.yaml").write_text("- ++optimizer.lr=7\n- seed=1\n", encoding="utf-8")
    run = runs.read(tmp_path / "run")
    assert (run.state, run.settings) == ("failed: optimizer.lr is too high.", {"optimizer.lr": "7"})


def test_runs_that_differ_in_the_seed_alone_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    for seed, best in enumerate((0.3, 0.1, 0.2)):
        write_skill(write_run(tmp_path / f"a{seed}", [1.0, best], seed=seed), np.full((2, 2, 2, 3), 5.0))
    write_skill(write_run(tmp_path / "b", [0.15], settings={"optimizer": {"lr": 0.5}}), np.full((2, 2, 2, 3), 5.0))
    write_run(tmp_path / "unfinished", [0.001], seed=9)
    found = runs.find(tmp_path)
    assert [[run.folder.name for run in group] for group in runs.groups(found)] == [
        ["unfinished"],
        ["b"],
        ["a0", "a1", "a2"],
    ]
    assert runs.differing(found) == ["optimizer.lr"]
    runs.to_csv(found, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["seeds"] == "3"
    assert float(rows[2]["best"]) == pytest.approx(statistics.fmean((0.3, 0.1, 0.2)))
    assert float(rows[2]["best_std"]) == pytest.approx(np.std((0.3, 0.1, 0.2), ddof=1))
    assert rows[1]["best_std"] == ""


def test_runs_of_other_monitors_or_data_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1])
    write_run(tmp_path / "b", [0.2], seed=1, settings={"data": {"size": 64}})
    write_run(tmp_path / "c", [0.9], seed=2, metric="validation/csi_0.5", mode="max")
    write_run(tmp_path / "d", [0.8], seed=3, metric="validation/csi_0.5", mode="max", settings={"compile": True})
    # By the name of the monitored value; within one, the best first.
    assert [[run.folder.name for run in group] for group in runs.groups(runs.find(tmp_path))] == [
        ["c"],
        ["d"],
        ["a"],
        ["b"],
    ]


def test_what_comes_with_another_choice_is_no_difference_of_its_own(tmp_path: Path) -> None:
    lstm = {"model": {"name": "lstm", "network": {"hidden": [4], "cell": {"bias": False}}}}
    found = [runs.read(write_run(tmp_path / "a")), runs.read(write_run(tmp_path / "b", settings=lstm))]
    assert runs.differing(found) == ["model.name"]
    found.append(runs.read(write_run(tmp_path / "c", settings={"trainer": {"max_time": "01:00"}})))
    assert runs.differing(found) == ["model.name", "trainer.max_time"]


def test_value_is_written_as_an_override() -> None:
    assert runs.text([[32, 32], None, True, 1e-05, {"a": "b"}]) == "[[32,32],null,true,1e-05,{a:b}]"


def test_command_shows_the_runs_and_passes_over_the_files_of_hydra_and_wandb(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep/0", [0.5, 0.125])
    write_run(tmp_path / "sweep/1", [0.25], settings={"optimizer": {"lr": 0.75}})
    write_run(tmp_path / "sweep/1/.hydra", [0.0])
    wandb = tmp_path / "sweep/1/wandb/run-1/files/config.yaml"
    wandb.parent.mkdir(parents=True)
    wandb.write_text("monitor: {value: {metric: validation/loss}}\nfolder: {value: .}\n", encoding="utf-8")
    shown = table(tmp_path / "sweep")
    assert shown.returncode == 0, shown.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.stdout.splitlines() if "│" in line]
    assert [row[:4] for row in rows] == [["0.01", "1", "0.125", "1"], ["0.75", "1", "0.25", "0"]]
    assert [row[-1] for row in rows] == [str(tmp_path / "sweep/0"), str(tmp_path / "sweep/1")]


def test_folder_without_a_run_is_told_in_a_sentence(tmp_path: Path) -> None:
    shown = table(tmp_path)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == (
        f"error: There is no run below {tmp_path}; a run is a folder with the config.yaml of train.py.\n"
    )


def test_log_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,validation/loss\n1,much\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not a log of numbers"):
        runs.read(folder)


def table(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forecast.runs", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
