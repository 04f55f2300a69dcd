"""The processes of a run: those of a cluster are taken as they are, those of a machine are started here.

torchrun and SLURM's srun start every process themselves, and each reads the same command line. Otherwise process 0
starts the others of its machine. They are given the resolved configuration, not the command line: in a sweep that would
say the whole sweep, and in a job of joblib or submitit it is another program's.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from forecast.errors import UserError

CLUSTERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
WORKER = "STORMCELL_WORKER"
"""Set in the environment of the processes that are started here."""
GRACE = 30.0
"""Seconds in which a process that lost another one may end by itself."""


class Machine(LightningEnvironment):
    """Lightning's environment for the processes of one machine, which Lightning is not to start."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


def by_cluster() -> bool:
    """Does something outside start the processes?"""
    return any(cluster.detect() for cluster in CLUSTERS)


def environment() -> list[ClusterEnvironment]:
    """The plugin by which Lightning leaves to us what is ours: to start processes, and to heed SLURM's signals."""
    if not by_cluster():
        return [Machine()]
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if slurm else []


def is_worker() -> bool:
    """Was this process started by process 0?"""
    return WORKER in os.environ


def receive() -> str:
    """What process 0 gave to a worker. From now on the worker ends as soon as process 0 has."""
    # Without Python's buffer, whose lock a thread would hold at exit.
    with os.fdopen(os.dup(0), "rb", buffering=0) as pipe:
        size = int(pipe.readline())
        received = bytearray()
        while len(received) < size:
            received += pipe.read(size - len(received)) or os._exit(1)

    def watch() -> None:
        os.read(0, 1)  # process 0 never writes more, so this returns when it is gone
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return received.decode()


@contextmanager
def others(trainer: pl.Trainer, program: Path, configuration: str) -> Iterator[None]:
    """The other processes of this machine, for as long as the block lasts.

    Args:
        trainer: knows how many there are.
        program: calls `receive` where `is_worker`.
        configuration: for them.

    Raises:
        UserError: the strategy wants to start processes in a way that cannot be, several machines do not know of each
            other, or the port is taken.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "trainer.strategy must start every process as a program of its own, else scores would be added up wrongly; "
            "use trainer=ddp."
        )
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(cluster, Machine) or is_worker():
        yield
        return
    if trainer.num_nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            f"trainer.num_nodes is {trainer.num_nodes}, but nothing says which machine this is; start the run by torchrun "
            "or srun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each."
        )
    if trainer.world_size > 1 and cluster.node_rank() == 0:
        _check_port(cluster.main_port)
    before = dict(os.environ)
    os.environ |= {
        "MASTER_ADDR": cluster.main_address,
        "MASTER_PORT": str(cluster.main_port),
        "NODE_RANK": str(cluster.node_rank()),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(trainer.world_size),
    }
    workers: list[subprocess.Popen[bytes]] = []
    ended = threading.Event()
    try:
        for rank in range(1, trainer.num_devices):
            workers.append(_start(program, rank, configuration))
        threading.Thread(target=_watch, args=(workers, ended), daemon=True).start()
        yield
        codes = [worker.wait() for worker in workers]
        if any(codes):
            print(f"Processes that helped ended with the codes {codes} after all was done.", file=sys.stderr)
    finally:
        ended.set()
        for worker in workers:
            worker.kill()  # they write nothing
            worker.wait()
        # The next job of a sweep has other processes, and an environment of its own.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before


def same_folder(overrides: Sequence[str]) -> list[str]:
    """Overrides by which every process of a cluster's run takes the same folder, unless the command line names one.

    Processes that start in different seconds would name it by different times. Under SLURM the folder is named by the
    job, so that a job that is queued again finds what it left; under torchrun process 0 tells the time to all.

    Args:
        overrides: of the command line.
    """
    if not by_cluster() or any(one.lstrip("+").startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for one in overrides):
        return []
    if "SLURM_STEP_ID" in os.environ and not TorchElasticEnvironment.detect():
        name = f"slurm/{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    elif TorchElasticEnvironment.detect():
        name = _told_by_the_first(time.strftime("%Y-%m-%d/%H-%M-%S"))
    else:
        return []
    return [f"hydra.run.dir=runs/{name}", f"hydra.sweep.dir=runs/sweeps/{name}"]


def _told_by_the_first(text: str) -> str:
    """What process 0 says, in every process, through the store by which torchrun's processes find each other.

    After a restart of all processes it is what was said before, as long as torchrun keeps its store.
    """
    first = os.environ["RANK"] == "0"
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # it is there, unmentioned in __all__
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )
    if first:
        store.compare_set("stormcell/started", "", text)
    return str(store.get("stormcell/started").decode())


def _check_port(port: int) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError:
        raise UserError(
            f"MASTER_PORT is {port}, on which we may not listen, or another program does; choose a free one, or unset it."
        ) from None


def _start(program: Path, rank: int, configuration: str) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "LOCAL_RANK": str(rank), WORKER: "1"},
        stdin=subprocess.PIPE,
    )
    assert worker.stdin is not None
    content = configuration.encode()
    worker.stdin.write(f"{len(content)}\n".encode() + content)
    worker.stdin.flush()  # and left open: its end is how the worker knows that we are gone
    return worker


def _watch(workers: Sequence[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """Where a worker fails, this process may wait for it in vain, deep inside a collective operation: ends it then."""
    while not ended.wait(1.0):
        if any(worker.poll() for worker in workers):
            if not ended.wait(GRACE):
                for worker in workers:
                    worker.kill()
                print(
                    "error: a process of this run has failed; what it said stands above.", file=sys.stderr, flush=True
                )
                os._exit(1)
            return
