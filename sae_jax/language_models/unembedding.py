"""What a vector of the residual stream adds to a language model's logits."""

from typing import Any

import numpy as np
from jaxtyping import Float

from sae_jax.base import require


def unembedding(model: Any) -> Float[np.ndarray, "d_model vocabulary"]:
    """The output weights of a Hugging Face model in torch, with the scale of its last norm in them.

        logits += (v * scale) W_U / spread

    where spread, the norm's own division, depends on the token and is left out.

    Args:
      model: from `torch_hooks.load`.

    Returns:
      float32 [d_model, vocabulary]. The last norm is the last module with a weight [d_model] that lies at
      most two names deep (`transformer.ln_f`, `model.norm`); without one the scale is 1.

    Raises:
      InputError: a model without output weights, or of an odd width.

    Example:
      >>> features.weigh(trained.params, unembedding=unembedding(torch_hooks.load("gpt2")))
    """
    head = model.get_output_embeddings()
    require(head is not None, f"{type(model).__name__} has no output weights, so it writes no logits")
    weight = head.weight.detach().float()
    width = weight.shape[1]
    require(width % 2 == 0, f"the width of the residual stream must be even, got {width}")
    norms = [
        module
        for name, module in model.named_modules()
        if name.count(".") <= 1 and tuple(getattr(getattr(module, "weight", None), "shape", ())) == (width,)
    ]
    scale = _scale(norms[-1], weight.new_ones(width)) if norms else np.ones(width, np.float32)
    return weight.cpu().numpy().T * scale[:, None]


def _scale(norm: Any, ones: Any) -> Float[np.ndarray, "d_model"]:
    """By what it does, since some add 1 to their weight: x and -x have mean 0 and mean square 1."""
    signs = ones.clone()
    signs[1::2] = -1
    x = signs.to(norm.weight.dtype)[None]
    difference = norm(x) - norm(-x)
    return (difference.detach().float()[0] / (2 * signs)).cpu().numpy()
