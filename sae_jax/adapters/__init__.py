"""A trained SAE outside of this package: as an object of another framework, or as programs to serve."""

from sae_jax.adapters.nnx_module import SAEModule
from sae_jax.adapters.saelens_object import export_saelens
from sae_jax.adapters.serving import export_functions
from sae_jax.adapters.torch_module import to_torch

__all__ = ["SAEModule", "export_functions", "export_saelens", "to_torch"]
