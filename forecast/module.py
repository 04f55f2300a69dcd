"""The LightningModule: loss, optimizer, logging; nothing else.

Axes: B batch, T past frames, S forecast frames, C channels, H W space.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.forecaster import Forecaster, NetworkForecaster
from forecast.losses import Loss
from forecast.sharding import shard
from forecast.skill import Skill
from forecast.units import Grid, Quantity

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
HORIZON = ("total_steps", "T_max")  # what torch's schedulers call the length of the training


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
        quantity: of the frames; its thresholds are the events.
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
        # Means over all valid pixels: NaN stays NaN, and no sum of float32.
        self.validation_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.test_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.clipped: Tensor
        # Steps that were clipped, and all steps, since the last log.
        self.register_buffer("clipped", torch.zeros(2), persistent=False)

    def configure_model(self) -> None:
        # Lightning lays out a mesh of processes where the strategy shards.
        if self.device_mesh is not None and isinstance(self.forecaster, NetworkForecaster):
            shard(self.forecaster.network, self.device_mesh)

    def training_step(self, batch: Frames, batch_index: int) -> Tensor:
        loss, _ = self._loss(batch)
        pixels = batch.valid.sum()
        cost = loss.detach().double() * pixels
        everywhere = self.trainer.strategy.reduce(torch.stack([cost, pixels.double()]), reduce_op="sum")
        total = everywhere[1].clamp_min(1)
        self.log("train/loss", everywhere[0] / total)
        self.log("loss", everywhere[0] / total, prog_bar=True, logger=False)
        # Gradients are averaged over processes: so weighted, the average is the gradient of the mean over all pixels.
        return loss * (pixels * self.trainer.world_size / total)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the trainer says, and logs the norm of the whole gradient before and after, and how often it changed."""
        before = self._gradient_norm()
        clip = float("inf") if gradient_clip_val is None else gradient_clip_val
        largest = self._gradient_norm(float("inf")) if gradient_clip_algorithm == "value" else before
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.clipped += torch.stack([largest > clip, torch.ones_like(largest, dtype=torch.bool)])
        self.log("gradient/norm", before)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it where mypy does not look
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log("gradient/clipped_norm", self._gradient_norm())
            self.log("gradient/clipped_share", self.clipped[0] / self.clipped[1])
            self.clipped.zero_()

    def validation_step(self, batch: Frames, batch_index: int) -> None:
        if self.loss is None:
            return
        loss, raw = self._loss(batch)
        self.validation_loss.update(loss, batch.valid.sum())
        self.log("validation/loss", self.validation_loss)
        self.validation_skill.update(
            self.name, self._network.read(raw), batch.truth, batch.valid, batch.block.clamp(max=0)
        )

    def on_validation_epoch_end(self) -> None:
        if self.loss is None:
            return
        skill = self.validation_skill.summary(self.name) | self.validation_skill.curves(self.name)
        self.validation_skill.reset()
        for score, value in skill.items():
            self.log(f"validation/{score}", value)
        middle = self.quantity.thresholds[len(self.quantity.thresholds) // 2]
        self.log(f"csi {middle:g}", skill[f"csi_{middle:g}"], prog_bar=True, logger=False)

    def test_step(self, batch: Frames, batch_index: int) -> dict[str, Forecast]:
        """The forecasts by name, for callbacks to look at."""
        forecasts: dict[str, Forecast] = {}
        references = self.references
        if self.loss is None:
            references = {self.name: self.forecaster, **references}
        else:
            loss, raw = self._loss(batch)
            self.test_loss.update(loss, batch.valid.sum())
            self.log("test/loss", self.test_loss)
            forecasts[self.name] = self._network.read(raw)
        for name, forecaster in references.items():
            forecasts[name] = forecaster.predict(
                batch.past, batch.known, self.future, static=batch.static, time=batch.time
            )
        for name, forecast in forecasts.items():
            self.test_skill.update(name, forecast, batch.truth, batch.valid, batch.block)
        return forecasts

    def on_test_epoch_end(self) -> None:
        for score, value in self.test_skill.summary(self.name).items():
            self.log(f"test/{score}", value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stormcell"] = self.card
        checkpoint["clipped"] = self.clipped.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clipped.copy_(checkpoint["clipped"])

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

    def _loss(self, batch: Frames) -> tuple[Tensor, Tensor]:
        """The loss, a mean over this batch's valid pixels, and the raw forecast."""
        assert self.loss is not None
        output = self._network(batch.past, self.future, batch.static)
        raw = output.raw[:, -self.future :].float()
        loss = self.loss(raw, self._network.transform.forward(batch.truth), batch.valid, batch.truth)
        return (loss if output.aux is None else loss + output.aux), raw.detach()

    def _gradient_norm(self, order: float = 2.0) -> Tensor:
        """Of all gradients together, the parts in other processes included."""
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        norm = get_total_norm(gradients, order)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
