"""Set-ups from papers, posts and the code that came with them: each constant as its source has it.

Every recipe names its batch size: that is the data source's to set. What the sources do to inputs before
training (layer norm, a fixed norm) is told too, and not done here: see `sae_jax.normalise`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from optax.contrib import schedule_free, schedule_free_eval_params

from sae_jax import activations, auxk, losses, resampling
from sae_jax.architectures.jumprelu import jumprelu
from sae_jax.architectures.relu import relu
from sae_jax.architectures.topk import topk
from sae_jax.base import InputError, Params, require
from sae_jax.initialisation import Change, b_dec_at, geometric_median, rows_at, scaled_rows, starting
from sae_jax.recipes.recipe import Recipe, recipe
from sae_jax.transforms import (
    average_weights,
    clip_by_global_norm,
    project_decoder_gradient,
    scale_by_adam,
    trapezoid,
    unit_norm_decoder,
)

Rows = Float[Array | np.ndarray, "n d_in"]

MEDIAN_ROWS = 32_768
"""How many rows a geometric median is taken from, as in openai's `init_from_data_`."""


@recipe
def seed(*, d_in: int = 4, d_sae: int = 6, l1: float = 0.1) -> Recipe:
    """The blog post that this project starts from: a plain ReLU SAE on eight tokens.

        loss = mean (x_hat - x)^2 + l1 mean |f|,   f = ReLU(x W_enc + b_enc)

    Both means are over every element, the weights drawn as `torch.nn.Linear` draws them, nothing
    constrained, all eight rows in each batch. The post publishes neither width, weight, rate nor optimizer:
    six features are those of its figure; Adam at 1e-2, l1 .1 and 500 steps are what comes near it.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l1: weight of the penalty.

    Returns:
      A `Recipe`.

    Example:
      >>> sweep(*recipes.seed(), grid=grid(seed=range(64)), source=in_memory(seed_tokens()), steps=500)

    Source: docs/seed.md.
    """

    def optimizer(learning_rate: Any = 1e-2) -> optax.GradientTransformation:
        return _adam(learning_rate)

    return Recipe(partial(relu, d_in, d_sae, l1=l1), optimizer)


@recipe
def anthropic_2023(*, d_in: int, d_sae: int, l1: float, x: Rows | None = None) -> Recipe:
    """ "Towards Monosemanticity": unit decoder rows, a tied pre-encoder bias, and resampling.

        f    = ReLU((x - b_dec) W_enc + b_enc)
        loss = mean_b |x_hat - x|^2 + l1 mean_b |f|_1

    `b_dec` starts at the geometric median of the data, `b_enc` at 0. Each step removes from the gradient
    what is parallel to the decoder's rows, takes Adam's step, and brings the rows back to norm 1; the
    learning rate does not decay. At steps 25,000, 50,000, 75,000 and 100,000 latents that were silent for
    12,500 start again (`resampling.anthropic`, from the rows of one batch where the post draws from
    819,200). Batches of 8,192 rows.

    Not confirmed, for want of the post's own text: the learning rate (1e-4 here), Adam's betas (.9, .999),
    and the draw of the weights (here as `torch.nn.Linear` draws them, decoder rows brought to norm 1).

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l1: weight of the penalty; the post's widest run, with 131,072 latents, has .004.
      x: rows of the data, for the geometric median; None starts `b_dec` at 0.

    Returns:
      A `Recipe`.

    Raises:
      InputError: `x` without rows, or a negative `l1`.

    Example:
      >>> factory, optimizer = recipes.anthropic_2023(d_in=512, d_sae=4096, l1=0.004, x=rows)

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendices on the autoencoder's training and on
    neuron resampling.
    """
    factory = partial(relu, d_in, d_sae, l1=l1, mean_features=False, apply_b_dec_to_input=True)

    def optimizer(learning_rate: Any = 1e-4) -> optax.GradientTransformation:
        chain = optax.chain(project_decoder_gradient(), _adam(learning_rate), unit_norm_decoder())
        return resampling.anthropic(chain, every=25_000, last=100_000, dead_after=12_500)

    return Recipe(starting(factory, _unit_decoder_zero_biases, *_at_median(x)), optimizer)


