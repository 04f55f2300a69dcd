"""The benchmark of the data: it runs, beside a peer and alone, and tells no time of wrong frames."""

from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data import Size, main
from benchmarks.openstl import OPENSTL
from datamodules.moving_digits import MovingDigits
from datamodules.reader import Archive

TINY = Size(rounds=1, sequences=32, frames=400, side=24, crop=8, windows=8)
PEER = """
import gzip
import random

import cv2
import numpy as np
import torch
from openstl.datasets.utils import create_loader


class MovingMNIST:
    def __init__(self, root, n_frames_input, n_frames_output):
        with gzip.open(f"{root}/moving_mnist/train-images-idx3-ubyte.gz") as file:
            self.images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        self.past, self.length = n_frames_input, n_frames_input + n_frames_output

    def get_random_trajectory(self, length):
        return [random.randint(0, 36) for _ in range(length)], [random.randint(0, 36) for _ in range(length)]

    def __getitem__(self, index):
        frames = np.zeros((self.length, 1, 64, 64), np.float32)
        for _ in range(random.choice([2])):
            ys, xs = self.get_random_trajectory(self.length)
            image = self.images[random.randint(0, len(self.images) - 1)]
            for frame, y, x in zip(frames[:, 0], ys, xs):
                part = frame[y : y + 28, x : x + 28]
                part[:] = np.maximum(part, image)
        frames = torch.from_numpy(frames / 255)
        return frames[: self.past], frames[self.past :]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What has the form of OpenSTL's."""
    (tmp_path / "peer" / OPENSTL).parent.mkdir(parents=True)
    (tmp_path / "peer" / OPENSTL).write_text(PEER, encoding="utf-8")
    return tmp_path / "peer"


def test_digits_and_windows_are_told_beside_their_peers(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--openstl", str(checkout), "--out", str(tmp_path / "made" / "data.md")], TINY)
    written = (tmp_path / "made" / "data.md").read_text(encoding="utf-8")
    assert written in capsys.readouterr().out
    rows = [line.removeprefix("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    digits = {row[0]: row for row in rows if len(row) == 3}
    assert {"ours, uint8", "ours, decoded on the CPU", "OpenSTL"} <= set(digits)
    assert digits["OpenSTL"][2].startswith("1 ")
    assert sum(row[0].startswith(("NetCDF", "Zarr")) for row in rows) == 6
    assert "20 times as fast is promised" in written
    assert "python -m benchmarks.data --openstl" in written


def test_without_a_peer_our_digits_are_told_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "FORMATS", ())
    main(["--out", str(tmp_path / "data.md")], TINY)
    written = (tmp_path / "data.md").read_text(encoding="utf-8")
    assert "ours, uint8" in written
    assert "OpenSTL" not in written


@pytest.mark.parametrize("whose", ["a plain loop", "OpenSTL"])
def test_no_time_is_told_of_wrong_digits(
    whose: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whose == "OpenSTL":
        (checkout / OPENSTL).write_text(PEER.replace("np.maximum(part, image)", "part + image"), encoding="utf-8")
    else:
        right = MovingDigits.frames
        monkeypatch.setattr(MovingDigits, "frames", lambda *given: right(*given) ^ 1)
    out = tmp_path / "data.md"
    with pytest.raises(SystemExit, match=f"error: Sequence .* differs from that of {whose}; no time is told of it"):
        main(["--openstl", str(checkout), "--out", str(out)], TINY)
    assert not out.exists()


def test_no_time_is_told_of_wrong_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "digits", lambda *_: "")
    right = Archive.read
    monkeypatch.setattr(Archive, "read", lambda archive, *part: right(archive, *part) + 1)
    with pytest.raises(SystemExit, match=r"error: Window .* differs from xarray's; no time is told of it"):
        main(["--out", str(tmp_path / "data.md")], TINY)
    assert not (tmp_path / "data.md").exists()


def test_a_folder_that_is_no_checkout_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--openstl is .*, which has no .*dataloader_moving_mnist.py; give the root"):
        main(["--openstl", str(tmp_path)], TINY)
