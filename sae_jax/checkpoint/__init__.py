"""Checkpoints of a run, and the request that they were made for."""

from sae_jax.checkpoint.checkpoints import Checkpoints
from sae_jax.checkpoint.places import place
from sae_jax.checkpoint.requests import claim, require_same

__all__ = ["Checkpoints", "claim", "place", "require_same"]
