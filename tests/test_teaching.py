"""Schedules are functions of the step alone, masks of (seed, step, batch, process); training follows them, use does not."""

import csv
from math import exp, log
from pathlib import Path
from typing import Any

import commands
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from commands import ROOT
from test_train import TINY
from torch import Tensor

from forecast import command_line, config
from forecast.batch import Frames
from forecast.errors import UserError
from forecast.module import NowcastModule
from forecast.networks.network import Output
from forecast.teaching import (
    Chance,
    Exponential,
    FreeRunning,
    InverseSigmoid,
    Linear,
    Reverse,
    TeacherForcing,
    Teaching,
)
from train import make_module

NEXT = ["model=next_frame", "teaching=linear", "teaching.per_step=0.25"]
CHOICES = sorted(path.stem for path in (ROOT / "conf/teaching").glob("*.yaml"))


@pytest.mark.parametrize(
    ("teaching", "step", "past", "future"),
    [
        (FreeRunning(), 0, 1, 0),
        (FreeRunning(), 10**6, 1, 0),
        (TeacherForcing(), 0, 1, 1),
        (TeacherForcing(), 10**6, 1, 1),
        (Linear(), 0, 1, 1),
        (Linear(), 12_500, 1, 0.75),
        (Linear(), 49_999, 1, 2e-5),
        (Linear(), 50_000, 1, 0),
        (Linear(), 10**9, 1, 0),
        (Linear(start=0.5, per_step=0.1), 3, 1, 0.2),
        (Exponential(base=0.5), 0, 1, 1),
        (Exponential(base=0.5), 3, 1, 0.125),
        (Exponential(base=0.5), 10**9, 1, 0),
        (InverseSigmoid(k=10), 0, 1, 10 / 11),
        (InverseSigmoid(k=10), 20, 1, 10 / (10 + exp(2))),
        (InverseSigmoid(k=10), 10**9, 1, 0),
        (Reverse(), 0, 0.5, 0.5),
        (Reverse(), 24_999, 0.5, 0.5),
        (Reverse(), 25_000, 0.5, 0.5),
        (Reverse(), 30_000, 1 - 0.5 * exp(-1), 0.4),
        (Reverse(), 50_000, 1, 0),
        (Reverse(begin=0, end=10, scale=5 / log(2)), 5, 0.75, 0.25),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Teaching) else None,
)
def test_schedule_has_the_published_values(teaching: Teaching, step: int, past: float, future: float) -> None:
    assert teaching.chance(step) == pytest.approx((past, future), abs=1e-12)


class Fixed(Teaching):
    def __init__(self, past: float, future: float) -> None:
        self.fixed = Chance(past, future)

    def chance(self, step: int) -> Chance:
        return self.fixed


def test_each_frame_of_each_sample_is_drawn_by_its_own_chance() -> None:
    mask = Fixed(0.8, 0.3).draw(4000, 4, 3, step=0, seed=(0, 0))
    assert mask.shape == (4000, 5)
    assert mask.dtype == torch.bool
    share = mask.double().mean(dim=0).numpy()
    np.testing.assert_allclose(share, [0.8, 0.8, 0.8, 0.3, 0.3], atol=4 * (0.25 / 4000) ** 0.5)
    correlation = np.corrcoef(mask.double().numpy().T) - np.eye(5)
    assert np.abs(correlation).max() < 0.08


def test_certainties_are_certain_and_short_windows_have_short_masks() -> None:
    assert FreeRunning().draw(50, 3, 4, step=7, seed=(1,)).tolist() == [[True, True, False, False, False]] * 50
    assert TeacherForcing().draw(50, 3, 4, step=7, seed=(1,)).all()
    assert [
        Linear().draw(2, past, future, step=1, seed=(0,)).shape[1] for past, future in ((1, 1), (1, 3), (4, 1))
    ] == [*(0, 2, 3)]


def test_mask_is_a_function_of_what_tells_the_batch() -> None:
    teaching = Fixed(0.5, 0.5)

    def drawn(*seed: int) -> list[list[bool]]:
        np.random.seed(len(seed))  # noqa: NPY002 # what the global generators hold must be no matter
        torch.manual_seed(len(seed))
        return teaching.draw(4, 5, 5, step=0, seed=seed).tolist()

    assert drawn(3, 1, 4, 0) == drawn(3, 1, 4, 0)
    others = [drawn(*seed) for seed in ((3, 1, 4, 0), (4, 1, 4, 0), (3, 2, 4, 0), (3, 1, 5, 0), (3, 1, 4, 1))]
    assert len({str(one) for one in others}) == len(others)


