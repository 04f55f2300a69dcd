"""`python train.py`, end to end on tiny data: what a user types, and what is in the run folder afterwards."""

import csv
import json
import re
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import xarray as xr
from commands import ROOT
from conftest import WriteArchive, every
from omegaconf import OmegaConf

from forecast import checkpoint, command_line
from forecast.errors import UserError

UNDRAWN = "callbacks.report.figures=false"
TINY = [
    "data.train=8",
    "data.validation=4",
    "data.test=6",
    "data.batch_size=4",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "model.network.hidden=[4]",
    UNDRAWN,
]
DRAWN = [one for one in TINY if one != UNDRAWN]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on moving digits, by an interpreter of its own."""
    folder = tmp_path_factory.mktemp("run")
    commands.run_alone(*DRAWN, folder=folder)
    return folder


def test_run_folder_holds_what_the_documents_promise(finished: Path) -> None:
    for name in (
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "skill.csv",
        "skill.nc",
    ):
        assert (finished / name).stat().st_size > 0
    for name in ("forecast.png", "skill.png", "spectrum.png"):
        assert (finished / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert OmegaConf.load(finished / "config.yaml").folder == str(finished)
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {"csi_0.5", "fss_0.5_8px", "sharpness", "csi_0.5/frame3"}
    assert {"step", "test/loss", "test/mse", *(f"validation/{name}" for name in ("loss", *scores))} <= set(rows[0])


def test_skill_sets_the_model_beside_its_references(finished: Path) -> None:
    with xr.open_dataset(finished / "skill.nc") as skill:
        assert list(skill.model.values) == ["convlstm", "persistence", "climatology", "oracle"]
        assert len(json.loads(skill.attrs["protocol"])["scores"]) == 4
        trained = json.loads(skill.attrs["provenance"])["trained"]
        assert (trained["epoch"], trained["step"]) == (0, 2)
        assert skill.csi.dims == ("model", "lead_time", "threshold")
        assert skill.sizes["lead_time"] == 10
        assert float(abs(skill.mse.sel(model="oracle")).max()) == 0
        assert float(skill.csi.sel(model="oracle").min()) == 1
        # Six windows of 48 x 48 pixels, each counted once.
        counted = (
            skill[["hits", "misses", "false_alarms", "correct_negatives"]].to_dataarray().sum(["variable", "block"])
        )
        assert (counted == 6 * 48 * 48).all()


def test_checkpoint_rebuilds_the_forecaster_without_running_code(finished: Path) -> None:
    forecaster, card = checkpoint.load_forecaster(finished / "checkpoints/best.ckpt")
    assert not forecaster.stream(torch.zeros(1, 0, *card.grid["size"])).carries  # it was trained on windows
    stored = checkpoint.read(finished / "checkpoints/best.ckpt")["state_dict"]
    for name, weight in forecaster.state_dict().items():
        assert (weight == stored[f"forecaster.{name}"]).all()
    assert checkpoint.quantity_of(card).thresholds == (0.5,)
    assert card.config["data"]["digits"] == 2


def test_test_of_a_checkpoint_repeats_the_skill_of_its_run(finished: Path, tmp_path: Path) -> None:
    commands.run(*TINY, "run=test", f"ckpt_path={finished}/checkpoints/best.ckpt", folder=tmp_path)
    with xr.open_dataset(finished / "skill.nc") as before, xr.open_dataset(tmp_path / "skill.nc") as after:
        assert before.attrs.pop("protocol") == after.attrs.pop("protocol")
        sources = [json.loads(one.attrs.pop("provenance")) for one in (before, after)]
        assert sources[0]["trained"] == sources[1]["trained"]
        xr.testing.assert_identical(before, after)


def test_checkpoint_of_another_network_is_refused_with_the_difference(finished: Path) -> None:
    path = finished / "checkpoints/best.ckpt"
    known = checkpoint.Card(**checkpoint.read(path)[checkpoint.KEY])
    network = {**known.model["network"], "hidden": [5]}
    other = checkpoint.Card(**{**vars(known), "model": {**known.model, "network": network}})
    with pytest.raises(UserError, match=r"model\.network\.hidden=\[4\], but this run has model\.network\.hidden=\[5\]"):
        checkpoint.check_matches(path, other, frame_size=None, resume=False)


def test_broken_and_foreign_checkpoints_are_refused(finished: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    whole = (finished / "checkpoints/best.ckpt").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.read(half)
    with pytest.raises(UserError, match="There is no checkpoint"):
        checkpoint.read(tmp_path / "none.ckpt")


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    # With a worker, which begins to draw before Lightning tells the epoch.
    longer = [*(one for one in TINY if "max_epochs" not in one), "data.workers=1"]
    commands.run(*longer, "trainer.max_epochs=2", "scheduler=constant", "run=fit", folder=tmp_path)
    assert checkpoint.read(tmp_path / "checkpoints/last.ckpt")["epoch"] == 1
    resumed = tmp_path / "resumed"
    commands.run(*TINY, "scheduler=constant", "data.workers=1", folder=tmp_path / "short")
    commands.run(
        *longer,
        "trainer.max_epochs=2",
        "scheduler=constant",
        f"ckpt_path={tmp_path}/short/checkpoints/last.ckpt",
        folder=resumed,
    )
    straight = checkpoint.read(tmp_path / "checkpoints/last.ckpt")["state_dict"]
    for name, weight in checkpoint.read(resumed / "checkpoints/last.ckpt")["state_dict"].items():
        np.testing.assert_allclose(weight.numpy(), straight[name].numpy(), atol=1e-6, err_msg=name)


def test_radar_archive_is_trained_on_and_scored_by_threshold(tmp_path: Path, write_archive: WriteArchive) -> None:
    archive = write_archive(times=every(400), size=(24, 20))
    radar = ["data=radar", f"data.archive={archive}", "data.workers=0", "data.past=2", "data.future=3"]
    small = [
        "model.network.hidden=[4]",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.accelerator=cpu",
    ]
    sections = ["data.relation=marshall_palmer", "references.persistence.slow=true", "subsample.windows=3"]
    commands.run(*radar, *small, *sections, "data.future=6", folder=tmp_path / "rate")
    longer = {"accumulation_30min": [30, 60], "accumulation_60min": [60], "subsample": [10, 20, 30, 40, 50, 60]}
    for section, leads in longer.items():
        assert (tmp_path / f"rate/skill_{section}.csv").exists()
        with xr.open_dataset(tmp_path / "rate/skill.nc", group=section) as skill:
            assert list(skill.lead_time.values) == leads
            assert ("persistence" in skill.model.values) == (section == "subsample")
    printed = commands.run(*radar, *small, folder=tmp_path / "run").stdout
    with xr.open_dataset(tmp_path / "run/skill.nc") as skill:
        assert list(skill.model.values) == ["convlstm", "persistence", "climatology"]
        assert list(skill.threshold.values) == [10, 20, 30, 40]
        assert list(skill.lead_time.values) == [10, 20, 30]
        assert {"csi", "pod", "far", "hss", "frequency_bias", "mae", "rmse", "mse", "correlation"} <= set(skill)
    assert "dBZ" in printed


@pytest.mark.parametrize("model", ["convgru", "convrnn", "lstm"])
def test_every_kind_of_model_runs(model: str, tmp_path: Path) -> None:
    commands.run(*TINY, f"model={model}", "data.size=48", "logger=none", folder=tmp_path)
    assert (tmp_path / "skill.nc").exists()
    assert not (tmp_path / "metrics.csv").exists()


def test_persistence_is_scored_without_training(tmp_path: Path) -> None:
    commands.run(*[one for one in TINY if "network" not in one], "model=persistence", folder=tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with xr.open_dataset(tmp_path / "skill.nc") as skill:
        assert list(skill.model.values) == ["persistence", "climatology", "oracle"]


def test_describe_counts_and_trains_nothing(tmp_path: Path) -> None:
    printed = commands.run("run=describe", "model.network.hidden=[64,64]", folder=tmp_path).stdout
    assert "925,456" in printed
    assert not (tmp_path / "checkpoints").exists()


def test_sweep_runs_every_combination(tmp_path: Path) -> None:
    commands.run("-m", *TINY, "model=convlstm,lstm", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    models = []
    for job in range(4):
        with xr.open_dataset(tmp_path / str(job) / "skill.nc") as skill:
            models.append(str(skill.model.values[0]))
    assert models == ["convlstm", "convlstm", "lstm", "lstm"]


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_loggers_write_beside_the_csv(logger: str, tmp_path: Path) -> None:
    pytest.importorskip(logger, reason=f"the extra {logger} is not installed")
    commands.run(
        *TINY, f"logger={logger}", *(["logger.wandb.offline=true"] if logger == "wandb" else []), folder=tmp_path
    )
    assert (tmp_path / "metrics.csv").exists()
    assert any((tmp_path / logger).rglob("*.wandb" if logger == "wandb" else "events.*"))


@pytest.mark.slow  # test_launch has it by counts
def test_two_processes_score_every_window_once(finished: Path, tmp_path: Path) -> None:
    weights = [f"ckpt_path={finished}/checkpoints/best.ckpt", "run=test"]
    odd = [one for one in TINY if "data.test" not in one and "accelerator" not in one]
    accelerator = ["trainer.accelerator=cpu", "data.test=7"]
    commands.run(*odd, *weights, *accelerator, folder=tmp_path / "one")
    commands.run(*odd, *weights, *accelerator, "trainer.strategy=ddp", "trainer.devices=2", folder=tmp_path / "two")
    counts = ["hits", "misses", "false_alarms", "correct_negatives", "pixels"]
    with xr.open_dataset(tmp_path / "one/skill.nc") as one, xr.open_dataset(tmp_path / "two/skill.nc") as two:
        xr.testing.assert_equal(one[counts], two[counts])
        xr.testing.assert_allclose(one, two, rtol=1e-12)


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
LARGE = ("hko7_convgru", "hko7_convlstm", "moving_mnist_openstl")


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(one, marks=pytest.mark.slow) if one in LARGE else one for one in EXPERIMENTS],
)
def test_every_experiment_takes_a_step(experiment: str, tmp_path: Path, write_archive: WriteArchive) -> None:
    """Batch, frame size and number of steps shrink; layers, channels and loss stay."""
    given = [f"experiment={experiment}"]
    composed = command_line.load(ROOT / "conf", given)
    if composed.data._target_ == "datamodules.radar.RadarData":
        small = [f"data.archive={write_archive(times=every(600), size=(40, 44))}", "data.workers=0"]
        small += ["data.crop=32", "data.eval_crop=40"] if composed.data.crop else []
    else:
        small = ["data.train=4", "data.validation=2", "data.test=2"]
    if composed.data._target_ == "datamodules.moving_mnist.MovingMNISTData":
        small += [f"data.root={write_mnist(tmp_path / 'mnist')}", "data.size=32"]
    steps = [
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
    ]
    commands.run(*given, *small, *steps, "data.batch_size=2", "trainer.accelerator=cpu", folder=tmp_path / "run")
    weights = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")
    assert weights["global_step"] == 1


def write_mnist(folder: Path) -> Path:
    """Generated images in the IDX files' layout."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, number in (("train-images-idx3-ubyte", 600), ("t10k-images-idx3-ubyte", 20)):
        header = np.array([2051, number, 28, 28], ">i4").tobytes()
        (folder / name).write_bytes(header + rng.integers(0, 256, (number, 28, 28), np.uint8).tobytes())
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr=-1"], "optimizer or its scheduler cannot be"),
        (["scheduler=step", "scheduler.step_size=0"], "optimizer or its scheduler cannot be"),
        (["monitor.metric=validation/mmse"], "choose one of validation/loss, validation/mse,"),
        (["monitor.metric=validation/csi_5"], "validation/csi_0.5,"),
        (["loss=balanced"], "This loss is for data in mm/h"),
        (["optimizer.lr=1e30", "trainer.max_epochs=3"], "the training diverged"),
    ],
)
def test_what_cannot_be_ends_with_a_sentence(overrides: list[str], said: str, tmp_path: Path) -> None:
    ended = commands.run(*TINY, *overrides, folder=tmp_path, check=False)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_stranger_s_checkpoint_cannot_choose_the_code(finished: Path, tmp_path: Path) -> None:
    content = checkpoint.read(finished / "checkpoints/best.ckpt")
    for target in ("os.getcwd", "forecast.files.os.getcwd", "forecast.checkpoint.torch.load", "torch.nn.Module.apply"):
        content[checkpoint.KEY]["model"]["network"]["cell"] = {"_target_": target}
        torch.save(content, tmp_path / "strange.ckpt")
        with pytest.raises(UserError, match="which is no module of"):
            checkpoint.load_forecaster(tmp_path / "strange.ckpt")


