"""Sweeps: Hydra's over joblib and submitit, Optuna's by the real command, and what is told of a wrong space."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
import yaml
from commands import ENVIRONMENT, ROOT, run, run_alone
from test_train import TINY

from forecast import checkpoint, command_line
from forecast.errors import UserError
from forecast.provenance import masked_text

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")
from forecast import sweep  # noqa: E402  # needs Optuna
from forecast.space import Space, check, read_space  # noqa: E402  # likewise
from forecast.study import begin, open_storage  # noqa: E402  # likewise

States = optuna.trial.TrialState


def write_space(folder: Path, content: Any, fixed: list[str] | None = None) -> str:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"fixed": fixed or [], "search": content}, sort_keys=False), encoding="utf-8")
    return str(path)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "forecast.sweep", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def study_in(storage: object) -> Any:
    return optuna.load_study(study_name=None, storage=open_storage(str(storage)))


def logged(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["validation/loss"]) for row in csv.DictReader(file) if row["validation/loss"]]


@pytest.mark.slow
def test_two_commands_share_a_study_in_which_a_trial_fails(tmp_path: Path) -> None:
    # Adam refuses the second rate when the run begins; as a number it is right.
    space = write_space(tmp_path, {"optimizer.lr": {"choices": [0.01, -1.0]}}, TINY)
    storage = f"journal:{tmp_path}/study.journal"
    given = (space, "seed=3", "--storage", storage, "--folder", tmp_path / "trials", "--trials", 3)
    printed = []
    for command in [start(*given), start(*given)]:
        out, problem = command.communicate(timeout=500)
        assert command.returncode == 0, problem
        printed.append(out)
    study = study_in(storage)
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == ["0", "1", "2"]
    counted = [trial for trial in study.trials if "folder" in trial.user_attrs]
    assert [trial.number for trial in counted] == [0, 1, 2]
    assert {trial.state for trial in counted} == {States.COMPLETE, States.FAIL}
    for trial in counted:
        folder = Path(trial.user_attrs["folder"])
        if trial.state == States.COMPLETE:
            assert trial.value == min(logged(folder))
            assert trial.params == {"optimizer.lr": "0.01"}
        else:
            assert re.search(r"optimizer.* cannot be.*-1", trial.user_attrs["error"])
            assert (folder / "error.txt").read_text(encoding="utf-8") == f"{trial.user_attrs['error']}\n"
    # One of the two said last which is best; what it said is the run.
    last = next(one for one in printed if f"best: trial {study.best_trial.number}," in one).strip().splitlines()[-1]
    words = shlex.split(last)
    assert words == ["python", "train.py", *TINY, "seed=3", "optimizer.lr=0.01"]
    command_line.accept(ROOT / "conf", words[2:])


class AtOnce(optuna.pruners.BasePruner):  # type: ignore[misc]  # Optuna may be absent
    """Prunes each trial as soon as it has reported a value."""

    def prune(self, study: Any, trial: Any) -> bool:
        return len(trial.intermediate_values) > 0


@pytest.mark.slow
def test_pruned_trial_is_ended_while_it_runs(tmp_path: Path) -> None:
    long = [*(one for one in TINY if "max_epochs" not in one), "trainer.max_epochs=100000"]
    space = read_space(write_space(tmp_path, {"optimizer.lr": {"choices": [0.01]}}, long))
    study = optuna.create_study(storage=open_storage(str(tmp_path / "study.db")), pruner=AtOnce())
    sweep.Sweep(study, space, "validation/loss", tmp_path / "trials").run(1)
    (trial,) = study.trials
    assert trial.state == States.PRUNED
    assert trial.value == logged(tmp_path / "trials/0")[0]
    assert not running(tmp_path / "trials")


@pytest.mark.slow
def test_sigterm_ends_the_running_trial_too_and_the_trial_does_not_count(tmp_path: Path) -> None:
    space = write_space(tmp_path, {"optimizer.lr": {"type": "float", "low": 0.001, "high": 0.002}}, TINY)
    command = start(space, "trainer.max_epochs=100000", "--folder", tmp_path, "--trials", 2)
    until(lambda: (tmp_path / "0/metrics.csv").exists() or command.poll() is not None)
    assert running(tmp_path)
    command.send_signal(signal.SIGTERM)
    _, problem = command.communicate(timeout=200)
    assert command.returncode == 128 + signal.SIGTERM, problem
    assert "the same command goes on" in problem
    assert not running(tmp_path)
    study = study_in(tmp_path / "study.db")
    assert [trial.state for trial in study.trials] == [States.FAIL]
    assert sweep.Sweep(study, read_space(space), "validation/loss", tmp_path).counted() == []


def until(come: Any) -> None:
    latest = time.monotonic() + 300
    while not come():
        assert time.monotonic() < latest
        time.sleep(0.2)


def running(folder: Path) -> bool:
    """Whether a train.py works in a folder below this one."""
    listed = subprocess.run(["ps", "-ww", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    return any("train.py" in line and str(folder) in line and line[0] != "Z" for line in listed.splitlines())


@pytest.fixture
def waiting(tmp_path: Path) -> sweep.Sweep:
    """A study on which nothing has run."""
    space = read_space(write_space(tmp_path, {"optimizer.lr": {"type": "float", "low": 1, "high": 2}}))
    study = begin("waiting", str(tmp_path / "study.db"), "median", space, "validation/loss", "min")
    return sweep.Sweep(study, space, "validation/loss", tmp_path / "trials")


def test_trial_of_a_dead_machine_holds_up_nobody(waiting: sweep.Sweep) -> None:
    dead, alive = waiting.study.ask(), waiting.study.ask()
    dead.set_user_attr("alive", time.time() - sweep.DEAD - 1)
    alive.set_user_attr("alive", time.time() - sweep.DEAD / 2)
    assert [trial.number for trial in waiting.counted()] == [1]
    assert [trial.state for trial in waiting.study.trials] == [States.FAIL, States.RUNNING]


def test_of_two_that_ask_for_the_last_trial_the_first_has_it(
    waiting: sweep.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = waiting.study.ask

    def after_another() -> Any:
        ask()
        return ask()

    monkeypatch.setattr(waiting.study, "ask", after_another)
    waiting.run(1)
    assert not waiting.folder.exists()
    assert [trial.number for trial in waiting.counted()] == [0]


def test_draws_are_a_function_of_seed_and_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[tuple[int, str], list[dict[str, Any]]] = {}
    monkeypatch.setattr(sweep, "ROOT", tmp_path)  # without a train.py every trial fails at once
    monkeypatch.setattr(sweep, "LOOK", 0.01)
    space = read_space(write_space(tmp_path, {"optimizer.lr": {"type": "float", "low": 1, "high": 2}}))
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        study = optuna.create_study()
        sweep.Sweep(study, space, "validation/loss", tmp_path / name, seed).run(3)
        drawn[seed, name] = [trial.params for trial in study.trials]
        assert all("train.py" in trial.user_attrs["error"] for trial in study.trials)
    assert drawn[0, "a"] == drawn[0, "b"] != drawn[1, "c"]
    assert len({one["optimizer.lr"] for one in drawn[0, "a"]}) == 3


def test_joining_with_another_space_is_refused(waiting: sweep.Sweep, tmp_path: Path) -> None:
    other = Space(("seed=1",), waiting.space.search)
    with pytest.raises(UserError, match="begun with another space"):
        begin("waiting", str(tmp_path / "study.db"), "median", other, "validation/loss", "min")


def test_trial_folder_of_another_study_is_not_written_into(waiting: sweep.Sweep) -> None:
    (waiting.folder / "0").mkdir(parents=True)
    with pytest.raises(UserError, match="is there from another study"):
        waiting.run(1)
    assert waiting.counted() == []


def test_space_gives_the_overrides_of_a_trial(tmp_path: Path) -> None:
    searched = {
        "optimizer.lr": {"type": "float", "low": "1e-4", "high": 1, "log": True},
        "model.network.recurrent_kernel": {"type": "int", "low": 3, "high": 7, "step": 2},
        "model.network.hidden": {"choices": [[32], [32, 64]]},
        "scheduler": {"choices": ["cosine", None]},
    }
    space = read_space(write_space(tmp_path, searched, ["model=convlstm"]), ["seed=2"])
    fixed = optuna.trial.FixedTrial(
        {
            "optimizer.lr": 1e-4,
            "model.network.recurrent_kernel": 5,
            "model.network.hidden": "[32,64]",
            "scheduler": "null",
        }
    )
    assert space.overrides(space.suggest(fixed)) == [
        "model=convlstm",
        "seed=2",
        "optimizer.lr=0.0001",
        "model.network.recurrent_kernel=5",
        "model.network.hidden=[32,64]",
        "scheduler=null",
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"type": "float", "low": 1}, "optimizer.lr.high is missing"),
        ({"type": "float", "low": 2, "high": 1}, "low must be less than high"),
        ({"type": "float", "low": 1, "high": 1}, "low must be less than high"),
        ({"type": "float", "low": 0, "high": 1, "log": True}, "must be greater than 0"),
        ({"type": "float", "low": "little", "high": 1}, "low is little; it must be a number"),
        ({"type": "float", "low": True, "high": 2}, "low is true; it must be a number"),
        ({"type": "float", "low": 0, "high": float("inf")}, "high is inf; it must be a number"),
        ({"type": "float", "low": 0, "high": 1, "step": 1}, "has no key 'step'"),
        ({"type": "float", "low": 0, "high": 1, "log": 1}, "log is 1; it must be true or false"),
        ({"type": "int", "low": 0.5, "high": 1}, "low is 0.5; it must be a whole number"),
        ({"type": "int", "low": 1, "high": 4, "step": 2}, "must come to 4 exactly"),
        ({"type": "int", "low": 1, "high": 4, "step": 0}, "step is 0"),
        ({"type": "int", "low": 1, "high": 5, "step": 2, "log": True}, "both log and a step"),
        ({"type": "normal", "low": 0, "high": 1}, "type is normal; it must be float or int"),
        ({"low": 0, "high": 1}, "type is null"),
        ({"choices": []}, "must be a list of values"),
        ({"choices": [1], "low": 0}, "has no key 'low'"),
        ({"choise": [1]}, "type is null"),
        (0.1, "give it choices, or a type"),
    ],
)
def test_wrong_range_is_told_in_a_sentence(given: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        read_space(write_space(tmp_path, {"optimizer.lr": given}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("search: [", "is not YAML"),
        ("optimizer.lr", "must have the keys fixed and search"),
        ("searched: {}", "did you mean 'search'?"),
        ("fixed: []", "searches nothing"),
        ("fixed: {model: lstm}\nsearch: {seed: {choices: [1]}}", "it must be a list of overrides"),
        ("fixed: [seed=1]\nsearch: {seed: {choices: [1]}}", "seed is both fixed and searched"),
        ("search: {monitor.metric: {choices: [validation/mse]}}", "monitor.metric cannot be searched"),
    ],
)
def test_wrong_space_is_told_in_a_sentence(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(told)):
        read_space(str(tmp_path / "space.yaml"))


@pytest.mark.parametrize(
    ("search", "fixed", "told"),
    [
        ({"optimizer.rate": {"choices": [1]}}, [], "no key 'rate'"),
        ({"model.network.patch": {"choices": [2, "two"]}}, [], "model.network.patch is 'two'"),
        ({"loss": {"choices": ["mse", "mae"]}}, [], "Values of different losses cannot be compared"),
        ({"optimizer.lr": {"choices": [1]}}, ["hydra.run.dir=a"], "use --folder"),
        ({"optimizer.lr": {"choices": [1]}}, ["hydra/launcher=joblib"], "use --folder"),
    ],
)
def test_override_that_train_would_refuse_is_told_before_any_trial(
    search: Any, fixed: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        check(read_space(write_space(tmp_path, search, fixed)))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/sweep").glob("*.yaml")))
def test_spaces_that_are_shipped_are_right(name: str) -> None:
    assert check(read_space(name)) == ("validation/loss", "min")


@pytest.mark.parametrize("secret", ["hidden", "hid@den", "hid/den:"])
def test_password_of_a_storage_is_never_told(secret: str) -> None:
    assert masked_text(f"no postgresql://me:{secret}@host:5432/db") == "no postgresql://me:***@host:5432/db"
    assert secret not in masked_text(f"mysql://host/db?user=me&password={secret}&x=1")
    space = Space((), {})
    with pytest.raises(UserError) as told:
        begin("a", f"nosuchdb://me:{secret}@host/db", "none", space, "validation/loss", "min")
    assert secret not in str(told.value)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run(*TINY, "seed=1", folder=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_of_a_launcher_are_single_runs_to_the_bit(launcher: str, single: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="the extra sweep is not installed"
    )
    run_alone("-m", *TINY, "seed=0,1", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}")
    weights = [
        checkpoint.read(folder / "checkpoints/last.ckpt")["state_dict"]
        for folder in (single, tmp_path / "1", tmp_path / "0")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    with xr.open_dataset(single / "skill.nc") as one, xr.open_dataset(tmp_path / "1/skill.nc") as job:
        for skill in (one, job):
            del skill.attrs["provenance"]  # which tells folder and time
        xr.testing.assert_identical(one, job)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_job_of_a_launcher_may_have_processes_of_its_own(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip(
        f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="the extra sweep is not installed"
    )
    pair = [*TINY, "trainer=ddp", "data.batch_size=2"]
    run(*pair, folder=tmp_path / "alone")
    run_alone("-m", *pair, "seed=0,1", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}")
    alone, job = (checkpoint.read(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("alone", "0"))
    assert all(torch.equal(alone[name], job[name]) for name in alone)
    assert (tmp_path / "1/skill.nc").exists()


def test_sweep_of_wandb_gives_overrides_that_train_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="the extra wandb is not installed")
    led = yaml.safe_load((ROOT / "docs/wandb_sweep.yaml").read_text(encoding="utf-8"))
    assert (ROOT / led["program"]).exists()
    composed = command_line.load(ROOT / "conf")
    goal = {"min": "minimize", "max": "maximize"}[composed.monitor.mode]
    assert led["metric"] == {"name": composed.monitor.metric, "goal": goal}
    ends = {
        key: one["values"] if "values" in one else [one["min"], one["max"]] for key, one in led["parameters"].items()
    }
    for end in range(max(map(len, ends.values()))):
        drawn = {"args": {key: {"value": values[min(end, len(values) - 1)]} for key, values in ends.items()}}
        # wandb's agent fills in its command in the same two steps.
        arguments = utils.create_sweep_command_args(drawn)["args_no_hyphens"]
        place = led["command"].index("${args_no_hyphens}")
        command = [*led["command"][:place], *arguments]
        command_line.accept(ROOT / "conf", command[led["command"].index("${program}") + 1 :])


COMMANDS = re.compile(r"^python (train\.py|-m forecast\.\w+)(.*?)(?:#.*)?$", re.MULTILINE)


def test_commands_of_the_page_are_right(tmp_path: Path) -> None:
    found = COMMANDS.findall((ROOT / "docs/sweeps.md").read_text(encoding="utf-8").replace("\\\n", ""))
    assert {program for program, _ in found} == {"train.py", "-m forecast.sweep", "-m forecast.runs"}
    for program, rest in found:
        words = shlex.split(rest)
        if program == "train.py":
            command_line.accept(ROOT / "conf", [one for one in words if one != "-m"])
        elif program == "-m forecast.sweep":
            options = sweep.parser().parse_intermixed_args(words)
            check(read_space(options.space, options.overrides))


def test_missing_extra_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ModuleNotFoundError('No module named optuna')\n", encoding="utf-8")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "forecast.sweep", "convlstm"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: A sweep needs Optuna: pip install 'stormcell[sweep]'\n"
