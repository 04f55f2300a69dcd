"""Moving digits move straight, bounce, are the same whoever asks, and share nothing between splits."""

import inspect
import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf

from datamodules.frames import SPLITS, Split
from datamodules.moving_digits import FRAMES, MovingDigits, MovingDigitsData
from datamodules.sampler import PADDING, Draw
from datamodules.scenes import bounce, tight
from forecast.batch import Batch
from forecast.errors import UserError

IMAGES = np.random.default_rng(0).integers(1, 256, (7, 5, 5), dtype=np.uint8)
MARGINS = IMAGES.copy()  # as digits have them: no two alike, one image empty
for image, (rows, columns) in enumerate([(0, 2), (1, 1), (2, 0), (3, 1), (0, 1), (1, 2), (5, 5)]):
    MARGINS[image, :rows] = MARGINS[image, rows + 3 :] = 0
    MARGINS[image, :, :columns] = MARGINS[image, :, columns + 3 :] = 0


def moving(**options: Any) -> MovingDigits:
    settings = {"past": 3, "future": 4, "size": (12, 12), "digits": 2, "speed": (2.0, 4.0), "seed": 0, "split": "train"}
    images, sequences = options.pop("images", IMAGES), options.pop("sequences", 9)
    return MovingDigits(images, sequences, **{**settings, "fresh": True, **options})


def digits_data(**options: Any) -> MovingDigitsData:
    data = MovingDigitsData(**{"past": 3, "future": 4, "train": 20, "validation": 6, "test": 7, **options})
    data.setup()
    return data


def naive(moving: MovingDigits, epoch: int, position: int, length: int) -> NDArray[np.uint8]:
    """One sequence, L H W, digit by digit and frame by frame, turned round at each wall that is passed."""
    entropy = (moving.seed, SPLITS.index(moving.split), epoch, position)
    draws = np.random.default_rng(entropy).random((moving.digits, 5))
    D = moving.images.shape[-1]
    span = moving.size[0] - D
    frames = np.zeros((length, *moving.size), np.uint8)
    for which, y, x, pace, direction in draws:
        image = moving.images[int(which * len(moving.images))]
        speed = moving.speed[0] + pace * (moving.speed[1] - moving.speed[0])
        step = speed * np.array([np.sin(2 * np.pi * direction), np.cos(2 * np.pi * direction)])
        place = np.array([y, x]) * span
        for frame in frames:
            top, left = np.rint(place).astype(int)
            part = frame[top : top + D, left : left + D]
            part[:] = np.maximum(part, image)
            place = place + step
            for axis in (0, 1):
                while not 0 <= place[axis] <= span:
                    place[axis] = (0 if place[axis] < 0 else 2 * span) - place[axis]
                    step[axis] = -step[axis]
    return frames


def frames_of(batch: Batch) -> torch.Tensor:
    """B L H W."""
    return torch.cat([batch.past, batch.future], dim=1)[:, :, 0]


@given(st.floats(0, 1), st.floats(-40, 40), st.floats(0.5, 30))
def test_bounce_stays_inside_and_never_jumps(start: float, velocity: float, span: float) -> None:
    path = bounce(start * span + velocity * np.linspace(0, 5, 101), span)
    assert path.min() >= -1e-9
    assert path.max() <= span + 1e-9
    assert path[0] == pytest.approx(start * span)
    assert np.abs(np.diff(path)).max() <= abs(velocity) * 0.05 + 1e-9


def test_bounce_reflects_at_both_walls() -> None:
    assert bounce(np.array([-3.0, -1.0, 0.0, 4.0, 10.0, 11.0, 19.0, 20.0, 23.0]), 10.0).tolist() == [
        3.0,
        1.0,
        0.0,
        4.0,
        10.0,
        9.0,
        1.0,
        0.0,
        3.0,
    ]


