"""The contracts between rooms: what a datamodule deals, what it is once decoded, and what a forecaster answers.

Axes: B batch, T past frames, F following frames, S forecast frames, C channels, K static fields, M members, P thresholds,
H W space.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Windows of a sequence, packed as they lie in the archive. Tensors only, so that they can be pinned and moved."""

    past: Tensor
    """B T C H W, packed integers or floats; the first channels are the target quantity."""
    future: Tensor
    """B F C H W, all that follow in the window, packed like `past`; the datamodule knows which of them are to forecast."""
    static: Tensor
    """B K H W float32, fields that do not change in time (orography, land mask); K may be 0."""
    time: Tensor
    """B int64, issue time (the time of the last past frame) in seconds UTC; a sequence number for digits."""
    block: Tensor
    """B int64, the rain event (or sequence) that the window belongs to; -1 marks a padded sample, scored nowhere."""
    first: Tensor
    """B bool, the lane starts anew: no state is carried over into this window."""


class Frames(NamedTuple):
    """A batch decoded on the device, in physical units."""

    past: Tensor
    """B T C H W float32, what is given: of a gap that is to be filled first the frames before it, then those after it."""
    known: Tensor
    """B T C H W bool, where that is valid."""
    truth: Tensor
    """B S C H W float32, what came."""
    valid: Tensor
    """B S C H W bool, where the truth is valid and counts: nowhere in a padded sample."""
    static: Tensor
    time: Tensor
    block: Tensor
    first: Tensor
    """These four as in `Batch`."""


class Forecast(NamedTuple):
    """What is believed about the future, in physical units."""

    mean: Tensor
    """B S C H W, the point forecast."""
    members: Tensor | None = None
    """B M S C H W, equally likely ensemble members."""
    exceedance: Tensor | None = None
    """B P S C H W, probability of reaching each of the quantity's thresholds."""
