"""Moving digits that are told which way to go: drawn by a plain loop, and by OpenSTL's data set.

Axes: L frames, H W space.
"""

import gzip
import struct
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.frames import SPLITS
from datamodules.moving_digits import MovingDigits
from datamodules.moving_mnist import TRAIN
from datamodules.sampler import Draw
from forecast.errors import UserError

OPENSTL = Path("openstl") / "datasets" / "dataloader_moving_mnist.py"
PAST = FUTURE = 10


class Path2D(NamedTuple):
    """A digit, and its upper left corner in each frame."""

    image: int
    top: list[int]
    left: list[int]


def walked(windows: MovingDigits, position: int) -> list[Path2D]:
    """The digits of a sequence of epoch 0, by NumPy's own generator, turned round at each wall that they pass."""
    draws = np.random.default_rng((windows.seed, SPLITS.index(windows.split), 0, position)).random((windows.digits, 5))
    span = windows.size[0] - windows.images.shape[-1]
    paths = []
    for which, y, x, pace, direction in draws:
        speed = windows.speed[0] + pace * (windows.speed[1] - windows.speed[0])
        step = speed * np.array([np.sin(2 * np.pi * direction), np.cos(2 * np.pi * direction)])
        place, corners = np.array([y, x]) * span, []
        for _ in range(PAST + FUTURE):
            corners.append(np.rint(place).astype(int))
            place = place + step
            for axis in (0, 1):
                while not 0 <= place[axis] <= span:
                    place[axis] = (0 if place[axis] < 0 else 2 * span) - place[axis]
                    step[axis] = -step[axis]
        top, left = np.transpose(corners).tolist()
        paths.append(Path2D(int(which * len(windows.images)), top, left))
    return paths


def drawn(windows: MovingDigits, paths: Sequence[Path2D]) -> NDArray[np.uint8]:
    """Frames L H W, digit by digit and frame by frame."""
    frames, side = np.zeros((PAST + FUTURE, *windows.size), np.uint8), windows.images.shape[-1]
    for image, tops, lefts in paths:
        for frame, top, left in zip(frames, tops, lefts, strict=True):
            part = frame[top : top + side, left : left + side]
            part[:] = np.maximum(part, windows.images[image])
    return frames


def peer(checkout: Path) -> ModuleType:
    """OpenSTL's file, without the packages that moving digits do not need.

    Raises:
        UserError: it is not there.
    """
    if not (checkout / OPENSTL).is_file():
        raise UserError(f"--openstl is {checkout}, which has no {OPENSTL}; give the root of a checkout of OpenSTL.")
    spec = spec_from_file_location("peer_moving_mnist", checkout / OPENSTL)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    names = ("cv2", "torchvision", "openstl", "openstl.datasets", "openstl.datasets.utils")
    with patch.dict(sys.modules, {name: MagicMock() for name in names}):
        spec.loader.exec_module(module)
    return module


def theirs(module: ModuleType, images: NDArray[np.uint8], folder: Path) -> Any:
    """OpenSTL's data set of those images; in training one is asked for a sequence, and sixteen are stacked."""
    place = folder / "moving_mnist" / f"{TRAIN}.gz"
    place.parent.mkdir()
    with gzip.open(place, "wb", compresslevel=1) as file:
        file.write(struct.pack(">4I", 2051, *images.shape) + images.tobytes())
    return module.MovingMNIST(str(folder), n_frames_input=PAST, n_frames_output=FUTURE)


def drawn_by_openstl(module: ModuleType, dataset: Any, paths: Sequence[Path2D]) -> NDArray[np.uint8]:
    """Frames L H W as OpenSTL draws them, told which digits to take and where they go."""
    ways, images = iter(paths), iter(paths)
    told = SimpleNamespace(choice=lambda options: options[0], randint=lambda low, high: next(images).image)
    with (
        patch.object(module, "random", told),
        patch.object(dataset, "get_random_trajectory", lambda length: next(ways)[1:]),
    ):
        past, future = dataset[0]
    frames: NDArray[np.uint8] = (torch.cat([past, future])[:, 0] * 255).round().to(torch.uint8).numpy()
    return frames


def gate_digits(windows: MovingDigits, module: ModuleType | None, dataset: Any) -> None:
    """Our frames are those of the plain loop, and those that OpenSTL draws where digits are told to go the same ways.

    Raises:
        UserError: they are not.
    """
    positions = range(0, len(windows), max(1, len(windows) // 20))
    batch = windows[Draw(0, tuple(positions))]
    ours = torch.cat([batch.past, batch.future], dim=1)[:, :, 0].numpy()
    for frames, position in zip(ours, positions, strict=True):
        paths = walked(windows, position)
        by = {"a plain loop": drawn(windows, paths)}
        if module is not None:
            by["OpenSTL"] = drawn_by_openstl(module, dataset, paths)
        for name, expected in by.items():
            if not np.array_equal(frames, expected):
                raise UserError(
                    f"Sequence {position} differs from that of {name}; no time is told of it: mend it first."
                )
