"""`python train.py`, many times at the price of one import: a server that has imported everything forks for each run.

A run is the real train.py as `__main__`, in a process of its own, with the arguments, environment and working folder that
`python train.py` would have. The server starts with the first run and ends with pytest. What libraries read while they are
imported (OMP_NUM_THREADS, MPLBACKEND) is the server's. Whoever wants an interpreter of its own takes `run_alone`.
"""

import atexit
import builtins
import contextlib
import functools
import gc
import importlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
TIMEOUT = 600.0  # seconds
NUMBER = struct.Struct("!i")  # a process id, then an exit code
# What Lightning, xarray and torch import when they are first used, and what takes long.
LATE = ("dask.array", "matplotlib.figure", "netCDF4", "sklearn.datasets", "torch._dynamo", "xarray.backends.zarr")

Ended = subprocess.CompletedProcess[str]


class Command:
    """A command that runs.

    Args:
        arguments: sys.argv, script first.
        env: its whole environment.
        largest_file: bytes after which a write fails, as on a full disk.
    """

    def __init__(self, arguments: list[str], env: Mapping[str, str], largest_file: int | None = None) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._outputs = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 # read when it has ended
        self._channel, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), *(file.fileno() for file in self._outputs)]
            socket.send_fds(server(), [b"."], descriptors)
        request = {"arguments": arguments, "env": dict(env), "largest_file": largest_file}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        (self.pid,) = NUMBER.unpack(self._channel.recv(NUMBER.size))

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: it goes on running.
        """
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                (self.returncode,) = NUMBER.unpack(self._channel.recv(NUMBER.size))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._channel.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _content(self._outputs[0])

    @property
    def stderr(self) -> str:
        return _content(self._outputs[1])


def start(
    *overrides: str,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    largest_file: int | None = None,
    script: str | Path = "train.py",
) -> Command:
    """Starts `python train.py OVERRIDES` and does not wait.

    Args:
        overrides: arguments.
        folder: the run folder, as hydra.run.dir.
        env: added to the environment.
        largest_file: bytes after which a write fails, as on a full disk.
        script: another script, beneath the root.
    """
    return Command(_arguments(overrides, folder, script), {**ENVIRONMENT, **(env or {})}, largest_file)


def run(
    *overrides: str,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    check: bool = True,
    largest_file: int | None = None,
    script: str | Path = "train.py",
) -> Ended:
    """`python train.py OVERRIDES`, to its end; `check`: it must end well. The other arguments are those of `start`."""
    command = start(*overrides, folder=folder, env=env, largest_file=largest_file, script=script)
    try:
        code = command.wait(timeout)
    except subprocess.TimeoutExpired:
        command.send_signal(signal.SIGKILL)
        raise AssertionError(f"{command.args} takes more than {timeout} s: {command.stderr[-4000:]}") from None
    return _checked(Ended(command.args, code, command.stdout, command.stderr), check)


def run_alone(
    *overrides: str,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    check: bool = True,
    script: str | Path = "train.py",
) -> Ended:
    """The same in an interpreter that begins from nothing, as at a user's."""
    arguments = _arguments(overrides, folder, script)
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**ENVIRONMENT, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    return _checked(Ended(arguments, ended.returncode, ended.stdout, ended.stderr), check)


@functools.cache
def server() -> socket.socket:
    """The way to the server, which is started where it was not; it ends when this end is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    if ours.recv(1) != b"!":
        raise RuntimeError("The server of tests/commands.py could not begin; it has said why on stderr.")
    return ours


def _arguments(overrides: tuple[str, ...], folder: Path | None, script: str | Path) -> list[str]:
    return [str(script), *overrides, *([] if folder is None else [f"hydra.run.dir={folder}"])]


def _content(file: IO[bytes]) -> str:
    descriptor = file.fileno()  # shared with the command: its place in the file must not be moved
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def _checked(ended: Ended, check: bool) -> Ended:
    if check:
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended


# From here on: the server.


def preload() -> None:
    """Imports what a run imports: train.py's own, the classes that conf/ names, and LATE."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path("conf").rglob("*.yaml")))
    named = re.findall(r"_target_: ((?:forecast|datamodules)[\w.]*)\.\w+", text)
    for module in ("train", *dict.fromkeys(named), *LATE):
        with contextlib.suppress(Exception):  # not installed, or broken: the command itself will say so
            importlib.import_module(module)
    sys.modules.pop("train", None)  # a run knows it as __main__ only
    tasks = Path("/proc/self/task")  # a thread of a library would be lost in the fork, with what it holds
    if threading.active_count() > 1 or (tasks.is_dir() and len(list(tasks.iterdir())) > 1):
        raise RuntimeError("Something that train.py imports has started a thread; forking is not safe.")


def serve(control: socket.socket) -> dict[str, Any]:
    """Forks for each command; returns what to run in the process that is to run it, and nowhere else."""
    control.sendall(b"!")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's affair
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not descriptors:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            return keep(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(channel_descriptor: int, stdout: int, stderr: int) -> dict[str, Any]:
    """Forks once more: the parent tells the exit code when there is one, the child is the command."""
    channel = socket.socket(fileno=channel_descriptor)
    with channel.makefile("r") as lines:
        request: dict[str, Any] = json.loads(lines.readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        channel.sendall(NUMBER.pack(child))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # nobody wants to know
            channel.sendall(NUMBER.pack(code))
        os._exit(0)
    channel.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for given, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(given, standard)
        os.close(given)
    return request


def become(arguments: list[str], env: Mapping[str, str], largest_file: int | None) -> tuple[Any, dict[str, Any]]:
    """Makes this process look as `python SCRIPT ARGUMENTS` does; returns the script's code and its globals."""
    before = searched(os.environ)
    os.environ.clear()
    os.environ.update(env)
    script = os.path.join(os.getcwd(), arguments[0])
    sys.argv[:] = arguments
    sys.orig_argv[:] = [sys.executable, *arguments]
    sys.path[: 1 + len(before)] = [os.path.dirname(os.path.realpath(script)), *searched(env)]
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main = types.ModuleType("__main__")
    vars(main).update(__file__=script, __builtins__=builtins)
    sys.modules["__main__"] = main
    return compile(Path(script).read_bytes(), script, "exec"), vars(main)


def searched(env: Mapping[str, str]) -> list[str]:
    """The folders of PYTHONPATH."""
    return [os.path.abspath(folder) for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    preload()
    gc.collect()
    gc.freeze()  # else each command's first collection copies the memory that all share
    # The script ends this process as it would end its own: by coming to its end, or by raising.
    exec(*become(**serve(socket.socket(fileno=int(sys.argv[1])))))
