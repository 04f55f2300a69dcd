"""The configuration: composes, refuses with a sentence, and builds."""

import json
import os
import signal
import subprocess
from pathlib import Path

import commands
import pytest
from omegaconf import OmegaConf

from forecast import command_line, config
from forecast.errors import UserError
from forecast.heads import Point

CONF = Path(__file__).parent.parent / "conf"


def sentence(overrides: list[str]) -> str:
    """What the user is told; it must be one line."""
    with pytest.raises(UserError) as refused:
        command_line.accept(CONF, overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.pst=3", "data has no key 'pst'; did you mean 'past'?"),
        ("dta=radar", "did you mean 'data'?"),
        ("model=convlsm", "There is no model=convlsm; did you mean 'convlstm'?"),
        ("trainer.max_epoch=3", "did you mean 'max_epochs'?"),
        ("trainer.max_epochs=many", "trainer.max_epochs is 'many'"),
        ("model.network.cell.peepole=true", "did you mean 'peephole'?"),
        ("model.network.hidden=[64,a]", "model.network.hidden is [64, 'a']"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
        ("seed=x", "seed"),
        ("run=fitt", "run is 'fitt'; it must be one of fit, test, describe."),
        ("monitor.mode=up", "monitor.mode is 'up'"),
        ("monitor.metrik=a", "did you mean 'metric'?"),
        ("data=radar", "data.archive is not set"),
        ("model.network=null", "either a network or a baseline"),
        ("data.past=[", "data.past=[ is no KEY=VALUE"),
        ("experiment=nothing", "There is no experiment=nothing"),
        ("loss._target_=forecast.losses.MSE", "loss._target_ is 'forecast.losses.MSE', which cannot be imported"),
        ("data.seed=${sed}", "cannot be resolved"),
        ("trainer.overfit_batches=1", "use trainer.limit_train_batches"),
        ("trainer.precision=bf16-true", "bf16-mixed"),
        ("trainer.use_distributed_sampler=true", "leave it false"),
        ("trainer.logger=false", "loggers are chosen by logger=csv"),
        ("loss=null", "loss is null; choose one of the files in conf/loss/."),
        ("loss=mse,null", "loss is null; choose one of the files in conf/loss/."),
        ("folder=here", "set it by hydra.run.dir=FOLDER"),
        ("seed=-1", "seed is -1"),
        ("references=null", "references is null; choose one of the files in conf/references/."),
        ("references.persistence.slwo=true", "did you mean 'slow'?"),
        ("references.persistence.baseline=null", "references.persistence.baseline names no class to build"),
        ("metrics.test.fractions.scale=[1]", "did you mean 'scales'?"),
        ("+metrics.test.mine=1", "metrics.test.mine names no class to build"),
        ("subsample.windows=0", "subsample.windows is 0; it must be at least 1."),
        (
            "accumulation.minutes=[60,30]",
            "accumulation.minutes are [60, 30]; give numbers above 0, each above the last.",
        ),
    ],
)
def test_mistake_is_answered_with_one_sentence_that_names_it(override: str, said: str) -> None:
    assert said in sentence([override])


def test_typo_in_an_experiment_file_is_refused(tmp_path: Path) -> None:
    for directory in CONF.iterdir():
        (tmp_path / directory.name).symlink_to(directory)
    (tmp_path / "experiment").unlink()
    (tmp_path / "experiment").mkdir()
    for name, body, said in [
        ("nested", "trainer: {max_epoch: 3}", "did you mean 'max_epochs'?"),
        ("deep", "model: {network: {cell: {forget_bas: 3}}}", "did you mean 'forget_bias'?"),
        ("top", "trainr: {max_epochs: 3}", "In 'experiment/top': .*did you mean 'trainer'?"),
    ]:
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{body}\n")
        with pytest.raises(UserError, match=said) as refused:
            command_line.accept(tmp_path, [f"experiment={name}"])
        assert "\n" not in str(refused.value)


