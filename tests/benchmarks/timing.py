"""What happens within one process of the benchmark: one contender is timed, or one thing is found out."""

import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contenders import CONTENDERS, Outcome
from works import BY_HAND, LOOP, SWEEP, Work

REPEATS = 3
"""Timed calls per process at most, after the first."""
SECONDS = 20.0
"""After which no further call is begun."""
LOOP_SAMPLE = 10
"""How many members the loop is timed on at most: it trains one after another, and 1,024 take minutes."""
GUARD_MEMBERS = 2
SECONDS_FOR_A_PEAK = 0.5


class Timing(NamedTuple):
    """One contender in one process."""

    contender: str
    work: dict[str, Any]
    timed_members: int
    import_seconds: float
    first_seconds: float
    """Of the first call, compilation included."""
    seconds: list[float]
    """Of the calls after it."""
    step_seconds: list[float]
    """Per step of those calls without their fixed costs; empty where the contender does not tell."""
    memory: int
    """The most bytes that the process had, its libraries included; on a GPU the most on the device."""
    memory_before: int
    """The same before the first call."""
    peak: float
    """FLOP/s of a matrix product in the same process; 0 where it was not measured."""


def measure(contender: str, work: Work, data: str) -> Timing:
    """Time one contender at one work.

    Args:
      contender: a key of `CONTENDERS`.
      work: what it trains.
      data: the file of the work's batches.

    Raises:
      RuntimeError: what it did is not the work.
    """
    began = time.perf_counter()
    build = CONTENDERS[contender](work, np.load(data))
    imported, before = time.perf_counter() - began, memory(contender, work)
    timed = min(work.members, LOOP_SAMPLE) if contender == LOOP else work.members
    # a member of the loop costs what any other does, so one warms it up
    first, _ = _timed(build, range(1 if contender == LOOP else timed), work)
    calls, start = [], time.perf_counter()
    while len(calls) < REPEATS and (not calls or time.perf_counter() - start < SECONDS):
        begin = (len(calls) + 1) * timed
        calls.append(_timed(build, range(begin, begin + timed), work))
    most = memory(contender, work)
    return Timing(
        contender,
        work._asdict(),
        timed,
        imported,
        first,
        [seconds for seconds, _ in calls],
        [outcome.seconds_per_step for _, outcome in calls if outcome.seconds_per_step],
        most,
        before,
        jax_peak(work.bfloat16) if contender == SWEEP else 0.0,
    )


def _timed(build: Callable, seeds: range, work: Work) -> tuple[float, Outcome]:
    fit = build(seeds)
    began = time.perf_counter()
    outcome = fit()
    seconds = time.perf_counter() - began
    require_work(outcome, work, len(seeds))
    return seconds, outcome


def require_work(outcome: Outcome, work: Work, members: int) -> None:
    """Raise unless so many members of the work's size took all its steps and their losses fell."""
    first, last = np.array(outcome.first), np.array(outcome.last)
    faults = {
        f"{len(last)} losses of {members} members": len(last) != members,
        "a loss that is not finite": not np.isfinite([first, last]).all(),
        f"{(last >= first).sum()} losses that did not fall": bool((last >= first).any()),
        f"{outcome.parameters} parameters, not {work.parameters}": outcome.parameters != work.parameters,
        f"{outcome.steps} steps, not {work.steps}": outcome.steps != work.steps,
    }
    found = [fault for fault, there in faults.items() if there]
    if found:
        raise RuntimeError(f"not the work ({work}): {'; '.join(found)}")


def memory(contender: str, work: Work) -> int:
    """Bytes that this process has had at most: of a GPU's memory where the work is one for it."""
    if work.gpu and contender == SWEEP:
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    if work.gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    # not ru_maxrss where it can be helped: that begins with what the parent had
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    high = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    return high or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def jax_peak(bfloat16: bool) -> float:
    """FLOP/s of a matrix product through XLA."""
    from sae_jax import devices

    return devices.peak(precision="bfloat16" if bfloat16 else None)


def torch_peak(work: Work) -> float:
    """FLOP/s of a matrix product through PyTorch, as `devices.peak` measures it through XLA."""
    import torch

    torch.set_float32_matmul_precision("high" if work.gpu else "highest")
    device = "cuda" if work.gpu else "cpu"
    dtype = torch.bfloat16 if work.bfloat16 else torch.float32

    def best(size: int) -> float:
        a = torch.full((size, size), 1 / size, dtype=dtype, device=device)
        quickest, start = math.inf, time.perf_counter()
        while time.perf_counter() - start < SECONDS_FOR_A_PEAK:
            began = time.perf_counter()
            (a @ a).sum().item() if work.gpu else a @ a
            quickest = min(quickest, time.perf_counter() - began)
        return quickest

    return max(2 * size**3 / best(size) for size in ((4096, 8192) if work.gpu else (1024, 2048)))


def write_rows(work: Work, path: str) -> None:
    """The batches of a work, [batches, batch, d_in], by seed 0."""
    shape = (work.batches, work.batch, work.d_in)
    if work.rows == "normal":
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
    elif work.rows == "seed":
        from sae_jax.synthetic import seed_tokens

        x = seed_tokens().x.reshape(shape)
    else:
        import jax

        from sae_jax import synthetic

        world = getattr(synthetic, work.rows)(batch_size=work.batch)
        draw = jax.jit(lambda i: world.batch(i).x)
        x = np.stack([draw(i) for i in range(work.batches)])
    np.save(path, x)


def agreement(work: Work, data: str) -> dict[str, list[float]]:
    """Final losses of the same members from equal weights on equal batches: by hand in PyTorch, and ours."""
    import jax

    import sae_jax
    from sae_jax.formats.seed_module import to_state_dict

    work = work._replace(members=min(work.members, GUARD_MEMBERS))
    x, seeds = np.load(data), range(work.members)
    source = sae_jax.in_memory(x.reshape(-1, work.d_in), work.batch)
    taken = np.stack([np.asarray(source.batch(jax.numpy.int32(i)).x) for i in range(work.steps)])
    init = sae_jax.relu(work.d_in, work.d_sae).init
    weights = [to_state_dict(init(jax.random.key(seed))) for seed in seeds]
    theirs = {name: CONTENDERS[name](work, taken)(seeds, weights)().last for name in BY_HAND}
    return {**theirs, SWEEP: CONTENDERS[SWEEP](work, x)(seeds)().last}


def has_gpu() -> bool:
    """Whether both JAX and PyTorch find one."""
    import jax
    import torch

    return jax.devices()[0].platform == "gpu" and torch.cuda.is_available()


def threads() -> int:
    """That PyTorch takes by default; XLA takes one per core that it may use."""
    import torch

    return torch.get_num_threads()


def answer(task: dict[str, Any]) -> Any:
    """What a process is started for, as plain values."""
    work = Work.of(task["work"]) if "work" in task else None
    match task["asked"]:
        case "measure":
            return measure(task["contender"], work, task["data"])._asdict()
        case "agreement":
            return agreement(work, task["data"])
        case "rows":
            return write_rows(work, task["data"])
        case "torch_peak":
            return torch_peak(work)
        case "gpu":
            return has_gpu()
        case "threads":
            return threads()
    raise ValueError(f"nothing is known of {task['asked']!r}")


def environment(gpu: bool) -> dict[str, str]:
    """Of a process: on a CPU JAX must not find a GPU; and no program that an earlier run compiled."""
    here = {"JAX_PLATFORMS": "cpu"} if not gpu else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    quiet = {"TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **here, **quiet, "JAX_ENABLE_COMPILATION_CACHE": "false"}
