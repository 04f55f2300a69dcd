"""Nothing is silent: every leaf of conf/ has a reader, and a change of it changes the run."""

import ast
import builtins
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import commands
import pytest
from conftest import WriteArchive, every
from hydra.utils import get_object
from omegaconf import OmegaConf
from test_train import TINY

from forecast import checkpoint, command_line, config, schema

CONF = commands.ROOT / "conf"
OURS = ("forecast", "datamodules")
SOURCES = [commands.ROOT / "train.py", *(path for one in OURS for path in sorted((commands.ROOT / one).rglob("*.py")))]
SCHEMAS = {"": schema.Config, **schema.PARTS}
# What a choice cannot be composed without.
NEEDED = {"loss=cross_entropy": ["model.head._target_=forecast.heads.Bernoulli"]}


@functools.cache
def composed(conf: Path) -> tuple[tuple[str, Any], ...]:
    """Every choice of every group, one at a time, as plain containers, with interpolations as they stand."""
    groups = {*schema.Config.__dataclass_fields__, "experiment"}
    paths = [path for path in sorted(conf.glob("*/*.yaml")) if path.parent.name in groups]
    choices = [f"{path.parent.name}={path.stem}" for path in paths]
    return tuple(
        (choice, OmegaConf.to_container(command_line.load(conf, [choice, *NEEDED.get(choice, [])])))
        for choice in choices
    )


def leaves(node: dict[str, Any], path: str = "", holder: str | None = None) -> Iterator[tuple[str, str | None, str]]:
    """Where each key stands, the class that it is an argument of (None: the schema), and its name there."""
    holder = node.get("_target_", holder)
    for key, value in node.items():
        place = f"{path}.{key}".lstrip(".")
        if key in config.SPECIAL:
            continue
        if holder is not None:
            yield place, holder, key
        elif path in SCHEMAS and not (isinstance(value, dict) and value):
            yield place, None, key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and (holder is None or "_target_" in inner):
                yield from leaves(inner, place)


def constructor(target: Any) -> tuple[Any, ast.FunctionDef]:
    """The class that defines the constructor, or the function itself, with its source."""
    owner = target
    if inspect.isclass(target):
        owner = next(one for one in target.__mro__ if "__init__" in vars(one))
    source = inspect.getsource(owner.__init__ if inspect.isclass(owner) else owner)
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    return owner, function


def is_read(target: Any, argument: str, sources: Sequence[Path]) -> bool:
    """Does anything come of this argument of ours? A check that only raises does not count."""
    if is_dataclass(target):
        return attribute_is_read(argument, None, sources)
    owner, function = constructor(target)
    # What is made of it within the constructor, until nothing more is found.
    known = {argument}
    for _ in range(len(function.body)):
        for statement in ast.walk(function):
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and uses(statement.value, known):
                known |= {
                    name.id
                    for name in ast.walk(statement)
                    if isinstance(getattr(name, "ctx", None), ast.Store) and isinstance(name, ast.Name)
                }
            elif isinstance(statement, ast.For) and uses(statement.iter, known):
                known |= {name.id for name in ast.walk(statement.target) if isinstance(name, ast.Name)}
    return any(matters(statement, known, owner, sources) for statement in ast.walk(function))


