"""What a person looks at: figures, the page of a sweep, the dashboard of features, and the page of a port."""

from sae_jax.report import figures
from sae_jax.report.dashboard import write_dashboard
from sae_jax.report.page import sweep_page
from sae_jax.report.port import port_page
from sae_jax.report.renewal import renew

__all__ = ["figures", "port_page", "renew", "sweep_page", "write_dashboard"]
