"""The sparse products: in Pallas's interpreters and in plain JAX against numpy; lowered for GPU and TPU."""

import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as mosaic

from sae_jax import kernels
from sae_jax.base import InputError
from sae_jax.kernels import gpu, plain, tpu

ENTRIES, SEGMENTS, ROWS = 300, 21, 9
"""More than a chunk of a TPU's entries and more than a step's segments, neither a multiple of one."""

PATHS = {
    "plain": (plain.segment_sum, plain.row_dots),
    "gpu": (partial(gpu.segment_sum, interpret=True), partial(gpu.row_dots, interpret=True)),
    "tpu": (partial(tpu.segment_sum, interpret=True), partial(tpu.row_dots, interpret=True)),
}
SUMS, DOTS = ({path: jax.jit(products[which]) for path, products in PATHS.items()} for which in (0, 1))
every_path = pytest.mark.parametrize("path", PATHS)
# narrower than any block, no multiple of one, and more than one block of a GPU's columns
every_width = pytest.mark.parametrize(("d", "dtype"), [(5, "float32"), (200, "bfloat16"), (700, "float32")])

CALLS = {"cuda": "triton", "tpu": "tpu_custom_call"}
"""What a lowered program calls."""

# later versions lower Triton with the help of CUDA's plugin
HERE = ["cuda", "tpu"] if jax.__version_info__ <= (0, 10, 1) else ["tpu"]
on_every_platform = pytest.mark.parametrize("platform", HERE)


def table_of(seed: int, rows: int, d: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, d)), dtype)


