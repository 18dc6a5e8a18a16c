"""Where batches come from."""

from sae_jax.data.arrays import as_float32, checked, read_array
from sae_jax.data.source import InMemory, Source, in_memory

__all__ = ["InMemory", "Source", "as_float32", "checked", "in_memory", "read_array"]
