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
    require(
        members_at_once is None or members_at_once >= 1,
        f"members_at_once must be at least 1, got {members_at_once}",
    )
    total = members(grid)
    file = None if saving is None else place(saving.folder) / AT_ONCE
    # the memory that is free may have changed since, and another cut has other checkpoints
    before = distributed.leader(int(file.read_text()) if file is not None and file.exists() else None)
    asked = members_at_once or before
    over = _mesh(program, grid, source, mesh, min(asked or total, total))
    if before is not None and members_at_once is None:
        return Cut(over, before)
    axes = ONE_DEVICE if over is None else over.shape
    most = asked or distributed.leader(members_that_fit(program, grid, source, axes))
    at_once = side_by_side(total, min(most, total), axes["member"])
    if file is not None and distributed.first():
        unfinished = file.parent / f".{AT_ONCE}"
        unfinished.write_text(str(at_once))
        unfinished.replace(file)
    return Cut(over, at_once)


def _mesh(program: Program, grid: Grid, source: Source, mesh: str | Mesh | None, count: int) -> Mesh | None:
    """The mesh asked for, if it has several devices."""
    one = program.to_device({name: column[:1] for name, column in grid.items()})
    d_sae = jax.eval_shape(program.start, one).train.progress.since_fired.shape[-1]
    sizes = (count, source.batch_size, d_sae)
    if mesh == "auto" or (mesh is None and distributed.several()):
        needed = footprint_of(program, grid, source).total
        memory = distributed.leader(SHARE_OF_MEMORY * free_memory())
        mesh = sharding.mesh(choose_mesh(*sizes, jax.device_count(), needed, memory))
    elif isinstance(mesh, str):
        mesh = sharding.mesh(mesh)
    if mesh is None or mesh.size == 1:
        return None
    sharding.require_divides(mesh.shape, *sizes)
    return mesh
