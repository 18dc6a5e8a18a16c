"""Rows as the contexts that they are of: what a pass over activations reads, stretch by stretch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from sae_jax.base import require
from sae_jax.data import Rows, Store, side_by_side
from sae_jax.features.observed import NONE

LONGEST = 256
"""Tokens of a context that are looked at together; a longer one is taken in pieces."""
MOST_ROWS = 2**31 - 1
AT_A_TIME = 1 << 20
"""Positions read at once, to find where contexts begin."""


class Reading(NamedTuple):
    """Rows, the token of each, and where their contexts begin."""

    x: Rows
    tokens: Rows | None
    """[rows] int32; None for rows without tokens."""
    begins: Int[np.ndarray, "contexts"]
    """The first row of each context, the first being 0."""

    @property
    def ends(self) -> Int[np.ndarray, "contexts"]:
        """The row after the last of each context."""
        return np.append(self.begins[1:], len(self.x))

    @property
    def length(self) -> int:
        """Rows of the longest context."""
        return int((self.ends - self.begins).max())


class Stretch(NamedTuple):
    """Some contexts side by side; what lies beyond the end of one is 0, with the row `NONE`."""

    x: Shaped[np.ndarray, "contexts length *d_in"]
    rows: Int[np.ndarray, "contexts length"]
    first: int
    """The number of its first context."""


def of_store(store: Store, *sites: str) -> Reading:
    """The rows of a site, in the contexts that the model read.

    Args:
      store: from `open_store`.
      sites: its name, which may be left out where there is one; for a crosscoder all that it reads.

    Returns:
      A reading. A context begins wherever a token's position is not above that of the row before; one of more
      than 256 tokens is taken in pieces.

    Raises:
      InputError: no such site, several and no name, a damaged file.

    Example:
      >>> observe(trained, of_store(open_store("acts/")))
    """
    several = [store.site(name) for name in sites or (None,)]
    x = several[0] if len(several) == 1 else side_by_side(several)
    return Reading(x, store.tokens, _pieces(_begins(store.positions), store.rows))


def of_rows(x: Rows, tokens: Rows | None = None, context: int = 1) -> Reading:
    """Rows of anything else, so many to a context.

    Args:
      x: from `open_rows` for one.
      tokens: [rows] integers; None where there are none.
      context: rows per context; 1 where neighbours have nothing to do with one another.

    Raises:
      InputError: other numbers of tokens than of rows, or a context under 1.
    """
    require(len(x) > 0, f"{x.label} has no rows")
    require(context >= 1, f"context must be at least 1, got {context}")
    require(tokens is None or len(tokens) == len(x), f"{x.label} has {len(x)} rows but there are "
            f"{0 if tokens is None else len(tokens)} tokens")  # fmt: skip
    return Reading(x, tokens, _pieces(np.arange(0, len(x), context), len(x)))


def in_memory(values: Shaped[np.ndarray, "rows *_"], label: str = "the rows") -> Rows:
    """An array in memory as rows that are read a stretch at a time."""
    return Rows(
        values.shape, values.dtype, max(len(values), 1), label, lambda start, stop: values[start:stop]
    )


def first(reading: Reading, rows: int) -> Reading:
    """The first rows of a reading, about so many: its last context is whole.

    Raises:
      InputError: fewer than one row.
    """
    require(rows >= 1, f"rows must be at least 1, got {rows}")
    begins = reading.begins[reading.begins < rows]
    stop = int(reading.ends[len(begins) - 1])
    return Reading(replace(reading.x, shape=(stop, *reading.x.shape[1:])), reading.tokens, begins)


def stretches(reading: Reading, contexts: int) -> Iterator[Stretch]:
    """All contexts in their order, so many at a time; the last stretch is filled up with empty ones."""
    ends, length = reading.ends, reading.length
    for first in range(0, len(ends), contexts):
        begins, stops = reading.begins[first : first + contexts], ends[first : first + contexts]
        found = reading.x.read(int(begins[0]), int(stops[-1]))
        yield _side_by_side(found, begins, stops, contexts, length)._replace(first=first)


def windows(
    rows: Int[np.ndarray, "d_sae shown"], reading: Reading, before: int, size: int
) -> Int[np.ndarray, "d_sae shown window"]:
    """The tokens around some rows, `NONE` beyond the ends of their contexts; read in their order."""
    tokens = reading.tokens
    assert tokens is not None
    context = np.searchsorted(reading.begins, rows, side="right") - 1
    around = rows[..., None] + np.arange(-before, size - before)
    inside = (rows != NONE)[..., None] & (around >= reading.begins[context][..., None])
    inside &= around < reading.ends[context][..., None]
    found = np.full(around.shape, NONE, np.int32)
    flat, wanted, kept = found.reshape(-1), around.reshape(-1), inside.reshape(-1)
    order = np.argsort(np.where(kept, wanted, MOST_ROWS), kind="stable")[: kept.sum()]
    ranked = wanted[order]
    for start in range(0, len(tokens), AT_A_TIME):
        stop = min(start + AT_A_TIME, len(tokens))
        low, high = np.searchsorted(ranked, [start, stop])
        if low < high:
            flat[order[low:high]] = tokens.read(start, stop)[ranked[low:high] - start]
    return found


def _begins(positions: Rows) -> Int[np.ndarray, "contexts"]:
    found, last = [np.zeros(1, np.int64)], None
    for start in range(0, len(positions), AT_A_TIME):
        part = positions.read(start, min(start + AT_A_TIME, len(positions)))
        with_last = part if last is None else np.append(last, part)
        found.append(np.flatnonzero(with_last[1:] <= with_last[:-1]) + start + (last is None))
        last = part[-1]
    return np.concatenate(found)


def _pieces(begins: Int[np.ndarray, "contexts"], rows: int) -> Int[np.ndarray, "pieces"]:
    """The same contexts, the long ones cut."""
    require(rows <= MOST_ROWS, f"at most {MOST_ROWS:,} rows can be looked at, got {rows:,}")
    lengths = np.diff(np.append(begins, rows))
    several = -(-lengths // LONGEST)
    number = np.arange(several.sum()) - np.repeat(np.cumsum(several) - several, several)
    return np.repeat(begins, several) + LONGEST * number


def _side_by_side(
    found: np.ndarray, begins: np.ndarray, stops: np.ndarray, contexts: int, length: int
) -> Stretch:
    rows = np.full((contexts, length), NONE, np.int32)
    around = begins[:, None] + np.arange(length)
    inside = around < stops[:, None]
    rows[: len(begins)][inside] = around[inside]
    # a whole stretch of full contexts is what was read, as it lies
    if inside.all() and len(begins) == contexts:
        return Stretch(found.reshape(contexts, length, *found.shape[1:]), rows, 0)
    x = np.zeros((contexts, length, *found.shape[1:]), found.dtype)
    x[: len(begins)][inside] = found
    return Stretch(x, rows, 0)
