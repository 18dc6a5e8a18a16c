"""What a person looks at: figures, the page of a sweep, and the page of a port."""

from sae_jax.report import figures
from sae_jax.report.page import sweep_page
from sae_jax.report.port import port_page

__all__ = ["figures", "port_page", "sweep_page"]
