"""Weight formats, one file each, and the one place that knows them all."""

from pathlib import Path

from sae_jax.base import SAE, InputError, Params, require
from sae_jax.formats import saelens, seed_module

readers = {
    "SAELens folder (cfg.json, sae_weights.safetensors)": (saelens.recognise, saelens.read),
    "the seed's PyTorch state dict (.pt or .pth)": (seed_module.recognise, seed_module.read),
}


def read(path: str | Path) -> tuple[SAE, Params]:
    """Read an SAE from disk, whichever of the known formats it is in.

    Args:
      path: a folder or file.

    Returns:
      The SAE and its weights.

    Raises:
      InputError: nothing there, no known format, or a damaged file.
    """
    path = Path(path)
    require(path.exists(), f"{path} does not exist")
    for recognise, reader in readers.values():
        if recognise(path):
            return reader(path)
    raise InputError(f"{path} is in no format known here; looked for: {'; '.join(readers)}")


__all__ = ["read", "readers", "saelens", "seed_module"]
