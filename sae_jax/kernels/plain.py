"""The sparse products in plain JAX: for every device without a kernel, and what kernels are held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

STRETCH = 4096
"""Entries whose rows are gathered at once, so that not all of them lie in memory."""


def segment_sum(
    values: Float32[Array, "entries"],
    rows: Int32[Array, "entries"],
    starts: Int32[Array, "bounds"],
    table: Float[Array, "n d"],
) -> Float[Array, "bounds-1 d"]:
    """As `sae_jax.kernels.segment_sum`."""
    # 0 is what lies before the first segment, and the last number what lies after the last one
    segment = jnp.searchsorted(starts, jnp.arange(rows.size, dtype=jnp.int32), side="right")
    stretches = tuple(
        jnp.pad(each, (0, -each.size % STRETCH)).reshape(-1, STRETCH) for each in (values, rows, segment)
    )

    def add(total, stretch):
        value, row, segment = stretch
        return total.at[segment].add(value[:, None] * table[row].astype(jnp.float32)), None

    total, _ = jax.lax.scan(add, jnp.zeros((starts.size + 1, table.shape[1]), jnp.float32), stretches)
    return total[1:-1].astype(table.dtype)


def row_dots(
    left: Float[Array, "n d"],
    left_rows: Int32[Array, "entries"],
    right: Float[Array, "m d"],
    right_rows: Int32[Array, "entries"],
) -> Float32[Array, "entries"]:
    """As `sae_jax.kernels.row_dots`."""

    def dot(rows):
        a, b = left[rows[0]], right[rows[1]]
        # a sum of products, since a matrix unit would round both
        return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum()

    return jax.lax.map(dot, (left_rows, right_rows), batch_size=STRETCH)
