"""Proof against PyTorch: independent modules of the same models, and the harness that compares."""

from sae_jax.verify.cases import CASES, Case, verify
from sae_jax.verify.harness import BOUNDS, Report, compare

__all__ = ["BOUNDS", "CASES", "Case", "Report", "compare", "verify"]
