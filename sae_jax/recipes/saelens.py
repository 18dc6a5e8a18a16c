"""SAELens 6.54's set-ups: its architectures with its constants, and the optimizer of its trainer.

What is common to all is in `saes/sae.py` (the start, the squared error, summed over features and averaged
over the batch) and `training/sae_trainer.py` (gradients clipped together at norm 1, Adam with eps 1e-8, the
learning rate's schedule). Options bear SAELens's names and defaults, but what a factory here is swept by
(`l1`, `k`, `l0_coefficient`, `target_l0`) bears ours.

Left out: SAELens's cosine schedules, `normalize_activations` (scale the data instead), bfloat16 autocast, and
`decoder_init_norm=None`. tests/parity/test_sae_lens.py holds each recipe against the installed SAELens.
"""

from collections.abc import Sequence
from functools import partial

import optax

from sae_jax import auxk, losses, transforms
from sae_jax.architectures.batch_topk import batch_topk
from sae_jax.architectures.gated import gated
from sae_jax.architectures.jumprelu import jumprelu
from sae_jax.architectures.matryoshka import matryoshka
from sae_jax.architectures.relu import relu
from sae_jax.architectures.topk import topk
from sae_jax.base import require
from sae_jax.recipes.recipe import Recipe, recipe
from sae_jax.selection import Number

PENALTIES = {"step": losses.step_l0, "tanh": losses.tanh_l0, "quadratic": losses.quadratic_l0}
"""JumpReLU's penalties by SAELens's names of its modes."""


