"""Training: one pure step, and the one loop that repeats it."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Scalar

from sae_jax import checkpoint
from sae_jax.base import SAE, Batch, Params, Progress, TrainState, require
from sae_jax.data import Source, stages

Step = Callable[[Any, Batch], tuple[Any, dict[str, Array]]]
"""`(state, batch) -> (state, logs)`: for one SAE or, vmapped, for a thousand."""

History = dict[str, np.ndarray]
"""Logs by name, [points, ...], and `step` [points]: after how many steps each point was taken."""

SECONDS_PER_CHUNK = 0.5
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SECONDS_WORTH_KEEPING = 2.0  # a finished run shorter than this is repeated sooner than saved


def init(
    sae: SAE, optimizer: optax.GradientTransformation, key: Key[Array, ""], dtype=jnp.float32
) -> TrainState:
    """The state before the first step.

    Args:
      sae: the model.
      optimizer: an optax chain.
      key: a typed key, `jax.random.key(seed)`.
      dtype: of the weights.

    Returns:
      A `TrainState` at step 0, in which no latent has fired yet.

    Example:
      >>> state = init(sae, optax.adam(1e-2), jax.random.key(0))
    """
    return state_from(sae.init(key, dtype), optimizer)


def state_from(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0 with these weights."""
    silent = jnp.zeros(params["W_dec"].shape[0], jnp.int32)
    return TrainState(params, optimizer.init(params), Progress(jnp.int32(0), silent))


