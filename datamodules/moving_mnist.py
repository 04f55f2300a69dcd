"""Moving-MNIST: the moving digits, drawn from MNIST's images, and the recorded test set that most papers score on.

Axes: n images, B batch, N sequences in a file, L frames of a sequence, D side of a digit, H W.
"""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pooch  # type: ignore[import-untyped]  # it ships no types
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from datamodules.frames import Split
from datamodules.moving_digits import MOST_BLOCKS, MovingDigitsData, deal
from datamodules.sampler import Draw
from forecast.batch import Batch
from forecast.errors import UserError

DIGIT = 28
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
RECORDED = "mnist_test_seq.npy"
CHECKSUMS: Mapping[str, str] = {
    TRAIN: "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    TEST: "md5:9fb629c4189551a2d022fa330f9573f3",
}
"""Of the gzip files."""
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def find_images(name: str, root: Path, download: bool) -> Path:
    """The IDX file of that name in `root`, plain or .gz, downloaded if need be.

    Raises:
        UserError: it is not there, and may not or cannot be downloaded.
    """
    for path in (root / name, root / f"{name}.gz"):
        if path.exists():
            return path
    cure = f"put {TRAIN}.gz and {TEST}.gz there, or set data.root to a folder that holds them"
    if not download:
        raise UserError(f"MNIST's {name}.gz is not in {root}; {cure}, or set data.download=true.")
    for mirror in MIRRORS:
        try:
            return Path(pooch.retrieve(f"{mirror}{name}.gz", CHECKSUMS[name], fname=f"{name}.gz", path=root))
        except ValueError:
            reason = "what came has another checksum"
        except OSError as error:  # all of requests' are
            reason = type(error).__name__
    raise UserError(f"MNIST's {name}.gz is not in {root} and cannot be downloaded ({reason}); {cure}.")


def read_images(path: Path) -> NDArray[np.uint8]:
    """The images in an IDX file, n D D: the numbers 2051, n, D, D (big-endian, 4 bytes each), then one byte per pixel.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    cure = "delete it and let data.download=true fetch it, or put the original there"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); {cure}.") from None
    magic, n, height, width = struct.unpack(">4I", content[:16].ljust(16, b"\0"))
    if magic != 2051 or (height, width) != (DIGIT, DIGIT):
        raise UserError(f"{path} does not hold MNIST's images of {DIGIT} x {DIGIT} pixels; {cure}.")
    if len(content) != 16 + n * height * width:
        raise UserError(
            f"{path} says that it holds {n} images, {16 + n * height * width} bytes, but has {len(content)}; {cure}."
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(n, height, width)


class RecordedDigits:
    """The first sequences of a file of them: uint8, 20 N 64 64, as in mnist_test_seq.npy (arXiv 1502.04681).

    The file is never read as a whole, and opened for each batch: a memory map that is sent to a worker process would
    travel with all its bytes.

    Args:
        path: the .npy file.
        sequences: how many of it.
        past, future: frames, T, and those that follow.
        size: side of the canvas, H = W.

    Raises:
        UserError: the file holds something else, or not as much.
    """

    FRAMES = 20

    def __init__(self, path: Path, sequences: int, *, past: int, future: int, size: int) -> None:
        self.path = path
        self.length = sequences
        self.blocks = min(sequences, MOST_BLOCKS)
        self.past = past
        self.future = future
        try:
            frames = self._open()
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.test_file={path} cannot be read ({error}); give the path of {RECORDED}, or null."
            ) from None
        L, N, *side = frames.shape if frames.ndim == 4 else (0, 0)
        if frames.dtype != np.uint8 or self.FRAMES != L or side != [size, size]:
            raise UserError(
                f"data.test_file={path} holds {frames.dtype} {' x '.join(map(str, frames.shape))}, but must hold uint8 "
                f"{self.FRAMES} x sequences x {size} x {size}; give the path of {RECORDED} (and data.size=64), or null."
            )
        if past + future > self.FRAMES:
            raise UserError(
                f"data.past + data.future + data.after is {past + future}, but a sequence of data.test_file={path} has "
                f"{self.FRAMES} frames; ask for fewer, or set data.test_file=null."
            )
        if sequences > N:
            raise UserError(
                f"data.test is {sequences}, but data.test_file={path} has {N} sequences; set data.test={N}."
            )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the frames that are dealt, read one time step after another."""
        result = hashlib.blake2b(f"{self.past} {self.future} {self.length}".encode(), digest_size=8)
        for frames in self._open()[: self.past + self.future, : self.length]:
            result.update(np.ascontiguousarray(frames).data)
        return result.hexdigest()

    def __len__(self) -> int:
        return self.length

    def issue_times(self) -> NDArray[np.int64]:
        """The number of each sequence: its frames have no time."""
        return np.arange(self.length)

    def __getitem__(self, draw: Draw) -> Batch:
        positions = np.array(draw.positions)
        frames = self._open()[: self.past + self.future, np.maximum(positions, 0)]
        return deal(np.ascontiguousarray(frames.swapaxes(0, 1)), positions, self.past)

    def _open(self) -> NDArray[np.uint8]:
        return np.lib.format.open_memmap(self.path, mode="r")


