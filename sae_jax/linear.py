"""The affine maps that every architecture shares, and the matrix product: its form and its precision."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float
from optax import safe_norm

from sae_jax import sharding
from sae_jax.base import Params, require
from sae_jax.sparse import Encoded, Few, as_it_is

TINY = 4096
"""Multiply-adds up to which a product costs more to call than to compute, measured in docs/design.md."""

TURNED = 8
"""How many rows are turned at once."""


def matmul(
    a: Float[Array | np.ndarray, "*batch inner"] | Few, b: Float[Array | np.ndarray, "inner out"]
) -> Float[Array, "*batch out"]:
    """`a b`, to the `precision` that is set, by the form that is fastest for the size.

        c_bj = sum_i a_bi b_ij

    A thousand vmapped 4 -> 6 models on a CPU are a thousand library calls per product, each some hundred
    nanoseconds of overhead around a few dozen multiply-adds. Written as multiply and sum, XLA fuses all
    members into one vectorised loop, forward and backward. The choice is made while tracing, from shapes.

    Args:
      a: rows, under any leading axes.
      b: weights.

    Returns:
      The product, in the common dtype. The two forms differ by rounding only.
    """
    return _chosen.value(a, b)


def _product(a, b, precision: Precision | None = None) -> Array:
    if isinstance(a, Few):
        return a.times(b)
    if _is_tiny(a, b):
        return _fused(a, b)
    if _turns(a, b):
        return _turning_product(precision, a, b)
    return jnp.matmul(a, b, precision=precision)


def _is_tiny(a, b) -> bool:
    rows = math.prod(a.shape[:-1])
    # a number that is only a symbol, as in an exported program, is no int
    return isinstance(rows, int) and rows * b.size <= TINY


def _fused(a, b) -> Array:
    return (jnp.asarray(a)[..., None] * b).sum(axis=-2)


def _turns(a, b) -> bool:
    """Whether the gradient by `b` is taken from turned operands: where these come in whole stretches."""
    whole = all(isinstance(size, int) and size % TURNED == 0 for size in (*a.shape, *b.shape))
    return _in_reverse.value and a.ndim == 2 and whole and a.dtype == b.dtype and not sharding.in_force()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turning_product(
    precision: Precision | None, a: Float[Array, "rows inner"], b: Float[Array, "inner out"]
) -> Float[Array, "rows out"]:
    return jnp.matmul(a, b, precision=precision)


def _turning_forward(precision, a, b):
    return _turning_product(precision, a, b), (a, b)


def _turning_backward(precision, operands, c):
    """`dL/da = c b^T` and `dL/db = a^T c`, for c = dL/d(ab).

    XLA's CPU compiler has a fast product for many members side by side only where the left operand lies as it
    is read, so the narrower of a and c is turned.
    """
    a, b = operands
    product = partial(jnp.matmul, precision=precision)

    def on_a_cpu(a, c):
        return product(_turned(a), c) if a.shape[1] <= c.shape[1] else _turned(product(_turned(c), a))

    db = jax.lax.platform_dependent(a, c, cpu=on_a_cpu, default=lambda a, c: product(a.T, c))
    return product(c, b.T), db


_turning_product.defvjp(_turning_forward, _turning_backward)


def _turned(a: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """The transpose, written out: in a loop, because XLA would else hand it to the product unturned."""
    rows, columns = a.shape

    def some(i, turned):
        own = jax.lax.dynamic_slice(a, (i * TURNED, 0), (TURNED, columns))
        return jax.lax.dynamic_update_slice(turned, own.T, (0, i * TURNED))

    return jax.lax.fori_loop(0, rows // TURNED, some, jnp.zeros((columns, rows), a.dtype))


def _bfloat16_product(a, b) -> Array:
    """`a b` of rounded operands where these are float32; other dtypes keep what they have."""
    if isinstance(a, Few):
        return a.times(b, _rounded)
    if jnp.result_type(a, b) != jnp.float32:
        return _product(a, b)
    return _rounded_product(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


@jax.custom_vjp
def _rounded_product(a: Float[Array, "*batch inner"], b: Float[Array, "inner out"]) -> Array:
    a, b = _rounded(a), _rounded(b)
    if _is_tiny(a, b):
        return _fused(a, b)
    # on a CPU, XLA multiplies no bfloat16 to float32 in every place that a product can stand in
    exact = partial(jnp.matmul, precision=Precision.HIGHEST)
    return jax.lax.platform_dependent(a, b, cpu=exact, default=_bfloat16_units)


def _bfloat16_units(a, b) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.matmul(a, b, precision=Precision.DEFAULT, preferred_element_type=jnp.float32)


def _forward(a, b):
    return _rounded_product(a, b), (a, b)


def _backward(operands, c):
    """`dL/da = c b^T` and `dL/db = a^T c`, of rounded operands as well, for c = dL/d(ab)."""
    a, b = operands
    # not reshape(-1, ...), which a matrix without entries leaves open
    a_rows, c_rows = (array.reshape(math.prod(array.shape[:-1]), array.shape[-1]) for array in (a, c))
    return _rounded_product(c, b.T), _rounded_product(a_rows.T, c_rows)


_rounded_product.defvjp(_forward, _backward)


def _rounded(array: Float[Array, "*shape"]) -> Array:
    """The nearest bfloat16, left in float32: a conversion there and back XLA may leave out."""
    if array.dtype != jnp.float32:
        return array
    return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)


PRECISIONS: dict[str, Callable[..., Array]] = {
    "bfloat16": _bfloat16_product,
    "tensorfloat32": partial(_product, precision=Precision.HIGH),
    "highest": partial(_product, precision=Precision.HIGHEST),
}
"""How products are taken, by name."""

_in_reverse = jax.make_user_context(False)

# not JAX's own setting, which a CPU ignores and which on other devices would reach the data too
_chosen = jax.make_user_context(_product)


def precision(name: str) -> AbstractContextManager[None]:
    """How exactly the products of every SAE that is traced within are taken, forward and backward.

    `bfloat16` rounds both operands to 8 significant bits, on every device, and adds up in float32; weights,
    moments, biases, thresholds and losses stay float32. `tensorfloat32` lets a GPU round them to 11 bits, and
    a TPU take three passes of bfloat16. `highest` rounds nothing; on a CPU these two are the same.
    Outside, it is as `jax.default_matmul_precision` says. docs/precision.md tells what `bfloat16` costs.

    Args:
      name: a key of `PRECISIONS`.

    Returns:
      A context manager. It is part of what compiled programs are kept by.

    Raises:
      InputError: another name.

    Example:
      >>> with precision("bfloat16"):
      ...     state, history = run(step, state, source, steps=500)
    """
    require(name in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return _chosen(PRECISIONS[name])


def in_reverse() -> AbstractContextManager[None]:
    """Within, products have gradients by reverse mode alone, and on a CPU quicker ones (docs/performance.md).

    A training step is traced within; all else keeps both modes.

    Example:
      >>> with in_reverse():
      ...     gradients = jax.grad(loss)(params)
    """
    return _in_reverse(True)


def pre_activations(
    params: Params, x: Float[Array | np.ndarray, "*batch d_in"], apply_b_dec_to_input: bool
) -> Float[Array, "*batch d_sae"]:
    """What an encoder rectifies: `x W_enc + b_enc`, with `x - b_dec` in place of x where asked for.

    Args:
      params: `W_enc` (or `W_dec` alone, where the two are tied), `b_enc`, `b_dec`.
      x: activations.
      apply_b_dec_to_input: subtract the decoder's bias first (the pre-encoder bias).

    Returns:
      Pre-activations.
    """
    W_enc = params["W_enc"] if "W_enc" in params else params["W_dec"].T
    centred = x - params["b_dec"] if apply_b_dec_to_input else x
    return matmul(centred, W_enc) + params["b_enc"]


def remembered(
    params: Params, x: Float[Array | np.ndarray, "*batch d_in"], apply_b_dec_to_input: bool
) -> Encoded:
    """`pre_activations` for a loss of few of them: the gradient is led to the weights from those alone.

    Arguments: as `pre_activations`.
    """
    x = jnp.asarray(x)
    pre = pre_activations(jax.lax.stop_gradient(params), x, apply_b_dec_to_input)
    rounding = _rounded if _chosen.value is _bfloat16_product else as_it_is
    return Encoded(pre, params, x, apply_b_dec_to_input, rounding)


def decode(
    params: Params,
    f: Float[Array | np.ndarray, "*batch d_sae"] | Few,
    x: Float[Array | np.ndarray, "*batch d_in"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x_hat = f W_dec + b_dec`, plus `x W_skip` where there is a skip connection and `x` is given.

    Args:
      params: `W_dec`, `b_dec`, and of a skip transcoder `W_skip` [d_in, d_out].
      f: features.
      x: the input that `f` was encoded from; without it the skip connection is left out.

    Returns:
      Reconstructions.
    """
    x_hat = matmul(f, params["W_dec"]) + params["b_dec"]
    return x_hat if x is None or "W_skip" not in params else x_hat + matmul(x, params["W_skip"])


@overload
def to_decoder_units(params: Params, pre: Encoded) -> Encoded: ...
@overload
def to_decoder_units(params: Params, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]: ...
def to_decoder_units(
    params: Params, pre: Float[Array, "*batch d_sae"] | Encoded
) -> Float[Array, "*batch d_sae"] | Encoded:
    """`pre_i |W_dec_i|`: pre-activations by what they would add to the reconstruction."""
    return pre * safe_norm(params["W_dec"], 0.0, axis=-1)


@overload
def from_decoder_units(params: Params, f: Few) -> Few: ...
@overload
def from_decoder_units(params: Params, f: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]: ...
def from_decoder_units(
    params: Params, f: Float[Array, "*batch d_sae"] | Few
) -> Float[Array, "*batch d_sae"] | Few:
    """`f_i / |W_dec_i|`: what the decoder takes, back from decoder units; 0 for a row of zeros."""
    norm = safe_norm(params["W_dec"], 0.0, axis=-1)
    return f * jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
