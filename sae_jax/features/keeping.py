"""What a pass keeps of each feature, and how it changes with one stretch more.

It lies on the device and does not grow: sums, a histogram, and of each feature its strongest contexts and a
sample of all in which it is active, as running top-k.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sae_jax.features.observed import NONE

BINS, PER_OCTAVE, ABOVE = 30, 2, 4
"""Of the histogram: how many, how many to a doubling, how many lie above what the first stretch shows."""
ROWS_AT_A_TIME = 8
"""That the histogram counts, so that they stay in a core's cache: four times as fast as all at once."""


class Options(NamedTuple):
    """How much of each feature is kept."""

    strongest: int = 20
    """Contexts with the largest activations."""
    by_chance: int = 32
    """Contexts of a sample."""
    before: int = 16
    """Tokens of a context before the strongest one."""
    after: int = 8
    near: int = 10
    """Features that fire with it."""
    passages: int = 8
    """Whole contexts, of all features together."""
    at_once: int = 24
    """Features that are shown of a passage."""

    @property
    def window(self) -> int:
        """Tokens of a context."""
        return self.before + 1 + self.after


USUAL = Options()


class Kept(NamedTuple):
    """The contexts kept of each feature."""

    keys: Shaped[Array, "d_sae kept"]
    """What decides who stays; below 0 where there is no context."""
    rows: Int[Array, "d_sae kept"]
    values: Float[Array, "d_sae kept window"]


class Sums(NamedTuple):
    """What has been seen so far."""

    total: Float[Array, "d_sae"]
    above: Int[Array, "edges d_sae"]
    """Tokens on which the activation is above each edge."""
    strongest: Kept
    by_chance: Kept


def edges_for(largest: float) -> Float[Array, "bins"]:
    """Where the bins begin: 0, and powers up to some above the largest activation of the first stretch."""
    largest = largest if 0 < largest < math.inf else 1.0
    powers = 2.0 ** (np.arange(2 - BINS + ABOVE, 1 + ABOVE) / PER_OCTAVE)
    return jnp.asarray(np.append(0.0, largest * powers), jnp.float32)


def nothing(d_sae: int, options: Options) -> Sums:
    """What a pass begins with."""

    def none(size: int, key: float | int) -> Kept:
        return Kept(
            jnp.full((d_sae, size), key),
            jnp.full((d_sae, size), NONE, jnp.int32),
            jnp.full((d_sae, size, options.window), jnp.nan, jnp.float32),
        )

    above = jnp.zeros((BINS, d_sae), jnp.int32)
    return Sums(jnp.zeros(d_sae), above, none(options.strongest, -jnp.inf), none(options.by_chance, -1))


def take_in(encode, options: Options, params, sums: Sums, x, rows, edges, key) -> tuple[Sums, Array]:
    """One stretch more, and its features [contexts, length, d_sae]."""
    contexts, length = rows.shape
    f = encode(params, x.reshape(-1, *x.shape[2:]).astype(jnp.float32)).astype(jnp.float32)
    f = jnp.where(rows[..., None] != NONE, f.reshape(contexts, length, -1), 0)
    peaks = f.max(axis=1)
    # the first token at the peak; `argmax` takes longer than both of these passes together
    token = jnp.arange(length, dtype=jnp.int32)[:, None]
    at = jnp.where(f == peaks[:, None], token, length - 1).min(axis=1)
    seen = partial(_kept, f=f, rows=rows, at=at, options=options)
    # whole numbers of 31 bits: a float's 23 would give ties, which the earlier context wins
    chance = (jax.random.bits(key, peaks.shape) >> 1).astype(jnp.int32)
    now = Sums(
        sums.total + f.sum(axis=(0, 1)),
        sums.above + _above(f.reshape(contexts * length, -1), edges),
        seen(sums.strongest, jnp.where(peaks > 0, peaks, -jnp.inf)),
        seen(sums.by_chance, jnp.where(peaks > 0, chance, -1)),
    )
    return now, f


def _above(f: Float[Array, "rows d_sae"], edges: Float[Array, "edges"]) -> Int[Array, "edges d_sae"]:
    """Rows on which each feature is above each edge."""
    some = f.reshape(-1, math.gcd(len(f), ROWS_AT_A_TIME), f.shape[-1])

    def counted(counts, part):
        return counts + (part[:, None] > edges[:, None]).astype(jnp.int32).sum(axis=0), None

    return jax.lax.scan(counted, jnp.zeros((len(edges), f.shape[-1]), jnp.int32), some)[0]


def _kept(before: Kept, keys: Shaped[Array, "contexts d_sae"], *, f, rows, at, options: Options) -> Kept:
    """Of the contexts kept before and those of a stretch, the ones with the largest keys."""
    d_sae, size = before.keys.shape
    largest, chosen = jax.lax.top_k(jnp.concatenate([before.keys, keys.T], axis=1), size)
    new = chosen >= size
    context, old = jnp.where(new, chosen - size, 0), jnp.where(new, 0, chosen)
    peak = jnp.take_along_axis(at.T, context, axis=1)
    around = peak[..., None] + jnp.arange(-options.before, options.after + 1)
    token = jnp.clip(around, 0, rows.shape[1] - 1)
    inside = (around == token) & (rows[context[..., None], token] != NONE)
    values = jnp.where(inside, f[context[..., None], token, jnp.arange(d_sae)[:, None, None]], jnp.nan)
    return Kept(
        largest,
        jnp.where(new, rows[context, peak], jnp.take_along_axis(before.rows, old, axis=1)),
        jnp.where(new[..., None], values, jnp.take_along_axis(before.values, old[..., None], axis=1)),
    )
