"""A callback for tests of the real command: sends a signal to its own process at an exact moment of the training."""

import os
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class Interruption(Checkpoint):
    """Comes after the callbacks that write checkpoints, since it is one for Lightning, and the last.

    Args:
        hook: "batch", "validation" or "epoch": at the end of which.
        step: of the optimizer.
        number: of the signal.
    """

    def __init__(self, hook: str, step: int, number: int) -> None:
        self.hook = hook
        self.step = step
        self.number = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at("batch", trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at("validation", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at("epoch", trainer)

    def _at(self, hook: str, trainer: pl.Trainer) -> None:
        if (hook, trainer.global_step) == (self.hook, self.step) and trainer.is_global_zero:
            os.kill(os.getpid(), self.number)
