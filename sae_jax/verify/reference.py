"""The same models written in PyTorch, with no line in common with those here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def relu_module(
    d_in: int,
    d_sae: int,
    l1: float = 0.1,
    mean_features: bool = True,
    decoder_norm_l1: bool = False,
    apply_b_dec_to_input: bool = False,
    tied: bool = False,
) -> "torch.nn.Module":
    """The ReLU SAE as a PyTorch user writes it: the seed's two `nn.Linear` layers, and the field's options.

    Args:
      d_in, d_sae: sizes.
      l1, mean_features, decoder_norm_l1, apply_b_dec_to_input, tied: as in `sae_jax.relu`.

    Returns:
      A module with parameters `encoder.0.weight` (absent where tied), `encoder.0.bias`,
      `decoder.0.weight` and `decoder.0.bias`; `forward(x)` gives a dict of `f`, `x_hat`, `reconstruction`,
      `sparsity`, `l0` and `loss`.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(d_in, d_sae), nn.ReLU())
            self.decoder = nn.Sequential(nn.Linear(d_sae, d_in))
            if tied:
                del self.encoder[0].weight

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            columns = self.get_parameter("decoder.0.weight")
            inputs = torch.sub(x, self.get_parameter("decoder.0.bias")) if apply_b_dec_to_input else x
            weight = columns.t() if tied else self.get_parameter("encoder.0.weight")
            f = functional.linear(inputs, weight, self.get_parameter("encoder.0.bias")).clamp(min=0)
            x_hat = self.decoder(f)
            if mean_features:
                reconstruction = functional.mse_loss(x_hat, x)
            else:
                reconstruction = (x - x_hat).pow(2).sum(dim=1).mean(dim=0)
            cost = f.abs()
            if decoder_norm_l1:
                cost = torch.einsum("bi,i->bi", cost, columns.norm(dim=0))
            sparsity = cost.mean() if mean_features else cost.sum(dim=1).mean(dim=0)
            return {
                "f": f,
                "x_hat": x_hat,
                "reconstruction": reconstruction,
                "sparsity": sparsity,
                "l0": torch.count_nonzero(f, dim=1).to(f.dtype).mean(),
                "loss": reconstruction + l1 * sparsity,
            }

    return Autoencoder()


def unit_norm_columns(module: "torch.nn.Module") -> None:
    """Bring each latent's decoder column to norm 1, in place."""
    import torch

    weight = module.get_parameter("decoder.0.weight")
    weight.copy_(torch.nn.functional.normalize(weight, dim=0))
