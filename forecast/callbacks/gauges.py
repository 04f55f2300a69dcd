"""The gauges of a training: learning rate, speed and memory, in the rows of the training log."""

import sys
from time import monotonic
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from forecast.batch import Frames


class Gauges(pl.Callback):
    """Logs optimizer/lr, speed/..., memory/process_gb and, on CUDA, memory/gpu_gb.

    They stand in the rows of the training loss: every `log_every_n_steps` steps. The rate is that of the row's step (of
    several parameter groups optimizer/lr_0, optimizer/lr_1 ...). Memory is the largest so far of process 0 and its
    device, in 10^9 bytes. Between the rows nothing waits for the device.

    speed/samples_per_second counts the training samples of all processes since the last row, without padding, by the
    time that training took: validations are left out, and so is the next batch after one inside an epoch.

    speed/waiting_for_data is the share of that time, 0 to 1 and the mean of all processes, in which no batch was being
    trained on: from the end of one to the start of the next, and from the start of an epoch to that of its first batch.
    There a batch is fetched from the loader, moved to the device and decoded; that counts whatever is logged or saved
    meanwhile, so the share is rather too large than too small. On a GPU it is the host that waits, and the device may
    still be busy with what it was given.

    Before the first step the loggers forget what a killed run had logged after the checkpoint that it goes on from.
    """

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._samples: Tensor | int = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._since: float | None = None
        self._idle_since: float | None = None
        self._logged = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples, self._seconds, self._waited, self._since, self._idle_since = 0, 0.0, 0.0, None, None
        self._logged = trainer.global_step
        for logger in trainer.loggers:
            if hasattr(logger, "forget_after"):
                logger.forget_after(trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._idle_since = monotonic()
        if self._since is None:
            self._since = self._idle_since

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        now = monotonic()
        if self._since is None:
            self._since = now
        if self._idle_since is not None:
            self._waited += now - self._idle_since
            self._idle_since = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Frames, batch_idx: int
    ) -> None:
        self._idle_since = monotonic()
        self._samples = self._samples + (batch.block >= 0).sum()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it where mypy does not look
        # A step may take several batches, and is logged once.
        if not every or trainer.global_step % every or trainer.global_step == self._logged:
            return
        self._logged = trainer.global_step
        metrics = (
            dict(zip(_names(len(self._rates)), self._rates, strict=True)) | self._speed(trainer) | _memory(pl_module)
        )
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._since is not None:
            self._seconds += monotonic() - self._since
            self._since = self._idle_since = None

    def _speed(self, trainer: pl.Trainer) -> dict[str, float]:
        assert self._since is not None
        now = monotonic()
        seconds = self._seconds + now - self._since
        counted = torch.as_tensor(self._samples, dtype=torch.float32)
        own = torch.cat([counted[None], counted.new_tensor([self._waited, seconds])])
        samples, waited, all_seconds = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        self._since = self._idle_since = now
        return {"speed/samples_per_second": samples / seconds, "speed/waiting_for_data": waited / all_seconds}


def _names(groups: int) -> list[str]:
    return ["optimizer/lr"] if groups == 1 else [f"optimizer/lr_{index}" for index in range(groups)]


def _memory(pl_module: pl.LightningModule) -> dict[str, float]:
    memory = {}
    if sys.platform != "win32":
        import resource  # Windows has none

        # Linux counts kilobytes, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        memory["memory/process_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if pl_module.device.type == "cuda":
        memory["memory/gpu_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
    return memory
