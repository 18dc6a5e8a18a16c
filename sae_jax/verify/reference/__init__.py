"""The same models written in PyTorch, with no line in common with those here.

Each takes the plain arguments that `architectures.describe` writes: functions go by their names.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_jax.verify.reference.crosscoder import crosscoder
from sae_jax.verify.reference.gated import gated
from sae_jax.verify.reference.jumprelu import jumprelu
from sae_jax.verify.reference.relu import relu
from sae_jax.verify.reference.topk import batch_topk, topk

if TYPE_CHECKING:
    import torch


def matryoshka(d_in: int, d_sae: int, of: str = "batch_topk", **arguments: Any) -> "torch.nn.Module":
    """A module that reconstructs by prefixes of its latents; arguments as in `sae_jax.matryoshka`."""
    return MODULES[of](d_in, d_sae, **arguments)


def transcoder(d_in: int, d_sae: int, of: str = "relu", **arguments: Any) -> "torch.nn.Module":
    """A module whose target is not its input; arguments as in `sae_jax.transcoder`."""
    return MODULES[of](d_in, d_sae, **{**arguments, "apply_b_dec_to_input": False})


MODULES: "dict[str, Callable[..., torch.nn.Module]]" = {
    "relu": relu,
    "topk": topk,
    "batch_topk": batch_topk,
    "jumprelu": jumprelu,
    "gated": gated,
    "matryoshka": matryoshka,
    "transcoder": transcoder,
    "crosscoder": crosscoder,
}

LAYERS = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight.T",
    "b_dec": "decoder.bias",
    "W_skip": "skip.weight.T",
}


def names(architecture: str, params: dict[str, Any]) -> dict[str, str]:
    """Our names to the module's, for `compare`."""
    layers: dict[str, str] = {} if architecture == "crosscoder" else LAYERS
    return {name: layers.get(name, name) for name in params}


# What is done to a module between `backward` and `step`, or after it


def unit_norm_columns(module: "torch.nn.Module") -> None:
    """Bring each latent's decoder column to norm 1, in place."""
    import torch

    weight = module.get_parameter("decoder.weight")
    weight.copy_(torch.nn.functional.normalize(weight, dim=0))


def remove_parallel_gradient(module: "torch.nn.Module") -> None:
    """Take out of each decoder column's gradient what points along the column (dictionary_learning's)."""
    import torch

    weight = module.get_parameter("decoder.weight")
    gradient = weight.grad
    assert gradient is not None
    direction = weight / (weight.norm(dim=0, keepdim=True) + 1e-6)
    gradient.sub_(direction * torch.einsum("di,di->i", gradient, direction))


def clip_gradients(module: "torch.nn.Module") -> None:
    """Bring the norm of all gradients together down to 1."""
    import torch

    torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm=1.0)


def keep_thresholds_positive(module: "torch.nn.Module") -> None:
    """Cut thresholds at 0."""
    module.get_parameter("threshold").clamp_(min=0)


def start_silent(module: "torch.nn.Module", since_fired: np.ndarray) -> None:
    """Start with latents that have been silent for so many steps, where the module looks at it."""
    import torch

    buffers = dict(module.named_buffers())
    if "since_fired" in buffers:
        buffers["since_fired"].copy_(torch.as_tensor(since_fired))
