"""What a device can do: kinds by their data sheets, this machine by measuring."""

import math
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import psutil

from sae_jax.base import require

SECONDS_WORTH_TIMING = 0.01
SECONDS_FOR_A_BEST = 0.5
SIDES = (512, 1024, 2048, 4096, 8192)
"""Of square matrices, until a product is long enough to be timed."""


class Device(NamedTuple):
    """One device, by the figures that limit a training step."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second between the device and its memory."""
    bfloat16: float
    """FLOP/s of matrix products whose factors are rounded to bfloat16; and so on for the next three."""
    tensorfloat32: float
    highest: float
    """Of float32 arrays, nothing rounded."""
    float64: float
    """0 where the device has no such arithmetic."""
    usual: float
    """Of float32 arrays as JAX multiplies them unless told otherwise."""

    def rate(self, dtype=jnp.float32, precision: str | None = None) -> float:
        """FLOP/s of a matrix product.

        Args:
          dtype: of the arrays.
          precision: what float32 arrays are rounded to, a key of `linear.PRECISIONS`; None for the usual.

        Raises:
          InputError: the device has no such arithmetic.
        """
        rate = getattr(self, _kind(dtype, precision))
        require(rate > 0, f"{self.name} has no matrix products in {jnp.dtype(dtype).name}")
        return rate


def _kind(dtype, precision: str | None) -> str:
    name = jnp.dtype(dtype).name
    return (precision or "usual") if name == "float32" else name


def _nvidia(name: str, memory: float, bandwidth: float, *rates: float) -> Device:
    return Device(name, memory, bandwidth, *rates, usual=rates[1])


def _tpu(name: str, memory: float, bandwidth: float, bfloat16: float) -> Device:
    """JAX takes one pass in bfloat16 for a product of float32 arrays, for `high` three, for `highest` six."""
    return Device(name, memory, bandwidth, bfloat16, bfloat16 / 3, bfloat16 / 6, 0.0, usual=bfloat16)


# Dense figures: those that a sheet tells "with sparsity" are halved. Memory in the units of the sheet.
KINDS = {
    kind.name: kind
    for kind in (
        # NVIDIA H100 Tensor Core GPU data sheet, and the white paper of the architecture for the digits
        _nvidia("h100-sxm", 80e9, 3.35e12, 989.4e12, 494.7e12, 66.9e12, 66.9e12),
        _nvidia("h100-pcie", 80e9, 2.0e12, 756e12, 378e12, 51.2e12, 51.2e12),
        # NVIDIA H200 Tensor Core GPU data sheet, the SXM form
        _nvidia("h200", 141e9, 4.8e12, 989.4e12, 494.7e12, 66.9e12, 66.9e12),
        # NVIDIA A100 Tensor Core GPU data sheet, the SXM form
        _nvidia("a100-40", 40e9, 1.555e12, 312e12, 156e12, 19.5e12, 19.5e12),
        _nvidia("a100-80", 80e9, 2.039e12, 312e12, 156e12, 19.5e12, 19.5e12),
        # NVIDIA L4 Tensor Core GPU data sheet; float64 by the Ada white paper, 1/64 of float32
        _nvidia("l4", 24e9, 300e9, 121e12, 60e12, 30.3e12, 0.473e12),
        # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090; bfloat16 with float32 sums
        _nvidia("rtx-4090", 24e9, 1.008e12, 165.2e12, 82.6e12, 82.6e12, 1.29e12),
        # docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, per chip; float32 by the passes that it takes
        _tpu("tpu-v4", 32 * 2**30, 1.2e12, 275e12),
        _tpu("tpu-v5e", 16e9, 819e9, 197e12),
        _tpu("tpu-v5p", 95e9, 2.765e12, 459e12),
        _tpu("tpu-v6e", 32e9, 1.638e12, 918e12),
    )
}
HERE = "here"


