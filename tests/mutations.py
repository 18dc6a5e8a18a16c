"""Damaged and hostile files for every reader, and what each reader makes of them.

    python tests/mutations.py --count 100000 --seed 0

Takes about 15 minutes on 2 cores; prints a table of outcomes and exits 1 at the first breach of what
docs/formats.md promises: one documented error or a whole SAE, no code run, no more memory than twice the
tensors declared, no hang.
"""

import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sae_jax
from sae_jax import formats
from sae_jax.architectures import find
from sae_jax.base import InputError
from sae_jax.normalise import layer_normed

SECONDS = 20
"""How long one file may take; the slowest seen takes well under one."""
SLACK = 96 << 20
"""Bytes that the process itself may grow by: compiled programs, caches, torch's first use."""
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rename",
)
"""Audit events that no reader has a reason for."""

MODELS = {
    "relu": lambda: sae_jax.relu(5, 7, target_l0=2.0),
    "topk": lambda: layer_normed(sae_jax.topk(5, 7, k=3)),
    "topk-plain": lambda: sae_jax.topk(5, 7, k=3),
    "batch_topk": lambda: sae_jax.batch_topk(5, 7, k=2.5),
    "jumprelu": lambda: sae_jax.jumprelu(5, 7, log_threshold=True),
    "gated": lambda: sae_jax.gated(5, 7),
    "transcoder": lambda: sae_jax.transcoder(5, 7, d_out=5, skip=True, of=find("topk"), k=2),
    "transcoder-relu": lambda: sae_jax.transcoder(5, 7, d_out=5, skip=True),
    "crosscoder": lambda: sae_jax.crosscoder(5, 7, sources=2),
}


def good(folder: Path) -> list[Path]:
    """A whole SAE of every architecture in every format that holds it, each a folder."""
    np.seterr(all="ignore")
    made = []
    for name, build in MODELS.items():
        sae = build()
        drawn = sae.init(jax.random.key(0))
        params = {key: np.asarray(leaf) + np.float32(0.1) for key, leaf in drawn.items()}
        for form in formats.FORMATS:
            place = folder / f"{form}-{name}"
            try:
                formats.write(place, sae, params, form, log_sparsity=np.full(7, -2.0, np.float32))
                formats.read(_sae_at(place))
            except InputError:
                shutil.rmtree(place, ignore_errors=True)
                continue
            made.append(place)
    seen = {place.name.rsplit("-", 1)[0] for place in made}
    assert len(seen) >= len(formats.FORMATS), f"no good file of some format: {seen}"
    return made


def _sae_at(place: Path) -> Path:
    """The folder, or the one SAE in it where a format's unit is a file."""
    several = formats.several(place)
    return next(iter(several.values())) if several else place


# What is done to bytes


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    array = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        if array:
            array[rng.randrange(len(array))] ^= 1 << rng.randrange(8)
    return bytes(array)


def flipped_early(data: bytes, rng: random.Random) -> bytes:
    """In the part where headers are."""
    return flipped(data[:300], rng) + data[300:]


def spliced(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    put = rng.choice((b"", rng.randbytes(rng.randrange(40)), data[start:stop] * 2, b"\0" * 64, b"\xff" * 9))
    return data[:start] + put + data[stop:]


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(300))


def of_other_kind(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (b"", b"PK\x03\x04", b"\x80\x02.", b"{}", b"[]", b"null", b"\x93NUMPY", b"\x00" * 8, data[::-1])
    )


# What is done to documents

VALUES: tuple[Callable[[random.Random], object], ...] = (
    lambda rng: None,
    lambda rng: rng.choice((True, False)),
    lambda rng: rng.choice((0, -1, 1, 2**31, 2**63, 10**30, 7, 5, 8)),
    lambda rng: rng.choice((0.5, -1.0, float("nan"), float("inf"), 1e308, 3.0)),
    lambda rng: rng.choice(("", "relu", "topk", "../../etc/passwd", "/etc/passwd", "x" * 5000, "\0", "none")),
    lambda rng: rng.choice(([], [5], [[[]]], {}, {"k": 3}, {"architecture": "relu"}, [None] * 50)),
)


