"""What a person looks at: figures, and the page of a sweep."""

from sae_jax.report import figures
from sae_jax.report.page import sweep_page

__all__ = ["figures", "sweep_page"]
