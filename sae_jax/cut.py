"""How a sweep is cut: over which devices it is spread, and how many members train side by side."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from sae_jax import distributed, sharding
from sae_jax.base import require
from sae_jax.checkpoint import place
from sae_jax.data import Source
from sae_jax.devices import free_memory, quick_memory
from sae_jax.grid import Grid, members
from sae_jax.program import Program, footprint_of, shapes_of, sizes_of
from sae_jax.spread import Spread, spread
from sae_jax.train import Saving

AT_ONCE = "members_at_once"
"""The file beside the checkpoints that tells how the grid was cut when they were begun."""
ONE_DEVICE: Mapping[str, int] = dict.fromkeys(sharding.AXES, 1)


class Cut(NamedTuple):
    """Where members train, and how many at once."""

    mesh: Mesh | None
    at_once: int

    def side_by_side(self, count: int) -> int:
        """How many of so many members train at once: `at_once`, or of few a half of it, a quarter, ...

        Where the mesh's axis allows it, so that a round of halving is cut alike on one mesh and another.
        """
        axis, size = 1 if self.mesh is None else self.mesh.shape["member"], self.at_once
        while size % (2 * axis) == 0 and size // 2 >= count:
            size //= 2
        return size


def cut(
    program: Program,
    grid: Grid,
    source: Source,
    mesh: str | Mesh | None,
    members_at_once: int | None,
    saving: Saving | None,
) -> Cut:
    """How a sweep is cut, as it was asked for, as in the run that is gone on with, or as it fits.

    Arguments are those of `sweep`.

    Raises:
      InputError: a mesh that does not divide what is spread over it.
    """
    file = None if saving is None else place(saving.folder) / AT_ONCE
    # the memory that is free may have changed since, and another cut has other checkpoints
    before = distributed.leader(int(file.read_text()) if file is not None and file.exists() else None)
    asked = before if members_at_once is None else members_at_once
    chosen = laid(program, grid, source, mesh, asked, distributed.leader(float(free_memory())))
    # the run that is gone on with may have been cut for another axis of members
    at_once = before if members_at_once is None and before is not None else chosen.at_once
    if file is not None and distributed.first():
        unfinished = file.parent / f".{AT_ONCE}"
        unfinished.write_text(str(at_once))
        unfinished.replace(file)
    if not isinstance(mesh, Mesh):
        mesh = sharding.mesh(chosen.axes)
    return Cut(None if mesh.size == 1 else mesh, at_once)


def laid(
    program: Program,
    grid: Grid,
    source: Source,
    mesh: str | Mesh | None,
    members_at_once: int | None,
    free: float,
) -> Spread:
    """How a sweep lies over the devices that there are, each with so many bytes free.

    Raises:
      InputError: a mesh that does not divide what is spread over it, or no member at once.
    """
    require(
        members_at_once is None or members_at_once >= 1,
        f"members_at_once must be at least 1, got {members_at_once}",
    )
    state, batch = shapes_of(program, grid, source)
    several = distributed.several()
    return spread(
        footprint_of(state, batch),
        sizes_of(state, batch, members(grid)),
        free,
        devices=jax.device_count(),
        axes=_asked(mesh, several),
        at_once=members_at_once,
        every=several,
        quick=quick_memory(),
    )


def _asked(mesh: str | Mesh | None, several: bool) -> Mapping[str, int] | None:
    """The axes that were asked for; None where they are to be chosen."""
    if mesh == "auto" or (mesh is None and several):
        return None
    if mesh is None:
        return ONE_DEVICE
    return sharding.mesh(mesh).shape if isinstance(mesh, str) else mesh.shape
