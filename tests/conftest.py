"""Strictness and what many tests share. Loaded before any test imports the package."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Every annotation in the package is checked at run time, shapes included. Must come before its import.
install_import_hook("sae_jax", "typecheck.check")

# Not "raise" and "strict": `x W + b_enc` adds a bias to a batch, and optax.adam has float ** int.
# test_contract.py runs the step under strict dtype promotion with an optimizer that bears it.
jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_numpy_dtype_promotion", "standard")

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Let go of what a file's tests compiled: some ten thousand programs in one process end in a segfault."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Run-time checks of annotations off: what a user who hands over the wrong shape or type meets."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """A list that grows by one entry with each XLA compilation."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def tokens():
    """The seed's eight tokens."""
    import sae_jax

    return sae_jax.synthetic.seed_tokens()


@pytest.fixture
def small():
    """[48, 5] float32, fixed."""
    return np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)


@pytest.fixture(scope="session")
def sae_lens():
    """SAELens, imported once: it takes ten seconds."""
    assert importlib.util.find_spec("sae_lens"), "the tests need SAELens: pip install -e '.[test]'"
    import sae_lens

    return sae_lens


@pytest.fixture(scope="session")
def torch():
    """PyTorch, imported where a test asks for it."""
    import torch

    return torch


@pytest.fixture(scope="session")
def package() -> Path:
    """The folder of the package under test."""
    return Path(importlib.util.find_spec("sae_jax").origin).parent


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of so many kB, 200 unless a test asks for others by `indirect`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={getattr(request, 'param', 200)}k"
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
