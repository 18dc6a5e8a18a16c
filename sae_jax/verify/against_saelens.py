"""The recipes of SAELens against the installed SAELens: its own SAE classes under its own trainer.

Both sides start from the weights that SAELens draws and see the same batches. Compared are

  forward  f and x_hat of the first batch, by the SAE that each side would save (SAELens saves a BatchTopK
           or Matryoshka SAE as a JumpReLU SAE, and folds decoder norms into the weights);
  loss     each term of the loss and the loss itself, at the first step and at the last, and L0 at every
           step: an error of 1e-5 there means that no latent was active on one side alone;
  trained  every parameter after the last step, and f and x_hat of the last batch by what would be saved.

In float64 SAELens's JumpReLU keeps its thresholds in float32. They are made float64 by hand for the
comparison in that dtype, so that what is compared to 1e-9 is the whole of the arithmetic; the comparison in
float32 runs SAELens as it is.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.base import Batch, InputError, Params, require
from sae_jax.recipes import saelens
from sae_jax.recipes.recipe import Recipe
from sae_jax.train import make_step, state_from
from sae_jax.verify.harness import BOUNDS, Report, relative_error

if TYPE_CHECKING:
    from sae_lens import SAETrainer

D_IN, D_SAE, ROWS = 16, 64, 64

TIGHT = {
    "float64": BOUNDS["float64"],
    "float32": {"forward": 1e-5, "loss": 1e-5, "trained": 1e-5},
}
"""The largest relative error allowed, by dtype and stage."""


class Case(NamedTuple):
    """One of SAELens's architectures under one set of options, all by SAELens's names."""

    architecture: str
    model: dict[str, Any]
    training: dict[str, Any]


RECIPES: dict[str, Callable[..., Recipe]] = {
    "standard": saelens.saelens_standard,
    "topk": saelens.saelens_topk,
    "batchtopk": saelens.saelens_batchtopk,
    "matryoshka_batchtopk": saelens.saelens_matryoshka,
    "jumprelu": saelens.saelens_jumprelu,
    "gated": saelens.saelens_gated,
}

SCHEDULE = {"lr": 3e-4, "lr_warm_up_steps": 10, "lr_decay_steps": 20}
"""SAELens's own learning rate. At 1e-3 the last bit of float32 decides which side of its threshold a latent
of the tanh case is on, and from there the two runs part by 1e-4; in float64 they do not."""
DYING = {**SCHEDULE, "dead_feature_window": 5}
"""So short that latents are dead for AuxK to revive within a run."""
L1 = {"l1_coefficient": 0.3, "l1_warm_up_steps": 30}
NESTED = {"k": 4, "matryoshka_widths": [8, 24]}
RAW = {"rescale_acts_by_decoder_norm": False}
STEP = {"l0_coefficient": 0.05, "l0_warm_up_steps": 30}
TANH = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_ste_to_input": True,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_bandwidth": 0.5,
    "pre_act_loss_coefficient": 1e-2,
    "l0_coefficient": 0.2,
    "l0_warm_up_steps": 30,
}
QUADRATIC = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 6.0, "l0_coefficient": 0.01}

CASES: dict[str, Case] = {
    "saelens_standard": Case("standard", L1, SCHEDULE),
    "saelens_standard, lp_norm 2": Case(
        "standard",
        {**L1, "lp_norm": 2.0, "apply_b_dec_to_input": False},
        {**SCHEDULE, "adam_beta1": 0.0, "adam_beta2": 0.99},
    ),
    "saelens_topk": Case("topk", {"k": 4}, DYING),
    "saelens_topk, not rescaled": Case("topk", {"k": 4, "aux_loss_coefficient": 0.5, **RAW}, DYING),
    "saelens_batchtopk": Case("batchtopk", {"k": 3.5}, DYING),
    "saelens_batchtopk, not rescaled": Case("batchtopk", {"k": 3.5, "topk_threshold_lr": 0.1, **RAW}, DYING),
    "saelens_matryoshka": Case("matryoshka_batchtopk", NESTED, DYING),
    "saelens_matryoshka, not rescaled": Case("matryoshka_batchtopk", {**NESTED, **RAW}, DYING),
    "saelens_jumprelu, step": Case("jumprelu", STEP, SCHEDULE),
    "saelens_jumprelu, tanh": Case("jumprelu", TANH, DYING),
    "saelens_jumprelu, quadratic": Case("jumprelu", QUADRATIC, SCHEDULE),
    "saelens_gated": Case("gated", L1, SCHEDULE),
}

OURS = {"l1_coefficient": "l1"}
"""SAELens's names of options to those of the recipes, where they differ."""


