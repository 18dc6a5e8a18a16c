"""The JumpReLU SAE in PyTorch, its straight-through estimators as `autograd.Function`s."""

from functools import cache
from typing import TYPE_CHECKING, Any

from sae_jax.verify.reference.blocks import dictionary, mean_l0, steered, warmed_up

if TYPE_CHECKING:
    import torch


@cache
def estimators() -> "tuple[type[torch.autograd.Function], type[torch.autograd.Function]]":
    """JumpReLU and the Heaviside step, called as `apply(pre, threshold, bandwidth, ste_to_input)`.

    Backward, with rect = [|pre - threshold| < bandwidth / 2] (arXiv 2407.14435, equations 11 and 12).
    """
    import torch

    class Jump(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, threshold, bandwidth, ste_to_input):
            ctx.save_for_backward(pre, threshold)
            ctx.settings = bandwidth, ste_to_input
            return torch.where(pre > threshold, pre, torch.zeros_like(pre))

        @staticmethod
        def backward(ctx, *above):
            pre, threshold = ctx.saved_tensors
            bandwidth, ste_to_input = ctx.settings
            near = (pre - threshold).abs().div(bandwidth).lt(0.5)
            pull = above[0] * near * (threshold / bandwidth)
            to_pre = above[0] * pre.gt(threshold)
            return to_pre + pull if ste_to_input else to_pre, -pull.sum(dim=0), None, None

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, threshold, bandwidth, ste_to_input):
            ctx.save_for_backward(pre, threshold)
            ctx.settings = bandwidth, ste_to_input
            return pre.gt(threshold).to(pre.dtype)

        @staticmethod
        def backward(ctx, *above):
            pre, threshold = ctx.saved_tensors
            bandwidth, ste_to_input = ctx.settings
            pull = above[0] * (pre - threshold).abs().div(bandwidth).lt(0.5) / bandwidth
            return pull if ste_to_input else None, -pull.sum(dim=0), None, None

    return Jump, Step


def jumprelu(
    d_in: int,
    d_sae: int,
    l0_coefficient: float = 1.0,
    target_l0: float | None = None,
    l0_warmup: int = 0,
    penalty: str = "losses.step_l0",
    tanh_scale: float = 4.0,
    bandwidth: float = 0.05,
    log_threshold: bool = False,
    ste_to_input: bool = False,
    penalty_of_features: bool = False,
    pre_act: float = 0.0,
    dead_after: int = 1000,
    threshold_init: float = 0.01,
    **layers: Any,
) -> "torch.nn.Module":
    """The JumpReLU SAE as a PyTorch user writes it; arguments as in `sae_jax.jumprelu`.

    Returns:
      A module; `forward(x, y)` gives a dict of `f`, `x_hat`, `reconstruction`, `sparsity`, `l0`, where asked
      for `pre_act`, and `loss`. Beside its layers it has a parameter `threshold` (`log_threshold` where its
      logarithm is learned) and, where the penalty is steered, a buffer `log_penalty`.
    """
    import torch

    jump, step = estimators()
    aim = None if penalty.startswith("losses.quadratic") else target_l0

    class JumpReLU(dictionary()):
        def __init__(self):
            super().__init__(d_in, d_sae, **layers)
            start = torch.nn.Parameter(torch.full((d_sae,), threshold_init))
            self.register_parameter("log_threshold" if log_threshold else "threshold", start)
            if aim is not None:
                self.register_buffer("log_penalty", torch.tensor(0.0))

        def sparsity(self, pre, f, threshold):
            if penalty == "losses.tanh_l0":
                return torch.tanh(tanh_scale * f * self.norms()).sum(dim=1).mean()
            counted = f if penalty_of_features else pre
            count = step.apply(counted, threshold, bandwidth, ste_to_input).sum(dim=1)
            if penalty == "losses.quadratic_l0":
                return (count - target_l0).pow(2).mean() * 2 / target_l0
            if penalty == "losses.quadratic_mean_l0":
                return (count.mean() / target_l0 - 1).pow(2)
            return count.mean()

        def forward(self, x, y):
            threshold = self.log_threshold.exp() if log_threshold else self.threshold
            pre = self.pre_activations(x)
            f = jump.apply(pre, threshold, bandwidth, ste_to_input)
            reconstruction, l0 = self.error(f, x, y), mean_l0(f)
            sparsity = self.sparsity(pre, f, threshold)
            weight = l0_coefficient * warmed_up(self.steps, l0_warmup)
            if aim is not None:
                weight = weight * steered(self, l0, aim)
            loss = reconstruction + weight * sparsity
            seen = {
                "f": f,
                "x_hat": self.decode(f, x),
                "reconstruction": reconstruction,
                "sparsity": sparsity,
                "l0": l0,
            }
            if pre_act:
                dead = self.since_fired > dead_after
                below = (threshold - pre)[:, dead].relu()
                seen["pre_act"] = (below @ self.norms()[dead]).mean()
                loss = loss + pre_act * seen["pre_act"]
            self.remember(f)
            return {**seen, "loss": loss}

    return JumpReLU()