def matters(statement: ast.AST, known: set[str], owner: Any, sources: Sequence[Path]) -> bool:
    """Does this statement let one of these names out of the constructor?"""
    if isinstance(statement, ast.If):
        only_raises = all(isinstance(one, ast.Raise) for one in (*statement.body, *statement.orelse))
        names = {name.id for name in ast.walk(statement.test) if isinstance(name, ast.Name)}
        others = {name for name in names - known if not name.isupper() and not hasattr(builtins, name)}
        return uses(statement.test, known) and (not only_raises or bool(others))  # a limit for something else
    if isinstance(statement, ast.Return):
        return uses(statement.value, known)
    if isinstance(statement, ast.FunctionDef):
        return (
            statement.name != "__init__" and statement.name != getattr(owner, "__name__", "") and uses(statement, known)
        )
    if isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
        if ast.unparse(call.func) != "super().__init__":
            return uses(call, known)
        parent = owner.__mro__[1]
        names = [name for name in inspect.signature(parent.__init__).parameters if name != "self"]
        given = [*zip(names, call.args, strict=False), *((one.arg, one.value) for one in call.keywords)]
        ours = parent.__module__.partition(".")[0] == owner.__module__.partition(".")[
            0
        ] or parent.__module__.startswith(OURS)
        return any(uses(value, known) and (not ours or is_read(parent, str(name), sources)) for name, value in given)
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and uses(statement.value, known):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        stored = [one.attr for target in targets for one in ast.walk(target) if isinstance(one, ast.Attribute)]
        return any(attribute_is_read(name, owner, sources) for name in stored)
    return False


def uses(node: ast.AST | None, names: set[str]) -> bool:
    return node is not None and any(
        isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load) and one.id in names for one in ast.walk(node)
    )


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def attribute_is_read(name: str, owner: Any, sources: Sequence[Path]) -> bool:
    """Is `.name` read anywhere but in that class's constructor?"""
    for path in sources:
        tree = parsed(path)
        skipped = {
            id(node)
            for found in ast.walk(tree)
            if isinstance(found, ast.ClassDef) and found.name == getattr(owner, "__name__", None)
            for function in found.body
            if isinstance(function, ast.FunctionDef) and function.name == "__init__"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == name
                and isinstance(node.ctx, ast.Load)
                and id(node) not in skipped
            ):
                return True
    return False


def schema_is_read(place: str, conf: Path) -> bool:
    """Is this leaf of the schema read by train.py or forecast/, or referred to in conf/?"""
    parent, _, name = place.rpartition(".")
    told = {f"cfg.{place}", f"config.{place}", f"{parent or 'plain'}[{name!r}]"}
    referred = (f"${{{place}}}" in path.read_text(encoding="utf-8") for path in conf.rglob("*.yaml"))
    return not told.isdisjoint(looked_up()) or any(referred)


@functools.cache
def looked_up() -> frozenset[str]:
    """Every attribute and item that is asked for anywhere, as it is written."""
    kinds = (ast.Attribute, ast.Subscript)
    nodes = (node for path in SOURCES for node in ast.walk(parsed(path)))
    return frozenset(ast.unparse(node) for node in nodes if isinstance(node, kinds))


def unread(conf: Path, ours: Sequence[str] = OURS, sources: Sequence[Path] = SOURCES) -> set[str]:
    """The leaves of a configuration that nobody reads."""
    found, known = set(), {}
    for _choice, plain in composed(conf):
        for place, holder, key in leaves(plain):
            if (holder, key if holder else place) not in known:
                known[holder, key if holder else place] = reader(place, holder, key, conf, ours, sources)
            if not known[holder, key if holder else place]:
                found.add(place)
    return found


def reader(place: str, holder: str | None, key: str, conf: Path, ours: Sequence[str], sources: Sequence[Path]) -> bool:
    if holder is None:
        parent, _, name = place.rpartition(".")
        return name in SCHEMAS[parent].__dataclass_fields__ and schema_is_read(place, conf)
    target = get_object(holder)
    if holder.partition(".")[0] in ours:
        return key in inspect.signature(target).parameters and is_read(target, key, sources)
    return key in config.arguments(place, holder)


def test_every_leaf_has_a_reader() -> None:
    assert len({choice for choice, _ in composed(CONF)}) > 20
    assert unread(CONF) == set()


IDLE = """
class Parent:
    def __init__(self, passed, dropped):
        self.kept = passed
        self.forgotten = dropped

    def work(self):
        return self.kept, self.used

class Idle(Parent):
    def __init__(self, used, stored, checked, unused, passed, dropped, branch, **more):
        super().__init__(passed, dropped=dropped)
        for name, value in (("checked", checked),):
            if value < 0:
                raise ValueError(name)
        self.used = 2 * used
        self.stored = stored
        if branch:
            self.used = 0
"""


