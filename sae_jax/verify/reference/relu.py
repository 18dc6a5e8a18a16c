"""The ReLU SAE in PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sae_jax.verify.reference.blocks import dictionary, mean_l0, steered, warmed_up

if TYPE_CHECKING:
    import torch


def relu(
    d_in: int,
    d_sae: int,
    l1: float = 0.1,
    target_l0: float | None = None,
    l1_warmup: int = 0,
    p: float = 1.0,
    p_end: float | None = None,
    p_anneal: Sequence[int] = (0, 1),
    lp_root: bool = False,
    mean_features: bool = True,
    decoder_norm_l1: bool = False,
    tied: bool = False,
    **layers: Any,
) -> "torch.nn.Module":
    """The ReLU SAE as a PyTorch user writes it; arguments as in `sae_jax.relu`.

    Returns:
      A module; `forward(x, y)` gives a dict of `f`, `x_hat`, `reconstruction`, `sparsity`, `l0` and `loss`.
      Where the penalty is steered or annealed, it has a buffer `log_penalty`.
    """
    import torch
    from torch.nn import functional

    layers = {"reconstruction": "losses.averaged" if mean_features else "losses.summed", **layers}

    class ReLU(dictionary()):
        def __init__(self):
            super().__init__(d_in, d_sae, **layers)
            if tied:
                del self.encoder.weight
            if target_l0 is not None or p_end is not None:
                self.register_buffer("log_penalty", torch.tensor(0.0))

        def pre_activations(self, x):
            if not tied:
                return super().pre_activations(x)
            x = torch.sub(x, self.decoder.bias) if self.centred else x
            return functional.linear(x, self.decoder.weight.t(), self.encoder.bias)

        def exponent(self, step: int) -> float:
            if p_end is None:
                return p
            start, end = p_anneal
            if step <= start:
                return p
            return p_end if step >= end else p + (p_end - p) * (step - start) / (end - start)

        def penalty(self, f, power):
            cost = torch.einsum("bi,i->bi", f, self.norms()) if decoder_norm_l1 else f
            if lp_root:
                active = cost > 0
                powers = torch.zeros_like(cost).masked_scatter(active, cost[active].pow(power))
                rows = powers.sum(dim=1)
                return rows[rows > 0].pow(1.0 / power).sum() / len(rows)
            # raised where it is above 0 alone, because 0^p has no finite slope
            return cost[cost > 0].pow(power).sum() / (cost.numel() if mean_features else len(cost))

        def forward(self, x, y):
            f = self.pre_activations(x).clamp(min=0)
            reconstruction, l0 = self.error(f, x, y), mean_l0(f)
            step = int(self.steps)
            sparsity = self.penalty(f, self.exponent(step))
            weight = l1 * warmed_up(self.steps, l1_warmup)
            if target_l0 is not None:
                weight = weight * steered(self, l0, target_l0)
            elif p_end is not None:
                weight = weight * self.log_penalty.exp()
                with torch.no_grad():
                    later = self.penalty(f, self.exponent(step + 1))
                    if sparsity > 0 and later > 0:
                        self.log_penalty.add_(torch.log(sparsity / later))
            self.remember(f)
            return {
                "f": f,
                "x_hat": self.decode(f, x),
                "reconstruction": reconstruction,
                "sparsity": sparsity,
                "l0": l0,
                "loss": reconstruction + weight * sparsity,
            }

    return ReLU()
