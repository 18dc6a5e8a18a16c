"""The Matryoshka SAE: every prefix of the latents is an SAE of its own."""

import inspect
from collections.abc import Callable
from typing import Any

from sae_jax import losses
from sae_jax.architectures.batch_topk import batch_topk
from sae_jax.base import SAE, InputError, architecture, require


@architecture
def matryoshka(
    d_in: int,
    d_sae: int,
    *,
    prefixes: tuple[int, ...] | None = None,
    prefix_weights: tuple[float, ...] | None = None,
    of: Callable[..., SAE] = batch_topk,
    **arguments: Any,
) -> SAE:
    """Nested SAEs: the first m latents alone have to reconstruct too, for each m of `prefixes`.

        f       as the architecture `of` gives it, once for all prefixes
        x_hat_m = f[:m] W_dec[:m] + b_dec
        loss    = sum_m w_m |x_hat_m - x|^2 + what `of` adds to it (a penalty, AuxK)

    Early latents so have to be general, and cannot be absorbed into the special cases of later ones.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      prefixes: the m, increasing, the last d_sae; None for an eighth, a quarter, a half and all.
      prefix_weights: the w_m; None for 1 each (SAELens sums); dictionary_learning means twice: 1 / n^2.
      of: the architecture whose features are nested: `batch_topk`, `relu`, or any with `reconstruction`.
      arguments: of that architecture: `k` for `batch_topk`.

    Returns:
      An `SAE` with the params of `of`.

    Raises:
      InputError: prefixes that are not increasing or do not end at d_sae, weights of another number, or
        what `of` says.

    Example:
      >>> sae = matryoshka(d_in=64, d_sae=256, prefixes=(32, 64, 128, 256), k=8)

    Source: Bussmann et al. 2025 (arXiv 2503.17547).
    """
    shares = sorted({max(1, d_sae // part) for part in (8, 4, 2, 1)})
    prefixes = tuple(shares if prefixes is None else prefixes)
    whole = all(width == int(width) for width in prefixes)
    require(whole, f"prefixes must be whole numbers, got {prefixes}")
    prefixes = tuple(map(int, prefixes))
    increasing = all(a < b for a, b in zip((0, *prefixes), prefixes, strict=False))
    require(increasing, f"prefixes must be above 0 and increase, got {prefixes}")
    require(prefixes[-1:] == (d_sae,), f"prefixes must end at d_sae = {d_sae}, got {prefixes}")
    weights = (1.0,) * len(prefixes) if prefix_weights is None else tuple(prefix_weights)
    same = len(weights) == len(prefixes)
    require(same, f"prefix_weights must be one per prefix: {len(prefixes)} prefixes, {len(weights)} weights")
    nestable = {"reconstruction", "prefixes"} & set(inspect.signature(of).parameters) == {"reconstruction"}
    require(nestable, f"{of.__name__} cannot be nested: it judges its reconstruction by itself")
    if "mean_features" in inspect.signature(of).parameters:
        # the errors of prefixes are summed over features, and so is the penalty
        arguments = {"mean_features": False, **arguments}
    try:
        return of(d_in, d_sae, reconstruction=losses.nested(prefixes, weights), **arguments)
    except TypeError as error:
        raise InputError(f"matryoshka of {of.__name__}: {error}") from None
