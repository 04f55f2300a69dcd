"""Handwritten digits that move with constant velocity and bounce: a forecasting task that needs no download.

Axes: B batch, N digits on a canvas, L frames of a sequence, T past frames, S forecast frames, D side of a digit, H W.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from datamodules.frames import SPLITS, FrameData, Split, Windows
from datamodules.generators import uniform
from datamodules.sampler import PADDING, Draw
from datamodules.scenes import Scenes, bounce, draw, tight
from datamodules.streams import Streams, locate
from forecast.batch import Batch, Forecast
from forecast.errors import UserError
from forecast.units import Grid, Linear, Quantity

FRAMES = Quantity(name="intensity", long_name="pixel intensity", units="1", thresholds=(0.5,), scale=1 / 255)


LENGTH = 200
"""Frames of a stream, which nothing but its maker ends."""
MOST_BLOCKS = 100
"""Groups of sequences that can be told apart in the scores: one for each of 10,000 would make them large for nothing."""


def deal(frames: NDArray[np.uint8], positions: NDArray[np.int64], past: int) -> Batch:
    """The batch of those frames, B L H W; every `MOST_BLOCKS`-th sequence shares a block, and `PADDING` has none."""
    return Batch(
        past=torch.from_numpy(frames[:, :past, None]),
        future=torch.from_numpy(frames[:, past:, None]),
        static=torch.from_numpy(np.zeros((len(positions), 0, *frames.shape[-2:]), np.float32)),
        time=torch.from_numpy(np.maximum(positions, 0)),
        block=torch.from_numpy(np.where(positions == PADDING, -1, positions % MOST_BLOCKS)),
        first=torch.from_numpy(np.ones(len(positions), np.bool_)),
    )


class Sequences(Windows, Protocol):
    """The sequences of one split."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for equal sequences whatever the run's seed."""


class MovingDigits:
    """Sequences of moving digits, made when they are asked for.

    A sequence is a function of (seed, split, epoch, position in the split) alone. Each digit starts anywhere on the
    canvas and moves `speed` pixels a frame in any direction; at the edge it bounces; where digits overlap the brighter
    pixel is seen (Srivastava et al. 2015, arXiv 1502.04681).

    Args:
        images: the digits to draw from, n D D uint8.
        sequences: number of sequences in the split.
        past, future: frames, T, and those that follow.
        size: H W of the canvas.
        digits: digits on a canvas, N.
        speed: least and greatest speed, pixels a frame.
        seed, split: of the random draws.
        fresh: draw other sequences in every epoch.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        sequences: int,
        *,
        past: int,
        future: int,
        size: tuple[int, int],
        digits: int,
        speed: tuple[float, float],
        seed: int,
        split: Split,
        fresh: bool,
    ) -> None:
        self.images = images
        self.length = sequences
        self.blocks = min(sequences, MOST_BLOCKS)
        self.past = past
        self.future = future
        self.size = size
        self.digits = digits
        self.speed = speed
        self.seed = seed
        self.split = split
        self.fresh = fresh
        self._shown = tight(images)
        self._dealt: tuple[int, Scenes] | None = None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the images and all that makes sequences of them, except the seed."""
        result = hashlib.blake2b(json.dumps([*self._drawn(), self.images.shape]).encode(), digest_size=8)
        result.update(np.ascontiguousarray(self.images).data)
        return result.hexdigest()

    def __len__(self) -> int:
        return self.length

    def issue_times(self) -> NDArray[np.int64]:
        """The number of each sequence: its frames have no time."""
        return np.arange(self.length)

    def __getitem__(self, draw: Draw) -> Batch:
        positions = np.array(draw.positions)
        frames = self.sequences(np.maximum(positions, 0), draw.epoch if self.fresh else 0, self.past + self.future)
        return deal(frames, positions, self.past)

    def sequences(
        self, positions: NDArray[np.int64], epoch: int, length: int, begin: NDArray[np.int64] | int = 0
    ) -> NDArray[np.uint8]:
        """Frames B L H W of the sequences at those positions, in all at once, from frame `begin` of each on."""
        return self.frames(self.scenes(positions, epoch), length, begin)

    def scenes(self, positions: NDArray[np.int64], epoch: int) -> Scenes:
        """The scenes of the sequences at those positions."""
        if self._dealt is None or self._dealt[0] != epoch:
            self._dealt = epoch, self._drawn_for(epoch)
        chosen, start, velocity = self._dealt[1]
        return Scenes(chosen.take(positions, axis=0), start.take(positions, axis=0), velocity.take(positions, axis=0))

    def frames(self, scenes: Scenes, length: int, begin: NDArray[np.int64] | int = 0) -> NDArray[np.uint8]:
        """Frames B L H W of scenes, from frame `begin` of each on."""
        time = np.asarray(begin)[..., None] + np.arange(length)
        place = bounce(scenes.place(time), self._span[:, None])
        return draw(self._shown, scenes.chosen, np.rint(place).astype(np.intp), self.size)

    def _drawn_for(self, epoch: int) -> Scenes:
        """The scenes of all sequences: 56 bytes a digit, in less time than NumPy takes to make one generator in fifty."""
        draws = uniform((self.seed, SPLITS.index(self.split), epoch), np.arange(self.length), self.digits * 5)
        shares = draws.reshape(-1, self.digits, 5)
        slow, fast = self.speed
        speed = slow + (fast - slow) * shares[..., 3]
        angle = 2 * np.pi * shares[..., 4]
        return Scenes(
            chosen=(shares[..., 0] * len(self.images)).astype(np.int64),
            start=shares[..., 1:3] * self._span,
            velocity=np.stack([speed * np.sin(angle), speed * np.cos(angle)], axis=-1),
        )

    @property
    def _span(self) -> NDArray[np.int64]:
        """How far a digit can go, y and x."""
        return np.array(self.size) - self.images.shape[-1]

    def _drawn(self) -> tuple[Any, ...]:
        """What sequences are made of, beside the images and the seed."""
        return (self.split, self.length, self.past, self.future, self.size, self.digits, self.speed, self.fresh)


