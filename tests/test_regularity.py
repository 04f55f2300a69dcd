"""Zoneout, variational dropout, normalisation and layers above a recurrence: what each does, and what each leaves alone."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.cell import Cell, State
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.cells.rnn import RNN
from forecast.command_line import load
from forecast.config import build_network
from forecast.errors import UserError
from forecast.networks.encoder_forecaster import EncoderForecaster
from forecast.networks.flat import FlatEncoderForecaster
from forecast.recurrence import Layer, Stack, restart, unroll

CONF = Path(__file__).parents[1] / "conf"
B, T, X, C, H, W = 2, 5, 3, 4, 5, 6
MakeCell = Callable[..., Cell]
CELLS: dict[str, MakeCell] = {
    "lstm": partial(LSTM, peephole=True),
    "gru-after": partial(GRU, reset="after"),
    "gru-before": partial(GRU, reset="before"),
    "gru-none": partial(GRU, reset="none"),
    "rnn": RNN,
}
cells = pytest.mark.parametrize("form", CELLS)
spaces = pytest.mark.parametrize("space", [(), (H, W)], ids=["vectors", "fields"])


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.5)
    return module.double()


def pair(form: str, space: tuple[int, ...] = (H, W), **options: Any) -> tuple[Cell, Cell]:
    """A cell as it is, and with options, with the same weights."""
    plain = randomised(CELLS[form](X, C, spatial_dims=len(space)))
    other = CELLS[form](X, C, spatial_dims=len(space), **options).double()
    other.load_state_dict(plain.state_dict())
    return plain, other


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def some_state(cell: Cell, batch: int = B, space: tuple[int, ...] = (H, W)) -> State:
    return tuple(normal(batch, C, *space) * scale for scale in (1.0, 0.6)[: cell.states])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def same(ours: State, theirs: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Zoneout


@spaces
@cells
def test_zoneout_of_nothing_changes_no_bit(form: str, space: tuple[int, ...]) -> None:
    plain, other = pair(form, space, zoneout=[0.0] * CELLS[form](1, 1).states)
    x, start = normal(B, T, X, *space), some_state(plain, space=space)
    ours, theirs = (unroll(cell, cell.project(x), start, T) for cell in (other, plain))
    assert torch.equal(ours[0], theirs[0])
    assert same(ours[1], theirs[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@cells
def test_zoneout_of_everything_keeps_the_initial_state_for_ever(form: str, training: bool) -> None:
    _, other = pair(form, zoneout=1.0)
    other.train(training)
    start = some_state(other)
    outputs, last = unroll(other, other.project(normal(B, T, X, H, W)), start, T)
    assert same(last, start)
    assert torch.equal(outputs, start[0].unsqueeze(1).expand_as(outputs))


@spaces
@cells
def test_evaluation_mixes_old_and_new_by_their_shares(form: str, space: tuple[int, ...]) -> None:
    shares = (0.2, 0.6)[: CELLS[form](1, 1).states]
    plain, other = pair(form, space, zoneout=list(shares))
    x, state = normal(B, T, X, *space), some_state(plain, space=space)
    outputs, last = unroll(other.eval(), other.project(x), state, T)
    for t in range(T):
        new = Layer(plain).step(x[:, t], state)[1]
        state = tuple(p * a + (1 - p) * b for p, a, b in zip(shares, state, new, strict=True))
        close(outputs[:, t], state[0])
    for ours, theirs in zip(last, state, strict=True):
        close(ours, theirs)


@cells
def test_training_keeps_or_replaces_each_number_and_its_mean_is_the_evaluation(form: str) -> None:
    shares, lanes = (0.1, 0.5)[: CELLS[form](1, 1).states], 2000
    plain, other = pair(form, (2, 2), zoneout=list(shares))
    x, old = normal(1, X, 2, 2), some_state(plain, 1, (2, 2))
    new = Layer(plain).step(x, old)[1]
    torch.manual_seed(1)
    drawn = Layer(other).step(x.repeat(lanes, 1, 1, 1), tuple(part.repeat(lanes, 1, 1, 1) for part in old))[1]
    expected = Layer(other.eval()).step(x, old)[1]
    for part, before, after, mean, p in zip(drawn, old, new, expected, shares, strict=True):
        stays = (part - before).abs() < 1e-12
        assert (stays | ((part - after).abs() < 1e-12)).all()
        error = (before - after).abs() * (p * (1 - p) / lanes) ** 0.5
        assert ((part.mean(dim=0) - mean).abs() <= 4 * error).all()
        # No two numbers share their luck: their correlation over lanes is that of independent ones.
        together = torch.corrcoef(stays.flatten(1).double().T).fill_diagonal_(0)
        assert together.abs().max() < 5 / lanes**0.5


def test_every_step_draws_anew() -> None:
    _, other = pair("rnn", zoneout=0.5)
    torch.manual_seed(0)
    outputs, _ = unroll(other, other.project(normal(B, T, X, H, W)), some_state(other), T)
    stays = [outputs[:, t] == outputs[:, t - 1] for t in range(1, T)]
    for i, mask in enumerate(stays):
        assert 0.35 < mask.double().mean() < 0.65
        assert not any(torch.equal(mask, later) for later in stays[i + 1 :])


# Variational dropout


@spaces
@cells
def test_a_hidden_channel_is_a_column_of_zeros_in_the_recurrent_map(form: str, space: tuple[int, ...]) -> None:
    plain, other = pair(form, space, dropout=0.5)
    x = normal(1, T, X, *space)
    torch.manual_seed(4)
    start = other.initial_state(1, space, x)
    mask = start[-1].flatten()
    assert set(mask.tolist()) == {0.0, 2.0}
    start = (*some_state(plain, 1, space), start[-1])
    outputs, last = unroll(other, other.project(x), start, T)
    assert torch.equal(last[-1], start[-1])
    with torch.no_grad():
        for name in ("recurrent_map", "candidate_map"):
            linear = getattr(plain, name, None)
            if linear is not None:
                linear.weight.mul_(mask.view(1, C, *(1,) * len(space)))
    expected, ending = unroll(plain, plain.project(x), start[:-1], T)
    close(outputs, expected)
    for ours, theirs in zip(last[:-1], ending, strict=True):
        close(ours, theirs)


@spaces
def test_a_mask_hides_whole_channels_of_each_sequence_by_itself(space: tuple[int, ...]) -> None:
    cell, like = LSTM(X, 50, spatial_dims=len(space), dropout=0.2), torch.zeros(1)
    torch.manual_seed(0)
    mask = cell.initial_state(40, space, like)[-1]
    assert mask.shape == (40, 50, *(1,) * len(space))
    assert set(mask.unique().tolist()) == {0.0, 1.25}
    assert (mask == 0).double().mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
    assert len({tuple(lane) for lane in mask.flatten(1).tolist()}) == 40
    assert not torch.equal(cell.initial_state(40, space, like)[-1], mask)


@cells
def test_evaluation_hides_nothing_whatever_the_mask(form: str) -> None:
    plain, other = pair(form, dropout=0.5)
    x, begun = normal(B, T, X, H, W), other.initial_state(B, (H, W), normal(1))
    assert (begun[-1] == 0).any()
    other.eval()
    expected, _ = unroll(plain, plain.project(x), plain.initial_state(B, (H, W), x), T)
    for start in (begun, other.initial_state(B, (H, W), x)):
        assert torch.equal(unroll(other, other.project(x), start, T)[0], expected)
    assert (start[-1] == 1).all()


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "2015": partial(EncoderForecaster, hidden=[4, 6], patch=2),
    "2017": partial(
        EncoderForecaster,
        hidden=[4, 6],
        down=[{"channels": 3, "kernel": 3, "stride": 2, "padding": 1}] * 2,
        up=[{"channels": 3, "kernel": 4, "stride": 2, "padding": 1}] * 2,
        refine=[5],
    ),
    "flat": partial(FlatEncoderForecaster, hidden=[4, 6], frame_size=(8, 8), tile=4),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def network_of(name: str, form: str = "lstm", *, above: tuple[int, ...] = (), **options: Any) -> Any:
    return randomised(NETWORKS[name](partial(CELLS[form], **options), inputs=1, outputs=1, above=above))


@pytest.mark.parametrize("form", ["lstm", "gru-before"])
@networks
def test_a_carried_state_goes_on_with_its_mask_and_a_lane_that_restarts_draws_a_new_one(name: str, form: str) -> None:
    network, past = network_of(name, form, dropout=0.5), normal(B, 10, 1, 8, 8)
    static = past.new_zeros(B, 0, 8, 8)
    torch.manual_seed(5)
    whole = network(past, 3, static=static)
    torch.manual_seed(5)
    state = network(past[:, :4], 3, static=static).state
    for first in (None, torch.zeros(B, dtype=torch.bool)):
        after = network(past[:, 4:], 3, static=static, state=state, first=first)
        close(after.raw, whole.raw)
        for ours, theirs in zip(after.state, whole.state, strict=True):
            assert torch.equal(ours[-1], theirs[-1])
    mixed = network.encode(past[:, 4:], state, torch.tensor([True, False]))
    half = mixed[0][-1].shape[0] // 2  # the rows of a lane: one, or its tiles
    masks = [torch.cat([layer[-1].flatten(1) for layer in states], dim=1) for states in (mixed, state)]
    assert not torch.equal(masks[0][:half], masks[1][:half])
    assert torch.equal(masks[0][half:], masks[1][half:])


def test_a_restarted_lane_takes_mask_and_state_together() -> None:
    cell = LSTM(X, C, spatial_dims=2, dropout=0.5)
    fresh, carried = (cell.initial_state(3, (H, W), torch.zeros(1)) for _ in range(2))
    state = restart(fresh, carried, torch.tensor([True, False, True]))
    for part, new, old in zip(state, fresh, carried, strict=True):
        assert torch.equal(part[[0, 2]], new[[0, 2]])
        assert torch.equal(part[1], old[1])


def test_the_forecaster_goes_on_with_its_encoders_masks() -> None:
    network, past = network_of("2015", dropout=0.5), normal(B, 3, 1, 8, 8)
    torch.manual_seed(6)
    raw = network(past, 2, static=past.new_zeros(B, 0, 8, 8)).raw
    torch.manual_seed(6)
    states = network.encode(past)
    for t in range(2):
        hidden, states = network.forecaster.step(None, states)
        close(raw[:, t], F.pixel_shuffle(network.output(torch.cat(hidden, dim=1)), 2))


def test_both_directions_have_a_mask_each() -> None:
    ahead, back = (randomised(LSTM(X, C, spatial_dims=2, dropout=0.5)) for _ in range(2))
    both, x = Layer(ahead, back), normal(B, T, X, H, W)
    torch.manual_seed(7)
    state = both.initial_state(B, (H, W), x)
    assert len(state) == 6
    assert not torch.equal(state[2], state[5])
    outputs, last = both.sequence(x, state, T)
    forward, ending = Layer(ahead).sequence(x, state[:3], T)
    backward, ending_back = Layer(back).sequence(x.flip(1), state[3:], T)
    assert torch.equal(outputs, torch.cat([forward, backward.flip(1)], dim=2))
    assert same(last, ending + ending_back)


# Normalisation


def layer_norm(values: Tensor, norm: nn.Module, groups: int) -> Tensor:
    """B C *space, over a group of channels and all space: the equation."""
    grouped = values.reshape(values.shape[0], groups, -1)
    mean, variance = grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, keepdim=True, correction=0)
    scaled = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(values.shape)
    gain, bias = (getattr(norm, name).view(1, -1, *(1,) * (values.dim() - 2)) for name in ("weight", "bias"))
    return gain * scaled + bias


@pytest.mark.parametrize("groups", [1, 2])
@spaces
def test_a_normalised_lstm_is_that_of_ba_et_al(space: tuple[int, ...], groups: int) -> None:
    cell = randomised(LSTM(X, C, spatial_dims=len(space), norm=groups))
    x, (h, c) = normal(B, T, X, *space), some_state(cell, space=space)
    outputs, _ = unroll(cell, cell.project(x), (h, c), T)
    W_x, W_h, out = cell.input_map, cell.recurrent_map, cell.state_norm
    for t in range(T):
        gates = layer_norm(W_x.linear(x[:, t]), W_x.norm, groups) + layer_norm(W_h.linear(h), W_h.norm, groups)
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, out, groups))
        close(outputs[:, t], h)


@pytest.mark.parametrize("reset", ["after", "before", "none"])
@spaces
def test_a_normalised_gru_has_every_map_normalised(space: tuple[int, ...], reset: str) -> None:
    cell = randomised(GRU(X, C, spatial_dims=len(space), norm=2, reset=reset))
    x, (h,) = normal(B, T, X, *space), some_state(RNN(X, C), space=space)
    outputs, _ = unroll(cell, cell.project(x), (h,), T)
    for t in range(T):
        of_x = layer_norm(cell.input_map.linear(x[:, t]), cell.input_map.norm, 2).split(C, dim=1)
        of_h = layer_norm(cell.recurrent_map.linear(h), cell.recurrent_map.norm, 2).split(C, dim=1)
        if reset == "none":
            z, n = torch.sigmoid(of_x[0] + of_h[0]), torch.tanh(of_x[1] + of_h[1])
        else:
            r, z = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
            late = cell.candidate_map
            n = torch.tanh(of_x[2] + (r * of_h[2] if late is None else layer_norm(late.linear(r * h), late.norm, 2)))
        h = z * h + (1 - z) * n
        close(outputs[:, t], h)


def test_a_normalised_vector_rnn_has_torchs_layer_norm() -> None:
    cell = randomised(RNN(X, C, norm=1))
    x, (h,) = normal(B, T, X), some_state(RNN(X, C), space=())
    outputs, _ = unroll(cell, cell.project(x), (h,), T)
    for t in range(T):
        parts = ((cell.input_map, x[:, t]), (cell.recurrent_map, h))
        h = torch.tanh(sum(F.layer_norm(m.linear(v), [C], m.norm.weight, m.norm.bias) for m, v in parts))
        close(outputs[:, t], h)


@cells
def test_norm_fixes_no_size_and_takes_two_numbers_per_channel(form: str) -> None:
    norm = CELLS[form](X, C, spatial_dims=2, norm=1).double()
    for size in ((3, 9), (5, 6), (1, 1)):
        outputs, _ = unroll(norm, norm.project(normal(B, T, X, *size)), norm.initial_state(B, size, normal(1)), T)
        assert outputs.shape == (B, T, C, *size)
        assert torch.isfinite(outputs).all()
    maps = [part for part in norm.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in norm.modules() if isinstance(part, nn.GroupNorm)]
    assert all(part.bias is None for part in maps)
    assert len(norms) == len(maps) + (form == "lstm")


def test_the_forget_bias_is_added_after_normalising() -> None:
    bias = LSTM(2, 4, forget_bias=7.0, norm=1).recurrent_map.get_parameter("norm.bias").detach()
    assert (bias == 7).tolist() == [False] * 4 + [True] * 4 + [False] * 8


# Layers above a recurrence


@spaces
def test_layers_above_change_what_is_read_and_not_the_state(space: tuple[int, ...]) -> None:
    cell = randomised(LSTM(X, C, spatial_dims=len(space)))
    plain, deep = Layer(cell), Layer(cell, above=[7, 5]).double()
    x = normal(B, T, X, *space)
    hidden, last = plain.sequence(x, None, T)
    outputs, deep_last = deep.sequence(x, None, T)
    assert same(deep_last, last)
    assert outputs.shape == (B, T, 5, *space)
    assert deep.above is not None
    (first, _), (second, _) = deep.above
    state = None
    for t in range(T):
        by_hand = F.leaky_relu(second(F.leaky_relu(first(hidden[:, t]), 0.2)), 0.2)
        close(outputs[:, t], by_hand)
        output, state = deep.step(x[:, t], state)
        close(output, by_hand)


@networks
def test_what_stands_above_an_encoders_last_layer_would_be_read_by_nobody(name: str) -> None:
    network = network_of(name, above=(5,))
    assert [layer.above is not None for layer in network.encoder.layers] == [True, False]
    assert all(layer.above is not None for layer in network.forecaster.layers)


# All of them


OPTIONS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.3},
    "dropout": {"dropout": 0.4},
    "norm": {"norm": 2},
    "above": {"above": (5, 6)},
    "all": {"zoneout": 0.3, "dropout": 0.4, "norm": 2, "above": (5, 6), "learned_initial_state": True},
}
options = pytest.mark.parametrize("option", OPTIONS)


@options
@networks
def test_every_parameter_learns(name: str, option: str) -> None:
    network, past = network_of(name, **OPTIONS[option]), normal(B, 3, 1, 8, 8)
    torch.manual_seed(0)
    network(past, 2, static=past.new_zeros(B, 0, 8, 8)).raw.square().mean().backward()
    for key, weight in network.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().sum() > 0, key


@options
@pytest.mark.parametrize("form", ["lstm", "gru-after"])
def test_layer_by_layer_equals_step_by_step(form: str, option: str) -> None:
    given = dict(OPTIONS[option])
    above = given.pop("above", ())
    lower, upper = (CELLS[form](n, C, spatial_dims=2, **given) for n in (X, above[-1] if above else C))
    stack = randomised(Stack([Layer(lower, above=above), Layer(upper, above=above)]))
    stack.train(option == "dropout")
    x = normal(B, T, X, H, W)
    states = [layer.initial_state(B, (H, W), x) for layer in stack.layers]
    outputs, last = stack.sequence(x, states)
    for t in range(T):
        now, states = stack.step(x[:, t], states)
        for depth in range(2):
            close(now[depth], outputs[depth][:, t])
    for ours, theirs in zip(states, last, strict=True):
        assert len(ours) == len(theirs)
        for part, their_part in zip(ours, theirs, strict=True):
            close(part, their_part)


LISTED: dict[str, list[Any]] = {"zoneout": [0.4], "dropout": [0.4], "norm": [1, 2], "above": [[6]]}


@pytest.mark.parametrize("name", ["convlstm", "convgru", "convrnn", "lstm", "hko7_convgru"])
def test_every_option_is_listed_for_every_model_and_changes_its_training(name: str) -> None:
    plain: Any = OmegaConf.to_container(load(CONF, [f"model={name}", "model.network.hidden=[4,4,4]"]).model)
    past, static = normal(B, 2, 1, 30, 30).float(), torch.zeros(B, 0, 30, 30)

    def answer(model: Any) -> Tensor:
        torch.manual_seed(0)
        network, _ = build_network(model, channels=1, static_channels=0, size=(30, 30))
        for weight in network.parameters():
            nn.init.constant_(weight, 0.02)
        return network(past, 2, static=static).raw

    usual = answer(plain)
    for option, values in LISTED.items():
        for value in values:
            changed = deepcopy(plain)
            part = changed["network"] if option in changed["network"] else changed["network"]["cell"]
            assert option in part
            part[option] = value
            assert not torch.equal(answer(changed), usual), (option, value)


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: RNN(1, 2, zoneout=1.5), "zoneout is 1.5; it must be from 0"),
        (lambda: LSTM(1, 2, zoneout=[0.1, -0.1]), "zoneout is .0.1, -0.1.; it must be from 0"),
        (lambda: LSTM(1, 2, zoneout=[0.1]), "this cell has a state of 2; give one number, or one for each"),
        (lambda: GRU(1, 2, zoneout=[0.1, 0.1]), "this cell has a state of 1; give one number, or one for each"),
        (lambda: GRU(1, 2, dropout=1.0), "dropout is 1.0; it must be at least 0"),
        (lambda: GRU(1, 2, dropout=-0.1), "dropout is -0.1; it must be at least 0"),
        (lambda: LSTM(1, 4, norm=3), "norm is 3; it must be null .none., 1 .*4 hidden channels"),
        (lambda: LSTM(1, 4, norm=4), "norm is 4; it must be null"),
        (lambda: LSTM(1, 4, norm=0), "norm is 0; it must be null"),
        (lambda: LSTM(1, 4, norm=1, bias=False, forget_bias=0.0), "Normalisation brings a bias"),
        (lambda: Layer(RNN(1, 2), above=[3, 0]), "above is .3, 0.; give channels of 1 or more"),
    ],
)
def test_wrong_choices_are_refused(make_wrong: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_wrong()
    assert "\n" not in str(caught.value)
