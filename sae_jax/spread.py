"""How a sweep lies over devices: along which axes, and how many members train side by side."""

import math
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from sae_jax import sharding
from sae_jax.cost import Footprint

SHARE_OF_MEMORY = 0.5
"""How much of the free memory a chunk of members may fill."""
FEW = 16
"""Members that train side by side in any case, where they fit: one's own rows may be too much to be quick."""


class Sizes(NamedTuple):
    """What is spread: members along `member`, rows along `data`, latents along `latent`."""

    members: int
    batch_size: int
    d_sae: int


class Spread(NamedTuple):
    """How a sweep lies over devices."""

    axes: Mapping[str, int]
    """Devices along `member`, `data` and `latent`."""
    fit: int
    """Members that fit at once, on all devices together."""
    at_once: int
    """Members that train side by side: chunks of one size, a multiple of the axis of members."""


def spread(
    one: Footprint,
    sizes: Sizes,
    free: float,
    *,
    devices: int = 1,
    axes: Mapping[str, int] | None = None,
    at_once: int | None = None,
    every: bool = False,
    quick: float = math.inf,
) -> Spread:
    """Lay a sweep over devices, as it was asked for or as it fits in half of their free memory.

    Args:
      one: what a member takes.
      sizes: of the whole sweep.
      free: bytes of each device.
      devices: how many there are, for a mesh to be chosen over.
      axes: of the mesh that was asked for; None to choose it.
      at_once: members side by side that were asked for; None for as many as fit, and are quick.
      every: as for `choose_mesh`.
      quick: bytes of each device that are nearer to it than the others (`devices.quick_memory`).

    Returns:
      A `Spread`.

    Raises:
      InputError: axes that do not divide members, rows or latents.
    """
    chunk = sizes._replace(members=min(at_once or sizes.members, sizes.members))
    chosen = axes or choose_mesh(chunk, devices, one.total, SHARE_OF_MEMORY * free, every=every)
    sharding.require_divides(chosen, *chunk)
    alone, axis = one.over(chosen["data"], chosen["latent"]).total, chosen["member"]
    fit = axis * max(1, int(SHARE_OF_MEMORY * free // alone))
    near = axis * max(FEW, int(min(quick, free) // alone))
    chunks = math.ceil(sizes.members / min(at_once or min(fit, near), sizes.members))
    return Spread(chosen, fit, axis * math.ceil(math.ceil(sizes.members / chunks) / axis))


def choose_mesh(
    sizes: Sizes, devices: int, bytes_per_member: float, memory: float, *, every: bool = False
) -> dict[str, int]:
    """How to spread a sweep over several devices: members, then data, then latents.

    Members need no communication, data an all-reduce of gradients, latents one of reconstructions. Latents
    are cut only as far as one member otherwise fits no device. Of the meshes left, one that uses most
    devices is taken, and of those the one with most members side by side.

    Args:
      sizes: of what is spread; its members train at once or one after the other.
      devices: at most so many are used.
      bytes_per_member: what one member needs.
      memory: bytes of one device that it may have.
      every: cut latents further where only that uses every device: several processes must use all.

    Returns:
      Axis sizes by name, `member`, `data` and `latent`; they divide members, rows and latents.

    Example:
      >>> choose_mesh(Sizes(members=6, batch_size=1024, d_sae=4096), 8, bytes_per_member=1e9, memory=8e10)
      {'member': 2, 'data': 4, 'latent': 1}
    """
    cuts = divisors(sizes.d_sae, devices)
    least = next((cut for cut in cuts if bytes_per_member / cut <= memory), cuts[-1])
    meshes = [_within(sizes, devices // cut, cut) for cut in cuts if cut >= least]
    if not every:
        return meshes[0]
    # of equals the first is taken, which cuts latents least
    return max(meshes, key=lambda mesh: math.prod(mesh.values()))


def _within(sizes: Sizes, devices: int, latent: int) -> dict[str, int]:
    """The axes of members and data that use most of so many devices, members before data."""
    pairs = product(divisors(sizes.members, devices), divisors(sizes.batch_size, devices))
    fitting = (pair for pair in pairs if math.prod(pair) <= devices)
    member, data = max(fitting, key=lambda pair: (math.prod(pair), *pair))
    return {"member": member, "data": data, "latent": latent}


def divisors(number: int, most: int) -> list[int]:
    """What divides a number without a rest, up to a bound, smallest first."""
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
