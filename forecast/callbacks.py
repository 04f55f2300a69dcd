"""What happens beside training: checkpoints, a watch over the monitor, and the report of a test."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch import Tensor

from forecast import report
from forecast.errors import UserError
from forecast.module import NowcastModule, Scored
from forecast.skill import tables


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


class Report(pl.Callback):
    """Writes skill.nc, skill.csv and the figures after a test, and prints the scores by lead time.

    The window that is shown is the one whose truth has the largest mean: the heaviest rain (of the first process's share).

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._sample: report.Sample | None = None
        self._most = float("-inf")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Scored,  # type: ignore[override]  # what our test_step returns
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        mean = torch.where(batch.block >= 0, outputs["truth"].flatten(1).mean(1), float("-inf"))
        window = int(mean.argmax())
        if float(mean[window]) > self._most:
            self._most = float(mean[window])
            self._sample = report.Sample(
                past=_numpy(torch.where(outputs["known"][window], outputs["past"][window], torch.nan)),
                truth=_numpy(outputs["truth"][window]),
                valid=_numpy(outputs["valid"][window]),
                forecasts={name: _numpy(forecast.mean[window]) for name, forecast in outputs["forecasts"].items()},
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, NowcastModule)
        skill = pl_module.test_skill.dataset()
        if trainer.is_global_zero:
            report.write(self.folder, skill, self._sample, pl_module.quantity, pl_module.cadence, pl_module.grid)
            for shown in tables(skill):
                Console().print(shown)
            Console().print(f"Written to {self.folder}: skill.nc, skill.csv, figures/")


def _numpy(tensor: Tensor) -> Any:
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
