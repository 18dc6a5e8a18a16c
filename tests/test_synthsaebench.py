"""The SynthSAEBench example, at a size for a test."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sae_jax import synthetic

PATH = Path(__file__).parent.parent / "examples" / "07_synthsaebench.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("synthsaebench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthsaebench"] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["synthsaebench"]


@pytest.fixture(scope="module")
def found(example):
    """L1 after a few steps on a small world; the other recipes differ in nothing that is tested here."""
    tiny = partial(synthetic.synthsaebench_1k, features=64, d_in=16, roots=2, rank=4, steps=5, batch_size=256)
    size = example.SMALL._replace(d_in=16, d_sae=32, l0=2, prefixes=(4, 32), steps=300, lr=1e-2, l1=2.0)
    return example.train_here(tiny(), size, names=("L1",))


def test_every_seed_is_measured_and_finds_more_than_chance(example, found):
    for one in found.values():
        assert all(one[figure].shape == (example.SEEDS,) for figure in example.FIGURES)
        # 32 random directions of 16 dimensions, matched with the best of 64, come to about .55
        assert one["mcc"].min() > 0.65
        assert 0.3 < one["explained_variance"].min() <= one["explained_variance"].max() < 1
        assert len(np.unique(one["mcc"])) == example.SEEDS


def test_the_table_gives_mean_and_interval(example, found):
    lines = example.table(found).splitlines()
    f1 = found["L1"]["f1"]
    assert lines[1].startswith("L1")
    # Student's t of four degrees of freedom
    assert f"{f1.mean():.4f} +- {2.776 * f1.std(ddof=1) / 5**0.5:.4f}" in lines[1]


def test_the_verdict_is_within_only_between_the_least_and_the_most_of_theirs(example, found):
    one = found["L1"]
    told = example.verdicts(found, found).splitlines()
    assert all(line.endswith("within") for line in told[1:-1])
    assert told[-1].endswith("4 of 4 means of ours")
    moved = {"f1": one["f1"] + 0.2, "mcc": one["mcc"] + (one["mcc"].max() - one["mcc"].mean()) / 2}
    told = example.verdicts({"L1": {**one, **moved}}, found).splitlines()
    assert [line.split()[1] for line in told if line.endswith("OUTSIDE")] == ["f1"]


def test_the_picture_shows_every_architecture_of_both_sides(example, found):
    axes = example.picture({"here": found, "there": found}).axes
    assert [len(ax.containers) for ax in axes] == [2, 2]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["L1"]


def test_cost_of_the_full_benchmark(example):
    need = example.cost(example.FULL)
    samples = 195_312 * 1024
    assert need.per_sae == 10 * 768 * 4096
    assert need.per_row == 2 * 16_384 * 768
    assert need.flops == 5 * samples * (5 * need.per_sae + need.per_row)
    assert need.draws == 5 * samples * 3 * 16_384
    weights, rows, world = 2 * 768 * 4096, 1024 * 4096, 16_384 * (768 + 4 * 1024)
    assert need.memory == 4 * (5 * 4 * (weights + rows) + world)


def test_the_plan_claims_nothing(example):
    told = example.plan(example.FULL, flops=1e12, draws=1e9)
    # 5 * 2e8 * (5 * 31.5e6 + 25.2e6) / 1e12 s, and 5 * 2e8 * 49152 / 1e9 s
    assert "products 51, random numbers 14" in told
    assert "at the least  64 hours" in told
    assert "nothing is claimed" in told
