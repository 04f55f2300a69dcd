"""The LightningModule: loss, optimizer, logging; nothing else.

Axes: B batch, T past frames, S forecast frames, C channels, H W space.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forecast.batch import Batch, Forecast
from forecast.errors import UserError
from forecast.forecaster import Forecaster, NetworkForecaster
from forecast.losses import Loss
from forecast.skill import Skill
from forecast.units import Grid, Quantity

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
HORIZON = ("total_steps", "T_max")  # what torch's schedulers call the length of the training


class Scored(TypedDict):
    """What a test step leaves for callbacks to look at."""

    past: Tensor
    """B T C H W, physical."""
    known: Tensor
    """B T C H W bool, where the past is valid."""
    truth: Tensor
    """B S C H W, physical."""
    valid: Tensor
    """B S C H W bool, where the truth is valid."""
    forecasts: Mapping[str, Forecast]


def horizon(scheduler: SchedulerFactory, steps: float) -> dict[str, int]:
    """The number of training steps, under the name that the scheduler has for it, if it asks and was not told."""
    given = scheduler.keywords if isinstance(scheduler, partial) else {}
    names = [name for name in HORIZON if name in inspect.signature(scheduler).parameters and name not in given]
    if not names:
        return {}
    if steps == float("inf"):
        raise UserError(f"This scheduler must know when training ends; set trainer.max_epochs or scheduler.{names[0]}.")
    return {names[0]: int(steps)}


class NowcastModule(pl.LightningModule):
    """Trains a forecaster, and scores it beside references over the same windows.

    Args:
        name: of the forecaster, in tables and in skill.nc.
        forecaster: a `NetworkForecaster`, or a baseline that has nothing to train.
        references: forecasters scored beside it, by name.
        quantity: decodes the packed frames on the device.
        grid: of the frames.
        cadence: seconds between frames, or None.
        future: frames to forecast, S.
        loss: None for a baseline.
        optimizer: takes the parameters.
        scheduler: takes the optimizer; steps with the optimizer, and is told how many there are if it asks.
        blocks: number of rain events (or sequences) in the test split.
        card: plain containers stored in the checkpoint, from which `forecast.checkpoint` rebuilds the forecaster.
    """

    def __init__(
        self,
        name: str,
        forecaster: Forecaster,
        references: Mapping[str, Forecaster],
        quantity: Quantity,
        grid: Grid,
        cadence: int | None,
        future: int,
        blocks: int,
        card: Mapping[str, Any],
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.forecaster = forecaster
        self.references = dict(references)
        self.quantity = quantity
        self.grid = grid
        self.cadence = cadence
        self.future = future
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.card = dict(card)
        self.validation_skill = Skill([name], quantity, future, blocks=1, cadence=cadence)
        self.test_skill = Skill([name, *self.references], quantity, future, blocks, cadence)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = self._loss(batch)[0]
        self.log("train/loss", loss, batch_size=len(batch.block))
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch.block))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if self.loss is None:
            return
        loss, raw, truth, valid = self._loss(batch)
        self._log_loss("validation", loss, batch)
        self.validation_skill.update(self.name, self._network.read(raw), truth, valid, batch.block.clamp(max=0))

    def on_validation_epoch_end(self) -> None:
        skill = self.validation_skill.summary(self.name)
        self.validation_skill.reset()
        for score, value in skill.items():
            self.log(f"validation/{score}", value)
        middle = self.quantity.thresholds[len(self.quantity.thresholds) // 2]
        self.log(f"csi {middle:g}", skill[f"csi_{middle:g}"], prog_bar=True, logger=False)

    def test_step(self, batch: Batch, batch_index: int) -> Scored:
        past, known = self.quantity.decode(batch.past)
        forecasts: dict[str, Forecast] = {}
        if self.loss is None:
            truth, valid = self.quantity.decode(batch.future)
            references = {self.name: self.forecaster, **self.references}
        else:
            loss, raw, truth, valid = self._loss(batch)
            self._log_loss("test", loss, batch)
            forecasts[self.name] = self._network.read(raw)
            references = self.references
        for name, forecaster in references.items():
            forecasts[name] = forecaster.predict(past, known, self.future, static=batch.static, time=batch.time)
        for name, forecast in forecasts.items():
            self.test_skill.update(name, forecast, truth, valid, batch.block)
        return Scored(past=past, known=known, truth=truth, valid=valid, forecasts=forecasts)

    def on_test_epoch_end(self) -> None:
        for score, value in self.test_skill.summary(self.name).items():
            self.log(f"test/{score}", value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stormcell"] = self.card

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.optimizer is None:
            raise UserError(f"model={self.name} has nothing to train; use run=test.")
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer, **horizon(self.scheduler, self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def monitors(self) -> list[str]:
        """What a checkpoint can be chosen by."""
        events = [f"{score}_{threshold:g}" for score in ("csi", "bias") for threshold in self.quantity.thresholds]
        return [f"validation/{score}" for score in ("loss", "mse", "mae", *events)]

    @property
    def _network(self) -> NetworkForecaster:
        assert isinstance(self.forecaster, NetworkForecaster)
        return self.forecaster

    def _log_loss(self, split: str, loss: Tensor, batch: Batch) -> None:
        """The epoch's mean, in which padded samples weigh nothing."""
        self.log(f"{split}/loss", loss, sync_dist=True, batch_size=int((batch.block >= 0).sum()))

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, the raw forecast, and the truth with its mask in physical units."""
        assert self.loss is not None
        past, _ = self.quantity.decode(batch.past)
        truth, valid = self.quantity.decode(batch.future)
        valid = valid & (batch.block >= 0).view(-1, 1, 1, 1, 1)
        output = self._network(past, self.future, batch.static)
        raw = output.raw[:, -self.future :].float()
        loss = self.loss(raw, self._network.transform.forward(truth), valid, truth)
        return (loss if output.aux is None else loss + output.aux), raw.detach(), truth, valid
