"""Language models: texts to contexts, and the activations of models in torch and in flax."""

from sae_jax.language_models import nnx_capture, torch_hooks
from sae_jax.language_models.site import Site
from sae_jax.language_models.text import PADDING, Contexts, contexts, from_tokens, read_texts
from sae_jax.language_models.unembedding import unembedding
from sae_jax.language_models.words import words

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
