"""Which row stands where in a stream: chunks in a computed order, rows mixed within a window of them.

Reading single rows from a disk is slow and reading chunks is fast, so chunks are shuffled, and the rows of a
window of chunks among one another. The order is a function of (rows, seed, epoch) and of nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64


class Window(NamedTuple):
    """A stretch of the stream whose rows come from the same chunks."""

    rows: Int64[np.ndarray, "window"]
    """Which row of the data each place holds."""
    slots: Int64[np.ndarray, "window"]
    """Which place of the stream: epoch * n + position, ascending."""
    stop: int
    """The place at which the next window begins, whoever reads it."""


@dataclass(frozen=True)
class Order:
    """A stream over n rows, epoch after epoch, every row once in each."""

    n: int
    chunk_rows: int
    window_chunks: int
    batch_size: int
    seed: int
    lanes: int = 1
    """Each batch is cut into so many equal parts, and of each window a part is filled from few chunks."""

    def windows(self, slot: int, lanes: frozenset[int] | None = None) -> Iterator[Window]:
        """The windows from a place of the stream on, without end; of some lanes only, where that is asked."""
        epoch, position = divmod(slot, self.n)
        while True:
            chunks = self._chunks(epoch)
            ends = np.cumsum(self._sizes(chunks))
            bounds = [*ends[self.window_chunks - 1 : -1 : self.window_chunks].tolist(), self.n]
            for number, end in enumerate(bounds):
                if end > position:
                    begin = bounds[number - 1] if number else 0
                    taken = chunks[number * self.window_chunks : (number + 1) * self.window_chunks]
                    window = self._window(epoch, begin, taken)
                    keep = window.slots >= epoch * self.n + position
                    if lanes is not None:
                        keep &= np.isin(self._lane(window.slots), sorted(lanes))
                    yield Window(window.rows[keep], window.slots[keep], window.stop)
            epoch, position = epoch + 1, 0

    def rows_of(self, first: int, stop: int) -> Int64[np.ndarray, "rows"]:
        """The rows at places `first` to `stop` of the stream."""
        found: list[np.ndarray] = []
        for window in self.windows(first):
            found.append(window.rows[window.slots < stop])
            if window.slots[-1] >= stop - 1:
                return np.concatenate(found)
        raise AssertionError("a stream has no end")

    def _window(self, epoch: int, begin: int, chunks: np.ndarray) -> Window:
        starts, sizes = chunks * self.chunk_rows, self._sizes(chunks)
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
        slots = epoch * self.n + begin + np.arange(len(rows))
        # a lane takes consecutive chunks, and its rows go to its places in the order of a hash
        places = np.lexsort((hashed(slots, self.seed), self._lane(slots)))
        mixed = np.empty_like(rows)
        mixed[places] = rows
        return Window(mixed, slots, int(slots[-1]) + 1)

    def _lane(self, slots: np.ndarray) -> np.ndarray:
        return slots % self.batch_size * self.lanes // self.batch_size

    def _chunks(self, epoch: int) -> np.ndarray:
        return _chunk_order(-(-self.n // self.chunk_rows), self.seed, epoch)

    def _sizes(self, chunks: np.ndarray) -> np.ndarray:
        return np.minimum(self.chunk_rows, self.n - chunks * self.chunk_rows)


@lru_cache(maxsize=2)
def _chunk_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(hashed(np.arange(count) + (epoch << 32), ~seed), kind="stable")


def hashed(values: Int64[np.ndarray, "n"], seed: int) -> UInt64[np.ndarray, "n"]:
    """64 bits scattered over 64 bits, by a key (the finalizer of SplitMix64, twice).

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    key = np.uint64(seed & (2**64 - 1))
    return _mix(_mix(values.astype(np.uint64)) ^ _mix(np.full(1, key)))


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
