"""The mesh: three axes, and one table that says along which each array of a run lies.

    member   members of a sweep; nothing is exchanged between them
    data     rows of a batch; gradients are summed over it
    latent   latents, by the weights that have an axis of them; reconstructions are summed over it

Everything else is JAX's own: under `jax.set_mesh(mesh)` the compiler places the sums.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sae_jax.base import require

AXES = ("member", "data", "latent")
EVERYWHERE = PartitionSpec()

SPECS = {
    "W_enc": PartitionSpec(None, "latent"),
    "b_enc": PartitionSpec("latent"),
    "b_gate": PartitionSpec("latent"),
    "b_mag": PartitionSpec("latent"),
    "r_mag": PartitionSpec("latent"),
    "threshold": PartitionSpec("latent"),
    "log_threshold": PartitionSpec("latent"),
    "W_dec": PartitionSpec("latent", None),
    "since_fired": PartitionSpec("latent"),
}
"""By name; what is not named lies on every device. A crosscoder's further axis of sources lies on none."""


def mesh(axes: str | Mapping[str, int]) -> Mesh:
    """The mesh of a run.

    Args:
      axes: how many devices along each axis, `"member=2,data=2,latent=2"` or a mapping; the rest are 1.

    Returns:
      A mesh over the first of all processes' devices, with the three axes.

    Raises:
      InputError: an unknown axis, a size that is not a whole number above 0, more devices than there are, or
        of several processes' devices not all.

    Example:
      >>> sweep(..., mesh=sharding.mesh("member=4,data=2"))
    """
    sizes = parse(axes) if isinstance(axes, str) else dict(axes)
    for name, size in sizes.items():
        require(name in AXES, f"a mesh has no axis {name!r}; its axes are {', '.join(AXES)}")
        require(size >= 1, f"the mesh's axis {name} must be at least 1, got {size}")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    wanted, there = math.prod(shape), jax.device_count()
    told = _told(dict(zip(AXES, shape, strict=True)))
    require(wanted <= there, f"the mesh {told} needs {wanted} devices, and there are {there}")
    several = jax.process_count() > 1
    require(
        not several or wanted == there,
        f"the mesh {told} has {wanted} of the {there} devices: over several processes it must have all",
    )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:wanted])


def parse(text: str) -> dict[str, int]:
    """`"member=2,data=4"` as a mapping.

    Raises:
      InputError: anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        good = bool(equals) and size.isdecimal() and name not in sizes
        require(good, f"a mesh is written member=2,data=2,latent=2 (or some of these), or auto, got {text!r}")
        sizes[name] = int(size)
    return sizes


def _told(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def require_divides(axes: Mapping[str, int], members: int, batch_size: int, d_sae: int) -> None:
    """Raise `InputError` unless each axis divides what is spread along it; it names the nearest that does."""
    spread = (
        ("member", members, "members"),
        ("data", batch_size, "rows of a batch"),
        ("latent", d_sae, "latents"),
    )
    for axis, count, what in spread:
        size = axes[axis]
        # 1 always divides, so that nothing beyond twice the size is nearer
        divisors = [n for n in range(1, min(count, 2 * size) + 1) if count % n == 0]
        nearest = min(divisors, key=lambda n, size=size: (abs(n - size), n))
        require(
            count % size == 0,
            f"the mesh's {axis}={size} does not divide the {count} {what}; the nearest that does is "
            f"{axis}={nearest}",
        )


def in_force() -> bool:
    """Whether what is traced now is traced for a mesh of several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


def size(axis: str) -> int:
    """How many devices the mesh in force has along an axis; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def specs(state: Any, params: Mapping[str, Any], lead: tuple[str, ...] = ()) -> Any:
    """A `PartitionSpec` per leaf of a state, by the name that it or its moment goes by.

    Args:
      state: any pytree; a leaf lies like the weight of the same name and shape.
      params: the weights, without `lead`.
      lead: axes that every leaf has before its own: `("member",)` in a sweep.
    """

    def spec(path, leaf) -> PartitionSpec:
        keys = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        name = next((str(key) for key in reversed(keys) if key in SPECS), "")
        own = leaf.ndim - len(lead)
        alike = name == "since_fired" or (name in params and params[name].shape == leaf.shape[len(lead) :])
        if not name or not alike or own == 0:
            return PartitionSpec(*lead)
        known = tuple(SPECS[name])
        further = (None,) * (own - len(known))
        return PartitionSpec(*lead, *(further + known if known[0] is None else known + further))

    return jax.tree_util.tree_map_with_path(spec, state)


def constrained(tree: Any, spec: Any) -> Any:
    """Inside a compiled function: lay arrays out by a spec, or a tree of them, where a mesh is in force."""
    if not in_force():
        return tree
    return _each(jax.lax.with_sharding_constraint, tree, spec)


def _each(lay: Callable[[Any, PartitionSpec], Any], tree: Any, spec: Any) -> Any:
    if isinstance(spec, PartitionSpec):
        return jax.tree.map(lambda leaf: lay(leaf, spec), tree)
    return jax.tree.map(lay, tree, spec)


def everywhere_on_mesh(tree: Any) -> Any:
    """Inside a compiled function: arrays whole on every device of the mesh in force."""
    return constrained(tree, EVERYWHERE)


def rows(tree: Any) -> Any:
    """Inside a compiled function: spread rows along `data` where it divides them."""
    even = all(len(leaf) % size("data") == 0 for leaf in jax.tree.leaves(tree))
    return constrained(tree, PartitionSpec("data")) if even else tree


def placed(tree: Any, mesh: Mesh, spec: Any = EVERYWHERE) -> Any:
    """Arrays that every process holds whole, as arrays of the mesh.

    Args:
      tree: arrays of numpy or of one device, the same in every process.
      mesh: where to.
      spec: one for all, or a tree of them; on every device if nothing else is said.
    """

    def place(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return _each(place, tree, spec)


def everywhere(tree: Any) -> Any:
    """Arrays as numpy, whole, in every process. Where a part lies elsewhere, all processes must ask alike."""

    def fetch(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) parts of every batch this process's devices take.

    Raises:
      InputError: processes whose parts overlap without being the same.
    """
    places = {
        process: {
            index[1] for index, device in np.ndenumerate(mesh.devices) if device.process_index == process
        }
        for process in range(jax.process_count())
    }
    own = places[jax.process_index()]
    alike = all(one == other or not one & other for one in places.values() for other in places.values())
    parts = mesh.shape["data"] // len(own)
    contiguous = own == set(range(min(own), min(own) + len(own))) and min(own) % len(own) == 0
    require(
        alike and contiguous,
        f"the mesh {_told(mesh.shape)} gives processes overlapping parts of a batch; a multiple of "
        f"{jax.local_device_count()} devices along data, or along latent, does not",
    )
    return min(own) // len(own), parts


def from_shares(local: np.ndarray, mesh: Mesh) -> Array:
    """One array of the mesh from what each process read of it.

    Args:
      local: [steps, rows, ...], this process's share (`share`) of the rows.
      mesh: where to.
    """
    _, parts = share(mesh)
    steps, rows, *rest = local.shape
    whole, spec = (steps, rows * parts, *rest), PartitionSpec(None, "data")
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), local, whole)