def test_training_that_ends_inside_an_epoch_keeps_its_weights(tmp_path: Path) -> None:
    commands.run(*TINY, "trainer.max_steps=1", folder=tmp_path)
    assert checkpoint.read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 1
    assert (tmp_path / "skill.nc").exists()


def test_last_checkpoint_is_the_last_whether_it_is_better_or_not(tmp_path: Path) -> None:
    worse = ["trainer.max_epochs=3", "monitor.mode=max", "optimizer.lr=1e-3"]
    commands.run(*TINY, *worse, folder=tmp_path)
    epochs = {name: checkpoint.read(tmp_path / f"checkpoints/{name}.ckpt")["epoch"] for name in ("best", "last")}
    assert epochs == {"best": 0, "last": 2}


def test_split_by_dates_is_taken_from_the_command_line(tmp_path: Path, write_archive: WriteArchive) -> None:
    archive = write_archive(times=every(400), size=(24, 20))
    train_dates, test_dates = "train: [2025-02-27, 2025-02-28]", "test: [2025-02-28T18:00, 2025-03-01]"
    split = f"{{{train_dates}, validation: [2025-02-28T06:00, 2025-02-28T12:00], {test_dates}}}"
    printed = commands.run(
        "run=describe",
        "data=radar",
        f"data.archive={archive}",
        "data.workers=0",
        f"data.split={split}",
        folder=tmp_path,
    ).stdout
    assert re.search(r"train\s*│\s*133\s*│\s*1\s*│", printed)  # 24 h of frames every 10 min, 12 to a window
