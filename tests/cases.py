"""Every architecture and variant, one row each; test_contract.py runs every promise on every row."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sae_jax
from sae_jax import SAE, Batch, auxk, losses, resampling


class Case(NamedTuple):
    """A model and its optimizer. One object each: compiled programs are kept by identity."""

    name: str
    factory: Callable[..., SAE]
    """Takes `axis`."""
    optimizer: Callable[..., optax.GradientTransformation]
    """Takes `learning_rate`."""
    axis: str = "l1"
    """The hyper-parameter that is swept."""
    values: tuple[float, ...] = (0.01, 0.1, 0.03, 0.2, 0.0)
    """Five values of it."""
    data: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]] = lambda rows: (rows, None)
    """Inputs and targets from rows [n, 5]; None for the inputs as targets."""

    def grid(self, count: int, **axes):
        """A grid over the first values of the axis, multiplied by other axes."""
        return sae_jax.grid(**{self.axis: list(self.values[:count])}, **axes)

    def five(self, **axes):
        """Five members that differ in everything."""
        return sae_jax.zipped(**{self.axis: list(self.values)}, **axes)

    def sae(self, place: int = 1) -> SAE:
        """The SAE at one of the values."""
        return self.factory(**{self.axis: self.values[place]})

    def sized(self, d_sae: int) -> Callable[..., SAE]:
        """The factory at another width, prefixes at a quarter, a half and all of it."""
        nested = {"prefixes": (d_sae // 4, d_sae // 2, d_sae)} if "prefixes" in self.factory.keywords else {}
        return partial(self.factory, d_sae=d_sae, **nested)

    def source(self, rows: np.ndarray, batch_size: int = 1024, seed: int = 0):
        """A source of those rows."""
        x, y = self.data(rows)
        return sae_jax.in_memory(x, batch_size, seed, y=y)

    def batch(self, rows) -> Batch:
        """All rows at once."""
        x, y = self.data(np.asarray(rows))
        return Batch(jnp.asarray(x), jnp.asarray(x if y is None else y))


def adam(learning_rate) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


def unit_norm_adam(learning_rate) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate), sae_jax.transforms.unit_norm_decoder())


def field_adam(learning_rate) -> optax.GradientTransformation:
    clip, project = optax.clip_by_global_norm(1.0), sae_jax.transforms.project_decoder_gradient()
    adam = optax.adam(learning_rate, b1=0.0, b2=0.99)
    return optax.chain(project, clip, adam, sae_jax.transforms.unit_norm_decoder())


def clipped_adam(learning_rate) -> optax.GradientTransformation:
    return optax.chain(sae_jax.transforms.clip_by_global_norm(1.0), optax.adam(learning_rate))


def averaged_adam(learning_rate) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate), sae_jax.transforms.average_weights(0.9))


def jumprelu_adam(learning_rate) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate, b1=0.0), sae_jax.transforms.non_negative_threshold())


def resampled_adam(learning_rate) -> optax.GradientTransformation:
    return resampling.anthropic(unit_norm_adam(learning_rate), every=10, last=None, dead_after=3)


def with_targets(rows):
    return rows, np.tanh(rows[:, :3] - rows[:, 2:])


def two_sources(rows):
    return np.stack([rows, rows[:, ::-1] ** 2], axis=1), None


KS = (2, 3, 1, 3, 2)
L0S = (1.5, 3.0, 2.0, 5.0, 1.0)

small_batch_topk = partial(sae_jax.batch_topk, d_in=5, d_sae=7, k_max=3, dead_after=3)
small_jumprelu = partial(sae_jax.jumprelu, d_in=5, d_sae=7, bandwidth=0.5, threshold_init=0.2)
small_relu = partial(sae_jax.relu, d_in=5, d_sae=7)

CASES = [
    Case("relu", partial(sae_jax.relu, d_in=5, d_sae=6), adam),
    Case("relu-sum-over-features", partial(small_relu, mean_features=False), adam),
    Case("relu-decoder-norm-l1", partial(small_relu, decoder_norm_l1=True), adam),
    Case("relu-apply-b-dec", partial(small_relu, apply_b_dec_to_input=True), adam),
    Case("relu-tied", partial(small_relu, tied=True), adam),
    Case("relu-unit-norm", partial(small_relu), unit_norm_adam),
    Case(
        "relu-everything",
        partial(small_relu, mean_features=False, decoder_norm_l1=True, apply_b_dec_to_input=True, tied=True),
        field_adam,
    ),
    Case("relu-p-annealing", partial(small_relu, p_end=0.8, p_anneal=(5, 25), decoder_norm_l1=True), adam),
    Case("relu-lp-root", partial(small_relu, p=1.5, lp_root=True, l1_warmup=10, decoder_init_norm=0.1), adam),
    Case("relu-target-l0", partial(small_relu, l1=0.05), adam, "target_l0", L0S),
    Case("relu-resampled", small_relu, resampled_adam),
    Case("topk", partial(sae_jax.topk, d_in=5, d_sae=7, k_max=3, dead_after=3), field_adam, "k", KS),
    Case(
        "topk-saelens",
        partial(
            sae_jax.topk,
            d_in=5,
            d_sae=7,
            k_max=3,
            auxk=1.0,
            auxk_loss=auxk.saelens,
            dead_after=3,
            decoder_init_norm=0.1,
            rescale_acts_by_decoder_norm=True,
        ),
        clipped_adam,
        "k",
        KS,
    ),
    Case(
        "topk-sparsify",
        partial(
            sae_jax.topk,
            d_in=5,
            d_sae=7,
            k=2,
            auxk_loss=auxk.fvu,
            dead_after=3,
            reconstruction=losses.unexplained,
        ),
        averaged_adam,
        "auxk",
    ),
    Case(
        "topk-sparse",
        partial(sae_jax.topk, d_in=5, d_sae=7, k_max=3, dead_after=3, auxk_loss=auxk.normalised, sparse=True),
        field_adam,
        "k",
        KS,
    ),
    Case("batch-topk", partial(small_batch_topk, auxk_loss=auxk.attached), field_adam, "k", KS),
    Case("batch-topk-sparse", partial(small_batch_topk, auxk_loss=auxk.fvu, sparse=True), adam, "k", KS),
    Case("batch-topk-rescaled", partial(small_batch_topk, rescale_acts_by_decoder_norm=True), adam, "k", KS),
    Case("jumprelu", small_jumprelu, jumprelu_adam, "l0_coefficient"),
    Case(
        "jumprelu-tanh",
        partial(small_jumprelu, penalty=losses.tanh_l0, pre_act=0.01, ste_to_input=True, dead_after=3),
        adam,
        "l0_coefficient",
    ),
    Case("jumprelu-target-l0", partial(small_jumprelu, l0_coefficient=0.1), adam, "target_l0", L0S),
    Case(
        "jumprelu-quadratic",
        partial(small_jumprelu, penalty=losses.quadratic_l0, log_threshold=True, apply_b_dec_to_input=True),
        adam,
        "target_l0",
        L0S,
    ),
    Case("gated", partial(sae_jax.gated, d_in=5, d_sae=7), field_adam),
    Case(
        "gated-saelens",
        partial(sae_jax.gated, d_in=5, d_sae=7, detach_auxiliary=False, decoder_norm_l1=True),
        adam,
    ),
    Case("gated-target-l0", partial(sae_jax.gated, d_in=5, d_sae=7), adam, "target_l0", L0S),
    Case(
        "matryoshka", partial(sae_jax.matryoshka, d_in=5, d_sae=7, prefixes=(2, 4, 7), k_max=3), adam, "k", KS
    ),
    Case(
        "matryoshka-relu",
        partial(sae_jax.matryoshka, d_in=5, d_sae=7, prefixes=(3, 7), of=sae_jax.relu, mean_features=False),
        adam,
    ),
    Case(
        "transcoder",
        partial(sae_jax.transcoder, d_in=5, d_sae=7, d_out=3, mean_features=False),
        unit_norm_adam,
        data=with_targets,
    ),
    Case(
        "transcoder-topk-skip",
        partial(sae_jax.transcoder, d_in=5, d_sae=7, d_out=3, of=sae_jax.topk, skip=True, k_max=3),
        adam,
        "k",
        KS,
        with_targets,
    ),
    Case(
        "transcoder-jumprelu-skip",
        partial(sae_jax.transcoder, d_in=5, d_sae=7, d_out=3, of=sae_jax.jumprelu, skip=True),
        adam,
        "l0_coefficient",
        data=with_targets,
    ),
    Case("crosscoder", partial(sae_jax.crosscoder, d_in=5, d_sae=7), clipped_adam, data=two_sources),
]


THOROUGH = [
    case
    for case in CASES
    if case.name
    in (
        "relu-everything",
        "relu-target-l0",
        "relu-resampled",
        "topk-saelens",
        "topk-sparsify",
        "topk-sparse",
        "batch-topk",
        "jumprelu-tanh",
        "gated-target-l0",
        "matryoshka",
        "transcoder-topk-skip",
        "crosscoder",
    )
]
"""Each architecture, and each kind of state, once: for the promises that no further variant can break."""


def weights(sae: SAE, dtype=np.float32, seed: int = 1) -> dict[str, np.ndarray]:
    """Weights of which nothing is 0, thresholds above it, as they are after training."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    params = {name: 0.5 * rng.normal(size=leaf.shape) for name, leaf in shapes.items()}
    if "threshold" in params:
        params["threshold"] = rng.uniform(0.1, 0.6, params["threshold"].shape)
    return {name: np.asarray(leaf, dtype) for name, leaf in params.items()}
