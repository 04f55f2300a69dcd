"""A run that is killed and started again ends as if nothing had happened."""

import csv
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import commands
import numpy as np
import pytest
import xarray as xr
from test_train import TINY

from forecast import checkpoint, runs

# Odd numbers, so that the last batch of an epoch is not full; a log at every third step.
LONG = [
    *(one for one in TINY if not one.startswith(("data.", "trainer.max_epochs"))),
    *("data.train=27", "data.validation=5", "data.test=7", "data.batch_size=2", "data.size=32", "data.digit_size=12"),
    *("trainer.max_epochs=4", "trainer.log_every_n_steps=3", "scheduler.total_steps=56", "resume=auto"),
]
EVERY_STEP = "callbacks.last.minutes=0.0"  # a checkpoint after every batch
MEASURED = re.compile("speed/|memory/")  # what differs from run to run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    commands.run(*LONG, folder=folder)
    return folder


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what is measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    return [{name: value for name, value in row.items() if value and not MEASURED.match(name)} for row in rows]


def assert_same(folder: Path, straight: Path) -> None:
    for name in ("last", "best"):
        one, other = (checkpoint.read(each / f"checkpoints/{name}.ckpt") for each in (folder, straight))
        assert (one["epoch"], one["global_step"]) == (other["epoch"], other["global_step"])
        for weight, value in one["state_dict"].items():
            np.testing.assert_allclose(value, other["state_dict"][weight], atol=1e-6, err_msg=f"{name}: {weight}")
    with xr.open_dataset(folder / "skill.nc") as one, xr.open_dataset(straight / "skill.nc") as other:
        xr.testing.assert_allclose(one, other, rtol=1e-6)
    assert logged(folder) == logged(straight)
    assert not [*folder.rglob("*.part*")]


def kill(folder: Path, moment: Callable[[], bool], *overrides: str, number: int = signal.SIGKILL) -> int:
    """Starts the run, kills it at that moment, and returns its exit code."""
    command = commands.start(*LONG, *overrides, folder=folder)
    while not moment() and command.poll() is None:
        time.sleep(0.0002)  # leaves the core to the run
    command.send_signal(number)
    return command.wait(60)


def after(seconds: float, folder: Path) -> Callable[[], bool]:
    """So long after the first checkpoint is there: in a training, its validations, or the test."""
    first: list[float] = []

    def come() -> bool:
        if not first and (folder / "checkpoints/last.ckpt").exists():
            first.append(time.monotonic())
        return bool(first) and time.monotonic() - first[0] > seconds

    return come


def writing(folder: Path, name: str) -> Callable[[], bool]:
    """While a file is being written."""
    return lambda: any(folder.glob(f"**/.{name}.*.part.*"))


def interrupted(folder: Path, hook: str, step: int, number: int, *overrides: str) -> commands.Ended:
    """A run that gets a signal at the end of that batch, validation or epoch."""
    told = {"_target_": "interruption.Interruption", "hook": hook, "step": step, "number": int(number)}
    callback = [f"+callbacks.interruption.{name}={value}" for name, value in told.items()]
    tests = {"PYTHONPATH": str(Path(__file__).parent)}
    return commands.run(*LONG, EVERY_STEP, *overrides, *callback, folder=folder, env=tests, check=False)


