"""A digit passes behind a bar: what a network forecasts of it, it must have kept in mind since the digit went behind.

Axes: B batch, L frames of a sequence, T past frames, S forecast frames, N frames behind the bar, D side of a digit, H W.
"""

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from datamodules.frames import Split
from datamodules.moving_digits import MovingDigits, MovingDigitsData
from forecast.errors import UserError
from forecast.units import Grid

BAR = 64
"""Intensity of the bar, of 255: to be seen, and no event."""


class OccludedDigits(MovingDigits):
    """Sequences of one digit that crosses the canvas from left to right and passes behind a bar.

    The last N frames of the past hide it wholly; in the first forecast one it begins to come out. The bar always ends at
    the same place; the larger N, the earlier it begins. So all but the time for which the digit is hidden is the same.

    In training N is drawn for each sequence, from 0 to the N of validation and test: with the largest alone a vanilla RNN
    does not learn the task (docs/gradients.md).

    Args:
        images, sequences, past, future, seed, split, fresh: see `MovingDigits`.
        size: H W of the canvas.
        speed: pixels a frame.
        hidden: N, or the largest of those drawn.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        sequences: int,
        *,
        past: int,
        future: int,
        size: tuple[int, int],
        speed: int,
        hidden: int,
        seed: int,
        split: Split,
        fresh: bool,
    ) -> None:
        super().__init__(
            images,
            sequences,
            past=past,
            future=future,
            size=size,
            digits=1,
            speed=(speed, speed),
            seed=seed,
            split=split,
            fresh=fresh,
        )
        self.hidden = hidden

    def sequences(
        self, positions: NDArray[np.int64], epoch: int, length: int, begin: NDArray[np.int64] | int = 0
    ) -> NDArray[np.uint8]:
        """Frames B L H W of the sequences at those positions, the bar before the digit."""
        scenes = self.scenes(positions, epoch)
        hidden = np.full(len(positions), self.hidden)
        if self.split == "train":
            # Where it would start from left to right is a draw, and of no other use.
            share = scenes.start[:, 0, 1] / self._span[1]
            hidden = np.minimum((share * (self.hidden + 1)).astype(np.int64), self.hidden)
        scenes.start[..., 1] = 0
        scenes.velocity[:] = 0, self.speed[0]
        canvas = self.frames(scenes, length, begin)
        end = self.speed[0] * (self.past - 1) + self.images.shape[-1]
        first = np.where(hidden > 0, self.speed[0] * (self.past - hidden), end)
        x = np.arange(self.size[1])
        bar = (x >= first[:, None]) & (x < end)
        np.copyto(canvas, np.uint8(BAR), where=bar[:, None, None])
        return canvas

    def _drawn(self) -> tuple[Any, ...]:
        return (*super()._drawn(), self.hidden)


class OccludedDigitsData(MovingDigitsData):
    """A task for long memories: one of scikit-learn's digits passes behind a bar, and is to be forecast coming out of it.

    Args:
        past, future, batch_size, workers, seed: see `FrameData`.
        hidden: frames at the end of the past in which the digit is wholly hidden; in training from 0 to so many, drawn.
        height: of the canvas in pixels; its width is the digit's way.
        digit_size: side to which the digit is enlarged, pixels.
        speed: pixels a frame.
        train, validation, test: number of sequences of each split.
        fresh: draw other training sequences in every epoch.
        after: see `FrameData`.
    """

    def __init__(
        self,
        past: int = 16,
        future: int = 5,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        hidden: int = 8,
        height: int = 16,
        digit_size: int = 8,
        speed: int = 2,
        train: int = 1000,
        validation: int = 100,
        test: int = 500,
        fresh: bool = True,
        after: int = 0,
    ) -> None:
        super().__init__(
            past=past,
            future=future,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            size=height,
            digits=1,
            digit_size=digit_size,
            speed=(speed, speed),
            train=train,
            validation=validation,
            test=test,
            fresh=fresh,
            after=after,
        )
        if speed < 1:
            raise UserError(f"data.speed is {speed}; a digit that passes moves at least 1 pixel a frame.")
        most = max(0, past - -(-digit_size // speed))
        if not 0 <= hidden <= most:
            raise UserError(
                f"data.hidden is {hidden}, but of data.past={past} frames the digit needs {-(-digit_size // speed)} to go "
                f"behind the bar; take 0 to {most}."
            )
        self.hidden = hidden
        self.pace = speed
        self.grid = Grid(size=(height, speed * (past + self.following - 1) + digit_size))

    def _sequences(self, split: Split, images: NDArray[np.uint8]) -> OccludedDigits:
        return OccludedDigits(
            images,
            self.sequences[split],
            past=self.past,
            future=self.following,
            size=self.grid.size,
            speed=self.pace,
            hidden=self.hidden,
            seed=self.seed if split == "train" else 0,
            split=split,
            fresh=self.fresh and split == "train",
        )

    def streams(self, chunk: int, length: int | None) -> NoReturn:
        raise UserError("A digit passes once, and leaves; streams take data=moving_digits.")

    def terms(self, split: Split) -> dict[str, Any]:
        """Those of the moving digits, and for how long they are hidden: from the references too."""
        return {**super().terms(split), "hidden": self.hidden}
