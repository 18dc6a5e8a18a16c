"""What a sweep wants of the memory, how it is cut to fit, and what to ask for where it does not."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import distributed
from sae_jax.cost import Footprint, bytes_of
from sae_jax.data import Source
from sae_jax.devices import free_memory, quick_memory
from sae_jax.grid import members
from sae_jax.program import first_of, footprint_of, shapes_of, sizes_of
from sae_jax.spread import SHARE_OF_MEMORY, spread
from sae_jax.sweep import Group, program_for


class Need(NamedTuple):
    """What one group of a sweep wants of the memory, and how it is cut to fit."""

    architecture: str
    members: int
    batch_size: int
    d_sae: int
    parameters: int
    """Numbers of one member."""
    one: Footprint
    """Bytes of one member, on a device to itself."""
    available: float
    """Bytes that a device has free."""
    mesh: Mapping[str, int]
    fit: int
    """Members that fit at once, on all devices together."""
    at_once: int
    """Members that train side by side."""

    @property
    def chunks(self) -> int:
        """How many times a set of members is trained, one after the other."""
        return math.ceil(self.members / self.at_once)

    @property
    def each(self) -> int:
        """Members on one device."""
        return math.ceil(self.at_once / self.mesh["member"])

    @property
    def taken(self) -> float:
        """Bytes that a device has to have for its members."""
        return self.each * self.alone.total

    @property
    def alone(self) -> Footprint:
        """What a device has of one of its members."""
        return self.one.over(self.mesh["data"], self.mesh["latent"])


def needs(
    groups: Sequence[Group],
    *,
    source: Source,
    dtype=jnp.float32,
    available: float | None = None,
    quick: float | None = None,
    devices: int = 1,
    axes: Mapping[str, int] | None = None,
    members_at_once: int | None = None,
) -> tuple[Need, ...]:
    """What each group wants of the memory, by arithmetic: nothing is compiled.

    Args:
      groups, source, dtype, members_at_once: as for `sweep_all`.
      available: bytes free on each device; None for what the first one here has.
      quick: as for `spread`; None for what the first one here has.
      devices: how many there are, for a mesh to be chosen over.
      axes: of the mesh, `member`, `data` and `latent`; None to choose them, for each group.

    Returns:
      A `Need` per group.

    Raises:
      InputError: what `sweep_all` would say against the groups, or axes that do not divide them.
    """
    free = float(free_memory() if available is None else available)
    quick = quick_memory() if quick is None else quick

    def need(group: Group) -> Need:
        program = program_for(group, source, dtype)
        state, batch = shapes_of(program, group.grid, source)
        one, sizes = footprint_of(state, batch), sizes_of(state, batch, members(group.grid))
        found = spread(
            one,
            sizes,
            free,
            devices=devices,
            axes=axes,
            at_once=members_at_once,
            every=distributed.several(),
            quick=quick,
        )
        architecture = first_of(program, group.grid).config.get("architecture", "sae")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.train.params))
        return Need(architecture, *sizes, parameters, one, free, *found)

    return tuple(map(need, groups))


def laid_out(group: Group, need: Need, *, source: Source, dtype=jnp.float32) -> float:
    """Bytes that a device has to have for a step, as XLA lays it out: nearer than `Need.taken`, and slower.

    Args:
      group, source, dtype: as for `plan`.
      need: the group's.

    Returns:
      Bytes: the state twice, and what XLA asks for beside.
    """
    state, _, step = lowered(group, need, source, dtype)
    analysis: Any = step.compile().memory_analysis()
    temporary = 0 if analysis is None else analysis.temp_size_in_bytes
    return (2 * bytes_of(state) + temporary) / need.mesh["latent"]


def lowered(group: Group, need: Need, source: Source, dtype) -> tuple[Any, Any, jax.stages.Lowered]:
    """A device's part of the state and of the batch, and the step over them; latents are not cut."""
    program = program_for(group, source, dtype)
    state, batch = shapes_of(program, group.grid, source, need.each)
    rows = need.batch_size // need.mesh["data"]
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    return state, batch, jax.jit(program.step, donate_argnums=0).lower(state, batch)


def suggestion(need: Need) -> str:
    """What to ask for in place of what did not fit: fewer members at once, fewer rows, or fewer latents.

    Each is at most half of what was tried, since a limit from outside is not seen in the bytes that are free.

    Args:
      need: of the group that did not fit.

    Returns:
      Options, and what they need on a device.
    """
    usable, one = SHARE_OF_MEMORY * need.available, need.alone
    member, data, latent = need.mesh.values()
    if need.each > 1 and one.total <= usable:
        each = min(int(usable // one.total), need.each // 2)
        return f"--members-at-once {member * each} needs {told(each * one.total)}"
    alone = f"--members-at-once {member} " if need.each > 1 else ""
    fixed = one.total - one.activations
    rows = min(need.batch_size // 2, int(need.batch_size * (usable - fixed) / one.activations)) // data * data
    if rows > 0:
        return f"{alone}--batch-size {rows} needs {told(fixed + one.activations * rows / need.batch_size)}"
    # fewer latents leave the reconstructions as they are: where these alone are too much, fewer rows as well
    share = min(1, usable / 4 / one.reconstructions)
    rows = max(1, int(share * need.batch_size / data)) * data
    batch = f"--batch-size {rows} " if share < 1 else ""
    left, linear = usable - share * one.reconstructions, fixed + share * one.features
    latents = max(1, min(need.d_sae // 2, int(need.d_sae * left / linear)) // latent) * latent
    wanted = share * one.reconstructions + linear * latents / need.d_sae
    return f"{alone}{batch}--d-sae {latents} needs about {told(wanted)}"


def told(count: float) -> str:
    """Bytes as a person reads them: three figures and a unit of 1000s."""
    place = 0 if count < 1000 else min(4, int(math.log10(count) // 3))
    return f"{count / 1000**place:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[place]}"
