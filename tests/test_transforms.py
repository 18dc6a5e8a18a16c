"""Constraints in the optimizer chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, InputError, transforms


def test_decoder_rows_have_norm_one_after_every_step(small, x64):
    small = small.astype(np.float64)
    sae = sae_jax.relu(5, 7, l1=0.1)
    optimizer = optax.chain(optax.adam(1e-2), transforms.unit_norm_decoder())
    state = sae_jax.init(sae, optimizer, jax.random.key(0), jnp.float64)
    assert np.abs(np.linalg.norm(state.params["W_dec"], axis=1) - 1).max() > 0.1
    step, batch = jax.jit(sae_jax.make_step(sae, optimizer)), Batch(jnp.asarray(small), jnp.asarray(small))
    for _ in range(20):
        state, _ = step(state, batch)
        np.testing.assert_allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, rtol=1e-12)


def test_it_is_the_plain_update_brought_to_norm_one_and_touches_no_other_leaf():
    params = {"W_dec": jnp.array([[3.0, 4.0], [0.0, 1.0]]), "b_dec": jnp.ones(2)}
    updates = {"W_dec": jnp.array([[0.0, 0.0], [1.0, 0.0]]), "b_dec": jnp.array([5.0, 7.0])}
    optimizer = transforms.unit_norm_decoder()
    bent, _ = optimizer.update(updates, optimizer.init(params), params)
    after = optax.apply_updates(params, bent)
    np.testing.assert_allclose(after["W_dec"], [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    np.testing.assert_array_equal(bent["b_dec"], updates["b_dec"])
    np.testing.assert_array_equal(updates["W_dec"], [[0.0, 0.0], [1.0, 0.0]])


def test_a_row_of_zeros_stays_and_harms_no_other():
    params = {"W_dec": jnp.array([[0.0, 0.0], [0.0, 2.0]])}
    optimizer = transforms.unit_norm_decoder()
    bent, _ = optimizer.update({"W_dec": jnp.zeros((2, 2))}, optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, bent)["W_dec"], [[0.0, 0.0], [0.0, 1.0]])


def test_it_says_what_it_lacks():
    optimizer = transforms.unit_norm_decoder()
    with pytest.raises(InputError, match="needs the params"):
        optimizer.update({"W_dec": jnp.ones((1, 1))}, optax.EmptyState())


ROWS = np.random.default_rng(0).normal(size=(7, 5))
UPDATE = np.random.default_rng(1).normal(size=(7, 5))


def bent(optimizer, W_dec, update, name="W_dec"):
    params = {name: jnp.asarray(W_dec)}
    updates, _ = optimizer.update({name: jnp.asarray(update)}, optimizer.init(params), params)
    return np.asarray(updates[name])


@pytest.mark.parametrize("eps", [0.0, 1e-6, None])
def test_an_eps_is_added_to_the_norm(eps, x64):
    added = np.finfo(np.float64).eps if eps is None else eps
    arrived = ROWS + UPDATE
    expected = arrived / (np.linalg.norm(arrived, axis=1, keepdims=True) + added)
    ours = ROWS + bent(transforms.unit_norm_decoder(eps), ROWS, UPDATE)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=4e-16)


def test_before_the_update_the_weights_are_normalised_and_the_update_left(x64):
    ours = ROWS + bent(transforms.unit_norm_decoder(before_update=True), ROWS, UPDATE)
    expected = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True) + UPDATE
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-15)


def test_a_projected_gradient_is_orthogonal_to_its_row_and_loses_nothing_else(x64):
    ours = bent(transforms.project_decoder_gradient(), ROWS, UPDATE)
    np.testing.assert_allclose((ours * ROWS).sum(axis=1), 0, atol=1e-14)
    for removed, row in zip(UPDATE - ours, ROWS, strict=True):
        np.testing.assert_allclose(removed, row * (removed @ row) / (row @ row), atol=1e-14)
    np.testing.assert_allclose(bent(transforms.project_decoder_gradient(), ROWS, ours), ours, atol=1e-14)


def test_a_projections_eps_is_added_to_the_norm(x64):
    direction = ROWS / (np.linalg.norm(ROWS, axis=1, keepdims=True) + 1e-2)
    expected = UPDATE - (UPDATE * direction).sum(axis=1, keepdims=True) * direction
    np.testing.assert_allclose(
        bent(transforms.project_decoder_gradient(1e-2), ROWS, UPDATE), expected, rtol=0, atol=1e-15
    )


def test_thresholds_do_not_fall_below_zero():
    thresholds, updates = np.array([0.1, 0.1, 0.0], np.float32), np.array([-0.05, -0.3, 0.2], np.float32)
    arrived = thresholds + bent(transforms.non_negative_threshold(), thresholds, updates, "threshold")
    np.testing.assert_allclose(arrived, [0.05, 0, 0.2], rtol=1e-6)
    assert arrived[1] == 0


@pytest.mark.parametrize("size", [0.01, 0.999, 1.0, 1.5, 300.0])
def test_clipping_is_torchs(size, torch, x64):
    rng = np.random.default_rng(2)
    gradients = {"W_dec": rng.normal(size=(4, 3)), "b_dec": rng.normal(size=3)}
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in gradients.values()))
    gradients = {name: leaf * size / norm for name, leaf in gradients.items()}
    tensors = {
        name: torch.nn.Parameter(torch.zeros(leaf.shape, dtype=torch.float64))
        for name, leaf in gradients.items()
    }
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradients[name])
    torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
    clip = transforms.clip_by_global_norm(1.0)
    ours, _ = clip.update(jax.tree.map(jnp.asarray, gradients), clip.init(gradients))
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.grad.numpy(), rtol=1e-15, atol=0)


# Schedules


def rates(scheduler, optimizer, steps):
    """The learning rate that each step is taken with."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def torch_optimizer(torch):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (7, 0), (0, 11), (7, 11), (20, 20), (1, 1), (2, 40)])
