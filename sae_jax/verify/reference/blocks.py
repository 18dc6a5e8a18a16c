"""What several of the PyTorch modules are made of."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def dictionary() -> Any:
    """The `nn.Module` that the modules inherit from: two linear layers, a skip connection, a memory.

    Parameters: `encoder.weight`, `encoder.bias`, `decoder.weight`, `decoder.bias`, and `skip.weight` where
    asked for. Buffers: `steps` done so far, and `since_fired`, the steps since each latent was active.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Dictionary(nn.Module):
        def __init__(
            self,
            d_in: int,
            d_sae: int,
            d_out: int | None = None,
            skip: bool = False,
            apply_b_dec_to_input: bool = False,
            reconstruction: str = "losses.summed",
            prefixes: Sequence[int] | None = None,
            prefix_weights: Sequence[float] | None = None,
        ):
            super().__init__()
            self.encoder = nn.Linear(d_in, d_sae)
            self.decoder = nn.Linear(d_sae, d_in if d_out is None else d_out)
            self.skip = nn.Linear(d_in, self.decoder.out_features, bias=False) if skip else None
            self.centred = apply_b_dec_to_input
            self.reconstruction = reconstruction
            self.prefixes = prefixes or ()
            self.prefix_weights = prefix_weights or [1.0] * len(self.prefixes)
            self.steps: torch.Tensor
            self.since_fired: torch.Tensor
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("since_fired", torch.zeros(d_sae, dtype=torch.long))

        def norms(self) -> torch.Tensor:
            return torch.linalg.vector_norm(self.decoder.weight, dim=0)

        def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x.sub(self.decoder.bias)) if self.centred else self.encoder(x)

        def decode(self, f: torch.Tensor, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
            y_hat = functional.linear(f[:, :width], self.decoder.weight[:, :width], self.decoder.bias)
            return y_hat if self.skip is None else y_hat.add(self.skip(x))

        def error(self, f: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if self.prefixes:
                nested = [
                    weight * (y - self.decode(f, x, width)).pow(2).sum(dim=1).mean()
                    for width, weight in zip(self.prefixes, self.prefix_weights, strict=True)
                ]
                return torch.stack(nested).sum()
            miss = y - self.decode(f, x)
            if self.reconstruction == "losses.averaged":
                return functional.mse_loss(miss, torch.zeros_like(miss))
            if self.reconstruction == "losses.unexplained":
                return miss.pow(2).sum().div(y.var(dim=0, correction=0).sum() * len(y))
            return miss.pow(2).sum(dim=1).mean()

        @torch.no_grad()
        def remember(self, f: torch.Tensor) -> None:
            self.steps.add_(1)
            self.since_fired.add_(1)
            self.since_fired[f.gt(0).any(dim=0)] = 0

    return Dictionary


def mean_l0(f: "torch.Tensor") -> "torch.Tensor":
    """Active latents per row."""
    import torch

    return torch.count_nonzero(f.detach().clamp(min=0), dim=1).to(f.dtype).mean()


def warmed_up(steps: "torch.Tensor", warmup: int) -> float:
    """How much of a penalty's weight counts after so many steps."""
    return min(steps.item() / warmup, 1.0) if warmup else 1.0


def steered(module: "torch.nn.Module", l0: "torch.Tensor", target_l0: float) -> "torch.Tensor":
    """The factor on a penalty that leads to a target L0; the buffer `log_penalty` is moved on.

    A proportional-integral controller with gains 1 and 0.01 on the log of L0 over the target, cut at +-1.
    """
    buffer = module.get_buffer("log_penalty")
    excess = l0.clamp(min=1e-3).div(target_l0).log().clamp(-1.0, 1.0)
    factor = buffer.add(excess).exp()
    buffer.add_(excess, alpha=0.01)
    return factor


def auxk_loss(
    convention: str,
    pre: "torch.Tensor",
    residual: "torch.Tensor",
    y: "torch.Tensor",
    columns: "torch.Tensor",
    silent_before: "torch.Tensor",
    silent_now: "torch.Tensor",
    k_aux: int,
    dead_after: int,
) -> "torch.Tensor":
    """The dead latents' share in reconstructing what is left over, as four libraries define it.

    Args:
      convention: "auxk.saelens", "auxk.normalised", "auxk.fvu" or "auxk.attached".
      pre: pre-activations [batch, d_sae].
      residual: [batch, d_out].
      y: the targets [batch, d_out].
      columns: what each latent adds per unit of `pre` [d_out, d_sae].
      silent_before, silent_now: steps since each latent was active, before this step and with it.
      k_aux: dead latents per row.
      dead_after: steps of silence.
    """
    forward_included = convention in ("auxk.normalised", "auxk.attached")
    dead = silent_now.ge(dead_after) if forward_included else silent_before.gt(dead_after)
    count = int(dead.sum())
    if count == 0:
        return pre.new_zeros(())
    candidates = pre[:, dead] if convention == "auxk.saelens" else pre[:, dead].relu()
    values, places = candidates.topk(min(k_aux, count), dim=1, sorted=False)
    codes = candidates.new_zeros(candidates.shape).scatter(1, places, values)
    goal = residual if convention == "auxk.attached" else residual.detach()
    squares = (codes @ columns[:, dead].t() - goal).pow(2)
    share = min(1.0, count / k_aux)
    if convention == "auxk.saelens":
        return share * squares.sum(dim=1).mean()
    if convention == "auxk.fvu":
        return share * squares.sum() / (y - y.mean(dim=0, keepdim=True)).pow(2).sum()
    if convention == "auxk.attached":
        return squares.mean()
    return squares.sum() / (goal - goal.mean(dim=0, keepdim=True)).pow(2).sum()
