"""How exactly products are taken, and that everything else stays in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from cases import CASES, THOROUGH, Case

import sae_jax
from sae_jax import InputError, linear

every_size = pytest.mark.parametrize("tiny", [0, 10**9], ids=["library call", "multiply and sum"])


def as_bfloat16(array) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)


def product_and_gradients(a, b, c):
    product, transpose = jax.vjp(linear.matmul, a, b)
    return product, *transpose(c)


def draw(*shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# What is rounded


@every_size
@pytest.mark.parametrize("lead", [(), (9,), (3, 4)], ids=["a row", "rows", "two axes of rows"])
def test_bfloat16_rounds_every_operand_and_adds_up_in_float32(tiny, lead, monkeypatch):
    monkeypatch.setattr(linear, "TINY", tiny)
    a, b, c = draw((*lead, 33), (33, 17), (*lead, 17))
    with linear.precision("bfloat16"):
        found = jax.jit(product_and_gradients)(a, b, c)
    exact_a, exact_b, exact_c = (as_bfloat16(array) for array in (a, b, c))
    of_b = exact_a.reshape(-1, 33).T @ exact_c.reshape(-1, 17)
    for ours, wanted in zip(found, (exact_a @ exact_b, exact_c @ exact_b.T, of_b), strict=True):
        assert ours.dtype == jnp.float32
        # sums of 33 terms of order 1 round by 33 * 6e-8; rounded to bfloat16 they would by 4e-3
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(a, np.float64) @ np.asarray(b, np.float64) - found[0]).max() > 1e-3


@every_size
def test_members_of_a_sweep_are_rounded_as_each_alone(tiny, monkeypatch):
    monkeypatch.setattr(linear, "TINY", tiny)
    a, b, c = draw((8, 5), (3, 5, 7), (3, 8, 7))
    with linear.precision("bfloat16"):
        together = jax.vmap(product_and_gradients, in_axes=(None, 0, 0))(a, b, c)
        alone = [product_and_gradients(a, *one) for one in zip(b, c, strict=True)]
    for ours, theirs in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=1e-5)


def test_a_matrix_without_entries_is_multiplied_too():
    with linear.precision("bfloat16"):
        product, of_a, of_b = product_and_gradients(jnp.ones((4, 0)), jnp.ones((0, 3)), jnp.ones((4, 3)))
    assert not product.any()
    assert (product.shape, of_a.shape, of_b.shape) == ((4, 3), (4, 0), (0, 3))


def test_float64_is_not_rounded(x64):
    arrays = draw((9, 33), (33, 170), (9, 170), dtype=np.float64)
    exact = product_and_gradients(*arrays)
    with linear.precision("bfloat16"):
        found = product_and_gradients(*arrays)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.float64
        assert (ours == theirs).all()


# What is asked for reaches every product, and nothing else


def lowered(function, *arguments, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> set[tuple[str, str]]:
    """(dtypes, precision) of every matrix product in a lowered function."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert lines
    kinds = [" ".join(re.findall(r"tensor<(?:\d+x)*(\w+)>", line)) for line in lines]
    asked = [re.search(r"precision = \[(\w+), \1\]", line) for line in lines]
    return {(kind, one[1] if one else "") for kind, one in zip(kinds, asked, strict=True)}


def solo(case: Case, rows):
    sae, optimizer = case.sae(), case.optimizer(1e-2)
    state = sae_jax.init(sae, optimizer, jax.random.key(0))
    return sae_jax.make_step(sae, optimizer), state, case.batch(rows)


WANTED = {
    "bfloat16": ("bf16 bf16 f32", "DEFAULT"),
    "tensorfloat32": ("f32 f32 f32", "HIGH"),
    "highest": ("f32 f32 f32", "HIGHEST"),
}


@pytest.mark.parametrize("case", THOROUGH, ids=[case.name for case in THOROUGH])
def test_a_step_in_bfloat16_rounds_what_products_take_and_nothing_else(case, small, monkeypatch):
    monkeypatch.setattr(linear, "TINY", 0)
    step, state, batch = solo(case, small)
    with linear.precision("bfloat16"):
        text = lowered(step, state, batch)
        after, logs = jax.jit(step)(state, batch)
    assert products(text) == {WANTED["bfloat16"]}
    of_bfloat16 = [line.split("=", 1)[1].split()[0] for line in text.splitlines() if "xbf16>" in line]
    assert set(of_bfloat16) == {"stablehlo.convert", "stablehlo.dot_general"}
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, logs)))


@pytest.mark.parametrize("name", linear.PRECISIONS)
def test_every_product_of_a_step_is_taken_as_asked(name, small, monkeypatch):
    monkeypatch.setattr(linear, "TINY", 0)
    with linear.precision(name):
        assert products(lowered(*solo(CASES[0], small))) == {WANTED[name]}
        assert products(lowered(*solo(CASES[0], small), platform="tpu")) == {WANTED[name]}


def test_a_cpu_takes_rounded_operands_in_float32(small, monkeypatch):
    monkeypatch.setattr(linear, "TINY", 0)
    with linear.precision("bfloat16"):
        text = lowered(*solo(CASES[0], small), platform="cpu")
    assert products(text) == {WANTED["highest"]}
    assert "reduce_precision" in text


def test_outside_it_is_as_jax_is_told():
    arrays = draw((9, 33), (33, 170), (9, 170))
    assert products(lowered(product_and_gradients, *arrays)) == {("f32 f32 f32", "DEFAULT")}
    with jax.default_matmul_precision("highest"):
        assert products(lowered(product_and_gradients, *arrays)) == {WANTED["highest"]}


def test_a_program_of_another_precision_is_not_taken():
    a, b = draw((9, 33), (33, 17))
    product = jax.jit(linear.matmul)
    before = product(a, b)
    with linear.precision("bfloat16"):
        assert (product(a, b) != before).any()
        with linear.precision("highest"):
            assert (product(a, b) == before).all()
    assert (product(a, b) == before).all()


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(
        InputError, match="precision must be one of bfloat16, tensorfloat32, highest, got 'f8'"
    ):
        linear.precision("f8")


def test_a_world_is_the_same_whatever_the_precision():
    world = sae_jax.synthetic.sharkey_uncorrelated(features=64, d_in=32, batch_size=256)
    exact = world.batch(jnp.int32(3)).x
    with linear.precision("bfloat16"):
        assert (world.batch(jnp.int32(3)).x == exact).all()


# What it costs


def test_bfloat16_costs_little_on_a_synthetic_world_and_weights_in_bfloat16_cost_more():
    """A row of the table in docs/precision.md, shorter: `python tests/rounding.py`."""
    world, setup = rounding.world(), rounding.SETUPS["relu"]
    exact, products, weights = (
        rounding.trained(setup, precision, world, steps=1000, seeds=2)
        for precision in (rounding.FLOAT32, rounding.BFLOAT16_PRODUCTS, rounding.BFLOAT16_WEIGHTS)
    )
    cost = rounding.difference(exact, products)
    assert cost["l0"] != 0
    assert abs(cost["l0"]) < 0.02
    assert abs(cost["explained_variance"]) < 0.002
    assert rounding.difference(exact, weights)["l0"] > 0.02
