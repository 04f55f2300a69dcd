"""Checkpoints and the number they are chosen by."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from forecast.errors import UserError


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


class LastCheckpoint(ModelCheckpoint):
    """Keeps last.ckpt, better or not: after every validation, and where training ends inside an epoch (max_steps, max_time).

    Args:
        dirpath: its folder.
    """

    def __init__(self, dirpath: str) -> None:
        super().__init__(dirpath=dirpath, filename="last", enable_version_counter=False)
        self._kept_at = -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._kept_at = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._kept_at:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)
