"""The published parameter counts, both forms against their own cells by hand, any length and size, and what is refused."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.command_line import load
from forecast.config import build_network
from forecast.errors import UserError
from forecast.networks.encoder_forecaster import EncoderForecaster

CONF = Path(__file__).parents[1] / "conf"
DOWN = [
    {"channels": 3, "kernel": 5, "stride": 3, "padding": 1},
    {"channels": 6, "kernel": 3, "stride": 2, "padding": 1},
]
UP = [
    {"channels": 3, "kernel": 5, "stride": 3, "padding": 1},
    {"channels": 6, "kernel": 4, "stride": 2, "padding": 1},
]


def make_2015(**options: Any) -> EncoderForecaster:
    given: dict[str, Any] = {"inputs": 1, "outputs": 1, "patch": 2, **options}
    return randomised(EncoderForecaster(partial(LSTM, peephole=True), [4, 3], **given))


def make_2017(**options: Any) -> EncoderForecaster:
    given: dict[str, Any] = {"inputs": 1, "outputs": 1, "down": DOWN, "up": UP, "refine": [5], **options}
    return randomised(EncoderForecaster(partial(GRU, activation="leaky_relu"), [4, 5], **given))


forms = pytest.mark.parametrize("make", [make_2015, make_2017], ids=["2015", "2017"])
Make = Callable[..., EncoderForecaster]


def randomised(network: EncoderForecaster) -> EncoderForecaster:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)
    return network.double()


def frames(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def nothing(past: Tensor) -> Tensor:
    return past.new_zeros(past.shape[0], 0, *past.shape[-2:])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def parameters(overrides: list[str]) -> int:
    with torch.device("meta"):
        network, _ = build_network(load(CONF, overrides).model, channels=1, static_channels=0, size=(64, 64))
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("hidden", "input_kernel", "recurrent_kernel", "count"),
    [
        ([256], 5, 5, 13_524_496),
        ([128, 128], 5, 5, 10_042_896),
        ([128, 64, 64], 5, 5, 7_585_296),
        ([128, 128], 9, 1, 11_550_224),
        ([128, 64, 64], 9, 1, 8_830_480),
    ],
)
def test_convlstm_has_the_parameters_printed_in_2015(
    hidden: list[int], input_kernel: int, recurrent_kernel: int, count: int
) -> None:
    kernels = [f"model.network.input_kernel={input_kernel}", f"model.network.recurrent_kernel={recurrent_kernel}"]
    assert parameters(["model=convlstm", f"model.network.hidden={hidden}", *kernels]) == count


def test_fc_lstm_has_the_parameters_printed_in_2015() -> None:
    assert parameters(["model=lstm", "model.network.hidden=[2048,2048]"]) == 142_667_776


def test_convgru_has_the_parameters_of_hko7() -> None:
    assert parameters(["model=hko7_convgru"]) == 13_649_081


def test_the_2015_form_copies_states_and_reads_all_hidden_states() -> None:
    network, past = make_2015(), frames(2, 3, 1, 8, 6)
    x = F.pixel_unshuffle(past, 2)
    states = [layer.initial_state(2, (4, 3), x) for layer in network.encoder.layers]
    for t in range(3):
        _, states = network.encoder.step(x[:, t], states)
    expected = []
    for _ in range(4):
        hidden, states = network.forecaster.step(None, states)
        expected.append(F.pixel_shuffle(network.output(torch.cat(hidden, dim=1)), 2))
    close(network(past, 4, static=nothing(past)).raw, torch.stack(expected, dim=1))


def test_the_2017_form_goes_down_and_comes_back_up_from_the_coarsest_state() -> None:
    network, past = make_2017(), frames(2, 3, 1, 12, 6)
    fine, coarse = network.encoder.layers
    last, middle = network.forecaster.layers
    for layer, kind in ((fine, nn.Conv2d), (coarse, nn.Conv2d), (middle, nn.ConvTranspose2d)):
        assert isinstance(layer.before, nn.Sequential)
        assert isinstance(layer.before[0], kind)
    assert last.before is None
    a, b = fine.initial_state(2, (4, 2), past), coarse.initial_state(2, (2, 1), past)
    for t in range(3):
        h, a = fine.step(past[:, t], a)
        _, b = coarse.step(h, b)
    expected = []
    for _ in range(4):
        h, b = last.step(None, b)
        h, a = middle.step(h, a)
        expected.append(network.output(h))
    close(network(past, 4, static=nothing(past)).raw, torch.stack(expected, dim=1))


@forms
@pytest.mark.parametrize("size", [(12, 12), (7, 5), (1, 1), (13, 6)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (2, 5), (4, 1)])
def test_any_length_and_any_size_are_taken_by_the_same_weights(
    make: Make, T: int, S: int, size: tuple[int, int]
) -> None:
    network = make(outputs=2, inputs=3, coordinates=True)
    past = frames(2, T, 2, *size)
    output = network(past, S, static=frames(2, 1, *size))
    assert output.raw.shape == (2, S, 2, *size)
    assert torch.isfinite(output.raw).all()


@forms
def test_frames_that_do_not_divide_are_continued_at_the_edge_and_cut_back(make: Make) -> None:
    network, past = make(), frames(2, 3, 1, 11, 5)
    whole = F.pad(past.flatten(0, 1), (0, 1, 0, 1), mode="replicate").unflatten(0, (2, 3))
    close(network(past, 2, static=nothing(past)).raw, network(whole, 2, static=nothing(whole)).raw[..., :11, :5])


@forms
def test_a_longer_forecast_begins_with_the_shorter_one(make: Make) -> None:
    network, past = make(), frames(2, 3, 1, 12, 6)
    close(network(past, 5, static=nothing(past)).raw[:, :2], network(past, 2, static=nothing(past)).raw)


@forms
def test_carried_state_equals_one_uninterrupted_past(make: Make) -> None:
    network, past = make(), frames(2, 6, 1, 11, 5)
    whole = network(past, 3, static=nothing(past))
    before = network(past[:, :4], 3, static=nothing(past))
    goes_on = torch.tensor([False, False])
    for first in (None, goes_on):
        after = network(past[:, 4:], 3, static=nothing(past), state=before.state, first=first)
        close(after.raw, whole.raw)
        for ours, theirs in zip(after.state, whole.state, strict=True):
            for part, their_part in zip(ours, theirs, strict=True):
                close(part, their_part)


@forms
def test_a_lane_that_starts_anew_ignores_the_carried_state(make: Make) -> None:
    network, past = make(), frames(2, 6, 1, 12, 6)
    static = nothing(past)
    carried = network.encode(past[:, :3])
    mixed = network(past[:, 3:], 2, static=static, state=carried, first=torch.tensor([True, False])).raw
    close(mixed[0], network(past[:, 3:], 2, static=static).raw[0])
    close(mixed[1], network(past, 2, static=static).raw[1])


@forms
def test_encode_then_forecast_equals_forward(make: Make) -> None:
    network, past = make(), frames(2, 3, 1, 7, 5)
    close(network.forecast(network.encode(past), 4, (7, 5)), network(past, 4, static=nothing(past)).raw)


@forms
def test_static_fields_are_channels_of_every_frame(make: Make) -> None:
    network, past, static = make(inputs=3), frames(2, 3, 1, 7, 5), frames(2, 2, 7, 5)
    joined = torch.cat([past, static.unsqueeze(1).expand(2, 3, 2, 7, 5)], dim=2)
    close(network(past, 2, static=static).raw, network(joined, 2, static=nothing(past)).raw)


@forms
def test_coordinates_run_from_minus_1_to_1_beside_ones(make: Make) -> None:
    plain, past = make(inputs=4), frames(1, 2, 1, 7, 5)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (7, 5)), indexing="ij")
    static = torch.stack([x, y, torch.ones_like(x)]).unsqueeze(0)
    close(make(coordinates=True)(past, 2, static=nothing(past)).raw, plain(past, 2, static=static).raw)


@forms
def test_teaching_is_refused(make: Make) -> None:
    network, past = make(), frames(1, 2, 1, 6, 6)
    told: list[Mapping[str, Any]] = [{"teach": torch.ones(1, 2, dtype=torch.bool)}, {"feed": lambda raw: raw}]
    for given in told:
        with pytest.raises(UserError, match="feeds nothing back, so that it cannot be taught"):
            network(past, 2, static=nothing(past), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": []}, "model.network.hidden is ..; give one layer or more"),
        ({"hidden": [4, 0]}, "model.network.hidden is .4, 0.; give one layer or more"),
        ({"patch": 0}, "model.network.patch is 0"),
        ({"input_kernel": [3]}, "input_kernel has 1 entries for 2 layers"),
        ({"recurrent_kernel": [3, 3, 3]}, "recurrent_kernel has 3 entries for 2 layers"),
        ({"input_kernel": 4}, "kernels of odd size"),
        ({"down": DOWN}, "model.network.down and model.network.up go together"),
        ({"up": UP}, "model.network.down and model.network.up go together"),
        ({"refine": [8]}, "give down and up too"),
        ({"down": DOWN[:1], "up": UP[:1]}, "2 layers, but 1 entries in model.network.down and 1 in model.network.up"),
        ({"down": DOWN, "up": UP[:1]}, "2 layers, but 2 entries in model.network.down and 1 in model.network.up"),
        ({"down": [], "up": [], "refine": [8]}, "refine belongs to the form|2 layers, but 0 entries"),
        ({"down": [DOWN[0], {**DOWN[1], "kernel": 5}], "up": UP}, r"down.1. takes 8 pixels to 3"),
        ({"down": DOWN, "up": [UP[0], {**UP[1], "kernel": 3}]}, r"up.1. takes them to 7"),
        ({"down": [{**DOWN[0], "dilation": 2}, DOWN[1]], "up": UP}, "down.0. has the keys .*dilation; it takes just"),
        ({"down": DOWN, "up": [UP[0], {}]}, r"up.1. has the keys \(none\); it takes just channels, kernel, stride"),
        ({"down": [{**DOWN[0], "stride": 0}, DOWN[1]], "up": UP}, "stride"),
        ({"down": [{**DOWN[0], "channels": 0}, DOWN[1]], "up": UP}, "channels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        EncoderForecaster(LSTM, **{"hidden": [4, 5], "inputs": 1, "outputs": 1, **options})
    assert "\n" not in str(caught.value)