@pytest.mark.parametrize(
    ("hook", "step"),
    [("batch", 5), pytest.param("batch", 14, marks=pytest.mark.slow), ("validation", 14), ("epoch", 28)],
)
def test_a_killed_run_ends_as_if_it_had_not_been(hook: str, step: int, straight: Path, tmp_path: Path) -> None:
    assert interrupted(tmp_path, hook, step, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (tmp_path / "skill.nc").exists()
    commands.run(*LONG, folder=tmp_path)
    assert_same(tmp_path, straight)


@pytest.mark.parametrize(
    ("overrides", "moments"),
    [
        (["trainer.val_check_interval=0.5"], [("batch", 7), ("validation", 7)]),
        (
            ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3"],
            [("validation", 1), ("batch", 7)],
        ),
        (
            ["trainer.check_val_every_n_epoch=2", "trainer.max_steps=50", "trainer.max_epochs=-1"],
            [("batch", 14), ("validation", 28)],
        ),
        (["data.workers=1"], [("batch", 20)]),
        (
            [
                *(
                    "tbptt.steps=4",
                    "tbptt.every=2",
                    "tbptt.length=12",
                    "data.future=2",
                    "trainer.limit_train_batches=14",
                ),
                *("model.network.cell.zoneout=0.2", "model.network.cell.dropout=0.2"),
            ],
            [("batch", 7)],
        ),
    ],
    ids=[
        "validations inside epochs",
        "gathered gradients",
        "epochs without validation",
        "a worker that draws ahead",
        "chunks of streams, and noise in the network",
    ],
)
def test_a_killed_run_of_another_rhythm_too(
    overrides: list[str], moments: list[tuple[str, int]], tmp_path: Path
) -> None:
    commands.run(*LONG, *overrides, folder=tmp_path / "straight")
    for hook, step in moments:
        folder = tmp_path / f"{hook} {step}"
        assert interrupted(folder, hook, step, signal.SIGKILL, *overrides).returncode == -signal.SIGKILL
        commands.run(*LONG, *overrides, folder=folder)
        assert_same(folder, tmp_path / "straight")


def test_last_checkpoint_knows_the_best_of_its_own_validation(straight: Path) -> None:
    states = checkpoint.read(straight / "checkpoints/last.ckpt")["callbacks"]
    (known,) = (state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    losses = [float(row["validation/loss"]) for row in logged(straight) if "validation/loss" in row]
    assert float(known["best_model_score"]) == pytest.approx(min(losses))
    assert losses[-1] == min(losses)  # else it would not be put to the test


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_cleanly(number: signal.Signals, straight: Path, tmp_path: Path) -> None:
    ended = interrupted(tmp_path, "batch", 20, number, "callbacks.last.minutes=null")
    assert ended.returncode == 128 + number
    assert "Traceback" not in ended.stderr
    assert "resume=auto goes on from there" in ended.stdout
    assert checkpoint.read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 21
    commands.run(*(one for one in LONG if one != "resume=auto"), "ckpt_path=last", folder=tmp_path)
    assert_same(tmp_path, straight)


def test_a_training_is_not_written_over(straight: Path) -> None:
    ended = commands.run(*(one for one in LONG if one != "resume=auto"), folder=straight, check=False)
    assert ended.returncode == 1
    assert "holds a training already; go on with it by resume=auto" in ended.stderr
    assert runs.read(straight).state == "finished"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("optimizer.lr=0.001", "was trained with optimizer.lr=0.006, but this run has optimizer.lr=0.001"),
        ("scheduler.warmup=0.5", "was trained with scheduler.warmup=0.1"),
        ("loss=mae", "was trained with loss._target_"),
        ("data.train=29", "was trained on other data"),
        ("data.batch_size=3", "samples a batch of all processes 2, but this run has 3"),
        ("data.seed=1", "inside an epoch with seed 0, but this run has 1"),
    ],
)
def test_what_cannot_go_on_is_refused(changed: str, said: str, cut_off: Path) -> None:
    ended = commands.run(*LONG, changed, folder=cut_off, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended inside an epoch."""
    folder = tmp_path_factory.mktemp("cut_off")
    commands.run(*LONG, "trainer.max_steps=5", folder=folder)
    return folder


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(straight: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    kills = 0
    for trial in range(20):
        folder = tmp_path / str(trial)
        moment = after(draw.uniform(0.0, 2.5), folder)
        if trial in (2, 7, 12, 17):
            moment = writing(folder, ("best", "skill", "last", "best")[trial // 5])
        often = [EVERY_STEP] if trial % 2 else []
        kills += kill(folder, moment, *often) == -signal.SIGKILL
        if trial % 4 == 0:  # and once more
            kills += kill(folder, after(draw.uniform(0.0, 1.0), folder), *often) == -signal.SIGKILL
        commands.run(*LONG, folder=folder)
        assert_same(folder, straight)
    assert kills >= 20


def test_training_that_was_cut_off_goes_on_in_the_middle_of_its_epoch(straight: Path, tmp_path: Path) -> None:
    commands.run(*LONG, "trainer.max_steps=20", folder=tmp_path)
    assert checkpoint.read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 20
    commands.run(*LONG, folder=tmp_path)
    assert_same(tmp_path, straight)
