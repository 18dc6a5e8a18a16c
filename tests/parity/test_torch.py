"""PyTorch agrees: the independent modules, and any module a user brings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sae_jax
from sae_jax.architectures import CONVENTIONS, TABLE
from sae_jax.verify import BOUNDS, CASES, compare, harness, verify
from sae_jax.verify.cases import compare_case

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
    sae = changes.pop("sae", sae_jax.relu(5, 7, l1=0.1))
    arguments = {
        "optimizer": optax.adam(1e-2),
        "module": Mine(),
        "names": NAMES,
        "observe": observe,
        "torch_optimizer": partial(torch.optim.Adam, lr=1e-2),
        "batches": BATCHES,
        "steps": 20,
    }
    return compare(sae, params=sae.init(jax.random.key(0)), **{**arguments, **changes})


@pytest.fixture(scope="module")
def reports():
    return list(verify(steps=500))


def test_every_case_agrees_in_both_precisions(reports):
    assert [(name, report.dtype) for name, report in reports] == [
        (name, dtype) for name in CASES for dtype in ("float64", "float32")
    ]
    for name, report in reports:
        assert report.steps == 500
        assert report.ok, (name, report.dtype, report.worst)


def test_float64_agrees_to_1e_9_everywhere(reports):
    for name, report in reports:
        if report.dtype == "float64":
            assert set(report.errors) == {"forward", "loss", "gradients", "trained"}
            assert max(report.worst.values()) < 1e-9, (name, report.worst)


def test_every_architecture_and_convention_has_a_row():
    said = repr(list(CASES.values()))
    assert {case.architecture for case in CASES.values()} == set(TABLE)
    # the conventions that are defaults are not written out
    defaults = {"losses.summed", "losses.step_l0"}
    assert {name for name in CONVENTIONS if repr(name) not in said} == defaults


def test_all_that_training_keeps_is_compared(reports):
    for name, report in reports:
        params, logs = CASES[name].params(), set(report.errors["loss"])
        assert set(report.errors["forward"]) == {"f", "x_hat"}
        assert set(report.errors["gradients"]) == set(params)
        assert set(report.errors["trained"]) == set(params) | {f"mean {log}" for log in logs}
        assert logs == set(report.means)
    kept = {leaf for name, _ in reports for leaf in CASES[name].params()}
    assert {"threshold", "log_threshold", "log_penalty", "W_skip", "r_mag"} <= kept


def test_no_term_is_zero_throughout(reports):
    assert sum("auxk" in report.means for _, report in reports) == 2 * len(DYING)
    for name, report in reports:
        for term, mean in report.means.items():
            assert mean > 1e-3, (name, term)


DYING = [
    name for name, case in CASES.items() if "dead_after" in case.arguments and "pre_act" not in case.arguments
]


@pytest.mark.parametrize("name", DYING)
def test_latents_really_die_in_the_cases_with_auxk(name):
    case = CASES[name]
    sae, optimizer = case.sae(), case.optimizer()
    x, y = case.data()
    data = sae_jax.Batch(jnp.float32(x), jnp.float32(x if y is None else y))
    batches = [sae_jax.Batch(*rows) for rows in zip(*data, strict=True)]
    state = sae_jax.train.state_from(case.params(), optimizer)
    step = jax.jit(sae_jax.make_step(sae, optimizer))
    auxk = []
    for i in range(40):
        state, logs = step(state, batches[i % len(batches)])
        auxk.append(float(logs["auxk"]))
    assert auxk[0] == 0
    assert auxk[-1] > 0
    assert state.progress.since_fired.max() > case.arguments["dead_after"]
    # and those that have long been silent count from the first step on
    start = sae_jax.Progress(jnp.int32(0), jnp.int32(case.since_fired()))
    gradients, info = jax.grad(sae.loss, has_aux=True)(case.params(), batches[0], start)
    assert info.logs["auxk"] > 0
    assert not info.fired[::8].any()
    assert (jnp.abs(gradients["W_enc"][:, ::8]).max(axis=0) > 0).any()


def other(name, **changes):
    case = CASES[name]
    arguments = {key: changes.pop(key) for key in list(changes) if key not in case._fields}
    return case._replace(arguments={**case.arguments, **arguments}, **changes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("relu, p-annealing", {"p_anneal": [100, 401]}),
        ("relu, Lp norm", {"lp_root": False}),
        ("relu, target L0", {"target_l0": 6.001}),
        ("relu, L1 by decoder norm", {"l1_warmup": 101}),
        ("relu, unit-norm decoder", {"beside": ("unit norm",)}),
        ("topk, AuxK normalised", {"beside": ("clip", "project", "unit norm")}),
        ("topk, AuxK normalised", {"auxk_loss": "auxk.fvu"}),
        ("topk, AuxK of SAELens", {"rescale_acts_by_decoder_norm": False}),
        ("topk, AuxK by variance", {"dead_after": 31}),
        ("batch_topk, AuxK attached", {"auxk_loss": "auxk.normalised"}),
        ("batch_topk, AuxK attached", {"threshold_decay": 0.9900001}),
        ("jumprelu, step", {"betas": (0.0, 0.9990001)}),
        ("jumprelu, step", {"ste_to_input": True}),
        ("jumprelu, tanh and pre_act", {"dead_after": 31}),
        ("jumprelu, quadratic", {"bandwidth": 0.49}),
        ("jumprelu, quadratic of the mean", {"penalty_of_features": False}),
        ("jumprelu, log threshold", {"target_l0": 6.001}),
        ("gated", {"detach_auxiliary": False}),
        ("matryoshka of batch_topk", {"prefixes": [4, 13, 32]}),
        ("crosscoder", {"l1_warmup": 101}),
    ],
    ids=str,
)
def test_a_convention_that_differs_is_found_out(name, change):
    report = compare_case(CASES[name], other(name, **change), 110, "float64")
    assert not report.ok, report.worst


def test_a_target_apart_from_the_input_is_passed_on():
    targets = BATCHES @ np.random.default_rng(2).normal(size=(5, 5))

    def with_target(module, x, y):
        seen = observe(module, x)
        reconstruction = ((seen["x_hat"] - y) ** 2).mean()
        loss = reconstruction + 0.1 * seen["f"].mean()
        return {**seen, "reconstruction": reconstruction, "loss": loss}

    assert compared(targets=targets, observe=with_target).ok
    assert not compared(targets=targets, observe=lambda module, x, y: observe(module, x)).ok


def test_gradients_can_be_changed_before_the_step():
    clip = lambda module: torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)  # noqa: E731
    clipped = optax.chain(sae_jax.transforms.clip_by_global_norm(0.1), optax.sgd(1e-1))
    sgd = {"optimizer": clipped, "torch_optimizer": partial(torch.optim.SGD, lr=1e-1)}
    assert compared(**sgd, after_backward=clip).ok
    assert not compared(**sgd).ok


def test_a_leaf_that_is_set_may_be_a_buffer():
    class Steered(Mine):
        def __init__(self):
            super().__init__()
            self.register_buffer("log", torch.zeros(()))

    def steered(module, x, integral=0.01):
        seen = observe(module, x)
        l0 = (seen["f"] > 0).sum(dim=1).to(x.dtype).mean()
        excess = torch.clamp(torch.log(l0 / 2), -1, 1)
        weight = 0.1 * torch.exp(module.log + excess)
        module.log += integral * excess
        return {**seen, "loss": seen["reconstruction"] + weight * seen["f"].mean()}

    changes = {
        "sae": sae_jax.relu(5, 7, l1=0.1, target_l0=2),
        "names": {**NAMES, "log_penalty": "log"},
    }
    report = compared(**changes, module=Steered(), observe=steered)
    assert report.ok
    assert "log_penalty" in report.errors["trained"]
    report = compared(**changes, module=Steered(), observe=partial(steered, integral=0.0100001))
    assert report.errors["trained"]["log_penalty"] > BOUNDS["float64"]["trained"]


def test_a_users_own_module_agrees():
    report = compared()
    assert report.ok
    assert report.errors["loss"].keys() == {"loss", "reconstruction"}
    means = {f"mean {term}" for term in report.errors["loss"]}
    assert report.errors["trained"].keys() == NAMES.keys() | means


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
        ({"targets": BATCHES[:, :-1]}, "(3, 16), got shape (3, 15, 5)"),
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
