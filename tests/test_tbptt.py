"""Truncated backpropagation by the trainer: every weight equals that of a graph cut by hand."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import commands
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import WriteArchive, every
from test_launch import assert_same_weights, ddp
from test_train import TINY
from torch import Tensor

import train
from forecast import checkpoint, command_line, config
from forecast.batch import Frames
from forecast.errors import UserError
from forecast.module import NowcastModule
from forecast.tbptt import TruncatedBPTT

CONF = commands.ROOT / "conf"
FUTURE, EVERY = 3, 2
# Three streams of 24, 12 and 4 frames for two lanes: they restart at different times, and one ends in padding.
TIMES = every(400)[np.r_[0:27, 40:55, 60:67, 300:308, 380:388]]
SPLIT = (
    "data.split={train: [2025-02-27, 2025-02-28], validation: [2025-03-01, 2025-03-01T08:00], "
    "test: [2025-03-01T15:00, 2025-03-02]}"
)
NETWORKS = {
    "convlstm": ["model=convlstm", "model.network.hidden=[3,2]", "model.network.patch=2"],
    "convgru-learned": ["model=convgru", "model.network.hidden=[3]", "model.network.cell.learned_initial_state=true"],
    "next_frame": ["model=next_frame", "model.network.hidden=[3,2]", "model.network.patch=2"],
}


def made(archive: str, network: str, steps: int, *overrides: str) -> tuple[Any, NowcastModule]:
    """The datamodule and the module of a configuration, ready to be trained along streams."""
    cfg = command_line.load(
        CONF,
        [
            *("data=radar", f"data.archive={archive}", "data.workers=0", "data.past=2", f"data.future={FUTURE}", SPLIT),
            *("data.batch_size=2", "optimizer=sgd", "optimizer.lr=0.5", "optimizer.momentum=0.0", "scheduler=constant"),
            *(f"tbptt.steps={steps}", f"tbptt.every={EVERY}", "tbptt.length=24", *NETWORKS[network], *overrides),
        ],
    )
    config.check(cfg)
    pl.seed_everything(0, verbose=False)
    data = config.build(cfg.data)
    data.setup()
    data.train_along_streams(steps, 24)
    return data, train.make_module(cfg, data)


def fit(data: Any, module: NowcastModule, **trainer: Any) -> None:
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False, **trainer,
    ).fit(module, data)  # fmt: skip
    data.trainer = None  # from here on it deals its first epoch again


def chunks(data: Any) -> Iterator[Frames]:
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0)


def cut_by_hand(
    data: Any,
    module: NowcastModule,
    *,
    clip: float | None = None,
    accumulate: int = 1,
    amp: bool = False,
    schedule: bool = False,
) -> list[list[Any]]:
    """Trains a copy frame by frame and lane by lane; returns the states at the end."""
    network, transform = module._network.network, module._network.transform
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    batches = list(chunks(data))
    states: list[Any] = [None] * len(batches[0].first)
    if schedule:
        assert module.scheduler is not None
        scheduler = module.scheduler(optimizer, total_steps=len(batches))
    for number, batch in enumerate(batches, start=1):
        frames = transform.forward(torch.cat([batch.past, batch.truth], dim=1))
        known = torch.cat([batch.known, batch.valid], dim=1)
        errors, pixels = torch.zeros(()), 0
        for lane in range(len(states)):
            if batch.first[lane]:
                states[lane] = None
            for t in range(batch.past.shape[1]):
                issues = (t + 1) % EVERY == 0
                with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
                    output = network(
                        frames[lane : lane + 1, t : t + 1],
                        FUTURE if issues else 1,
                        static=batch.static[lane : lane + 1],
                        state=states[lane],
                    )
                states[lane] = output.state
                if batch.block[lane] >= 0 and (issues or network.feeds_back):
                    own = slice(t + 1, t + 1 + output.raw.shape[1])
                    difference = (output.raw.float()[0] - frames[lane, own])[known[lane, own]]
                    errors = errors + difference.square().sum()
                    pixels += difference.numel()
        (errors / pixels / accumulate).backward()
        states = [[tuple(one.detach() for one in layer) for layer in state] for state in states]
        if number % accumulate == 0 or number == len(batches):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            if schedule:
                scheduler.step()
            optimizer.zero_grad()
    return states


def assert_same_network(one: NowcastModule, other: NowcastModule, before: Sequence[Tensor], atol: float) -> None:
    pairs = zip(one._network.network.named_parameters(), other._network.network.parameters(), before, strict=True)
    for (name, ours), theirs, start in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert (ours - start).abs().max() > 1e-5, f"{name} has hardly moved"


@pytest.fixture
def archive(write_archive: WriteArchive) -> str:
    return write_archive(times=TIMES, size=(8, 7))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("steps", [24, 8, 4, 2])
def test_weights_are_those_of_a_graph_cut_by_hand(network: str, steps: int, archive: str) -> None:
    data, module = made(archive, network, steps)
    assert max(data._streams.chunks) == 24 // steps  # with 24 steps the gradient is the whole one
    other, before = copy.deepcopy(module), [weight.detach().clone() for weight in module._network.parameters()]
    fit(data, module)
    states = cut_by_hand(data, other)
    assert_same_network(module, other, before, atol=2e-6)
    assert module.tbptt is not None
    carried = module.tbptt.carried(torch.device("cpu"))
    assert carried is not None
    for depth, layer in enumerate(carried):
        for part, one in enumerate(layer):
            torch.testing.assert_close(one, torch.cat([state[depth][part] for state in states]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("trainer", "hand", "overrides", "atol"),
    [
        ({"gradient_clip_val": 0.01}, {"clip": 0.01}, [], 1e-6),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}, [], 1e-6),
        ({"precision": "bf16-mixed"}, {"amp": True}, [], 1e-3),
        ({}, {"schedule": True}, ["scheduler=cosine", "scheduler.warmup=0.3"], 1e-6),
    ],
    ids=["clipping", "accumulation", "bf16", "schedule"],
)
def test_the_trainer_does_its_part_as_by_hand(
    trainer: dict[str, Any], hand: dict[str, Any], overrides: list[str], atol: float, archive: str
) -> None:
    data, module = made(archive, "convlstm", 4, *overrides)
    other, before = copy.deepcopy(module), [weight.detach().clone() for weight in module._network.parameters()]
    fit(data, module, **trainer)
    cut_by_hand(data, other, **hand)
    assert_same_network(module, other, before, atol=atol)


def test_gradients_end_where_the_graph_is_cut(archive: str) -> None:
    """The first frame of a chunk moves its forecasts through the state, but that of the chunk before moves no weight."""
    data, module = made(archive, "convlstm", 4)
    first, second = (batch for batch, _ in zip(chunks(data), range(2), strict=False))
    assert module.tbptt is not None
    first = first._replace(past=first.past.requires_grad_())
    state = None
    for window in module.tbptt.windows(first):
        state = module._network(window.past, FUTURE, window.static, state=state, first=window.first).state
    module.tbptt.carry(state)
    carried = module.tbptt.carried(torch.device("cpu"))
    assert state is not None
    assert carried is not None
    assert state[0][0].requires_grad
    assert not carried[0][0].requires_grad
    assert torch.equal(state[0][0], carried[0][0])
    assert state[0][0].data_ptr() != carried[0][0].data_ptr()  # where a compiled network may write anew
    windows = module.tbptt.windows(second)
    assert [tuple(window.past.shape[:2]) for window in windows] == [(2, EVERY)] * 2
    frames = torch.cat([second.past, second.truth], dim=1)
    for number, window in enumerate(windows, start=1):
        assert torch.equal(window.truth, frames[:, EVERY * number : EVERY * number + FUTURE])


def test_lanes_of_all_processes_find_their_states_again() -> None:
    """Lane i of process p is number i * P + p, whichever P."""
    tbptt = TruncatedBPTT(4, 2)
    tbptt.carry([(torch.tensor([[0.0], [2.0]]),)])
    stored = tbptt.gathered(lambda mine: torch.stack([mine, mine + 1]))
    assert stored[0][0].tolist() == [[0], [1], [2], [3]]
    for rank, own in ((0, [[0.0], [2.0]]), (1, [[1.0], [3.0]])):
        tbptt.restore(stored, rank, 2)
        carried = tbptt.carried(torch.device("cpu"))
        assert carried is not None
        assert carried[0][0].tolist() == own
    tbptt.restore([], 0, 1)
    assert tbptt.carried(torch.device("cpu")) is None


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (4, 0), (5, 2)])
def test_chunks_end_where_a_forecast_is_issued(steps: int, every: int) -> None:
    with pytest.raises(UserError, match=f"tbptt.steps is {steps} and tbptt.every {every}"):
        TruncatedBPTT(steps, every)


ALONG = ["tbptt.steps=6", "tbptt.every=3", "tbptt.length=18"]


def test_two_processes_train_as_one_with_all_lanes(tmp_path: Path) -> None:
    digits = [one for one in TINY if not one.startswith(("data.", "trainer.accelerator"))]
    few = [
        "data.train=10",
        "data.validation=2",
        "data.test=2",
        "data.size=24",
        "data.digit_size=8",
        "data.past=3",
        "data.future=3",
    ]
    for name, parallel, batch in (("one", ["trainer.accelerator=cpu"], 4), ("two", ddp(2), 2)):
        commands.run(*digits, *few, *ALONG, *parallel, f"data.batch_size={batch}", folder=tmp_path / name)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)
    forecaster, _ = checkpoint.load_forecaster(tmp_path / "one/checkpoints/last.ckpt")
    assert forecaster.stream(torch.zeros(1, 0, 24, 24)).carries
    lanes = [checkpoint.read(tmp_path / name / "checkpoints/last.ckpt")["lanes"] for name in ("one", "two")]
    for one, two in zip(*lanes, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
