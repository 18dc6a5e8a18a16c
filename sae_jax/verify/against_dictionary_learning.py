"""The recipes of dictionary_learning against its installed trainers: the same starts, batches and numbers."""

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.base import Batch, InputError, require
from sae_jax.recipes import dictionary_learning as recipes
from sae_jax.recipes.recipe import Recipe
from sae_jax.train import make_step, state_from
from sae_jax.verify.harness import Report, relative_error

if TYPE_CHECKING:
    import torch

STAGES = ("forward", "loss", "gradients", "trained")
BOUNDS = {
    "float64": {**dict.fromkeys(STAGES, 1e-9), "float32 there": 1e-6},
    "float32": dict.fromkeys(STAGES, 1e-5),
}
"""The largest relative error allowed, by dtype and stage.

The stage `float32 there` holds what their code rounds to float32 in double precision too (`Case.float32`)."""

D_IN, D_SAE, ROWS = 16, 48, 32
WARMUP, SPARSITY_WARMUP, THRESHOLD_START, DECAY_START = 10, 32, 20, 60
RESAMPLING, SILENCED = 40, 5
DEAD_AFTER = 3

LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
SAME = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
TERMS = {
    # where both are there the second counts: StandardTrainer's l2_loss is the norm, not its square
    "l2_loss": "reconstruction",
    "mse_loss": "reconstruction",
    "sparsity_loss": "sparsity",
    "aux_loss": "auxiliary",
    "auxk_loss": "auxk",
    "loss": "loss",
}
"""Their names of the loss's terms, and ours."""

SCHEDULE = {"lr": 2e-4, "warmup_steps": WARMUP, "decay_start": DECAY_START}
PENALISED = {**SCHEDULE, "sparsity_warmup_steps": SPARSITY_WARMUP}
L1 = {**PENALISED, "l1": 0.05}
TOPK = {**SCHEDULE, "k": 4, "batch_size": ROWS}
BATCH_TOPK = {**TOPK, "threshold_start_step": THRESHOLD_START, "threshold_beta": 0.9}
GROUPS = {"group_fractions": [0.2, 0.3, 0.5]}


class Case(NamedTuple):
    """A trainer there, and the recipe here that claims to be the same."""

    trainer: str
    """Module and class below `dictionary_learning.trainers`."""
    recipe: Callable[..., Recipe]
    arguments: dict[str, Any]
    """Of the recipe; the trainer's are the same but for their names."""
    leaves: dict[str, str]
    """Our leaves by the names of theirs; `.T` at the end: transposed there."""
    with_dead: bool = False
    """Whether a latent is dead after `DEAD_AFTER` steps, so that AuxK has work to do."""
    float32: tuple[str, ...] = ()
    """What their code keeps in float32 whatever the model's dtype: parts of `stage, quantity`.

    AuxK: the residual and its reconstruction, by `.float()`, and so every gradient once a latent is dead.
    Thresholds of the TopK family: their average, which nothing in training reads. JumpReLU's step functions
    give `.float()` too, but the constants here are sums of few powers of 2, so that nothing is rounded."""

    @property
    def centred(self) -> bool:
        """Whether `b_dec` starts at the geometric median of the first batch."""
        return "k" in self.arguments


