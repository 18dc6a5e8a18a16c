"""Where batches come from."""

from sae_jax.data.arrays import checked, read_array
from sae_jax.data.source import InMemory, Source, in_memory

__all__ = ["InMemory", "Source", "checked", "in_memory", "read_array"]
