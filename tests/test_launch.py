"""One process or many: the same gradients, the same scores, one folder, and nobody left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import xarray as xr
from conftest import WriteArchive, every
from test_models import NAMES, TASKS
from test_train import TINY, UNDRAWN

from forecast import checkpoint

DIGITS = [one for one in TINY if not one.startswith(("data.", "trainer.accelerator"))]
SMALL = ["data.train=7", "data.validation=5", "data.test=7", "data.size=32", "data.digit_size=12"]
CPU = "trainer.accelerator=cpu"
# One step down the gradient at rate 1: the weights differ as the gradients do.
ONE_STEP = [
    *("optimizer=sgd", "optimizer.lr=1.0", "optimizer.momentum=0.0", "scheduler=constant"),
    *("trainer.max_steps=1", "trainer.gradient_clip_val=null"),
]


def ddp(processes: int) -> list[str]:
    return ["trainer=ddp", f"trainer.devices={processes}", CPU]


def weights(folder: Path) -> dict[str, np.ndarray]:
    stored = checkpoint.read(folder / "checkpoints/last.ckpt")["state_dict"]
    return {name: value.numpy() for name, value in stored.items() if name.startswith("forecaster.")}


def assert_same_weights(one: Path, other: Path, atol: float) -> None:
    theirs = weights(other)
    for name, value in weights(one).items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=atol, err_msg=name)


def assert_same_skill(one: Path, other: Path, group: str | None = None) -> None:
    """Counts equal to the last bit, sums and scores to 1e-12."""
    with (
        xr.open_dataset(one / "skill.nc", group=group) as ours,
        xr.open_dataset(other / "skill.nc", group=group) as theirs,
    ):
        counts = [name for name in ours.data_vars if ours[name].dtype.kind == "i"]
        assert {"hits", "misses", "false_alarms", "correct_negatives", "pixels", "undefined"} <= set(counts)
        xr.testing.assert_equal(ours[counts], theirs[counts])
        xr.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with the batch that two have together."""
    folder = tmp_path_factory.mktemp("one")
    commands.run(*DIGITS, *SMALL, CPU, "data.batch_size=4", folder=folder)
    return folder


