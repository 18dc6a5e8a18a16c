"""The parity table: one row per variant that is held against PyTorch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from sae_jax.architectures import find
from sae_jax.base import InputError
from sae_jax.formats.seed_module import NAMES
from sae_jax.synthetic import seed_tokens
from sae_jax.transforms import unit_norm_decoder
from sae_jax.verify import reference
from sae_jax.verify.harness import Report, compare


class Case(NamedTuple):
    """One variant: how to build it here, and what differs there."""

    architecture: str
    arguments: dict[str, Any]
    module: Callable[..., Any]
    unit_norm: bool = False
    tokens: bool = False
    """On the seed's tokens in full batches, rather than on random rows."""
    learning_rate: float = 1e-3
    """At 1e-2 on random rows latents die and revive on the last bit, and float32 runs part by a tenth."""


FIELD = {"mean_features": False, "l1": 1e-2}

CASES: dict[str, Case] = {
    "relu, the seed's": Case("relu", {"l1": 0.1}, reference.relu_module, tokens=True, learning_rate=1e-2),
    "relu, random rows": Case("relu", {"l1": 0.1}, reference.relu_module),
    "relu, summed": Case("relu", FIELD, reference.relu_module),
    "relu, L1 by decoder norm": Case("relu", {**FIELD, "decoder_norm_l1": True}, reference.relu_module),
    "relu, pre-encoder bias": Case("relu", {**FIELD, "apply_b_dec_to_input": True}, reference.relu_module),
    "relu, tied": Case("relu", {**FIELD, "tied": True}, reference.relu_module),
    "relu, unit-norm decoder": Case("relu", FIELD, reference.relu_module, unit_norm=True),
}


def verify(steps: int = 500) -> Iterator[tuple[str, Report]]:
    """Compare every case with its PyTorch module, in float64 and float32.

    Args:
      steps: Adam steps.

    Yields:
      Case name and `Report`, as each is done.

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError("verification needs PyTorch: pip install 'sae-jax[torch]'") from None
    for name, case in CASES.items():
        batches = seed_tokens().x[None] if case.tokens else _random_batches()
        arguments = {"d_in": batches.shape[-1], "d_sae": 6 if case.tokens else 64, **case.arguments}
        sae = find(case.architecture)(**arguments)
        constraint = [unit_norm_decoder()] if case.unit_norm else []
        params = sae.init(jax.random.key(0))
        for dtype in ("float64", "float32"):
            yield (
                name,
                compare(
                    sae,
                    optax.chain(optax.adam(case.learning_rate), *constraint),
                    params,
                    module=case.module(**arguments),
                    names={ours: theirs for ours, theirs in NAMES.items() if ours in params},
                    observe=lambda module, x: module(x),
                    torch_optimizer=partial(torch.optim.Adam, lr=case.learning_rate),
                    batches=batches,
                    steps=steps,
                    dtype=dtype,
                    after_step=reference.unit_norm_columns if case.unit_norm else None,
                ),
            )


def _random_batches() -> np.ndarray:
    # more than one batch, and one in which the products are past `linear.TINY`
    return np.random.default_rng(0).normal(size=(7, 128, 32))
