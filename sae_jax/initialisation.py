"""Where training starts: draws of weights, and what is taken from data."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sae_jax.base import SAE, Params, require


def linear_layers(key: Key[Array, ""], d_in: int, d_sae: int, dtype=jnp.float32) -> Params:
    """`W_enc`, `b_enc`, `W_dec`, `b_dec` as two `torch.nn.Linear` layers are drawn: U(+-1/sqrt(fan_in)).

    In one draw, because each further one takes a third of a second to compile.
    """
    draws = jax.random.uniform(key, ((d_in + 1) * d_sae + (d_sae + 1) * d_in,), dtype, -1, 1)
    encoder, decoder = jnp.split(draws, [(d_in + 1) * d_sae])
    encoder = encoder.reshape(d_in + 1, d_sae) * d_in**-0.5
    decoder = decoder.reshape(d_sae + 1, d_in) * d_sae**-0.5
    return {"W_enc": encoder[:-1], "b_enc": encoder[-1], "W_dec": decoder[:-1], "b_dec": decoder[-1]}


def tied_rows(
    key: Key[Array, ""], d_in: int, d_sae: int, norm: float, dtype=jnp.float32, gaussian: bool = False
) -> Params:
    """Decoder rows of one norm, the encoder their transpose, biases 0.

    Args:
      key: of the draw.
      d_in, d_sae: sizes.
      norm: of every decoder row.
      dtype: of the weights.
      gaussian: draw each entry from a normal distribution, not a uniform one, before the rows are scaled
        (dictionary_learning's standard and gated); rows are then spread evenly over directions.

    Source: Gao et al. 2024, section 2.1 (unit rows); Anthropic, Circuits Updates April 2024 (norm 0.1).
    """
    shape = (d_sae, d_in)
    draw = jax.random.normal if gaussian else partial(jax.random.uniform, minval=-1, maxval=1)
    W_dec = scaled_rows(draw(key, shape, dtype), norm)
    return {
        "W_enc": W_dec.T,
        "b_enc": jnp.zeros(d_sae, dtype),
        "W_dec": W_dec,
        "b_dec": jnp.zeros(d_in, dtype),
    }


def scaled_rows(rows: Float[Array, "*rows d"], norm: float) -> Float[Array, "*rows d"]:
    """Each row at that norm."""
    return rows * (norm / jnp.linalg.norm(rows, axis=-1, keepdims=True))


Change = Callable[[Params, Key[Array, ""]], Params]
"""`(params as drawn, key) -> params to start from`."""


def starting(factory: Callable[..., SAE], *changes: Change) -> Callable[..., SAE]:
    """A factory whose SAEs start elsewhere, and are otherwise the same.

    Args:
      factory: of any architecture, bound or not.
      changes: applied in order to what `init` draws.

    Returns:
      A factory that takes what `factory` takes.

    Example:
      >>> factory = starting(partial(topk, 64, 256, k=8), b_dec_at(geometric_median(x)))
    """

    def build(*arguments: Any, **keywords: Any) -> SAE:
        sae = factory(*arguments, **keywords)

        def init(key, dtype=jnp.float32):
            drawn = params = sae.init(key, dtype)
            for change in changes:
                params = change(params, key)
            for name, leaf in params.items():
                fits = name in drawn and jnp.shape(leaf) == drawn[name].shape
                require(fits, f"{name} cannot start as {jnp.shape(leaf)}: this SAE draws {_shapes(drawn)}")
            return {name: jnp.asarray(leaf, drawn[name].dtype) for name, leaf in params.items()}

        return replace(sae, init=init)

    build.__signature__ = inspect.signature(factory)  # pyright: ignore[reportFunctionMemberAccess]
    return build


def _shapes(params: Params) -> str:
    return ", ".join(f"{name} {leaf.shape}" for name, leaf in params.items())


def b_dec_at(point: Float[Array | np.ndarray, "d"]) -> Change:
    """Start `b_dec` at a point of the data: its mean, or its `geometric_median`."""
    return lambda params, key: {**params, "b_dec": jnp.asarray(point)}


def rows_at(norm: float, gaussian: bool = False) -> Change:
    """Draw the weights again by `tied_rows`, `b_dec` at 0; leaves that it does not draw stay."""

    def change(params, key):
        encoder, decoder = params.get("W_enc", params["W_dec"].T).shape, params["W_dec"].shape
        fits = len(decoder) == 2 and encoder == decoder[::-1]
        require(fits, f"rows_at draws tied rows, but W_enc is {encoder} and W_dec {decoder}")
        d_sae, d_in = decoder
        drawn = tied_rows(key, d_in, d_sae, norm, params["W_dec"].dtype, gaussian)
        return {**params, **{name: leaf for name, leaf in drawn.items() if name in params}}

    return change


def geometric_median(
    x: Float[Array | np.ndarray, "n d"], iterations: int = 100, tolerance: float = 1e-5
) -> Float[Array, "d"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration from their mean.

        w_i = 1 / |x_i - m|;   m <- sum_i w_i x_i / sum_i w_i,   until m moves less than `tolerance`

    Outliers, such as the activations on a first token, pull it less than the mean.

    Args:
      x: rows; a few ten thousand are plenty.
      iterations: at most so many.
      tolerance: in the unit of `x`.

    Returns:
      The median [d].

    Raises:
      InputError: no rows.

    Example:
      >>> factory = starting(factory, b_dec_at(geometric_median(x[:32_768])))

    Source: Bricken et al. 2023; Gao et al. 2024, appendix A.1.
    """
    require(len(x) > 0, "the geometric median of no rows is not defined")
    x = jnp.asarray(x)

    def going_on(state):
        i, median, before = state
        return (i < iterations) & ((i == 0) | (jnp.linalg.norm(median - before) >= tolerance))

    def closer(state):
        i, median, _ = state
        distance = jnp.linalg.norm(x - median, axis=-1)
        # a row at the median itself has no direction to pull in
        weights = jnp.where(distance > 0, 1 / jnp.where(distance > 0, distance, 1), 0)
        weights = weights / jnp.maximum(weights.sum(), jnp.finfo(x.dtype).tiny)
        step = (weights[:, None] * x).sum(axis=0)
        return i + 1, jnp.where(weights.sum() > 0, step, median), median

    mean = x.mean(axis=0)
    return jax.lax.while_loop(going_on, closer, (0, mean, jnp.zeros_like(mean)))[1]