def test_a_trapezoid_from_one_is_saelenss_chain_of_schedulers(warmup, decay, torch, x64):
    steps, schedulers, milestones = 50, [], []
    optimizer = torch_optimizer(torch)
    lr_scheduler = torch.optim.lr_scheduler
    if warmup:
        rise = lr_scheduler.LinearLR(
            optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1
        )
        schedulers.append(rise)
        milestones.append(warmup)
    schedulers.append(lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    if decay:
        schedulers.append(
            lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=decay)
        )
        milestones.append(steps - decay)
    theirs = rates(lr_scheduler.SequentialLR(optimizer, schedulers, milestones), optimizer, steps)
    ours = jax.vmap(transforms.trapezoid(warmup, steps, decay, first=1.0))(jnp.arange(steps))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("warmup", "decay_start"), [(0, None), (7, None), (0, 39), (7, 39), (20, 21), (1, 49)]
)
def test_a_trapezoid_from_zero_is_dictionary_learnings_lambda(warmup, decay_start, torch, x64):
    steps = 50
    optimizer = torch_optimizer(torch)

    def factor(step):
        if step < warmup:
            return step / warmup
        if decay_start is not None and step >= decay_start:
            return (steps - step) / (steps - decay_start)
        return 1.0

    theirs = rates(torch.optim.lr_scheduler.LambdaLR(optimizer, factor), optimizer, steps)
    decay = 0 if decay_start is None else steps - decay_start
    ours = jax.vmap(transforms.trapezoid(warmup, steps, decay))(jnp.arange(steps))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_trapezoids_steps_can_be_an_axis():
    factors = jax.vmap(lambda warmup: transforms.trapezoid(warmup)(jnp.int32(2)))(jnp.array([0, 1, 4]))
    np.testing.assert_allclose(factors, [1, 1, 0.5])


# Averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_all_weights_so_far(decay, x64):
    rng = np.random.default_rng(3)
    optimizer = optax.chain(optax.sgd(0.1), transforms.average_weights(decay))
    params = {"W_dec": jnp.asarray(rng.normal(size=(3, 2)))}
    state, seen = optimizer.init(params), []
    np.testing.assert_array_equal(state[1].average["W_dec"], params["W_dec"])
    for t in range(1, 8):
        updates, state = optimizer.update({"W_dec": jnp.asarray(rng.normal(size=(3, 2)))}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["W_dec"]))
        weights = decay ** np.arange(t - 1, -1, -1.0)
        # the share of the newest is computed in float32
        expected = np.tensordot(weights / weights.sum(), np.array(seen), 1)
        np.testing.assert_allclose(state[1].average["W_dec"], expected, rtol=2e-4 if decay == 0.999 else 1e-6)


def test_averaging_leaves_training_as_it_is_and_gives_evaluation_the_average(small):
    sae, batch = sae_jax.relu(5, 7), Batch(jnp.asarray(small), jnp.asarray(small))
    plain, averaged = optax.adam(1e-2), optax.chain(optax.adam(1e-2), transforms.average_weights(0.5))
    states = [sae_jax.init(sae, optimizer, jax.random.key(0)) for optimizer in (plain, averaged)]
    for _ in range(3):
        states = [
            sae_jax.make_step(sae, o)(s, batch)[0] for o, s in zip((plain, averaged), states, strict=True)
        ]
    for name, leaf in states[0].params.items():
        np.testing.assert_array_equal(leaf, states[1].params[name])
    assert sae_jax.train.trained_params(states[0]) is states[0].params
    assert not np.array_equal(sae_jax.train.trained_params(states[1])["W_dec"], states[1].params["W_dec"])


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("unit_norm_decoder", "W_dec"), ("project_decoder_gradient", "W_dec"),
     ("non_negative_threshold", "threshold"), ("average_weights", "W_dec")],
)  # fmt: skip
def test_each_says_that_it_needs_the_params(name, leaf):
    optimizer = getattr(transforms, name)()
    with pytest.raises(InputError, match=f"^{name} needs the params"):
        optimizer.update({leaf: jnp.ones((1, 1))}, optimizer.init({leaf: jnp.ones((1, 1))}))
