"""What only shows after hours, in other precision, or when it is done twice."""

import os
import shutil
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import xarray as xr
from test_train import TINY

from forecast import checkpoint

SMALL = [
    *(one for one in TINY if not one.startswith("data.")),
    *("data.train=64", "data.validation=8", "data.test=32", "data.batch_size=8"),
    *("data.size=32", "data.digit_size=12", "trainer.max_epochs=5", "model.network.hidden=[8]"),
]


def mse(folder: Path) -> float:
    with xr.open_dataset(folder / "skill.nc") as skill:
        return float(skill.mse.sel(model="convlstm").mean())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    commands.run(*SMALL, folder=folder)
    return folder


def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        commands.run(*SMALL, "trainer.deterministic=true", "trainer.max_epochs=2", folder=tmp_path / name)
    one, two = (checkpoint.read(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("one", "two"))
    for name, weight in one.items():
        assert (weight == two[name]).all(), name
    with xr.open_dataset(tmp_path / "one/skill.nc") as first, xr.open_dataset(tmp_path / "two/skill.nc") as second:
        for skill in (first, second):
            del skill.attrs["provenance"]  # which tells folder and time
        xr.testing.assert_identical(first, second)


def test_half_precision_trains_to_the_same_skill(plain: Path, tmp_path: Path) -> None:
    commands.run(*SMALL, "trainer.precision=bf16-mixed", folder=tmp_path)
    assert mse(tmp_path) == pytest.approx(mse(plain), rel=0.02)  # bfloat16 has 8 bits: 0.4 % a number


@pytest.mark.slow
@pytest.mark.parametrize("how", ["true", "reduce-overhead"])
def test_compiled_network_trains_to_the_same_weights(how: str, plain: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    commands.run_alone(*SMALL, f"compile={how}", folder=tmp_path)
    assert mse(tmp_path) == pytest.approx(mse(plain), rel=0.001)
    theirs = checkpoint.read(plain / "checkpoints/last.ckpt")["state_dict"]
    for name, weight in checkpoint.read(tmp_path / "checkpoints/last.ckpt")["state_dict"].items():
        np.testing.assert_allclose(weight, theirs[name], atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_memory_and_open_files_stay_what_they_were(tmp_path: Path) -> None:
    """As many epochs, validations, checkpoints and log rows as two hours of a small training have."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's memory and files from /proc, which only Linux has")
    few = ["data.train=16", "data.validation=8", "data.test=8", "data.workers=1", "trainer.max_epochs=600"]
    command = commands.start(*SMALL, *few, folder=tmp_path)
    memory: list[float] = []
    files: list[int] = []
    while command.poll() is None:
        try:
            status = Path(f"/proc/{command.pid}/status").read_text(encoding="utf-8")
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            memory.append(int(resident.split()[1]) / 1024)  # MiB
            files.append(len(os.listdir(f"/proc/{command.pid}/fd")))
        except (FileNotFoundError, StopIteration):
            break
        time.sleep(0.2)
    assert command.wait(60) == 0, command.stderr
    third = len(memory) // 3
    assert third > 20
    middle, end = np.median(memory[third : 2 * third]), np.median(memory[2 * third :])
    print(f"{len(memory)} samples: {memory[third]:.0f}, {middle:.0f}, {end:.0f} MiB; {max(files)} files at most")
    assert end < 1.02 * middle
    assert max(files[2 * third :]) <= max(files[third : 2 * third])
