"""Gradients against lag are those of the chain rule, and to measure them changes nothing."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from commands import ROOT
from torch import Tensor, nn

import train
from datamodules.moving_digits import MovingDigitsData
from forecast import command_line, config, gradients
from forecast.callbacks.gradient_flow import GradientFlow, losses_of
from forecast.cells.cell import Cell
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.errors import UserError
from forecast.forecaster import NetworkForecaster
from forecast.gradients import factors, flow, recorded
from forecast.logs import MetricsFile
from forecast.module import NowcastModule
from forecast.recurrence import Layer, Stack


class Chain(nn.Module):
    """One recurrent layer over vectors, B T X, whose loss is a . h(T)."""

    def __init__(self, cell: Cell, x: Tensor) -> None:
        super().__init__()
        self.stack = Stack([Layer(cell)])
        self.x = x
        self.a = torch.linspace(1, 2, cell.hidden_channels, dtype=x.dtype)

    def losses(self) -> tuple[Tensor, Tensor]:
        outputs = self.stack.sequence(self.x)[0][0]
        return (outputs[:, -1] * self.a).sum(), outputs.sum()

    def norms(self, part: str = "h") -> list[float]:
        """By lag, from 0 on."""
        table = flow(self, self.losses, steps=1)
        rows = table[table["name"] == f"stack.0/{part}"].sort_values("lag")
        assert rows["lag"].tolist() == list(range(self.x.shape[1]))
        return rows["norm"].tolist()


def linear(matrix: list[list[float]], steps: int = 10) -> Chain:
    """h(t) = W h(t-1) + 1 with weights of 0 and more: the ReLU of what is positive."""
    cell = RNN(1, len(matrix), activation="relu").double()
    with torch.no_grad():
        for weight in cell.parameters():
            weight.fill_(1.0)
        cell.get_parameter("recurrent_map.weight").copy_(torch.tensor(matrix))
    return Chain(cell, torch.zeros(1, steps, 1, dtype=torch.float64))


def test_a_vanilla_recurrence_has_the_product_of_its_jacobians() -> None:
    torch.manual_seed(0)
    cell = RNN(2, 5).double()
    chain = Chain(cell, torch.randn(1, 8, 2, dtype=torch.float64))
    h = chain.stack.sequence(chain.x)[0][0][0].detach().numpy()
    weight = cell.get_parameter("recurrent_map.weight").detach().numpy()
    gradient = chain.a.numpy()
    expected = [np.linalg.norm(gradient)]
    for t in range(7, 0, -1):
        gradient = weight.T @ ((1 - h[t] ** 2) * gradient)
        expected.append(np.linalg.norm(gradient))
    np.testing.assert_allclose(chain.norms(), expected, rtol=1e-10)


def test_an_lstm_has_the_gradients_of_torchs() -> None:
    torch.manual_seed(0)
    cell, theirs = LSTM(2, 4).double(), nn.LSTM(2, 4, batch_first=True).double()
    chain = Chain(cell, torch.randn(3, 6, 2, dtype=torch.float64))
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(cell.get_parameter("input_map.weight"))
        theirs.weight_hh_l0.copy_(cell.get_parameter("recurrent_map.weight"))
        theirs.bias_ih_l0.copy_(cell.get_parameter("recurrent_map.bias"))
        theirs.bias_hh_l0.zero_()
    of_h, of_c = [], []
    for t in range(1, 6):
        h, c = (one.detach().requires_grad_() for one in theirs(chain.x[:, :t])[1])
        by_h, by_c = torch.autograd.grad((theirs(chain.x[:, t:], (h, c))[0][:, -1] * chain.a).sum(), (h, c))
        of_h.append(by_h.norm().item())
        # c(t) reaches the loss through h(t) = o tanh(c(t)) as well.
        of_c.append((by_c + by_h * h / torch.tanh(c) * (1 - torch.tanh(c) ** 2)).norm().item())
    np.testing.assert_allclose(chain.norms("h")[:0:-1], of_h, rtol=1e-10)
    np.testing.assert_allclose(chain.norms("c")[:0:-1], of_c, rtol=1e-10)


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.5])
def test_a_linear_recurrence_vanishes_holds_and_explodes_by_its_weight(weight: float) -> None:
    chain = linear([[weight]])
    np.testing.assert_allclose(chain.norms(), [weight**lag for lag in range(10)], rtol=1e-12)
    assert factors(flow(chain, chain.losses, 1)) == {"stack.0/h": pytest.approx(weight, rel=1e-9)}


def test_singular_values_bound_the_gradient_and_eigenvalues_set_its_rate() -> None:
    """docs/gradients.md: a matrix that does not commute with its transpose."""
    norms = linear([[0.0, 5.0], [0.0, 0.0]]).norms()
    assert norms[1] == pytest.approx(5.0)  # of a = (1, 2): |a| is 5^0.5, and 5 |a| the bound
    assert norms[2:] == [0.0] * 8

    matrix = [[0.5, 5.0], [0.0, 0.5]]
    largest = np.linalg.norm(matrix, ord=2)
    assert largest > 5
    norms = linear(matrix, steps=60).norms()
    assert all(norm <= largest**lag * norms[0] * (1 + 1e-12) for lag, norm in enumerate(norms))
    assert norms[1] > 2 * norms[0]  # it grows before it decays
    assert norms[59] / norms[58] == pytest.approx(0.5, abs=0.01)
    assert norms[59] < 1e-14


def composed(*overrides: str) -> tuple[NowcastModule, MovingDigitsData]:
    tiny = ["data.train=8", "data.validation=5", "data.test=4", "data.batch_size=4", "data.past=3", "data.future=2"]
    cfg = command_line.load(ROOT / "conf", [*tiny, "data.size=24", "folder=nowhere", *overrides])
    pl.seed_everything(0, verbose=False)
    data = config.build(cfg.data)
    data.setup()
    return train.make_module(cfg, data), data


def network_of(module: NowcastModule) -> nn.Module:
    assert isinstance(module.forecaster, NetworkForecaster)
    return module.forecaster.network


class NextDraws(pl.Callback):
    """The state of the random numbers when training begins, and after a validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states = [torch.get_rng_state()]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(torch.get_rng_state())


