"""Where batches come from."""

from sae_jax.data.arrays import as_float32, checked, read_array
from sae_jax.data.rows import Rows, open_rows, side_by_side
from sae_jax.data.source import InMemory, Source, batch_shape, in_memory, on_mesh, stages
from sae_jax.data.store import Store, is_store, open_store
from sae_jax.data.stored import Stored, stored

__all__ = [
    "InMemory",
    "Rows",
    "Source",
    "Store",
    "Stored",
    "as_float32",
    "batch_shape",
    "checked",
    "in_memory",
    "is_store",
    "on_mesh",
    "open_rows",
    "open_store",
    "read_array",
    "side_by_side",
    "stages",
    "stored",
]
