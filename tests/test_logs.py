"""What a run leaves in W&B, TensorBoard and metrics.csv, read back from their files; and nothing secret in any file."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import commands
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from forecast.callbacks import gauges
from forecast.callbacks.gauges import Gauges
from forecast.errors import UserError
from forecast.logs import MetricsFile, TensorBoard, WandB

SMALL = ["data.train=12", "data.validation=4", "data.test=5", "data.batch_size=4", "data.future=3", "data.workers=0"]
BRIEF = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=2", "model.network.hidden=[4]"]
CANARY = "canary" * 6 + "cana"  # as long as a key of W&B
TRAINING = {
    "train/loss",
    "gradient/norm",
    "gradient/clipped_norm",
    "gradient/clipped_share",
    "optimizer/lr",
    "speed/samples_per_second",
    "speed/waiting_for_data",
    "memory/process_gb",
}
VALIDATION = {
    "validation/loss",
    *(f"validation/{name}" for name in ("mse", "mae", "csi_0.5", "bias_0.5", "fss_0.5_8px", "sharpness")),
    *(f"validation/{name}_0.5/frame{lead}" for name in ("csi", "bias") for lead in (1, 2, 3)),
}
MODELS = ("convlstm", "persistence", "climatology", "oracle")
SCORES = {"mse", "rmse", "mae", "correlation", "csi_0.5", "pod_0.5", "far_0.5", "hss_0.5", "sharpness"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was told two secrets and wrote all three logs."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    folder = tmp_path_factory.mktemp("run")
    logs = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.group=trial", "logger.wandb.tags=[tiny]"]
    secret = f"logger.wandb.notes='see https://me:{CANARY}@example.org/notes'"
    board = ["+logger.tensorboard._target_=forecast.logs.TensorBoard", f"+logger.tensorboard.save_dir={folder}/board"]
    env = {"WANDB_API_KEY": CANARY}
    commands.run(*SMALL, *BRIEF, *logs, secret, *board, folder=folder, env=env)
    return folder


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then a LevelDB log of protobuf messages in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a head: the block is filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    """The logged rows of a .wandb file by step; values that are objects under their dotted names."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            assert row["_step"] not in rows
            rows[row["_step"]] = row
    return rows


def wandb_file(folder: Path) -> Path:
    [path] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return path


def test_wandb_has_every_curve(finished: Path) -> None:
    rows = history(wandb_file(finished))
    assert list(rows) == sorted(rows)
    # Six steps, numbered from 0: every second is logged, a validation follows each third, the test stands after the last.
    for names, steps in ((TRAINING, {1, 3, 5}), (VALIDATION, {2, 5}), ({"test/loss", "test/csi_0.5"}, {6})):
        for name in sorted(names):
            assert {step for step, row in rows.items() if name in row} == steps, name
    with (finished / "metrics.csv").open(newline="") as file:
        for kept in csv.DictReader(file):
            assert float(kept["train/loss"] or "nan") == pytest.approx(
                rows[int(kept["step"])].get("train/loss", float("nan")), nan_ok=True
            )


def test_wandb_has_the_skill_the_figures_and_the_film(finished: Path) -> None:
    files = wandb_file(finished).parent / "files"
    shown = history(wandb_file(finished))[6]
    for name, kind, start in (
        ("figures/forecast", "image-file", b"\x89PNG"),
        ("figures/skill", "image-file", b"\x89PNG"),
        ("figures/spectrum", "image-file", b"\x89PNG"),
        ("films/forecast", "video-file", b"GIF89a"),
    ):
        assert shown[f"{name}._type"] == kind
        assert (files / shown[f"{name}.path"]).read_bytes().startswith(start)
    table = json.loads((files / shown["skill/scores.path"]).read_text())
    assert set(table["columns"]) >= {"model", "lead_time_frames", *SCORES}
    assert len(table["data"]) == 4 * 3
    for name in SCORES:
        lines = json.loads((files / shown[f"skill/{name}_table.path"]).read_text())["data"]
        assert {(lead, model) for lead, model, _ in lines} == {(lead, model) for lead in (1, 2, 3) for model in MODELS}
        column = table["columns"].index(name)
        in_table = {(row[1], row[0]): row[column] for row in table["data"]}
        for lead, model, value in lines:
            wanted = in_table[lead, model]
            lost = wanted in (None, "NaN") or wanted != wanted
            assert value is None if lost else value == pytest.approx(wanted)


def test_wandb_knows_the_run(finished: Path) -> None:
    known: dict[str, Any] = {}
    for record in records(wandb_file(finished)):
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "config":
            known |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert (run.project, run.run_group, list(run.tags)) == ("stormcell", "trial", ["tiny"])
    assert run.run_id == (finished / "wandb/id").read_text()
    assert run.notes == "see https://me:***@example.org/notes"
    assert known["model"]["network"]["hidden"] == [4]
    assert known["parameters"] > 0
    assert len(known["fingerprint"]) == 16
    assert "commit" in known


