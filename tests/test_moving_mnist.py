"""Moving-MNIST reads MNIST's own files and the recorded test set, fetches what it may, and says what does not fit."""

import gzip
import hashlib
import inspect
import struct
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import requests
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from datamodules import moving_mnist
from datamodules.frames import SPLITS
from datamodules.moving_digits import MovingDigits
from datamodules.moving_mnist import RECORDED, TEST, TRAIN, MovingMNISTData, RecordedDigits, read_images
from datamodules.sampler import PADDING, Draw
from forecast.errors import UserError

CONF = Path(__file__).parents[1] / "conf"
TRAINING = np.random.default_rng(0).integers(0, 256, (48, 28, 28), dtype=np.uint8)
TESTING = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)


def idx(images: NDArray[np.uint8], magic: int = 2051) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def mnist(root: str | Path | None, **options: Any) -> MovingMNISTData:
    counts = {"past": 3, "future": 4, "batch_size": 4, "train": 20, "validation": 6, "test": 7}
    return MovingMNISTData(root=None if root is None else str(root), **{"download": False, **counts, **options})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny MNIST: training images packed, test images plain."""
    (tmp_path / f"{TRAIN}.gz").write_bytes(gzip.compress(idx(TRAINING)))
    (tmp_path / TEST).write_bytes(idx(TESTING))
    return tmp_path


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / RECORDED
    np.save(path, np.random.default_rng(2).integers(0, 256, (20, 12, 64, 64), dtype=np.uint8))
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network; the addresses that were tried."""
    tried: list[str] = []

    def retrieve(url: str, *_: Any, **__: Any) -> str:
        tried.append(url)
        raise requests.exceptions.ConnectionError("Max retries exceeded with url")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return tried


def test_packed_and_plain_files_are_read(root: Path) -> None:
    assert np.array_equal(read_images(root / f"{TRAIN}.gz"), TRAINING)
    assert np.array_equal(read_images(root / TEST), TESTING)


def test_each_split_has_digits_of_its_own(root: Path) -> None:
    images = mnist(root).images()
    assert np.array_equal(images["train"], TRAINING[:44])
    assert np.array_equal(images["validation"], TRAINING[44:])
    assert np.array_equal(images["test"], TESTING)
    few = mnist(root, pool=9).images()
    assert np.array_equal(few["train"], TRAINING[:9])
    assert np.array_equal(few["validation"], TRAINING[44:])


def test_sequences_are_those_of_the_generator(root: Path) -> None:
    data = mnist(root, speed=[3.0, 5.0], seed=4)
    data.setup()
    assert data.grid.size == (64, 64)
    for split in SPLITS:
        windows = data.windows(split)
        assert isinstance(windows, MovingDigits)
        assert windows is data.windows(split)
        assert len(windows) == {"train": 20, "validation": 6, "test": 7}[split]
        assert windows.fresh == (split == "train")
        assert (windows.speed, windows.seed, windows.split) == ((3.0, 5.0), 4 if split == "train" else 0, split)
        batch = windows[Draw(0, (2, PADDING))]
        assert batch.past.shape == (2, 3, 1, 64, 64)
        assert batch.block.tolist() == [2, -1]
    oracle = data.references()["oracle"]
    for batch in data.test_dataloader():
        past, valid = data.quantity.decode(batch.past)
        forecast = oracle.predict(past, valid, 4, static=batch.static, time=batch.time)
        assert torch.equal(forecast.mean, data.quantity.decode(batch.future)[0])


def test_the_default_speed_is_a_tenth_of_the_free_canvas(root: Path) -> None:
    data = mnist(root)
    data.setup()
    windows = data.windows("train")
    assert isinstance(windows, MovingDigits)
    speed = np.hypot(*np.moveaxis(windows.scenes(np.arange(20), 0)[2], -1, 0))
    assert speed == pytest.approx((64 - 28) / 10)


def test_the_recorded_test_set_is_used_where_it_is_named(root: Path, recorded: Path) -> None:
    (root / TEST).unlink()  # its digits are not needed
    data = mnist(root, test_file=str(recorded))
    data.setup()
    assert data.references() == {}
    windows = data.windows("test")
    assert isinstance(windows, RecordedDigits)
    assert (len(windows), windows.blocks) == (7, 7)
    assert isinstance(windows._open(), np.memmap)
    frames = torch.from_numpy(np.load(recorded))
    batch = windows[Draw(0, (5, PADDING, 2))]
    assert torch.equal(batch.past[:, :, 0], frames[:3, [5, 0, 2]].swapaxes(0, 1))
    assert torch.equal(batch.future[:, :, 0], frames[3:7, [5, 0, 2]].swapaxes(0, 1))
    assert batch.block.tolist() == [5, -1, 2]
    assert sum((each.block >= 0).sum() for each in data.test_dataloader()) == 7


