"""The LightningModule: loss, optimizer, logging; nothing else.

Axes: B batch, T past frames, S forecast frames, C channels, H W space.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import xarray as xr
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.forecaster import Forecaster, NetworkForecaster, Prepared
from forecast.losses import Loss
from forecast.networks.network import Output
from forecast.protocol import ROOT
from forecast.references import predicted
from forecast.scoring import Scoring
from forecast.sharding import shard
from forecast.tbptt import TruncatedBPTT
from forecast.teaching import FreeRunning, Teaching
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
        quantity: of the frames; its thresholds are the events.
        grid: of the frames.
        cadence: seconds between frames, or None.
        future: frames to forecast, S.
        scoring: what it is scored by.
        loss: None for a baseline.
        optimizer: takes the parameters.
        scheduler: takes the optimizer; steps with the optimizer, and is told how many there are if it asks.
        teaching: where the network is fed the truth in training; None, and in validation and test: after the past nowhere.
        tbptt: of training batches that are chunks of streams; None where they are windows.
        seed: of what is drawn in training.
        card: plain containers stored in the checkpoint, from which `forecast.checkpoint` rebuilds the forecaster.
    """

    def __init__(
        self,
        name: str,
        forecaster: Forecaster,
        quantity: Quantity,
        grid: Grid,
        cadence: int | None,
        future: int,
        scoring: Scoring,
        card: Mapping[str, Any],
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        teaching: Teaching | None = None,
        tbptt: TruncatedBPTT | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.forecaster = forecaster
        self.quantity = quantity
        self.grid = grid
        self.cadence = cadence
        self.future = future
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.teaching = FreeRunning() if teaching is None else teaching
        self.tbptt = tbptt
        self.seed = seed
        self.card = dict(card)
        self.scoring = scoring
        # Modules of this one, so that they go to its device.
        self.validation_skill, self.sections = scoring.validation, scoring.sections
        self.results: dict[str, xr.Dataset] = {}
        """Of the last test, by section."""
        self.tested: Mapping[str, Any] | None = None
        """Where the tested weights come from, as their checkpoint says; None for a baseline."""
        self._dealt: list[tuple[int, ...]] = []
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
        # What is drawn for a batch hangs on which batch it is, and not on what was drawn before: a run that goes on draws
        # the same, and processes draw each their own.
        seed = (self.seed, self.trainer.global_step, batch_index, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        loss, pixels = self._unrolled(batch, seed)
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
        raw, loss, pixels = self._forecast(batch)
        self.validation_loss.update(loss, pixels)
        self.log("validation/loss", self.validation_loss)
        forecast = self._network.read(raw, batch.time, self.scoring.validation_members)
        self.validation_skill.update(self.name, forecast, batch.truth, batch.valid, batch.block.clamp(max=0))

    def on_validation_epoch_end(self) -> None:
        if self.loss is None:
            return
        skill = self.validation_skill.summary(self.name, by_lead=True)
        self.validation_skill.reset()
        for score, value in skill.items():
            self.log(f"validation/{score}", value)
        middle = self.quantity.thresholds[len(self.quantity.thresholds) // 2]
        if f"csi_{middle:g}" in skill:
            self.log(f"csi {middle:g}", skill[f"csi_{middle:g}"], prog_bar=True, logger=False)

    def on_fit_end(self) -> None:
        """What is tested next are these weights, unless a checkpoint is loaded."""
        self.tested = {
            "epoch": self.trainer.current_epoch,
            "global_step": self.trainer.global_step,
            "stormcell": self.card,
        }

    def on_test_start(self) -> None:
        """Recalls what references have scored before over the same windows, and prepares the others."""
        self.sections.reset()
        loader = self.trainer.test_dataloaders
        assert loader is not None
        self._dealt = [draw.positions for draw in loader.sampler]
        known = self.scoring.references.recall(self.sections) if self._first_of_whole_test() else []
        self.scoring.references.recalled = frozenset(self.trainer.strategy.broadcast(known))
        self.scoring.references.prepare()
        if isinstance(self.forecaster, Prepared):
            self.forecaster.prepare(self.scoring.references.history())

    def test_step(self, batch: Frames, batch_index: int) -> None:
        members, references = self.scoring.members, self.scoring.references
        chosen = frozenset(self.sections.listed.positions)
        listed = torch.tensor([place in chosen for place in self._dealt[batch_index]])  # on the CPU: no device waits
        if self.loss is None:
            own = predicted(self.forecaster, batch, members)
        else:
            raw, loss, pixels = self._forecast(batch)
            self.test_loss.update(loss, pixels)
            self.log("test/loss", self.test_loss)
            own = self._network.read(raw, batch.time, members)
        self.sections.update(self.name, own, batch, listed)
        for name, forecast, frames, rows in references.forecasts(batch, listed, members):
            self.sections.update(name, forecast, frames, rows)

    def on_test_epoch_end(self) -> None:
        for score, value in self.sections.skill(ROOT).summary(self.name).items():
            self.log(f"test/{score}", value)
        self.results = self.sections.datasets()
        if self._first_of_whole_test():
            self.scoring.references.keep(self.sections, self.results)

    def forecasts(self, batch: Frames) -> dict[str, Forecast]:
        """What the models make of some windows, to be looked at: every process has to call this.

        References forecast on the first process only; those that must be prepared, which may not be, are left out: a
        climatology is one colour.
        """
        with self.trainer.precision_plugin.forward_context():
            found = {self.name: predicted(self.forecaster, batch)}
        for reference in self.scoring.references.each if self.trainer.is_global_zero else ():
            if not isinstance(reference.forecaster, Prepared):
                found[reference.name] = predicted(reference.forecaster, batch)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stormcell"] = self.card
        checkpoint["clipped"] = self.clipped.cpu()
        if self.tbptt is not None:
            checkpoint["lanes"] = self.tbptt.gathered(lambda one: cast(Tensor, self.all_gather(one)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clipped.copy_(checkpoint["clipped"])
        if self.tbptt is not None:
            self.tbptt.restore(checkpoint["lanes"], self.global_rank, self.trainer.world_size)
        self.tested = {key: checkpoint[key] for key in ("epoch", "global_step", "stormcell")}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.optimizer is None:
            raise UserError(f"model={self.name} has nothing to train; use run=test.")
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer, **horizon(self.scheduler, self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @cached_property
    def monitors(self) -> list[str]:
        """What a checkpoint can be chosen by."""
        return [f"validation/{score}" for score in ("loss", *self.validation_skill.names())]

    @property
    def _network(self) -> NetworkForecaster:
        assert isinstance(self.forecaster, NetworkForecaster)
        return self.forecaster

    def _first_of_whole_test(self) -> bool:
        """Is this the first process of a test of all windows, not only the first batches?"""
        loader = self.trainer.test_dataloaders
        whole = loader is not None and sum(self.trainer.num_test_batches) == len(loader)
        return bool(whole and self.trainer.is_global_zero)

    def _unrolled(self, batch: Frames, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of a training batch, a mean over its valid pixels, and their number.

        The windows of a chunk follow one another in one graph, which begins at the state that was carried into it.
        """
        windows = [batch] if self.tbptt is None else self.tbptt.windows(batch)
        state = None if self.tbptt is None else self.tbptt.carried(batch.past.device)
        losses, counts = [], []
        for number, window in enumerate(windows):
            teach = self._teach(window, (*seed, number))
            output = self._network(window.past, self.future, window.static, window.truth, teach, state, window.first)
            loss, pixels = self._loss(window, output)
            losses.append(loss)
            counts.append(pixels)
            state = output.state
        if self.tbptt is not None:
            self.tbptt.carry(state)
        pixels = torch.stack(counts)
        return (torch.stack(losses) * (pixels / pixels.sum().clamp_min(1))).sum(), pixels.sum()

    def _teach(self, batch: Frames, seed: Sequence[int]) -> Tensor | None:
        """Where this batch is fed the truth; None where it is fed none after the past."""
        if isinstance(self.teaching, FreeRunning):
            return None
        step = self.trainer.global_step
        chance = self.teaching.chance(step)
        self.log("teaching/probability", chance.future)
        self.log("teaching/past_probability", chance.past)
        size, past = batch.past.shape[:2]
        return self.teaching.draw(size, past, self.future, step=step, seed=seed)

    def _forecast(self, batch: Frames) -> tuple[Tensor, Tensor, Tensor]:
        """The raw forecast of a network that nobody teaches, its loss, and the number of pixels that this is a mean over."""
        raw = self._network(batch.past, self.future, batch.static).raw[:, -self.future :].float()
        return raw, *self._loss(batch, Output(raw))

    def _loss(self, batch: Frames, output: Output) -> tuple[Tensor, Tensor]:
        """The loss, a mean over this batch's valid pixels, with what the network adds; and the number of these pixels.

        Raw numbers of more frames than the forecast's are next frames of the past, and count like those.
        """
        assert self.loss is not None
        raw = output.raw.float()
        earlier = batch.past.shape[1] + self.future - raw.shape[1]
        physical = torch.cat([batch.past, batch.truth], dim=1)[:, earlier:]
        real = (batch.block >= 0).view(-1, 1, 1, 1, 1)
        valid = torch.cat([batch.known & real, batch.valid], dim=1)[:, earlier:]
        loss = self.loss(raw, self._network.transform.forward(physical), valid, physical)
        return (loss if output.aux is None else loss + output.aux), valid.sum()

    def _gradient_norm(self, order: float = 2.0) -> Tensor:
        """Of all gradients together, the parts in other processes included."""
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        norm = get_total_norm(gradients, order)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
