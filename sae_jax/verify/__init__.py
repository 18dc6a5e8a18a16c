"""Proof against PyTorch: independent modules of the same models, the other libraries, and the harness."""

from collections.abc import Callable, Iterator

from sae_jax.verify import against_dictionary_learning, against_saelens
from sae_jax.verify.cases import CASES, Case, verify
from sae_jax.verify.harness import BOUNDS, Report, compare

AGAINST: dict[str, Callable[..., Iterator[tuple[str, Report]]]] = {
    "sae_lens": against_saelens.against_saelens,
    "dictionary_learning": against_dictionary_learning.against_dictionary_learning,
}
"""The libraries whose real trainers our recipes are held against: `AGAINST["sae_lens"](steps=100)`."""

__all__ = ["AGAINST", "BOUNDS", "CASES", "Case", "Report", "compare", "verify"]