def test_a_fingerprint_is_of_the_images_and_of_the_recorded_frames_that_are_dealt(
    root: Path, recorded: Path, tmp_path: Path
) -> None:
    made, named = mnist(root).fingerprint, mnist(root, test_file=str(recorded)).fingerprint
    frames = np.load(recorded)
    for change, dealt in (((6, 6, 0, 0), True), ((7, 0, 0, 0), False), ((0, 7, 0, 0), False)):
        changed = frames.copy()
        changed[change] ^= 1
        np.save(tmp_path / "changed.npy", changed)
        fingerprint = mnist(root, test_file=str(tmp_path / "changed.npy")).fingerprint
        assert (fingerprint != named) == dealt
    (root / f"{TRAIN}.gz").write_bytes(gzip.compress(idx(TRAINING[::-1])))
    prints = [mnist(root).fingerprint, mnist(root, test_file=str(recorded)).fingerprint]
    assert len({made, named, *prints}) == 4
    (root / f"{TRAIN}.gz").unlink()
    (root / TRAIN).write_bytes(idx(TRAINING))
    assert mnist(root).fingerprint == made


def test_the_recorded_test_set_is_not_used_unless_it_is_named(root: Path, recorded: Path) -> None:
    data = mnist(root)
    data.setup()
    assert isinstance(data.windows("test"), MovingDigits)


def test_the_recorded_test_set_may_be_used_whole(root: Path, recorded: Path) -> None:
    data = mnist(root, past=10, future=10, test=12, test_file=str(recorded))
    data.setup()
    assert data.windows("test")[Draw(0, (11,))].future.shape == (1, 10, 1, 64, 64)


def objects(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (Path.unlink, {}, "cannot be read"),
        (lambda path: path.write_bytes(b""), {}, "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), {}, "cannot be read"),
        (objects, {}, "cannot be read"),
        (
            lambda path: np.save(path, np.zeros((12, 20, 64, 64), np.uint8)),
            {},
            "holds uint8 12 x 20 x 64 x 64, but must",
        ),
        (lambda path: np.save(path, np.zeros((20, 12, 64, 64), np.float32)), {}, "holds float32"),
        (lambda path: np.save(path, np.zeros((20, 12, 64), np.uint8)), {}, "holds uint8 20 x 12 x 64,"),
        (lambda path: None, {"size": 48}, "must hold uint8 20 x sequences x 48 x 48"),
        (
            lambda path: None,
            {"past": 10, "future": 11},
            r"data.past \+ data.future \+ data.after is 21, but .* has 20 frames",
        ),
        (lambda path: None, {"test": 13}, "set data.test=12"),
    ],
)
def test_a_recorded_test_set_that_does_not_fit(
    root: Path, recorded: Path, damage: Callable[[Path], Any], options: dict[str, Any], words: str
) -> None:
    damage(recorded)
    with pytest.raises(UserError, match=words) as raised:
        mnist(root, test_file=str(recorded), **options).setup()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not hold MNIST's images"),
        (idx(TESTING)[:10], "does not hold MNIST's images"),
        (idx(TESTING, magic=2049), "does not hold MNIST's images"),
        (idx(TESTING[:, :20]), "does not hold MNIST's images"),
        (idx(TESTING)[:-1], "5 images, 3936 bytes, but has 3935"),
        (idx(TESTING) + b"\0", "but has 3937"),
        (idx(TESTING[:0]), "too few images for the test split"),
    ],
)
def test_damaged_images(root: Path, content: bytes, words: str) -> None:
    (root / TEST).write_bytes(content)
    with pytest.raises(UserError, match=words):
        mnist(root).setup()


@pytest.mark.parametrize("content", [b"", b"no gzip at all", gzip.compress(idx(TRAINING))[:-100]])
def test_damaged_packed_images(root: Path, content: bytes) -> None:
    (root / f"{TRAIN}.gz").write_bytes(content)
    with pytest.raises(UserError, match=f"{TRAIN}.gz (cannot be read|does not hold)"):
        mnist(root).setup()


