"""Members that end before their time: one whose loss is no longer finite, one that no longer gets better."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.base import Batch, TrainState, require

OK = "ok"
DIVERGED, STOPPED, DROPPED = "diverged", "stopped early", "dropped"
"""How a member ends before its time; its status is one of these and the step, or `OK`."""


def status(how: str, step: int) -> str:
    """ "diverged at step 20"."""
    return f"{how} at step {step}"


def counted(statuses: Iterable[str]) -> dict[str, int]:
    """How many have ended, by how: {"diverged": 1, "dropped": 12}."""
    return dict(Counter(each.partition(" at step ")[0] for each in statuses if each != OK))


class Patience(NamedTuple):
    """When a member has trained enough: its loss has not fallen for a while.

    The loss is averaged with weights that fall by 1/e in `over` steps. A member stops after `steps` steps in
    which that average has not come below `1 - improvement` of the least before.
    """

    steps: int
    improvement: float = 1e-3
    """A share of the loss."""
    over: int = 100

    def check(self) -> None:
        """Raise `InputError` for numbers that mean nothing."""
        require(self.steps >= 1, f"patience must be at least 1 step, got {self.steps}")
        require(0 <= self.improvement < 1, f"improvement is a share of the loss, got {self.improvement}")
        require(self.over >= 1, f"the loss is averaged over at least 1 step, got {self.over}")


class Watch(NamedTuple):
    """What `Patience` remembers of a member."""

    average: Float[Array, "*members"]
    least: Float[Array, "*members"]
    least_at: Int[Array, "*members"]


class Ending(NamedTuple):
    """When a member ended; 0 while it has not."""

    diverged: Int[Array | np.ndarray, "*members"]
    """At which step its loss was not finite."""
    stopped: Int[Array | np.ndarray, "*members"]
    """After which step it no longer got better."""
    watch: Watch | None

    @property
    def over(self) -> Bool[Array | np.ndarray, "*members"]:
        """Whether it has ended."""
        return (self.diverged > 0) | (self.stopped > 0)


def not_yet(patience: Patience | None) -> Ending:
    """Of a member that begins."""
    never = jnp.int32(0)
    if patience is None:
        return Ending(never, never, None)
    return Ending(never, never, Watch(jnp.float32(0), jnp.float32(jnp.inf), never))


def until_ended(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]], patience: Patience | None
) -> Callable[..., tuple[TrainState, Ending, dict[str, Array]]]:
    """A step that leaves a member as it is once it has ended.

    A member whose loss is not finite keeps the weights that it had before that step. Of one that has ended
    logs are NaN.

    Args:
      step: of one member.
      patience: when it has trained enough; None for never.

    Returns:
      `(state, ending, batch) -> (state, ending, logs)`.
    """

    def guarded(state: TrainState, ending: Ending, batch: Batch):
        after, logs = step(state, batch)
        going, finite, done = ~ending.over, jnp.isfinite(logs["loss"]), state.progress.step + 1
        watch, stopped = ending.watch, ending.stopped
        if watch is not None and patience is not None:
            watch = _where(going & finite, _watched(watch, logs["loss"], done, patience), watch)
            tired = done - watch.least_at >= patience.steps
            stopped = jnp.where(going & finite & tired, done, stopped)
        diverged = jnp.where(going & ~finite, done, ending.diverged)
        state = _where(going & finite, after, state)
        return (
            state,
            Ending(diverged, stopped, watch),
            {name: jnp.where(going, log, jnp.nan) for name, log in logs.items()},
        )

    return guarded


def _watched(watch: Watch, loss: Float[Array, ""], done: Int[Array, ""], patience: Patience) -> Watch:
    # a mean of all losses until there are enough of them to forget the first
    share = 1 / jnp.minimum(done, patience.over)
    average = watch.average + share * (loss.astype(jnp.float32) - watch.average)
    better = average < (1 - patience.improvement) * watch.least
    return Watch(average, jnp.where(better, average, watch.least), jnp.where(better, done, watch.least_at))


def _where(condition: Bool[Array | np.ndarray, ""], some: Any, others: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), some, others)
