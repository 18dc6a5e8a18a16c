"""The installed SAELens agrees: its own SAEs under its own trainer, recipe by recipe."""

import functools
import sys

import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import transforms
from sae_jax.recipes import saelens
from sae_jax.recipes.recipe import Recipe
from sae_jax.verify import against_saelens as against

pytestmark = [
    pytest.mark.usefixtures("sae_lens"),
    pytest.mark.filterwarnings("ignore:WARNING. The final matryoshka level width"),
]

STEPS = 100
SIZES = {"d_in": 16, "d_sae": 64}


@pytest.fixture(scope="module")
def reports(sae_lens):
    return [(name, report) for name, report in against.against_saelens(STEPS)]


def of(reports, part):
    return [(name, report) for name, report in reports if part in name]


# Agreement


def test_every_recipe_agrees_in_both_precisions(reports):
    assert len(reports) == 2 * len(against.CASES)
    recipes = {name for name in dir(saelens) if name.startswith("saelens_")}
    assert recipes == {name.split(",")[0] for name, _ in reports}
    for name, report in reports:
        assert report.steps == STEPS
        assert report.ok, (name, report.dtype, report.errors)


def test_what_is_compared(reports):
    for name, report in reports:
        assert report.bounds == against.TIGHT[report.dtype]
        assert set(report.errors["forward"]) == {"f", "x_hat"}
        assert {"W_enc", "W_dec", "b_dec", "f", "x_hat"} < set(report.errors["trained"]), name
        assert {"loss, first step", "loss, last step", "l0, every step"} < set(report.errors["loss"])
    for part in ("batchtopk", "matryoshka", "jumprelu"):
        assert all("threshold" in report.errors["trained"] for _, report in of(reports, part))


def test_no_term_of_a_loss_is_idle(reports):
    for name, report in reports:
        assert all(mean > 0 for mean in report.means.values()), (name, report.means)
    for part in ("topk", "batchtopk", "matryoshka"):
        assert all(report.means["auxk"] > 0.01 for _, report in of(reports, part))
    assert all(report.means["pre_act"] > 1e-3 for _, report in of(reports, "tanh"))


def test_few_and_many_latents_die(sae_lens):
    """AuxK is scaled by n_dead / k_aux up to 1: both sides of that are gone through."""
    trainer = against.trainer_there(against.CASES["saelens_topk"], against.data(STEPS), "float32")
    dead = []
    for x in trainer.data_provider:
        dead.append(trainer.dead_neurons.sum().item())
        trainer.step(x)
    k_aux = SIZES["d_in"] // 2
    assert dead[0] == 0
    assert max(dead) > k_aux
    assert any(0 < count < k_aux for count in dead)


def test_the_steps_taken_are_those_of_fit(sae_lens):
    """`against_saelens` steps the trainer itself to see what happens; SAELens's own loop gives the same."""
    case, batches = against.CASES["saelens_matryoshka"], against.data(40)
    _, stepped = against.train_there(case, batches, "float32")
    trainer = against.trainer_there(case, batches, "float32")
    trainer.fit()
    for name, leaf in against.weights(trainer).items():
        np.testing.assert_array_equal(leaf, stepped.trained[name])


# What differs is found out


def optimizer_with(*first, warmup=10.0, rate=3e-4, b2=0.999):
    """The trainer's chain for the cases' schedule, or one that differs."""

    def chain():
        schedule = transforms.trapezoid(warmup, STEPS, 20, first=1.0)
        adam = transforms.scale_by_adam(0.9, b2)
        return optax.chain(*first, adam, optax.scale_by_schedule(schedule), optax.scale(-rate))

    return chain


@functools.cache
def there(name, dtype):
    return against.train_there(against.CASES[name], against.data(STEPS), dtype)


def broken(name, dtype="float64", optimizer=None, **changes):
    """The report of a case whose recipe here is not SAELens's."""
    start, theirs = there(name, dtype)
    factory, chain = against.recipe_of(against.CASES[name], STEPS)
    recipe = Recipe(lambda: factory(**changes), optimizer or chain)
    ours = against.train_here(recipe, start, against.data(STEPS), dtype)
    return against.report(ours, theirs, dtype, STEPS)


CLIP = transforms.clip_by_global_norm(1.0)


