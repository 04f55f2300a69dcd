"""The spatiotemporal LSTM against its equations, the way of its memory through the layers, and the decoupling loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forecast.cells.stlstm import STLSTM
from forecast.command_line import load
from forecast.config import build_network
from forecast.errors import UserError
from forecast.networks.predrnn import PredRNN, alike

CONF = Path(__file__).parents[1] / "conf"
B, T, S, X, C, H, W = 2, 3, 2, 2, 3, 6, 5


def cell(dims: int) -> STLSTM:
    torch.manual_seed(0)
    made = STLSTM(X, C, spatial_dims=dims, input_kernel=5, recurrent_kernel=3, forget_bias=0.7).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.4)
    return made


def network(**options: Any) -> PredRNN:
    torch.manual_seed(0)
    made = PredRNN([C, C], inputs=1, outputs=1, kernel=3, **options).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.4)
    return made


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def correlated(weight: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A convolution by its definition, with zeros around the field; a matrix product for vectors."""
    if weight.ndim == 2:
        return np.einsum("oi,bi->bo", weight, field)
    k = weight.shape[-1] // 2
    padded = np.pad(field, ((0, 0), (0, 0), (k, k), (k, k)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[-2:], axis=(2, 3))
    return np.einsum("oikl,biyxkl->boyx", weight, windows)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("dims", [0, 2])
def test_step_equals_the_printed_equations(dims: int) -> None:
    made, space = cell(dims), (H, W)[:dims]
    x, h, c, m = drawn(B, X, *space), *drawn(3, B, C, *space)
    names = ("input_map", "recurrent_map", "memory_map", "output_map", "fusion_map")
    wx, wh, wm, wo, w1 = (made.get_submodule(name).weight.detach().numpy() for name in names)
    xi, xf, xg, yi, yf, yg, xo = np.split(correlated(wx, x.numpy()), 7, axis=1)
    hi, hf, hg, ho = np.split(correlated(wh, h.numpy()), 4, axis=1)
    mi, mf, mg = np.split(correlated(wm, m.numpy()), 3, axis=1)
    more_c, more_m = sigmoid(xi + hi) * np.tanh(xg + hg), sigmoid(yi + mi) * np.tanh(yg + mg)
    new_c = sigmoid(xf + hf + 0.7) * c.numpy() + more_c
    new_m = sigmoid(yf + mf + 0.7) * m.numpy() + more_m
    both = np.concatenate([new_c, new_m], axis=1)
    new_h = sigmoid(xo + ho + correlated(wo, both)) * np.tanh(correlated(w1, both))
    projected = made.project(x.unsqueeze(1))
    assert projected is not None
    state = made.step(projected[:, 0], (h, c, m))
    told, gates = made.step_and_gates(projected[:, 0], (h, c, m))
    added_c, added_m = gates["i . g"], gates["i' . g'"]
    for ours, theirs in zip(
        (*state, *told, added_c, added_m), (*[new_h, new_c, new_m] * 2, more_c, more_m), strict=True
    ):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)


def test_memory_climbs_through_the_layers_and_comes_down_to_the_next_time() -> None:
    made, x = network(), drawn(B, 2, 1, H, W)
    low, high = made.cells
    zeros = x.new_zeros(B, C, H, W)
    a, b, m = (zeros, zeros), (zeros, zeros), zeros
    for t in range(2):
        h, c, m = low.step(low.project(x[:, t : t + 1])[:, 0], (*a, m))
        a = (h, c)
        h, c, m = high.step(high.project(h.unsqueeze(1))[:, 0], (*b, m))
        b = (h, c)
    output = made(x, 1, static=x.new_zeros(B, 0, H, W))
    torch.testing.assert_close(output.raw[:, -1], made.output(b[0]), rtol=0, atol=1e-12)
    assert [len(state) for state in output.state] == [2, 2, 1]
    for ours, theirs in zip((part for state in output.state for part in state), (*a, *b, m), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_alike_is_one_for_parallel_and_nothing_for_orthogonal_increments() -> None:
    a = drawn(B, C, H, W)
    assert float(alike(a, 3 * a)) == pytest.approx(1)
    assert float(alike(a, -a)) == pytest.approx(1)
    here = torch.zeros(H, W, dtype=torch.float64)
    here[:3] = 1
    assert float(alike(a * here, a * (1 - here))) == 0
    expected = np.abs(np.cos(np.deg2rad(60)))
    turned = torch.tensor([0.5, 0.75**0.5], dtype=torch.float64).view(1, 1, 1, 2)
    assert float(alike(torch.tensor([2.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2), turned)) == pytest.approx(
        expected
    )


def test_decoupling_is_the_mean_over_times_and_layers_and_paid_in_training_only() -> None:
    made, x = network(decoupling=0.25), drawn(B, T, 1, H, W)
    given = {"static": x.new_zeros(B, 0, H, W)}
    seen: list[Tensor] = []
    assert made.adapter is not None
    made.adapter.register_forward_hook(lambda module, given, out: seen.append(out))
    output = made(x, S, **given)
    assert len(seen) == 2 * 2 * (T + S - 1)
    pairs = zip(seen[::2], seen[1::2], strict=True)
    cosines = [
        (F.normalize(c.flatten(2), dim=2) * F.normalize(m.flatten(2), dim=2)).sum(dim=2).abs().mean() for c, m in pairs
    ]
    assert output.aux is not None
    torch.testing.assert_close(output.aux, 0.25 * torch.stack(cosines).mean())
    output.aux.backward()
    for name, weight in made.named_parameters():
        assert name == "output.weight" or weight.grad is not None
    plain = network()
    plain.load_state_dict({name: weight for name, weight in made.state_dict().items() if "adapter" not in name})
    assert plain(x, S, **given).aux is None
    assert made.eval()(x, S, **given).aux is None
    torch.testing.assert_close(plain(x, S, **given).raw, output.raw)


@pytest.mark.parametrize(("model", "count"), [("predrnn", 23_838_720), ("predrnn_v2", 23_855_104)])
def test_predrnn_has_the_parameters_of_the_public_code(model: str, count: int) -> None:
    published = ["model.network.hidden=[128,128,128,128]", "model.network.kernel=5"]
    with torch.device("meta"):
        made, _ = build_network(
            load(CONF, [f"model={model}", *published]).model, channels=1, static_channels=0, size=(64, 64)
        )
    assert sum(weight.numel() for weight in made.parameters()) == count


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"hidden is \[4, 5\], but PredRNN's memory goes through all layers"):
        PredRNN([4, 5], inputs=1, outputs=1)
    with pytest.raises(UserError, match="decoupling is -1"):
        PredRNN([4], inputs=1, outputs=1, decoupling=-1.0)
