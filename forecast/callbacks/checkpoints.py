"""Checkpoints: when they are written, and the number they are chosen by."""

import signal
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Checkpoint

from forecast.errors import UserError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What clusters send some time before they take the machine away. (Windows has no SIGUSR1.)"""


class FiniteMonitor(pl.Callback):
    """Ends a training whose monitored value is no number, before it can be taken for the best.

    Args:
        metric: the monitored value's name.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and not torch.isfinite(value):
            raise UserError(
                f"{self.metric} is {float(value)} after epoch {trainer.current_epoch}: the training diverged, or "
                "nothing was scored; lower optimizer.lr, or monitor another value."
            )


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, which also ends a run that it had ended already and that was started again.

    Args:
        monitor: the value's name.
        mode: "min" or "max".
        patience: validations without a better value after which training ends.
        min_delta: what counts as better.
    """

    def __init__(self, monitor: str, mode: str = "min", patience: int = 10, min_delta: float = 0.0) -> None:
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt, from which the run can go on as if it had never been interrupted.

    It is written after every validation, and at the end of an epoch that has none; inside an epoch every so many minutes,
    where training ends there (max_steps, max_time), and on SIGTERM and SIGUSR1, after which the program ends with the exit
    code 128 + signal. A signal during a validation is heeded after it. The logs are written first, so that they are never
    behind the checkpoint.

    Args:
        dirpath: its folder.
        minutes: between two checkpoints inside an epoch; None for none.
    """

    def __init__(self, dirpath: str, minutes: float | None = 15.0) -> None:
        if minutes is not None and minutes < 0:
            raise UserError(f"callbacks.last.minutes is {minutes}; it must be 0 or more, or null for none.")
        self.path = Path(dirpath) / "last.ckpt"
        self.minutes = minutes
        self._saved_at = monotonic()
        self._saved_step = -1
        self._signal = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.path = Path(trainer.strategy.broadcast(str(self.path)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = monotonic()
        for number in SIGNALS:
            signal.signal(number, self._remember)
        if trainer.received_sigterm:  # while Lightning listened, which would end without saving
            self._signal = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in SIGNALS:  # a test has nothing to save
            signal.signal(number, _leave)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        # From here a validation that follows would be skipped, unless it only follows because training is cut off.
        validated = loop._should_check_val_fx(fetcher) and (trainer.is_last_batch or not trainer.should_stop)
        if validated or loop._should_accumulate():  # gradients that are being gathered are in no checkpoint
            return
        ends = trainer.should_stop or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        due = self.minutes is not None and monotonic() - self._saved_at >= 60 * self.minutes
        if trainer.strategy.reduce_boolean_decision(bool(ends or due or self._signal), all=False):
            # Lightning logs this batch after this hook, when a process that is killed never comes to it.
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A training that is cut off inside an epoch is validated once more; it goes on from before that.
        stopped = trainer.should_stop and self._saved_step == trainer.global_step
        if not (stopped or trainer.sanity_checking or trainer.fit_loop.epoch_loop._should_accumulate()):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_if_told(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):  # a trial of a few batches, which leaves nothing
            return
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]  # means: write now; ours do not look at it
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at = monotonic()
        self._saved_step = trainer.global_step

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        """Ends the program in all processes, where a signal has reached any of them."""
        mine = torch.tensor(float(self._signal), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if number:
            if trainer.is_global_zero:
                print(f"Interrupted; saved {self.path}. The same command with resume=auto goes on from there.")
            raise SystemExit(128 + number)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
