"""One image: its states are the forecaster's, of any size and length, with any cell, and one frame is all it takes."""

import io
from functools import partial
from typing import Any

import pytest
import torch
from commands import ROOT
from torch import Tensor, nn

from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.command_line import load
from forecast.config import build_network
from forecast.errors import UserError
from forecast.networks.one_image import OneImage

CELLS: dict[str, Any] = {
    "lstm": partial(LSTM, peephole=True),
    "gru": GRU,
    "rnn": partial(RNN, learned_initial_state=True),
    "dropout": partial(LSTM, dropout=0.5),
}
cells = pytest.mark.parametrize("cell", CELLS)


def made(cell: str = "lstm", inputs: int = 1, seed: int = 0) -> OneImage:
    torch.manual_seed(seed)
    return OneImage(1, CELLS[cell], [5, 6], [8, 7], inputs=inputs, outputs=1, patch=2)


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 1, 1, *size, generator=torch.Generator().manual_seed(1))


def answer(network: nn.Module, past: Tensor, steps: int, static: Tensor | None = None) -> Tensor:
    return network(past, steps, static=past[:, 0, :0] if static is None else static).raw


@cells
@pytest.mark.parametrize("size", [(8, 8), (7, 13)])
def test_any_number_of_frames_of_any_size_comes_of_one_image(cell: str, size: tuple[int, int]) -> None:
    network = made(cell).eval()
    with torch.no_grad():
        long = answer(network, image(*size), 7)
        assert long.shape == (2, 7, 1, *size)
        torch.testing.assert_close(answer(network, image(*size), 3), long[:, :3])
    assert not torch.equal(long[:, 5], long[:, 6])


@cells
def test_every_parameter_learns(cell: str) -> None:
    network = made(cell, inputs=3)
    torch.manual_seed(0)
    answer(network, image(8, 8), 4, torch.rand(2, 2, 8, 8)).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_parameters_are_those_of_its_maps_and_do_not_grow_with_the_forecast() -> None:
    encoder = (9 * 4 + 1) * 8 + (9 * 8 + 1) * 7
    begin = (7 + 1) * 2 * 5 + (7 + 1) * 2 * 6
    first = (9 * 5 + 1) * 20 + 3 * 5  # no input; peepholes
    second = (9 * 5 + 9 * 6 + 1) * 24 + 3 * 6
    network = made()
    answer(network, image(8, 8), 9)
    assert sum(weight.numel() for weight in network.parameters()) == encoder + begin + first + second + (11 + 1) * 4


def test_the_forecast_starts_from_what_the_image_gives_and_from_nothing_else() -> None:
    network, past = made(), image(8, 8)
    with torch.no_grad():
        states = network.encode(past)
        assert [[tuple(one.shape) for one in state] for state in states] == [[(2, 5, 4, 4)] * 2, [(2, 6, 4, 4)] * 2]
        assert torch.equal(network.forecast(states, 4, (8, 8)), answer(network, past, 4))
        # The first step, by hand.
        encoded = network.encoder(nn.functional.pixel_unshuffle(past[:, 0], 2))
        lower, upper = network.forecaster.layers
        assert lower.forward_cell is not None
        assert upper.forward_cell is not None
        h, c = network.begin[0](encoded).split(5, dim=1)
        h, c = lower.forward_cell.step(None, (h.tanh(), c))
        g, d = network.begin[1](encoded).split(6, dim=1)
        g, d = upper.forward_cell.step(upper.forward_cell.project(h.unsqueeze(1))[:, 0], (g.tanh(), d))  # type: ignore[index]  # it has an input
        expected = nn.functional.pixel_shuffle(network.output(torch.cat([h, g], dim=1)), 2)
    torch.testing.assert_close(answer(network, past, 1)[:, 0], expected)


def test_hidden_states_lie_where_a_cells_do_however_bright_the_image() -> None:
    for state in made().encode(1000 * image(8, 8)):
        assert state[0].abs().max() <= 1
        assert state[1].abs().max() > 1


def test_dropout_hides_the_same_channels_of_a_whole_sequence() -> None:
    network = made("dropout")
    for (*_, mask), cell in zip(network.encode(image(8, 8, batch=50)), (5, 6), strict=True):
        assert mask.shape == (50, cell, 1, 1)
        assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_static_fields_are_read() -> None:
    network, past = made(inputs=2), image(8, 8)
    with torch.no_grad():
        one, other = (answer(network, past, 2, torch.full((2, 1, 8, 8), value)) for value in (0.0, 1.0))
    assert (one - other).abs().max() > 1e-3


def test_a_batch_can_be_learned_by_heart() -> None:
    network, past = made(), image(8, 8)
    coarse = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    future = nn.functional.interpolate(coarse, (8, 8), mode="bilinear").view(2, 4, 1, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    for _ in range(200):
        loss = (answer(network, past, 4) - future).square().mean()
        if loss < 0.02 * future.var():
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"{float(loss / future.var()):.2g} of the variance is left")


@cells
def test_weights_come_back_from_a_file(cell: str) -> None:
    network, other, past = made(cell).eval(), made(cell, seed=1).eval(), image(7, 9)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        assert not torch.equal(answer(other, past, 2), answer(network, past, 2))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(answer(other, past, 2), answer(network, past, 2))


def test_the_experiment_is_of_one_image_and_other_pasts_are_refused() -> None:
    cfg = load(ROOT / "conf", ["experiment=one_to_many"])
    network, _ = build_network(cfg.model, channels=1, static_channels=0, size=(48, 48))
    assert isinstance(network, OneImage)
    model = load(ROOT / "conf", ["experiment=one_to_many", "data.past=2"]).model
    with pytest.raises(UserError, match=r"data.past is 2; set data.past=1"):
        build_network(model, channels=1, static_channels=0, size=(48, 48))
    with pytest.raises(UserError, match="reads one frame; received 2"):
        made().encode(image(8, 8).expand(-1, 2, -1, -1, -1))
    with pytest.raises(UserError, match="carries no state"):
        made().encode(image(8, 8), [()])
    with pytest.raises(UserError, match=r"widths is \[\]"):
        OneImage(1, LSTM, [2], [], inputs=1, outputs=1)
