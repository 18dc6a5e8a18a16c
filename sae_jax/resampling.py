"""Resampling: latents that have died start again where the SAE does worst."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from sae_jax.base import SAE, Batch, InputError, Params, Progress
from sae_jax.transforms import unit

BIASES = ("b_enc", "b_gate", "b_mag", "r_mag")
ENCODER_SHARE = 0.2
"""Norm of a new encoder row, in mean norms of the live ones."""


def anthropic(
    optimizer: optax.GradientTransformation,
    every: int = 25_000,
    last: int | None = 100_000,
    dead_after: int = 12_500,
) -> optax.GradientTransformationExtraArgs:
    """Resampling as in "Towards Monosemanticity": inputs drawn with probability proportional to squared loss.

        p_b ~ (|x_b - x_hat_b|^2)^2
        W_dec_i <- x_b / |x_b|;   W_enc_i <- 0.2 mean_live |W_enc| x_b / |x_b|;   b_enc_i <- 0

    for every latent i silent for `dead_after` steps, each with a row b of its own; moments of what is
    replaced start again from 0. Rows are those of the step's batch (the source draws from 819,200 inputs):
    where more latents are dead than the batch has rows, the rest wait for the next time.

    Args:
      optimizer: the chain around which this goes.
      every: steps between two resamplings.
      last: the last step at which to; None for no end.
      dead_after: steps of silence after which a latent is dead.

    Returns:
      An optax transformation; `make_step` hands it what it looks at.

    Example:
      >>> optimizer = resampling.anthropic(optax.adam(1e-3), every=1000, dead_after=500, last=None)

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling.
    """
    return _resampling(optimizer, every, last, dead_after - 1, power=4.0, unit_inputs=True)


def dictionary_learning(
    optimizer: optax.GradientTransformation, every: int, dead_after: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Resampling as in dictionary_learning: `p_b ~ |x_b - x_hat_b|`, encoder rows in the input's own norm.

        W_dec_i <- x_b / |x_b|;   W_enc_i <- 0.2 mean_live |W_enc| x_b;   b_enc_i <- 0

    That the encoder row takes x_b as it is, rather than at norm 1 as in the paper, is that library's way:
    with inputs of norm 30, revived latents start thirty times too strong. Steps are counted from 0, and it
    happens at the end of step `every`, one later than by the count of steps done: there the learning rate,
    whose warm-up starts again with it, is 0.

    Args:
      optimizer: the chain around which this goes.
      every: steps between two resamplings.
      dead_after: steps of silence after which a latent is dead; None for half of `every`.

    Source: saprmarks/dictionary_learning, `trainers/standard.py`.
    """
    silent = every // 2 if dead_after is None else dead_after
    return _resampling(optimizer, every, None, silent, power=1.0, unit_inputs=False, late=1)


def _resampling(
    optimizer, every: int, last: int | None, dead_after: int, power: float, unit_inputs: bool, late: int = 0
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, *, sae: SAE, batch: Batch, progress: Progress, **extra):
        if params is None or "W_enc" not in params or params["W_enc"].ndim != 2:
            raise InputError("resampling needs params with an encoder of their own, W_enc [d_in, d_sae]")
        updates, state = inner.update(
            updates, state, params, sae=sae, batch=batch, progress=progress, **extra
        )

        def resample(updates, state):
            f = sae.encode(params, batch.x)
            silence = jnp.where((f > 0).any(axis=0), 0, progress.since_fired + 1)
            loss = jnp.linalg.norm(batch.y - sae.decode(params, f, batch.x), axis=-1)
            key = jax.random.fold_in(jax.random.key(0), progress.step)
            replaced, rows = drawn_rows(key, power * jnp.log(loss), silence > dead_after)
            new = restarted(params, batch, rows, ~(silence > dead_after), unit_inputs)
            for name, leaf in new.items():
                mask = replaced if name != "W_dec" else replaced[:, None]
                updates = {
                    **updates,
                    name: jnp.where(mask, leaf.astype(params[name].dtype) - params[name], updates[name]),
                }
            return updates, _without_moments(state, params, replaced)

        # a step counts as done here, so that the first resampling comes after `every` of them
        done = progress.step + 1 - late
        due = (done > 0) & (done % every == 0) & (True if last is None else done <= last)
        return jax.lax.cond(due, resample, lambda *unchanged: unchanged, updates, state)

    return optax.GradientTransformationExtraArgs(inner.init, cast(Any, update))


def drawn_rows(
    key: Key[Array, ""], log_odds: Float[Array, "batch"], dead: Bool[Array, "d_sae"]
) -> tuple[Bool[Array, "d_sae"], Array]:
    """A row of the batch for each dead latent, drawn without replacement.

    The rows in order of `log_odds` plus Gumbel noise are such a draw (Vieira 2014).

    Returns:
      Which latents are replaced (the dead ones, as many as there are rows), and a row for each.
    """
    order = jnp.argsort(-(log_odds + jax.random.gumbel(key, log_odds.shape, log_odds.dtype)))
    turn = jnp.cumsum(dead) - 1
    return dead & (turn < len(order)), order[jnp.clip(turn, 0, len(order) - 1)]


def restarted(
    params: Params, batch: Batch, rows: Array, live: Bool[Array, "d_sae"], unit_inputs: bool
) -> Params:
    """What each latent's weights would be, were it started again on its row."""
    norms = jnp.linalg.norm(params["W_enc"], axis=0)
    mean = jnp.where(live, norms, 0).sum() / jnp.maximum(live.sum(), 1)
    inputs = unit(batch.x[rows]) if unit_inputs else batch.x[rows]
    new = {"W_enc": ENCODER_SHARE * mean * inputs.T, "W_dec": unit(batch.y[rows])}
    return new | {name: jnp.zeros_like(params[name]) for name in BIASES if name in params}


def _without_moments(state: Any, params: Params, replaced: Bool[Array, "d_sae"]) -> Any:
    """The optimizer's state with what it remembers of the replaced latents' weights at 0."""

    def cleared(path, leaf):
        name = next((entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), None)
        # an average of the weights, which evaluation takes, is no moment
        average = any(getattr(entry, "name", None) == "average" for entry in path)
        if average or name not in ("W_enc", "W_dec", *BIASES) or leaf.shape != params[name].shape:
            return leaf
        return jnp.where(replaced[:, None] if name == "W_dec" else replaced, jnp.zeros_like(leaf), leaf)

    return jax.tree_util.tree_map_with_path(cleared, state)
