"""The recurrences that `benchmarks/recurrences.py` runs side by side: ours, and those of others with our weights.

None of a peer's code is kept here: its file is taken from a checkout or an installed package, and nothing else of it is
imported.

Axes: B batch, T time, X input channels, C hidden channels, *space: none for vectors, H W for fields.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forecast import provenance
from forecast.cells.cell import Cell
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.recurrence import Layer, use_backend

Weights = Mapping[str, Tensor]
Modules = Mapping[str, ModuleType]


class Case(NamedTuple):
    """Sizes of a layer and of what it reads; vectors have no size and no kernel."""

    T: int
    B: int
    X: int
    C: int
    size: int = 0
    kernel: int = 0


class Recurrence(NamedTuple):
    """A layer that can be run, and how it is the same as ours."""

    network: nn.Module
    outputs: Callable[[Any, Tensor], Tensor]
    """The network and B T X *space -> the hidden state after each step, B T C *space."""
    weights: Callable[[Weights], Weights]
    """Our cell's weights -> those of the network; the gradients come back through it."""


MATHS: Mapping[str, Callable[[Case], Cell]] = {
    "ConvLSTM": lambda case: LSTM(**_field(case)),
    "ConvLSTM with peepholes": lambda case: LSTM(**_field(case), peephole=True),
    "ConvGRU": lambda case: GRU(**_field(case)),
    "ConvGRU, reset before": lambda case: GRU(**_field(case), reset="before"),
    "LSTM of vectors": lambda case: LSTM(case.X, case.C),
    "GRU of vectors": lambda case: GRU(case.X, case.C),
}
"""Our cell of each kind."""


def _field(case: Case) -> dict[str, Any]:
    kernels = {"input_kernel": case.kernel, "recurrent_kernel": case.kernel}
    return {"input_channels": case.X, "hidden_channels": case.C, "spatial_dims": 2, **kernels}


class Ours(NamedTuple):
    """A way to run our cells."""

    backend: str
    recompute: int | None = None


OURS = {
    "fused": Ours("fused"),
    "fused, recomputed": Ours("fused", recompute=1),
    "reference": Ours("reference"),
}


class Peer(NamedTuple):
    """Somebody else's recurrence."""

    maths: str
    """Of which kind it is, a name of `MATHS`."""
    url: str
    file: str
    """In the folder of that repository, or beside the installed package; empty for what is in torch.nn."""
    made: Callable[[Any, Case], Recurrence]
    """From the module in the file."""
    remark: str = ""


def _joined(weights: Weights, kind: str = "recurrent_map") -> Tensor:
    """One convolution of the input and the state side by side."""
    return torch.cat([weights["input_map.weight"], weights[f"{kind}.weight"]], dim=1)


def _ndrplz(module: Any, case: Case) -> Recurrence:
    def weights(ours: Weights) -> Weights:
        def ordered(weight: Tensor) -> Tensor:
            i, f, g, o = weight.chunk(4)
            return torch.cat([i, f, o, g])

        conv = {"weight": ordered(_joined(ours)), "bias": ordered(ours["recurrent_map.bias"])}
        return {f"cell_list.0.conv.{name}": weight for name, weight in conv.items()}

    network = module.ConvLSTM(case.X, case.C, (case.kernel, case.kernel), 1, batch_first=True)
    return Recurrence(network, lambda network, x: network(x)[0][0], weights)


