"""What the features of an SAE answer to: one pass over activations, and what the weights tell."""

from sae_jax.features import circuit_tracer, labelling, neuronpedia
from sae_jax.features.circuit import Circuit, circuit
from sae_jax.features.contexts import Context, contexts
from sae_jax.features.keeping import Options
from sae_jax.features.look import Told, look
from sae_jax.features.observe import Words, observe
from sae_jax.features.observed import NONE, Examples, Near, Observed, Passages, Seen, Weighed
from sae_jax.features.reading import Reading, first, in_memory, of_rows, of_store
from sae_jax.features.together import fires_with
from sae_jax.features.weigh import weigh

__all__ = [
    "NONE",
    "Circuit",
    "Context",
    "Examples",
    "Near",
    "Observed",
    "Options",
    "Passages",
    "Reading",
    "Seen",
    "Told",
    "Weighed",
    "Words",
    "circuit",
    "circuit_tracer",
    "contexts",
    "fires_with",
    "first",
    "in_memory",
    "labelling",
    "look",
    "neuronpedia",
    "observe",
    "of_rows",
    "of_store",
    "weigh",
]
