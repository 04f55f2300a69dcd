"""`trainer=fsdp`: two processes that share out a network train it as two that each hold it whole do.

Besides pytest two more run this file: Lightning, for `Witness`, and torchrun, for what stands under `__main__`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import commands
import lightning.pytorch as pl
import pytest
import torch
import xarray as xr
from test_train import TINY
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from forecast import checkpoint
from forecast.cells.lstm import LSTM
from forecast.networks.encoder_forecaster import EncoderForecaster
from forecast.recurrence import Layer, Stack
from forecast.sharding import shard

# Weights that do not divide by two, steps as long as the gradient's norm lets them be, two batches to a step.
RECIPE = [
    *(one for one in TINY if not one.startswith(("trainer.max_epochs", "data.train", "data.batch_size"))),
    "data.train=16",
    "data.batch_size=2",
    "model.network.hidden=[4,3]",
    "model.network.cell.learned_initial_state=true",
    "optimizer=sgd",
    "optimizer.lr=1",
    "scheduler=constant",
    "trainer.gradient_clip_val=0.01",
    "trainer.accumulate_grad_batches=2",
    "logger=none",
]


class Witness(pl.Callback):
    """Notes how many numbers of each kind a process holds: `<rank>.json`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.held: dict[str, int] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.held["gradients"] = sum(numbers(weight.grad) for weight in pl_module.parameters())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held["weights"] = sum(map(numbers, pl_module.parameters()))
        states = trainer.optimizers[0].state.values()
        self.held["momenta"] = sum(numbers(state["momentum_buffer"]) for state in states)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.held))


def numbers(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def trained(folder: Path, trainer: str, epochs: int, *overrides: str) -> Path:
    """The folder of a run, with what the witness saw."""
    folder.mkdir()
    witness = [f"+callbacks.witness._target_={__name__}.Witness", f"+callbacks.witness.folder={folder}"]
    commands.run(
        *RECIPE,
        *witness,
        *overrides,
        f"trainer={trainer}",
        f"trainer.max_epochs={epochs}",
        folder=folder,
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of two processes that each hold the network whole."""
    return trained(tmp_path_factory.mktemp("runs") / "ddp", "ddp", 2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two epochs of two processes that share it out."""
    return trained(tmp_path_factory.mktemp("runs") / "fsdp", "fsdp", 2)


def assert_same_training(one: Path, other: Path, atol: float) -> None:
    """Weights and momenta of the last checkpoint, and the scores of the best, agree."""
    first, second = (checkpoint.read(folder / "checkpoints/last.ckpt") for folder in (one, other))
    assert first["global_step"] == second["global_step"]
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=atol)
    (one_optimizer,), (other_optimizer,) = (content["optimizer_states"] for content in (first, second))
    torch.testing.assert_close(one_optimizer["state"], other_optimizer["state"], rtol=0, atol=atol)
    with xr.open_dataset(one / "skill.nc") as skill, xr.open_dataset(other / "skill.nc") as again:
        xr.testing.assert_allclose(skill, again, rtol=1e-5, atol=1e-5)


def test_sharded_training_is_that_of_processes_that_hold_everything(whole: Path, sharded: Path) -> None:
    """The gradient is clipped by the norm over all shares: by its own, each process would take other steps."""
    assert_same_training(whole, sharded, atol=1e-5)


def test_each_process_holds_its_share_of_weights_gradients_and_optimizer_states(whole: Path, sharded: Path) -> None:
    def held(folder: Path) -> list[dict[str, int]]:
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    everything = held(whole)[0]
    assert len(set(everything.values())) == 1
    for kind, number in everything.items():
        shares = [process[kind] for process in held(sharded)]
        assert sum(shares) == number
        assert max(shares) < 0.55 * number


@pytest.mark.slow
def test_a_resumed_sharded_run_is_an_uninterrupted_one(sharded: Path, tmp_path: Path) -> None:
    halfway = trained(tmp_path / "halfway", "fsdp", 1)
    # With a worker, which draws ahead before a sharded network is restored.
    resumed = trained(tmp_path / "resumed", "fsdp", 2, f"ckpt_path={halfway}/checkpoints/last.ckpt", "data.workers=1")
    assert_same_training(sharded, resumed, atol=0)


def test_a_sharded_run_s_checkpoint_is_scored_again(sharded: Path, tmp_path: Path) -> None:
    score = ["run=test", f"ckpt_path={sharded}/checkpoints/best.ckpt"]
    commands.run(*RECIPE, "trainer=fsdp", *score, folder=tmp_path)
    with xr.open_dataset(sharded / "skill.nc") as before, xr.open_dataset(tmp_path / "skill.nc") as after:
        xr.testing.assert_allclose(before, after, rtol=1e-6)


def test_a_sharded_run_s_checkpoint_rebuilds_the_forecaster(sharded: Path) -> None:
    forecaster, _ = checkpoint.load_forecaster(sharded / "checkpoints/best.ckpt")
    stored = checkpoint.read(sharded / "checkpoints/best.ckpt")["state_dict"]
    assert all(type(weight) is Tensor for weight in stored.values())
    torch.testing.assert_close(
        {f"forecaster.{name}": weight for name, weight in forecaster.state_dict().items()}, stored, rtol=0, atol=0
    )


@pytest.mark.slow
def test_an_optimizer_without_states_and_half_precision_are_sharded_too(tmp_path: Path) -> None:
    half = ["trainer.precision=bf16-mixed", "optimizer.momentum=0"]
    commands.run(*RECIPE, "trainer=fsdp", "trainer.max_epochs=1", *half, folder=tmp_path)
    content = checkpoint.read(tmp_path / "checkpoints/last.ckpt")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in content["state_dict"].values())