def trained(folder: Path, *callbacks: pl.Callback) -> tuple[NowcastModule, list[Tensor]]:
    """A training of two steps, and the states of the random numbers after the callbacks."""
    draws = NextDraws()
    module, data = composed("model=convlstm", "model.network.hidden=[3,3]")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=MetricsFile(str(folder / "metrics.csv")),
        callbacks=[*callbacks, draws],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return module, draws.states


def test_training_is_the_same_bit_by_bit_and_leaves_its_measurements(tmp_path: Path) -> None:
    plain, following = trained(tmp_path / "plain")
    folder = tmp_path / "watched"
    folder.mkdir()
    # Of a run that was killed after step 5, and began anew.
    (folder / gradients.NAME).write_text(
        "step,kind,name,lag,norm\n0,state,encoder.0/h,1,7.0\n5,state,encoder.0/h,1,7.0\n"
    )
    watched, drawn = trained(folder, GradientFlow(str(folder)))
    assert len(drawn) == 2
    assert all(map(torch.equal, drawn, following))
    for (name, one), (_, other) in zip(watched.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(one, other), name

    table = gradients.read(folder / gradients.NAME)
    assert sorted(set(table["step"])) == [0, 2]
    assert table["norm"].max() < 7
    factor = factors(table[table["step"] == 2])
    assert {"encoder.0/h", "encoder.1/c", "forecaster.0/h"} < set(factor)
    with (folder / "metrics.csv").open(newline="") as file:
        row = {int(row["step"]): row for row in csv.DictReader(file)}[1]
    for name, value in factor.items():
        assert float(row[f"gradient_flow/{name}"]) == pytest.approx(value, rel=1e-6)
    assert (folder / "figures" / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "parts", "lags"),
    [
        ("convlstm", "hc", {"encoder": [2, 3, 4], "forecaster": [0, 1]}),
        ("lstm", "hc", {"encoder": [2, 3, 4], "forecaster": [0, 1]}),
        ("convgru", "h", {"encoder": [2, 3, 4], "forecaster": [0, 1]}),
        ("convrnn", "h", {"encoder": [2, 3, 4], "forecaster": [0, 1]}),
        ("next_frame", "hc", {"stack": [0, 1, 2, 3]}),
        ("predrnn", "hcm", {"cells": [0, 1, 2, 3]}),
    ],
)
def test_every_state_of_every_layer_is_measured_and_every_weight(
    model: str, parts: str, lags: dict[str, list[int]]
) -> None:
    module, data = composed(f"model={model}", "model.network.hidden=[3,3]")
    network = network_of(module)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    table = flow(network, losses_of(module, batch), module.future)
    states = table[table["kind"] == "state"]
    for stack, expected in lags.items():
        for name in (f"{stack}.{layer}/{part}" for layer in (0, 1) for part in parts):
            assert sorted(states[states["name"] == name]["lag"]) == expected
            assert (states[states["name"] == name]["norm"] > 0).all()
    assert len(states) == 2 * len(parts) * sum(map(len, lags.values()))
    assert all(weight.grad is None for weight in network.parameters())

    weights = table[table["kind"] == "weight"].set_index("name")["norm"]
    module.eval()
    raw = module.forecaster(batch.past, 2, batch.static).raw[:, -2:]  # type: ignore[operator]  # a module
    ((raw - batch.truth)[batch.valid] ** 2).mean().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None
        assert weights.pop(name) == pytest.approx(weight.grad.double().norm().item(), rel=1e-4)
    assert weights.empty