def edited_json(data: bytes, rng: random.Random) -> bytes:
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = document
        while isinstance(place, dict) and place:
            key = rng.choice(list(place))
            if isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            what = rng.random()
            if what < 0.25:
                del place[key]
            elif what < 0.35:
                place[rng.choice(("k", "d_in", "architecture", "sae_jax", "threshold", "extra"))] = place.pop(
                    key
                )
            else:
                place[key] = rng.choice(VALUES)(rng)
            break
    return json.dumps(document).encode()


def hostile_json(data: bytes, rng: random.Random) -> bytes:
    deep = rng.choice((1000, 100_000))
    return rng.choice(
        (
            b"[" * deep,
            b'{"a":' * deep,
            b'{"d_in": ' + b"9" * 20_000 + b"}",
            b'{"architecture": "\xff\xfe"}',
            b'{"architecture": "standard", "architecture": 3}',
            b'{"d_in": 1e999, "d_sae": NaN}',
            b"{" + b" " * 2_000_000 + b"}",
            data + data,
        )
    )


def hostile_yaml(data: bytes, rng: random.Random) -> bytes:
    laughs = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
    )
    return rng.choice(
        (
            laughs,
            b"!!python/object/apply:os.system ['touch RAN']\n",
            b"a: !!python/name:os.system\n",
            b"[" * 5000,
            b"- 1\n- 2\n",
            b"model_kind: transcoder_set\n? [complex, key]\n: 3\n",
            b"a: 2026-13-45\n",
            b"\t: x",
        )
    )