class Noted(Linear):
    """Notes what it draws."""

    def __init__(self) -> None:
        super().__init__(0.9, 0.1)
        self.drawn: list[tuple[int, list[list[bool]]]] = []

    def draw(self, *size: int, step: int, **seed: Any) -> Tensor:
        mask = super().draw(*size, step=step, **seed)
        self.drawn.append((step, mask.tolist()))
        return mask


def module_of(*overrides: str) -> tuple[NowcastModule, Any]:
    torch.manual_seed(0)
    cfg = command_line.load(ROOT / "conf", [*TINY, "data.size=24", "data.digit_size=12", *overrides])
    data = config.build(cfg.data)
    data.setup()
    return make_module(cfg, data), data


def drawn_by(folder: Path, steps: int, start: Path | None = None) -> list[tuple[int, list[list[bool]]]]:
    """What is drawn by a training on batches of two, two to a step and four to an epoch, up to that step."""
    module, data = module_of(*NEXT, "data.batch_size=2", "scheduler=constant")
    module.teaching = noted = Noted()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return noted.drawn


def test_training_that_goes_on_is_taught_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight = drawn_by(tmp_path, 5)
    assert [step for step, _ in straight] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({str(mask) for _, mask in straight}) == 10
    early = drawn_by(tmp_path, 3)  # inside the second epoch
    assert early + drawn_by(tmp_path, 5, tmp_path / "3.ckpt") == straight


def test_training_run_logs_the_schedule_that_it_follows(tmp_path: Path) -> None:
    few = [one for one in TINY if "max_epochs" not in one]
    commands.run(*few, *NEXT, "trainer.max_epochs=3", "trainer.log_every_n_steps=1", folder=tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {int(row["step"]): row for row in rows if row["teaching/probability"]}
    assert [float(logged[step]["teaching/probability"]) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert {row["teaching/past_probability"] for row in logged.values()} == {"1.0"}
    assert rows[-1]["test/loss"]


def test_network_that_feeds_nothing_back_is_not_taught() -> None:
    choices = [config.build(command_line.load(ROOT / "conf", [f"teaching={one}"]).teaching) for one in CHOICES]
    assert {type(one) for one in choices} == set(Teaching.__subclasses__()) - {Fixed}
    assert isinstance(module_of()[0].teaching, FreeRunning)
    with pytest.raises(UserError, match="model=convlstm is never fed its own forecasts"):
        module_of("teaching=reverse")


def test_loss_of_training_counts_every_next_frame_and_that_of_validation_the_forecast() -> None:
    module, data = module_of(*NEXT)
    module.eval()
    batch: Frames = next(data.decoded("train", range(3)))
    past, future = batch.past.shape[1], module.future
    known = batch.known.clone()
    known[0, 4:, :, 3:] = False
    batch = batch._replace(known=known, valid=batch.valid & (torch.arange(3) < 2).view(3, 1, 1, 1, 1))
    batch = batch._replace(block=torch.tensor([0, 1, -1]))  # the third is padding
    truth = torch.cat([batch.past, batch.truth], dim=1)[:2, 1:]
    counts = torch.cat([known, batch.valid], dim=1)[:2, 1:]
    raw = module.forecaster(batch.past, future, batch.static).raw  # type: ignore[operator]  # a NetworkForecaster is a Module
    assert raw.shape[1] == past + future - 1
    loss, pixels = module._loss(batch, Output(raw))
    assert pixels == counts.sum()
    torch.testing.assert_close(module._loss(batch, Output(raw, aux=torch.tensor(0.5)))[0], loss + 0.5)
    torch.testing.assert_close(loss, (raw[:2] - truth)[counts].square().mean())
    shown, loss, pixels = module._forecast(batch)
    torch.testing.assert_close(shown, raw[:, -future:])
    torch.testing.assert_close(loss, (raw[:2, -future:] - batch.truth[:2]).square().mean())
    assert pixels == batch.valid.sum()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Linear(start=1.5), "teaching.start is 1.5; it must be from 0 to 1"),
        (lambda: Linear(per_step=-1.0), "teaching.per_step is -1.0; it must be at least 0"),
        (lambda: Exponential(base=1.0), "teaching.base is 1.0; it must lie between 0 and 1"),
        (lambda: InverseSigmoid(k=0.5), "teaching.k is 0.5; it must be at least 1"),
        (lambda: Reverse(begin=5, end=5), "teaching.begin is 5 and teaching.end 5"),
        (lambda: Reverse(scale=0.0), "teaching.scale is 0.0; it must be above 0"),
    ],
)
def test_impossible_schedules_are_refused(made: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made()
