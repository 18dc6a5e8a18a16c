"""What a sweep will take before it starts: memory, FLOPs, bytes, time, and how to spread it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax.numpy as jnp

from sae_jax import linear
from sae_jax.base import require
from sae_jax.cost import bytes_of, training_flops
from sae_jax.data import Source
from sae_jax.devices import HERE, Device, device
from sae_jax.halving import rounds
from sae_jax.need import Need, lowered, needs
from sae_jax.program import footprint_of
from sae_jax.sweep import Group


class Work(NamedTuple):
    """What one training step of the members that are there at once asks of one device."""

    flops: float
    moved: float
    """Bytes between the device and its memory."""
    temporary: int | None
    """Bytes beside the state, as XLA lays them out; None where it compiled nothing."""
    counted: str
    """By what flops and bytes were counted."""
    compute: float
    """Seconds if nothing but the products took time."""
    memory: float
    """Seconds if nothing but the bytes took time."""

    @property
    def bound(self) -> str:
        """Which limit is reached first."""
        return "compute" if self.compute >= self.memory else "memory"

    @property
    def seconds(self) -> float:
        """A step as expected: products and bytes one after the other."""
        return self.compute + self.memory


class Plan(NamedTuple):
    """What a sweep will take."""

    device: Device
    rate: float
    """FLOP/s of its matrix products in the dtype and precision asked for."""
    devices: int
    steps: int
    shares: tuple[float, ...]
    """How much of each group's member steps are done; less than 1 where members are left behind."""
    needs: tuple[Need, ...]
    work: tuple[Work, ...]

    @property
    def seconds(self) -> list[float]:
        """Of each group's training; compiling, evaluating and what devices tell one another not counted."""
        groups = zip(self.shares, self.needs, self.work, strict=True)
        return [share * self.steps * need.chunks * work.seconds for share, need, work in groups]


def plan(
    groups: Sequence[Group],
    *,
    source: Source,
    steps: int,
    dtype=jnp.float32,
    precision: str | None = None,
    on: str = HERE,
    devices: int = 1,
    axes: Mapping[str, int] | None = None,
    members_at_once: int | None = None,
    keep_best: int | None = None,
) -> Plan:
    """What `sweep_all` of these arguments will take; nothing is trained, nothing allocated.

        seconds of a step = FLOPs / peak + bytes / bandwidth

    FLOPs are XLA's count of the traced step. Bytes are XLA's count of the compiled step where the device is
    this one; for another kind, whose compiler is not here, they are `Footprint.moved`.

    Args:
      groups, source, steps, dtype, precision, members_at_once, keep_best: as for `sweep_all`.
      on: `here`, or one of `devices.KINDS`.
      devices, axes: as for `needs`.

    Returns:
      A `Plan`.

    Raises:
      InputError: an unknown device, or what `sweep_all` would say.

    Example:
      >>> plan([Group(partial(relu, 64, 256), optax.adam, grid(lr=[1e-3]))], source=source, steps=500).seconds
    """
    require(devices >= 1, f"devices must be at least 1, got {devices}")
    with nullcontext() if precision is None else linear.precision(precision):
        machine = device(on, dtype, precision)
        rate = machine.rate(dtype, precision)
        found = needs(
            groups, source=source, dtype=dtype, devices=devices, axes=axes, members_at_once=members_at_once,
            available=machine.memory - (0 if on == HERE else bytes_of(source)),
            quick=None if on == HERE else math.inf,
        )  # fmt: skip
        work = tuple(
            _work(group, need, source, dtype, machine, rate)
            for group, need in zip(groups, found, strict=True)
        )
    shares = tuple(
        sum(each.work for each in rounds(need.members, steps, keep_best)) / (need.members * steps)
        for need in found
    )
    return Plan(machine, rate, devices, steps, shares, found, work)


def _work(group: Group, need: Need, source: Source, dtype, machine: Device, rate: float) -> Work:
    state, batch, step = lowered(group, need, source, dtype)
    counted: Any = step.cost_analysis() or {}
    flops = counted.get("flops", training_flops(state.train.params, batch.x.shape[0]))
    moved, temporary = footprint_of(state, batch).moved, None
    how = "FLOPs by XLA's count of the step, bytes by arithmetic"
    if machine.name == HERE:
        compiled = step.compile()
        moved = (compiled.cost_analysis() or {}).get("bytes accessed", moved)
        temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
        how = "FLOPs and bytes by XLA, of the step that it compiled"
    latent = need.mesh["latent"]
    flops, moved = flops / latent, moved / latent
    return Work(flops, moved, temporary, how, flops / rate, moved / machine.bandwidth)
