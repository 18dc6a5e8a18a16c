"""What sparse products are made of: sums of a table's rows by segments, and dots of pairs of rows."""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae_jax import kernels

SLOTS = 64
"""Up to so many entries of a segment are added in one fused loop."""
BLOCK, AT_ONCE = 32, 8
"""Of longer segments, how many side by side, and how many entries of each at once."""
STRETCH = 64
"""How many segments a pass of the loop over them takes."""
BESIDE = 16
"""By how many columns rows are longer that are to be turned: a column of rows whose length is a power of two
would lie in a few lines of a cache alone."""
CHUNK, LANES = 2048, 16
"""Pairs of rows whose products are taken at once, and how many sums of them go side by side."""


def segment_sum(
    values: Float[Array, "entries"],
    rows: Int[Array, "entries"],
    starts: Int[Array, "bounds"],
    table: Float[Array, "n d"],
    most: int | None = None,
    turned: bool = False,
) -> Float[Array, "..."]:
    """Sums of rows of a table, segment after segment.

        out_s = sum_e values_e table[rows_e],   e from starts[s] to starts[s + 1] - 1

    On a GPU and a TPU by a kernel, where it compiles there; elsewhere by `fused_segment_sum`.

    Args:
      values: one per entry.
      rows: of the table.
      starts: where segments begin, not falling; what lies after the last is in none.
      table: rows.
      most: entries that a segment has at most; None where it is not known.
      turned: give the transpose.

    Returns:
      One row per segment, [segments, d]; where turned one column, [d, segments].
    """
    plain = partial(fused_segment_sum, most=most, turned=turned)

    def kernel(values, *rest):
        sums = kernels.segment_sum(values.astype(jnp.float32), *rest)
        return sums.T if turned else sums

    return _on_device(plain, kernel, values, rows, starts, table)