def test_every_way_through_a_layer_gives_the_gradients_of_the_whole_network() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**commands.ENVIRONMENT, "PYTHONPATH": str(commands.ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]


class Feedback(nn.Module):
    """Feeds each output back as the next input, time by time."""

    def __init__(self) -> None:
        super().__init__()
        cell = partial(LSTM, spatial_dims=2, learned_initial_state=True)
        self.stack = Stack([Layer(cell(1, 3)), Layer(cell(3, 5))])
        self.output = nn.Conv2d(5, 1, 1)

    def forward(self, past: Tensor) -> Tensor:
        x, state, outputs = past[:, -1], None, []
        for _ in range(4):
            hidden, state = self.stack.step(x, state)
            x = self.output(hidden[-1])
            outputs.append(x)
        return torch.stack(outputs, dim=1)


def carried(network: nn.Module, past: Tensor) -> Tensor:
    """A window whose second lane goes on from the state that the first call left; its first lane starts anew."""
    static = past.new_zeros(past.shape[0], 0, *past.shape[-2:])
    with torch.no_grad():
        before = network(past, 3, static=static).state
    return network(past, 3, static=static, state=before, first=torch.tensor([True, False])).raw


def compare_gradients(make: Callable[[], nn.Module], answer: Callable[[Any, Tensor], Tensor]) -> None:
    """Holds a sharded network's gradients, a mean over two processes, against those of a network left whole.

    After a forecast without gradients, too, every weight is in shares again: who zeroes them by the network misses none.
    """
    mesh = distributed.init_device_mesh("cpu", (2,))
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(make())
    shard(networks[1], mesh)
    for step in range(2):  # the second adds to the gradients of the first
        past = torch.randn(2, 5, 1, 6, 6, generator=torch.Generator().manual_seed(2 * step + mesh.get_rank()))
        for network in networks:
            answer(network, past).square().mean().backward()
    for (name, weight), shared in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        distributed.all_reduce(weight.grad)
        torch.testing.assert_close(shared.grad.full_tensor(), weight.grad / 2, msg=name)
    with torch.no_grad():
        answer(networks[1], past)
    assert all(isinstance(weight, DTensor) for weight in networks[1].parameters())


if __name__ == "__main__":
    compare_gradients(Feedback, lambda network, past: network(past))
    remembering = partial(LSTM, learned_initial_state=True)
    compare_gradients(partial(EncoderForecaster, remembering, [4, 3], inputs=1, outputs=1), carried)
    distributed.destroy_process_group()
