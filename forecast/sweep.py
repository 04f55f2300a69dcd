"""Searches a space of settings with Optuna; each trial is a `python train.py` of its own.

    python -m forecast.sweep SPACE [OVERRIDE ...] [--study NAME] [--storage STORAGE] [--trials N] [--folder DIR]

Several of these commands, on one machine or on many, that are given the same storage and study work on the same trials.
The same command once more goes on where the first one ended. docs/sweeps.md leads through it.
"""

import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import killpg
from pathlib import Path
from typing import Any

import numpy as np

from forecast import runs
from forecast.errors import UserError
from forecast.files import whole
from forecast.provenance import masked_text

try:
    import optuna
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import FrozenTrial, TrialState

    from forecast.space import Space, check, read_space
    from forecast.study import PRUNERS, begin
except ModuleNotFoundError:  # this module is a command, and nothing but train.py's sweeps needs Optuna
    raise SystemExit("error: A sweep needs Optuna: pip install 'stormcell[sweep]'") from None

ROOT = Path(__file__).resolve().parents[1]
LOOK = 1.0  # seconds between two looks at a trial that runs
GRACE = 60.0  # seconds in which a trial that is told to end may save what it has
ALIVE = 60.0  # seconds after which a running trial says again that it runs
DEAD = 600.0  # seconds of silence after which a running trial is given up


