"""Training: one pure step, and the one loop that repeats it."""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Scalar

from sae_jax import distributed, linear, sharding
from sae_jax.base import SAE, Batch, Params, Progress, TrainState, require
from sae_jax.checkpoint import Checkpoints, place
from sae_jax.data import Source, batch_shape, stages

Step = Callable[[Any, Batch], tuple[Any, dict[str, Array]]]
"""`(state, batch) -> (state, logs)`: for one SAE or, vmapped, for a thousand."""

History = dict[str, np.ndarray]
"""Logs by name, [points, ...], and `step` [points]: after how many steps each point was taken."""

SECONDS_PER_CHUNK = 1.5
"""What a chunk is to take, where that many steps are left: each takes up its working memory anew."""
MOST_GROWTH = 16
"""How many times as many steps a chunk may have as the one before, whose time may not be typical."""
POINTS_PER_CHUNK = 32
"""How many points of history one chunk can hold."""
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
        with linear.in_reverse():
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
def _advance(
    step: Step,
    state,
    source: Source,
    first: Int[Array, ""],
    stop: Int[Array, ""],
    every: Int[Array, ""],
):
    """The steps `first` to `stop - 1`, and of each stretch of `every` the last logs, [POINTS_PER_CHUNK, ...].

    Traced numbers compile once for all chunks.
    """

    def one(i, carry):
        state, points = carry
        state, logs = _traced(step)(state, source.batch(i))
        return state, points.at[i // every - first // every].set(stacked(logs))

    point = _point(step, state, source.batch(first))[1]
    points = jnp.zeros((POINTS_PER_CHUNK, *point.shape), point.dtype)
    return jax.lax.fori_loop(first, stop, one, (state, points))


def _traced(step: Step) -> Step:
    """The same step, which is traced once for all that ask for it."""
    return jax.jit(step, inline=True)


def _point(step: Step, state: Any, batch: Batch) -> tuple[list[str], jax.ShapeDtypeStruct]:
    """The names of a step's logs, and the shape of them all."""
    logs = jax.eval_shape(_traced(step), state, batch)[1]
    return list(logs), jax.eval_shape(stacked, logs)


def run(
    step: Step,
    state: Any,
    source: Source,
    steps: int,
    *,
    start: int = 0,
    until: int | None = None,
    points: int = 100,
    between: Callable[[int, Any, History], bool | None] | None = None,
    consume: bool = False,
) -> tuple[Any, History]:
    """Repeat `step` over the batches `start` to `steps - 1` of a source.

    The steps run on the device in chunks of a second or two. How they are chunked changes no bit of
    the outcome: step i sees batch i, so a run that stops and goes on equals one that does not. Of several
    processes the first decides how many steps a chunk has.

    Args:
      step: from `make_step`, or a vmapped one.
      state: what `step` takes.
      source: answers `batch(i)`.
      steps: how many steps the whole run has.
      start: steps that `state` already has behind it.
      until: steps after which to pause; None for none. Points of history lie where they lie without it.
      points: about how many points of history to keep, evenly spaced, the last step always among them.
      between: called after every chunk with (steps done, state, history so far). It may save the state,
        but must be done with it when it returns. Returning True ends the run, and so does what it raises.
      consume: train in the memory of `state`, which is gone afterwards; else in a copy of it.

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
    until = steps if until is None else until
    require(0 <= start <= until <= steps, f"start must lie within the run of {until} steps, got {start}")
    every, stops = _stride(steps, points), points_of(start, steps, points)
    names, point = _point(step, state, batch_shape(source))
    recorded = np.empty((len(stops), *point.shape), point.dtype)

    def history(count):
        logs = {name: recorded[:count, k] for k, name in enumerate(names)}
        return {"step": np.asarray(stops[:count], np.int64), **logs}

    state = state if consume else _copied(state)
    done, chunk, count = start, 1, 0
    for stage, end in stages(source, start, until):
        while done < end:
            now = min(done + chunk, end, (done // every + POINTS_PER_CHUNK) * every)
            began = time.perf_counter()
            state, logs = _advance(step, state, stage, np.int32(done), np.int32(now), np.int32(every))
            logs = sharding.everywhere(logs)
            seconds = time.perf_counter() - began
            while count < len(stops) and stops[count] <= now:
                recorded[count] = logs[(stops[count] - 1) // every - done // every]
                count += 1
            longer = int((now - done) * min(SECONDS_PER_CHUNK / seconds, MOST_GROWTH))
            # a chunk that was cut short by the end of its stage is no reason for shorter ones
            kept = chunk if seconds < SECONDS_PER_CHUNK else 1
            chunk = distributed.leader(max(longer, kept))
            done = now
            if between is not None and between(done, state, history(count)):
                return state, history(count)
    return state, history(count)


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def points_of(start: int, steps: int, points: int) -> list[int]:
    """The steps after which history is taken: multiples of a stride beyond `start`, and the last step."""
    every = _stride(steps, points)
    return sorted({*range((start // every + 1) * every, steps, every), *([steps] if start < steps else [])})


def _stride(steps: int, points: int) -> int:
    require(points >= 1, f"points must be at least 1, got {points}")
    return max(1, steps // points)


class Stopped(Exception):  # noqa: N818, it is an event and not an error
    """A run ended early because it was asked to; its checkpoint holds the state."""


class Saving(NamedTuple):
    """Where checkpoints of a run go, and how many are kept."""

    folder: Any
    """A path, or a URL as `Checkpoints` takes it."""
    seconds: float | None = None
    """Between two; None for a minute."""
    last: int = 2
    best: int = 0
    """How many of the lowest mean loss to keep beside the last."""
    tell: Callable[[str], None] = warnings.warn
    """Takes a sentence about a checkpoint that could not be written or read."""

    @staticmethod
    def of(checkpoints: "str | Path | Saving | None") -> "Saving | None":
        """What a folder alone stands for."""
        folder = isinstance(checkpoints, str | Path)
        return Saving(checkpoints) if folder else cast(Saving | None, checkpoints)

    def at(self, name: str) -> "Saving":
        """The same in a folder within this one."""
        return self._replace(folder=place(self.folder) / name)

    def opened(self) -> Checkpoints:
        """The checkpoints that are there, to be gone on with."""
        return Checkpoints(self.folder, self.last, self.best, self.tell)

    @property
    def between(self) -> float:
        """Seconds from one checkpoint to the next."""
        return SECONDS_BETWEEN_CHECKPOINTS if self.seconds is None else self.seconds


def run_resumable(
    step: Step,
    state: Any,
    source: Source,
    steps: int,
    *,
    start: int = 0,
    until: int | None = None,
    points: int = 100,
    over: Callable[[Any], bool] | None = None,
    look: Callable[[int, History], bool | None] | None = None,
    checkpoints: str | Path | Saving | None = None,
    consume: bool = False,
) -> tuple[Any, History]:
    """`run` that goes on from its last checkpoint, writes one a minute, and one when it is told to stop.

    Args:
      step: as for `run`.
      state: after `start` steps; what a checkpoint holds takes its place.
      source: as for `run`.
      steps: of the whole run.
      start, until, points: as for `run`.
      over: called between chunks with the state: whether it is one that no step would change. The run then
        ends.
      look: called after it with (steps done, history so far); returning True ends the run. Of several
        processes all call it, and one that wants to stop stops all.
      checkpoints: this run's folder, or a `Saving`; None for no checkpoints.
      consume: as for `run`.

    Returns:
      The final state and the whole history, bit for bit those of a run that was never stopped.

    Raises:
      InputError: a checkpoint of another model, or of a newer version; a run that was told to stop and could
        not be saved.
      Stopped: `look` asked for the end.
    """
    saving, until = Saving.of(checkpoints), steps if until is None else until
    with nullcontext(None) if saving is None else saving.opened() as safe:
        start, state, before = (safe and safe.restore(state)) or (start, state, {})
        saved_at = time.monotonic()
        # what was finished before is told all the same
        done_before = bool(before) and start == until
        if distributed.any_of(done_before and look is not None and bool(look(start, before))):
            raise Stopped

        def joined(history: History) -> History:
            return {
                name: np.concatenate([before[name], log]) if before else log for name, log in history.items()
            }

        def between(done: int, state: Any, history: History) -> bool:
            nonlocal saved_at
            whole = joined(history)
            finished = (over is not None and over(state)) or done == until
            stop = distributed.any_of(look is not None and bool(look(done, whole)))
            if saving is not None and safe is not None:
                wait = SECONDS_WORTH_KEEPING if finished else saving.between
                if stop or distributed.leader(time.monotonic() - saved_at > wait):
                    safe.save(done, state, whole, _mean_loss(whole))
                    saved_at = time.monotonic()
            if stop:
                lost = safe is not None and not safe.wait()
                require(
                    not distributed.any_of(lost),
                    "the run was stopped, and what it did since its last checkpoint could not be saved",
                )
                raise Stopped
            return finished

        state, history = run(
            step,
            state,
            source,
            steps,
            start=start,
            until=until,
            points=points,
            between=between,
            consume=consume,
        )
        return state, joined(history)


def _mean_loss(history: History) -> float | None:
    """Of the members that have not ended, at the last point; None where there is none."""
    last = history["loss"][-1:]
    return float(last[np.isfinite(last)].mean()) if np.isfinite(last).any() else None