_STANDARD = Case(
    "standard.StandardTrainer", recipes.dictionary_learning_standard, L1, {**LINEAR, "b_dec": "bias"}
)
_TOPK = Case("top_k.TopKTrainer", recipes.dictionary_learning_topk, TOPK, {**LINEAR, "b_dec": "b_dec"})
_BATCH_TOPK = Case(
    "batch_top_k.BatchTopKTrainer", recipes.dictionary_learning_batchtopk, BATCH_TOPK,
    {**LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, float32=("threshold",),
)  # fmt: skip
_MATRYOSHKA = Case(
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", recipes.dictionary_learning_matryoshka,
    {**BATCH_TOPK, **GROUPS}, {**SAME, "threshold": "threshold"}, float32=("threshold",),
)  # fmt: skip
_DEAD = {"with_dead": True, "float32": ("last step", "trained")}

CASES = {
    "dictionary_learning_standard": _STANDARD,
    "dictionary_learning_standard, resampling": _STANDARD._replace(
        arguments={**L1, "decay_start": None, "resample_steps": RESAMPLING}
    ),
    "dictionary_learning_april": _STANDARD._replace(
        trainer="standard.StandardTrainerAprilUpdate", recipe=recipes.dictionary_learning_april
    ),
    "dictionary_learning_topk": _TOPK,
    "dictionary_learning_topk, AuxK": _TOPK._replace(**_DEAD),
    "dictionary_learning_batchtopk": _BATCH_TOPK,
    "dictionary_learning_batchtopk, AuxK": _BATCH_TOPK._replace(**_DEAD),
    "dictionary_learning_matryoshka": _MATRYOSHKA,
    "dictionary_learning_matryoshka, AuxK": _MATRYOSHKA._replace(
        arguments={**BATCH_TOPK, **GROUPS, "group_weights": [0.5, 1.0, 2.0]}, **_DEAD
    ),
    "dictionary_learning_jumprelu": Case(
        "jumprelu.JumpReluTrainer", recipes.dictionary_learning_jumprelu,
        {**PENALISED, "target_l0": 8.0, "bandwidth": 2**-4}, {**SAME, "threshold": "threshold"},
    ),
    "dictionary_learning_gated": Case(
        "gdm.GatedSAETrainer", recipes.dictionary_learning_gated, L1,
        {
            "W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias",
            "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias",
        },
    ),
}  # fmt: skip


def against_dictionary_learning(steps: int = 100) -> Iterator[tuple[str, Report]]:
    """Hold every recipe of dictionary_learning against the installed trainer, in float64 and float32.

    Both start from the trainer's own draw and see the same batches: there through `trainer.update(step, x)`
    as it is, here through `make_step`. Compared are

      forward    `b_dec` where it starts at a median, and what `encode` and `decode` give of the first batch;
      loss       each term at the first and the last step, and L0 at every step;
      gradients  at the start, the penalty at full weight;
      trained    every weight and threshold after the last step, and what `encode` then gives.

    On the way lie warm-up and decay of the learning rate, the warm-up of the penalty, averages of the
    threshold, AuxK with dead latents, and resampling.

    Args:
      steps: how many, more than 60, where the decay begins.

    Yields:
      Case name and `Report`, as each is done.

    Raises:
      InputError: dictionary_learning is not installed, or too few steps.

    Example:
      >>> all(report.ok for _, report in against_dictionary_learning())
    """
    require(steps > DECAY_START, f"steps must be above {DECAY_START}, where decay begins, got {steps}")
    for name, case in CASES.items():
        for dtype in BOUNDS:
            yield name, report(case, *sides(case, dtype, steps), dtype)


class Side(NamedTuple):
    """What one side has seen and has arrived at."""

    forward: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    logs: dict[str, np.ndarray]
    """Terms of the loss, the loss, and L0 by our names, [steps]."""
    trained: dict[str, np.ndarray]


def sides(case: Case, dtype: str, steps: int) -> tuple[Side, Side]:
    """Our side and dictionary_learning's."""
    batches = data(case, steps).astype(dtype)
    start, theirs = train_there(case, batches)
    return train_here(case, batches, start), theirs


def report(case: Case, ours: Side, theirs: Side, dtype: str) -> Report:
    """The relative errors of our side."""
    steps = len(ours.logs["loss"])
    loss = {"l0, every step": relative_error(ours.logs["l0"], theirs.logs["l0"])}
    for name, log in theirs.logs.items():
        loss[f"{name}, first step"] = relative_error(ours.logs[name][:1], log[:1])
        loss[f"{name}, last step"] = relative_error(ours.logs[name][-1:], log[-1:])
    found = {
        "forward": _errors(ours.forward, theirs.forward),
        "loss": loss,
        "gradients": _errors(ours.gradients, theirs.gradients),
        "trained": _errors(ours.trained, theirs.trained),
    }
    errors: dict[str, dict[str, float]] = {stage: {} for stage in BOUNDS[dtype]}
    for stage, by_name in found.items():
        for name, error in by_name.items():
            quantity = f"{stage}, {name}"
            if dtype == "float64" and any(part in quantity for part in case.float32):
                errors["float32 there"][quantity] = error
            else:
                errors[stage][name] = error
    means = {name: float(log.mean()) for name, log in ours.logs.items()}
    errors = {stage: by_name for stage, by_name in errors.items() if by_name}
    return Report(dtype, steps, errors, BOUNDS[dtype], means)


def data(case: Case, steps: int) -> np.ndarray:
    """[steps, 32, 16]: a mean, six directions of which some carry little, and noise.

    Uneven enough that latents fall silent, and full enough that rows have more than k positive
    pre-activations. Where latents are resampled, all rows of that step's batch are the same, so that a row
    drawn at random is that one.
    """
    # a draw in which no two pre-activations at the edge of a top k lie within 2e-5 of each other on the way:
    # nearer ones change places by float32's rounding, and from there on two runs are two
    draw = np.random.default_rng(26)
    directions = draw.normal(size=(6, D_IN)) * np.array([2.0, 1.0, 1.0, 0.5, 0.5, 0.25])[:, None]
    strengths = np.abs(draw.normal(size=(steps, ROWS, 6)))
    x = draw.normal(size=D_IN) + strengths @ directions + 0.1 * draw.normal(size=(steps, ROWS, D_IN))
    if "resample_steps" in case.arguments:
        x[RESAMPLING::RESAMPLING] = x[RESAMPLING::RESAMPLING, :1]
    return x


def recipe_of(case: Case, batches: np.ndarray, **changes: Any) -> Recipe:
    """The case's recipe for these batches."""
    first = {"first_batch": jnp.asarray(batches[0])} if case.centred else {}
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "steps": len(batches)}
    made = case.recipe(**{**sizes, **first, **case.arguments, **changes})
    return made._replace(factory=partial(made.factory, dead_after=DEAD_AFTER)) if case.with_dead else made


