"""Behind the shutter digits go on as they would without it, and nothing of them is seen."""

import inspect
from typing import Any

import pytest
import torch
from commands import ROOT
from omegaconf import OmegaConf

from datamodules.frames import SPLITS
from datamodules.moving_digits import MovingDigitsData
from datamodules.occluded_digits import OccludedDigitsData
from datamodules.sampler import PADDING, Draw
from forecast.errors import UserError

TINY = {"past": 5, "future": 2, "train": 6, "validation": 5, "test": 4, "speed": (0.5, 2.0), "seed": 3}


def occluded(**options: Any) -> OccludedDigitsData:
    data = OccludedDigitsData(**{**TINY, "hidden": 3, **options})
    data.setup()
    return data


@pytest.mark.parametrize("hidden", [0, 1, 4])
def test_only_the_last_frames_of_the_past_are_dark(hidden: int) -> None:
    plain = MovingDigitsData(**{**TINY, "size": 16, "digits": 1, "digit_size": 8})  # type: ignore[arg-type]  # of several types
    plain.setup()
    for split in SPLITS:
        draw = Draw(2, (3, PADDING, 0))
        shown, seen = occluded(hidden=hidden).windows(split)[draw], plain.windows(split)[draw]
        assert torch.equal(shown.past[:, : 5 - hidden], seen.past[:, : 5 - hidden])
        assert not shown.past[:, 5 - hidden :].any()
        assert seen.past.flatten(2).any(2).all()
        for name in ("future", "static", "time", "block", "first"):
            assert torch.equal(getattr(shown, name), getattr(seen, name)), name


def test_digits_stand_still_as_shipped() -> None:
    data = OccludedDigitsData()
    data.setup()
    batch = data.windows("test")[Draw(0, tuple(range(20)))]
    first = batch.past[:, :1]
    assert torch.equal(batch.past[:, :8], first.expand(-1, 8, -1, -1, -1))
    assert torch.equal(batch.future, first.expand(-1, 3, -1, -1, -1))
    assert not batch.past[:, 8:].any()


def test_the_oracle_sees_through_the_shutter() -> None:
    data = occluded()
    oracle = data.references()["oracle"]
    batch = next(iter(data.test_dataloader()))
    past, valid = data.quantity.decode(batch.past)
    forecast = oracle.predict(past, valid, data.future, static=batch.static, time=batch.time)
    assert torch.equal(forecast.mean, data.quantity.decode(batch.future)[0])


def test_the_fingerprint_and_the_terms_tell_the_shutter() -> None:
    known = occluded().fingerprint
    assert occluded(seed=4).fingerprint == known
    assert len({known, occluded(hidden=2).fingerprint, occluded(speed=(0.5, 1.0)).fingerprint}) == 3
    terms = occluded().terms("test")
    assert (terms["hidden"], terms["windows"], terms["speed"]) == (3, 4, [0.5, 2.0])


@pytest.mark.parametrize(("hidden", "allowed"), [(5, "0 to 4"), (-1, "0 to 4")])
def test_a_shutter_that_hides_everything_is_refused(hidden: int, allowed: str) -> None:
    with pytest.raises(UserError, match=f"data.hidden is {hidden}.*data.past=5.*{allowed}"):
        occluded(hidden=hidden)


def test_streams_are_refused() -> None:
    with pytest.raises(UserError, match="data=moving_digits"):
        occluded().train_along_streams(10, None)


def test_the_configuration_names_every_argument() -> None:
    listed = set(OmegaConf.load(ROOT / "conf" / "data" / "occluded_digits.yaml")) - {"_target_"}  # type: ignore[arg-type]  # a mapping, by its keys
    assert listed == set(inspect.signature(OccludedDigitsData).parameters)
