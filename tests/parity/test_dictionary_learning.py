"""The installed dictionary_learning agrees: its own trainers, recipe by recipe."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, Progress, recipes, resampling, transforms
from sae_jax.recipes import dictionary_learning as ours
from sae_jax.verify import against_dictionary_learning as against

STEPS = 100
RECIPES = {name: build for name, build in recipes.RECIPES.items() if name.startswith("dictionary_learning_")}


@pytest.fixture(scope="module")
def library():
    """The trainers of dictionary_learning; of its dependencies they need torch and einops alone."""
    if importlib.util.find_spec("dictionary_learning") is None:
        pytest.skip("not installed: pip install --no-deps dictionary-learning einops")
    return against.trainers()


@functools.cache
def there(name, dtype):
    case = against.CASES[name]
    return against.train_there(case, against.data(case, STEPS).astype(dtype))


@functools.cache
def report(name, dtype="float64", make=against.recipe_of):
    case = against.CASES[name]
    start, theirs = there(name, dtype)
    here = against.train_here(case, against.data(case, STEPS).astype(dtype), start, make)
    return against.report(case, here, theirs, dtype)


# Agreement


COMPARED = [
    (name, dtype)
    for name, case in against.CASES.items()
    for dtype in against.BOUNDS
    # in single precision AuxK's cases go through all that those without it do
    if dtype == "float64" or not case.centred or case.with_dead
]


@pytest.mark.parametrize(("name", "dtype"), COMPARED)
def test_every_recipe_agrees(name, dtype, library):
    found = report(name, dtype)
    assert found.ok, found.errors
    assert found.steps == STEPS
    assert set(against.CASES[name].leaves) | {"f"} == {
        *found.errors.get("trained", ()),
        *(quantity[9:] for quantity in found.errors.get("float32 there", ()) if quantity[:7] == "trained"),
    }
    assert "l0, every step" in found.errors["loss"]
    # what was compared was at work: no penalty of 0, and dead latents just where a case says so
    with_dead = against.CASES[name].with_dead
    idle = {term for term, mean in found.means.items() if mean == 0}
    assert idle == ({"auxk"} if "auxk" in found.means and not with_dead else set())


def test_every_recipe_has_a_case():
    assert {case.recipe for case in against.CASES.values()} == set(RECIPES.values())


def test_single_precision_there_excuses_only_what_it_touches(library):
    for name, case in against.CASES.items():
        excused = set(report(name, "float64").errors.get("float32 there", ())) if case.float32 else set()
        if not case.with_dead:
            assert excused == ({"trained, threshold"} if "threshold" in case.float32 else set())
        assert not any("first step" in quantity or quantity == "loss, l0" for quantity in excused)
    assert against.BOUNDS["float64"]["trained"] == 1e-9
    assert max(against.BOUNDS["float32"].values()) == 1e-5


def test_the_walk_over_all_cases_is_the_same_comparison(library):
    name, first = next(against.against_dictionary_learning(STEPS))
    assert first == report(name, first.dtype)


@pytest.mark.parametrize("name", [name for name, case in against.CASES.items() if case.with_dead])
def test_few_and_many_latents_die(name, library, torch):
    """AuxK takes at most k_aux of them: both sides of that are gone through, and it has something to give."""
    case = against.CASES[name]
    trainer, dead, losses = against.trainer_of(case, STEPS), [], []
    for step, x in enumerate(against.data(case, STEPS).astype(np.float32)):
        trainer.update(step, torch.as_tensor(x))
        dead.append(trainer.dead_features)
        losses.append(float(torch.as_tensor(trainer.pre_norm_auxk_loss).detach()))
    assert dead[0] == 0
    assert max(dead) > trainer.top_k_aux
    assert any(0 < count < trainer.top_k_aux for count in dead)
    assert all((loss > 0) == (count > 0) for loss, count in zip(losses, dead, strict=True))


# What differs is found out


def other_model(**changes):
    def make(case, batches):
        made = against.recipe_of(case, batches)
        return made._replace(factory=functools.partial(made.factory, **changes))

    return make


def other_options(**changes):
    return lambda case, batches: against.recipe_of(case, batches, **changes)


def other_optimizer(change):
    def make(case, batches):
        made = against.recipe_of(case, batches)
        return made._replace(optimizer=lambda: change(made.optimizer.keywords))

    return make


def clipped_before_projected(keywords):
    factor = transforms.trapezoid(keywords["warmup"], keywords["steps"], keywords["decay"])
    return optax.chain(
        transforms.clip_by_global_norm(1.0),
        transforms.project_decoder_gradient(1e-6),
        transforms.scale_by_adam(),
        optax.scale_by_schedule(factor),
        optax.scale(-keywords["learning_rate"]),
        transforms.unit_norm_decoder(eps=None),
    )


def resampled_a_step_early(keywords):
    chain = optax.chain(
        transforms.project_decoder_gradient(),
        transforms.scale_by_adam(),
        optax.scale_by_schedule(lambda step: transforms.trapezoid(keywords["warmup"])(step % 40)),
        optax.scale(-keywords["learning_rate"]),
        transforms.unit_norm_decoder(),
    )
    return resampling._resampling(chain, 40, None, 20, power=1.0, unit_inputs=False, late=0)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("standard", other_options(warmup_steps=11)),
        ("standard", other_optimizer(lambda keywords: ours.clipped_adam(**keywords))),
        ("standard, resampling", other_optimizer(resampled_a_step_early)),
        ("april", other_model(decoder_norm_l1=False)),
        ("topk", other_optimizer(clipped_before_projected)),
        ("topk, AuxK", other_model(k_aux=7)),
        ("topk, AuxK", other_options(auxk_alpha=1.01 / 32)),
        ("batchtopk", other_options(threshold_start_step=21)),
        ("matryoshka", other_model(prefix_weights=(1 / 3,) * 3)),
        ("jumprelu", other_options(penalty_of_features=False)),
        ("gated", other_model(detach_auxiliary=False)),
    ],
)
def test_another_recipe_is_found_out(name, make, library):
    found = report(f"dictionary_learning_{name}", make=make)
    assert not found.ok
    stage = "float32 there" if "AuxK" in name or "batchtopk" in name else "trained"
    assert found.worst[stage] > found.bounds[stage]


# What they start from, and their defaults


NOT_OURS = {
    "activation_dim", "dict_size", "layer", "lm_name", "dict_class", "seed", "device", "wandb_name",
    "submodule_name",
}  # fmt: skip
LEFT_OUT = {"dictionary_learning_topk": {"threshold_beta", "threshold_start_step"}}


@pytest.mark.parametrize("name", RECIPES)
def test_options_and_their_defaults_are_the_trainers(name, library):
    case = against.CASES[name]
    module, trainer = case.trainer.split(".")
    theirs = inspect.signature(getattr(library[module], trainer)).parameters
    here = inspect.signature(RECIPES[name]).parameters
    for option in theirs.keys() - NOT_OURS - LEFT_OUT.get(name, set()):
        our_name = {"l1_penalty": "l1"}.get(option, option)
        assert here[our_name].default == theirs[option].default, option
    assert {"d_in", "d_sae", "steps"} < set(here)


@pytest.mark.parametrize("name", RECIPES)
def test_the_learning_rate_and_the_silence_that_is_death_are_the_trainers(name, library):
    case = against.CASES[name]
    arguments = {option: value for option, value in case.arguments.items() if option != "lr"}
    case = case._replace(arguments=arguments, with_dead=False)
    trainer = against.trainer_of(case, STEPS)
    made = against.recipe_of(case, against.data(case, STEPS).astype(np.float32))
    assert made.optimizer.keywords["learning_rate"] == pytest.approx(trainer.lr, rel=1e-12)
    if case.centred:
        dead_after = made.factory().config["dead_after"]
        assert dead_after == math.ceil(trainer.dead_feature_threshold / against.ROWS)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_start_as_there(name, library, monkeypatch):
    """Norms, the shape of the distribution of entries, ties and constants, over some thousand latents."""
    monkeypatch.setattr(against, "D_SAE", 4096)
    case = against.CASES[name]
    theirs = against.weights(against.trainer_of(case, STEPS), case)
    made = against.recipe_of(case, np.zeros((STEPS, 1, 16), np.float32))
    params = made.factory().init(jax.random.key(0))
    assert set(params) == set(theirs)
    for side in (params, theirs):
        np.testing.assert_array_equal(side["W_enc"], np.asarray(side["W_dec"]).T)
    assert _measured(params["W_dec"]) == pytest.approx(_measured(theirs["W_dec"]), rel=2e-2)
    if case.trainer.startswith("standard"):
        assert _measured(params["b_enc"]) == pytest.approx(_measured(theirs["b_enc"]), rel=5e-2)
        assert np.abs(params["b_enc"]).max() <= 16**-0.5
        params["b_enc"] = theirs["b_enc"]
    for leaf in params.keys() - {"W_enc", "W_dec"}:
        np.testing.assert_allclose(params[leaf], theirs[leaf], rtol=1e-6, atol=1e-12)


def _measured(drawn):
    """Size and shape of a distribution: the shape is 3 for a normal one, 1.8 for a uniform one."""
    values = np.asarray(drawn, np.float64)
    return {"size": np.sqrt((values**2).mean()), "shape": (values**4).mean() / (values**2).mean() ** 2}


# Where the two part on purpose


def test_only_the_source_counts_a_chosen_zero_as_fired(library, torch):
    """With fewer than k positive pre-activations in a row, its TopK keeps latents alive that are 0."""
    case = against.CASES["dictionary_learning_topk"]
    trainer = against.trainer_of(case, STEPS)
    trainer.ae.encoder.bias.data[1:] = -100.0
    x = against.data(case, STEPS)[0].astype(np.float32)
    trainer.loss(torch.as_tensor(x), step=0)
    made = against.recipe_of(case, x[None].repeat(STEPS, axis=0), first_batch=None)
    sae = made.factory()
    start = {name: jnp.asarray(leaf) for name, leaf in against.weights(trainer, case).items()}
    progress = Progress(jnp.int32(0), jnp.zeros(against.D_SAE, jnp.int32))
    fired = sae.loss(start, Batch(jnp.asarray(x), jnp.asarray(x)), progress)[1].fired
    assert int(fired.sum()) == 1
    assert int((trainer.num_tokens_since_fired == 0).sum()) > 1


# Resampling


def standard_trainer(resample_steps=40):
    case = against.CASES["dictionary_learning_standard, resampling"]
    case = case._replace(arguments={**case.arguments, "resample_steps": resample_steps})
    return against.trainer_of(case, STEPS)


def resampled_there(trainer, dead, x):
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.resample_neurons(dead, x)


@pytest.mark.parametrize("rows", [32, 4])
def test_a_latent_starts_again_as_there(rows, library, torch, x64):
    case, trainer = against.CASES["dictionary_learning_standard"], standard_trainer()
    x = torch.as_tensor(against.data(case, STEPS)[0])
    trainer.ae.double()
    for step in range(5):
        trainer.update(step, x)
    before = {name: jnp.asarray(leaf) for name, leaf in against.weights(trainer, case).items()}
    dead = torch.arange(against.D_SAE) % 7 == 0
    torch.manual_seed(0)
    resampled_there(trainer, dead.clone(), x[:rows])
    after = against.weights(trainer, case)

    inputs = x[:rows].numpy()
    directions = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
    drawn = (after["W_dec"] @ directions.T).argmax(axis=1)
    silent = jnp.asarray(dead.numpy())
    replaced, ours_drawn = resampling.drawn_rows(jax.random.key(0), jnp.zeros(rows), silent)
    assert replaced.sum() == min(rows, 7)
    # no row is drawn twice, there or here
    assert len(set(drawn[replaced])) == len(set(np.asarray(ours_drawn)[replaced])) == replaced.sum()

    batch = Batch(jnp.asarray(inputs), jnp.asarray(inputs))
    new = resampling.restarted(before, batch, jnp.asarray(drawn), ~silent, unit_inputs=False)
    for name in ("W_enc", "b_enc", "W_dec"):
        mask = np.asarray(replaced[:, None] if name == "W_dec" else replaced)
        expected = np.where(mask, new[name], before[name])
        np.testing.assert_allclose(after[name], expected, rtol=1e-12, atol=1e-15)


SIZES = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
"""Lengths of inputs that a model of zeros leaves over as they are: the odds of being drawn."""
DRAWS = 3000


def chi_square(drawn, odds):
    """Pearson's statistic of rows drawn: 4 degrees of freedom, above 18.5 by chance once in a thousand."""
    expected = odds / odds.sum() * len(drawn)
    return ((np.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum()


def drawn_here():
    """The row that a dead latent takes at each of many steps."""
    sae = sae_jax.relu(5, 2, l1=0.1)
    params = {name: jnp.zeros_like(leaf) for name, leaf in sae.init(jax.random.key(0)).items()}
    x = jnp.diag(jnp.asarray(SIZES, jnp.float32))
    chain = resampling.dictionary_learning(optax.sgd(0.0), every=1, dead_after=1)

    def row(step):
        updates, _ = chain.update(
            params, chain.init(params), params,
            sae=sae, batch=Batch(x, x), progress=Progress(step, jnp.array([0, 5])),
        )  # fmt: skip
        return updates["W_dec"][1].argmax()

    # latent 0 is silent too, but for one step only
    return np.asarray(jax.jit(jax.vmap(row))(jnp.arange(1, DRAWS + 1)))


def test_rows_are_drawn_by_the_size_of_their_error():
    drawn = drawn_here()
    assert chi_square(drawn, SIZES) < 18.5
    assert chi_square(drawn, SIZES**2) > 100


def test_rows_are_drawn_there_by_the_same_odds(library, torch):
    trainer, drawn = standard_trainer(), []
    x = torch.zeros(5, against.D_IN)
    x[:, :5] = torch.diag(torch.as_tensor(SIZES, dtype=torch.float32))
    trainer.update(0, x)
    dead = torch.arange(against.D_SAE) == 3
    torch.manual_seed(0)
    for _ in range(DRAWS):
        for tensor in trainer.ae.parameters():
            tensor.data.zero_()
        resampled_there(trainer, dead.clone(), x)
        drawn.append(int(trainer.ae.decoder.weight[:, 3].argmax()))
    assert chi_square(np.array(drawn), SIZES) < 18.5


def test_two_latents_draw_without_replacement_in_the_order_of_the_latents():
    dead = jnp.array([False, True, False, True])
    keys = jax.random.split(jax.random.key(1), 20_000)
    log_odds = jnp.log(jnp.asarray(SIZES, jnp.float32))
    replaced, rows = jax.vmap(lambda key: resampling.drawn_rows(key, log_odds, dead))(keys)
    assert (replaced == dead).all()
    first, second = np.asarray(rows[:, 1]), np.asarray(rows[:, 3])
    odds = SIZES / SIZES.sum()
    pairs = odds[:, None] * odds / (1 - odds[:, None]) * (1 - np.eye(5))
    counted = np.zeros((5, 5))
    np.add.at(counted, (first, second), 1)
    assert np.diag(counted).sum() == 0
    apart = ~np.eye(5, dtype=bool)
    expected = pairs[apart] * len(keys)
    # 19 degrees of freedom
    assert ((counted[apart] - expected) ** 2 / expected).sum() < 43.8


# The library's face


def test_nothing_of_it_stays_behind(library):
    left = [name for name in sys.modules if name.split(".")[0] in ("dictionary_learning", "nnsight")]
    assert left == []
    assert importlib.util.find_spec("dictionary_learning").origin.endswith("__init__.py")


def test_a_face_is_not_run_and_can_be_later(tmp_path, monkeypatch):
    package = tmp_path / "faced"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .other import name\nran = True\n")
    (package / "other.py").write_text("name = 'other'\n")
    (package / "inner" / "__init__.py").write_text("from ..other import name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with against._without_its_face("faced"):
        inner = importlib.import_module("faced.inner")
        assert not hasattr(sys.modules["faced"], "ran")
    assert inner.name == "other"
    assert not any(name.split(".")[0] == "faced" for name in sys.modules)
    faced = importlib.import_module("faced")
    assert faced.ran
    # and where it is there already, it is what is used, and stays
    with against._without_its_face("faced"):
        assert sys.modules["faced"] is faced
        importlib.import_module("faced.inner")
    assert sys.modules["faced"] is faced
    for name in ("faced", "faced.other", "faced.inner"):
        sys.modules.pop(name, None)


def test_a_missing_library_is_one_sentence(monkeypatch):
    against._trainers.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sae_jax.InputError, match=r"^this needs dictionary_learning: pip install --no-deps"):
        next(against.against_dictionary_learning())
    against._trainers.cache_clear()


def test_too_few_steps_are_said():
    with pytest.raises(sae_jax.InputError, match="steps must be above 60"):
        next(against.against_dictionary_learning(60))


# What a recipe says


TOPK = {"d_in": 6, "d_sae": 12, "k": 2, "steps": 3000, "batch_size": 32}
L1 = {"d_in": 6, "d_sae": 12, "steps": 3000}


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (
            ours.dictionary_learning_topk,
            {**TOPK, "steps": 1000},
            "warmup_steps must be .* steps = 1000",
        ),
        (ours.dictionary_learning_topk, {**TOPK, "batch_size": 0}, "batch_size must be at least 1"),
        (ours.dictionary_learning_topk, {**TOPK, "decay_start": 1000}, "decay_start must be at least 1001"),
        (ours.dictionary_learning_standard, {**L1, "decay_start": 2000}, "decay_start must be at least 2001"),
        (ours.dictionary_learning_standard, {**L1, "resample_steps": 3000}, "resample_steps must be"),
        (
            ours.dictionary_learning_standard,
            {**L1, "decay_start": 2500, "resample_steps": 500},
            "exclude each other",
        ),
        (ours.dictionary_learning_gated, {**L1, "steps": 2000}, "sparsity_warmup_steps must be"),
        (
            ours.dictionary_learning_matryoshka,
            {**TOPK, "group_fractions": (0.5, 0.4)},
            "group_fractions must add up to 1",
        ),
        (ours.dictionary_learning_jumprelu, {**L1, "target_l0": 13.0}, "target_l0 must be"),
        (ours.dictionary_learning_april, {**L1, "resample_steps": 500}, "fixes 'resample_steps'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(build, options, says):
    with pytest.raises(sae_jax.InputError, match=says) as error:
        build(**options).factory()
    assert "\n" not in str(error.value)


def test_groups_are_rounded_down_and_the_last_takes_the_rest():
    made = ours.dictionary_learning_matryoshka(
        **TOPK, group_fractions=(0.3, 0.3, 0.4), group_weights=(1, 2, 3)
    )
    config = made.factory().config
    assert config["prefixes"] == (3, 6, 12)
    assert config["prefix_weights"] == pytest.approx((1 / 3, 2 / 3, 1))