def train_here(
    case: Case, batches: np.ndarray, start: dict[str, np.ndarray], make: Callable[..., Recipe] = recipe_of
) -> Side:
    """Our side, from these weights; leaves that are not among them are the recipe's own."""
    with jax.enable_x64(batches.dtype == np.float64), jax.default_matmul_precision("highest"):
        made = make(case, batches)
        sae, optimizer = made.factory(), made.optimizer()

        @jax.jit
        def run(x, start):
            params = {**sae.init(jax.random.key(0), x.dtype), **start}
            state = state_from(params, optimizer)
            f = sae.encode(params, x[0])
            forward = {"b_dec": params["b_dec"], "f": f, "x_hat": sae.decode(params, f, x[0])}
            warm = state.progress._replace(step=jnp.int32(SPARSITY_WARMUP))
            gradients, _ = jax.grad(sae.loss, has_aux=True)(params, Batch(x[0], x[0]), warm)
            step = make_step(sae, optimizer)
            state, logs = jax.lax.scan(lambda state, x: step(state, Batch(x, x)), state, x)
            return forward, gradients, logs, {**state.params, "f": sae.encode(state.params, x[0])}

        start = {name: leaf.astype(batches.dtype) for name, leaf in start.items()}
        return Side(*jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run(batches, start)))


def train_there(case: Case, batches: np.ndarray) -> tuple[dict[str, np.ndarray], Side]:
    """The weights from which the trainer starts, and its side.

    Raises:
      InputError: dictionary_learning is not installed.
    """
    import torch

    trainer = trainer_of(case, len(batches))
    x = torch.as_tensor(batches)
    trainer.ae.to(x.dtype)
    start = weights(trainer, case)
    forward = {}
    if case.centred:
        # what the first update begins with; here before it, so that the first forward can be seen
        median = getattr(trainer, "geometric_median", trainers()["top_k"].geometric_median)
        trainer.ae.b_dec.data = median(x[0])
        del start["b_dec"]
        forward = {"b_dec": _array(trainer.ae.b_dec)}
    forward |= _forward(trainer, x[0])

    aside = _aside(trainer)
    aside.loss(x[0], step=SPARSITY_WARMUP).backward()
    gradients = {
        name: _array(tensor.grad, transposed)
        for name, (tensor, transposed) in _tensors(aside, case).items()
        if tensor.grad is not None
    }
    logs = []
    # it prints how many it resamples
    with redirect_stdout(io.StringIO()):
        for step, rows in enumerate(x):
            logs.append(_logs(_aside(trainer).loss(rows, step=step, logging=True)))
            trainer.update(step, rows)
    over_steps = {name: np.array([log[name] for log in logs]) for name in logs[0]}
    trained = {**weights(trainer, case), "f": _forward(trainer, x[0])["f"]}
    return start, Side(forward, gradients, over_steps, trained)


