"""PyTorch agrees: the independent modules, and any module a user brings."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
import torch

import sae_jax
from sae_jax.verify import BOUNDS, compare, harness, verify

BATCHES = np.random.default_rng(1).normal(size=(3, 16, 5))
NAMES = {"W_enc": "up.T", "b_enc": "up_bias", "W_dec": "down.T", "b_dec": "down_bias"}


class Mine(torch.nn.Module):
    """A user's own port, with names and layout of its own."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.zeros(7, 5))
        self.up_bias = torch.nn.Parameter(torch.zeros(7))
        self.down = torch.nn.Parameter(torch.zeros(5, 7))
        self.down_bias = torch.nn.Parameter(torch.zeros(5))


def observe(module, x, l1=0.1):
    f = torch.relu(x @ module.up.T + module.up_bias)
    x_hat = f @ module.down.T + module.down_bias
    reconstruction = ((x_hat - x) ** 2).mean()
    return {"f": f, "x_hat": x_hat, "reconstruction": reconstruction, "loss": reconstruction + l1 * f.mean()}


def compared(**changes):
    sae = sae_jax.relu(5, 7, l1=0.1)
    arguments = {
        "module": Mine(),
        "names": NAMES,
        "observe": observe,
        "torch_optimizer": partial(torch.optim.Adam, lr=1e-2),
        "batches": BATCHES,
        "steps": 20,
    }
    return compare(sae, optax.adam(1e-2), sae.init(jax.random.key(0)), **{**arguments, **changes})


@pytest.fixture(scope="module")
def reports():
    return list(verify(steps=500))


def test_every_case_agrees_in_both_precisions(reports):
    assert len(reports) == 14
    for name, report in reports:
        assert report.steps == 500
        assert report.ok, (name, report.dtype, report.worst)


def test_float64_agrees_to_1e_9_everywhere(reports):
    for name, report in reports:
        if report.dtype == "float64":
            assert set(report.errors) == {"forward", "loss", "gradients", "trained"}
            assert max(report.worst.values()) < 1e-9, (name, report.worst)


def test_a_users_own_module_agrees():
    report = compared()
    assert report.ok
    assert report.errors["loss"].keys() == {"loss", "reconstruction"}
    assert report.errors["trained"].keys() == NAMES.keys()


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"observe": partial(observe, l1=0.11)}, {"loss", "gradients", "trained"}),
        ({"torch_optimizer": partial(torch.optim.Adam, lr=1.001e-2)}, {"trained"}),
        ({"torch_optimizer": partial(torch.optim.Adam, lr=1e-2, eps=1e-6)}, {"trained"}),
        ({"after_step": lambda module: module.down_bias.mul_(1 - 1e-6)}, {"trained"}),
    ],
)
def test_a_port_that_differs_is_found_out(change, stages):
    report = compared(**change)
    assert not report.ok
    assert {stage for stage, error in report.worst.items() if error > BOUNDS["float64"][stage]} == stages


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"names": {**NAMES, "W_enc": "up"}}, "transposed"),
        ({"names": {**NAMES, "W_enc": "sideways"}}, "no parameter sideways"),
        ({"names": {name: path for name, path in NAMES.items() if name != "b_enc"}}, "b_enc"),
        ({"names": {**NAMES, "W_extra": "up"}}, "W_extra"),
        ({"observe": lambda module, x: {"f": x}}, "'loss'"),
        ({"observe": lambda module, x: {"loss": module.up.sum()}}, "does not depend"),
        ({"dtype": "float16"}, "float64"),
        ({"batches": BATCHES[0]}, "[n, batch, d_in]"),
    ],
)
def test_what_does_not_match_is_said(change, says):
    with pytest.raises(sae_jax.InputError) as error:
        compared(**change)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parameter_the_map_leaves_out_is_said():
    module = Mine()
    module.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(sae_jax.InputError, match="leaves out the module's extra"):
        compared(module=module)


def test_relative_error_by_hand():
    assert harness.relative_error(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == pytest.approx(0.1)
    assert harness.relative_error(np.array([0.5]), np.array([0.0])) == 0.5
    assert harness.relative_error(np.zeros(2), np.zeros(3)) == np.inf
    assert not harness.Report("float64", 1, {"loss": {"loss": float("nan")}}, {"loss": 1.0}).ok
