"""Every mistake in the table of docs/beware.md, made for real: what the command says is what the page says."""

import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import commands
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import RATE, START, WriteArchive, every, labelled
from test_train import TINY, write_mnist

PAGE = commands.ROOT / "docs" / "beware.md"
RADAR = ["data.workers=0", "data.past=2", "data.future=2", *(one for one in TINY if not one.startswith("data."))]


class Row(NamedTuple):
    """A line of the table."""

    typed: str
    had: str
    """What was wrong beside the command line; empty where nothing was."""
    said: str
    cure: str


def rows() -> list[Row]:
    found = re.findall(
        r"^\| `([^`]+)`(?:: (.*?))? \| (.*?) \| (.*?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [Row(*cells) for cells in found]


def pattern(row: Row) -> str:
    """The sentence as the page has it: FILE is any path, … any words, and *what to do* the page's own advice."""
    words = {"FILE": r"\S+", "…": ".*?"}
    said, cure = (
        "".join(words.get(part) or re.escape(part) for part in re.split("(FILE|…)", cell.replace("`", "")))
        for cell in (row.said, row.cure)
    )
    return f"error: {said}\n" if row.cure.startswith("*") else f"error: {said}[;:,] {cure}\n"


class Place:
    """A folder in which things go wrong. What a method returns changes the run: FILE and OTHER, env, folder ..."""

    def __init__(self, folder: Path, write: WriteArchive, checkpoint: Path) -> None:
        self.folder = folder
        self.write = write
        self.checkpoint = checkpoint

    def archive(self, change: Callable[[xr.Dataset], xr.Dataset]) -> dict[str, Any]:
        with xr.open_dataset(self.write("right.nc"), decode_times=False, mask_and_scale=False) as right:
            change(right.load()).drop_encoding().to_netcdf(self.folder / "wrong.nc")
        return {"FILE": self.folder / "wrong.nc"}

    def content(self, name: str, content: bytes) -> dict[str, Any]:
        (self.folder / name).write_bytes(content)
        return {"FILE": self.folder / name}

    def cut(self, path: str | Path) -> dict[str, Any]:
        content = Path(path).read_bytes()
        return self.content(f"cut{Path(path).suffix}", content[: len(content) // 2])

    def mnist(self, change: Callable[[bytes], bytes]) -> dict[str, Any]:
        root = write_mnist(self.folder / "mnist")
        images = root / "train-images-idx3-ubyte"
        images.write_bytes(change(images.read_bytes()))
        return {"FILE": root}

    def without(self, package: str) -> dict[str, Any]:
        (self.folder / f"{package}.py").write_text(f'raise ModuleNotFoundError("No module named {package!r}")')
        return {"env": {"PYTHONPATH": str(self.folder)}}

    def checkpoint_of(self, content: Any) -> dict[str, Any]:
        torch.save(content, self.folder / "foreign.ckpt")
        return {"FILE": self.folder / "foreign.ckpt"}

    def taken_port(self) -> dict[str, Any]:
        self.listener = socket.create_server(("", 0))
        return {"env": {"MASTER_PORT": str(self.listener.getsockname()[1])}}

    def damaged_zarr(self) -> dict[str, Any]:
        path = Path(self.write("radar.zarr"))
        for chunk in (path / "dbz" / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(b"no chunk")
        return {"FILE": path}

    def experiment(self, text: str) -> dict[str, Any]:
        (self.folder / "experiment").mkdir()
        (self.folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        return {"FILE": self.folder}


def spread(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.assign_coords(y=("y", np.square(np.arange(float(dataset.sizes["y"]))), dataset.y.attrs))


TWICE = np.sort(np.append(every(30), START))
HAD: dict[str, Callable[[Place], dict[str, Any]]] = {
    "": lambda place: {},
    "there is no FILE": lambda place: {"FILE": place.folder / "none"},
    "a key in the experiment file": lambda place: place.experiment("trainr: {max_epochs: 3}"),
    "a nested key in the experiment file": lambda place: place.experiment("trainer: {max_epoch: 3}"),
    "FILE is text": lambda place: place.content("text.nc", b"rain, mostly\n"),
    "FILE is cut off": lambda place: place.cut(place.write()),
    "FILE is a Zarr whose chunks are damaged": lambda place: place.damaged_zarr(),
    "FILE is an empty folder": lambda place: {"FILE": place.folder},
    "FILE has levels": lambda place: place.archive(lambda right: right.expand_dims("level")),
    "FILE has no times": lambda place: place.archive(lambda right: right.drop_vars("time")),
    "FILE has no frames": lambda place: place.archive(lambda right: right.isel(time=slice(0))),
    "the rows of FILE are uneven": lambda place: place.archive(spread),
    "FILE is in kelvin": lambda place: {"FILE": place.write(attributes={"units": "K"}, variable="tb")},
    "FILE holds accumulations": lambda place: {"FILE": place.write(attributes={"units": "mm"})},
    "a date of FILE comes twice": lambda place: {"FILE": place.write(times=TWICE)},
    "the dates of FILE go back": lambda place: {"FILE": place.write(times=every(30)[::-1])},
    "FILE mixes time steps": lambda place: {"FILE": place.write(times=np.sort(np.append(every(30), START + 300)))},
    "every pixel of FILE is missing": lambda place: {"FILE": place.write(numbers=np.full((30, 12, 14), 255, np.uint8))},
    "FILE has rain rates below zero": lambda place: {
        "FILE": place.write(attributes=RATE, numbers=labelled(400, 12, 14).astype(np.float32) - 9, times=every(400))
    },
    "FILE has two variables of rain": lambda place: place.archive(lambda right: right.assign(more=right.dbz)),
    "OTHER has other frames": lambda place: {"OTHER": place.write("other.nc", times=every(400), size=(20, 20))},
    "OTHER has another cadence": lambda place: {"OTHER": place.write("other.nc", times=every(400, cadence=300))},
    "OTHER is in mm/h": lambda place: {
        "OTHER": place.write("other.nc", attributes=RATE, numbers=np.ones((30, 12, 14), np.float32))
    },
    "FILE is in mm/h": lambda place: {"FILE": place.write(attributes=RATE, numbers=np.ones((30, 12, 14), np.float32))},
    "the images in FILE are cut off": lambda place: place.mnist(lambda right: right[:-1]),
    "the images in FILE are labels": lambda place: place.mnist(lambda right: b"\0\0\x08\x01" + right[4:]),
    "FILE has no images": lambda place: {"FILE": place.folder},
    "FILE is half a checkpoint": lambda place: place.cut(place.checkpoint),
    "FILE is another program's checkpoint": lambda place: place.checkpoint_of({"state_dict": {}}),
    "FILE would run code": lambda place: place.checkpoint_of({"state_dict": Path}),
    "FILE was trained on digits": lambda place: {"FILE": place.checkpoint, "ARCHIVE": place.write(times=every(400))},
    "FILE is of a ConvLSTM": lambda place: {"FILE": place.checkpoint},
    "the disk is full": lambda place: {"largest_file": 30_000},
    "RUN is a file": lambda place: {"RUN": place.content("run.txt", b"")["FILE"]},
    "nobody may write there": lambda place: {"RUN": "/sys/stormcell"},
    "MASTER_PORT is taken": lambda place: place.taken_port(),
    "no GPU is there": lambda place: {"env": {"CUDA_VISIBLE_DEVICES": ""}},
    "wandb is not installed": lambda place: place.without("wandb"),
    "tensorboard is not installed": lambda place: place.without("tensorboard"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ConvLSTM on moving digits."""
    folder = tmp_path_factory.mktemp("trained")
    commands.run(*TINY, "trainer.limit_test_batches=0", folder=folder)
    return folder / "checkpoints" / "best.ckpt"


def small(typed: list[str]) -> list[str]:
    """What makes a run small, where nothing is typed about it."""
    keys = [one.lstrip("+").partition("=")[0] for one in typed]
    archive = any(one.startswith(("data=radar", "data=moving_mnist")) for one in typed)
    chosen = {key.partition(".")[0] for key in keys if "." not in key or key == "model.network"}
    return [
        one
        for one in (RADAR if archive else TINY)
        if one.partition("=")[0] not in keys
        and not (one.startswith("model.") and "model" in chosen)
        and not (one.startswith("trainer.accelerator") and "trainer" in chosen)
    ]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.typed}{row.had and ': '}{row.had}") for row in rows()])
def test_mistake_is_answered_as_the_page_says(
    row: Row, tmp_path: Path, write_archive: WriteArchive, checkpoint: Path
) -> None:
    (tmp_path / "had").mkdir()
    place = Place(tmp_path / "had", write_archive, checkpoint)  # which holds a port as long as it lives
    had = HAD[row.had](place)
    names = {name: str(had.pop(name)) for name in ("FILE", "OTHER", "ARCHIVE", "RUN") if name in had}
    if "FILE" in row.typed and "FILE" not in names:
        names["FILE"] = write_archive(times=every(400))
    typed = shlex.split(row.typed)
    for name, path in names.items():
        typed = [one.replace(name, path) for one in typed]
    folder = None if "RUN" in names else tmp_path / "run"
    ended = commands.run(*typed, *small(typed), folder=folder, check=False, timeout=60, **had)
    assert ended.returncode == 1
    assert re.fullmatch(pattern(row), ended.stderr), ended.stderr
    assert "Traceback" not in ended.stdout
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not [name for name in left if name.endswith((".ckpt", ".nc", ".png")) or ".part" in name]


def test_page_names_every_kind_of_mistake_that_is_made_here() -> None:
    assert {row.had for row in rows()} == set(HAD)
    assert len({(row.typed, row.had) for row in rows()}) == len(rows()) >= 45