class MovingMNISTData(MovingDigitsData):
    """Moving-MNIST: MNIST's digits of 28 x 28 pixels on the move.

    Digits for training, validation and test never mix: test draws from MNIST's 10,000 test images, validation from the
    last twelfth of its training images (5,000), training from those before (55,000).

    Args:
        past, future, batch_size, workers, seed: see `FrameData`.
        root: folder of MNIST's IDX files of images (plain or .gz); null: the user's cache.
        download: fetch files that are not there.
        size: side of the canvas in pixels.
        digits: digits on a canvas.
        speed: least and greatest speed, pixels a frame; OpenSTL's is a tenth of the free canvas, 3.6.
        pool: draw training digits from the first so many images only; null: from all.
        train, validation, test: number of sequences of each split.
        fresh: draw other training sequences in every epoch.
        test_file: path of mnist_test_seq.npy, whose first `test` sequences are then the test split; null: make them.
        after: see `FrameData`.
    """

    def __init__(
        self,
        past: int = 10,
        future: int = 10,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        root: str | None = None,
        download: bool = True,
        size: int = 64,
        digits: int = 2,
        speed: Sequence[float] = (3.6, 3.6),
        pool: int | None = None,
        train: int = 10000,
        validation: int = 1000,
        test: int = 10000,
        fresh: bool = True,
        test_file: str | None = None,
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
            digit_size=DIGIT,
            speed=speed,
            train=train,
            validation=validation,
            test=test,
            fresh=fresh,
            after=after,
        )
        if pool is not None and pool < 1:
            raise UserError(f"data.pool is {pool}; it must be at least 1, or null for all training images.")
        self.root = Path(pooch.os_cache("stormcell") if root is None else root).expanduser()
        self.download = download
        self.pool = pool
        self.test_file = None if test_file is None else Path(test_file).expanduser()

    def images(self) -> Mapping[Split, NDArray[np.uint8]]:
        """The digits of each split that is to be made, n D D uint8."""
        names = [TRAIN] if self.test_file is not None else [TRAIN, TEST]
        paths = {name: find_images(name, self.root, self.download) for name in names}
        images = {name: read_images(path) for name, path in paths.items()}
        border = len(images[TRAIN]) - len(images[TRAIN]) // 12
        pool = border if self.pool is None else self.pool
        if pool > border:
            raise UserError(f"data.pool is {pool}, but there are {border} images to train on; set it to null for all.")
        splits: dict[Split, NDArray[np.uint8]] = {
            "train": images[TRAIN][:pool],
            "validation": images[TRAIN][border:],
        }
        if TEST in images:
            splits["test"] = images[TEST]
        for split, chosen in splits.items():
            if len(chosen) == 0:
                path = paths[TEST if split == "test" else TRAIN]
                raise UserError(f"{path} has too few images for the {split} split; put the original there.")
        return splits

    def setup(self, stage: str | None = None) -> None:
        """Finds MNIST and makes the three splits."""
        if self._windows:
            return
        if self.test_file is None:
            super().setup(stage)
            if (self.root / RECORDED).exists():
                rank_zero_info(
                    f"The test split is made; data.test_file={self.root / RECORDED} would be the recorded one."
                )
            return
        recorded = RecordedDigits(
            self.test_file, self.sequences["test"], past=self.past, future=self.following, size=self.size
        )
        super().setup(stage)
        self._windows["test"] = recorded
        rank_zero_info(f"The test split is the first {len(recorded)} sequences of {self.test_file}.")
