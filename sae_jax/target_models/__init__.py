"""Small networks to look into, trained as SAEs are: one pure step, vmapped over worlds and restarts."""

from sae_jax.target_models.circuit import Circuit, Edge, Node, circuit
from sae_jax.target_models.fit import Fitted, Stacked, fit, stacked
from sae_jax.target_models.perceptron import Perceptron, cross_entropy
from sae_jax.target_models.superposition import Features, Superposition, importance_weighted, superposed
from sae_jax.target_models.tasks import Task, agreement, mixed_factors

__all__ = [
    "Circuit",
    "Edge",
    "Features",
    "Fitted",
    "Node",
    "Perceptron",
    "Stacked",
    "Superposition",
    "Task",
    "agreement",
    "circuit",
    "cross_entropy",
    "fit",
    "importance_weighted",
    "mixed_factors",
    "stacked",
    "superposed",
]
