"""What a language model still predicts with an SAE's reconstruction in place of its own activations.

Sums over a batch are taken on the device in float32 or better; sums over batches on the host in float64.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.base import SAE, InputError, Params, require


@runtime_checkable  # the tests check annotations as they run
class Contexts(Protocol):
    """What is asked of a batch of contexts: `language_models.Contexts` has it."""

    @property
    def tokens(self) -> Int[np.ndarray, "batch context"]:
        """Negative where there is none."""
        ...

    @property
    def kept(self) -> Bool[np.ndarray, "batch context"]:
        """Where activations are replaced."""
        ...


Logits = Callable[..., Float[Array, "batch context vocabulary"]]
"""`(tokens, edit) -> logits`. An `edit` that is not None is called once, outside of compiled programs, with
what the site gives, [batch, context, d], and the model goes on from what it returns."""


def downstream(
    logits: Logits,
    sae: SAE,
    params: Params,
    contexts: Iterable[Contexts],
    *,
    mean: Float[np.ndarray, "d"] | Float[Array, "d"] | None = None,
) -> dict[str, np.ndarray]:
    """What replacing activations costs a language model that predicts the next token.

    At the positions that are kept, the site's x gives way to x_hat (`sae`), to 0 (`zero`) or to the mean
    (`mean`); at the others the model keeps its own. With E over every position that is not padding and
    whose next token is not either, p the model's own prediction there, q the one after a replacement:

        ce_clean                      E -log p(next token), in nats
        ce_sae, ce_zero, ce_mean      E -log q(next token)
        loss_recovered                (ce_zero - ce_sae) / (ce_zero - ce_clean)   (Bricken et al. 2023)
        loss_recovered_mean           (ce_mean - ce_sae) / (ce_mean - ce_clean)
        kl_sae, kl_zero, kl_mean      E KL(p || q)
        kl_recovered                  1 - kl_sae / kl_zero                        (SAELens: kl_div_score)

    Args:
      logits: `language_models.torch_hooks.splice(model, site)`, that of `nnx_capture`, or one like them.
      sae: of the site's activations as the model gives them; no transcoder and no crosscoder.
      params: its weights.
      contexts: batches of contexts, in a list where `mean` is None, since they are then read twice.
      mean: activations to put in place of the site's; None for their mean over kept positions.

    Returns:
      float64 values by name. The recovered shares are NaN where the ablation changes nothing.

    Raises:
      InputError: an SAE of another width, a transcoder or crosscoder, contexts without a token to predict,
        an iterator that would have to be read twice.

    Example:
      >>> downstream(torch_hooks.splice(gpt2, "transformer.h.5.mlp"), *sae_jax.load("sae/"), held_out)

    Source: Bricken et al. 2023; Gao et al. 2024 (arXiv 2406.04093) for KL; SAELens `evals.py`;
    dictionary_learning `evaluation.py`.
    """
    kind = "transcoder" if "d_out" in sae.config else "crosscoder" if "sources" in sae.config else None
    require(kind is None, f"this SAE is a {kind}: what it gives is not the activations of one site it reads")
    again = mean is not None or not isinstance(contexts, Iterator)
    require(again, "contexts are read twice, first for their mean: give a list of them, or the mean")
    mean = mean_activation(logits, contexts) if mean is None else mean
    values = {
        "sae": partial(_reconstructed, sae, params),
        "zero": jnp.zeros_like,
        "mean": partial(_everywhere, jnp.asarray(mean)),
    }
    total: dict[str, Any] = dict.fromkeys(values, 0.0)
    for batch in contexts:
        clean = logits(batch.tokens, None)
        for name, value in values.items():
            edited = logits(batch.tokens, partial(_replaced, value, batch.kept))
            total[name] = total[name] + np.asarray(_compared(clean, edited, batch.tokens), np.float64)
    return _finish(**total)


def mean_activation(logits: Logits, contexts: Iterable[Contexts]) -> Float[np.ndarray, "d"]:
    """The mean activation of a site over the positions that are kept.

    Args:
      logits: as in `downstream`.
      contexts: batches of contexts.

    Returns:
      float64 [d].

    Raises:
      InputError: no position is kept.
    """
    total, rows = np.zeros(()), 0
    for batch in contexts:
        total = total + np.asarray(_sum_of_kept(_activations(logits, batch.tokens), batch.kept), np.float64)
        rows += int(batch.kept.sum())
    require(rows > 0, "the contexts keep no position whose activations could be replaced")
    return total / rows


def _activations(logits: Logits, tokens: np.ndarray) -> Array:
    """What the site gives, seen by an edit that leaves it as it is."""
    seen = []

    def look(x: Array) -> Array:
        seen.append(x)
        return x

    logits(tokens, look)
    return seen[0]


def _replaced(value: Callable[[Array], Array], kept: np.ndarray, x: Array) -> Array:
    return jnp.where(kept[..., None], value(x).astype(x.dtype), x)


@partial(jax.jit, static_argnums=0)
def _reconstructed(sae: SAE, params: Params, x: Array) -> Array:
    d_in, width = sae.config.get("d_in", x.shape[-1]), x.shape[-1]
    require(d_in == width, f"this SAE reads {d_in} columns, but the site has {width}")
    rows = _exact(x.reshape(-1, width))
    return sae.decode(params, sae.encode(params, rows), rows).reshape(x.shape)


def _everywhere(mean: Array, x: Array) -> Array:
    require(mean.shape == x.shape[-1:], f"the mean must be {list(x.shape[-1:])}, got {list(mean.shape)}")
    return jnp.broadcast_to(mean, x.shape)


@jax.jit
def _sum_of_kept(x: Array, kept: Array) -> Array:
    return jnp.where(kept[..., None], _exact(x), 0).sum(axis=(0, 1))


@jax.jit
def _compared(clean: Array, edited: Array, tokens: Array) -> Float[Array, "4"]:
    """Over the positions of a batch that predict a token: their number, and the sums of ce, ce and KL."""

    def in_context(arrays):
        clean, edited, tokens = arrays
        log_p, log_q = (jax.nn.log_softmax(_exact(logits[:-1])) for logits in (clean, edited))
        target = jnp.maximum(tokens[1:], 0)[:, None]
        ce_p, ce_q = (-jnp.take_along_axis(log, target, axis=-1)[:, 0] for log in (log_p, log_q))
        p = jnp.exp(log_p)
        # a token that is ruled out has log p = -inf and adds nothing
        kl = jnp.where(p > 0, p * (log_p - log_q), 0).sum(axis=-1)
        predicts = (tokens[:-1] >= 0) & (tokens[1:] >= 0)
        return jnp.where(predicts, jnp.stack([jnp.ones_like(kl), ce_p, ce_q, kl]), 0).sum(axis=-1)

    # one context at a time: the log-probabilities of a whole batch would take several times its logits
    return jax.lax.map(in_context, (clean, edited, tokens)).sum(axis=0)


def _exact(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _finish(sae, zero, mean) -> dict[str, np.ndarray]:
    """The figures, from the sums of `_compared` for each replacement."""
    if np.ndim(sae) == 0 or sae[0] == 0:
        raise InputError("the contexts hold no token that is to be predicted from another")
    (_, ce_clean, ce_sae, kl_sae), (_, _, ce_zero, kl_zero), (_, _, ce_mean, kl_mean) = (
        sums / sums[0] for sums in (sae, zero, mean)
    )
    found = {
        "ce_clean": ce_clean,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_mean": ce_mean,
        "loss_recovered": _share(ce_zero - ce_sae, ce_zero - ce_clean),
        "loss_recovered_mean": _share(ce_mean - ce_sae, ce_mean - ce_clean),
        "kl_sae": kl_sae,
        "kl_zero": kl_zero,
        "kl_mean": kl_mean,
        "kl_recovered": _share(kl_zero - kl_sae, kl_zero),
    }
    return {name: np.asarray(value) for name, value in found.items()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
