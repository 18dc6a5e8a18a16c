"""A trained SAE outside of this package: as an object of another framework, or as programs to serve."""

from typing import TYPE_CHECKING, Any

from sae_jax.adapters.saelens_object import export_saelens
from sae_jax.adapters.serving import export_functions
from sae_jax.adapters.torch_module import to_torch

if TYPE_CHECKING:
    from sae_jax.adapters.nnx_module import SAEModule

__all__ = ["SAEModule", "export_functions", "export_saelens", "to_torch"]


def __getattr__(name: str) -> Any:
    """`SAEModule`, imported when it is asked for: it needs nnx, and nnx takes .15 s to import."""
    if name != "SAEModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sae_jax.adapters.nnx_module import SAEModule

    return SAEModule
