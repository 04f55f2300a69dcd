"""Digits on a canvas: where they are, and how a whole batch of frames is drawn at once.

Axes: n images, B batch, N digits on a canvas, L frames of a sequence, D side of an image, h w of what it shows, H W.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


class Scenes(NamedTuple):
    """What sequences are drawn from."""

    chosen: NDArray[np.int64]
    """The digits, B N, by their place among the images."""
    start: NDArray[np.float64]
    """Upper left corners in frame 0, B N 2: y, x in pixels."""
    velocity: NDArray[np.float64]
    """Pixels a frame, B N 2: y, x."""

    def place(self, time: NDArray[np.int64]) -> NDArray[np.float64]:
        """Upper left corners at the frames L, or B L of each scene, as if there were no walls, B N 2 L."""
        return self.start[..., None] + self.velocity[..., None] * time[..., None, None, :]


def bounce(position: NDArray[np.float64], span: NDArray[np.int64] | float) -> NDArray[np.float64]:
    """Straight motion, folded back and forth between 0 and `span`: reflection at two walls."""
    way = 2 * span  # there and back
    return np.abs(position - way * np.rint(position / way))


class Tight(NamedTuple):
    """Images without the empty rows and columns around what they show."""

    images: NDArray[np.uint8]
    """n h w: as large as the largest of them needs."""
    corner: NDArray[np.intp]
    """n 2: where each begins in the image that it is cut from, y and x."""


def tight(images: NDArray[np.uint8]) -> Tight:
    """What images, n D D, show."""
    count, side, _ = images.shape
    seen = np.stack([images.any(2), images.any(1)], axis=1)  # n 2 D: rows, columns
    begin, end = seen.argmax(2), side - seen[..., ::-1].argmax(2)
    size = (end - begin).max(0)
    corner = np.minimum(begin, side - size)
    cuts = sliding_window_view(images, tuple(size), axis=(1, 2))
    return Tight(cuts[np.arange(count), corner[:, 0], corner[:, 1]], corner)


def draw(shown: Tight, chosen: NDArray[np.int64], corner: NDArray[np.intp], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Frames B L H W, in which the brighter pixel is seen where digits overlap.

    A digit that is padded to the width of the canvas covers one stretch of a frame's pixels, row after row, wherever it
    is: each is one copy.

    Args:
        shown: the images to draw from.
        chosen: the digits, B N, by their place among the images.
        corner: upper left corners of the whole images, B N 2 L.
        size: H W of the canvas.
    """
    (height, width), (tall, wide) = size, shown.images.shape[1:]
    batch, count, _, length = corner.shape
    begin = corner + shown.corner.take(chosen, axis=0)[..., None]
    padded = np.zeros((batch, count, tall, width), np.uint8)
    padded[..., :wide] = shown.images.take(chosen, axis=0)
    stretch = (tall - 1) * width + wide
    digits = padded.reshape(batch, count, 1, tall * width)[..., :stretch]
    canvas = np.zeros((batch, length, height, width), np.uint8)
    places = np.ndarray((canvas.size - stretch + 1, stretch), np.uint8, canvas, strides=(1, 1))
    frame = np.arange(batch * length).reshape(batch, 1, length) * (height * width)
    where = frame + begin[:, :, 0] * width + begin[:, :, 1]  # B N L: a digit's first pixel among those of all frames
    places[where[:, 0]] = digits[:, 0]  # nothing lies there yet
    for n in range(1, count):
        seen = places[where[:, n]]
        places[where[:, n]] = np.maximum(seen, digits[:, n], out=seen)
    return canvas