def test_a_damaged_byte_is_noticed(root: Path) -> None:
    content = bytearray((root / f"{TRAIN}.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (root / f"{TRAIN}.gz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        mnist(root).setup()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": 0}, "data.pool is 0"),
        ({"pool": 45}, "data.pool is 45, but there are 44 images"),
        ({"size": 28}, "cannot move on a canvas of 28"),
        ({"speed": [5.0, 3.0]}, "data.speed"),
        ({"test": 0}, "data.test is 0"),
    ],
)
def test_mistakes_are_said(root: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        mnist(root, **options).setup()


def test_too_few_training_images(root: Path) -> None:
    (root / f"{TRAIN}.gz").write_bytes(gzip.compress(idx(TRAINING[:11])))
    with pytest.raises(UserError, match="too few images for the validation split"):
        mnist(root).setup()


def test_nothing_is_fetched_unless_allowed(tmp_path: Path, offline: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.download=true") as raised:
        mnist(tmp_path).setup()
    for part in (TRAIN, TEST, str(tmp_path), "data.root"):
        assert part in str(raised.value)
    assert offline == []


def test_nothing_is_fetched_that_is_there(root: Path, offline: list[str]) -> None:
    mnist(root, download=True).setup()
    assert offline == []


def test_offline_is_one_sentence_after_all_mirrors(tmp_path: Path, offline: list[str]) -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded \(ConnectionError\)") as raised:
        mnist(tmp_path, download=True).setup()
    for part in (TRAIN, TEST, str(tmp_path), "data.root"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert offline == [f"{mirror}{TRAIN}.gz" for mirror in moving_mnist.MIRRORS]


def serve(folder: Path) -> Callable[..., None]:
    """A downloader for pooch that takes files from a folder; the first mirror is down."""

    def download(url: str, output_file: str, *_: Any, **__: Any) -> None:
        if url.startswith(moving_mnist.MIRRORS[0]):
            raise requests.exceptions.Timeout("timed out")
        Path(output_file).write_bytes((folder / url.rpartition("/")[2]).read_bytes())

    return download


def test_downloads_are_held_against_their_checksums(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / f"{TEST}.gz").write_bytes(gzip.compress(idx(TESTING)))
    monkeypatch.setattr("pooch.core.choose_downloader", lambda *_, **__: serve(root))
    into = tmp_path / "new" / "cache"
    with pytest.raises(UserError, match="another checksum"):
        mnist(into, download=True).setup()
    assert not list(into.glob("*"))
    sums = {
        name: "md5:" + hashlib.md5((root / f"{name}.gz").read_bytes(), usedforsecurity=False).hexdigest()
        for name in (TRAIN, TEST)
    }
    monkeypatch.setattr(moving_mnist, "CHECKSUMS", sums)
    data = mnist(into, download=True)
    data.setup()
    assert np.array_equal(data.images()["test"], TESTING)
    assert sorted(path.name for path in into.iterdir()) == [f"{TEST}.gz", f"{TRAIN}.gz"]


def test_the_files_go_to_the_users_cache_by_default() -> None:
    assert mnist(None).root == Path(pooch.os_cache("stormcell"))


def test_the_configuration_is_the_constructors_defaults() -> None:
    listed = OmegaConf.to_container(OmegaConf.merge({"seed": 0}, OmegaConf.load(CONF / "data" / "moving_mnist.yaml")))
    assert isinstance(listed, dict)
    listed = {**listed, "seed": 0, "speed": (3.6, 3.6)}
    del listed["_target_"]
    assert listed == {name: one.default for name, one in inspect.signature(MovingMNISTData).parameters.items()}


def test_mnist_itself(shared_data: Path) -> None:
    root = shared_data / "mnist"
    if not root.is_dir():
        pytest.skip(f"no MNIST: {root} is not a folder")
    data = mnist(root, past=10, future=10)
    data.setup()
    images = data.images()
    assert {split: len(each) for split, each in images.items()} == {"train": 55000, "validation": 5000, "test": 10000}
    kinds = {split: {image.tobytes() for image in each} for split, each in images.items()}
    assert not any(kinds[one] & kinds[other] for one, other in combinations(SPLITS, 2))
    for name, checksum in moving_mnist.CHECKSUMS.items():
        content = (root / f"{name}.gz").read_bytes()
        assert checksum == "md5:" + hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert (
        0.03 < data.quantity.decode(data.windows("test")[Draw(0, tuple(range(7)))].future)[0].mean() < 0.08
    )  # 0.05 with MNIST's mean of 0.13
