"""The sparse products on a TPU: Pallas, by way of Mosaic."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.lax import div, rem
from jaxtyping import Array, Float, Float32, Int32

CHUNK = 256
"""Entries that lie in scalar memory at once; all of a batch's do not fit there."""

SEGMENTS = 16
"""Segments that a step of the grid sums."""

SLOTS = 16
"""Rows of a table that are held, one that is used and the others on their way."""

AHEAD = SLOTS - 1

LANES = 128

WHERE_IT_LIES = pl.BlockSpec(memory_space=pl.ANY)

# steps share nothing, so that a chip of two cores may divide them
BY_MOSAIC = tpu.CompilerParams(dimension_semantics=("parallel",))


def segment_sum(
    values: Float32[Array, "entries"],
    rows: Int32[Array, "entries"],
    starts: Int32[Array, "bounds"],
    table: Float[Array, "n d"],
    interpret: Any = False,
) -> Float[Array, "bounds-1 d"]:
    """As `sae_jax.kernels.segment_sum`; a step of the grid sums a few segments, by chunks of their entries.

    Args:
      values, rows, starts, table: as there.
      interpret: run as plain JAX on any device, for tests.
    """
    segments, d = starts.size - 1, table.shape[1]
    if not rows.size or not segments:
        return jnp.zeros((segments, d), table.dtype)
    steps, table = pl.cdiv(segments, SEGMENTS), _tiled(table)
    tiles = table.shape[1:]
    bound = jnp.arange(steps)[:, None] * SEGMENTS + jnp.arange(SEGMENTS + 1)
    total = pl.pallas_call(
        _sum_kernel,
        out_shape=jax.ShapeDtypeStruct((steps * SEGMENTS, *tiles), table.dtype),
        grid=(steps,),
        in_specs=[_scalars(SEGMENTS + 1), WHERE_IT_LIES, WHERE_IT_LIES, WHERE_IT_LIES],
        out_specs=pl.BlockSpec((SEGMENTS, *tiles), _own),
        scratch_shapes=[
            tpu.VMEM((SEGMENTS, *tiles), jnp.float32),
            tpu.SMEM((1, CHUNK), jnp.float32),
            tpu.SMEM((1, CHUNK), jnp.int32),
            *_buffer(table),
        ],
        compiler_params=BY_MOSAIC,
        interpret=interpret,
    )(starts[jnp.minimum(bound, segments)][:, None, :], _chunked(values), _chunked(rows), table)
    return total.reshape(steps * SEGMENTS, -1)[:segments, :d]


def _sum_kernel(starts, all_values, all_rows, table, out, total, values, rows, buffer, arrived):
    total[...] = jnp.zeros_like(total)
    first, last = starts[0, 0], starts[0, SEGMENTS]

    def add_chunk(chunk):
        tpu.sync_copy(all_values.at[chunk], values)
        tpu.sync_copy(all_rows.at[chunk], rows)
        offset = chunk * CHUNK
        low, high = (jnp.clip(bound - offset, 0, CHUNK) for bound in (first, last))
        fetch = partial(_fetch, rows, table, buffer, arrived)
        _loop(low, jnp.minimum(low + AHEAD, high), lambda entry: fetch(entry).start())

        def add_segment(segment):
            def add(entry, sum_so_far):
                fetch(entry).wait()
                pl.when(entry + AHEAD < high)(lambda: fetch(entry + AHEAD).start())
                return sum_so_far + values[0, entry] * buffer[_slot(entry)].astype(jnp.float32)

            begin, end = (jnp.clip(starts[0, segment + side] - offset, low, high) for side in (0, 1))
            total[segment] = jax.lax.fori_loop(begin, end, add, total[segment])

        _loop(0, SEGMENTS, add_segment)

    _loop(div(first, np.int32(CHUNK)), div(last + (CHUNK - 1), np.int32(CHUNK)), add_chunk)
    out[...] = total[...].astype(out.dtype)


def row_dots(
    left: Float[Array, "n d"],
    left_rows: Int32[Array, "entries"],
    right: Float[Array, "m d"],
    right_rows: Int32[Array, "entries"],
    interpret: Any = False,
) -> Float32[Array, "entries"]:
    """As `sae_jax.kernels.row_dots`; a step of the grid is a chunk of entries.

    Args:
      left, left_rows, right, right_rows: as there.
      interpret: run as plain JAX on any device, for tests.
    """
    entries = left_rows.size
    if not entries:
        return jnp.zeros(0, jnp.float32)
    left, right = _tiled(left), _tiled(right)
    left_rows, right_rows = _chunked(left_rows), _chunked(right_rows)
    dots = pl.pallas_call(
        _dots_kernel,
        out_shape=jax.ShapeDtypeStruct(left_rows.shape, jnp.float32),
        grid=left_rows.shape[:1],
        in_specs=[WHERE_IT_LIES, _scalars(CHUNK), WHERE_IT_LIES, _scalars(CHUNK)],
        out_specs=_scalars(CHUNK),
        scratch_shapes=[*_buffer(left), *_buffer(right)],
        compiler_params=BY_MOSAIC,
        interpret=interpret,
    )(left, left_rows, right, right_rows)
    return dots.reshape(-1)[:entries]


def _dots_kernel(
    left, left_rows, right, right_rows, out, left_buffer, left_arrived, right_buffer, right_arrived
):
    fetches = (
        partial(_fetch, left_rows, left, left_buffer, left_arrived),
        partial(_fetch, right_rows, right, right_buffer, right_arrived),
    )

    def start(entry):
        for fetch in fetches:
            fetch(entry).start()

    def dot(entry):
        for fetch in fetches:
            fetch(entry).wait()
        pl.when(entry + AHEAD < CHUNK)(lambda: start(entry + AHEAD))
        a, b = (buffer[_slot(entry)].astype(jnp.float32) for buffer in (left_buffer, right_buffer))
        out[0, entry] = jnp.sum(a * b)

    _loop(0, AHEAD, start)
    _loop(0, CHUNK, dot)


def _tiled(table: Float[Array, "n d"]) -> Float[Array, "n tiles lanes"]:
    """The rows as tiles of their own: a copy takes whole tiles, and those of a matrix span several rows."""
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % LANES))).reshape(table.shape[0], -1, LANES)


def _chunked(entries: Array) -> Array:
    return jnp.pad(entries, (0, -entries.size % CHUNK)).reshape(-1, 1, CHUNK)


def _own(step):
    """A step's block. Under 64-bit types a plain 0 would be an index that Mosaic does not take."""
    return step, np.int32(0), np.int32(0)


def _scalars(count: int) -> pl.BlockSpec:
    """One row per step of [steps, 1, count], in the memory whose entries can be bounds and indices."""
    return pl.BlockSpec((None, 1, count), _own, memory_space=tpu.SMEM)


def _buffer(table: Float[Array, "n tiles lanes"]) -> tuple:
    return tpu.VMEM((SLOTS, *table.shape[1:]), table.dtype), tpu.SemaphoreType.DMA((SLOTS,))


def _fetch(rows, table, buffer, arrived, entry):
    """The copy of an entry's row to its slot of the buffer."""
    slot = _slot(entry)
    return tpu.make_async_copy(table.at[rows[0, entry]], buffer.at[slot], arrived.at[slot])


def _slot(entry):
    return rem(entry, np.int32(SLOTS))


def _loop(first, last, body: Callable) -> None:
    jax.lax.fori_loop(jnp.int32(first), jnp.int32(last), lambda index, _: body(index), None)
