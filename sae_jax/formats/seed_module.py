"""The seed's PyTorch module: a state dict of two `nn.Linear` layers, weights [out, in].

`encoder.0.weight` [d_sae, d_in], `encoder.0.bias` [d_sae], `decoder.0.weight` [d_in, d_sae],
`decoder.0.bias` [d_in].
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sae_jax.architectures import find
from sae_jax.base import SAE, InputError, Params, require

NAMES = {
    "W_enc": "encoder.0.weight.T",
    "b_enc": "encoder.0.bias",
    "W_dec": "decoder.0.weight.T",
    "b_dec": "decoder.0.bias",
}
"""Our names to the module's; `.T` says that the tensor is transposed there."""


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The seed's state dict, as numpy arrays.

    Args:
      params: of an untied `relu`.

    Example:
      >>> module.load_state_dict({k: torch.tensor(v) for k, v in to_state_dict(params).items()})
    """
    require(
        set(params) == set(NAMES),
        f"the seed's module has exactly {', '.join(NAMES)}, got {', '.join(params)}",
    )
    return {
        theirs.removesuffix(".T"): np.ascontiguousarray(
            np.asarray(params[ours]).T if theirs.endswith(".T") else np.asarray(params[ours])
        )
        for ours, theirs in NAMES.items()
    }


def from_state_dict(state: Mapping[str, np.ndarray]) -> tuple[SAE, Params]:
    """The SAE that a state dict of the seed's module holds.

    Args:
      state: arrays, or anything numpy takes, by the module's names.

    Returns:
      A `relu` with the seed's conventions, and its weights.

    Raises:
      InputError: a tensor missing, or shapes that do not fit one another.
    """
    params = {}
    for ours, theirs in NAMES.items():
        name = theirs.removesuffix(".T")
        require(
            name in state, f"the state dict has no {name}; it has: {', '.join(map(str, state)) or 'nothing'}"
        )
        array = np.asarray(state[name])
        require(array.dtype.kind == "f", f"{name} must be floating point, got {array.dtype}")
        params[ours] = jnp.asarray(array.T if theirs.endswith(".T") else array)
    shapes = {name: leaf.shape for name, leaf in params.items()}
    require(params["W_enc"].ndim == 2, f"encoder.0.weight must be [d_sae, d_in], got {shapes['W_enc'][::-1]}")
    d_in, d_sae = shapes["W_enc"]
    fit = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    require(shapes == fit, f"the state dict's tensors do not fit one another: {shapes}")
    return find("relu")(d_in, d_sae), params


def recognise(path: Path) -> bool:
    """Whether this is a PyTorch file."""
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path: str | Path) -> tuple[SAE, Params]:
    """Read a `.pt` file of the seed's module. Needs torch; nothing but tensors is unpickled.

    Raises:
      InputError: torch missing, a file that is damaged or holds code, or another module's tensors.
    """
    torch = _torch()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in str(error):
            reason = "it holds more than tensors, which is not loaded because it can run code"
        raise InputError(f"{path} cannot be read as a PyTorch state dict: {reason}") from None
    tensors = isinstance(state, Mapping) and all(isinstance(leaf, torch.Tensor) for leaf in state.values())
    require(tensors, f"{path} must hold a state dict of tensors, got {type(state).__name__}")
    # numpy has no bfloat16; float32 holds each of its values
    widened = {name: leaf.float() if leaf.dtype == torch.bfloat16 else leaf for name, leaf in state.items()}
    return from_state_dict({name: leaf.detach().numpy() for name, leaf in widened.items()})


def write(path: str | Path, params: Params) -> None:
    """Write a `.pt` file that the seed's module loads. Needs torch."""
    torch = _torch()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in to_state_dict(params).items()}, path)


def _torch():
    try:
        import torch
    except ImportError:
        raise InputError("a .pt file needs PyTorch: pip install 'sae-jax[torch]'") from None
    return torch
