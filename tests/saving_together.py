"""One of several processes that save, or restore, one array spread over all of their devices.

python tests/saving_together.py PROCESS PROCESSES FOLDER save|restore
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sae_jax.checkpoint import Checkpoints


def main(process: int, processes: int, folder: str, what: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    if processes > 1:
        meet(process, processes, Path(folder))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    shardings = {"rows": rows, "number": everywhere}
    state = jax.jit(lambda: {"rows": jnp.arange(16.0), "number": jnp.int32(0)}, out_shardings=shardings)()
    onwards = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(folder) as checkpoints:
        if what == "save":
            for step in range(4):
                checkpoints.save(step, state, {"step": np.arange(step)})
                state = onwards(state)
            assert checkpoints.wait()
        found = checkpoints.restore(state)
    assert found is not None
    step, state, history = found
    assert history["step"].tolist() == list(range(step))
    assert state["rows"].sharding == rows
    shards = [
        {"first": shard.index[0].start, "stop": shard.index[0].stop, "rows": np.asarray(shard.data).tolist()}
        for shard in state["rows"].addressable_shards
    ]
    print(json.dumps({"step": step, "shards": shards}))


def meet(process: int, processes: int, folder: Path) -> None:
    """Find one another through a port that the first process leaves in a file."""
    import socket
    import time

    note = folder.with_suffix(".port")
    if process == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        note.with_suffix(".new").write_text(str(port))
        note.with_suffix(".new").replace(note)
    while not note.exists():
        time.sleep(0.05)
    jax.distributed.initialize(f"127.0.0.1:{note.read_text()}", processes, process)
    if process == 0:
        note.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
