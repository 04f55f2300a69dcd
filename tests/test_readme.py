"""What the README tells people to type."""

import re
import shutil
import subprocess
from pathlib import Path

import commands
import pytest
from commands import ROOT
from conftest import WriteArchive, every
from test_train import write_mnist

from forecast import command_line

COMMAND = re.compile(r"^(?:\.venv/bin/)?python train\.py(.*?)(?:#.*)?$", re.MULTILINE)
# What makes a command small: fewer samples and steps, on the CPU.
FEW = {
    "digits": ["data.train=8", "data.validation=2", "data.test=2"],
    "moving_mnist": ["data.train=2", "data.validation=2", "data.test=2", "data.batch_size=2"],
    "radar": ["data.workers=0", "trainer.limit_train_batches=1"],
    "experiment": ["data.workers=0", "trainer.limit_train_batches=1", "data.crop=32", "data.eval_crop=40"],
}


def typed(page: str) -> list[str]:
    return [found.strip() for found in COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("command", typed("README.md"))
def test_command_of_the_readme_runs(command: str, tmp_path: Path, write_archive: WriteArchive) -> None:
    kind = next((kind for kind in ("experiment", "moving_mnist", "radar") if kind in command), "digits")
    arguments = command.split()
    for place, made in (
        ("DIR", lambda: write_mnist(tmp_path / "mnist")),
        ("FILE_OR_ZARR", lambda: write_archive("radar.zarr", times=every(400), size=(40, 44))),
        ("FILE", lambda: write_archive(times=every(400), size=(40, 44))),
    ):
        arguments = [one.replace(f"={place}", f"={made()}") if one.endswith(f"={place}") else one for one in arguments]
    small = [*FEW[kind], "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    commands.run(*arguments, *small, f"hydra.sweep.dir={tmp_path / 'run'}", folder=tmp_path / "run")
    assert "run=describe" in command or any((tmp_path / "run").rglob("skill.nc"))


@pytest.mark.parametrize("page", ["quickstart", "cluster", "logging", "sweeps"])
def test_commands_of_the_documents_are_accepted(page: str) -> None:
    commands_of_page = typed(f"docs/{page}.md")
    assert commands_of_page
    for command in commands_of_page:
        # The shell takes the quotes off.
        arguments = [one.strip("'") for one in command.split() if one != "-m" and not one.startswith("model=mine")]
        command_line.accept(ROOT / "conf", arguments)


def test_make_lists_its_targets_and_knows_those_of_the_readme() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"`?make ((?:[a-z-]+ ?)+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        for name in target.split():
            if name in ("train", "test", "check"):
                assert re.search(rf"^{name} ", listed, re.MULTILINE)
