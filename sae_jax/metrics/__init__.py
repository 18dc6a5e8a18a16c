"""What an SAE does to data and to a language model, and what it finds of features that are known.

Each figure has one definition.
"""

from sae_jax.metrics.downstream import downstream, mean_activation
from sae_jax.metrics.matching import cosines, mcc, mmcs, mmcs_learned, uniqueness
from sae_jax.metrics.reconstruction import DENSITY_BINS, Sums, by_source, evaluate, measure, stream
from sae_jax.metrics.recovery import recover, recovered_by
from sae_jax.metrics.stability import Stability, StableAndTrue, stability, stable_and_true
from sae_jax.metrics.superposition import dimensions_per_feature, feature_dimensionality

__all__ = [
    "DENSITY_BINS",
    "Stability",
    "StableAndTrue",
    "Sums",
    "by_source",
    "cosines",
    "dimensions_per_feature",
    "downstream",
    "evaluate",
    "feature_dimensionality",
    "mcc",
    "mean_activation",
    "measure",
    "mmcs",
    "mmcs_learned",
    "recover",
    "recovered_by",
    "stability",
    "stable_and_true",
    "stream",
    "uniqueness",
]
