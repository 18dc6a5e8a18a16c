"""How fast a sweep trains: rows a second, and what share of the machine's peak its matrix products take."""

import numpy as np
from jaxtyping import Float

from sae_jax.cost import training_flops
from sae_jax.devices import peak
from sae_jax.result import SweepResult
from sae_jax.sweep import Look

SECONDS_WORTH_A_PEAK = 5.0
"""Shorter runs are not made longer by measuring the peak."""


class Meter:
    """Adds up, from look to look, what was done; compilation and final metrics are not in it."""

    def __init__(self, members: int, batch_size: int):
        self.batch_size = batch_size
        self.seconds, self.rows = 0.0, 0.0
        self.steps = np.zeros(members)
        """Done by each member of the table, on the average over those that train side by side."""
        self.before: tuple[float, Look] | None = None

    def show(self, look: Look, now: float) -> None:
        """Count what came since the look before. Where other members begin, the time went to compilation."""
        if self.before is not None and _goes_on(self.before[1], look):
            then, seen = self.before
            self.seconds += now - then
            self.rows += (look.done - seen.done) * self.batch_size  # members side by side see the same rows
            steps = look.member_steps - seen.member_steps
            self.steps[look.first : look.stop] += steps / (look.stop - look.first)
        self.before = now, look

    @property
    def rows_per_second(self) -> float:
        """0 before anything was measured."""
        return self.rows / max(self.seconds, 1e-9)

    def flops_per_second(self, per_step: Float[np.ndarray, "members"]) -> float:
        """FLOP/s by the FLOPs of each member's step; 0 before anything was measured."""
        return float(self.steps @ per_step) / max(self.seconds, 1e-9)


def _goes_on(seen: Look, look: Look) -> bool:
    """Whether two looks are at one stretch of training: each begins a history of its own."""
    same = (seen.first, seen.stop) == (look.first, look.stop)
    return same and len(seen.history["step"]) <= len(look.history["step"])


def flops_per_step(result: SweepResult, batch_size: int) -> Float[np.ndarray, "members"]:
    """FLOPs of each member's step in matrix products, by the shapes of its weights."""
    flops = np.zeros(len(result.status))
    for part in result.parts:
        flops[part.members] = training_flops(part.params, batch_size) / len(part.members)
    return flops


def share_of_peak(meter: Meter, result: SweepResult, devices: int) -> float | None:
    """The products' share of what these devices can do in the weights' dtype; None after a short run."""
    if meter.seconds < SECONDS_WORTH_A_PEAK:
        return None
    dtype = result.parts[0].params["W_dec"].dtype
    return meter.flops_per_second(flops_per_step(result, meter.batch_size)) / (peak(dtype) * devices)


def told(members_per_second: float, rows_per_second: float, share: float | None = None) -> str:
    """The line of throughput, without what was not measured."""
    rates = [f"{_figure(members_per_second)} members/s"]
    rates += [f"{_figure(rows_per_second)} rows/s"] if rows_per_second else []
    rates += [f"{100 * share:.2g} % of this machine's peak"] if share else []
    return ", ".join(rates)


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