def test_tensorboard_has_the_same(finished: Path) -> None:
    rows = history(wandb_file(finished))
    board = events(finished / "board")
    for names, steps in ((TRAINING, {1, 3, 5}), (VALIDATION, {2, 5}), ({"test/loss", "test/csi_0.5"}, {6})):
        for name in sorted(names):
            assert [event.step for event in board.Scalars(name)] == sorted(steps), name
            for event in board.Scalars(name):
                assert event.value == pytest.approx(rows[event.step][name], rel=1e-5, nan_ok=True)
    assert {*board.Tags()["images"]} == {"figures/forecast", "figures/skill", "figures/spectrum", "films/forecast"}
    assert board.Images("films/forecast")[0].encoded_image_string == (finished / "figures/forecast.gif").read_bytes()
    for model in MODELS:
        curves = events(finished / "board" / model)
        assert {*curves.Tags()["scalars"]} >= {f"skill/{name}" for name in SCORES}
        assert [event.step for event in curves.Scalars("skill/csi_0.5")] == [1, 2, 3]
    assert all(event.value == 1 for event in curves.Scalars("skill/csi_0.5"))  # the oracle


def test_tensorboard_compares_runs_by_their_parameters(finished: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events(finished / "board").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    known = HParamsPluginData.FromString(content).session_start_info.hparams
    assert known["optimizer.lr"].number_value == pytest.approx(0.006)
    assert known["model.network.hidden"].string_value == "[4]"
    assert known["parameters"].number_value > 0
    assert len(known["fingerprint"].string_value) == 16


def test_no_file_of_the_run_has_a_secret(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [str(path.relative_to(finished)) for path in files if CANARY.encode() in path.read_bytes()] == []


def events(folder: Path) -> Any:
    """The events in a folder as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


class Draws(NamedTuple):
    """The part of a batch that gauges look at."""

    block: Tensor


class Clock:
    """A batch takes a quarter of a second to come, a second to train on, a hundred to validate; a checkpoint takes ten."""

    now = 0.0


class Slow(list[Draws]):
    """Batches that take their time to come."""

    def __getitem__(self, index: Any) -> Any:
        Clock.now += 0.25
        return super().__getitem__(index)


class Line(pl.LightningModule):
    """One weight on its way to 1, at a rate of 1 / (3 + steps)."""

    def __init__(self, killed_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.killed_at = killed_at

    def training_step(self, batch: Draws, index: int) -> Tensor:
        if self.trainer.global_step == self.killed_at:
            raise RuntimeError("killed")
        Clock.now += 1
        loss = (self.weight - 1).square().sum()
        self.log("train/loss", loss, batch_size=4)
        return loss

    def validation_step(self, batch: Draws, index: int) -> None:
        Clock.now += 100
        self.log("validation/loss", (self.weight - 1).square().sum(), batch_size=4)

    def test_step(self, batch: Draws, index: int) -> None:
        self.log("test/loss", (self.weight - 1).square().sum(), batch_size=4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Clock.now += 10

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (3 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, killed_at: int | None = None, ckpt_path: str | None = None) -> None:
    """Four epochs of four steps of two batches; every third step is logged, every fourth validated; then a test."""
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=[MetricsFile(str(folder / "metrics.csv")), TensorBoard(str(folder / "board"))],
        callbacks=[Gauges(), ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Four samples in a batch, of which one is padding.
    loader = DataLoader(Slow([Draws(torch.tensor([0, 1, 2, -1]))] * 8), batch_size=None)
    sleep(1)  # files of events are read in the order of the seconds in their names
    for logger in trainer.loggers:
        logger.log_hyperparams({"rate": 1})
    module = Line(killed_at)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)
    trainer.test(module, loader, verbose=False)


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    """metrics.csv by step, without memory, which no two runs share."""
    with (folder / "metrics.csv").open(newline="") as file:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    rows = {int(row.pop("step")): row for row in table}
    assert len(rows) == len(table)
    return {step: {name: row[name] for name in sorted(row) if "memory" not in name} for step, row in rows.items()}


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = events(folder / "board")
    names = [name for name in board.Tags()["scalars"] if "memory" not in name]
    return {name: sorted((event.step, event.value) for event in board.Scalars(name)) for name in names}


@pytest.fixture
def straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that nobody interrupted, by a clock of its own."""
    monkeypatch.setattr(gauges, "monotonic", lambda: Clock.now)
    fit(tmp_path / "straight")
    return tmp_path / "straight"


def test_gauges_stand_in_the_rows_of_the_loss(straight: Path) -> None:
    rows = rows_of(straight)
    logged = [2, 5, 8, 11, 14]
    assert sorted(rows) == sorted({*logged, 3, 7, 11, 15, 16})
    for step, row in rows.items():
        speed = {"speed/samples_per_second", "speed/waiting_for_data"}
        names = {"train/loss", "optimizer/lr", *speed} if step in logged else set()
        names |= {"validation/loss"} if step % 4 == 3 else {"test/loss"} if step == 16 else set()
        assert {*row} - {"epoch"} == names, step
    # The rate with which that very step was taken.
    assert [rows[step]["optimizer/lr"] for step in logged] == pytest.approx([1 / (3 + step) for step in logged])
    # Three samples a batch, one and a quarter seconds each, whatever validations and checkpoints take.
    assert [rows[step]["speed/samples_per_second"] for step in logged] == pytest.approx([2.4] * len(logged))
    assert [rows[step]["speed/waiting_for_data"] for step in logged] == pytest.approx([0.2] * len(logged))


def test_a_validation_inside_an_epoch_is_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "monotonic", lambda: Clock.now)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=MetricsFile(str(tmp_path / "metrics.csv")),
        callbacks=[Gauges()],
        log_every_n_steps=8,
        val_check_interval=4,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Slow([Draws(torch.tensor([0, 1, 2, -1]))] * 8), batch_size=None)
    trainer.fit(Line(), loader, loader)
    row = rows_of(tmp_path)[7]
    # Eight batches are trained on, of which that after the validation came unwatched.
    assert row["speed/samples_per_second"] == pytest.approx(24 / (8 + 7 / 4))
    assert row["speed/waiting_for_data"] == pytest.approx(7 / 4 / (8 + 7 / 4))


