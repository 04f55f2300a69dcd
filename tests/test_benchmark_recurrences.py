"""The benchmark of recurrences: it tells costs of equal results only, and what it counts is there."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measuring
from benchmarks.measuring import FLOOR, Mode, Result, floor, gate_exactly, given, placed, saved
from benchmarks.peers import MATHS, PEERS, Case, find, side_by_side
from benchmarks.recurrences import PLANS, Plan, growth, label, main, run, tables
from forecast.errors import UserError

CPU = torch.device("cpu")
TINY = Case(3, 2, 2, 3, 4, 3)
PLAIN = Mode("float32")

# Layers of our own with the interfaces that the peers' have, and with their equations.
CODE = {
    "ndrplz": """
import torch
from torch import nn

class ConvLSTM(nn.Module):
    def __init__(self, X, C, kernel, layers, batch_first):
        super().__init__()
        self.cell_list = nn.ModuleList([nn.Module()])
        self.cell_list[0].conv = nn.Conv2d(X + C, 4 * C, kernel, padding=kernel[0] // 2)

    def forward(self, x):
        conv, hidden = self.cell_list[0].conv, []
        h = c = x.new_zeros(len(x), conv.out_channels // 4, *x.shape[3:])
        for frame in x.unbind(1):
            i, f, o, g = conv(torch.cat([frame, h], dim=1)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hidden.append(h)
        return [torch.stack(hidden, dim=1)], None
""",
    "OpenSTL": """
from torch import nn

class ConvLSTMCell(nn.Module):
    def __init__(self, X, C, height, width, kernel, stride, layer_norm):
        super().__init__()
        self.conv_x, self.conv_h, self.unused = (
            nn.Sequential(nn.Conv2d(size, 4 * C, kernel, stride, kernel // 2, bias=False)) for size in (X, C, C)
        )

    def forward(self, x, h, c):
        i, f, g, o = (self.conv_x(x) + self.conv_h(h)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
""",
    "Hzzone": """
import torch
from torch import nn
from nowcasting.config import cfg

class ConvLSTM(nn.Module):
    def __init__(self, X, C, b_h_w, kernel, stride=1, padding=1):
        super().__init__()
        self._conv = nn.Conv2d(X + C, 4 * C, kernel, stride, padding)
        self.Wci, self.Wcf, self.Wco = (nn.Parameter(torch.zeros(1, C, *b_h_w[1:])) for _ in range(3))

    def forward(self, x, states, steps=cfg.HKO.BENCHMARK.IN_LEN):
        (h, c), hidden = states, []
        for frame in x[:steps]:
            i, f, g, o = self._conv(torch.cat([frame, h], dim=1)).chunk(4, dim=1)
            c = (f + self.Wcf * c).sigmoid() * c + (i + self.Wci * c).sigmoid() * g.tanh()
            h = (o + self.Wco * c).sigmoid() * c.tanh()
            hidden.append(h)
        return torch.stack(hidden), (h, c)
""",
    "mlcast": """
import torch
from torch import nn

class ConvGRU(nn.Module):
    def __init__(self, X, C, kernel):
        super().__init__()
        self.cell = nn.Module()
        self.cell.combined_gates = nn.Conv2d(X + C, 2 * C, kernel, padding=kernel // 2)
        self.cell.out_gate = nn.Conv2d(X + C, C, kernel, padding=kernel // 2)

    def forward(self, x):
        hidden = [x.new_zeros(len(x), self.cell.out_gate.out_channels, *x.shape[3:])]
        for frame in x.unbind(1):
            h = hidden[-1]
            u, r = self.cell.combined_gates(torch.cat([frame, h], dim=1)).sigmoid().chunk(2, dim=1)
            hidden.append((1 - u) * h + u * self.cell.out_gate(torch.cat([frame, r * h], dim=1)).tanh())
        return torch.stack(hidden[1:], dim=1)
""",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TURN", 0.0)
    monkeypatch.setattr(measuring, "ROUNDS", 2)


def checkout(folder: Path, name: str, old: str = "", new: str = "") -> Path:
    """A folder with the checkout of one peer, whose code is changed somewhere."""
    file = folder / PEERS[name].url.split("/")[1] / PEERS[name].file
    file.parent.mkdir(parents=True)
    assert old in CODE[name]
    file.write_text(CODE[name].replace(old, new) if old else CODE[name])
    return folder


def plans(case: Case = TINY) -> dict[str, Plan]:
    return {"cpu": Plan({"ConvLSTM": [case, case._replace(T=2)], "LSTM of vectors": [Case(3, 2, 2, 3)]}, limit=0.0)}


def test_tells_of_each_way_beside_ours_and_which_peers_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = checkout(tmp_path / "peers", "ndrplz")
    main(["--peers", str(given), "--out", str(tmp_path / "made" / "costs.md")], plans())
    written = (tmp_path / "made" / "costs.md").read_text()
    assert capsys.readouterr().out == written
    assert "ndrplz: ndrplz/ConvLSTM_pytorch of unknown version; OpenSTL: not there (OpenSTL/openstl/modules/" in written
    titles = "| T | B | X | C | size | kernel | fused (ms) | fused, recomputed | reference | ndrplz | convolutions |"
    assert written.count(titles) == 2
    assert (
        len(re.findall(r"^\| 2 \| 2 \| 2 \| 3 \| 4 \| 3 \| [\d.]+( \| [\d.]+ \([\d., ]+\)){4} \|$", written, re.M)) == 2
    )
    assert "| T | B | X | C | fused (ms) | fused, recomputed | reference | torch.nn.LSTM |" in written
    assert (tmp_path / "made" / "costs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["i, f, g, o", "f, i, o, g"])
def test_no_time_is_told_of_results_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    given = checkout(tmp_path / "peers", "ndrplz", "i, f, o, g =", f"{wrong} =")
    with pytest.raises(SystemExit, match=r"error: The outputs of ndrplz \(ConvLSTM, float64.*\) differ") as ended:
        main(["--peers", str(given), "--out", str(tmp_path / "costs.md")], plans())
    assert ended.value.code != 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("costs*"))


def test_gradients_that_differ_are_refused_where_outputs_are_equal(tmp_path: Path) -> None:
    modules = find(checkout(tmp_path, "ndrplz", "o.sigmoid()", "o.sigmoid().detach()")).modules
    with pytest.raises(UserError, match=r"The gradients of .* of ndrplz"):
        gate_exactly("ConvLSTM", vectors=False, device=CPU, modules=modules)


@pytest.mark.parametrize("name", CODE)
def test_a_peer_with_our_weights_gives_what_ours_gives(tmp_path: Path, name: str) -> None:
    modules = find(checkout(tmp_path, name)).modules
    assert name in side_by_side(PEERS[name].maths, TINY, modules)
    gate_exactly(PEERS[name].maths, vectors=False, device=CPU, modules=modules)


def test_of_an_installed_peer_one_file_alone_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout(tmp_path, "mlcast") / "mlcast"
    (package / "mlcast" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package)
    found = find(None)
    assert "mlcast" in found.modules
    assert "ndrplz: not there" in found.told


def test_a_peer_that_needs_what_is_not_installed_is_named(tmp_path: Path) -> None:
    found = find(checkout(tmp_path, "mlcast", "import torch\n", "import torch, no_such_package\n"))
    assert "mlcast: not there (No module named 'no_such_package')" in found.told
    assert "mlcast" not in found.modules


@pytest.mark.parametrize("maths", [maths for maths in MATHS if "vectors" in maths])
def test_ours_is_torchs_for_vectors(maths: str) -> None:
    modules = find(None).modules
    assert any(name.startswith("torch.nn") for name in side_by_side(maths, Case(3, 2, 2, 3), modules))
    gate_exactly(maths, vectors=True, device=CPU, modules=modules)


@pytest.mark.parametrize("maths", ["ConvLSTM", "ConvGRU, reset before"])
@pytest.mark.parametrize("mode", [PLAIN, Mode("channels last", channels_last=True)], ids=lambda mode: mode.name)
def test_the_floor_does_the_convolutions_of_a_step_and_of_its_gradients(
    maths: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = placed(side_by_side(maths, TINY, {})["reference"], CPU, mode)
    x, _ = given(TINY, CPU, mode)
    bare: Any = floor(way.network.get_submodule("forward_cell"), x, mode).step
    forward: list[tuple[int, ...]] = []
    plain = F.conv2d

    def counted(input: torch.Tensor, weight: torch.Tensor, **others: Any) -> torch.Tensor:
        forward.append((len(input), *weight.shape))
        return plain(input, weight, **others)

    monkeypatch.setattr(F, "conv2d", counted)
    to_reads, to_weights = bare()
    first, *others = (weight for name, weight in way.network.named_parameters() if name.endswith("map.weight"))
    T, B = TINY[:2]
    if maths == "ConvLSTM":
        both = torch.cat([first, *others], dim=1)
        expected, weights = [(B, *first.shape), *[(B, *both.shape)] * (T - 1)], [both]
    else:
        expected = [(T * B, *first.shape), *((B, *weight.shape) for weight in others * (T - 1))]
        weights = [first, *others]
    assert sorted(forward) == sorted(expected)
    space = (TINY.size, TINY.size)
    assert sorted(one.shape for one in to_reads) == sorted((count, wide, *space) for count, _, wide, *_ in expected)
    assert [one.shape for one in to_weights] == [weight.shape for weight in weights]


def test_kept_bytes_are_those_of_the_graph_and_counted_once() -> None:
    x = torch.ones(5, requires_grad=True)
    assert saved(lambda: x.tanh()) == 5 * 4  # its result
    assert saved(lambda: (x * x).sum()) == 5 * 4  # the same factor twice
    assert saved(lambda: x.tanh().sigmoid()) == 2 * 5 * 4


def test_recomputing_keeps_less() -> None:
    ways = side_by_side("ConvLSTM", TINY, {})
    x, _ = given(TINY, CPU, PLAIN)
    kept = {name: saved(partial(way.outputs, way.network, x)) for name, way in ways.items()}
    assert kept["fused, recomputed"] < kept["fused"] < kept["reference"]


def test_the_others_are_told_as_multiples_of_ours_round_by_round() -> None:
    step = {"fused": [0.001, 0.002, 0.004], "ndrplz": [0.002, 0.008, 0.004]}
    told = tables([Result("ConvLSTM", PLAIN, TINY, step, step, {"fused": 2**20, "ndrplz": 3 * 2**19})])
    assert told.count("| 3 | 2 | 2 | 3 | 4 | 3 | 2.00 | 2.00 (1.50, 3.00) |") == 2
    assert "| 3 | 2 | 2 | 3 | 4 | 3 | 1.00 | 1.50 |" in told


def test_in_lower_precision_fields_have_two_layouts_and_vectors_one() -> None:
    sizes = {"ConvGRU, reset before": [TINY, TINY._replace(T=2)], "LSTM of vectors": [Case(3, 2, 2, 3)]}
    mode = PLANS["cuda"].modes[-1]
    assert mode.channels_last
    drawn, sections = run(Plan(sizes, [mode], limit=0.0), CPU, {})
    assert [one.maths for one in drawn] == ["ConvGRU, reset before"] * 2
    assert [text.splitlines()[0] for text in sections] == [
        f"## ConvGRU, reset before, {mode.name}",
        f"## ConvGRU, reset before, {mode.name}: by length",
    ]


def test_growth_is_what_a_frame_adds() -> None:
    def result(T: int) -> Result:
        seconds = {"fused": [0.1 + 0.002 * T] * 3, FLOOR: [0.001 * T] * 3}
        return Result("ConvLSTM", PLAIN, TINY._replace(T=T), seconds, seconds, {"fused": 2**20 * (7 + 3 * T)})

    other = result(5)._replace(case=TINY._replace(B=9), step={}, saved={})
    told = growth([result(3), result(20), other, result(10)], {"fused": [4.0, 8.0]}, [3, 20])
    assert "over T 3, 10, 20 (" in told
    assert "| fused | 2.00 | 3.000 | 4 | 8 |" in told
    assert f"| {FLOOR} | 1.00 |  |  |  |" in told


def test_a_size_is_called_by_what_differs() -> None:
    assert label(TINY._replace(C=64), TINY) == "C 64"
    assert label(TINY, TINY) == "T 3, B 2, X 2,\nC 3, size 4, kernel 3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: There is no CUDA device here; run this where there is one"):
        main(["--device", "cuda", "--out", str(tmp_path / "costs.md")])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: --peers is .*none, which is no folder; give one"):
        main(["--peers", str(tmp_path / "none")])
