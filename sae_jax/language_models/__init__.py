"""Language models: texts to contexts, and the activations of models in torch and in flax."""

import importlib
from typing import TYPE_CHECKING, Any

from sae_jax.language_models import torch_hooks
from sae_jax.language_models.site import Site
from sae_jax.language_models.text import PADDING, Contexts, contexts, from_tokens, read_texts
from sae_jax.language_models.unembedding import unembedding
from sae_jax.language_models.words import words

if TYPE_CHECKING:
    from sae_jax.language_models import nnx_capture

__all__ = [
    "PADDING",
    "Contexts",
    "Site",
    "contexts",
    "from_tokens",
    "nnx_capture",
    "read_texts",
    "torch_hooks",
    "unembedding",
    "words",
]


def __getattr__(name: str) -> Any:
    """`nnx_capture`, imported when it is asked for: nnx takes .15 s to import."""
    if name != "nnx_capture":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("sae_jax.language_models.nnx_capture")
