"""The crosscoder in PyTorch."""

from typing import TYPE_CHECKING

from sae_jax.verify.reference.blocks import mean_l0, steered, warmed_up

if TYPE_CHECKING:
    import torch


def crosscoder(
    d_in: int,
    d_sae: int,
    sources: int = 2,
    l1: float = 0.1,
    target_l0: float | None = None,
    l1_warmup: int = 0,
) -> "torch.nn.Module":
    """The crosscoder as a PyTorch user writes it; arguments as in `sae_jax.crosscoder`.

    Returns:
      A module; `forward(x, y)` takes [batch, sources, d_in] and gives a dict of `f`, `x_hat`,
      `reconstruction`, one `reconstruction_s` per source, `sparsity`, `l0` and `loss`. Parameters: `W_enc`
      [sources, d_in, d_sae], `b_enc`, `W_dec` [d_sae, sources, d_in], `b_dec` [sources, d_in].
    """
    import torch
    from torch import nn

    class Crosscoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.W_enc = nn.Parameter(torch.zeros(sources, d_in, d_sae))
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
            self.W_dec = nn.Parameter(torch.zeros(d_sae, sources, d_in))
            self.b_dec = nn.Parameter(torch.zeros(sources, d_in))
            self.steps: torch.Tensor
            self.register_buffer("steps", torch.tensor(0))
            if target_l0 is not None:
                self.register_buffer("log_penalty", torch.tensor(0.0))

        def forward(self, x, y):
            f = torch.relu(torch.einsum("bsd,sdi->bi", x, self.W_enc) + self.b_enc)
            x_hat = torch.einsum("bi,isd->bsd", f, self.W_dec) + self.b_dec
            errors = (y - x_hat).pow(2).sum(dim=2).mean(dim=0)
            cost = self.W_dec.norm(dim=2).sum(dim=1)
            sparsity, l0 = (f @ cost).mean(), mean_l0(f)
            weight = l1 * warmed_up(self.steps, l1_warmup)
            if target_l0 is not None:
                weight = weight * steered(self, l0, target_l0)
            self.steps.add_(1)
            return {
                "f": f,
                "x_hat": x_hat,
                "reconstruction": errors.sum(),
                **{f"reconstruction_{s}": error for s, error in enumerate(errors.unbind())},
                "sparsity": sparsity,
                "l0": l0,
                "loss": errors.sum() + weight * sparsity,
            }

    return Crosscoder()