def _openstl(module: Any, case: Case) -> Recurrence:
    def outputs(network: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(case.B, case.C, case.size, case.size)
        hidden = []
        for frame in x.unbind(1):
            h, c = network(frame, h, c)
            hidden.append(h)
        return torch.stack(hidden, dim=1)

    def weights(ours: Weights) -> Weights:
        return {"conv_x.0.weight": ours["input_map.weight"], "conv_h.0.weight": ours["recurrent_map.weight"]}

    network = module.ConvLSTMCell(case.X, case.C, case.size, case.size, case.kernel, stride=1, layer_norm=False)
    return Recurrence(network, outputs, weights)


def _hzzone(module: Any, case: Case) -> Recurrence:
    def outputs(network: Any, x: Tensor) -> Tensor:
        zeros = x.new_zeros(case.B, case.C, case.size, case.size)
        return network(x.transpose(0, 1), (zeros, zeros), case.T)[0].transpose(0, 1)

    def weights(ours: Weights) -> Weights:
        peepholes = ours["peephole"].view(3, 1, case.C, 1, 1).expand(-1, -1, -1, case.size, case.size)
        conv = {"_conv.weight": _joined(ours), "_conv.bias": ours["recurrent_map.bias"]}
        return conv | dict(zip(("Wci", "Wcf", "Wco"), peepholes, strict=True))

    b_h_w = (case.B, case.size, case.size)
    return Recurrence(module.ConvLSTM(case.X, case.C, b_h_w, case.kernel, padding=case.kernel // 2), outputs, weights)


def _mlcast(module: Any, case: Case) -> Recurrence:
    def weights(ours: Weights) -> Weights:
        def gates(weight: Tensor) -> Tensor:
            # Its update gate opens for the candidate, ours for the state: sigmoid(-x) = 1 - sigmoid(x).
            r, z = weight[: 2 * case.C].chunk(2)
            return torch.cat([-z, r])

        input_gates, input_candidate = ours["input_map.weight"].split([2 * case.C, case.C])
        return {
            "cell.combined_gates.weight": gates(torch.cat([input_gates, ours["recurrent_map.weight"]], dim=1)),
            "cell.combined_gates.bias": gates(ours["recurrent_map.bias"]),
            "cell.out_gate.weight": torch.cat([input_candidate, ours["candidate_map.weight"]], dim=1),
            "cell.out_gate.bias": ours["candidate_map.bias"],
        }

    return Recurrence(module.ConvGRU(case.X, case.C, case.kernel), lambda network, x: network(x), weights)


def _torch_lstm(module: Any, case: Case) -> Recurrence:
    def weights(ours: Weights) -> Weights:
        half = ours["recurrent_map.bias"] / 2
        return _torch_maps(ours) | {"bias_ih_l0": half, "bias_hh_l0": half}

    return Recurrence(module.LSTM(case.X, case.C, batch_first=True), lambda network, x: network(x)[0], weights)


def _torch_gru(module: Any, case: Case) -> Recurrence:
    def weights(ours: Weights) -> Weights:
        return _torch_maps(ours) | {"bias_ih_l0": ours["input_map.bias"], "bias_hh_l0": ours["recurrent_map.bias"]}

    return Recurrence(module.GRU(case.X, case.C, batch_first=True), lambda network, x: network(x)[0], weights)


def _torch_maps(ours: Weights) -> dict[str, Tensor]:
    return {"weight_ih_l0": ours["input_map.weight"], "weight_hh_l0": ours["recurrent_map.weight"]}


PEERS = {
    "ndrplz": Peer("ConvLSTM", "ndrplz/ConvLSTM_pytorch", "convlstm.py", _ndrplz),
    "OpenSTL": Peer(
        "ConvLSTM",
        "chengtan9907/OpenSTL",
        "openstl/modules/convlstm_modules.py",
        _openstl,
        "it has no biases: equal to ours where they are 0",
    ),
    "Hzzone": Peer(
        "ConvLSTM with peepholes",
        "Hzzone/Precipitation-Nowcasting",
        "nowcasting/models/convLSTM.py",
        _hzzone,
        "its peepholes are per pixel: equal to ours where they are the same at each",
    ),
    "mlcast": Peer(
        "ConvGRU, reset before",
        "mlcast-community/mlcast",
        "mlcast/models/convgru.py",
        _mlcast,
        "it checks shapes at each step",
    ),
    "torch.nn.LSTM": Peer("LSTM of vectors", "pytorch/pytorch", "", _torch_lstm),
    "torch.nn.GRU": Peer("GRU of vectors", "pytorch/pytorch", "", _torch_gru),
}


class Found(NamedTuple):
    """What there is of the peers."""

    modules: Modules
    told: str
    """Of each peer its version, and what differs; or why it is not there."""


def find(folder: Path | None) -> Found:
    """Imports the file of each peer.

    Args:
        folder: with checkouts, each in a subfolder that is named like its repository; None: what is installed.

    Raises:
        UserError: there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--peers is {folder}, which is no folder; give one that holds checkouts of the peers.")
    modules: dict[str, ModuleType] = {}
    told = []
    for name, peer in PEERS.items():
        if not peer.file:
            modules[name] = nn
            continue
        root = next((root for root in _roots(folder, peer) if (root / peer.file).is_file()), None)
        if root is None:
            told.append(f"{name}: not there ({peer.url.split('/')[1]}/{peer.file})")
            continue
        try:
            modules[name] = _imported(root / peer.file)
        except ImportError as error:
            told.append(f"{name}: not there ({error})")
            continue
        told.append(f"{name}: {peer.url} {_version(root, name)}" + (f" ({peer.remark})" if peer.remark else ""))
    return Found(modules, "; ".join(told))


def _roots(folder: Path | None, peer: Peer) -> list[Path]:
    """Where the file of a peer may lie: in its checkout, beside its installed package."""
    roots = [] if folder is None else [folder / peer.url.split("/")[1]]
    spec = find_spec(Path(peer.file).parts[0].removesuffix(".py"))
    return roots + [Path(place).parent for place in (spec and spec.submodule_search_locations) or []]


def _version(root: Path, name: str) -> str:
    """The commit of a checkout, or the version of an installed package."""
    installed = (one.version for one in distributions(path=[str(root)]) if one.name == name)
    commit = provenance.commit(root)
    return f"{commit[:9]}{commit[40:]}" if commit else next(installed, "of unknown version")


def _imported(file: Path) -> ModuleType:
    """One file as a module, without the package around it."""
    spec = spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Hzzone's configuration asks for folders of its author's machine; the layer reads two values of it alone.
    config = ModuleType("nowcasting.config")
    own = {"GLOBAL": SimpleNamespace(DEVICE="cpu"), "HKO": SimpleNamespace(BENCHMARK=SimpleNamespace(IN_LEN=5))}
    vars(config)["cfg"] = SimpleNamespace(**own)
    before = sys.modules.get(config.__name__)
    sys.modules[config.__name__] = config
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[config.__name__]
        if before is not None:
            sys.modules[config.__name__] = before
    return module


def side_by_side(maths: str, case: Case, modules: Modules) -> dict[str, Recurrence]:
    """Each way there is to run a recurrence of one kind, with the same weights in all; ours first.

    Args:
        maths: a name of `MATHS`.
        case: its sizes.
        modules: of the peers, from `find`.
    """
    torch.manual_seed(0)
    cell = MATHS[maths](case)
    if isinstance(cell, LSTM) and cell.peephole is not None:
        nn.init.normal_(cell.peephole, std=0.3)
    weights = {name: weight.detach() for name, weight in cell.named_parameters()}
    ways: dict[str, Recurrence] = {}
    for name, (backend, recompute) in OURS.items():
        layer = Layer(cell, recompute=recompute)
        try:
            use_backend(layer, backend)
        except UserError:
            continue  # a cell without a kernel
        ways[name] = Recurrence(layer, _through, _inside)
    for name, module in modules.items():
        if PEERS[name].maths == maths:
            ways[name] = theirs = PEERS[name].made(module, case)
            # What is not given a weight takes no part in its equations.
            own = dict(theirs.network.requires_grad_(False).named_parameters())
            for key, weight in theirs.weights(weights).items():
                own[key].copy_(weight).requires_grad_()
    return ways


def _through(layer: Layer, x: Tensor) -> Tensor:
    return layer.sequence(x, None, x.shape[1])[0]


def _inside(weights: Weights) -> Weights:
    return {f"forward_cell.{name}": weight for name, weight in weights.items()}
