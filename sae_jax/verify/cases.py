"""The parity table: one row per variant that is held against PyTorch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from sae_jax import transforms
from sae_jax.architectures import build
from sae_jax.base import SAE, InputError, Params
from sae_jax.synthetic import seed_tokens
from sae_jax.verify import reference
from sae_jax.verify.harness import Report, compare


class Beside(NamedTuple):
    """Something done beside Adam: as a transformation here, as a change of the module there."""

    before_adam: optax.GradientTransformation | None = None
    after_adam: optax.GradientTransformation | None = None
    after_backward: Callable[..., None] | None = None
    after_step: Callable[..., None] | None = None


BESIDE = {
    "unit norm": Beside(
        after_adam=transforms.unit_norm_decoder(), after_step=reference.unit_norm_columns
    ),
    "unit norm first": Beside(
        after_adam=transforms.unit_norm_decoder(before_update=True),
        after_backward=reference.unit_norm_columns,
    ),
    "project": Beside(
        transforms.project_decoder_gradient(1e-6), after_backward=reference.remove_parallel_gradient
    ),
    "clip": Beside(transforms.clip_by_global_norm(1.0), after_backward=reference.clip_gradients),
    "threshold at least 0": Beside(
        after_adam=transforms.non_negative_threshold(), after_step=reference.keep_thresholds_positive
    ),
}  # fmt: skip


class Case(NamedTuple):
    """One variant: how to build it, here and there, and how it is trained."""

    architecture: str
    arguments: dict[str, Any]
    """In plain values, as `architectures.describe` writes them: functions go by their names."""
    beside: tuple[str, ...] = ()
    """What is done beside Adam, keys of `BESIDE`, in order."""
    betas: tuple[float, float] = (0.9, 0.999)
    learning_rate: float = 3e-4
    """Latents that come and go on the last bit part two float32 runs, the sooner the higher this is."""
    tokens: bool = False
    """On the seed's tokens in full batches, rather than on random rows."""

    @property
    def description(self) -> dict[str, Any]:
        """All arguments, the sizes among them."""
        sizes = {"d_in": 4, "d_sae": 6} if self.tokens else {"d_in": 16, "d_sae": 32}
        return {**sizes, **self.arguments}

    def sae(self) -> SAE:
        """The model here."""
        return build({"architecture": self.architecture, **self.description})

    def optimizer(self) -> optax.GradientTransformation:
        """Its optax chain."""
        b1, b2 = self.betas
        beside = [BESIDE[name] for name in self.beside]
        chain = [each.before_adam for each in beside]
        chain += [optax.adam(self.learning_rate, b1=b1, b2=b2)]
        chain += [each.after_adam for each in beside]
        return optax.chain(*(transformation for transformation in chain if transformation))

    def data(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Batches, and targets where they are not the batches themselves."""
        if self.tokens:
            return np.asarray(seed_tokens().x)[None], None
        sizes = self.description
        rng = np.random.default_rng(0)
        if self.architecture == "crosscoder":
            return sparse_rows(rng, sizes["sources"] * sizes["d_in"]).reshape(
                *ROWS, sizes["sources"], sizes["d_in"]
            ), None
        x = sparse_rows(rng, sizes["d_in"])
        if "d_out" not in sizes:
            return x, None
        return x, np.maximum(x @ rng.normal(size=(sizes["d_in"], sizes["d_out"])), 0)

    def params(self) -> Params:
        """Where both start: as drawn, but every fourth latent is silent where the case looks at dead ones."""
        params = self.sae().init(jax.random.key(0))
        if "dead_after" in self.arguments:
            if "k" in self.arguments:  # never among the k largest, yet above 0, as a rectifying AuxK needs
                params["W_enc"] = params["W_enc"].at[:, ::4].multiply(0.2)
            else:
                params["b_enc"] = params["b_enc"].at[::4].set(-2.0)
        return params

    def since_fired(self) -> np.ndarray:
        """Half of those have been silent for long and are dead at the first step; the others die later."""
        return np.where(np.arange(self.description["d_sae"]) % 8 == 0, 10_000, 0)


ROWS = (7, 64)
"""Batches and rows in each: products lie past `linear.TINY`, but for the seed's tokens."""


def sparse_rows(rng: np.random.Generator, d_in: int) -> np.ndarray:
    """[*ROWS, d_in]: sums of a few of 2 d_in random directions, and a little noise."""
    directions = rng.normal(size=(2 * d_in, d_in)) / d_in**0.5
    strengths = rng.uniform(0.5, 1.5, (*ROWS, 2 * d_in)) * (rng.random((*ROWS, 2 * d_in)) < 0.15)
    return strengths @ directions + 0.05 * rng.normal(size=(*ROWS, d_in))


FIELD = {"mean_features": False, "l1": 1e-2}
UNIT_NORM = ("project", "clip", "unit norm")
JUMP = {"bandwidth": 0.5, "threshold_init": 0.1}
DYING = {"k": 4, "dead_after": 30}
NORMALISED = {"auxk": 1 / 32, "auxk_loss": "auxk.normalised"}

CASES: dict[str, Case] = {
    "relu, the seed's": Case("relu", {"l1": 0.1}, tokens=True, learning_rate=1e-2),
    "relu, averaged": Case("relu", {"l1": 0.1}),
    "relu, L1 by decoder norm": Case("relu", {**FIELD, "decoder_norm_l1": True, "l1_warmup": 100}, ("clip",)),
    "relu, tied, pre-encoder bias": Case("relu", {**FIELD, "tied": True, "apply_b_dec_to_input": True}),
    "relu, unit-norm decoder": Case("relu", FIELD, ("project", "unit norm")),
    "relu, p-annealing": Case("relu", {**FIELD, "l1": 1e-3, "p_end": 0.7, "p_anneal": [100, 400]}),
    "relu, Lp norm": Case("relu", {**FIELD, "l1": 1e-3, "p": 0.8, "lp_root": True}),
    "relu, target L0": Case("relu", {**FIELD, "target_l0": 6.0}),
    "topk, AuxK normalised": Case("topk", {**DYING, **NORMALISED}, UNIT_NORM),
    "topk, AuxK of SAELens": Case(
        "topk",
        {**DYING, "auxk": 1.0, "auxk_loss": "auxk.saelens", "rescale_acts_by_decoder_norm": True},
        ("clip",),
    ),
    "topk, AuxK by variance": Case(
        "topk",
        {**DYING, "auxk": 1.0, "auxk_loss": "auxk.fvu", "reconstruction": "losses.unexplained"},
        ("project", "unit norm first"),
    ),
    "batch_topk, AuxK attached": Case(
        "batch_topk",
        {
            **DYING, "k": 3.7, "auxk": 1 / 32, "auxk_loss": "auxk.attached",
            "reconstruction": "losses.averaged",
        },
        ("project", "unit norm"),
    ),
    "batch_topk, rescaled": Case(
        "batch_topk",
        {
            **DYING, "auxk": 1.0, "auxk_loss": "auxk.saelens", "rescale_acts_by_decoder_norm": True,
            "threshold_init": 0.25, "threshold_start": 50,
        },
        ("clip",),
    ),
    "jumprelu, step": Case(
        "jumprelu", {**JUMP, "l0_coefficient": 0.01}, betas=(0.0, 0.999)
    ),
    "jumprelu, tanh and pre_act": Case(
        "jumprelu",
        {
            **JUMP, "penalty": "losses.tanh_l0", "l0_coefficient": 0.01, "l0_warmup": 100,
            "ste_to_input": True, "pre_act": 0.01, "dead_after": 30,
        },
        ("clip", "threshold at least 0"),
    ),
    "jumprelu, quadratic": Case(
        "jumprelu",
        {
            **JUMP, "penalty": "losses.quadratic_l0", "l0_coefficient": 0.01, "target_l0": 6.0,
            "apply_b_dec_to_input": True,
        },
        ("threshold at least 0",),
    ),
    "jumprelu, quadratic of the mean": Case(
        "jumprelu",
        {
            "penalty": "losses.quadratic_mean_l0", "target_l0": 6.0, "penalty_of_features": True,
            "bandwidth": 0.3, "threshold_init": 0.4,
        },
        UNIT_NORM,
        betas=(0.0, 0.999),
    ),
    "jumprelu, log threshold": Case(
        "jumprelu",
        {**JUMP, "l0_coefficient": 0.01, "target_l0": 6.0, "log_threshold": True, "ste_to_input": True},
    ),
    "gated": Case("gated", {"l1": 0.05}, ("project", "unit norm")),
    "gated, auxiliary attached": Case(
        "gated",
        {"l1": 0.05, "detach_auxiliary": False, "decoder_norm_l1": True, "l1_warmup": 100},
        ("clip",),
    ),
    "gated, target L0": Case("gated", {"l1": 0.05, "target_l0": 6.0}),
    "matryoshka of batch_topk": Case(
        "matryoshka", {**DYING, **NORMALISED, "prefixes": [4, 12, 32]}, UNIT_NORM
    ),
    "matryoshka of relu": Case(
        "matryoshka",
        {"of": "relu", "prefixes": [8, 32], "prefix_weights": [0.25, 0.75], "l1": 0.1}
        | {"mean_features": False},
    ),
    "transcoder of topk, skip": Case(
        "transcoder", {**DYING, **NORMALISED, "of": "topk", "d_out": 12, "skip": True}
    ),
    "transcoder of jumprelu": Case(
        "transcoder",
        {**JUMP, "of": "jumprelu", "d_out": 12, "l0_coefficient": 0.01},
    ),
    "crosscoder": Case("crosscoder", {"sources": 2, "l1": 0.05, "l1_warmup": 100}),
    "crosscoder, target L0": Case(
        "crosscoder", {"sources": 3, "l1": 0.05, "target_l0": 12.0}
    ),
}  # fmt: skip


def verify(steps: int = 500, all_cases: bool = True) -> Iterator[tuple[str, Report]]:
    """Compare every case with its PyTorch module, in float64 and float32.

    Args:
      steps: Adam steps.
      all_cases: every architecture; False for `relu` alone.

    Yields:
      Case name and `Report`, as each is done.

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError("verification needs PyTorch: pip install 'sae-jax[torch]'") from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products of this size take longer to hand out than to do
    try:
        for name, case in CASES.items():
            if not all_cases and case.architecture != "relu":
                continue
            for dtype in ("float64", "float32"):
                yield name, compare_case(case, case, steps, dtype)
    finally:
        torch.set_num_threads(threads)


def compare_case(here: Case, there: Case, steps: int, dtype: str) -> Report:
    """Hold the SAE of one case against the module of another, which `verify` takes to be the same."""
    import torch

    params, since_fired = here.params(), here.since_fired()
    module = reference.MODULES[there.architecture](**there.description)
    reference.start_silent(module, since_fired)
    batches, targets = here.data()
    beside = [BESIDE[name] for name in there.beside]

    def observe(module, x, y=None):
        return module(x, x if y is None else y)

    def every(hook: str) -> Callable[[Any], None]:
        def act(module):
            for each in beside:
                if change := getattr(each, hook):
                    change(module)

        return act

    return compare(
        here.sae(),
        here.optimizer(),
        params,
        module=module,
        names=reference.names(there.architecture, params),
        observe=observe,
        torch_optimizer=partial(torch.optim.Adam, lr=there.learning_rate, betas=there.betas),
        batches=batches,
        targets=targets,
        steps=steps,
        dtype=dtype,
        since_fired=since_fired,
        after_backward=every("after_backward"),
        after_step=every("after_step"),
    )