@recipe
def saelens_standard(
    *,
    d_in: int,
    d_sae: int,
    l1: float = 1.0,
    lp_norm: float = 1.0,
    l1_warm_up_steps: int = 0,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's standard SAE: ReLU features, and a penalty in units of the decoder's rows.

        f    = ReLU((x - b_dec) W_enc + b_enc)
        loss = mean_b sum_d (x_hat - x)^2 + l1 warm mean_b |f_i |W_dec_i||_p

    The penalty's warm-up is 0 at the first step, the learning rate's is lr / lr_warm_up_steps.

    Args:
      d_in, d_sae: sizes.
      l1: SAELens's `l1_coefficient`.
      lp_norm: p of the norm, with its root.
      l1_warm_up_steps: steps over which the penalty rises from 0.
      apply_b_dec_to_input: subtract `b_dec` from the input.
      decoder_init_norm: of the decoder's rows at the start, the encoder their transpose, biases 0.
      lr: learning rate.
      lr_warm_up_steps: steps of its linear rise.
      lr_decay_steps: steps of its linear fall to 0 at the end of the run.
      steps: of the whole run; needed where there is a decay.
      adam_beta1, adam_beta2: of Adam, whose eps is 1e-8.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes, a decay that does not fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_standard(d_in=64, d_sae=256, l1=1.0, lr_warm_up_steps=1000)

    Source: SAELens, `saes/standard_sae.py`.
    """
    factory = partial(
        relu,
        d_in,
        d_sae,
        l1=l1,
        l1_warmup=l1_warm_up_steps,
        p=lp_norm,
        lp_root=True,
        mean_features=False,
        decoder_norm_l1=True,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    return Recipe(factory, _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2))


@recipe
def saelens_topk(
    *,
    d_in: int,
    d_sae: int,
    k: int = 100,
    aux_loss_coefficient: float = 1.0,
    rescale_acts_by_decoder_norm: bool = True,
    dead_feature_window: int = 1000,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's TopK SAE, with its AuxK.

        f    = ReLU(pi) [pi among the k largest],   pi_i = ((x - b_dec) W_enc + b_enc)_i |W_dec_i|
        loss = mean_b sum_d (x_hat - x)^2 + aux_loss_coefficient min(n_dead / k_aux, 1) AuxK

    AuxK takes the k_aux = d_in // 2 largest pre-activations among dead latents as they are, below 0 too,
    where the paper rectifies them (`auxk.saelens`).

    Args:
      d_in, d_sae: sizes.
      k: features per row.
      aux_loss_coefficient: weight of AuxK.
      rescale_acts_by_decoder_norm: choose and report features in units of their decoder rows.
      dead_feature_window: a latent is dead that was silent for more steps than that before this one.
      apply_b_dec_to_input, decoder_init_norm: as in `saelens_standard`.
      lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2: as in `saelens_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes, a decay that does not fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_topk(d_in=64, d_sae=256, k=8)

    Source: SAELens, `saes/topk_sae.py`.
    """
    factory = partial(
        topk,
        d_in,
        d_sae,
        k=k,
        auxk=aux_loss_coefficient,
        auxk_loss=auxk.saelens,
        dead_after=dead_feature_window,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    return Recipe(factory, _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2))


@recipe
def saelens_batchtopk(
    *,
    d_in: int,
    d_sae: int,
    k: float = 100,
    topk_threshold_lr: float = 0.01,
    aux_loss_coefficient: float = 1.0,
    rescale_acts_by_decoder_norm: bool = True,
    dead_feature_window: int = 1000,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's BatchTopK SAE: as its TopK, with the k n largest features of a batch of n rows.

        threshold <- (1 - topk_threshold_lr) threshold + topk_threshold_lr min {f_bi > 0},   from 0

    The average starts at 0 and is not corrected for it, so that after t steps the threshold is short by
    (1 - topk_threshold_lr)^t: more than half of it in a run under 69 steps, 1 % after 460.

    Args:
      d_in, d_sae: sizes.
      k: mean features per row; need not be whole.
      topk_threshold_lr: share of the newest batch in the threshold. SAELens keeps the threshold in double
        precision; here it has the dtype of the weights.
      aux_loss_coefficient, rescale_acts_by_decoder_norm, dead_feature_window: as in `saelens_topk`.
      apply_b_dec_to_input, decoder_init_norm: as in `saelens_standard`.
      lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2: as in `saelens_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes, a decay that does not fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_batchtopk(d_in=64, d_sae=256, k=8)

    Source: SAELens, `saes/batchtopk_sae.py`.
    """
    factory = partial(
        batch_topk,
        d_in,
        d_sae,
        k=k,
        auxk=aux_loss_coefficient,
        auxk_loss=auxk.saelens,
        dead_after=dead_feature_window,
        threshold_decay=1 - topk_threshold_lr,
        threshold_init=0.0,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    return Recipe(factory, _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2))


@recipe
def saelens_matryoshka(
    *,
    d_in: int,
    d_sae: int,
    matryoshka_widths: Sequence[int],
    k: float = 100,
    topk_threshold_lr: float = 0.01,
    aux_loss_coefficient: float = 1.0,
    rescale_acts_by_decoder_norm: bool = True,
    dead_feature_window: int = 1000,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's Matryoshka BatchTopK SAE: one BatchTopK, and the sum of the errors of its prefixes.

        loss = sum_m mean_b sum_d (f[:m] W_dec[:m] + b_dec - x)^2 + aux_loss_coefficient AuxK

    AuxK reconstructs what the whole SAE leaves over. SAELens's `use_matryoshka_aux_loss`, off there by
    default, which gives each level an AuxK of its own, is not supported.

    Args:
      d_in, d_sae: sizes.
      matryoshka_widths: the m, increasing; d_sae is put at their end where it is not there, as SAELens does.
      k, topk_threshold_lr: as in `saelens_batchtopk`.
      aux_loss_coefficient, rescale_acts_by_decoder_norm, dead_feature_window: as in `saelens_topk`.
      apply_b_dec_to_input, decoder_init_norm: as in `saelens_standard`.
      lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2: as in `saelens_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes or that is not supported, no widths, a decay that does not
        fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_matryoshka(d_in=64, d_sae=256, matryoshka_widths=(32, 64, 128), k=8)

    Source: SAELens, `saes/matryoshka_batchtopk_sae.py`.
    """
    widths = tuple(matryoshka_widths)
    require(len(widths) > 0, "matryoshka_widths must name at least one width")
    factory = partial(
        matryoshka,
        d_in,
        d_sae,
        prefixes=widths if widths[-1] == d_sae else (*widths, d_sae),
        k=k,
        auxk=aux_loss_coefficient,
        auxk_loss=auxk.saelens,
        dead_after=dead_feature_window,
        threshold_decay=1 - topk_threshold_lr,
        threshold_init=0.0,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    return Recipe(factory, _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2))


@recipe
def saelens_jumprelu(
    *,
    d_in: int,
    d_sae: int,
    l0_coefficient: float = 1.0,
    l0_warm_up_steps: int = 0,
    jumprelu_sparsity_loss_mode: str = "step",
    target_l0: float | None = None,
    jumprelu_init_threshold: float = 0.01,
    jumprelu_bandwidth: float = 0.05,
    jumprelu_tanh_scale: float = 4.0,
    jumprelu_ste_to_input: bool = False,
    pre_act_loss_coefficient: float | None = None,
    dead_feature_window: int = 1000,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's JumpReLU SAE: thresholds learned as they are, kept at 0 or above.

        f    = pi H(pi - threshold),   pi = (x - b_dec) W_enc + b_enc
        loss = mean_b sum_d (x_hat - x)^2 + l0_coefficient warm penalty + pre_act_loss_coefficient pre_act

        step       mean_b L0_b,   L0_b = sum_i H(pi_bi - threshold_i)
        tanh       mean_b sum_i tanh(jumprelu_tanh_scale f_bi |W_dec_i|)
        quadratic  mean_b (2 / target_l0) (L0_b - target_l0)^2

    SAELens keeps thresholds in float32 whatever the dtype of the weights, and brings one below 0 back to 0
    at the start of the next step, so that after the last a few may be left a little below 0. Here they have
    the dtype of the weights, and are at 0 or above after every step.

    Args:
      d_in, d_sae: sizes.
      l0_coefficient: weight of the penalty.
      l0_warm_up_steps: steps over which it rises from 0.
      jumprelu_sparsity_loss_mode: "step" (DeepMind), "tanh" (Anthropic) or "quadratic" (Gemma Scope 2).
      target_l0: of the quadratic penalty; as in SAELens the others have none.
      jumprelu_init_threshold: every threshold at the start.
      jumprelu_bandwidth: of the estimators.
      jumprelu_tanh_scale: of the tanh penalty.
      jumprelu_ste_to_input: let the estimators reach the encoder too (Anthropic).
      pre_act_loss_coefficient: weight of the loss that draws dead latents back (Anthropic: 3e-6); None for
        none.
      dead_feature_window: a latent is dead that was silent for more steps than that before this one.
      apply_b_dec_to_input, decoder_init_norm: as in `saelens_standard`.
      lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2: as in `saelens_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes, no such mode, a `target_l0` missing or to no use, a decay
        that does not fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_jumprelu(d_in=64, d_sae=256, l0_coefficient=0.5)

    Source: SAELens, `saes/jumprelu_sae.py`.
    """
    mode = jumprelu_sparsity_loss_mode
    modes = ", ".join(PENALTIES)
    require(mode in PENALTIES, f"jumprelu_sparsity_loss_mode must be one of {modes}, got {mode!r}")
    aimed = mode == "quadratic"
    require(
        aimed or target_l0 is None, f"target_l0 has no part in SAELens's mode {mode!r}, only in 'quadratic'"
    )
    factory = partial(
        jumprelu,
        d_in,
        d_sae,
        l0_coefficient=l0_coefficient,
        target_l0=target_l0,
        l0_warmup=l0_warm_up_steps,
        penalty=PENALTIES[mode],
        tanh_scale=jumprelu_tanh_scale,
        bandwidth=jumprelu_bandwidth,
        threshold_init=jumprelu_init_threshold,
        ste_to_input=jumprelu_ste_to_input,
        pre_act=0.0 if pre_act_loss_coefficient is None else pre_act_loss_coefficient,
        dead_after=dead_feature_window,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    chain = _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2, thresholds=True)
    return Recipe(factory, chain)


@recipe
def saelens_gated(
    *,
    d_in: int,
    d_sae: int,
    l1: float = 1.0,
    l1_warm_up_steps: int = 0,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 0.1,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
) -> Recipe:
    """SAELens's Gated SAE: the penalty in units of the decoder's rows, the auxiliary loss attached.

        loss = mean_b sum_d (x_hat - x)^2 + l1 warm mean_b sum_i ReLU(pi_gate_i) |W_dec_i|
               + mean_b sum_d (ReLU(pi_gate) W_dec + b_dec - x)^2

    The paper keeps the last term's gradient from the decoder, so that only the gate learns from it; SAELens
    does not (`detach_auxiliary=False`), and its decoder learns a compromise.

    Args:
      d_in, d_sae: sizes.
      l1: SAELens's `l1_coefficient`.
      l1_warm_up_steps: steps over which the penalty rises from 0.
      apply_b_dec_to_input, decoder_init_norm: as in `saelens_standard`.
      lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2: as in `saelens_standard`.

    Returns:
      A `Recipe`.

    Raises:
      InputError: an option that SAELens fixes, a decay that does not fit in `steps`.

    Example:
      >>> factory, optimizer = saelens_gated(d_in=64, d_sae=256, l1=1.0)

    Source: SAELens, `saes/gated_sae.py`.
    """
    factory = partial(
        gated,
        d_in,
        d_sae,
        l1=l1,
        l1_warmup=l1_warm_up_steps,
        decoder_norm_l1=True,
        detach_auxiliary=False,
        apply_b_dec_to_input=apply_b_dec_to_input,
        decoder_init_norm=decoder_init_norm,
    )
    return Recipe(factory, _adam(lr, lr_warm_up_steps, lr_decay_steps, steps, adam_beta1, adam_beta2))


def trainer(
    learning_rate: Number,
    b1: Number,
    b2: Number,
    warmup: Number = 0,
    steps: Number = 0,
    decay: Number = 0,
    thresholds: bool = False,
) -> optax.GradientTransformation:
    """The chain of SAELens's trainer: clip at norm 1, Adam, the learning rate's schedule.

    Args:
      learning_rate, b1, b2: of Adam, whose eps is 1e-8.
      warmup, steps, decay: as in `transforms.trapezoid`; the first step is at 1 / warmup.
      thresholds: keep the leaf `threshold` at 0 or above.

    Source: SAELens, `training/sae_trainer.py` and `training/optim.py`.
    """
    return optax.chain(
        transforms.clip_by_global_norm(1.0),
        transforms.scale_by_adam(b1, b2),
        optax.scale_by_schedule(transforms.trapezoid(warmup, steps, decay, first=1.0)),
        optax.scale(-learning_rate),
        *([transforms.non_negative_threshold()] if thresholds else []),
    )


def _adam(lr, warmup, decay, steps, b1, b2, thresholds=False) -> partial[optax.GradientTransformation]:
    """`trainer` with everything bound, what does not fit together refused."""
    fits = decay == 0 or warmup + decay <= steps
    require(fits, f"lr_decay_steps needs the whole run's steps, at least {warmup + decay} here, got {steps}")
    return partial(
        trainer,
        learning_rate=lr, b1=b1, b2=b2, warmup=warmup, steps=steps, decay=decay, thresholds=thresholds,
    )  # fmt: skip
