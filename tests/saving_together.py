"""One of two processes that go on from a checkpoint of one, and save what is spread over both.

python tests/saving_together.py HOST:PORT PROCESS FOLDER
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sae_jax.checkpoint import Checkpoints


def main(coordinator: str, process: int, folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator, 2, process)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    like = {
        "rows": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=rows),
        "number": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    }
    onwards = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(like)
        assert found is not None
        step, state, history = found
        for _ in range(4):
            step, state = step + 1, onwards(state)
            checkpoints.save(step, state, history)
        assert checkpoints.wait()
        again = checkpoints.restore(like)
        assert again is not None
        step, state, _ = again
    assert step == int(state["number"].addressable_data(0)) == 9
    assert state["rows"].sharding == rows
    for shard in state["rows"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(16)[shard.index] + 9)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