def test_argument_of_a_class_needs_no_plus() -> None:
    given = ["trainer.fast_dev_run=true", "optimizer.amsgrad=true", "seed=3"]
    assert command_line.accept(CONF, given) == ["++trainer.fast_dev_run=true", "++optimizer.amsgrad=true", "seed=3"]


def test_sweep_tries_every_value_once() -> None:
    swept = ["model=convlstm,lstm", "seed=0,1,2"]
    assert command_line.accept(CONF, swept) == swept
    assert "lsmt" in sentence(["model=convlstm,lsmt", "seed=0,1,2"])


@pytest.mark.parametrize(
    "group",
    [
        *("model", "loss", "optimizer", "scheduler", "trainer", "logger", "callbacks", "experiment"),
        *("references", "metrics"),
    ],
)
def test_every_shipped_choice_is_valid(group: str) -> None:
    needed = {"loss": {"cross_entropy": ["model.head._target_=forecast.heads.Bernoulli"]}}
    for path in sorted((CONF / group).glob("*.yaml")):
        overrides = [f"{group}={path.stem}", *needed.get(group, {}).get(path.stem, [])]
        composed = command_line.load(CONF, overrides)
        if OmegaConf.is_missing(composed.data, "archive"):
            composed.data.archive = "archive.nc"
        config.check(composed)


def test_build_passes_on_what_the_class_names_and_nothing_else() -> None:
    part = {"_target_": "forecast.units.Linear", "low": 2.0}
    built = config.build(part, high=5.0, frame_size=(3, 3))
    assert (built.low, built.high) == (2.0, 5.0)


def test_build_repeats_the_sentence_of_the_class() -> None:
    part = OmegaConf.create({"_target_": "forecast.losses.MeanSquaredError", "reduction": "half"})
    with pytest.raises(UserError, match=r"Unknown loss\.reduction 'half'"):
        config.build(part, head=Point())


def test_mistakes_end_the_command_without_traceback(tmp_path: Path) -> None:
    for mistake in (
        ["data.pst=3"],
        ["data=radar", f"data.archive={tmp_path / 'none.nc'}"],
        ["ckpt_path=nowhere.ckpt"],
        ["run=test"],
    ):
        ended = commands.run(*mistake, folder=tmp_path / "run", check=False)
        assert ended.returncode != 0
        assert "Traceback" not in ended.stderr + ended.stdout
        assert ended.stderr.strip().splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "run" / "checkpoints").exists()


PROBE = """
import __main__, inspect, json, os, signal, sys
def here(): pass
said = {"argv": sys.argv, "original": sys.orig_argv[1:], "path": sys.path, "folder": os.getcwd(), "env": dict(os.environ)}
said["main"] = [__main__.__file__, __name__, here.__module__, __main__.here is here, here.__code__.co_filename]
said["spec"] = [repr(__spec__), __package__, "train" in sys.modules, "jaxtyping._import_hook" in str(sys.meta_path)]
said["signals"] = [repr(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM)]
said["streams"] = [one.isatty() for one in (sys.stdin, sys.stdout, sys.stderr)]
print(json.dumps(said))
print("héard", file=sys.stderr)
raise SystemExit("so be it")
"""


def test_server_runs_a_script_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    script = os.path.relpath(tmp_path / "probe.py", commands.ROOT)  # as train.py is given
    given = {"env": {"PYTHONPATH": str(tmp_path / "more"), "STORM": "cell"}, "check": False}
    alone = commands.run_alone("a=1", "b='x y'", script=script, **given)
    served = commands.run("a=1", "b='x y'", script=script, **given)
    assert (served.args, served.returncode, served.stderr) == (alone.args, 1, alone.stderr)
    assert json.loads(served.stdout) == json.loads(alone.stdout)


def test_command_of_the_server_is_a_process_that_can_be_killed(tmp_path: Path) -> None:
    command = commands.start("data.train=100000", "trainer.accelerator=cpu", folder=tmp_path)
    assert command.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(timeout=0.01)
    command.send_signal(signal.SIGKILL)
    assert command.wait(timeout=60) == command.poll() == -signal.SIGKILL
