"""Pictures of an SAE and of a sweep, each drawn on axes of yours or on a figure of its own."""

from sae_jax.report.figures.canvas import CATEGORIES, HUES, LABELS, save
from sae_jax.report.figures.latents import features_of, heat_map
from sae_jax.report.figures.seeds import found_distribution, stability, wilson
from sae_jax.report.figures.settings import by_setting
from sae_jax.report.figures.tradeoff import dead, frontier, frontier_png
from sae_jax.report.figures.training import curves, shrinkage

__all__ = [
    "CATEGORIES",
    "HUES",
    "LABELS",
    "by_setting",
    "curves",
    "dead",
    "features_of",
    "found_distribution",
    "frontier",
    "frontier_png",
    "heat_map",
    "save",
    "shrinkage",
    "stability",
    "wilson",
]