def test_what_is_frozen_or_half_broken_is_left_as_it_was() -> None:
    chain = Chain(RNN(1, 2).requires_grad_(False), torch.ones(1, 4, 1))
    chain.train()
    head = nn.Linear(2, 1)
    chain.head = head

    def losses() -> tuple[Tensor, Tensor]:
        outputs = head(chain.stack.sequence(chain.x)[0][0])
        return outputs[:, -1].sum(), outputs.sum()

    table = flow(chain, losses, 1)
    assert (table["norm"] > 0).all()
    assert set(table[table["kind"] == "weight"]["name"]) == {"head.weight", "head.bias"}
    assert chain.training
    assert head.weight.grad is None
    cell = chain.stack.layers[0].forward_cell
    assert cell is not None
    with pytest.raises(ValueError, match="no input"), recorded(chain):
        cell.project(None)
    assert "step_and_gates" not in vars(cell)


def test_a_network_without_steps_is_refused() -> None:
    module, data = composed("model=unet", "model.network.widths=[2,2]")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with pytest.raises(UserError, match="this network makes none"):
        flow(network_of(module), losses_of(module, batch), module.future)


def test_gradients_of_zero_leave_gaps() -> None:
    """Those of a batch without a valid pixel, or of a recurrence whose ReLUs are dead."""
    chain = linear([[0.0]], steps=4)
    table = flow(chain, lambda: tuple(0 * loss for loss in chain.losses()), 1)  # type: ignore[arg-type, return-value]  # two
    table.insert(0, "step", 0)
    assert factors(table) == {}
    assert [np.isnan(line.get_ydata()).all() for line in gradients.flow_figure({"dead": table}).axes[0].lines] == [
        True
    ] * 2  # type: ignore[arg-type]  # an array


def test_sharded_weights_are_refused() -> None:
    module = cast(pl.LightningModule, SimpleNamespace(device_mesh=object()))
    with pytest.raises(UserError, match="trainer=fsdp shards them"):
        GradientFlow("nowhere").on_train_start(pl.Trainer(accelerator="cpu", logger=False), module)


def test_runs_are_drawn_side_by_side_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cell in (("vanilla", RNN(1, 2)), ("gated", LSTM(1, 2))):
        chain = Chain(cell, torch.ones(1, 4, 1))
        table = flow(chain, chain.losses, 1)
        table.insert(0, "step", 0)
        (tmp_path / name).mkdir()
        table.to_csv(tmp_path / name / gradients.NAME, index=False)
    runs = [str(tmp_path / name) for name in ("vanilla", "gated")]
    figure = gradients.flow_figure({Path(run).name: gradients.read(Path(run) / gradients.NAME) for run in runs})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["vanilla", "gated", "", ""]
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 0, 2]
    monkeypatch.setattr(sys, "argv", ["gradients", *runs, "--output", str(tmp_path / "both.png")])
    gradients.main()
    assert (tmp_path / "both.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["gradients", str(tmp_path), "--output", str(tmp_path / "none.png")])
    with pytest.raises(SystemExit, match="train it with callbacks=gradient_flow"):
        gradients.main()