def entries_of(seed: int, starts: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Values and rows; what lies outside of every segment would spoil any sum, as row 0 would."""
    draw = np.random.default_rng(seed)
    values, rows = np.full(ENTRIES, np.nan, np.float32), np.zeros(ENTRIES, np.int32)
    inside = slice(starts[0], starts[-1])
    values[inside] = draw.normal(size=ENTRIES)[inside]
    rows[inside] = draw.integers(1, ROWS, ENTRIES)[inside]
    return jnp.asarray(values), jnp.asarray(rows)


def wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def sums_by_numpy(values, rows, starts, table) -> np.ndarray:
    values, rows, table = wide(values), np.asarray(rows), wide(table)
    return np.stack([values[first:last] @ table[rows[first:last]] for first, last in pairwise(starts)])


def close(got, want, dtype):
    # a bfloat16 answer is the sum in float32, rounded once
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(wide(got), want, rtol=tolerance, atol=2e-5)


@every_path
@every_width
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, ENTRIES), min_size=SEGMENTS + 1, max_size=SEGMENTS + 1).map(sorted),
    st.integers(0, 99),
)
@example([0] * SEGMENTS + [ENTRIES], 0)  # the last has all
@example([0] + [ENTRIES] * SEGMENTS, 0)  # the first has all
@example([7] * (SEGMENTS + 1), 0)  # none has any
@example(list(range(200, 200 + SEGMENTS + 1)), 0)  # one each, padding on both sides
def test_segment_sum_is_the_sum_over_each_segment(path, d, dtype, starts, seed):
    starts = np.array(starts, np.int32)
    values, rows = entries_of(seed, starts)
    table = table_of(seed, ROWS, d, dtype).at[0].set(jnp.nan)
    got = SUMS[path](values, rows, starts, table)
    assert got.dtype == table.dtype
    close(got, sums_by_numpy(values, rows, starts, table), dtype)


@every_path
@pytest.mark.parametrize(("left", "right"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize(("entries", "d"), [(1, 5), (ENTRIES, 200), (8, 700)])
def test_row_dots_are_the_products_of_the_rows(path, entries, d, left, right):
    draw = np.random.default_rng(d)
    left, right = table_of(1, ROWS, d, left), table_of(2, 2 * ROWS, d, right)
    left_rows, right_rows = (
        jnp.asarray(draw.integers(0, n, entries), jnp.int32) for n in (left.shape[0], right.shape[0])
    )
    got = DOTS[path](left, left_rows, right, right_rows)
    assert got.dtype == jnp.float32
    want = (wide(left)[np.asarray(left_rows)] * wide(right)[np.asarray(right_rows)]).sum(axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=5e-5)


@every_path
def test_no_entries_and_no_segments_are_allowed(path):
    table, none = table_of(0, ROWS, 5, "float32"), jnp.zeros(0, jnp.int32)
    starts = jnp.zeros(4, jnp.int32)
    assert np.array_equal(SUMS[path](jnp.zeros(0), none, starts, table), np.zeros((3, 5)))
    assert SUMS[path](jnp.ones(2), jnp.zeros(2, jnp.int32), starts[:1], table).shape == (0, 5)
    assert DOTS[path](table, none, table, none).shape == (0,)


def test_a_tpu_reads_no_row_before_it_has_arrived(monkeypatch):
    for name, size in {"CHUNK": 16, "SEGMENTS": 4, "SLOTS": 4, "AHEAD": 3}.items():
        monkeypatch.setattr(tpu, name, size)
    # nothing is copied until it is waited for, and what was never written is NaN
    late = mosaic.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    starts = np.array([2, 3, 3, 21, 22, 40], np.int32)
    values, rows = (each[:50] for each in entries_of(0, starts))
    table = table_of(0, ROWS, 130, "float32")
    got = tpu.segment_sum(values, rows, jnp.asarray(starts), table, interpret=late)
    close(got, sums_by_numpy(values, rows, starts, table), "float32")
    got = tpu.row_dots(table, rows, table, rows[::-1], interpret=late)
    np.testing.assert_allclose(got, plain.row_dots(table, rows, table, rows[::-1]), rtol=1e-5, atol=1e-5)


def of_real_size(dtype: str) -> dict:
    """What decoding, a gradient of weights and a gradient of features ask for, k = 64 of 65,536."""
    many = jax.ShapeDtypeStruct((64 * 8192,), jnp.int32)
    values = jax.ShapeDtypeStruct(many.shape, jnp.float32)
    x, W_dec = (jax.ShapeDtypeStruct((n, 2304), dtype) for n in (8192, 65536))
    by_row, by_latent = (jax.ShapeDtypeStruct((n + 1,), jnp.int32) for n in (8192, 65536))
    return {
        "decode": (kernels.segment_sum, values, many, by_row, W_dec),
        "weights": (kernels.segment_sum, values, many, by_latent, x),
        "features": (kernels.row_dots, x, many, W_dec, many),
    }


def lowered_for(platforms: tuple[str, ...], product, *operands) -> jax.stages.Lowered:
    # a function of its own, since JAX would hand out again what it lowered for another test
    return jax.jit(lambda *operands: product(*operands)).trace(*operands).lower(lowering_platforms=platforms)


@on_every_platform
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use", ["decode", "weights", "features"])
def test_real_sizes_are_lowered_to_a_kernel(platform, use, dtype):
    product, *operands = of_real_size(dtype)[use]
    assert CALLS[platform] in lowered_for((platform,), product, *operands).as_text()


@on_every_platform
def test_kernels_are_lowered_under_64_bit_types_too(platform, x64):
    forget()
    for product, *operands in of_real_size("float32").values():
        lowered = lowered_for((platform,), product, *operands)
        assert CALLS[platform] in lowered.as_text()
        assert lowered.out_info.dtype == jnp.float32


def test_one_program_has_the_kernel_of_each_platform_and_plain_jax_elsewhere():
    product, *operands = of_real_size("float32")["decode"]

    def program(values, *others):
        return jax.lax.map(lambda each: product(each, *others), jnp.stack([values, values]))

    lowered = lowered_for(("cpu", *HERE), program, *operands).as_text()
    assert all(CALLS[platform] in lowered for platform in HERE)
    alone = lowered_for(("cpu",), program, *operands).as_text()
    assert not any(call in alone for call in CALLS.values())


def test_on_a_cpu_pallas_is_not_even_imported():
    code = """
import sys
import jax, jax.numpy as jnp
from jax._src import xla_bridge
from sae_jax import kernels
assert not xla_bridge.backends_are_initialized()
rows, table = jnp.zeros(3, jnp.int32), jnp.ones((2, 4))
print(kernels.segment_sum(jnp.ones(3), rows, jnp.array([0, 3]), table)[0, 0])
print(kernels.row_dots(table, rows, table, rows)[0])
assert "jax.experimental.pallas" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3.0", "4.0"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_are_refused(dtype, x64):
    rows, table = jnp.zeros(3, jnp.int32), jnp.ones((2, 4), dtype)
    with pytest.raises(InputError, match=f"float32 or bfloat16, got {dtype}"):
        kernels.segment_sum(jnp.ones(3, jnp.float32), rows, rows[:2], table)
    with pytest.raises(InputError, match=f"float32 or bfloat16, got {dtype}"):
        kernels.row_dots(table.astype(jnp.float32), rows, table, rows)


@pytest.fixture
def on_cpu(monkeypatch):
    """Makes this machine's CPU a platform with a module's kernels, and gives a product that uses them."""

    def take(module: str):
        monkeypatch.setitem(kernels.KERNELS, "cpu", module)
        return kernels._step("segment_sum", lambda v, r, s, table: jax.core.ShapedArray((2, 5), table.dtype))

    forget()
    yield take
    forget()


def forget() -> None:
    """Have kernels tried again."""
    kernels.usable.cache_clear()
    kernels.compiles.cache_clear()


def halves(product):
    """Rows 0 and 1, and rows 2 and 3, by a program that is on its way through jit when kernels are tried."""
    rows, starts = jnp.arange(4, dtype=jnp.int32), jnp.array([0, 2, 4], jnp.int32)
    return jax.jit(lambda table: product.bind(jnp.ones(4), rows, starts, table))(
        jnp.arange(20.0).reshape(4, 5)
    )


SUMMED = np.array([[5, 7, 9, 11, 13], [25, 27, 29, 31, 33]])


@on_every_platform
def test_where_a_platform_is_not_here_its_kernels_are_lowered(platform, recwarn):
    forget()
    assert kernels.usable(platform)
    assert not recwarn.list


def test_a_device_that_is_here_is_asked_for_the_right_answer(on_cpu, monkeypatch, recwarn):
    product, asked = on_cpu("plain"), []
    right = plain.row_dots
    monkeypatch.setattr(plain, "row_dots", lambda *operands: asked.append(operands) or right(*operands))
    assert np.array_equal(halves(product), SUMMED)
    assert asked
    assert kernels.usable("cpu")
    assert not recwarn.list


def test_a_kernel_that_does_not_compile_is_told_of_once_and_not_used(on_cpu):
    product = on_cpu("gpu")
    told = r"^the sparse kernels do not compile on cpu \(ValueError: Only .*\): the plain path is used$"
    with pytest.warns(UserWarning, match=told) as caught:
        assert np.array_equal(halves(product), SUMMED)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable("cpu")
        assert np.array_equal(halves(product), SUMMED)


@pytest.mark.parametrize("wrong", ["segment_sum", "row_dots"])
def test_a_kernel_that_answers_wrongly_is_not_used(on_cpu, monkeypatch, wrong):
    product = on_cpu("gpu")
    for name in ("segment_sum", "row_dots"):
        right = getattr(plain, name)
        monkeypatch.setattr(gpu, name, right)
    monkeypatch.setattr(gpu, wrong, lambda *operands: getattr(plain, wrong)(*operands).at[-1].add(1))
    with pytest.warns(UserWarning, match="give wrong sums on cpu: the plain path is used$"):
        assert np.array_equal(halves(product), SUMMED)
    assert not kernels.usable("cpu")


def test_a_kernel_that_compiles_but_not_for_the_sizes_at_hand_is_told_of_and_not_used(on_cpu, monkeypatch):
    product = on_cpu("gpu")

    def only_small(values, rows, starts, table):
        if values.size == 4:
            raise MemoryError("too many entries\nand more")
        return plain.segment_sum(values, rows, starts, table)

    monkeypatch.setattr(gpu, "segment_sum", only_small)
    monkeypatch.setattr(gpu, "row_dots", plain.row_dots)
    told = (
        r"^the sparse kernel segment_sum does not compile on cpu for float32\[4\], int32\[4\], int32\[3\], "
        r"float32\[4, 5\] \(MemoryError: too many entries\): the plain path is used$"
    )
    with pytest.warns(UserWarning, match=told) as caught:
        assert np.array_equal(halves(product), SUMMED)
    assert len(caught) == 1
    assert kernels.usable("cpu"), "other sizes do compile"


@on_every_platform
def test_a_kernel_that_is_not_lowered_is_not_used(platform, monkeypatch):
    forget()

    def fails(*operands):
        raise NotImplementedError("no such instruction\nand more")

    module = {"cuda": gpu, "tpu": tpu}[platform]
    monkeypatch.setattr(module, "row_dots", fails)
    product, *operands = of_real_size("float32")["features"]
    with pytest.warns(UserWarning, match=rf"{platform} \(NotImplementedError: no such instruction\): the pl"):
        lowered = lowered_for((platform,), product, *operands)
    assert CALLS[platform] not in lowered.as_text()
    forget()


def test_other_platforms_have_no_kernels():
    with pytest.raises(InputError, match="there are sparse kernels for cuda, tpu, not for abacus"):
        kernels.usable("abacus")