@pytest.mark.slow
def test_leaf_that_nobody_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in CONF.iterdir():
        (tmp_path / one.name).symlink_to(one)
    (tmp_path / "callbacks").unlink()
    (tmp_path / "callbacks").mkdir()
    arguments = "used: 1, stored: 1, checked: 1, unused: 1, passed: 1, dropped: 1, branch: 1, surplus: 1"
    (tmp_path / "callbacks" / "default.yaml").write_text(f"idle: {{_target_: idle.Idle, {arguments}}}\n")
    (tmp_path / "idle.py").write_text(IDLE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = unread(tmp_path, ours=(*OURS, "idle"), sources=[*SOURCES, tmp_path / "idle.py"])
    finally:
        sys.modules.pop("idle", None)
    silent = {name for name in found if name.startswith("callbacks.idle.")}
    assert silent == {f"callbacks.idle.{name}" for name in ("stored", "checked", "unused", "dropped", "surplus")}
    with pytest.raises(config.UserError, match=r"callbacks\.idle has no key 'surplus'"):
        config._check_arguments("callbacks.idle", {"_target_": "idle.Idle", "surplus": 1})


STEPS = [*TINY, "trainer.max_epochs=2", "trainer.limit_test_batches=0"]


def trained(folder: Path, *overrides: str) -> str:
    """A digest of the weights after two short epochs."""
    names = {one.partition("=")[0] for one in overrides}
    commands.run(
        *(one for one in STEPS if one.partition("=")[0] not in names), *overrides, "logger=none", folder=folder
    )
    weights = checkpoint.read(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


@pytest.fixture(scope="module")
def as_shipped(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(tmp_path_factory.mktemp("shipped"))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "freeze=[network.encoder]",
        "data.speed=[0,0]",
        "data.fresh=false",
        "data.digits=1",
        "loss.reduction=frame",
        "model.network.cell.forget_bias=3.0",
        "model.network.cell.peephole=false",
        "optimizer.weight_decay=0.5",
        "scheduler.warmup=0.9",
        "trainer.gradient_clip_val=0.001",
    ],
)
def test_setting_changes_what_is_trained(override: str, as_shipped: str, tmp_path: Path) -> None:
    assert trained(tmp_path, override) != as_shipped


def test_training_as_shipped_is_the_same_twice(as_shipped: str, tmp_path: Path) -> None:
    assert trained(tmp_path) == as_shipped


def dealt(*overrides: str) -> list[Any]:
    """What a radar datamodule offers: numbers of windows, the first ones, and what the numbers mean."""
    data = config.build(command_line.load(CONF, ["data=radar", "data.past=2", "data.future=2", *overrides]).data)
    data.setup()
    windows = [data.windows(split) for split in ("train", "validation", "test")]
    batches = [str([field.tolist() for field in next(iter(data._loader(split)))]) for split in ("train", "test")]
    return [[len(one) for one in windows], batches, data.quantity.to_dict(), data.transform, data.grid.to_dict()]


def test_setting_changes_what_a_radar_archive_deals(write_archive: WriteArchive) -> None:
    archive = [f"data.archive={write_archive(times=every(400))}", "data.workers=0"]
    usual = dealt(*archive)
    assert dealt(*archive) == usual
    for override in (
        "seed=1",
        "data.batch_size=3",
        "data.stride=2",
        "data.eval_stride=1",
        "data.crop=8",
        "data.eval_crop=8",
        "data.guard_hours=9",
        "data.floor=-5",
        "data.thresholds=[15]",
        "data.relation=dwd",
        "data.split=[0.6,0.2,0.2]",
        "+data.transform={_target_: forecast.units.Linear, low: -10.0, high: 50.0}",
    ):
        assert dealt(*archive, override.replace("+data.transform", "data.transform")) != usual, override