@recipe
def anthropic_april_2024(*, d_in: int, d_sae: int, steps: int, l1: float = 5.0) -> Recipe:
    """Anthropic's update of April 2024: free decoder rows, whose norms weigh the penalty.

        f    = ReLU(x W_enc + b_enc)
        loss = mean_b |x_hat - x|^2 + l1 mean_b sum_i f_i |W_dec_i|

    Decoder rows start in random directions at norm .1 (the post: a fixed norm of .05 to 1), the encoder as
    their transpose, biases at 0. The penalty rises from 0 over the first 5 % of the steps; the learning
    rate falls to 0 over the last 20 %; gradients are clipped together at norm 1; Adam has (.9, .999) and no
    weight decay. No resampling. Batches of 2,048 or 4,096 rows.

    Inputs are to be scaled so that their mean norm is sqrt(d_in): `normalise.mean_norm`. Only with that is
    l1 = 5 a weight of the right size.

    Confirmed from public code that quotes the post: the start, the scale of the inputs, Adam's betas, no
    weight decay, l1 = 5. Not confirmed, for want of the post's own text: the learning rate, the shares of
    both schedules, the clipping, and the batch size.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      steps: of the whole run; both schedules are shares of it.
      l1: weight of the penalty; 5 is the post's default.

    Returns:
      A `Recipe`.

    Raises:
      InputError: `steps` under 1, or a negative `l1`.

    Example:
      >>> factory, optimizer = recipes.anthropic_april_2024(d_in=512, d_sae=4096, steps=200_000)

    Source: Anthropic, Circuits Updates April 2024, "Update on how we train SAEs".
    """
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    factory = partial(
        relu, d_in, d_sae, l1=l1, l1_warmup=steps // 20,
        mean_features=False, decoder_norm_l1=True, decoder_init_norm=0.1,
    )  # fmt: skip
    factor = trapezoid(steps=steps, decay=steps // 5)

    def optimizer(learning_rate: Any = 5e-5) -> optax.GradientTransformation:
        return optax.chain(clip_by_global_norm(1.0), _adam(learning_rate, factor))

    return Recipe(starting(factory, rows_at(0.1, gaussian=True)), optimizer)


@recipe
def openai_topk(
    *, d_in: int, d_sae: int, k: int = 32, batch_size: int = 131_072, x: Rows | None = None
) -> Recipe:
    """OpenAI's TopK SAE: AuxK, unit decoder rows, and an average of the weights.

        f    = ReLU(pi) [pi among the k largest],   pi = (x - b_dec) W_enc + b_enc
        loss = sum |x_hat - x|^2 / sum |x - mean_b x|^2 + AuxK / 32

    The encoder is drawn as a `torch.nn.Linear` without bias, the decoder is its transpose at norm 1, and
    the encoder is then divided by the mean norm of what 256 random unit vectors are reconstructed to.
    `b_dec` starts at the geometric median of 32,768 rows. AuxK lets each row use 256 latents that were
    silent for 10,000,000 tokens. A step normalises the decoder, projects the gradient, and takes Adam's
    step (.9, .999, eps 6.25e-10) last, so the weights in training are off norm 1 by one step. What is
    evaluated is the average of the weights, of decay .999.

    Inputs go through a layer norm per row (`normalise.layer_normed`). Differences: the source takes the
    loss's denominator once from a sample and here each batch has its own; its average is one step behind; a
    feature under 1e-3 does not count as fired there; and its AuxK has one more path to `b_dec`, through the
    decoder's bias. The code clips no gradients by default, and neither does this; whether and where the
    paper clips could not be confirmed.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      k: features per row; where k is swept, the start of every member is scaled for this one.
      batch_size: rows per step, which turns tokens into steps.
      x: rows of the data, for the geometric median; None starts `b_dec` at 0.

    Returns:
      A `Recipe`.

    Raises:
      InputError: `x` without rows, `batch_size` under 1, or a `k` outside [1, d_sae].

    Example:
      >>> factory, optimizer = recipes.openai_topk(d_in=768, d_sae=32_768, k=32, x=rows)

    Source: openai/sparse_autoencoder, `train.py` (`Config`, `training_loop_`, `init_from_data_`); Gao et al.
    2024 (arXiv 2406.04093), appendix A.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    factory = partial(
        topk, d_in, d_sae, k=k, auxk=1 / 32, auxk_loss=auxk.normalised, k_aux=256,
        dead_after=10_000_000 // batch_size, reconstruction=losses.unexplained,
    )  # fmt: skip

    def optimizer(learning_rate: Any = 1e-4) -> optax.GradientTransformation:
        return optax.chain(
            project_decoder_gradient(),
            _adam(learning_rate, eps=6.25e-10),
            unit_norm_decoder(before_update=True),
            average_weights(0.999),
        )

    return Recipe(starting(factory, partial(_openai_rows, k=k), *_at_median(x)), optimizer)


@recipe
def sparsify_topk(*, d_in: int, d_sae: int, k: int = 32, x: Rows | None = None) -> Recipe:
    """EleutherAI's sparsify: TopK trained by schedule-free signs of the gradient.

        f    = ReLU(pi) [pi among the k largest],   pi = (x - b_dec) W_enc + b_enc
        loss = sum |x_hat - x|^2 / sum |x - mean_b x|^2

        z <- z - lr sign(g(y));   a <- (1 - c) a + c z,  c = 1 / t;   y <- .05 z + .95 a

    Gradients are taken at y, the weights in training; the weights that are evaluated and saved are the
    average a, as in the source, and `train.trained_params` gives them. Between steps y's decoder is brought
    to norm 1 and the gradient's parallel part removed; a's rows are near norm 1, not at it, there as here.

    The encoder is drawn as a `torch.nn.Linear` with its bias at 0, the decoder is its transpose at norm 1,
    and `b_dec` starts at the mean of the first batch. AuxK is there with weight 0, so it is left out. The
    learning rate has no schedule. Batches of 32 sequences.

    Args:
      d_in: width of the activations.
      d_sae: number of latents; the learning rate falls with its root.
      k: features per row.
      x: the first batch, for its mean; None starts `b_dec` at 0.

    Returns:
      A `Recipe`.

    Raises:
      InputError: `x` without rows, or a `k` outside [1, d_sae].

    Example:
      >>> factory, optimizer = recipes.sparsify_topk(d_in=768, d_sae=24_576, x=source.batch(0).x)

    Source: eai-sparsify 1.3.3, `sparse_coder.py`, `trainer.py`, `config.py`, `sign_sgd.py`; Defazio et al.
    2024 (arXiv 2405.15682), as schedulefree 1.4.1's `ScheduleFreeWrapper` has it.
    """
    require(x is None or len(x) > 0, "the mean of no rows is not defined")
    factory = partial(topk, d_in, d_sae, k=k, auxk=0.0, auxk_loss=auxk.fvu, reconstruction=losses.unexplained)
    at_mean = () if x is None else (b_dec_at(jnp.asarray(x).mean(axis=0)),)

    def optimizer(learning_rate: Any = 5e-3 / (d_sae / 2**14) ** 0.5) -> optax.GradientTransformation:
        signs = schedule_free(optax.sign_sgd(learning_rate), learning_rate, b1=0.95)
        return optax.chain(project_decoder_gradient(), _keeping_average(signs), unit_norm_decoder(eps=None))

    return Recipe(starting(factory, _encoder_rows, *at_mean), optimizer)


@recipe
def gemma_scope(*, d_in: int, d_sae: int, l0_coefficient: float) -> Recipe:
    """Gemma Scope: JumpReLU with a penalty on L0.

        f    = pi H(pi - threshold),   pi = (x - b_dec) W_enc + b_enc
        loss = mean_b |x_hat - x|^2 + l0_coefficient warm mean_b L0_b

    Decoder rows are drawn uniformly and brought to norm 1, the encoder is their transpose, biases are 0,
    every threshold .001, the estimators' bandwidth .001. The penalty rises from 0 over 10,000 steps, the
    learning rate from a tenth to the whole 7e-5 over 1,000, along a cosine. A step removes the gradient
    parallel to the decoder's rows, takes Adam's step (0, .999, eps 1e-8) and brings the rows to norm 1.
    Batches of 4,096 rows.

    Inputs are to be scaled to a mean squared norm of 1 (`normalise.unit_mean_square`); bandwidth and
    threshold are in that unit. Not confirmed: that what is learned is the threshold's logarithm, which keeps
    it above 0; the report does not say how it is kept there, and the JumpReLU paper's text could not be had.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l0_coefficient: weight of the penalty, which the report sweeps.

    Returns:
      A `Recipe`.

    Raises:
      InputError: a negative weight.

    Example:
      >>> factory, optimizer = recipes.gemma_scope(d_in=2304, d_sae=16_384, l0_coefficient=6e-4)

    Source: Lieberum et al. 2024 (arXiv 2408.05147), sections 3.1 and 3.2; Rajamanoharan et al. 2024 (arXiv
    2407.14435).
    """
    factory = partial(_gemma_jumprelu, d_in, d_sae, l0_coefficient=l0_coefficient, l0_warmup=10_000)
    return Recipe(factory, _gemma_optimizer)


@recipe
def gemma_scope_2(*, d_in: int, d_sae: int, target_l0: float, l0_coefficient: float = 1e-3) -> Recipe:
    """Gemma Scope 2: as `gemma_scope`, with a penalty that is least at a target L0.

        loss = mean_b |x_hat - x|^2 + l0_coefficient warm mean_b (2 / target_l0) (L0_b - target_l0)^2

    The penalty rises over 50,000 steps in place of 10,000; everything else is `gemma_scope`.

    Left out, because the report gives no numbers for them: a second penalty on latents that fire often,
    and the prefixes of its Matryoshka training (`matryoshka(of=jumprelu, prefixes=...)` is there for it).
    The weight of the penalty is not published either: the default is ours.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      target_l0: mean number of active latents to arrive at; the report has 10 to 150.
      l0_coefficient: weight of the penalty.

    Returns:
      A `Recipe`.

    Raises:
      InputError: a negative weight, or a `target_l0` outside (0, d_sae].

    Example:
      >>> factory, optimizer = recipes.gemma_scope_2(d_in=1152, d_sae=16_384, target_l0=50)

    Source: McDougall et al. 2025, "Gemma Scope 2 - Technical Paper", equation 5 and section 3.2.
    """
    factory = partial(
        _gemma_jumprelu, d_in, d_sae, target_l0=target_l0, l0_coefficient=l0_coefficient,
        l0_warmup=50_000, penalty=losses.quadratic_l0,
    )  # fmt: skip
    return Recipe(factory, _gemma_optimizer)


# What several share

_gemma_jumprelu = partial(
    jumprelu, bandwidth=0.001, threshold_init=0.001, log_threshold=True,
    apply_b_dec_to_input=True, decoder_init_norm=1.0,
)  # fmt: skip


def _gemma_optimizer(learning_rate: Any = 7e-5) -> optax.GradientTransformation:
    adam = _adam(learning_rate, cosine_warmup(0.1, 1000), b1=0.0)
    return optax.chain(project_decoder_gradient(), adam, unit_norm_decoder())


def cosine_warmup(first: float, steps: int) -> optax.Schedule:
    """A factor that rises along half a cosine from `first` at step 0 to 1 at step `steps`."""

    def factor(step):
        share = jnp.minimum(jnp.asarray(step, float) / steps, 1)
        return first + (1 - first) * (1 - jnp.cos(jnp.pi * share)) / 2

    return factor


def _adam(
    learning_rate: Any, factor: optax.Schedule | None = None, b1: float = 0.9, eps: float = 1e-8
) -> optax.GradientTransformation:
    scheduled = () if factor is None else (optax.scale_by_schedule(factor),)
    return optax.chain(scale_by_adam(b1, 0.999, eps), *scheduled, optax.scale(-learning_rate))


def _at_median(x: Rows | None) -> tuple[Change, ...]:
    return () if x is None else (b_dec_at(geometric_median(x[:MEDIAN_ROWS])),)


def _unit_decoder_zero_biases(params: Params, key: Key[Array, ""]) -> Params:
    biases = {name: jnp.zeros_like(params[name]) for name in ("b_enc", "b_dec")}
    return {**params, **biases, "W_dec": scaled_rows(params["W_dec"], 1.0)}


def _encoder_rows(params: Params, key: Key[Array, ""]) -> Params:
    """The encoder as `torch.nn.Linear` draws it, U(+-1/sqrt(d_in)); the decoder its transpose at norm 1."""
    d_in = params["W_enc"].shape[0]
    W_enc = jax.random.uniform(key, params["W_enc"].shape, params["W_enc"].dtype, -1, 1) * d_in**-0.5
    return {**params, "W_enc": W_enc, "W_dec": scaled_rows(W_enc.T, 1.0)}


def _openai_rows(params: Params, key: Key[Array, ""], k: int) -> Params:
    """`_encoder_rows`, with the encoder scaled so that random unit vectors keep their norm on average."""
    params = _encoder_rows(params, key)
    W_enc, W_dec = params["W_enc"], params["W_dec"]
    drawn = jax.random.normal(jax.random.fold_in(key, 1), (256, W_enc.shape[0]), W_enc.dtype)
    x_hat = activations.topk(scaled_rows(drawn, 1.0) @ W_enc, k) @ W_dec
    return {**params, "W_enc": W_enc / jnp.linalg.norm(x_hat, axis=-1).mean()}


class ScheduleFreeAverage(NamedTuple):
    """A schedule-free state, and the average that is evaluated, where `train.trained_params` looks for it."""

    inner: Any
    average: Params


def _keeping_average(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A schedule-free optimizer that keeps `a = (y - (1 - b1) z) / b1` in its state."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return ScheduleFreeAverage(optimizer.init(params), jax.tree.map(jnp.asarray, params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise InputError("schedule_free needs the params: optimizer.update(grads, state, params)")
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        average = schedule_free_eval_params(inner, optax.apply_updates(params, updates))
        return updates, ScheduleFreeAverage(inner, average)

    return optax.GradientTransformationExtraArgs(init, update)