class DigitStreams:
    """Sequences that go on, each a stream of `length` frames or a few less, so that they are whole chunks.

    Args:
        sequences: of the training split.
        chunk: frames of a chunk.
        length: frames of a stream.
    """

    def __init__(self, sequences: MovingDigits, chunk: int, length: int) -> None:
        self.sequences = sequences
        self.chunk = chunk
        self.chunks = np.full(len(sequences), max(1, length // chunk))

    def __len__(self) -> int:
        return int(self.chunks.sum())

    def __getitem__(self, draw: Draw) -> Batch:
        own = self.sequences
        streams, numbers = locate(self.chunks, draw.positions)
        epoch = draw.epoch if own.fresh else 0
        frames = own.sequences(streams, epoch, self.chunk + own.future, begin=numbers * self.chunk)
        dealt = deal(frames, np.where(np.array(draw.positions) < 0, PADDING, streams), self.chunk)
        return dealt._replace(first=torch.from_numpy(numbers == 0))


class Oracle:
    """The generator's own continuation: it knows the digits, where they are, and their constant velocity.

    No network can do better. It is a Forecaster that looks at the sequence number and not at the past.
    """

    def __init__(self, sequences: MovingDigits) -> None:
        self.sequences = sequences

    def predict(
        self,
        past: Tensor,
        valid: Tensor,
        steps: int,
        *,
        static: Tensor,
        time: Tensor,
        members: int = 0,
        generator: torch.Generator | None = None,
    ) -> Forecast:
        """The frames that follow; the arguments are those of `Forecaster`."""
        frames = torch.from_numpy(self.sequences.sequences(time.cpu().numpy(), 0, steps, begin=self.sequences.past))
        return Forecast(FRAMES.decode(frames.unsqueeze(2).to(past.device))[0])


class MovingDigitsData(FrameData):
    """The embedded default: scikit-learn's handwritten digits, real ones of 8 x 8 pixels, enlarged.

    Digits for training, validation and test never mix: they are split by their place in the data set, which holds no
    image twice.

    Args:
        past, future, batch_size, workers, seed: see `FrameData`.
        size: side of the canvas in pixels.
        digits: digits on a canvas.
        digit_size: side to which the digits are enlarged, pixels.
        speed: least and greatest speed, pixels a frame.
        train, validation, test: number of sequences of each split.
        fresh: draw other training sequences in every epoch.
        after: see `FrameData`.
    """

    cadence = None

    def __init__(
        self,
        past: int = 10,
        future: int = 10,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        size: int = 48,
        digits: int = 2,
        digit_size: int = 16,
        speed: Sequence[float] = (2.0, 4.0),
        train: int = 1000,
        validation: int = 100,
        test: int = 500,
        fresh: bool = True,
        after: int = 0,
    ) -> None:
        super().__init__(past, future, batch_size, workers, seed, after)
        if not 1 <= digit_size < size:
            raise UserError(f"Digits of {digit_size} pixels cannot move on a canvas of {size}; enlarge data.size.")
        if len(speed) != 2 or not 0 <= speed[0] <= speed[1]:
            raise UserError(f"data.speed is {list(speed)}; give the least and the greatest speed in pixels a frame.")
        self.sequences: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        for name, value in (("digits", digits), ("train", train), ("validation", validation), ("test", test)):
            if value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1.")
        self.size = size
        self.digits = digits
        self.digit_size = digit_size
        self.speed = (float(speed[0]), float(speed[1]))
        self.fresh = fresh
        self.quantity = FRAMES
        self.grid = Grid(size=(size, size))
        self.transform = Linear()
        self._windows: dict[Split, Sequences] = {}

    def images(self) -> Mapping[Split, NDArray[np.uint8]]:
        """The digits of each split, n D D uint8."""
        digits = torch.from_numpy(load_digits().images).unsqueeze(1)
        side = (self.digit_size, self.digit_size)
        large = F.interpolate(digits / 16, size=side, mode="bicubic", align_corners=False).clamp(0, 1)
        packed = (large[:, 0] * 255).round().to(torch.uint8).numpy()
        return {"train": packed[:1197], "validation": packed[1197:1397], "test": packed[1397:]}

    def setup(self, stage: str | None = None) -> None:
        """Loads the digits and makes the three splits."""
        if self._windows:
            return
        for split, images in self.images().items():
            self._windows[split] = self._sequences(split, images)

    def _sequences(self, split: Split, images: NDArray[np.uint8]) -> MovingDigits:
        return MovingDigits(
            images,
            self.sequences[split],
            past=self.past,
            future=self.following,
            size=self.grid.size,
            digits=self.digits,
            speed=self.speed,
            seed=self.seed if split == "train" else 0,  # every run is scored on the same sequences
            split=split,
            fresh=self.fresh and split == "train",
        )

    def windows(self, split: Split) -> Sequences:
        return self._windows[split]

    def streams(self, chunk: int, length: int | None) -> Streams:
        made = self._windows["train"]
        assert isinstance(made, MovingDigits)
        return DigitStreams(made, chunk, LENGTH if length is None else length)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for equal sequences in every split whatever the run's seed."""
        self.setup()
        splits = "".join(self._windows[split].fingerprint for split in SPLITS)
        return hashlib.blake2b(splits.encode(), digest_size=8).hexdigest()

    def terms(self, split: Split) -> dict[str, Any]:
        """The sequences, from which of their frames on they are forecast, and how they were made, where they were."""
        windows = self.windows(split)
        made = {"digits": self.digits, "digit_size": self.digit_size, "speed": list(self.speed)}
        return {
            "archive": windows.fingerprint,
            "windows": len(windows),
            "events": windows.blocks,
            "first_frame": self.past,
            **(made if isinstance(windows, MovingDigits) else {}),
        }

    def references(self) -> Mapping[str, Oracle]:
        test = self._windows["test"]
        return {"oracle": Oracle(test)} if isinstance(test, MovingDigits) else {}