def trainer_of(case: Case, steps: int) -> Any:
    """The real trainer with the case's arguments, drawn from seed 0.

    Raises:
      InputError: dictionary_learning is not installed.
    """
    import torch

    module, name = case.trainer.split(".")
    build = getattr(trainers()[module], name)
    renamed = {"l1": "l1_penalty"}
    arguments = {renamed.get(key, key): value for key, value in case.arguments.items() if key != "batch_size"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer = build(
            steps=steps, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="none", device="cpu",
            **arguments,
        )  # fmt: skip
    if case.with_dead:
        trainer.dead_feature_threshold = DEAD_AFTER * ROWS
    if "resample_steps" in case.arguments:
        trainer.ae.encoder.bias.data[:SILENCED] = -100.0
    return trainer


def weights(trainer: Any, case: Case) -> dict[str, np.ndarray]:
    """A trainer's weights by our names and in our layout."""
    return {
        name: _array(tensor, transposed) for name, (tensor, transposed) in _tensors(trainer, case).items()
    }


def trainers() -> dict[str, ModuleType]:
    """The modules of `dictionary_learning.trainers` by name, imported without its face.

    `import dictionary_learning` would import nnsight and with it torchvision, which a CPU build of torch may
    not stand. A bare package in its place lets the trainers be imported, and is taken away again.

    Raises:
      InputError: it is not installed.
    """
    try:
        return _trainers()
    except ImportError:
        raise InputError(
            "this needs dictionary_learning: pip install --no-deps dictionary-learning einops"
        ) from None


@cache
def _trainers() -> dict[str, ModuleType]:
    with _without_its_face("dictionary_learning"):
        names = {case.trainer.split(".")[0] for case in CASES.values()}
        return {name: importlib.import_module(f"dictionary_learning.trainers.{name}") for name in names}


@contextmanager
def _without_its_face(package: str) -> Iterator[None]:
    """While it lasts, submodules of a package can be imported and its `__init__` is not run."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(package)

    def loaded() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")}

    before = loaded()
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault(package, bare)
    try:
        yield
    finally:
        for name in loaded().keys() - before.keys():
            del sys.modules[name]


def _aside(trainer: Any) -> Any:
    """A copy of the trainer, whose `loss` may count silent latents and move the threshold unseen."""
    # a figure for its log that hangs on to the graph of the last step, and so cannot be copied
    trainer.pre_norm_auxk_loss = -1
    return deepcopy(trainer)


def _forward(trainer: Any, x: "torch.Tensor") -> dict[str, np.ndarray]:
    x_hat, f = trainer.ae(x, output_features=True)
    return {"f": _array(f), "x_hat": _array(x_hat)}


def _logs(log: Any) -> dict[str, float]:
    """A step's terms of the loss by our names, its loss and its L0."""
    terms = {ours: log.losses[name] for name, ours in TERMS.items() if name in log.losses}
    return {**terms, "l0": (log.f > 0).sum(dim=-1).double().mean().item()}


def _tensors(trainer: Any, case: Case) -> "dict[str, tuple[torch.Tensor, bool]]":
    """Our names, their tensors, and whether those are transposed."""
    held = {**dict(trainer.ae.named_parameters()), **dict(trainer.ae.named_buffers())}
    return {ours: (held[name.removesuffix(".T")], name.endswith(".T")) for ours, name in case.leaves.items()}


def _array(tensor: "torch.Tensor", transposed: bool = False) -> np.ndarray:
    array = tensor.detach().double().numpy().copy()
    return array.T if transposed else array


def _errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: relative_error(ours[name], array) for name, array in theirs.items()}