@given(
    size=st.integers(6, 20),
    digits=st.integers(1, 3),
    speed=st.tuples(st.floats(0, 9), st.floats(0, 9)).map(lambda pair: (min(pair), max(pair))),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    split=st.sampled_from(SPLITS),
    images=st.sampled_from([IMAGES, MARGINS, MARGINS[:3], MARGINS[6:]]),
)
def test_frames_are_those_of_the_naive_loop(
    size: int,
    digits: int,
    speed: tuple[float, float],
    seed: int,
    epoch: int,
    split: Split,
    images: NDArray[np.uint8],
) -> None:
    sequences = moving(images=images, size=(size, size), digits=digits, speed=speed, seed=seed, split=split)
    batch = sequences[Draw(epoch, (5, 0, 8))]
    expected = np.stack([naive(sequences, epoch, position, 7) for position in (5, 0, 8)])
    assert np.array_equal(frames_of(batch).numpy(), expected)


def test_images_lose_empty_rows_and_columns_and_no_pixel() -> None:
    shown = tight(MARGINS[:6])
    assert shown.images.shape == (6, 3, 3)
    for image, small, (y, x) in zip(MARGINS, shown.images, shown.corner, strict=False):
        again = np.zeros_like(image)
        again[y : y + 3, x : x + 3] = small
        assert np.array_equal(again, image)
    assert tight(MARGINS).images.shape == (7, 5, 5)  # what is empty is kept whole, and so all are


def test_a_batch_is_what_the_contract_says() -> None:
    batch = moving()[Draw(0, (5, PADDING, 2))]
    assert batch.past.shape == (3, 3, 1, 12, 12)
    assert batch.future.shape == (3, 4, 1, 12, 12)
    assert batch.past.dtype == batch.future.dtype == torch.uint8
    assert batch.static.shape == (3, 0, 12, 12)
    assert batch.static.dtype == torch.float32
    assert batch.block.tolist() == [5, -1, 2]
    assert batch.time.tolist() == [5, 0, 2]
    assert batch.block.dtype == batch.time.dtype == torch.int64
    assert batch.first.all()


def test_a_sample_depends_on_seed_split_epoch_and_position_alone() -> None:
    alone = frames_of(moving()[Draw(3, (4,))])[0]
    assert torch.equal(frames_of(moving()[Draw(3, (8, PADDING, 4))])[2], alone)
    assert torch.equal(frames_of(pickle.loads(pickle.dumps(moving()))[Draw(3, (4,))])[0], alone)
    others = [
        moving(seed=1)[Draw(3, (4,))],
        moving(split="validation")[Draw(3, (4,))],
        moving()[Draw(2, (4,))],
        moving()[Draw(3, (5,))],
    ]
    assert not any(torch.equal(frames_of(other)[0], alone) for other in others)
    turned = moving()
    for epoch in (3, 2, 3):
        again = turned[Draw(epoch, (4,))]
    assert torch.equal(frames_of(again)[0], alone)
    fixed = moving(fresh=False)
    assert torch.equal(frames_of(fixed[Draw(3, (4,))]), frames_of(fixed[Draw(0, (4,))]))


def test_a_fingerprint_changes_with_all_that_changes_frames_except_the_seed() -> None:
    known = digits_data().fingerprint
    assert len(known) == 16
    same = [{"seed": 7}, {"batch_size": 3}, {"workers": 2}]
    assert {digits_data(**options).fingerprint for options in same} == {known}
    other: list[dict[str, Any]] = [
        {"size": 50},
        {"digits": 3},
        {"digit_size": 15},
        {"speed": (2.0, 4.5)},
        {"train": 21},
        {"validation": 7},
        {"test": 8},
        {"fresh": False},
        {"past": 4},
        {"future": 5},
    ]
    assert len({known, *(digits_data(**options).fingerprint for options in other)}) == 1 + len(other)
    one, changed = moving(), moving()
    changed.images = IMAGES.copy()
    changed.images[6, 4, 4] ^= 1
    assert one.fingerprint != changed.fingerprint