def device(name: str, dtype=jnp.float32, precision: str | None = None) -> Device:
    """A known kind by its name, or `here`: this machine's first device, measured.

    Args:
      name: a key of `KINDS`, or `here`.
      dtype, precision: which products are measured here; the rates of others are left at 0.

    Returns:
      A `Device`; the memory of `here` is what is free.

    Raises:
      InputError: no such kind.

    Example:
      >>> device("h100-sxm").memory
      80000000000.0
    """
    if name == HERE:
        unmeasured = Device(HERE, free_memory(), bandwidth(), 0.0, 0.0, 0.0, 0.0, 0.0)
        return unmeasured._replace(**{_kind(dtype, precision): peak(dtype, precision)})
    require(name in KINDS, f"there is no device {name!r}; there are: {HERE}, {', '.join(KINDS)}")
    return KINDS[name]


def free_memory() -> int:
    """Bytes that the first device still has."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


QUICK_ON_A_CPU = 40e6
"""Bytes; found on one machine, with 32 MB of shared cache, and not asked of the processor."""


def quick_memory() -> float:
    """Bytes that lie nearer to the first device than the rest: of a CPU a cache's worth, elsewhere no bound.

    A CPU goes over members side by side again and again in a step. At 64 -> 256 and 256 rows a member takes
    2.4 MB, and 64 at once take 1.4 times as long each as 16 (docs/performance.md).
    """
    return QUICK_ON_A_CPU if jax.default_backend() == "cpu" else math.inf


def peak(dtype=jnp.float32, precision: str | None = None) -> float:
    """FLOP/s of this machine's first device in a matrix product: 2 n^3 FLOPs, the best of a few.

    Args:
      dtype: of both factors.
      precision: what float32 factors are rounded to, a key of `linear.PRECISIONS`; None for JAX's default of
        the moment.

    Returns:
      FLOP/s; measured in about a second at the first call of the process, and kept.

    Example:
      >>> training_flops(params, 1024) * steps_per_second / peak()  # share of the peak
    """
    usual = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009, no attribute to a type checker
    return _peak(jnp.dtype(dtype).name, precision or str(usual))


ROUNDED = {"highest": jax.lax.Precision.HIGHEST, "tensorfloat32": jax.lax.Precision.HIGH}


@lru_cache
def _peak(dtype: str, precision: str) -> float:
    dtype = precision if (dtype, precision) == ("float32", "bfloat16") else dtype
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=ROUNDED.get(precision)))

    def seconds(size: int, tries: int) -> float:
        return _best(partial(multiply, jnp.full((size, size), 1 / size, dtype)), tries)

    size = next((size for size in SIDES[:-1] if seconds(size, tries=2) > SECONDS_WORTH_TIMING), SIDES[-1])
    return 2 * size**3 / seconds(size, tries=20)


@lru_cache
def bandwidth() -> float:
    """Bytes per second between this machine's first device and its memory: read and written, best of a few.

    Returns:
      Bytes/s; measured in under a second at the first call of the process, and kept.
    """
    # in place, because memory that is touched for the first time is slow
    add = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x), donate_argnums=0)
    x = jnp.zeros(2**24, jnp.float32)
    jax.block_until_ready(x)
    best, times = math.inf, 1
    for _ in range(8):
        began = time.monotonic()
        x = jax.block_until_ready(add(x, times))
        seconds = time.monotonic() - began
        best = min(best, seconds / times)
        times = times * 2 if seconds < SECONDS_WORTH_TIMING else times
    return 2 * x.nbytes / best


def _best(call: Callable[[], object], tries: int) -> float:
    """Seconds of the quickest of so many calls, or of as many as half a second allows; one more compiles."""
    jax.block_until_ready(call())
    best, start = math.inf, time.monotonic()
    for _ in range(tries):
        began = time.monotonic()
        jax.block_until_ready(call())
        best = min(best, time.monotonic() - began)
        if time.monotonic() - start > SECONDS_FOR_A_BEST:
            break
    return best