@pytest.mark.parametrize("killed_at", [10, 13])
def test_resumed_run_leaves_the_log_of_one_that_was_never_killed(
    killed_at: int, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "resumed", killed_at=killed_at)
    assert max(rows_of(tmp_path / "resumed")) >= 8  # some of which are logged again
    fit(tmp_path / "resumed", ckpt_path=str(tmp_path / "resumed/last.ckpt"))
    assert rows_of(tmp_path / "resumed") == rows_of(straight)
    assert scalars_of(tmp_path / "resumed") == scalars_of(straight)


def test_training_anew_in_an_old_folder_leaves_nothing_of_the_old_one(straight: Path) -> None:
    before = rows_of(straight)
    with pytest.raises(RuntimeError, match="killed"):
        fit(straight, killed_at=5)
    assert sorted(rows_of(straight)) == [2, 3]
    assert rows_of(straight) == {step: before[step] for step in (2, 3)}
    assert {step for curve in scalars_of(straight).values() for step, _ in curve} == {2, 3}
    assert events(straight / "board").SummaryMetadata("_hparams_/session_start_info")


def test_metrics_are_written_before_a_checkpoint_is_relied_on(tmp_path: Path) -> None:
    log = MetricsFile(str(tmp_path / "metrics.csv"))
    for step in range(3):
        log.log_metrics({"loss": 1.0}, step=step)
        log.save()  # which writes the first row only: the next come too soon after it
    assert len(MetricsFile(str(log.path)).rows) == 1
    log.after_save_checkpoint(None)
    assert len(MetricsFile(str(log.path)).rows) == 3
    log.forget_after(2)
    log.finalize("success")
    assert list(MetricsFile(str(log.path)).rows) == [0, 1]


def test_runs_in_one_folder_are_one_run_of_wandb(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for _ in range(2):
        log = WandB(str(tmp_path), offline=True)
        log.log_metrics({"train/loss": 1.0}, step=4)
        log.log_metrics({"train/loss": 2.0}, step=3)  # W&B has that step behind it
        log.log_metrics({"test/loss": 3.0}, step=0)  # a test alone counts no steps
        log.finish(failed=False)
        wandb.teardown()  # which waits for the file
    first, second = sorted(
        (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert first.name == second.name == f"run-{(tmp_path / 'wandb/id').read_text()}.wandb"
    for path in (first, second):
        [run] = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
        assert run.resume
        rows = history(path)
        assert {step: {name: row[name] for name in row if name[0] != "_"} for step, row in rows.items()} == {
            4: {"train/loss": 1.0, "test/loss": 3.0}
        }


@pytest.mark.parametrize(("logger", "base"), [(WandB, "WandbLogger"), (TensorBoard, "TensorBoardLogger")])
def test_missing_extra_is_told_in_a_sentence(logger: type, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("not installed")

    monkeypatch.setattr(logger.__mro__[1], "__init__", refuse)
    assert logger.__mro__[1].__name__ == base
    with pytest.raises(UserError, match=r"pip install 'stormcell\["):
        logger(save_dir="nowhere")
