"""The interactive figures of a sweep's page, as plain plotly dictionaries ready for JSON."""

from sae_jax.report.plots.latents import density, features
from sae_jax.report.plots.seeds import stability
from sae_jax.report.plots.settings import axes, settings
from sae_jax.report.plots.tradeoff import dead, frontier
from sae_jax.report.plots.training import curves
from sae_jax.report.plots.words import Plot

__all__ = [
    "Plot",
    "axes",
    "curves",
    "dead",
    "density",
    "features",
    "frontier",
    "settings",
    "stability",
]