@dataclass
class Sweep:
    """A study, and what its trials are run with.

    Args:
        study: of Optuna; its pruner judges the trials.
        space: of the trials.
        metric: the monitored value.
        folder: trial N runs in its subfolder N.
        seed: the draws of a trial are a function of it, the trial's number, and the trials before.
    """

    study: optuna.Study
    space: Space
    metric: str
    folder: Path
    seed: int = 0
    told_to_end: int | None = field(default=None, init=False)
    """The signal, once there was one."""

    def run(self, trials: int) -> None:
        """Runs trials until the study has so many, those of all other processes counted."""
        with self._signals():
            while self.told_to_end is None and len(self.counted()) < trials:
                trial = self.study.ask()
                try:
                    # Two processes may ask for the last trial at once: the lower number has it.
                    if sum(one.number < trial.number for one in self.counted()) >= trials:
                        return
                    self._run(trial)
                except UpdateFinishedTrialError:
                    print(f"trial {trial.number}: given up by another process, since this one was silent", flush=True)
                finally:
                    # No sentence: it does not count as a trial.
                    self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def counted(self) -> list[FrozenTrial]:
        """The trials that ended by themselves and those that run, not those that were broken off."""
        now = time.time()
        for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            assert one.datetime_start is not None
            if now - one.user_attrs.get("alive", one.datetime_start.timestamp()) > DEAD:
                self.study.tell(one.number, state=TrialState.FAIL, skip_if_finished=True)
        known = self.study.get_trials(deepcopy=False)
        return [one for one in known if one.state != TrialState.FAIL or "error" in one.user_attrs]

    def _run(self, trial: optuna.Trial) -> None:
        """One trial to its end, which is told to the study unless we are told to end ourselves."""
        trial.set_user_attr("alive", time.time())
        seed = int(np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        overrides = self.space.overrides(self.space.suggest(trial))
        folder = self.folder / str(trial.number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{folder} is there from another study; remove it, or give another --folder.") from None
        trial.set_user_attr("folder", str(folder))
        print(f"trial {trial.number}: {shlex.join(overrides[len(self.space.fixed) :])}", flush=True)
        with (folder / "output.txt").open("wb") as output:
            # In a session of its own, so that Ctrl-C comes to us alone and the trial is told to save by SIGTERM.
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={_quoted(folder)}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            pruned = self._watch(trial, process, folder)
        finally:
            _end(process)
        if self.told_to_end is not None:
            return
        run = runs.read(folder)
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            ending = "pruned"
        elif process.returncode or run.best is None:
            error = _reason(folder, run, process.returncode, self.metric)
            with whole(folder / "error.txt") as path:
                path.write_text(f"{error}\n", encoding="utf-8")
            trial.set_user_attr("error", error)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            ending = f"failed: {error}"
        else:
            self.study.tell(trial, run.best.value, skip_if_finished=True)
            ending = f"{self.metric} {run.best.value:.6g} at step {run.best.step}"
        print(f"trial {trial.number}: {ending}", flush=True)

    def _watch(self, trial: optuna.Trial, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Reports the monitored values of a trial until it ends; True where the pruner says that it should."""
        reported, alive = 0, time.time()
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
            points = runs.history(folder, self.metric)
            for number, point in enumerate(points[reported:], start=reported + 1):
                if math.isfinite(point.value):
                    trial.report(point.value, number)
                    if process.returncode is None and trial.should_prune():
                        return True
            reported = len(points)
            if process.returncode is not None or self.told_to_end is not None:
                return False
            if time.time() - alive > ALIVE:
                alive = time.time()
                trial.set_user_attr("alive", alive)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Remembers the first signal to end, so that Optuna is never interrupted; a second one ends at once."""

        def remember(number: int, frame: object) -> None:
            self.told_to_end = number
            signal.signal(number, before[number])

        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What is ignored stays so: nohup, and Ctrl-C for a command in the background.
        before: dict[int, Any] = {
            number: signal.getsignal(number) for number in wanted if signal.getsignal(number) != signal.SIG_IGN
        }
        for number in before:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a trial that still runs, and whatever it has started."""
    if process.poll() is not None:
        return
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(folder: Path, run: runs.Run, code: int, metric: str) -> str:
    """Why a trial failed, in a sentence."""
    if run.state.startswith("failed: "):
        return run.state.removeprefix("failed: ")
    if code == 0:
        return f"{folder / 'metrics.csv'} has no finite {metric}; a sweep needs run=fit and a logger that writes it."
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ") or f"train.py ended with exit code {code}."


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's."""
    return "'" + str(path).replace("'", "\\'") + "'"


def tell_best(sweep: Sweep) -> None:
    """Prints the best trial and the command that repeats it.

    Raises:
        UserError: no trial was trained to its end, and none is running any more.
    """
    states = [one.state for one in sweep.counted()]
    named = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL, "running elsewhere": TrialState.RUNNING}
    told = f"{len(states)} trials" + "".join(
        f", {states.count(state)} {name}" for name, state in named.items() if state in states
    )
    if TrialState.COMPLETE in states:
        best = sweep.study.best_trial
        print(f"\n{told}; all: python -m forecast.runs {shlex.quote(str(sweep.folder))}")
        print(f"best: trial {best.number}, {sweep.metric} {best.value:.6g}, in {best.user_attrs['folder']}")
        print(f"python train.py {shlex.join(sweep.space.overrides(best.params))}")
    elif TrialState.RUNNING in states:
        print(f"\n{told}; none has ended well so far")
    else:
        raise UserError(f"No trial was trained to its end ({told}); see {sweep.folder}/*/output.txt.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m forecast.sweep",
        description="Searches a space of settings with Optuna; each trial is a `python train.py` of its own.",
        epilog="Several of these commands with the same storage and study share the trials; the same command once more "
        "goes on. Ctrl-C ends the running trial too, and it is not counted.",
    )
    made.add_argument("space", metavar="SPACE", help="YAML file of the space, or the name of one in conf/sweep/")
    made.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="for every trial, as given to train.py")
    made.add_argument("--study", metavar="NAME", help="default: the name of the space")
    made.add_argument(
        "--storage",
        help="SQLite file, URL of a database, or journal:FILE, which works on network file systems; "
        "default: study.db in the folder",
    )
    made.add_argument("--trials", type=int, default=20, metavar="N", help="of all processes together (default: 20)")
    made.add_argument("--folder", type=Path, metavar="DIR", help="trial N runs in DIR/N; default: runs/sweeps/NAME")
    made.add_argument("--seed", type=int, default=0, help="of the sampler (default: 0); the trials' own is seed=N")
    made.add_argument(
        "--pruner",
        choices=PRUNERS,
        default="median",
        help="ends trials that promise nothing, by their monitored values so far (default: median)",
    )
    return made


def main() -> None:
    """The command."""
    given = parser().parse_intermixed_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if given.trials < 1:
            raise UserError(f"--trials is {given.trials}; it must be 1 or more.")
        if given.seed < 0:
            raise UserError(f"--seed is {given.seed}; it must be 0 or more.")
        space = read_space(given.space, given.overrides)
        metric, mode = check(space)
        name = given.study or Path(given.space).stem
        folder = (given.folder or Path("runs/sweeps") / name).absolute()
        storage = given.storage or str(folder / "study.db")
        sweep = Sweep(begin(name, storage, given.pruner, space, metric, mode), space, metric, folder, given.seed)
        print(
            f"study {name} in {masked_text(storage)}: {len(sweep.counted())} of {given.trials} trials are there",
            flush=True,
        )
        sweep.run(given.trials)
        if sweep.told_to_end is not None:
            print("ended before its time; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + sweep.told_to_end)
        tell_best(sweep)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
