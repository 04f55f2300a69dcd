"""Moving digits behind a shutter: what a network forecasts it must have kept in mind since the shutter closed.

Axes: B batch, T past frames, C channels, H W space.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from datamodules.frames import Split
from datamodules.moving_digits import MovingDigits, MovingDigitsData, Oracle
from datamodules.sampler import Draw
from forecast.batch import Batch
from forecast.errors import UserError


class OccludedDigits:
    """Sequences of moving digits whose last frames of the past are dark: a shutter is closed, and what is there goes on.

    Args:
        sequences: the same without the shutter.
        hidden: frames for which it is closed.
    """

    def __init__(self, sequences: MovingDigits, hidden: int) -> None:
        self.sequences = sequences
        self.hidden = hidden
        self.blocks = sequences.blocks

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the sequences and the shutter."""
        return hashlib.blake2b(f"{self.sequences.fingerprint} {self.hidden}".encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.sequences)

    def issue_times(self) -> NDArray[np.int64]:
        return self.sequences.issue_times()

    def __getitem__(self, draw: Draw) -> Batch:
        batch = self.sequences[draw]
        past = batch.past.clone()
        past[:, past.shape[1] - self.hidden :] = 0
        return batch._replace(past=past)


class OccludedDigitsData(MovingDigitsData):
    """A task for long memories: a shutter passes before scikit-learn's digits, and hides the last frames of the past.

    When it opens they are to be forecast: whatever the network then knows of them, it has kept for `hidden` frames, and
    all else is the same whatever their number. As shipped the digits stand still: then nothing but memory is asked for.

    Args:
        past, future, batch_size, workers, seed: see `FrameData`.
        hidden: frames for which the shutter is closed, fewer than `past`.
        size: side of the canvas in pixels.
        digits: digits on a canvas.
        digit_size: side to which the digits are enlarged, pixels.
        speed: least and greatest speed, pixels a frame.
        train, validation, test: number of sequences of each split.
        fresh: draw other training sequences in every epoch.
        after: see `FrameData`.
    """

    def __init__(
        self,
        past: int = 16,
        future: int = 3,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        hidden: int = 8,
        size: int = 16,
        digits: int = 1,
        digit_size: int = 8,
        speed: Sequence[float] = (0.0, 0.0),
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
            size=size,
            digits=digits,
            digit_size=digit_size,
            speed=speed,
            train=train,
            validation=validation,
            test=test,
            fresh=fresh,
            after=after,
        )
        if not 0 <= hidden < past:
            raise UserError(
                f"data.hidden is {hidden}, but at least one of data.past={past} frames must be seen; take 0 to {past - 1}."
            )
        self.hidden = hidden

    def setup(self, stage: str | None = None) -> None:
        """Loads the digits, makes the three splits, and hides their last frames."""
        if self._windows:
            return
        super().setup(stage)
        for split, windows in self._windows.items():
            assert isinstance(windows, MovingDigits)
            self._windows[split] = OccludedDigits(windows, self.hidden)

    def streams(self, chunk: int, length: int | None) -> NoReturn:
        raise UserError("The shutter closes at the end of a past, and streams have none; take data=moving_digits.")

    def terms(self, split: Split) -> dict[str, Any]:
        """Those of the moving digits, and the shutter: it hides frames from the references too."""
        made = {"digits": self.digits, "digit_size": self.digit_size, "speed": list(self.speed), "hidden": self.hidden}
        return {**super().terms(split), **made}

    def references(self) -> Mapping[str, Oracle]:
        test = self._windows["test"]
        assert isinstance(test, OccludedDigits)
        return {"oracle": Oracle(test.sequences)}
