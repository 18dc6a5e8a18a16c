"""The TopK and BatchTopK SAEs in PyTorch."""

from typing import TYPE_CHECKING, Any

from sae_jax.verify.reference.blocks import auxk_loss as auxk_term
from sae_jax.verify.reference.blocks import dictionary, mean_l0

if TYPE_CHECKING:
    import torch


def topk(
    d_in: int,
    d_sae: int,
    k: float,
    auxk: float = 1.0,
    auxk_loss: str = "auxk.saelens",
    k_aux: int | None = None,
    dead_after: int = 1000,
    rescale_acts_by_decoder_norm: bool = False,
    apply_b_dec_to_input: bool = True,
    **layers: Any,
) -> "torch.nn.Module":
    """The TopK SAE as a PyTorch user writes it; arguments as in `sae_jax.topk`.

    Returns:
      A module; `forward(x, y)` gives a dict of `f`, `x_hat`, `reconstruction`, `l0`, `auxk` and `loss`.
    """
    import torch

    if k_aux is None:
        k_aux = max(d_in // 2, 1)

    class TopK(dictionary()):
        def __init__(self):
            super().__init__(d_in, d_sae, apply_b_dec_to_input=apply_b_dec_to_input, **layers)

        def pre_activations(self, x):
            pre = super().pre_activations(x)
            return pre * self.norms() if rescale_acts_by_decoder_norm else pre

        def codes(self, f):
            return f / self.norms() if rescale_acts_by_decoder_norm else f

        def select(self, pre):
            values, places = torch.topk(pre, int(k), dim=1)
            return torch.zeros_like(pre).scatter(1, places, values.relu())

        def encode(self, pre):
            return self.select(pre)

        def follow(self, f):
            """What else a step leaves behind."""

        def forward(self, x, y):
            pre = self.pre_activations(x)
            f, features = self.select(pre), self.encode(pre)
            reconstruction = loss = self.error(self.codes(f), x, y)
            seen = {
                "f": features,
                "x_hat": self.decode(self.codes(features), x),
                "reconstruction": reconstruction,
                "l0": mean_l0(f),
            }
            silent_before = self.since_fired.clone()
            self.remember(f)
            if auxk:
                columns = self.decoder.weight
                if rescale_acts_by_decoder_norm:
                    columns = torch.nn.functional.normalize(columns, dim=0)
                residual = y - self.decode(self.codes(f), x)
                seen["auxk"] = auxk_term(
                    auxk_loss, pre, residual, y, columns, silent_before, self.since_fired, k_aux, dead_after
                )
                loss = loss + auxk * seen["auxk"]
            self.follow(f.detach())
            return {**seen, "loss": loss}

    return TopK()


def batch_topk(
    d_in: int,
    d_sae: int,
    k: float,
    threshold_decay: float = 0.99,
    threshold_start: int = 0,
    threshold_init: float = -1.0,
    **arguments: Any,
) -> "torch.nn.Module":
    """The BatchTopK SAE as a PyTorch user writes it; arguments as in `sae_jax.batch_topk`.

    Returns:
      A module as `topk` gives, with a buffer `threshold`; `f` and `x_hat` are those of single rows, by the
      threshold as it stands before the step.
    """
    import torch

    base: Any = type(topk(d_in, d_sae, k, **arguments))

    class BatchTopK(base):
        def __init__(self):
            super().__init__()
            self.register_buffer("threshold", torch.tensor(threshold_init))

        def select(self, pre):
            flat = pre.relu().flatten()
            kept = flat.topk(int(k * len(pre)), sorted=False)
            return flat.new_zeros(flat.shape).scatter(0, kept.indices, kept.values).view_as(pre)

        def encode(self, pre):
            return pre.relu() * pre.gt(self.threshold.clamp(min=0))

        def follow(self, f):
            positive = f[f > 0]
            if int(self.steps) - 1 < threshold_start or positive.numel() == 0:
                return
            if self.threshold < 0:
                self.threshold.copy_(positive.min())
            else:
                self.threshold.lerp_(positive.min(), 1 - threshold_decay)

    return BatchTopK()
