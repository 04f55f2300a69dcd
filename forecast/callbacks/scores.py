"""The report of a test: which window is shown, and when the files are written."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor

from forecast import report
from forecast.module import NowcastModule, Scored
from forecast.skill import tables


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
