"""A store of 2 million rows of 512: written, read back, streamed, and swept beside the same rows in memory.

    python tests/benchmarks/streaming.py            about 6 minutes on 2 cores, 2 GB of disk, 5 GB of memory
    python tests/benchmarks/streaming.py --rows 200000 --steps 5 --rounds 2

Prints GB/s of writing and streaming (from the page cache: the store was just written), peak memory of the
streaming, and steps/s of a 512 -> 4096 sweep from the store and from memory in turn: medians, and the ratio
pair by pair.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sae_jax
from sae_jax.data import stages
from sae_jax.data.manifest import Reached
from sae_jax.data.writer import begun, writing

D_IN, D_SAE, BATCH = 512, 4096, 1024
AT_ONCE = 65_536


def rows(number: int) -> np.ndarray:
    """A stretch of rows that is made anew wherever it is asked for."""
    rng = np.random.default_rng(number)
    return rng.standard_normal((AT_ONCE, D_IN), dtype=np.float32).astype(jnp.bfloat16)


def stretches(count: int):
    """Where each stretch starts, and its rows."""
    for number, start in enumerate(range(0, count, AT_ONCE)):
        yield start, rows(number)[: count - start]


def write(folder: Path, count: int) -> sae_jax.data.Store:
    """The store, with the time it took to write without that of making its rows."""
    seconds = 0.0
    with writing(folder, begun({"site": D_IN})) as writer:
        for start, x in stretches(count):
            numbers = np.arange(start, start + len(x), dtype=np.int32)
            began = time.perf_counter()
            writer.append({"site": x}, numbers, numbers % 128, Reached(start, 0, ""))
            seconds += time.perf_counter() - began
        began = time.perf_counter()
        writer.finish()
    seconds += time.perf_counter() - began
    print(f"written: {count:,} x {D_IN} bfloat16 in {seconds:.1f} s, {gigabytes(count) / seconds:.2f} GB/s")
    return sae_jax.open_store(folder)


def gigabytes(count: int) -> float:
    """Of so many rows."""
    return count * D_IN * 2 / 1e9


def read_back(found: sae_jax.data.Store, count: int) -> None:
    """Whether every bit is as it was."""
    site = found.site()
    for start, x in stretches(count):
        again = site.read(start, start + len(x))
        assert np.array_equal(again.view(np.uint16), x.view(np.uint16)), f"rows from {start} on differ"
    print("read back: equal to the bit")


def stream(source: sae_jax.data.Stored, count: int, rounds: int) -> None:
    """An epoch from the page cache, several times."""
    steps = count // BATCH
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for block, _stop in stages(source, 0, steps):
            jax.block_until_ready(block.columns)
        speeds.append(gigabytes(steps * BATCH) / (time.perf_counter() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    told = ", ".join(f"{speed:.2f}" for speed in speeds)
    print(f"streamed: {told} GB/s, median {statistics.median(speeds):.2f}; peak memory {peak:.2f} GB")


def sweep(
    source: sae_jax.data.Stored, in_memory: sae_jax.data.InMemory, members: int, steps: int, rounds: int
):
    """Steps/s of the same sweep from either, in turn."""
    optimizer = optax.adam(1e-3)

    def of(l1):
        return sae_jax.relu(D_IN, D_SAE, l1=l1)

    l1 = jnp.logspace(-3, -1, members)
    state = jax.vmap(lambda l1: sae_jax.init(of(l1), optimizer, jax.random.key(0)))(l1)

    def step(state, batch):
        return jax.vmap(lambda l1, one: sae_jax.make_step(of(l1), optimizer)(one, batch))(l1, state)

    def seconds(source, steps=steps) -> float:
        began = time.perf_counter()
        jax.block_until_ready(sae_jax.run(step, state, source, steps, points=1)[0])
        return time.perf_counter() - began

    for each in (source, in_memory):
        seconds(each, 2)
    pairs = [(seconds(source), seconds(in_memory)) for _ in range(rounds)]
    ratios = [memory / stored for stored, memory in pairs]
    stored, memory = (steps / statistics.median(each) for each in zip(*pairs, strict=True))
    print(
        f"swept, {members} members {D_IN} -> {D_SAE}, batch {BATCH}: {stored:.2f} steps/s from the store, "
        f"{memory:.2f} from memory; ratios {', '.join(f'{ratio:.3f}' for ratio in ratios)}, "
        f"median {statistics.median(ratios):.3f}"
    )


def main() -> None:
    """Everything, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = write(Path(scratch) / "store", options.rows)
        source = sae_jax.stored(found.site(), BATCH)
        stream(source, options.rows, options.rounds)
        read_back(found, options.rows)
        few = min(options.rows, 500_000)
        in_memory = sae_jax.in_memory(found.site().read(0, few).astype(np.float32), BATCH)
        sweep(source, in_memory, options.members, options.steps, options.rounds)


if __name__ == "__main__":
    main()
