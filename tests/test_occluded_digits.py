"""A digit that passes behind a bar goes on as it would without it, and nothing of it is seen there."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from numpy.typing import NDArray
from omegaconf import OmegaConf

from datamodules.frames import SPLITS
from datamodules.occluded_digits import BAR, OccludedDigits, OccludedDigitsData
from datamodules.sampler import PADDING, Draw
from forecast.errors import UserError

TINY = {"past": 8, "future": 3, "train": 40, "validation": 5, "test": 4, "speed": 3, "digit_size": 6, "seed": 3}


def occluded(**options: Any) -> OccludedDigitsData:
    data = OccludedDigitsData(**{**TINY, "hidden": 3, **options})
    data.setup()
    return data


def digit(frames: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether a pixel of the digit is to be seen, by frame."""
    return ((frames > 0) & (frames != BAR)).any((-2, -1))


@pytest.mark.parametrize("hidden", [1, 3, 6])
def test_the_digit_is_hidden_in_the_last_frames_of_the_past_and_comes_out_in_the_first_forecast_one(
    hidden: int,
) -> None:
    for split in ("validation", "test"):
        batch = occluded(hidden=hidden).windows(split)[Draw(2, (3, PADDING, 0))]
        seen = digit(torch.cat([batch.past, batch.future], 1)[:, :, 0].numpy())
        # Its foremost columns may be empty: it is not seen before, and by the last frame it is.
        assert not seen[:, 8 - hidden : 8].any()
        assert seen[:, : 8 - hidden - 1].all()
        assert seen[:, -1].all()


def test_before_the_bar_and_after_it_the_frames_are_those_without_it() -> None:
    for split in ("validation", "test"):
        draw = Draw(0, (0, 1, 2, 3))
        plain, shown = (occluded(hidden=hidden).windows(split)[draw] for hidden in (0, 4))
        for name in ("past", "future"):
            without, there = getattr(plain, name), getattr(shown, name)
            bar = there == BAR
            assert torch.equal(there[~bar], without[~bar])
        assert (shown.past == BAR).all((0, 1, 2, 3)).sum() == 6 + 3 * 3  # columns: the digit's, and its way behind it


def test_the_digit_crosses_the_whole_canvas_at_its_speed() -> None:
    data = occluded(hidden=0)
    assert data.grid.size == (16, 3 * 10 + 6)
    batch = data.windows("test")[Draw(0, (0, 1, 2, 3))]
    frames = torch.cat([batch.past, batch.future], 1)[:, :, 0]
    for t in range(1, 11):
        assert torch.equal(frames[:, t], frames[:, 0].roll(3 * t, dims=-1))
    assert not frames[:, 0, :, 6:].any()


def test_training_hides_for_every_number_of_frames_up_to_the_largest() -> None:
    batch = occluded(hidden=3).windows("train")[Draw(0, tuple(range(40)))]
    columns = (batch.past[:, 0, 0] == BAR).all(1).sum(1)
    counts = {0: 0, 6: 0, 9: 0, 12: 0}  # of no frame, one, two and three
    for width in columns.tolist():
        counts[width] += 1
    assert min(counts.values()) >= 4


def test_the_oracle_sees_through_the_bar() -> None:
    data = occluded()
    oracle = data.references()["oracle"]
    batch = next(iter(data.test_dataloader()))
    past, valid = data.quantity.decode(batch.past)
    forecast = oracle.predict(past, valid, data.future, static=batch.static, time=batch.time)
    assert torch.equal(forecast.mean, data.quantity.decode(batch.future)[0])


def test_a_sequence_is_a_function_of_its_position_alone() -> None:
    for split in SPLITS:
        windows = occluded().windows(split)
        together, alone = windows[Draw(1, (2, 0))], windows[Draw(1, (0,))]
        assert torch.equal(together.past[1], alone.past[0])
        assert isinstance(windows, OccludedDigits)


def test_the_fingerprint_and_the_terms_tell_the_bar() -> None:
    known = occluded().fingerprint
    assert occluded(seed=4).fingerprint == known
    assert len({known, occluded(hidden=2).fingerprint, occluded(speed=4).fingerprint}) == 3
    terms = occluded().terms("test")
    assert (terms["hidden"], terms["windows"], terms["speed"]) == (3, 4, [3.0, 3.0])


@pytest.mark.parametrize("hidden", [7, -1])
def test_a_digit_that_is_hidden_from_the_first_frame_on_is_refused(hidden: int) -> None:
    with pytest.raises(UserError, match=f"data.hidden is {hidden}.*data.past=8.*0 to 6"):
        occluded(hidden=hidden)


def test_a_digit_that_stands_still_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.speed is 0"):
        occluded(speed=0)


def test_streams_are_refused() -> None:
    with pytest.raises(UserError, match="data=moving_digits"):
        occluded().train_along_streams(10, None)


def test_the_configuration_names_every_argument() -> None:
    listed = set(OmegaConf.load(ROOT / "conf" / "data" / "occluded_digits.yaml")) - {"_target_"}  # type: ignore[arg-type]  # a mapping, by its keys
    assert listed == set(inspect.signature(OccludedDigitsData).parameters)
