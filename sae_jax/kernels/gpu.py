"""The sparse products on a GPU: Pallas, by way of Triton."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int32

ENTRIES = 8
"""Entries that a program reads side by side."""

COLUMNS = 512
"""The most columns of a table that a program reads side by side."""

# left to itself, Pallas lowers by Mosaic GPU, whose copies and layouts want blocks of neighbouring rows
BY_TRITON = triton.CompilerParams(num_warps=4)


def segment_sum(
    values: Float32[Array, "entries"],
    rows: Int32[Array, "entries"],
    starts: Int32[Array, "bounds"],
    table: Float[Array, "n d"],
    interpret: bool = False,
) -> Float[Array, "bounds-1 d"]:
    """As `sae_jax.kernels.segment_sum`; one program per segment and block of columns.

    Args:
      values, rows, starts, table: as there.
      interpret: run as plain JAX on any device, for tests.
    """
    segments, d = starts.size - 1, table.shape[1]
    if not rows.size or not segments:
        return jnp.zeros((segments, d), table.dtype)
    columns = min(COLUMNS, pl.next_power_of_2(d))
    return pl.pallas_call(
        partial(_sum_kernel, d=d, columns=columns),
        out_shape=jax.ShapeDtypeStruct((segments, d), table.dtype),
        grid=(segments, pl.cdiv(d, columns)),
        compiler_params=BY_TRITON,
        interpret=interpret,
    )(values, rows, starts, table)


def _sum_kernel(values, rows, starts, table, out, *, d: int, columns: int):
    segment = pl.program_id(0)
    first, last = starts[segment], starts[segment + 1]
    column = pl.program_id(1) * columns + _count(columns)
    inside = column < d

    def add(step, total):
        entry = first + step * ENTRIES + _count(ENTRIES)
        here = entry < last
        row = triton.load(rows.at[entry], mask=here, other=0)
        value = triton.load(values.at[entry], mask=here, other=0)
        return total + value[:, None] * _tile(table, row, column, here[:, None] & inside)

    steps = jax.lax.div(last - first + (ENTRIES - 1), np.int32(ENTRIES))
    total = jax.lax.fori_loop(np.int32(0), steps, add, jnp.zeros((ENTRIES, columns), jnp.float32))
    triton.store(out.at[segment, column], total.sum(axis=0).astype(out.dtype), mask=inside)


def row_dots(
    left: Float[Array, "n d"],
    left_rows: Int32[Array, "entries"],
    right: Float[Array, "m d"],
    right_rows: Int32[Array, "entries"],
    interpret: bool = False,
) -> Float32[Array, "entries"]:
    """As `sae_jax.kernels.row_dots`; one program for every few entries.

    Args:
      left, left_rows, right, right_rows: as there.
      interpret: run as plain JAX on any device, for tests.
    """
    entries, d = left_rows.size, left.shape[1]
    if not entries:
        return jnp.zeros(0, jnp.float32)
    return pl.pallas_call(
        partial(_dots_kernel, entries=entries, d=d, columns=min(COLUMNS, pl.next_power_of_2(d))),
        out_shape=jax.ShapeDtypeStruct((entries,), jnp.float32),
        grid=(pl.cdiv(entries, ENTRIES),),
        compiler_params=BY_TRITON,
        interpret=interpret,
    )(left, left_rows, right, right_rows)


def _dots_kernel(left, left_rows, right, right_rows, out, *, entries: int, d: int, columns: int):
    entry = pl.program_id(0) * ENTRIES + _count(ENTRIES)
    here = entry < entries
    left_row, right_row = (
        triton.load(rows.at[entry], mask=here, other=0) for rows in (left_rows, right_rows)
    )

    def add(block, total):
        column = block * columns + _count(columns)
        inside = here[:, None] & (column < d)
        return total + _tile(left, left_row, column, inside) * _tile(right, right_row, column, inside)

    blocks = np.int32(pl.cdiv(d, columns))
    total = jax.lax.fori_loop(np.int32(0), blocks, add, jnp.zeros((ENTRIES, columns), jnp.float32))
    triton.store(out.at[entry], total.sum(axis=1), mask=here)


def _count(size: int) -> Int32[Array, "size"]:
    return jnp.arange(size, dtype=jnp.int32)


def _tile(table, row, column, inside) -> Float32[Array, "rows columns"]:
    tile = triton.load(table.at[row[:, None], column[None, :]], mask=inside, other=0)
    return tile.astype(jnp.float32)