def test_draws_are_uniform() -> None:
    sequences = moving(sequences=7000, speed=(2.0, 4.0))
    chosen, start, velocity = sequences.scenes(np.arange(7000), 0)
    counts = np.bincount(chosen.ravel(), minlength=7)
    assert ((counts - 2000) ** 2 / 2000).sum() < 22.5  # chi square, 6 degrees of freedom, 1 in 1000
    speed = np.hypot(*np.moveaxis(velocity, -1, 0))
    angle = np.arctan2(velocity[..., 0], velocity[..., 1])
    for drawn, low, high in ((start, 0, 7), (speed, 2, 4), (angle, -np.pi, np.pi)):
        assert drawn.min() >= low
        assert drawn.max() <= high
        shares = np.histogram(drawn, bins=10, range=(low, high))[0] / drawn.size
        assert np.abs(shares - 0.1).max() < 0.012  # 4.5 standard deviations


def test_the_default_task_is_honest() -> None:
    """At least two digits of 12 pixels or more on 48 or more, 2 to 4 pixels a frame, and walls that are met."""
    data = MovingDigitsData()
    data.setup()
    assert data.digits >= 2
    assert data.digit_size >= 12
    assert data.size >= 48
    assert data.speed == (2.0, 4.0)
    windows = data.windows("test")
    assert isinstance(windows, MovingDigits)
    _, start, velocity = windows.scenes(np.arange(len(windows)), 0)
    end = start + velocity * (data.past + data.future - 1)
    span = data.size - data.digit_size
    assert ((end < 0) | (end > span)).any(axis=-1).mean() > 0.75  # of the digits, the share that bounces
    frames = FRAMES.decode(windows[Draw(0, tuple(range(50)))].future)[0]
    assert 0.02 < (frames >= 0.5).float().mean() < 0.3


def test_splits_share_no_image() -> None:
    images = MovingDigitsData().images()
    assert {split: len(each) for split, each in images.items()} == {"train": 1197, "validation": 200, "test": 400}
    assert all(each.dtype == np.uint8 and each.shape[1:] == (16, 16) for each in images.values())
    kinds = {split: {image.tobytes() for image in each} for split, each in images.items()}
    assert sum(map(len, kinds.values())) == 1797
    assert not any(kinds[one] & kinds[other] for one, other in combinations(SPLITS, 2))


def test_only_training_is_fresh() -> None:
    data = digits_data()
    for split in SPLITS:
        windows = data.windows(split)
        assert windows is data.windows(split)
        same = torch.equal(frames_of(windows[Draw(0, (1,))]), frames_of(windows[Draw(1, (1,))]))
        assert same == (split != "train")


def test_the_oracle_is_the_truth() -> None:
    data = digits_data(batch_size=4)
    oracle = data.references()["oracle"]
    blocks = []
    for batch in data.test_dataloader():
        past, valid = data.quantity.decode(batch.past)
        forecast = oracle.predict(past, valid, data.future, static=batch.static, time=batch.time)
        assert torch.equal(forecast.mean, data.quantity.decode(batch.future)[0])
        blocks += batch.block.tolist()
    assert blocks == [*range(7), PADDING]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 16}, "16 pixels cannot move on a canvas of 16"),
        ({"digit_size": 0}, "0 pixels"),
        ({"speed": [4.0, 2.0]}, r"data.speed is \[4.0, 2.0\]"),
        ({"speed": [2.0]}, "least and the greatest"),
        ({"digits": 0}, "data.digits is 0"),
        ({"validation": 0}, "data.validation is 0"),
        ({"past": 0}, "data.past is 0"),
    ],
)
def test_mistakes_are_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MovingDigitsData(**options)


def test_the_configuration_names_every_argument() -> None:
    path = Path(__file__).parents[1] / "conf" / "data" / "moving_digits.yaml"
    listed = set(OmegaConf.load(path)) - {"_target_"}  # type: ignore[arg-type]  # a mapping, by its keys
    assert listed == set(inspect.signature(MovingDigitsData).parameters)
