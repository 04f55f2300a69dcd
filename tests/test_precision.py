"""Every network in conf/model trains in bfloat16 with weights in float32, and compiles; TF32 is what the run says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_models import NAMES, SLOW, build, cost, sample
from torch import nn

from forecast.compiling import MODES, compile_network
from forecast.precision import allow_tf32

small = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES]
)


@small
def test_a_step_in_bfloat16_reaches_every_parameter(name: str) -> None:
    size = (30, 30) if name in SLOW else (16, 16) if name.startswith("unet") else (12, 8)
    network, head = build(name, size)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cost(network, head, *sample(name, 2, size))[1]
    assert loss.isfinite()
    loss.backward()
    for key, weight in network.named_parameters():
        assert weight.dtype == torch.float32, key
        assert weight.grad is not None, key
        assert weight.grad.dtype == torch.float32, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.any(), key


@pytest.mark.parametrize(("gpu", "allowed"), [(True, True), (True, False), (False, True)])
def test_tf32_is_set_for_products_and_convolutions_alike_and_on_gpus_only(
    gpu: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    try:
        allow_tf32(allowed)
        after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert after == (("high" if allowed else "highest", allowed) if gpu else before)


@pytest.mark.parametrize(("how", "modes"), [(False, []), (True, ["default"]), *((mode, [mode]) for mode in MODES)])
def test_a_network_is_compiled_as_the_run_says(
    how: bool | str, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: found.append(mode))
    compile_network(nn.Identity(), how)
    assert found == modes


@pytest.mark.parametrize("mode", MODES)
def test_torch_has_the_modes(mode: str) -> None:
    torch.compile(nn.Identity(), mode=mode)
    with pytest.raises(RuntimeError, match="mode"):
        torch.compile(nn.Identity(), mode=f"{mode}er")


WHOLE = """
import torch
from test_models import NAMES, build, cost, sample

for name in NAMES:
    torch.compiler.reset()
    size = (30, 30) if name.startswith(("hko7", "unet")) else (12, 8)
    network, head = build(name, size)
    network.compile(backend="eager", fullgraph=True)
    cost(network, head, *sample(name, 2, size))[1].backward()
"""


@pytest.mark.slow
def test_every_network_compiles_as_a_whole() -> None:
    """In a process of its own, since a compiler cannot see through the checks of shapes while testing."""
    tests = Path(__file__).parent
    path = {"PYTHONPATH": f"{tests}:{tests.parent}"}
    done = subprocess.run([sys.executable, "-c", WHOLE], env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
