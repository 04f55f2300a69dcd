"""NumPy's random generators, many at once: the same numbers as from one after the other, for a hundredth of the time.

Axes: P positions, n draws of each.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Long = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""Unsigned integers of 128 bits: their upper halves and their lower ones."""

POOL = 4
"""Words of 32 bits that a seed is mixed into."""
MULTIPLIER = (np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645))
"""Of PCG64."""
LOWER, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniform(seed: Sequence[int], positions: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """`np.random.default_rng((*seed, position)).random(draws)` for each of the positions, bit by bit.

    Making a generator costs NumPy 10 us, whatever is drawn from it. This is its SeedSequence and its PCG64 (NumPy keeps
    both as they are, so that results can be repeated), carried out for all positions side by side.

    Args:
        seed: numbers from 0 on, of any size.
        positions: P, below 2**32.
        draws: n.

    Returns:
        P n, from 0 to 1, 1 excluded.

    Reference: M. E. O'Neill (2014), PCG: A family of simple fast space-efficient statistically good algorithms.
    """
    drawn = np.empty((len(positions), draws))
    for n, words in enumerate(islice(_long_words(seed, positions), draws)):
        drawn[:, n] = (words >> np.uint64(11)) * 2.0**-53
    return drawn


def integers(seed: Sequence[int], positions: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """`np.random.default_rng((*seed, position)).integers(0, most, endpoint=True)` for each of the positions and its `most`.

    Args:
        seed: as in `uniform`.
        positions: P, below 2**32.
        most: P n (1 or more), 0 and above, below 2**32 - 1.

    Returns:
        P n, from 0 to `most`, which is included.

    Reference: D. Lemire (2019), Fast random integer generation in an interval.
    """
    long = islice(_long_words(seed, positions), ceil(most.shape[1] / 2))
    halves = np.array([half for words in long for half in (words & LOWER, words >> HALF)])
    # Where there is nothing to choose from, NumPy draws nothing.
    which = np.maximum(np.cumsum(most > 0, axis=1) - 1, 0)
    options = most.astype(np.uint64) + np.uint64(1)
    products = np.take_along_axis(halves.T, which, axis=1) * options
    found = (products >> HALF).astype(np.int64)
    # Few draws may be unfair, and be repeated: they are left to NumPy.
    for row in np.flatnonzero(((products & LOWER) < options).any(axis=1)).tolist():
        alone = np.random.default_rng((*seed, int(positions[row])))
        found[row] = alone.integers(0, most[row], endpoint=True)
    return found


def _long_words(seed: Sequence[int], positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
    """What each position's generator gives, 64 bits at a time: P."""
    words = [np.full(positions.shape, word, np.uint32) for number in seed for word in _words(number)]
    pool = _mixed([*words, positions.astype(np.uint32)])
    first, second, third, fourth = _seeds(pool)
    increment = (third << np.uint64(1) | fourth >> np.uint64(63), fourth << np.uint64(1) | np.uint64(1))
    state = _next(_sum((first, second), increment), increment)
    while True:
        state = high, low = _next(state, increment)
        folded, turn = high ^ low, high >> np.uint64(58)
        yield np.bitwise_or(folded >> turn, folded << (-turn & np.uint64(63)))


def _words(number: int) -> list[int]:
    """A number in words of 32 bits, the lowest first; 0 is one word."""
    return [number >> shift & 0xFFFFFFFF for shift in range(0, max(number.bit_length(), 1), 32)]


def _constants(first: int, multiplier: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    """What each word is hashed with: it is the same whatever is hashed."""
    while True:
        following = first * multiplier & 0xFFFFFFFF
        yield np.uint32(first), np.uint32(following)
        first = following


def _hashed(words: Words, constants: tuple[np.uint32, np.uint32]) -> Words:
    words = (words ^ constants[0]) * constants[1]
    return words ^ words >> np.uint32(16)


def _mixed(entropy: list[Words]) -> list[Words]:
    """The pool of a SeedSequence."""
    constants = _constants(0x43B0D7E5, 0x931E8875)
    filled = entropy + [np.zeros_like(entropy[0])] * (POOL - len(entropy))
    pool = [_hashed(words, next(constants)) for words in filled[:POOL]]

    def mix(target: int, words: Words) -> None:
        mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * _hashed(words, next(constants))
        pool[target] = mixed ^ mixed >> np.uint32(16)

    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                mix(target, pool[source])
    for words in filled[POOL:]:
        for target in range(POOL):
            mix(target, words)
    return pool


def _seeds(pool: list[Words]) -> list[NDArray[np.uint64]]:
    """Four numbers of 64 bits from a pool."""
    constants = _constants(0x8B51F9DD, 0x58F38DED)
    halves = [_hashed(pool[i % POOL], next(constants)).astype(np.uint64) for i in range(8)]
    return [low | high << HALF for low, high in zip(halves[::2], halves[1::2], strict=True)]


def _next(state: Long, increment: Long) -> Long:
    """The state of PCG64 one step on."""
    (high, low), (upper, lower) = state, MULTIPLIER
    return _sum((_upper_half(low, lower) + high * lower + low * upper, low * lower), increment)


def _sum(one: Long, other: Long) -> Long:
    low = one[1] + other[1]
    return one[0] + other[0] + (low < one[1]), low


def _upper_half(one: NDArray[np.uint64], other: np.uint64) -> NDArray[np.uint64]:
    """Of the product, which has 128 bits."""
    (a, b), (c, d) = (one >> HALF, one & LOWER), (other >> HALF, other & LOWER)
    middle = a * d + (b * d >> HALF)
    carried = b * c + (middle & LOWER)
    return a * c + (middle >> HALF) + (carried >> HALF)
