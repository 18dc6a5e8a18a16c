"""How a sweep is cut: over which devices it is spread, and how many members train side by side."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from sae_jax import distributed, sharding
from sae_jax.base import require
from sae_jax.checkpoint import place
from sae_jax.cost import SHARE_OF_MEMORY, side_by_side
from sae_jax.data import Source
from sae_jax.devices import choose_mesh, free_memory
from sae_jax.grid import Grid, members
from sae_jax.program import Program, footprint_of, members_that_fit
from sae_jax.train import Saving

AT_ONCE = "members_at_once"
"""The file beside the checkpoints that tells how the grid was cut when they were begun."""
ONE_DEVICE: Mapping[str, int] = dict.fromkeys(sharding.AXES, 1)


class Cut(NamedTuple):
    """Where members train, and how many at once."""

    mesh: Mesh | None
    at_once: int

    def side_by_side(self, count: int) -> int:
        """How many of so many members train at once: chunks of one size, a multiple of the mesh's axis."""
        return side_by_side(count, self.at_once, 1 if self.mesh is None else self.mesh.shape["member"])


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
    require(
        members_at_once is None or members_at_once >= 1,
        f"members_at_once must be at least 1, got {members_at_once}",
    )
    total = members(grid)
    before = None if saving is None else place(saving.folder) / AT_ONCE
    # the memory that is free may have changed since, and another cut has other checkpoints
    asked = int(before.read_text()) if before is not None and before.exists() else None
    asked = distributed.leader(members_at_once or asked)
    over = _mesh(program, grid, source, mesh, asked or total)
    axes = ONE_DEVICE if over is None else over.shape
    fitting = asked or distributed.leader(members_that_fit(program, grid, source, axes))
    at_once = Cut(over, min(fitting, total)).side_by_side(total)
    if before is not None and distributed.first():
        before.write_text(str(at_once))
    return Cut(over, at_once)


def _mesh(program: Program, grid: Grid, source: Source, mesh: str | Mesh | None, count: int) -> Mesh | None:
    """The mesh asked for, if it has several devices."""
    sae, _ = program.build({name: column[0].item() for name, column in grid.items()})
    sizes = (count, source.batch_size, sae.config.get("d_sae", 1))
    if mesh == "auto" or (mesh is None and distributed.several()):
        one = footprint_of(program, grid, source).total
        memory = distributed.leader(SHARE_OF_MEMORY * free_memory())
        mesh = sharding.mesh(choose_mesh(*sizes, jax.device_count(), one, memory))
    elif isinstance(mesh, str):
        mesh = sharding.mesh(mesh)
    if mesh is None or mesh.size == 1:
        return None
    sharding.require_divides(mesh.shape, *sizes)
    return mesh
