"""The report of a test: which window is shown, and when the files are written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from forecast import report
from forecast.batch import Forecast, Frames
from forecast.module import NowcastModule
from forecast.skill import tables

NOTHING = (float("-inf"), 0.0, 0.0)


class Report(pl.Callback):
    """After a test, writes skill.nc, skill.csv, the figures and the film, shows them to the loggers, and prints the scores.

    The window that is shown is the one whose truth has the largest mean: the heaviest rain. Of equal ones it is the
    earliest. It is the same from any number of processes.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._sample: report.Sample | None = None
        self._rank = NOTHING

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sample, self._rank = None, NOTHING

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Mapping[str, Forecast],  # type: ignore[override]  # what our test_step returns
        batch: Frames,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        means = batch.truth.double().flatten(1).mean(1)
        columns = zip(means.tolist(), batch.time.tolist(), batch.block.tolist(), strict=True)
        ranks = [(mean, -time, -block) if block >= 0 else NOTHING for mean, time, block in columns]
        best = max(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] > self._rank:
            self._rank = ranks[best]
            self._sample = report.Sample(
                past=_numpy(torch.where(batch.known[best], batch.past[best], torch.nan)),
                truth=_numpy(batch.truth[best]),
                valid=_numpy(batch.valid[best]),
                forecasts={name: _numpy(forecast.mean[best]) for name, forecast in outputs.items()},
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, NowcastModule)
        skill = pl_module.test_skill.dataset()
        sample = self._best_of_all(trainer)
        if trainer.is_global_zero:
            report.write(self.folder, skill, sample, pl_module.quantity, pl_module.cadence, pl_module.grid)
            for shown in tables(skill):
                Console().print(shown)
            for logger in trainer.loggers:
                if hasattr(logger, "publish"):
                    logger.publish(self.folder, skill, trainer.global_step)
            Console().print(f"Written to {self.folder}: skill.nc, skill.csv, figures/")

    def _best_of_all(self, trainer: pl.Trainer) -> report.Sample | None:
        """The sample of the process that has the best one, on all processes."""
        mine = torch.tensor(self._rank, dtype=torch.float64, device=trainer.strategy.root_device)
        ranks = trainer.strategy.all_gather(mine).reshape(-1, len(NOTHING)).tolist()
        return trainer.strategy.broadcast(self._sample, src=ranks.index(max(ranks)))


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
