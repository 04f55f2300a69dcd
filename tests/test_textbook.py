"""What every textbook says of recurrences: they spell "hello", and take and give sequences of any length."""

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import Cell, State
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.command_line import load
from forecast.config import build_network
from forecast.recurrence import Layer, Stack

CONF = Path(__file__).parents[1] / "conf"
LETTERS = "helo"


class Speller(nn.Module):
    """Letters -> the odds of the next letter."""

    def __init__(self, cell: Callable[..., Cell]) -> None:
        super().__init__()
        self.stack = Stack([Layer(cell(len(LETTERS), 8))])
        self.output = nn.Linear(8, len(LETTERS))

    def forward(self, letters: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        outputs, states = self.stack.sequence(F.one_hot(letters, len(LETTERS)).float(), states)
        return self.output(outputs[-1]), states


def encoded(word: str) -> Tensor:
    return torch.tensor([[LETTERS.index(letter) for letter in word]])


@torch.no_grad()
def spelled(speller: Speller, temperature: float, generator: torch.Generator) -> tuple[str, float]:
    """What is sampled after an h, letter by letter, and the mean entropy of the draws; temperature 0 takes the likeliest."""
    word, states, entropies = "h", None, []
    for _ in range(4):
        logits, states = speller(encoded(word[-1]), states)
        if temperature:
            odds = (logits[0, 0] / temperature).softmax(dim=0)
            letter = int(torch.multinomial(odds, 1, generator=generator))
            entropies.append(float(torch.special.entr(odds).sum()))
        else:
            letter = int(logits[0, 0].argmax())
        word += LETTERS[letter]
    return word, sum(entropies) / 4


@pytest.mark.parametrize("cell", [RNN, LSTM, GRU])
def test_hello_is_learned_letter_by_letter_and_sampled_back(cell: Callable[..., Cell]) -> None:
    torch.manual_seed(0)
    speller = Speller(cell)
    optimizer = torch.optim.Adam(speller.parameters(), 0.05)
    for _ in range(80):
        logits, _ = speller(encoded("hell"))
        loss = F.cross_entropy(logits[0], encoded("ello")[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    assert spelled(speller, 0, generator)[0] == "hello"
    cold = [spelled(speller, 0.05, generator) for _ in range(20)]
    assert {word for word, _ in cold} == {"hello"}  # though after an l there is an l, and then an o
    assert max(entropy for _, entropy in cold) < 0.01
    hot = [spelled(speller, 1000.0, generator) for _ in range(20)]
    assert len({word for word, _ in hot}) > 15
    assert min(entropy for _, entropy in hot) > 0.999 * log(len(LETTERS))


def adder(inputs: int, from_input: float, from_before: float, bias: float = 0.0) -> Layer:
    """A recurrence with weights set by hand: h(t) = relu(from_input x(t) + from_before h(t-1) + bias)."""
    cell = RNN(inputs, 1, activation="relu")
    with torch.no_grad():
        if cell.input_map is not None:
            cell.input_map.get_parameter("weight").fill_(from_input)
        cell.recurrent_map.get_parameter("weight").fill_(from_before)
        cell.recurrent_map.get_parameter("bias").fill_(bias)
    return Layer(cell)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


lengths = pytest.mark.parametrize("length", [1, 2, 5])


@lengths
def test_as_many_outputs_as_inputs(length: int) -> None:
    """Tx = Ty: a running sum."""
    x = numbers(*range(1, length + 1))
    outputs, _ = Stack([adder(1, 1.0, 1.0)]).sequence(x)
    assert torch.equal(outputs[-1], x.cumsum(dim=1))


@lengths
def test_one_output_for_many_inputs(length: int) -> None:
    """n -> 1: a sum, read off the last state."""
    _, ((total,),) = Stack([adder(1, 1.0, 1.0)]).sequence(numbers(*range(1, length + 1)))
    assert total.item() == length * (length + 1) / 2


@lengths
def test_many_outputs_for_one_input(length: int) -> None:
    """1 -> n: a number is the state that is halved again and again."""
    outputs, _ = Stack([adder(0, 0.0, 0.5)]).sequence(None, [(torch.tensor([[32.0]]),)], length)
    assert outputs[-1].flatten().tolist() == [16.0, 8.0, 4.0, 2.0, 1.0][:length]


@pytest.mark.parametrize(("Tx", "Ty"), [(3, 7), (7, 3), (1, 5), (5, 1)])
def test_other_numbers_of_outputs_than_inputs(Tx: int, Ty: int) -> None:
    """Tx != Ty: an encoder counts its frames, a forecaster counts down from there."""
    encoder, forecaster = Stack([adder(1, 1.0, 1.0)]), Stack([adder(0, 0.0, 1.0, bias=-1.0)])
    _, states = encoder.sequence(torch.ones(1, Tx, 1))
    outputs, _ = forecaster.sequence(None, states, Ty)
    assert outputs[-1].flatten().tolist() == [float(max(Tx - s, 0)) for s in range(1, Ty + 1)]


@pytest.mark.parametrize("name", ["convlstm", "lstm"])
def test_the_number_of_parameters_is_the_same_for_any_lengths(name: str) -> None:
    counts = set()
    for Tx, Ty in ((3, 7), (10, 1)):
        model = load(CONF, [f"model={name}", "model.network.hidden=[4]", f"data.past={Tx}", f"data.future={Ty}"]).model
        network, _ = build_network(model, channels=1, static_channels=0, size=(8, 8))
        assert network(torch.rand(1, Tx, 1, 8, 8), Ty, static=torch.zeros(1, 0, 8, 8)).raw.shape == (1, Ty, 1, 8, 8)
        counts.add(sum(weight.numel() for weight in network.parameters()))
    assert len(counts) == 1