class Side(NamedTuple):
    """What one side has seen and has arrived at."""

    logs: dict[str, np.ndarray]
    """Terms of the loss, the loss, and L0 by our names, [steps]."""
    weights: dict[str, np.ndarray]
    """What SAELens's terms have been multiplied by and ours have not, [steps]."""
    forward: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def against_saelens(steps: int = 100) -> Iterator[tuple[str, Report]]:
    """Hold every recipe of SAELens against the installed SAELens, in float64 and float32.

    Args:
      steps: training steps, above 30, which the schedules take.

    Yields:
      Case name and `Report`, as each is done.

    Raises:
      InputError: SAELens is not installed, or too few steps.

    Example:
      >>> all(report.ok for _, report in against_saelens())
    """
    require(steps > 30, f"steps must be above 30, which the schedules take, got {steps}")
    for name, case in CASES.items():
        for dtype in TIGHT:
            yield name, report(*sides(case, dtype, steps), dtype, steps)


def sides(case: Case, dtype: str, steps: int) -> tuple[Side, Side]:
    """Our side and SAELens's."""
    batches = data(steps)
    start, theirs = train_there(case, batches, dtype)
    return train_here(recipe_of(case, steps), start, batches, dtype), theirs


def report(ours: Side, theirs: Side, dtype: str, steps: int) -> Report:
    """The relative errors of our side."""
    loss = {"l0, every step": relative_error(ours.logs["l0"], theirs.logs["l0"])}
    for name, log in theirs.logs.items():
        weighted = ours.logs[name] * theirs.weights.get(name, np.ones(steps))
        loss[f"{name}, first step"] = relative_error(weighted[:1], log[:1])
        loss[f"{name}, last step"] = relative_error(weighted[-1:], log[-1:])
    errors = {
        "forward": _errors(ours.forward, theirs.forward),
        "loss": loss,
        "trained": _errors(ours.trained, theirs.trained),
    }
    means = {name: float(log.mean()) for name, log in ours.logs.items()}
    return Report(dtype, steps, errors, TIGHT[dtype], means)


def data(steps: int) -> np.ndarray:
    """[steps, rows, d_in]: sparse sums of a few directions, so that latents have something to find."""
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(24, D_IN))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    active = draw.random((steps, ROWS, 24)) < 0.15
    x = (active * draw.uniform(0.5, 1.5, active.shape)) @ directions
    # both sides are given the same float32 numbers
    return (x + 0.05 * draw.normal(size=x.shape) + 0.2).astype(np.float32)


def recipe_of(case: Case, steps: int) -> Recipe:
    """The case's recipe, its options by our names."""
    options = {OURS.get(name, name): value for name, value in {**case.model, **case.training}.items()}
    return RECIPES[case.architecture](d_in=D_IN, d_sae=D_SAE, steps=steps, **options)


def train_here(recipe: Recipe, start: Params, batches: np.ndarray, dtype: str) -> Side:
    """Our side, from these weights."""
    sae, optimizer = recipe.factory(), recipe.optimizer()

    def used(params: Params, x: np.ndarray) -> dict[str, np.ndarray]:
        f = sae.encode(params, jnp.asarray(x, dtype))
        return {"f": np.asarray(f), "x_hat": np.asarray(sae.decode(params, f))}

    # Default matrix products on an accelerator round to fewer bits than the dtype has.
    with jax.default_matmul_precision("highest"), jax.enable_x64(dtype == "float64"):
        params = {name: jnp.asarray(leaf, dtype) for name, leaf in start.items()}
        forward, state, logs = used(params, batches[0]), state_from(params, optimizer), []
        step = jax.jit(make_step(sae, optimizer))
        for x in jnp.asarray(batches, dtype):
            state, log = step(state, Batch(x, x))
            logs.append(jax.tree.map(float, log))
        trained = {name: np.asarray(leaf) for name, leaf in state.params.items()}
        return Side(_over_steps(logs), {}, forward, {**trained, **used(state.params, batches[-1])})


