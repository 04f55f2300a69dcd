"""The flattened network: tiles that know nothing of each other, and no network that would fill the memory."""

from functools import partial

import pytest
import torch
from torch import Tensor

from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.networks.flat import FlatEncoderForecaster


def make(size: tuple[int, int], tile: int | None = None, inputs: int = 1, outputs: int = 1) -> FlatEncoderForecaster:
    torch.manual_seed(0)
    cell = partial(LSTM, peephole=True, learned_initial_state=True)
    network = FlatEncoderForecaster(cell, [6, 5], inputs=inputs, outputs=outputs, frame_size=size, tile=tile)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.4)
    return network.double()


def frames(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def nothing(past: Tensor) -> Tensor:
    return past.new_zeros(past.shape[0], 0, *past.shape[-2:])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_forecast_equals_its_cells_stepped_by_hand() -> None:
    network, past = make((4, 3), outputs=2), frames(2, 3, 1, 4, 3)
    states = [layer.initial_state(2, (), past) for layer in network.encoder.layers]
    for t in range(3):
        _, states = network.encoder.step(past[:, t].flatten(1), states)
    raw = network(past, 4, static=nothing(past)).raw
    for s in range(4):
        hidden, states = network.forecaster.step(None, states)
        close(raw[:, s], network.output(hidden[-1]).view(2, 2, 4, 3))


def test_a_tile_as_large_as_the_frame_equals_no_tiles() -> None:
    whole, tiled, past = make((4, 4)), make((4, 4), tile=4), frames(2, 3, 1, 4, 4)
    assert whole.frame_size == (4, 4)
    assert tiled.frame_size is None
    close(tiled(past, 2, static=nothing(past)).raw, whole(past, 2, static=nothing(past)).raw)


def test_every_tile_is_forecast_by_itself() -> None:
    network, past = make((8, 12), tile=4), frames(2, 3, 1, 8, 12)
    raw = network(past, 2, static=nothing(past)).raw
    other = past.clone()
    other[..., 4:, 4:8] += 1
    changed = (network(other, 2, static=nothing(past)).raw != raw).any(dim=2).any(dim=1)
    expected = torch.zeros(2, 8, 12, dtype=torch.bool)
    expected[:, 4:, 4:8] = True
    assert torch.equal(changed, expected)
    for i in (0, 4):
        for j in (0, 4, 8):
            tile = past[..., i : i + 4, j : j + 4]
            close(raw[..., i : i + 4, j : j + 4], network(tile, 2, static=nothing(tile)).raw)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (4, 3)])
def test_flattening_and_unflattening_give_the_frames_back(size: tuple[int, int]) -> None:
    network, past = make(size, tile=4, inputs=2, outputs=2), frames(2, 3, 2, *size)
    vectors = network._flatten(past)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert vectors.shape == (2 * rows * columns, 3, 2 * 16)
    assert torch.equal(network._unflatten(vectors, size), past)
    whole = make(size, inputs=2, outputs=2)
    assert torch.equal(whole._unflatten(whole._flatten(past), size), past)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9)])
def test_any_length_is_taken_and_with_tiles_any_size(size: tuple[int, int]) -> None:
    network = make((8, 8), tile=4, inputs=3, outputs=2)
    for T, S in ((1, 1), (2, 5)):
        assert network(frames(2, T, 2, *size), S, static=frames(2, 1, *size)).raw.shape == (2, S, 2, *size)


@pytest.mark.parametrize("tile", [None, 4])
def test_carried_state_equals_one_uninterrupted_past(tile: int | None) -> None:
    network, past = make((7, 5), tile), frames(3, 6, 1, 7, 5)
    static = nothing(past)
    whole = network(past, 2, static=static).raw
    state = network(past[:, :4], 2, static=static).state
    close(network(past[:, 4:], 2, static=static, state=state).raw, whole)
    first = torch.tensor([False, True, False])
    mixed = network(past[:, 4:], 2, static=static, state=state, first=first).raw
    close(mixed, torch.where(first.view(3, 1, 1, 1, 1), network(past[:, 4:], 2, static=static).raw, whole))


def test_static_fields_are_channels_of_every_frame() -> None:
    network, past, static = make((7, 5), tile=4, inputs=3), frames(2, 3, 1, 7, 5), frames(2, 2, 7, 5)
    joined = torch.cat([past, static.unsqueeze(1).expand(2, 3, 2, 7, 5)], dim=2)
    close(network(past, 2, static=static).raw, network(joined, 2, static=nothing(past)).raw)


def test_a_network_too_large_is_refused_with_its_size_and_the_way_out_before_it_is_built() -> None:
    with pytest.raises(UserError, match=r"480 x 480 pixels has 117,601,030,400 parameters.*model\.network\.tile=64"):
        FlatEncoderForecaster(LSTM, [50_000, 50_000], inputs=1, outputs=1, frame_size=(480, 480))
    exact = sum(weight.numel() for weight in make((4, 4)).parameters())
    cell = partial(LSTM, peephole=True, learned_initial_state=True)
    with pytest.raises(UserError, match=f"has {exact:,} parameters, more than model.network.most_parameters"):
        FlatEncoderForecaster(cell, [6, 5], inputs=1, outputs=1, frame_size=(4, 4), most_parameters=exact - 1)
    FlatEncoderForecaster(cell, [6, 5], inputs=1, outputs=1, frame_size=(4, 4), most_parameters=exact)


def test_other_sizes_wrong_arguments_and_teaching_are_refused() -> None:
    network, past = make((4, 4)), frames(1, 2, 1, 4, 5)
    with pytest.raises(UserError, match="takes frames of 4 x 4; received 4 x 5"):
        network(past, 1, static=nothing(past))
    past = frames(1, 2, 1, 4, 4)
    with pytest.raises(UserError, match="cannot be taught"):
        network(past, 1, static=nothing(past), teach=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="cannot be taught"):
        network(past, 1, static=nothing(past), feed=lambda raw: raw)
    for hidden, tile in (([], None), ([0], None), ([4], 0)):
        with pytest.raises(UserError, match=f"hidden=.*tile={tile}"):
            FlatEncoderForecaster(LSTM, hidden, inputs=1, outputs=1, frame_size=(4, 4), tile=tile)
