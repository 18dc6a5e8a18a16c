"""The seed's PyTorch module: a state dict of two `nn.Linear` layers, weights [out, in].

`encoder.0.weight` [d_sae, d_in], `encoder.0.bias` [d_sae], `decoder.0.weight` [d_in, d_sae],
`decoder.0.bias` [d_in].
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from sae_jax.architectures import find
from sae_jax.base import SAE, Params, require
from sae_jax.folds import fold_b_dec, jumprelu_as_relu, kind
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, keys
from sae_jax.layer_norm import is_layer_normed

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
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        require(floats, f"{name} must be floating point, got {array.dtype}")
        params[ours] = array.T if theirs.endswith(".T") else array
    shapes = {name: leaf.shape for name, leaf in params.items()}
    require(params["W_enc"].ndim == 2, f"encoder.0.weight must be [d_sae, d_in], got {shapes['W_enc'][::-1]}")
    d_in, d_sae = shapes["W_enc"]
    fit = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    require(shapes == fit, f"the state dict's tensors do not fit one another: {shapes}")
    return find("relu")(d_in, d_sae), params


def recognise(place: Place) -> bool:
    """Whether this is a PyTorch file of such a module."""
    names = place.ending(".pt", ".pth")
    return len(names) == 1 and "encoder.0.weight" in keys(place, names[0])


def read(place: Place) -> Loaded:
    """A `.pt` file of the seed's module."""
    return Loaded(*from_state_dict(place.torch(place.ending(".pt", ".pth")[0])), {})


def form(loaded: Loaded) -> Form:
    """A `relu` as the seed's state dict."""
    sae, params = loaded.sae, loaded.params
    if kind(sae) == "jumprelu":
        sae, params = jumprelu_as_relu(sae, params)
    fits = kind(sae) == "relu" and "d_out" not in sae.config
    require(fits, "the seed's module is a ReLU SAE and nothing else")
    sae, params = fold_b_dec(sae, params, False)
    lost = ("its layer norm",) if is_layer_normed(sae) else ()
    return Form({"sae.pt": partial(files.write_torch, to_state_dict(params))}, lost)


FORMAT = Format("the seed's PyTorch state dict (.pt)", recognise, read, form, keeps_metadata=False)
