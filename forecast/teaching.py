"""Teaching: how often a network that feeds its forecasts back to itself is fed the truth instead, while it trains.

Each schedule is a pure function of the optimizer's step, and what is drawn by it one of (seed, step, batch, process), so
that a training that goes on from a checkpoint is taught as it would have been. Validation and test are never taught.

Axes: B batch, T past frames, S forecast frames.
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import exp
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forecast.errors import UserError


class Chance(NamedTuple):
    """The probability that a frame which is read is the truth; else it is what was forecast for it."""

    past: float
    """Of frames of the past, from the second on."""
    future: float
    """Of frames after the past."""


class Teaching:
    """A schedule of scheduled sampling (Bengio et al. 2015, arXiv 1506.03099).

    As published, each frame of each sample is drawn by itself, so that truth and forecasts alternate.
    """

    @abstractmethod
    def chance(self, step: int) -> Chance:
        """At a step of the optimizer, counted from 0."""

    def draw(self, batch: int, past: int, future: int, *, step: int, seed: Sequence[int]) -> Tensor:
        """Where the truth is fed to a batch.

        Args:
            batch, past, future: B, T, S.
            step: of the optimizer.
            seed: numbers that tell this batch from all others.

        Returns:
            B (T+S-2) bool, on the CPU; entry j is for the frame read at time j+1.
        """
        chance = self.chance(step)
        limits = np.repeat([chance.past, chance.future], [past - 1, future - 1])
        drawn = np.random.default_rng([*seed]).random((batch, past + future - 2))
        return torch.from_numpy(drawn < limits)


class FreeRunning(Teaching):
    """No teaching: truth over the past, the network's own forecasts after it, as in use."""

    def chance(self, step: int) -> Chance:
        return Chance(1.0, 0.0)


class TeacherForcing(Teaching):
    """Truth always (Williams, Zipser 1989, doi 10.1162/neco.1989.1.2.270)."""

    def chance(self, step: int) -> Chance:
        return Chance(1.0, 1.0)


class Linear(Teaching):
    """max(0, start - per_step * step) after the past.

    OpenSTL and PredRNN have 1 and 2e-5, so that it ends at 50,000. (Theirs has fallen once before the first step.)

    Args:
        start: from 0 to 1.
        per_step: what it falls at each step.
    """

    def __init__(self, start: float = 1.0, per_step: float = 2e-5) -> None:
        _check("start", start, 0, 1)
        _check("per_step", per_step, 0)
        self.start = start
        self.per_step = per_step

    def chance(self, step: int) -> Chance:
        return Chance(1.0, max(0.0, self.start - self.per_step * step))


class Exponential(Teaching):
    """base^step after the past.

    Args:
        base: below 1 and above 0.
    """

    def __init__(self, base: float = 0.9999) -> None:
        if not 0 < base < 1:
            raise UserError(f"teaching.base is {base}; it must lie between 0 and 1, as 0.9999.")
        self.base = base

    def chance(self, step: int) -> Chance:
        return Chance(1.0, self.base**step)


class InverseSigmoid(Teaching):
    """k / (k + exp(step / k)) after the past: it stays near 1 at first, and is one half at k log k.

    Args:
        k: at least 1.
    """

    def __init__(self, k: float = 3000.0) -> None:
        _check("k", k, 1)
        self.k = k

    def chance(self, step: int) -> Chance:
        shrunk = exp(-step / self.k)
        return Chance(1.0, self.k * shrunk / (self.k * shrunk + 1))


class Reverse(Teaching):
    """Reverse scheduled sampling over the past, scheduled sampling after it, as PredRNN-V2 is trained.

        past    1/2 until `begin`,   then 1 - 1/2 exp( -(step - begin) / scale ),             1 from `end` on
        future  1/2 until `begin`,   then 1/2 (end - step) / (end - begin),                   0 from `end` on

    Fed its own forecasts of the past at first, the network learns to keep what it has seen longer ago.

    Reference: Wang et al. (2023), IEEE TPAMI 45, 2208, arXiv 2103.09504; of its three curves over the past, the exponential
    one, which the public code has, with the public code's constants.

    Args:
        begin, end: steps between which it changes.
        scale: steps.
    """

    def __init__(self, begin: int = 25_000, end: int = 50_000, scale: float = 5_000.0) -> None:
        if not 0 <= begin < end:
            raise UserError(f"teaching.begin is {begin} and teaching.end {end}; give 0 or more, and more than that.")
        if scale <= 0:
            raise UserError(f"teaching.scale is {scale}; it must be above 0.")
        self.begin = begin
        self.end = end
        self.scale = scale

    def chance(self, step: int) -> Chance:
        if step < self.begin:
            return Chance(0.5, 0.5)
        if step >= self.end:
            return Chance(1.0, 0.0)
        past = 1 - 0.5 * exp(-(step - self.begin) / self.scale)
        return Chance(past, 0.5 * (self.end - step) / (self.end - self.begin))


def _check(name: str, given: float, least: float, most: float = float("inf")) -> None:
    if not least <= given <= most:
        limits = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise UserError(f"teaching.{name} is {given}; it must be {limits}.")
