"""The step of a sweep lowers for machines that are not here: alone, and spread over a mesh of eight."""

import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import THOROUGH, Case
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sae_jax import linear, sharding
from sae_jax.program import checked_program, layout

PLATFORMS = ["cuda", "tpu"]
MESH = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
"""Of devices that need not be there."""

every_kind = pytest.mark.parametrize("case", THOROUGH, ids=[case.name for case in THOROUGH])


def exported(case: Case, mesh: AbstractMesh | None) -> jax.export.Exported:
    """The vmapped training step of four members."""
    grid, rows = case.grid(2, lr=[1e-2, 3e-3]), np.ones((8, 5), np.float32)
    program = checked_program(case.sized(8), case.optimizer, grid, case.source(rows, 8), jnp.float32)

    def described(leaf, spec):
        placed = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    with jax.sharding.use_abstract_mesh(mesh or AbstractMesh((), ())):
        state = jax.eval_shape(program.start, program.to_device(grid))
        state = jax.tree.map(described, state, layout(state))
        batch = jax.tree.map(lambda leaf: described(leaf, PartitionSpec("data")), case.batch(rows))
        # the kernels of the sparse way, which export does not promise to read in other versions
        triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
        step = jax.jit(program.step)
        return jax.export.export(step, platforms=PLATFORMS, disabled_checks=[triton])(state, batch)


class Spread(NamedTuple):
    """An argument of a module, and the axis of the mesh that each of its own axes lies along."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def axes_of(text: str) -> tuple[str, ...]:
    return tuple(axis.strip(' {}"') for axis in text.split(","))


def spread_arguments(module: str) -> list[Spread]:
    found = re.findall(r'tensor<([\dx]+)x\w+> \{[^@]*<@mesh, \[([^\]]*)\]>\} loc\("([^"]+)"\)', module)
    return [Spread(name, tuple(map(int, shape.split("x"))), axes_of(axes)) for shape, axes, name in found]


@every_kind
def test_a_sweeps_step_lowers_for_gpu_and_tpu(case):
    step = exported(case, None)
    assert step.platforms == tuple(PLATFORMS)
    assert step.nr_devices == 1
    assert "callback" not in step.mlir_module()


@every_kind
def test_a_step_spread_over_members_rows_and_latents_lowers_for_gpu_and_tpu(case):
    step = exported(case, MESH)
    text = step.mlir_module()
    assert step.platforms == tuple(PLATFORMS)
    assert step.nr_devices == 8
    assert "callback" not in text
    spread = spread_arguments(text)
    assert len(spread) == len(step.in_avals)
    state, batch = [one for one in spread if one.name.startswith("state.")], spread[-2:]
    for one in state:
        # nothing else is 8 long
        assert one.axes == ("member", *("latent" if size == 8 else "" for size in one.shape[1:])), one
    assert [(one.name, one.axes[0]) for one in batch] == [("batch.x", "data"), ("batch.y", "data")]
    # what leaves the step lies as what came in, so that its memory can be used again
    constrained = map(axes_of, re.findall(r"sdy.sharding_constraint .*<@mesh, \[([^\]]*)\]>", text))
    assert not Counter(one.axes for one in state) - Counter(constrained)
    # no device sees a whole row of latents where the largest are looked for
    assert ("sdy.manual_computation" in text) == ("stablehlo.popcnt" in text)


def test_products_of_a_spread_step_take_bfloat16_where_that_is_asked(monkeypatch):
    monkeypatch.setattr(linear, "TINY", 0)
    with linear.precision("bfloat16"):
        text = exported(THOROUGH[0], MESH).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(re.search(r"xbf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", line) for line in products)
