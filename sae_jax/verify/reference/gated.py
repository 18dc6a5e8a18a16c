"""The Gated SAE in PyTorch."""

from typing import TYPE_CHECKING, Any

from sae_jax.verify.reference.blocks import dictionary, mean_l0, steered, warmed_up

if TYPE_CHECKING:
    import torch


def gated(
    d_in: int,
    d_sae: int,
    l1: float = 0.1,
    target_l0: float | None = None,
    l1_warmup: int = 0,
    decoder_norm_l1: bool = False,
    detach_auxiliary: bool = True,
    apply_b_dec_to_input: bool = True,
    **layers: Any,
) -> "torch.nn.Module":
    """The Gated SAE as a PyTorch user writes it; arguments as in `sae_jax.gated`.

    Returns:
      A module; `forward(x, y)` gives a dict of `f`, `x_hat`, `reconstruction`, `sparsity`, `auxiliary`, `l0`
      and `loss`. Its encoder has no bias but `b_gate`, `b_mag` and `r_mag`.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Gated(dictionary()):
        def __init__(self):
            super().__init__(d_in, d_sae, apply_b_dec_to_input=apply_b_dec_to_input, **layers)
            self.encoder = nn.Linear(d_in, d_sae, bias=False)
            self.b_gate = nn.Parameter(torch.zeros(d_sae))
            self.b_mag = nn.Parameter(torch.zeros(d_sae))
            self.r_mag = nn.Parameter(torch.zeros(d_sae))
            if target_l0 is not None:
                self.register_buffer("log_penalty", torch.tensor(0.0))

        def forward(self, x, y):
            h = self.pre_activations(x)
            gate = h + self.b_gate
            f = gate.gt(0).to(h.dtype) * functional.relu(h * self.r_mag.exp() + self.b_mag)
            reconstruction, l0 = self.error(f, x, y), mean_l0(f)
            opened = functional.relu(gate)
            sparsity = (opened @ self.norms() if decoder_norm_l1 else opened.sum(dim=1)).mean()
            held = {
                name: leaf.detach() if detach_auxiliary else leaf for name, leaf in self.named_parameters()
            }
            y_hat = functional.linear(opened, held["decoder.weight"], held["decoder.bias"])
            if self.skip is not None:
                y_hat = y_hat + functional.linear(x, held["skip.weight"])
            auxiliary = (y_hat - y).pow(2).sum(dim=1).mean()
            strength = l1 * warmed_up(self.steps, l1_warmup)
            if target_l0 is not None:
                strength = strength * steered(self, l0, target_l0)
            self.remember(f)
            return {
                "f": f,
                "x_hat": self.decode(f, x),
                "reconstruction": reconstruction,
                "sparsity": sparsity,
                "auxiliary": auxiliary,
                "l0": l0,
                "loss": reconstruction + strength * sparsity + auxiliary,
            }

    return Gated()
