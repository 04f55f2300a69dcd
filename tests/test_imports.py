"""The import arrows: data flows one way, and so does what modules know of each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "train.py", *sorted((ROOT / "forecast").rglob("*.py")), *sorted((ROOT / "datamodules").rglob("*.py"))]
COMMANDS = {"forecast.describe", "forecast.nowcast", "forecast.report", "forecast.runs", "forecast.sweep"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in SOURCES}


def imported_by(path: Path) -> set[str]:
    """What a file imports anywhere in it; `from a import b` counts as a.b where that is a module of ours."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; name the module in full"
            assert node.module is not None
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(whole & MODULES or {node.module})
    return names


IMPORTS = {module_of(path): imported_by(path) for path in SOURCES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importers(package: str) -> set[str]:
    """Our modules outside a package that import it."""
    return {
        module
        for module, names in IMPORTS.items()
        if not within(module, package) and any(within(name, package) for name in names)
    }


def test_datamodules_know_only_the_contracts() -> None:
    for module, names in IMPORTS.items():
        if within(module, "datamodules"):
            ours = {name for name in names if within(name, "forecast") or name == "train"}
            assert ours <= {"forecast.batch", "forecast.units", "forecast.errors", "forecast.files"}, module


def test_only_commands_know_datamodules() -> None:
    assert importers("datamodules") <= {"train", *COMMANDS}


def test_only_train_and_config_know_hydra() -> None:
    assert importers("hydra") == {"train", "forecast.config", "forecast.command_line"}


def test_only_those_who_read_a_configuration_know_its_containers() -> None:
    assert importers("omegaconf") <= {
        "train",
        *(f"forecast.{name}" for name in ("config", "command_line", "checkpoint", "describe")),
    }


def test_nobody_knows_the_command() -> None:
    assert importers("train") == set()


def test_the_module_and_what_it_uses_name_no_concrete_network_cell_or_baseline() -> None:
    concrete = {
        name
        for name in MODULES
        if any(within(name, f"forecast.{room}") for room in ("networks", "cells", "baselines"))
        and name not in ("forecast.networks", "forecast.networks.network", "forecast.cells", "forecast.cells.cell")
    }
    for module in ("forecast.module", "forecast.forecaster", "forecast.config", "forecast.checkpoint"):
        assert not IMPORTS[module] & concrete, module
    assert "forecast.networks.encoder_forecaster" in concrete


def test_the_contracts_are_leaves() -> None:
    for module in ("forecast.batch", "forecast.errors", "forecast.units"):
        ours = {name for name in IMPORTS[module] if within(name, "forecast") or within(name, "datamodules")}
        assert ours <= ({"forecast.errors"} if module == "forecast.units" else set()), module


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(IMPORTS[module] & MODULES):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())
