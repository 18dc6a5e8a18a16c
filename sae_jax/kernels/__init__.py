"""Sparse products of rows: sums over segments, and dots, by kernels where a device has them.

A TopK dictionary decodes k of its rows per input. As a dense product that is d_sae / k times the work; as a
gather, all k rows of all inputs lie in memory at once. These two products read each row where it lies.

A program is lowered as its platform can: by Triton on CUDA (`gpu`), by Mosaic on TPU (`tpu`), and by plain
JAX elsewhere (`plain`). Pallas is imported when a program is lowered for one of the first two, since that
takes half a second, which a run on a CPU need not pay.

What was checked, with jax 0.10.1 and no accelerator at hand: both kernels against numpy in Pallas's
interpreters, lowering for CUDA and TPU, and compilation ahead of time for an H100 (no atomics, 128-bit loads,
no spills) and for a TPU v5e. They have run on neither, and nothing is known of their speed. Where such a
device is, both are tried before their first use (`usable`), and compiled for the sizes at hand (`compiles`).

On a mesh, call them within `jax.shard_map(..., check_vma=False)`: XLA does not divide a kernel by itself.
"""

import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float, Float32, Int32

from sae_jax.base import require
from sae_jax.kernels import plain

KERNELS = {"cuda": "gpu", "tpu": "tpu"}
"""Platforms, as JAX lowers for them, and the module of their kernels."""


def segment_sum(
    values: Float32[Array, "entries"],
    rows: Int32[Array, "entries"],
    starts: Int32[Array, "bounds"],
    table: Float[Array, "n d"],
) -> Float[Array, "bounds-1 d"]:
    """Sums of weighted rows, segment by segment.

        out_s = sum_{e = starts_s}^{starts_{s+1} - 1} values_e table[rows_e]

    Sums are taken in float32, without atomics: by a kernel, the same input gives the same bits again.

    Args:
      values: the weights of entries.
      rows: the row that each entry takes, 0 to n - 1.
      starts: where each segment begins among the entries, not falling, and where the last one ends. Entries
        before the first and after the last are padding.
      table: float32 or bfloat16.

    Returns:
      One row per segment, in the table's dtype; an empty segment's is 0.

    Raises:
      InputError: the table is of another dtype.

    Example:
      >>> starts = jnp.array([0, 1, 3])
      >>> segment_sum(jnp.array([2.0, 1.0, 1.0]), jnp.array([1, 0, 1]), starts, jnp.array([[1.0], [10.0]]))
      Array([[20.],
             [11.]], dtype=float32)
    """
    _require_narrow(table)
    return _segment_sum.bind(values, rows, starts, table)


def row_dots(
    left: Float[Array, "n d"],
    left_rows: Int32[Array, "entries"],
    right: Float[Array, "m d"],
    right_rows: Int32[Array, "entries"],
) -> Float32[Array, "entries"]:
    """Inner products of chosen rows: `out_e = <left[left_rows_e], right[right_rows_e]>`.

    Args:
      left, right: tables, each float32 or bfloat16.
      left_rows, right_rows: the row of each that an entry takes.

    Returns:
      One product per entry, summed in float32.

    Raises:
      InputError: a table is of another dtype.

    Example:
      >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> row_dots(table, jnp.array([0, 1]), table, jnp.array([1, 1]))
      Array([11., 25.], dtype=float32)
    """
    _require_narrow(left)
    _require_narrow(right)
    return _row_dots.bind(left, left_rows, right, right_rows)


def _require_narrow(table: Array) -> None:
    narrow = table.dtype in (jnp.float32, jnp.bfloat16)
    require(narrow, f"sparse products take tables in float32 or bfloat16, got {table.dtype}")


@lru_cache
def usable(platform: str) -> bool:
    """Whether a platform's kernels work, tried once: they run where such a device is, else they are lowered.

    Args:
      platform: "cuda" or "tpu".

    Returns:
      False, with a warning of one line, where a kernel does not compile or answers wrongly.

    Raises:
      InputError: the platform has no kernels.
    """
    require(platform in KERNELS, f"there are sparse kernels for {', '.join(KERNELS)}, not for {platform}")
    return _sound(
        lambda: all(_answers(platform, name, example) for name, example in _examples().items()),
        f"the sparse kernels do not compile on {platform}",
        f"the sparse kernels give wrong sums on {platform}",
    )