@partial(jax.jit, static_argnames=("most", "turned"))  # so that each shape is traced once
def fused_segment_sum(
    values, rows, starts, table, most: int | None = None, turned: bool = False
) -> Float[Array, "..."]:
    """`segment_sum` by gathers that XLA fuses with their sum.

    The first few entries of all segments are added in one loop over the output. Of the segments that are
    longer, ranked by their length so that neighbours are about as long, blocks are added up step by step.
    """
    segments, entries = starts.size - 1, values.size
    if entries == 0 or segments == 0:
        return jnp.zeros((table.shape[1], segments) if turned else (segments, table.shape[1]), table.dtype)
    first, count, width = starts[:-1], starts[1:] - starts[:-1], table.shape[1]
    if turned:
        table = jnp.pad(table, ((0, 0), (0, BESIDE)))
    usual = max(2, min(16, 1 << (3 * entries // (2 * segments)).bit_length()))
    slots = most if most is not None and most <= SLOTS else usual

    def added(first, count, slots: int):
        at = jnp.minimum(first[:, None] + jnp.arange(slots), entries - 1)
        inside = jnp.arange(slots) < count[:, None]
        weight, row = jnp.where(inside, values[at], 0), jnp.where(inside, rows[at], 0)
        return sum(weight[:, slot, None] * table[row[:, slot]] for slot in range(slots))

    more, where = _of_longer(first + slots, count - slots, added, entries // (slots + 1), table)

    # in a loop, because XLA would else compute what goes in, and what comes out, anew at every use
    stretches = -(-segments // STRETCH)
    size = 2 * -(-segments // (2 * stretches))
    rest = stretches * size - segments
    columns = tuple(jnp.pad(column, (0, rest)).reshape(stretches, 2, -1) for column in (first, count, where))

    def half(own):
        first, count, where = own
        total = added(first, count, slots)
        return total if more is None else total + more[where]

    def stretch(number, sums):
        own = jax.lax.map(half, tuple(column[number] for column in columns)).reshape(size, -1)
        if turned:
            return jax.lax.dynamic_update_slice(sums, own[:, :width].T, (0, number * size))
        return jax.lax.dynamic_update_slice(sums, own, (number * size, 0))

    whole = (width, stretches * size) if turned else (stretches * size, table.shape[1])
    sums = jax.lax.fori_loop(0, stretches, stretch, jnp.zeros(whole, table.dtype))
    return sums[:, :segments] if turned else sums[:segments]


def _of_longer(first, left, added, bound: int, table):
    """What is left of long segments, [blocks BLOCK + 1, d], the last row 0; and which row is each segment's.

    Ranked by what is left of them, so that the segments of a block are about as long as each other.
    """
    segments = left.size
    blocks = -(-min(segments, bound) // BLOCK)
    none = jnp.full(segments, blocks * BLOCK, jnp.int32)
    if blocks == 0:
        return None, none
    left = jnp.maximum(left, 0)
    rank = jnp.argsort(left, descending=True)[: blocks * BLOCK]
    rank = jnp.pad(rank, (0, blocks * BLOCK - rank.size), constant_values=segments)
    first, ranked = (jnp.pad(each, (0, 1))[rank] for each in (first, left))

    def block(number, sums):
        begin, count = (jax.lax.dynamic_slice(each, (number * BLOCK,), (BLOCK,)) for each in (first, ranked))
        part = jax.lax.fori_loop(
            0,
            (count[0] + AT_ONCE - 1) // AT_ONCE,
            lambda step, part: part + added(begin + step * AT_ONCE, count - step * AT_ONCE, AT_ONCE),
            jnp.zeros((BLOCK, table.shape[1]), table.dtype),
        )
        return jax.lax.dynamic_update_slice(sums, part, (number * BLOCK, 0))

    used = ((ranked > 0).sum() + BLOCK - 1) // BLOCK
    sums = jax.lax.fori_loop(0, used, block, jnp.zeros((blocks * BLOCK + 1, table.shape[1]), table.dtype))
    numbers = jnp.arange(blocks * BLOCK, dtype=jnp.int32)
    return sums, none.at[jnp.where(ranked > 0, rank, segments)].set(numbers, mode="drop")


def row_dots(
    left: Float[Array, "n d"],
    left_rows: Int[Array, "entries"],
    right: Float[Array, "m d"],
    right_rows: Int[Array, "entries"],
) -> Float[Array, "entries"]:
    """Dot products of pairs of rows: `out_e = left[left_rows_e] . right[right_rows_e]`.

    Args:
      left, right: matrices as wide as each other.
      left_rows, right_rows: one of each per entry.

    Returns:
      One number per entry.
    """

    def kernel(*arrays):
        return kernels.row_dots(*arrays).astype(left.dtype)

    return _on_device(gathered_dots, kernel, left, left_rows, right, right_rows)


@jax.jit
def gathered_dots(left, left_rows, right, right_rows):
    """`row_dots` by gathers that XLA fuses with their products, and sums side by side, as a core's lanes go.

    Some pairs at a time, so that what the rest is computed from stays in the cache.
    """
    entries, width = right_rows.size, left.shape[1]
    if entries == 0:
        return jnp.zeros(0, left.dtype)
    size = min(entries, CHUNK)
    pairs = [jnp.pad(rows, (0, -entries % size)).reshape(-1, size) for rows in (left_rows, right_rows)]
    left, right = (jnp.pad(table, ((0, 0), (0, -width % LANES))) for table in (left, right))

    def dots(own):
        products = left[own[0]] * right[own[1]]
        lanes = reduce(jnp.add, [products[:, at : at + LANES] for at in range(0, width, LANES)])
        return lanes.sum(axis=-1)

    return jax.lax.map(dots, pairs).reshape(-1)[:entries]


def _on_device(plain: Callable[..., Array], kernel: Callable[..., Array], *arrays: Array) -> Array:
    """By XLA's own operations on a CPU, and in double precision; elsewhere by a kernel, where it compiles."""
    if any(array.dtype == jnp.float64 for array in arrays):
        return plain(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=plain, default=kernel)
