"""A trained SAE as a `torch.nn.Module`, written out from the equations so that it can be read on its own."""

from typing import Any

from sae_jax.folds import inner, kind, plain
from sae_jax.formats.files import as_tensor
from sae_jax.layer_norm import LAYER_NORM_EPS, is_layer_normed
from sae_jax.trained import TrainedSAE


def to_torch(trained: TrainedSAE) -> Any:
    """The same SAE in PyTorch, with the same numbers.

        f     = module.encode(x)
        x_hat = module.decode(f, x)          x for a skip connection and a layer norm, else it may be left out
        x_hat = module(x)

    Needs torch.

    Args:
      trained: the SAE and its weights, in any dtype.

    Returns:
      A `torch.nn.Module` on the CPU. Parameters go by our names and lie as ours: `W_enc` [d_in, d_sae],
      `W_dec` [d_sae, d_out], `W_skip` [d_in, d_out]; each keeps its dtype. What only training needs is left
      out: a tied encoder is written out, decoder norms that features are chosen by are folded into it, and
      log thresholds are thresholds.

    Example:
      >>> module = to_torch(sae_jax.load("sae/")).to("cuda")
      >>> x_hat = module(x)
    """
    import torch

    sae, params = plain(*trained)
    computes, core, normed = kind(sae), inner(sae.config), is_layer_normed(sae)
    transcodes, subtracts = "d_out" in sae.config, bool(core.get("apply_b_dec_to_input"))
    features = {
        "relu": _relu,
        "topk": lambda weights, x: _topk(weights, x, int(core["k"])),
        "batch_topk": _batch_topk,
        "jumprelu": _jumprelu,
        "gated": _gated,
        "crosscoder": _crosscoder,
    }[computes]

    class SparseAutoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, leaf in params.items():
                self.register_parameter(name, torch.nn.Parameter(as_tensor(leaf)))

        def encode(self, x):
            x = _layer_norm(x) if normed else x
            return features(self, x - self.b_dec if subtracts else x)

        def decode(self, f, x=None):
            # x_hat = f W_dec + b_dec
            W_dec: Any = self.W_dec
            x_hat = _times(f, W_dec.flatten(1)).unflatten(-1, W_dec.shape[1:]) + self.b_dec
            if x is None:
                return x_hat
            if "W_skip" in params:
                x_hat = x_hat + _times(_layer_norm(x) if normed else x, self.W_skip)
            # a transcoder's output is no row of x: its mean and spread are not known
            return _undo_layer_norm(x_hat, x) if normed and not transcodes else x_hat

        def forward(self, x):
            return self.decode(self.encode(x), x)

        def extra_repr(self):
            return f"{sae.config['architecture']} of {sae.config['d_sae']} latents"

    return SparseAutoencoder()


def _relu(weights, x):
    # f = ReLU(x W_enc + b_enc)
    return (_times(x, weights.W_enc) + weights.b_enc).relu()


def _topk(weights, x, k):
    # f = ReLU(pi) [pi among the k largest of its row];  of equal ones the earlier
    pre = _times(x, weights.W_enc) + weights.b_enc
    smallest = pre.topk(k, dim=-1).values[..., -1:]
    above, equal = pre > smallest, pre == smallest
    room = k - above.sum(dim=-1, keepdim=True)
    return pre.relu() * (above | (equal & (equal.cumsum(dim=-1) <= room)))


def _batch_topk(weights, x):
    # f = ReLU(pi) [pi > threshold], one threshold for all, in its own precision
    f = _relu(weights, x)
    return f * (f.to(_common(f, weights.threshold)) > weights.threshold)


def _jumprelu(weights, x):
    # f = ReLU(pi) [pi > threshold_i]
    pre = _times(x, weights.W_enc) + weights.b_enc
    return pre.relu() * (pre > weights.threshold.to(pre.dtype))


def _gated(weights, x):
    # h = x W_enc;  f = ReLU(exp(r_mag) h + b_mag) [h + b_gate > 0]
    h = _times(x, weights.W_enc)
    return (weights.r_mag.exp() * h + weights.b_mag).relu() * (h + weights.b_gate > 0)


def _crosscoder(weights, x):
    # f = ReLU(sum_s x_s W_enc_s + b_enc)
    return (_times(x.flatten(-2), weights.W_enc.flatten(0, 1)) + weights.b_enc).relu()


def _layer_norm(x):
    return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + LAYER_NORM_EPS)


def _undo_layer_norm(x_hat, x):
    return x_hat * x.std(dim=-1, keepdim=True) + x.mean(dim=-1, keepdim=True)


def _times(a, b):
    """A product in the wider of two dtypes, which torch alone refuses."""
    dtype = _common(a, b)
    return a.to(dtype) @ b.to(dtype)


def _common(a, b):
    import torch

    return torch.promote_types(a.dtype, b.dtype)
