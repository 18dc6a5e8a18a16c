"""Tables of members, and the axes that the command line writes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax import InputError, grid, zipped
from sae_jax.grid import members, parse_axis

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-300, max_value=1e300)


def test_axes_multiply_and_the_last_named_varies_fastest():
    table = grid(l1=[0.1, 0.2], lr=[1e-3], seed=range(3))
    assert list(table) == ["l1", "lr", "seed"]
    rows = list(zip(*(column.tolist() for column in table.values()), strict=True))
    assert rows == list(itertools.product([0.1, 0.2], [1e-3], [0, 1, 2]))
    assert table["seed"].dtype.kind == "i"
    assert table["l1"].dtype.kind == "f"
    assert members(table) == 6


def test_zipped_axes_walk_together_and_multiply_with_others():
    pair = zipped(l1=[0.1, 0.2], lr=[1e-3, 1e-4])
    table = grid(pair, seed=range(2))
    rows = list(zip(table["l1"].tolist(), table["lr"].tolist(), table["seed"].tolist(), strict=True))
    assert rows == [(0.1, 1e-3, 0), (0.1, 1e-3, 1), (0.2, 1e-4, 0), (0.2, 1e-4, 1)]


def test_an_axis_may_be_an_array(small):
    import jax.numpy as jnp

    assert grid(l1=jnp.array([0.5, 0.25]), lr=np.array([1, 2]))["l1"].tolist() == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid(), "at least one axis"),
        (lambda: grid(l1=[]), "'l1' has no values"),
        (lambda: grid(l1=0.1), "'l1' must be a list of numbers"),
        (lambda: grid(l1="0.1"), "'l1' must be a list of numbers"),
        (lambda: grid(l1=["a"]), "'l1' must be a list of numbers"),
        (lambda: grid(l1=[None]), "'l1' must be a list of numbers"),
        (lambda: grid(l1=[1j]), "'l1' must be a list of numbers"),
        (lambda: grid(l1=[True]), "'l1' must be a list of numbers"),
        (lambda: grid(l1=[[0.1]]), "'l1' must be a list of numbers"),
        (lambda: grid(l1=[[0.1], [0.1, 0.2]]), "'l1' must be a list of numbers"),
        (lambda: grid(zipped(l1=[0.1]), l1=[0.1]), "'l1' is given twice"),
        (lambda: grid(zipped(), seed=[1]), "axis"),
        (lambda: zipped(l1=[0.1], lr=[1e-3, 1e-4]), "l1 has 1, lr has 2"),
        (lambda: zipped(l1=[]), "'l1' has no values"),
    ],
)
def test_a_bad_axis_is_refused_in_one_sentence(make, message, unchecked):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@given(st.lists(finite, min_size=1, max_size=20))
def test_a_list_reads_back_as_it_was_written(values):
    assert parse_axis(",".join(map(repr, values))) == values
    assert parse_axis(" , ".join(map(repr, values))) == values


@given(positive, positive, st.integers(2, 200))
def test_a_range_has_n_values_with_exact_ends_evenly_spaced_in_their_logarithm(a, b, count):
    low, high = sorted((a, b))
    values = parse_axis(f"{low!r}:{high!r}:{count}")
    assert len(values) == count
    assert values[0] == low
    assert values[-1] == high
    ratio = (math.log(high) - math.log(low)) / (count - 1)
    expected = [math.log(low) + k * ratio for k in range(count)]
    np.testing.assert_allclose(np.log(values), expected, rtol=1e-12, atol=1e-11)


def test_known_ranges():
    assert parse_axis("0.01:1:3") == [0.01, pytest.approx(0.1), 1.0]
    assert parse_axis("0.5:0.5:1") == [0.5]
    assert parse_axis("2:2:3") == [2.0, 2.0, 2.0]
    assert parse_axis("3e-4") == [3e-4]


def one_line(error):
    assert str(error)
    assert "\n" not in str(error)


plausible = st.text(alphabet="0123456789.:,eE+-naif _x", max_size=25)


@given(st.one_of(plausible, st.text(max_size=25)))
def test_any_text_gives_finite_numbers_or_one_sentence(text):
    try:
        values = parse_axis(text)
    except InputError as error:
        one_line(error)
    else:
        assert len(values) >= 1
        assert isinstance(values[0], float)
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in '' is not a number"),
        ("0.1,,0.2", "is not a number"),
        ("a", "'a' in 'a' is not a number"),
        ("nan", "is not finite"),
        ("1e400", "is not finite"),
        ("1:2", "a range is written A:B:N"),
        ("1:2:3:4", "a range is written A:B:N"),
        ("0:1:3", "must start above 0"),
        ("-1:1:3", "must start above 0"),
        ("2:1:3", "reversed"),
        ("1:2:2.5", "whole number"),
        ("1:2:0", "whole number"),
        ("1:2:-3", "whole number"),
        ("1:2:1e12", "whole number"),
        ("1:2:1", "one value between two ends"),
    ],
)
def test_a_bad_text_is_refused_with_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_axis(text)