def test_the_chain_written_out_here_is_the_recipes(sae_lens):
    assert broken("saelens_standard", optimizer=optimizer_with(CLIP)).ok


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizer_with(transforms.clip_by_global_norm(1.0, eps=0.0)),
        optimizer_with(),
        optimizer_with(CLIP, warmup=11.0),
        optimizer_with(CLIP, rate=3.0001e-4),
        optimizer_with(CLIP, b2=0.9991),
    ],
    ids=["clip without eps", "no clip", "warm-up longer", "another rate", "another b2"],
)
def test_another_optimizer_is_found_out(optimizer, sae_lens):
    report = broken("saelens_standard", optimizer=optimizer)
    assert not report.ok
    assert report.worst["forward"] <= report.bounds["forward"]
    assert report.worst["trained"] > report.bounds["trained"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("saelens_standard", {"l1": 0.303}),
        ("saelens_standard", {"l1_warmup": 31}),
        ("saelens_gated", {"detach_auxiliary": True}),
        ("saelens_topk", {"dead_after": 6}),
        ("saelens_topk", {"k_aux": 7}),
        ("saelens_batchtopk", {"threshold_decay": 0.9901}),
        ("saelens_matryoshka", {"prefixes": (8, 25, 64)}),
        ("saelens_jumprelu, tanh", {"ste_to_input": False}),
        ("saelens_jumprelu, tanh", {"pre_act": 1.01e-2}),
        ("saelens_jumprelu, quadratic", {"target_l0": 6.01}),
    ],
)
def test_another_model_is_found_out(name, changes, sae_lens):
    report = broken(name, **changes)
    assert not report.ok
    assert report.worst["trained"] > report.bounds["trained"]


def test_one_per_cent_of_the_penalty_is_found_out_in_float32_too(sae_lens):
    assert not broken("saelens_standard", "float32", l1=0.303).ok


def test_it_is_optax_s_bias_correction_that_float32_runs_part_by(sae_lens):
    """Why `transforms.scale_by_adam` is there: optax's own is ten times further from SAELens in float32."""
    optimizer = lambda: optax.chain(  # noqa: E731
        CLIP,
        optax.scale_by_adam(),
        optax.scale_by_schedule(transforms.trapezoid(10, STEPS, 20, first=1.0)),
        optax.scale(-3e-4),
    )
    exact = broken("saelens_standard", "float32").worst["trained"]
    assert broken("saelens_standard", "float32", optimizer=optimizer).worst["trained"] > 5 * exact
    assert broken("saelens_standard", "float64", optimizer=optimizer).ok


# What a recipe says


@pytest.mark.parametrize("name", [name for name in dir(saelens) if name.startswith("saelens_")])
def test_an_option_that_a_recipe_fixes_is_said_in_one_sentence(name):
    with pytest.raises(sae_jax.InputError) as error:
        getattr(saelens, name)(**SIZES, mean_features=True)
    assert f"recipes.{name} fixes 'mean_features'" in str(error.value)
    assert "\n" not in str(error.value)


WIDTHS = {"matryoshka_widths": (8, 24)}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("saelens_matryoshka", {"use_matryoshka_aux_loss": True, **WIDTHS}, "use_matryoshka_aux_loss"),
        ("saelens_matryoshka", {}, "needs matryoshka_widths"),
        ("saelens_matryoshka", {"matryoshka_widths": ()}, "at least one width"),
        ("saelens_jumprelu", {"jumprelu_sparsity_loss_mode": "l1"}, "step, tanh, quadratic"),
        ("saelens_jumprelu", {"target_l0": 8.0}, "only in 'quadratic'"),
        ("saelens_standard", {"lr_decay_steps": 20, "lr_warm_up_steps": 5}, "at least 25"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(name, options, says):
    with pytest.raises(sae_jax.InputError) as error:
        getattr(saelens, name)(**SIZES, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quadratic_penalty_without_a_target_is_said():
    factory, _ = saelens.saelens_jumprelu(**SIZES, jumprelu_sparsity_loss_mode="quadratic")
    with pytest.raises(sae_jax.InputError, match="needs target_l0"):
        factory()


def test_a_missing_sae_lens_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(sae_jax.InputError, match="pip install sae-lens"):
        next(against.against_saelens())


def test_too_few_steps_are_said():
    with pytest.raises(sae_jax.InputError, match="above 30"):
        next(against.against_saelens(30))


# A recipe is what a sweep takes


def test_d_sae_is_the_last_width_as_in_sae_lens():
    factory, _ = saelens.saelens_matryoshka(**SIZES, **WIDTHS, k=4)
    assert factory().config["prefixes"] == (8, 24, 64)
    factory, _ = saelens.saelens_matryoshka(**SIZES, matryoshka_widths=(8, 64), k=4)
    assert factory().config["prefixes"] == (8, 64)


def test_a_recipe_is_swept():
    factory, optimizer = saelens.saelens_matryoshka(**SIZES, **WIDTHS, k=4, lr_warm_up_steps=4)
    source = sae_jax.in_memory(against.data(1)[0], batch_size=16)
    grid = sae_jax.grid(k=[2, 4], lr=[3e-4, 1e-3])
    result = sae_jax.sweep(factory, optimizer, grid=grid, source=source, steps=8)
    np.testing.assert_allclose(result.history["l0"][-1], [2, 2, 4, 4])
    assert len(np.unique(result.history["loss"][-1])) == 4