def edited_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one = header[rng.choice(names)]
    what = rng.randrange(7)
    if what == 0:
        one["dtype"] = rng.choice(("F64", "I32", "BF16", "F16", "BOOL", "F8_E4M3", "Q", 3, None, "C64", "U8"))
    elif what == 1:
        one["shape"] = rng.choice(([], [0], [-1, 5], [2**62, 4], [7, 5], [5], [1] * 40, "x", [5.5], [10**30]))
    elif what == 2:
        one["data_offsets"] = rng.choice(([0, 2**60], [8, 0], [-4, 4], [0], "x", [0, 0], [1, 141]))
    elif what == 3:
        header[rng.choice(names)] = rng.choice(([], 3, None, {"dtype": "F32"}))
    elif what == 4:
        header["__metadata__"] = rng.choice(
            ({"a": 3}, {"sae_jax": "{"}, "x", {"sae_jax": "[" * 5000}, {"a": "b" * 10**6})
        )
    elif what == 5:
        del header[rng.choice(names)]
    else:
        header[rng.choice(("W_enc", "threshold", "W_skip", "encoder.weight"))] = header.pop(rng.choice(names))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def hostile_header(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((2**63 - 1, 2**40, 100_000_000, len(data), len(data) - 8, 0, 1))
    return size.to_bytes(8, "little") + rng.choice((data[8:], b"{" * 5000, b'{"a":' * 5000, b" " * 100_000))


# What is done to tensors


def other_tensors(tensors: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    """Wrong shapes and dtypes, NaN, missing ones and strange ones."""
    found = dict(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(found))
        leaf = found.pop(name)
        found |= rng.choice(
            (
                lambda leaf=leaf, name=name: {name: np.ascontiguousarray(leaf.T)},
                lambda leaf=leaf, name=name: {name: leaf[..., None]},
                lambda leaf=leaf, name=name: {name: leaf.reshape(-1)},
                lambda leaf=leaf, name=name: {name: leaf[:-1] if leaf.ndim else leaf},
                lambda leaf=leaf, name=name: {name: leaf.reshape(-1)[:0]},
                lambda leaf=leaf, name=name: {name: leaf.reshape(-1)[:1].sum()},
                lambda leaf=leaf, name=name: {name: np.zeros((0, 5), np.float32)},
                lambda leaf=leaf, name=name: {name: leaf.astype(np.int32)},
                lambda leaf=leaf, name=name: {name: leaf > 0},
                lambda leaf=leaf, name=name: {name: leaf.astype(np.float64)},
                lambda leaf=leaf, name=name: {name: leaf.astype(np.float16)},
                lambda leaf=leaf, name=name: {name: np.full_like(leaf, np.nan)},
                lambda leaf=leaf, name=name: {name: np.full_like(leaf, np.inf)},
                lambda leaf=leaf, name=name: {},
                lambda leaf=leaf, name=name: {name: leaf, "surprise": leaf},
                lambda leaf=leaf, name=name: {name + "x": leaf},
            )
        )()
        if not found:
            break
    return {name: np.asarray(leaf, order="C") for name, leaf in found.items()}


def other_safetensors(data: bytes, rng: random.Random) -> bytes:
    from safetensors.numpy import load, save

    return save(other_tensors(load(data), rng) or {"a": np.zeros(1)})


def other_npz(data: bytes, rng: random.Random) -> bytes:
    file = io.BytesIO()
    np.savez(file, **other_tensors(dict(np.load(io.BytesIO(data))), rng))
    return file.getvalue()


def other_torch(data: bytes, rng: random.Random) -> bytes:
    import torch

    held = torch.load(io.BytesIO(data), weights_only=True)
    plain = {name: value for name, value in held.items() if not isinstance(value, torch.Tensor)}
    arrays = {name: value.numpy() for name, value in held.items() if isinstance(value, torch.Tensor)}
    tensors = {name: torch.from_numpy(np.array(leaf)) for name, leaf in other_tensors(arrays, rng).items()}
    for name in plain:
        if rng.random() < 0.3:
            plain[name] = rng.choice((None, "x", 3, [1], {"k": "3"}, -1, 2.5))
    return _saved({**tensors, **plain})


def hostile_npz(data: bytes, rng: random.Random) -> bytes:
    """Zip bombs, arrays that promise too much, pickled objects."""

    def npy(shape, body=b"", dtype="<f4", objects=False):
        file = io.BytesIO()
        header = {"descr": "|O" if objects else dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + body

    bomb = (
        npy((64 << 20,)) + b"\0" * (256 << 20) if rng.random() < 0.02 else npy((1 << 20,), b"\0" * (4 << 20))
    )
    entries = rng.choice(
        (
            {"W_enc.npy": bomb, "W_dec.npy": bomb},
            {"W_enc.npy": npy((10**12,), b"\0" * 64)},
            {"W_enc.npy": npy((10**9, 10**9, 10**9))},
            {"W_enc.npy": npy((-5, -7), b"\0" * 140)},
            {"W_enc.npy": npy((5, 7), pickle.dumps(Code("RAN")), objects=True)},
            {"W_enc.npy": pickle.dumps(Code("RAN"))},
            {"../W_enc.npy": npy((5, 7), b"\0" * 140)},
            {"W_enc": b"text"},
            {"W_enc.npy": npy((5, 7), b"\0" * 140, dtype="<U1")},
        )
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in entries.items():
            archive.writestr(name, body)
    return file.getvalue()


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def hostile_torch(data: bytes, rng: random.Random) -> bytes:
    """Code in pickles, tensors larger than their bytes, compressed and old files."""
    import torch

    held = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(list(held))
    what = rng.randrange(8)
    if what == 0:
        return _saved({**held, name: Code("RAN")})
    if what == 1:
        return _saved(Code("RAN"))
    if what == 2:
        return _saved({**held, name: torch.zeros(1).expand(10**6, 10**5)})
    if what == 3:
        return _saved({**held, **{f"copy{i}": torch.zeros(1).expand(10**9) for i in range(20)}})
    if what == 4:
        return _saved(held, _use_new_zipfile_serialization=False)
    if what == 5:
        packed = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(data)) as old,
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.namelist():
                bulk = b"\0" * (8 << 20) if "/data/" in entry and rng.random() < 0.5 else old.read(entry)
                new.writestr(entry, bulk)
        return packed.getvalue()
    if what == 6:
        dense = torch.ones(5, 7)
        return _saved(
            {**held, name: rng.choice((dense.to_sparse(), dense.bool(), dense.to(torch.complex64)))}
        )
    return pickle.dumps(rng.choice((Code("RAN"), {"encoder.0.weight": Code("RAN")}, [[]])))


def _saved(held, **how) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(held, file, **how)
    return file.getvalue()


ANY = (truncated, flipped, flipped_early, spliced, noise, of_other_kind)
OF_KIND = {
    ".json": (edited_json, edited_json, edited_json, hostile_json),
    ".yaml": (hostile_yaml, hostile_yaml),
    ".safetensors": (edited_header, edited_header, other_safetensors, other_safetensors, hostile_header),
    ".npz": (other_npz, other_npz, hostile_npz),
    ".pt": (other_torch, other_torch, hostile_torch),
}


def mutated(source: Path, target: Path, rng: random.Random) -> str:
    """A copy of a good folder with one file changed, now and then two; what was done, in words."""
    shutil.copytree(source, target)
    done = []
    for again in range(rng.choice((1, 1, 1, 2))):
        file = rng.choice(sorted(path for path in target.rglob("*") if path.is_file()))
        # what is hostile already is only damaged further: to open it here is what readers must not do
        of_kind = () if again else 2 * OF_KIND.get(file.suffix, ())
        what = rng.choice((*ANY, *of_kind))
        file.write_bytes(what(file.read_bytes(), rng))
        done.append(f"{what.__name__} {file.name}")
        if rng.random() < 0.02:
            file.unlink()
            done.append("deleted")
            break
    return f"{source.name}: {', '.join(done)}"


# What is held against each


class Hang(BaseException):
    """Not an `Exception`: readers turn those into their own."""


def attempt(place: Path) -> str:
    """Read it: "refused" or "loaded"; anything else is raised."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    declared = sum(file.stat().st_size for file in files)
    before = _peak()
    try:
        with _limited():
            _, loaded = formats.read(_sae_at(place))
    except InputError as error:
        message, outcome = str(error), "refused"
    else:
        shapes = jax.eval_shape(loaded.sae.init, jax.random.key(0))
        assert {name: leaf.shape for name, leaf in loaded.params.items()} == {
            name: leaf.shape for name, leaf in shapes.items()
        }
        kinds = {name: str(leaf.dtype) for name, leaf in loaded.params.items()}
        floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in loaded.params.values())
        assert floats, f"loaded with {kinds}"
        message, outcome = "", "loaded"
    assert "\n" not in message, f"more than one line: {message!r}"
    assert len(message) < 3000, f"too long: {message[:200]}"
    grown = _peak() - before
    assert grown <= 2 * declared + SLACK, f"{grown} bytes for files of {declared}"
    assert not Path("RAN").exists(), "code ran"
    assert not _seen, f"{_seen[0]} while reading"
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _limited() -> Iterator[None]:
    """Raise where reading takes too long."""

    def hang(signum, frame):
        raise Hang(f"still reading after {SECONDS} s")

    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    _watching.append(True)
    try:
        yield
    finally:
        _watching.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


_watching: list[bool] = []
_seen: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event.startswith(FORBIDDEN):
        _seen.append(event)


def campaign(first: int, count: int, seed: int) -> collections.Counter:
    """Mutants `first` to `first + count`, each drawn from (seed, number); outcomes by format.

    Raises:
      AssertionError: a breach; the message says which mutant.
    """
    sys.addaudithook(_audit)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    outcomes: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        os.chdir(scratch)
        sources = good(Path(scratch) / "good")
        for number in range(first, first + count):
            rng = random.Random(f"{seed}-{number}")
            source = sources[number % len(sources)]
            place = Path(scratch) / "mutant"
            what = mutated(source, place, rng)
            started = time.monotonic()
            try:
                outcome = attempt(place)
            except (Exception, Hang) as error:
                raise AssertionError(f"mutant {number} of seed {seed} ({what}): {error!r}") from None
            outcomes[source.name.split("-")[0], outcome] += 1
            outcomes["slowest, ms"] = max(outcomes["slowest, ms"], round(1000 * (time.monotonic() - started)))
            shutil.rmtree(place)
            if number % 500 == 499:
                jax.clear_caches()
        os.chdir("/")
    return outcomes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--count", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--processes", type=int, default=os.cpu_count())
    given = options.parse_args()
    part = 2000
    starts = range(0, given.count, part)
    total: collections.Counter = collections.Counter()
    slowest = 0
    # a process per part: what one leaves in memory does not count against the next
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        run = partial(campaign, seed=given.seed)
        parts = pool.map(run, starts, [min(part, given.count - start) for start in starts])
        for done, found in enumerate(parts, 1):
            slowest = max(slowest, found.pop("slowest, ms"))
            total += found
            print(f"{min(done * part, given.count)} of {given.count}", file=sys.stderr, flush=True)
    for name in formats.FORMATS:
        print(f"{name:20} refused {total[name, 'refused']:6}  loaded {total[name, 'loaded']:6}")
    print(f"{sum(total.values())} files, the slowest {slowest} ms, no breach")


if __name__ == "__main__":
    main()
