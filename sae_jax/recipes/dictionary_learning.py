"""dictionary_learning 0.1.0 (github.com/saprmarks/dictionary_learning): its trainers, constant by constant.

Common to all. `x_hat` is judged by `mean_b sum_d (x_hat - x)^2`. The learning rate is
`lr min(step / warmup_steps, 1)`, which is 0 at step 0, and from `decay_start` falls linearly to 0 at `steps`.
The penalty's weight rises as `min(step / sparsity_warmup_steps, 1)`. Adam has b2 = .999 and eps 1e-8.
Latents of the TopK family count as dead after 10,000,000 tokens without firing.

A batch size is asked for only where tokens have to be counted in steps. What is not asked for is fixed;
numbers that set no shape can be changed in the factory: `recipe.factory(dead_after=500)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from sae_jax import losses, resampling
from sae_jax.architectures.batch_topk import batch_topk
from sae_jax.architectures.gated import gated
from sae_jax.architectures.jumprelu import jumprelu
from sae_jax.architectures.matryoshka import matryoshka
from sae_jax.architectures.relu import relu
from sae_jax.architectures.topk import topk
from sae_jax.auxk import normalised
from sae_jax.base import SAE, Params, require
from sae_jax.initialisation import b_dec_at, geometric_median, rows_at, starting
from sae_jax.recipes.recipe import Recipe, recipe
from sae_jax.selection import Number
from sae_jax.transforms import (
    clip_by_global_norm,
    project_decoder_gradient,
    scale_by_adam,
    trapezoid,
    unit_norm_decoder,
)

DEAD_TOKENS = 10_000_000
"""Tokens without firing after which a latent is dead: `dead_feature_threshold` of every trainer."""

Rows = Float[Array | np.ndarray, "n d_in"]


@recipe
def dictionary_learning_standard(
    *,
    d_in: int,
    d_sae: int,
    steps: int,
    l1: float = 0.1,
    lr: float = 1e-3,
    warmup_steps: int = 1000,
    sparsity_warmup_steps: int | None = 2000,
    decay_start: int | None = None,
    resample_steps: int | None = None,
) -> Recipe:
    """`StandardTrainer`: ReLU and L1 with unit decoder rows, after "Towards Monosemanticity".

        loss = |x_hat - x|^2 + l1 warm |f|_1,   f = ReLU((x - b_dec) W_enc + b_enc)

    Gaussian decoder rows at norm .1, the encoder their transpose; the first step brings them to norm 1.
    `b_enc` starts at U(+-1 / sqrt(d_in)), what `torch.nn.Linear` draws, `b_dec` at 0. The chain is
    `ConstrainedAdam`: the parallel gradient removed, Adam (.9, .999), rows to norm 1, both without an eps.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      steps: of the whole run.
      l1: weight of the penalty.
      lr: learning rate.
      warmup_steps: of the learning rate, from 0, and again after every resampling.
      sparsity_warmup_steps: of the penalty; None or 0 for none.
      decay_start: step at which the learning rate begins to fall; None for never.
      resample_steps: steps between resamplings of latents silent for half as long
        (`resampling.dictionary_learning`); None for none.

    Returns:
      A `Recipe`.

    Raises:
      InputError: warm-ups or a decay that do not lie within the run, or decay and resampling together.

    Example:
      >>> factory, optimizer = dictionary_learning_standard(d_in=64, d_sae=256, steps=5000, l1=0.05)

    Source: dictionary_learning 0.1.0, `trainers/standard.py`, `trainers/trainer.py`.
    """
    schedule = _schedule(steps, warmup_steps, decay_start, sparsity_warmup_steps, resample_steps)
    optimizer = partial(constrained_adam, learning_rate=lr, **schedule)
    return Recipe(_relu(d_in, d_sae, l1=l1, l1_warmup=sparsity_warmup_steps or 0), optimizer)


@recipe
def dictionary_learning_april(
    *,
    d_in: int,
    d_sae: int,
    steps: int,
    l1: float = 0.1,
    lr: float = 1e-3,
    warmup_steps: int = 1000,
    sparsity_warmup_steps: int | None = 2000,
    decay_start: int | None = None,
) -> Recipe:
    """`StandardTrainerAprilUpdate`: ReLU and an L1 weighted by decoder norms, which are free.

        loss = |x_hat - x|^2 + l1 warm sum_i f_i |W_dec_i|,   f = ReLU((x - b_dec) W_enc + b_enc)

    The start is that of `dictionary_learning_standard`. The chain: gradients clipped at norm 1 (with
    PyTorch's eps), Adam (.9, .999). `b_dec` is subtracted from the input, as the trainer's default
    class `AutoEncoder` does; the Anthropic update that it is named for does not.

    Args: as `dictionary_learning_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: warm-ups or a decay that do not lie within the run.

    Example:
      >>> factory, optimizer = dictionary_learning_april(d_in=64, d_sae=256, steps=5000, l1=0.05)

    Source: dictionary_learning 0.1.0, `trainers/standard.py`.
    """
    schedule = _schedule(steps, warmup_steps, decay_start, sparsity_warmup_steps)
    factory = _relu(d_in, d_sae, l1=l1, l1_warmup=sparsity_warmup_steps or 0, decoder_norm_l1=True)
    return Recipe(factory, partial(clipped_adam, learning_rate=lr, **schedule))


@recipe
def dictionary_learning_topk(
    *,
    d_in: int,
    d_sae: int,
    k: int,
    steps: int,
    batch_size: int,
    lr: float | None = None,
    auxk_alpha: float = 1 / 32,
    warmup_steps: int = 1000,
    decay_start: int | None = None,
    first_batch: Rows | None = None,
) -> Recipe:
    """`TopKTrainer`: the k largest per row, and AuxK in OpenAI's convention.

        loss = |x_hat - x|^2 + auxk_alpha AuxK,   f = the k largest of ReLU((x - b_dec) W_enc + b_enc)
        AuxK = sum (e_hat - e)^2 / sum (e - mean_b e)^2 from the d_in // 2 strongest dead latents of each row

    Uniform decoder rows at norm 1, the encoder their transpose. The chain: the parallel gradient removed
    (eps 1e-6), gradients clipped at norm 1, Adam (.9, .999), rows to norm 1 (the dtype's machine epsilon
    added to the norm).

    Two differences. The source counts the k chosen of a row as having fired even where they are 0, so
    that on rows with fewer than k positive pre-activations latents that are 0 stay "alive"; here only what
    is above 0 has fired. On other rows the two agree. And the source keeps a threshold beside the weights
    (an average of each row's smallest feature) that training does not look at and that `encode` uses only
    where asked to; here there is none.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      k: features per row.
      steps: of the whole run.
      batch_size: rows per step, which turns tokens into steps.
      lr: learning rate; None for 2e-4 / sqrt(d_sae / 2^14).
      auxk_alpha: weight of AuxK; the Python number 0 leaves it out.
      warmup_steps: of the learning rate, from 0.
      decay_start: step at which the learning rate begins to fall; None for never.
      first_batch: rows at whose geometric median `b_dec` starts, the run's first batch there; None for 0.

    Returns:
      A `Recipe`.

    Raises:
      InputError: a warm-up or a decay that does not lie within the run, no rows in a batch.

    Example:
      >>> recipe = dictionary_learning_topk(
      ...     d_in=64, d_sae=256, k=8, steps=5000, batch_size=1024, first_batch=source.batch(0).x)

    Source: dictionary_learning 0.1.0, `trainers/top_k.py`; constants after Gao et al. 2024, appendix A.
    """
    factory = partial(
        topk, d_in, d_sae, k=k, auxk=auxk_alpha, auxk_loss=normalised, dead_after=_dead_after(batch_size)
    )
    optimizer = partial(
        projected_adam, learning_rate=_scaled(lr, d_sae), **_schedule(steps, warmup_steps, decay_start)
    )
    return Recipe(_centred(factory, first_batch), optimizer)


@recipe
def dictionary_learning_batchtopk(
    *,
    d_in: int,
    d_sae: int,
    k: int,
    steps: int,
    batch_size: int,
    lr: float | None = None,
    auxk_alpha: float = 1 / 32,
    warmup_steps: int = 1000,
    decay_start: int | None = None,
    threshold_beta: float = 0.999,
    threshold_start_step: int = 1000,
    first_batch: Rows | None = None,
) -> Recipe:
    """`BatchTopKTrainer`: the k n largest of a batch of n rows.

        loss = |x_hat - x|^2 + auxk_alpha AuxK,   f = the k n largest of ReLU((x - b_dec) W_enc + b_enc)
        threshold <- threshold_beta threshold + (1 - threshold_beta) min {f_bi > 0}    after the start step

    Start, AuxK, constants and chain are those of `dictionary_learning_topk`; what is 0 has not fired
    there either. A batch without a feature above 0, at which the source stops with an error, leaves the
    threshold as it is.

    Args:
      d_in, d_sae, steps, batch_size, lr, auxk_alpha, warmup_steps, decay_start, first_batch: as
        `dictionary_learning_topk`.
      k: mean features per row.
      threshold_beta: of the moving average.
      threshold_start_step: the last step that does not enter it; up to there the threshold is -1, and
        `encode` keeps all that is above 0.

    Returns:
      A `Recipe`.

    Raises:
      InputError: as `dictionary_learning_topk`.

    Example:
      >>> recipe = dictionary_learning_batchtopk(d_in=64, d_sae=256, k=8, steps=5000, batch_size=1024)

    Source: dictionary_learning 0.1.0, `trainers/batch_top_k.py`.
    """
    factory = partial(
        batch_topk, d_in, d_sae, k=k,
        **_batch_topk(auxk_alpha, batch_size, threshold_beta, threshold_start_step),
    )  # fmt: skip
    optimizer = partial(
        projected_adam, learning_rate=_scaled(lr, d_sae), **_schedule(steps, warmup_steps, decay_start)
    )
    return Recipe(_centred(factory, first_batch), optimizer)


@recipe
def dictionary_learning_matryoshka(
    *,
    d_in: int,
    d_sae: int,
    k: int,
    steps: int,
    batch_size: int,
    group_fractions: Sequence[float],
    group_weights: Sequence[float] | None = None,
    lr: float | None = None,
    auxk_alpha: float = 1 / 32,
    warmup_steps: int = 1000,
    decay_start: int | None = None,
    threshold_beta: float = 0.999,
    threshold_start_step: int = 1000,
    first_batch: Rows | None = None,
) -> Recipe:
    """`MatryoshkaBatchTopKTrainer`: BatchTopK whose first groups of latents have to reconstruct alone.

        loss = mean_g (w_g |x_hat_g - x|^2) + auxk_alpha AuxK,   x_hat_g from the groups up to g

    The weights are means already by default (w_g = 1 / n for n groups) and the loss takes their mean once
    more, so that each error enters at 1 / n^2: against AuxK, and against the clipping, the reconstruction
    counts n times less than the formula of the paper lets expect. Everything else is
    `dictionary_learning_batchtopk`.

    Args:
      d_in, d_sae, k, steps, batch_size, lr, auxk_alpha: as `dictionary_learning_batchtopk`.
      warmup_steps, decay_start, threshold_beta, threshold_start_step, first_batch: the same.
      group_fractions: of the latents, one per group, together 1; sizes are rounded down, the last group
        takes the rest.
      group_weights: w_g; None for 1 / n each.

    Returns:
      A `Recipe`.

    Raises:
      InputError: as `dictionary_learning_topk`; fractions that do not add up to 1 or leave a group empty,
        weights of another number.

    Example:
      >>> recipe = dictionary_learning_matryoshka(
      ...     d_in=64, d_sae=256, k=8, steps=5000, batch_size=1024, group_fractions=(0.25, 0.75))

    Source: dictionary_learning 0.1.0, `trainers/matryoshka_batch_top_k.py`.
    """
    fractions = tuple(group_fractions)
    whole = math.isclose(sum(fractions), 1)
    require(whole, f"group_fractions must add up to 1, got {fractions}")
    sizes = [int(fraction * d_sae) for fraction in fractions[:-1]]
    prefixes = (*(int(end) for end in np.cumsum(sizes)), d_sae)
    n = len(fractions)
    weights = (1 / n,) * n if group_weights is None else tuple(group_weights)
    factory = partial(
        matryoshka, d_in, d_sae, k=k, prefixes=prefixes,
        prefix_weights=tuple(weight / n for weight in weights),
        **_batch_topk(auxk_alpha, batch_size, threshold_beta, threshold_start_step),
    )  # fmt: skip
    optimizer = partial(
        projected_adam, learning_rate=_scaled(lr, d_sae), **_schedule(steps, warmup_steps, decay_start)
    )
    return Recipe(_centred(factory, first_batch), optimizer)


@recipe
def dictionary_learning_jumprelu(
    *,
    d_in: int,
    d_sae: int,
    steps: int,
    target_l0: float = 20.0,
    sparsity_penalty: float = 1.0,
    bandwidth: float = 0.001,
    lr: float = 7e-5,
    warmup_steps: int = 1000,
    sparsity_warmup_steps: int | None = 2000,
    decay_start: int | None = None,
    penalty_of_features: bool = True,
) -> Recipe:
    """`JumpReluTrainer`: a threshold per latent, and a penalty that is least at a target L0.

        loss = |x_hat - x|^2 + sparsity_penalty warm (mean_b L0_b / target_l0 - 1)^2
        f    = pi H(pi - threshold),   pi = x W_enc + b_enc

    Uniform decoder rows at norm 1, the encoder their transpose, thresholds .001. The chain: the parallel
    gradient removed (eps 1e-6), gradients clipped at norm 1, Adam (0, .999), rows to norm 1 (the dtype's
    machine epsilon added to the norm).

    Three ways of the source that its paper does not have are kept. L0 counts `f > threshold` in place of
    `pi > threshold`: half of the estimator's window is lost, and a threshold below bandwidth / 2 gets a
    gradient from every row on which its latent is silent (`penalty_of_features=False` is the paper's).
    `b_dec` is not subtracted from the input. The threshold is not kept above 0; where it falls below, the
    loss sees negative features and `encode` rectifies them.

    Args:
      d_in, d_sae, steps, lr, warmup_steps, sparsity_warmup_steps, decay_start: as
        `dictionary_learning_standard`.
      target_l0: where the penalty is least.
      sparsity_penalty: its weight.
      bandwidth: of the estimators.
      penalty_of_features: as above.

    Returns:
      A `Recipe`.

    Raises:
      InputError: warm-ups or a decay that do not lie within the run, or what `jumprelu` says.

    Example:
      >>> factory, optimizer = dictionary_learning_jumprelu(d_in=64, d_sae=256, steps=5000, target_l0=8)

    Source: dictionary_learning 0.1.0, `trainers/jumprelu.py`, `dictionary.py`.
    """
    factory = partial(
        jumprelu, d_in, d_sae, target_l0=target_l0, l0_coefficient=sparsity_penalty,
        l0_warmup=sparsity_warmup_steps or 0, penalty=losses.quadratic_mean_l0, bandwidth=bandwidth,
        threshold_init=0.001, penalty_of_features=penalty_of_features,
    )  # fmt: skip
    schedule = _schedule(steps, warmup_steps, decay_start, sparsity_warmup_steps)
    return Recipe(factory, partial(projected_adam, learning_rate=lr, b1=0.0, **schedule))


@recipe
def dictionary_learning_gated(
    *,
    d_in: int,
    d_sae: int,
    steps: int,
    l1: float = 0.1,
    lr: float = 5e-5,
    warmup_steps: int = 1000,
    sparsity_warmup_steps: int | None = 2000,
    decay_start: int | None = None,
) -> Recipe:
    """`GatedSAETrainer`: the paper's loss, its auxiliary term detached from the decoder.

        loss = |x_hat - x|^2 + l1 warm |ReLU(pi_gate)|_1 + |ReLU(pi_gate) [W_dec] + [b_dec] - x|^2

    Gaussian decoder rows at norm 1, the encoder their transpose, the rest 0. The chain is
    `ConstrainedAdam` as in `dictionary_learning_standard`, with (0, .999).

    Args: as `dictionary_learning_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: warm-ups or a decay that do not lie within the run.

    Example:
      >>> factory, optimizer = dictionary_learning_gated(d_in=64, d_sae=256, steps=5000, l1=0.05)

    Source: dictionary_learning 0.1.0, `trainers/gdm.py`, `dictionary.py`.
    """
    factory = partial(gated, d_in, d_sae, l1=l1, l1_warmup=sparsity_warmup_steps or 0)
    schedule = _schedule(steps, warmup_steps, decay_start, sparsity_warmup_steps)
    optimizer = partial(constrained_adam, learning_rate=lr, b1=0.0, **schedule)
    return Recipe(starting(factory, rows_at(1.0, gaussian=True)), optimizer)


def constrained_adam(
    learning_rate: Number,
    b1: Number = 0.9,
    warmup: Number = 0,
    steps: Number = 0,
    decay: Number = 0,
    resample: int | None = None,
) -> optax.GradientTransformation:
    """`ConstrainedAdam` under `LambdaLR`: the parallel gradient removed, Adam, decoder rows to norm 1.

    Where latents are resampled every `resample` steps, the warm-up starts again with each.
    """
    adam = _adam(learning_rate, b1, warmup, steps, decay, resample)
    chain = optax.chain(project_decoder_gradient(), adam, unit_norm_decoder())
    return chain if resample is None else resampling.dictionary_learning(chain, every=resample)


def clipped_adam(
    learning_rate: Number, b1: Number = 0.9, warmup: Number = 0, steps: Number = 0, decay: Number = 0
) -> optax.GradientTransformation:
    """The optimizer of the April update: gradients clipped at norm 1, Adam; nothing holds the decoder."""
    return optax.chain(clip_by_global_norm(1.0), _adam(learning_rate, b1, warmup, steps, decay))


def projected_adam(
    learning_rate: Number, b1: Number = 0.9, warmup: Number = 0, steps: Number = 0, decay: Number = 0
) -> optax.GradientTransformation:
    """The optimizer of TopK's family and JumpReLU: parallel gradient removed, clipping, Adam, rows to norm 1.

    The source's functions for the decoder add 1e-6 and the dtype's machine epsilon to the norms that they
    divide by.
    """
    return optax.chain(
        project_decoder_gradient(eps=1e-6),
        clip_by_global_norm(1.0),
        _adam(learning_rate, b1, warmup, steps, decay),
        unit_norm_decoder(eps=None),
    )


def _adam(
    learning_rate: Number,
    b1: Number,
    warmup: Number,
    steps: Number,
    decay: Number,
    resample: int | None = None,
) -> optax.GradientTransformation:
    factor = trapezoid(warmup, steps, decay)

    def rate(step):
        return factor(step if resample is None else step % resample)

    return optax.chain(scale_by_adam(b1), optax.scale_by_schedule(rate), optax.scale(-learning_rate))


def _schedule(
    steps: int,
    warmup_steps: int,
    decay_start: int | None,
    sparsity_warmup_steps: int | None = None,
    resample_steps: int | None = None,
) -> dict[str, int]:
    """`get_lr_schedule`'s arguments as an optimizer here takes them, its conditions checked."""

    def within(name: str, value: int | None, first: int) -> None:
        inside = value is None or first <= value < steps
        require(inside, f"{name} must be at least {first} and below steps = {steps}, got {value}")

    within("warmup_steps", warmup_steps, 0)
    within("sparsity_warmup_steps", sparsity_warmup_steps, 0)
    within("decay_start", decay_start, max(warmup_steps, sparsity_warmup_steps or 0) + 1)
    within("resample_steps", resample_steps, 1)
    both = decay_start is not None and resample_steps is not None
    require(not both, "decay_start and resample_steps exclude each other: give one of them")
    decay = 0 if decay_start is None else steps - decay_start
    schedule = {"warmup": warmup_steps, "steps": steps, "decay": decay}
    return schedule if resample_steps is None else {**schedule, "resample": resample_steps}


def _scaled(lr: float | None, d_sae: int) -> float:
    """2e-4 at 2^14 latents, falling with the root of their number (Gao et al. 2024, figure 3)."""
    return 2e-4 / (d_sae / 2**14) ** 0.5 if lr is None else lr


def _dead_after(batch_size: int) -> int:
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    return math.ceil(DEAD_TOKENS / batch_size)


def _relu(d_in: int, d_sae: int, **arguments: Any) -> Callable[..., SAE]:
    factory = partial(relu, d_in, d_sae, mean_features=False, apply_b_dec_to_input=True, **arguments)
    return starting(factory, rows_at(0.1, gaussian=True), _linear_b_enc)


def _linear_b_enc(params: Params, key: Key[Array, ""]) -> Params:
    """`b_enc` as `torch.nn.Linear` draws it, which the source draws new weights over but leaves."""
    d_in, d_sae = params["W_enc"].shape
    drawn = jax.random.uniform(jax.random.fold_in(key, 1), (d_sae,), params["b_enc"].dtype, -1, 1)
    return {**params, "b_enc": drawn * d_in**-0.5}


def _centred(factory: Callable[..., SAE], first_batch: Rows | None) -> Callable[..., SAE]:
    return factory if first_batch is None else starting(factory, b_dec_at(geometric_median(first_batch)))


def _batch_topk(auxk_alpha, batch_size, threshold_beta, threshold_start_step) -> dict[str, Any]:
    return {
        "auxk": auxk_alpha,
        "auxk_loss": normalised,
        "dead_after": _dead_after(batch_size),
        "threshold_decay": threshold_beta,
        # the source begins after that step
        "threshold_start": threshold_start_step + 1,
    }
