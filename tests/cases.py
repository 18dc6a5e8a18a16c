"""Every architecture and variant, one row each; test_contract.py runs every promise on every row."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import optax

import sae_jax
from sae_jax import SAE


class Case(NamedTuple):
    """A model and its optimizer. One object each: compiled programs are kept by identity."""

    name: str
    factory: Callable[..., SAE]
    """Takes `l1`."""
    optimizer: Callable[..., optax.GradientTransformation]
    """Takes `learning_rate`."""


def adam(learning_rate) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


def unit_norm_adam(learning_rate) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate), sae_jax.transforms.unit_norm_decoder())


def field_adam(learning_rate) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(
        clip, optax.adam(learning_rate, b1=0.0, b2=0.99), sae_jax.transforms.unit_norm_decoder()
    )


small_relu = partial(sae_jax.relu, d_in=5, d_sae=7)

CASES = [
    Case("relu", partial(sae_jax.relu, d_in=5, d_sae=6), adam),
    Case("relu-sum-over-features", partial(small_relu, mean_features=False), adam),
    Case("relu-decoder-norm-l1", partial(small_relu, decoder_norm_l1=True), adam),
    Case("relu-apply-b-dec", partial(small_relu, apply_b_dec_to_input=True), adam),
    Case("relu-tied", partial(small_relu, tied=True), adam),
    Case("relu-unit-norm", partial(small_relu), unit_norm_adam),
    Case(
        "relu-everything",
        partial(small_relu, mean_features=False, decoder_norm_l1=True, apply_b_dec_to_input=True, tied=True),
        field_adam,
    ),
]