def train_there(case: Case, batches: np.ndarray, dtype: str) -> tuple[Params, Side]:
    """The weights that SAELens starts from, and its side."""
    trainer = trainer_there(case, batches, dtype)
    start, forward, logs, factors = weights(trainer), saved(trainer, batches[0]), [], []
    for x in trainer.data_provider:
        factors.append(_factors(trainer))
        logs.append(_logs(trainer.step(x)))
        # what `SAETrainer.fit` does between steps, as far as it touches the numbers
        trainer.n_training_steps += 1
    trained = {**weights(trainer), **saved(trainer, batches[-1])}
    return start, Side(_over_steps(logs), _over_steps(factors), forward, trained)


def trainer_there(case: Case, batches: np.ndarray, dtype: str) -> "SAETrainer[Any, Any]":
    """SAELens's trainer around its SAE, with the batches as its data provider.

    Raises:
      InputError: SAELens is not installed.
    """
    try:
        import sae_lens
    except ImportError:
        raise InputError("the comparison with SAELens needs SAELens: pip install sae-lens") from None
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    model, config = get_sae_training_class(case.architecture)
    torch.manual_seed(0)
    # SAELens appends to the list of widths that it is given
    sae = model(config(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **copy.deepcopy(case.model)))
    threshold = dict(sae.named_parameters()).get("threshold")
    if threshold is not None:
        sae.threshold = torch.nn.Parameter(threshold.detach().to(sae.dtype))
    steps, rows, _ = batches.shape
    settings = SAETrainerConfig(
        total_training_samples=steps * rows,
        train_batch_size_samples=rows,
        # its other schedules look at this one; without it there is no trainer
        lr_end=case.training["lr"] / 10,
        logger=LoggingConfig(log_to_wandb=False),
        **case.training,
    )
    return sae_lens.SAETrainer(settings, sae, iter(torch.as_tensor(batches).to(sae.dtype)))


def weights(trainer: "SAETrainer[Any, Any]") -> Params:
    """SAELens's weights by our names; thresholds brought back to 0 as its next step would do."""
    state = {name: tensor.numpy().copy() for name, tensor in trainer.sae.state_dict().items()}
    if "topk_threshold" in state:
        state["threshold"] = state.pop("topk_threshold")
    if "threshold" in state:
        state["threshold"] = np.asarray(np.maximum(state["threshold"], 0))
    return state


def saved(trainer: "SAETrainer[Any, Any]", x: np.ndarray) -> dict[str, np.ndarray]:
    """f and x_hat by the SAE that SAELens would save."""
    import torch
    from sae_lens import SAE

    config = trainer.sae.cfg.get_inference_sae_cfg_dict()
    state = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    trainer.sae.process_state_dict_for_saving_inference(state)
    sae = SAE.from_dict(config)
    sae.load_state_dict(state)
    with torch.no_grad():
        f = sae.encode(torch.as_tensor(x).to(sae.dtype))
        return {"f": f.numpy(), "x_hat": sae.decode(f).numpy()}


def _logs(output: Any) -> dict[str, float]:
    """A step's terms of the loss by our names, its loss and its L0."""
    terms = {name: value.item() for name, value in output.losses.items()}
    is_gated = "l1_loss" in terms and "auxiliary_reconstruction_loss" in terms
    names = {
        "l1_loss": "sparsity",
        "l0_loss": "sparsity",
        "pre_act_loss": "pre_act",
        "auxiliary_reconstruction_loss": "auxiliary" if is_gated else "auxk",
    }
    return {
        "loss": output.loss.item(),
        "l0": (output.feature_acts > 0).sum(dim=-1).double().mean().item(),
        # Matryoshka's inner levels beside it
        "reconstruction": sum(value for name, value in terms.items() if "mse_loss" in name),
        **{names[name]: value for name, value in terms.items() if name in names},
    }


def _factors(trainer: "SAETrainer[Any, Any]") -> dict[str, float]:
    """What SAELens multiplies its terms by at the step to come, by our names of the terms."""
    config = trainer.sae.cfg
    factors = {
        "sparsity": sum(trainer.get_coefficients().values()),
        "auxk": getattr(config, "aux_loss_coefficient", None),
        "pre_act": getattr(config, "pre_act_loss_coefficient", None),
    }
    return {name: factor for name, factor in factors.items() if factor is not None}


def _errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: relative_error(ours[name], theirs[name]) for name in ours.keys() | theirs.keys()}


def _over_steps(logs: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([log[name] for log in logs]) for name in logs[0]}