@lru_cache(maxsize=256)
def compiles(platform: str, name: str, *operands: jax.ShapeDtypeStruct) -> bool:
    """Whether a platform's kernel can be had for these operands; tried once, as `usable` is.

    Args:
      platform: "cuda" or "tpu".
      name: "segment_sum" or "row_dots".
      operands: shapes and dtypes.

    Returns:
      False, with a warning of one line, where no kernel of the platform is usable, or not for these sizes.
    """
    if not usable(platform):
        return False
    shapes = ", ".join(f"{operand.dtype}{list(operand.shape)}" for operand in operands)
    return _sound(
        lambda: _compiled(platform, name, operands) is not None,
        f"the sparse kernel {name} does not compile on {platform} for {shapes}",
    )


def _sound(right: Callable[[], bool], if_raised: str, if_wrong: str = "") -> bool:
    """Whether that is right; if not, or if it raises, a sentence is told in a warning."""
    fault = ""
    # in a thread of its own, since in this one a program is on its way through jit
    with ThreadPoolExecutor(1) as aside:
        asked = aside.submit(right)
        try:
            fault = "" if asked.result() else if_wrong
        except Exception as error:  # a compiler may raise anything
            first_line = str(error).partition("\n")[0]
            fault = f"{if_raised} ({type(error).__name__}: {first_line})"
    if fault:
        warnings.warn(f"{fault}: the plain path is used", stacklevel=3)
    return not fault


def _examples() -> dict[str, tuple]:
    """Whole numbers, so that sums are exact in any order."""
    values, rows = np.arange(1, 10, dtype=np.float32), np.arange(9, dtype=np.int32) % 4
    starts, table = np.array([1, 1, 4, 8], np.int32), np.arange(20, dtype=np.float32).reshape(4, 5)
    return {"segment_sum": (values, rows, starts, table), "row_dots": (table, rows, table, rows[::-1].copy())}


def _answers(platform: str, name: str, example: tuple) -> bool:
    """Whether a kernel gives what plain JAX gives; of a platform that is not here, whether it is lowered."""
    kernel, device = _compiled(platform, name, example), _device(platform)
    if device is None:
        return True
    with jax.default_device(device):
        return bool(np.array_equal(kernel(*example), getattr(plain, name)(*map(jnp.asarray, example))))


def _compiled(platform: str, name: str, operands: tuple) -> Any:
    """A kernel, compiled for such operands; of a platform that is not here it is only lowered."""
    kernel, device = jax.jit(getattr(_module(platform), name)), _device(platform)
    if device is None:
        return kernel.trace(*operands).lower(lowering_platforms=(platform,))
    with jax.default_device(device):
        return kernel.lower(*operands).compile()


def _device(platform: str) -> Any:
    """A device of the platform, or None."""
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


def _module(platform: str) -> ModuleType:
    return importlib.import_module(f"sae_jax.kernels.{KERNELS[platform]}")


def _chosen(platform: str, name: str, *operands: Array) -> Array:
    shapes = (jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands)
    return getattr(_module(platform) if compiles(platform, name, *shapes) else plain, name)(*operands)


def _step(name: str, result: Callable[..., ShapedArray]) -> Primitive:
    """A step of a program that waits with its choice of a kernel until it is lowered.

    `jax.lax.platform_dependent` would trace the kernels of every platform, and import Pallas on all.
    """
    step = Primitive(f"sparse_{name}")
    step.def_abstract_eval(result)
    step.def_impl(jax.jit(step.bind))
    mlir.register_lowering(step, mlir.lower_fun(getattr(plain, name), multiple_results=False))
    for platform in KERNELS:
        rule = mlir.lower_fun(partial(_chosen, platform, name), multiple_results=False)
        mlir.register_lowering(step, rule, platform=platform)
    return step


_segment_sum = _step(
    "segment_sum",
    lambda values, rows, starts, table: ShapedArray((starts.size - 1, table.shape[1]), table.dtype),
)
_row_dots = _step(
    "row_dots", lambda left, left_rows, right, right_rows: ShapedArray(left_rows.shape, jnp.float32)
)
