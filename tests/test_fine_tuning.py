"""Starting from the weights of another run, and training only a part of them."""

from pathlib import Path

import commands
import pytest
import torch
from test_train import TINY

from forecast import checkpoint

ONE_STEP = ["trainer.max_steps=1", "scheduler=constant"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    commands.run(*TINY, folder=folder)
    return folder / "checkpoints/last.ckpt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    stored = checkpoint.read(path)["state_dict"]
    return {name: value for name, value in stored.items() if name.startswith("forecaster.")}


def test_init_from_takes_the_weights_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    # At a rate of zero the weights stay what they were at the start; another optimizer, loss and seed are no matter.
    other = ["optimizer=sgd", "optimizer.lr=0.0", "loss=mae", "seed=5", f"init_from={trained}"]
    commands.run(*TINY, *ONE_STEP, *other, folder=tmp_path)
    last = checkpoint.read(tmp_path / "checkpoints/last.ckpt")
    assert (last["epoch"], last["global_step"]) == (0, 1)
    after = weights(tmp_path / "checkpoints/last.ckpt")
    for name, value in weights(trained).items():
        assert torch.equal(value, after[name]), name


def test_frozen_parts_stay_and_the_others_learn(trained: Path, tmp_path: Path) -> None:
    commands.run(*TINY, *ONE_STEP, f"init_from={trained}", "freeze=[network.encoder]", folder=tmp_path)
    before, after = weights(trained), weights(tmp_path / "checkpoints/last.ckpt")
    changed = {name: not torch.equal(value, after[name]) for name, value in before.items()}
    for name, has_changed in changed.items():
        assert has_changed != name.startswith("forecaster.network.encoder"), name
    assert len(set(changed.values())) == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.network.hidden=[5]"], "does not fit: for the weight network.encoder"),
        (["model=convgru", "model.network.hidden=[4]"], "choose the model that it was trained with"),
        (["freeze=[network.encodr]"], "did you mean 'network.encoder'?"),
        (["freeze=[network]"], "leaves nothing to train"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides: list[str], said: str, trained: Path, tmp_path: Path) -> None:
    ended = commands.run(*TINY, f"init_from={trained}", *overrides, folder=tmp_path, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert not (tmp_path / "checkpoints").exists()
