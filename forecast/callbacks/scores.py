"""The report of a test: which window is shown, and when the files are written."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from forecast import report
from forecast.batch import Frames
from forecast.module import NowcastModule
from forecast.protocol import ROOT, provenance_of
from forecast.sections import SUBSAMPLE
from forecast.tables import tables

NOTHING = (float("-inf"), 0.0, 0.0)


class Report(pl.Callback):
    """After a test, writes its files (`forecast.report`), shows them to the loggers, and prints the scores of all windows.

    The window that is shown is the one whose truth has the largest mean: the heaviest rain. Of equal ones it is the
    earliest. It is the same from any number of processes.

    Args:
        folder: where the files go.
        figures: draw them, and the film, too.
    """

    def __init__(self, folder: str, figures: bool = True) -> None:
        self.folder = Path(folder)
        self.figures = figures
        self._shown: Frames | None = None
        self._rank = NOTHING

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown, self._rank = None, NOTHING

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
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
            self._shown = Frames(*(field[best : best + 1].cpu() for field in batch))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, NowcastModule)
        sample = self._sample(trainer, pl_module) if self.figures else None
        if not trainer.is_global_zero:
            return
        source = provenance_of(pl_module.card["config"], pl_module.tested)
        terms = pl_module.scoring.protocol
        attributes = {"protocol": terms.to_text(), "provenance": json.dumps(source)}
        skills = {section: found.assign_attrs(attributes) for section, found in pl_module.results.items()}
        told = (pl_module.quantity, pl_module.cadence, pl_module.grid)
        report.write(self.folder, skills, sample, *told, figures=self.figures, after=terms.after, span=terms.accumulate)
        # A file or a pipe has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 120)
        for section in (ROOT, SUBSAMPLE):  # slow references are in the second alone
            for shown in tables(skills[section]) if section in skills else ():
                console.print(shown)
        for logger in trainer.loggers:
            if hasattr(logger, "publish"):
                logger.publish(self.folder, skills[ROOT], trainer.global_step)
        names = ["skill.nc", *map(report.csv_name, skills), *(["figures/"] if self.figures else [])]
        console.print(f"Written to {self.folder}: {', '.join(names)}")

    def _sample(self, trainer: pl.Trainer, module: NowcastModule) -> report.Sample | None:
        """The window of the process that has the best one, on all processes, with what the models make of it."""
        mine = torch.tensor(self._rank, dtype=torch.float64, device=trainer.strategy.root_device)
        ranks = trainer.strategy.all_gather(mine).reshape(-1, len(NOTHING)).tolist()
        shown: Frames | None = trainer.strategy.broadcast(self._shown, src=ranks.index(max(ranks)))
        if shown is None:
            return None
        forecasts = module.forecasts(Frames(*(field.to(trainer.strategy.root_device) for field in shown)))
        return report.Sample(
            past=_numpy(torch.where(shown.known[0], shown.past[0], torch.nan)),
            truth=_numpy(shown.truth[0]),
            valid=_numpy(shown.valid[0]),
            forecasts={name: _numpy(forecast.mean[0]) for name, forecast in forecasts.items()},
        )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