def make_step(sae: SAE, optimizer: optax.GradientTransformation) -> Step:
    """One pure training step: jit it, vmap it, shard it.

        grads = d loss / d params;  params <- params + optimizer(grads);  assigned leaves are put in place

    An optimizer that wants more than gradients (resampling, say) is handed `batch`, `progress`, `value`
    and `sae` as optax extra arguments.

    Args:
      sae: the model.
      optimizer: an optax chain.

    Returns:
      `step(state, batch) -> (state, logs)`; `logs` are scalars by name, taken before the update.

    Example:
      >>> step = make_step(sae, optax.adam(1e-2))
      >>> state, logs = step(state, source.batch(0))
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Scalar]]:
        params, opt_state, progress = state
        (value, info), grads = jax.value_and_grad(sae.loss, has_aux=True)(params, batch, progress)
        updates, opt_state = optimizer.update(
            grads, opt_state, params, batch=batch, progress=progress, value=value, sae=sae
        )
        params = {**cast(Params, optax.apply_updates(params, updates)), **info.assigned}
        since_fired = jnp.where(info.fired, 0, progress.since_fired + 1)
        state = TrainState(params, opt_state, Progress(progress.step + 1, since_fired))
        return state, {**info.logs, "loss": value}

    return step


def trained_params(state: TrainState) -> Params:
    """The weights that a run leaves: the average where `transforms.average_weights` keeps one.

    Args:
      state: of a run, or of a sweep's members.
    """
    average = optax.tree_utils.tree_get(state.opt_state, "average")
    return state.params if average is None else average


def stacked(logs: dict[str, Array]) -> Float[Array, "logs *members"]:
    """Logs as one array, in float32 or better: many small leaves would make a CPU loop slow."""
    leaves = jax.tree.leaves(logs)
    return jnp.stack(leaves).astype(jnp.result_type(*leaves, jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _advance(step: Step, state, source: Source, first: Int[Array, ""], count: Int[Array, ""]):
    """`count` steps from step `first`; the logs of the last. A traced count compiles once for all chunks."""

    def one(i, carry):
        state, logs = step(carry[0], source.batch(first + i))
        return state, stacked(logs)

    logs = jax.eval_shape(one, 0, (state, None))[1]
    return jax.lax.fori_loop(0, count, one, (state, jnp.zeros(logs.shape, logs.dtype)))


def run(
    step: Step,
    state: Any,
    source: Source,
    steps: int,
    *,
    start: int = 0,
    points: int = 100,
    between: Callable[[int, Any, History], None] | None = None,
) -> tuple[Any, History]:
    """Repeat `step` over the batches `start` to `steps - 1` of a source.

    The steps run on the device in chunks of about half a second. How they are chunked changes no bit of
    the outcome: step i sees batch i, so a run that stops and goes on equals one that does not.

    Args:
      step: from `make_step`, or a vmapped one.
      state: what `step` takes; it is copied, not consumed.
      source: answers `batch(i)`.
      steps: how many steps the whole run has.
      start: steps that `state` already has behind it.
      points: about how many points of history to keep, evenly spaced, the last step always among them.
      between: called after every chunk with (steps done, state, history so far). It may save the state,
        but must be done with it when it returns; what it raises ends the run.

    Returns:
      The final state, and the history from `start` on.

    Raises:
      InputError: `steps` under 1, or `start` beyond it.

    Example:
      >>> state, history = run(step, state, in_memory(x), steps=500)
      >>> history["loss"][-1]
    """
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    require(steps < 2**31, f"steps must be below 2^31, got {steps}")
    require(points >= 1, f"points must be at least 1, got {points}")
    require(0 <= start <= steps, f"start must lie within the run of {steps} steps, got {start}")
    stops = points_of(start, steps, points)
    logs = jax.eval_shape(lambda state: step(state, source.batch(jnp.int32(0)))[1], state)
    point = jax.eval_shape(stacked, logs)
    recorded = np.empty((len(stops), *point.shape), point.dtype)
    names = list(logs)

    def history(count):
        logs = {name: recorded[:count, k] for k, name in enumerate(names)}
        return {"step": np.asarray(stops[:count]), **logs}

    state = jax.tree.map(jnp.copy, state)
    done, chunk, count = start, 1, 0
    for stage, end in stages(source, start, steps):
        while done < end:
            now = min(chunk, stops[count] - done, end - done)
            began = time.monotonic()
            state, logs = _advance(step, state, stage, jnp.int32(done), jnp.int32(now))
            logs = np.asarray(logs)
            seconds = time.monotonic() - began
            done += now
            if done == stops[count]:
                recorded[count] = logs
                count += 1
            if between is not None:
                between(done, state, history(count))
            chunk = max(chunk, now * 2) if seconds < SECONDS_PER_CHUNK else max(1, now // 2)
    return state, history(count)


def points_of(start: int, steps: int, points: int) -> list[int]:
    """The steps after which history is taken: multiples of a stride beyond `start`, and the last step."""
    every = max(1, steps // points)
    return sorted({*range((start // every + 1) * every, steps, every), *([steps] if start < steps else [])})


class Stopped(Exception):  # noqa: N818, it is an event and not an error
    """A run ended early because it was asked to; its checkpoint holds the state."""


def run_resumable(
    step: Step,
    state: Any,
    source: Source,
    steps: int,
    *,
    points: int = 100,
    look: Callable[[int, History], bool] | None = None,
    checkpoints: Path | None = None,
) -> tuple[Any, History]:
    """`run` that goes on from its last checkpoint, writes one a minute, and one when it is told to stop.

    Args:
      step: as for `run`.
      state: at step 0; what a checkpoint holds takes its place.
      source: as for `run`.
      steps: of the whole run.
      points: as for `run`.
      look: called between chunks with (steps done, history so far); returning True ends the run.
      checkpoints: this run's folder; None for no checkpoints.

    Returns:
      The final state and the whole history, bit for bit those of a run that was never stopped.

    Raises:
      Stopped: `look` asked for the end.
    """
    start, before = 0, {}
    if checkpoints is not None and (found := checkpoint.restore(checkpoints, state)):
        start, state, before = found
    saved_at = time.monotonic()

    def joined(history: History) -> History:
        return {name: np.concatenate([before[name], log]) if before else log for name, log in history.items()}

    def between(done: int, state: Any, history: History) -> None:
        nonlocal saved_at
        stop = look is not None and look(done, joined(history))
        unsaved = time.monotonic() - saved_at
        due = unsaved > (SECONDS_WORTH_KEEPING if done == steps else SECONDS_BETWEEN_CHECKPOINTS)
        if checkpoints is not None and (stop or due):
            checkpoint.save(checkpoints, done, state, joined(history))
            saved_at = time.monotonic()
        if stop:
            raise Stopped

    state, history = run(step, state, source, steps, start=start, points=points, between=between)
    return state, joined(history)