@pytest.mark.parametrize(("processes", "batch"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_gradient_of_many_processes_is_that_of_the_joined_batch(
    processes: int, batch: int, tmp_path: Path, write_archive: WriteArchive
) -> None:
    # Frames miss different pixels; and of five windows the third process has one, and one that is padding.
    archive = write_archive(times=every(400), size=(24, 20))
    radar = ["data=radar", f"data.archive={archive}", "data.workers=0", "data.past=2", "data.future=2"]
    few = ["data.stride=64", "model.network.hidden=[4]", "trainer.limit_test_batches=1"]
    for name, size, parallel in (("one", 6, [CPU]), ("many", batch, ddp(processes))):
        commands.run(*radar, *few, *ONE_STEP, *parallel, f"data.batch_size={size}", folder=tmp_path / name)
    assert checkpoint.read(tmp_path / "one/checkpoints/last.ckpt")["global_step"] == 1
    assert_same_weights(tmp_path / "many", tmp_path / "one", atol=1e-6)


def test_process_whose_batch_is_all_padding_changes_nothing(tmp_path: Path) -> None:
    few = [*DIGITS, *SMALL, *ONE_STEP, "data.train=2"]
    commands.run(*few, CPU, "data.batch_size=3", folder=tmp_path / "one")
    commands.run(*few, *ddp(3), "data.batch_size=1", folder=tmp_path / "three")
    assert_same_weights(tmp_path / "three", tmp_path / "one", atol=1e-6)


def test_training_on_two_processes_ends_where_one_does(trained: Path, tmp_path: Path) -> None:
    printed = commands.run(*DIGITS, *SMALL, *ddp(2), "data.batch_size=2", folder=tmp_path).stdout
    assert printed.count("Written to") == 1
    assert_same_weights(tmp_path, trained, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_the_gradient_of_one_process_on_two(name: str, tmp_path: Path) -> None:
    """No parameter is left out by some of the processes, and what a network adds to the loss is a mean over all of them."""
    size = "data.size=60" if name.startswith(("hko7", "unet")) else "data.size=32"
    task = [*TASKS.get(name, ()), *(("references=interpolation",) if name == "gap_filler" else ())]
    few = [
        *DIGITS,
        *SMALL,
        size,
        *ONE_STEP,
        "optimizer.lr=0.01",
        f"model={name}",
        "data.past=2",
        "data.future=2",
        *task,
    ]
    few = [one for one in few if not one.startswith("model.network.")]
    commands.run(*few, CPU, "data.batch_size=4", folder=tmp_path / "one")
    commands.run(*few, *ddp(2), "data.batch_size=2", folder=tmp_path / "two")
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_score_every_window_once(processes: int, trained: Path, tmp_path: Path) -> None:
    slow = ["references.persistence.slow=true", "subsample.windows=3"]  # on a subsample of the seven windows
    test = [*DIGITS, *SMALL, *slow, "data.batch_size=4", "run=test", f"ckpt_path={trained}/checkpoints/best.ckpt"]
    test.remove(UNDRAWN)
    for name, parallel in (("one", [CPU]), ("many", ddp(processes))):
        cache = {"STORMCELL_CACHE": str(tmp_path / name / "cache")}  # or the second would recall its references
        commands.run(*test, *parallel, folder=tmp_path / name, env=cache)
    for group in (None, "subsample"):
        assert_same_skill(tmp_path / "many", tmp_path / "one", group)
    commands.run(*test, *ddp(processes), folder=tmp_path / "again", env=cache)  # with references that are recalled
    assert_same_skill(tmp_path / "again", tmp_path / "one")
    one, many = (tmp_path / name / "figures/forecast.png" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()  # the same window is shown


def test_torchrun_starts_the_processes_and_they_share_a_folder(trained: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(commands.ROOT / "train.py"), *DIGITS, *SMALL, *ddp(2), "data.batch_size=2"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=commands.ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (folder,) = {path.parent for path in tmp_path.rglob("skill.nc")}
    assert_same_weights(folder, trained, atol=1e-6)


def test_slurm_starts_the_processes_and_the_job_names_their_folder(trained: Path, tmp_path: Path) -> None:
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(commands.ROOT / "train.py"), *DIGITS, *SMALL, *ddp(2), "data.batch_size=2"],
            cwd=tmp_path,
            env={**commands.ENVIRONMENT, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [task.wait(600) for task in tasks] == [0, 0]
    assert_same_weights(tmp_path / "runs/slurm/77.0", trained, atol=1e-6)


@pytest.mark.slow
def test_sweep_over_processes_runs_each_job_by_itself(trained: Path, tmp_path: Path) -> None:
    jobs = ["-m", *DIGITS, *SMALL, CPU, "trainer=ddp,cpu", "seed=1,0", "data.batch_size=2"]
    commands.run(*jobs, f"hydra.sweep.dir={tmp_path}")
    assert sorted(path.parent.name for path in tmp_path.glob("*/skill.nc")) == ["0", "1", "2", "3"]
    assert_same_weights(tmp_path / "1", trained, atol=1e-6)  # two processes, seed 0
    alone = tmp_path / "alone"
    commands.run(*DIGITS, *SMALL, CPU, "data.batch_size=2", folder=alone)
    assert_same_weights(tmp_path / "3", alone, atol=0.0)  # one process, seed 0: to the last bit


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(one) for one in found.stdout.split()]


def alive(pid: int) -> bool:
    """A dead process whose parent has not asked for it yet does not count."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.parametrize("victim", ["first", "other"])
def test_no_process_outlives_another_that_was_killed(victim: str, tmp_path: Path) -> None:
    command = commands.start(
        *DIGITS, *SMALL, *ddp(2), "data.batch_size=2", "trainer.max_epochs=10000", "logger=none", folder=tmp_path
    )
    while not (tmp_path / "checkpoints/last.ckpt").exists():
        assert command.poll() is None, command.stderr
        time.sleep(0.05)
    (worker,) = children(command.pid)
    os.kill(command.pid if victim == "first" else worker, signal.SIGKILL)
    assert command.wait(60) != 0
    limit = time.monotonic() + 60
    while alive(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(worker)


def test_signal_to_one_process_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    run = [*DIGITS, *SMALL, "trainer.max_epochs=20", "trainer.check_val_every_n_epoch=5"]
    commands.run(*run, CPU, "data.batch_size=4", folder=tmp_path / "straight")
    folder = tmp_path / "interrupted"
    pair = [*run, *ddp(2), "data.batch_size=2", "resume=auto"]
    command = commands.start(*pair, "callbacks.last.minutes=0.0", folder=folder)
    while not (folder / "checkpoints/last.ckpt").exists():  # after the first of forty steps
        assert command.poll() is None, command.stderr
        time.sleep(0.01)
    (worker,) = children(command.pid)
    os.kill(worker, signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    assert "Interrupted; saved" in command.stdout
    assert "Traceback" not in command.stderr
    commands.run(*pair, folder=folder)
    assert_same_weights(folder, tmp_path / "straight", atol=1e-6)


def test_processes_that_share_memory_are_refused(tmp_path: Path) -> None:
    ended = commands.run(*DIGITS, *SMALL, *ddp(2), "trainer.strategy=ddp_spawn", folder=tmp_path, check=False)
    assert ended.returncode == 1
    assert "use trainer=ddp" in ended.stderr
