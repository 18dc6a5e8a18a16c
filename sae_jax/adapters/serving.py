"""A trained SAE as programs that run wherever JAX does, without this package."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax.base import require
from sae_jax.folds import kind, plain
from sae_jax.formats import files
from sae_jax.layer_norm import is_layer_normed
from sae_jax.trained import TrainedSAE

ENCODE, DECODE, WEIGHTS = "encode.jax", "decode.jax", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_functions(trained: TrainedSAE, folder: str | Path) -> list[Path]:
    """Write `encode` and `decode` as two serialised programs (StableHLO), and the weights beside them.

        encode.jax            (weights, x [n, d_in]) -> f [n, d_sae]
        decode.jax            (weights, f [n, d_sae]) -> x_hat [n, d_out]
        weights.safetensors   the weights, by name

    Of a skip connection or a layer norm, whose output takes x, `decode` is `(weights, f, x) -> x_hat`. Any
    number of rows n >= 1, on CPU, CUDA and TPU. Whoever serves them needs only jax, flatbuffers and
    safetensors. Weights are arguments and not constants of the programs: the two share one copy of them on
    the device, they may be of any size, can be sharded, and can be replaced by those of another SAE of the
    same shape.

    Args:
      trained: the SAE and its weights; x is of the dtype of `W_enc`. float64 needs `jax_enable_x64`, here and
        where it is served.
      folder: made if missing; files of the same names in it are replaced.

    Returns:
      The three files.

    Raises:
      InputError: float64 weights where JAX computes in float32; flatbuffers missing.

    Example:
      >>> export_functions(sae_jax.load("sae/"), "served/")
      >>> weights = safetensors.numpy.load_file("served/weights.safetensors")
      >>> encode = jax.export.deserialize(open("served/encode.jax", "rb").read())
      >>> f = encode.call(weights, x)

    Source: `jax.export`, whose artifacts later versions of JAX open for at least six months.
    """
    installed = importlib.util.find_spec("flatbuffers") is not None
    require(installed, "a serialised program needs flatbuffers: pip install 'sae-jax[serving]'")
    sae, params = plain(*trained)
    weights = jax.tree.map(_struct, params)
    n = jax.export.symbolic_shape("n")
    rows = [sae.config["sources"], sae.config["d_in"]] if kind(sae) == "crosscoder" else [sae.config["d_in"]]
    x = jax.ShapeDtypeStruct((*n, *rows), params["W_enc"].dtype)
    encode = _exported(sae.encode, weights, x)
    f = jax.ShapeDtypeStruct((*n, sae.config["d_sae"]), encode.out_avals[0].dtype)
    needs_x = "W_skip" in params or (is_layer_normed(sae) and "d_out" not in sae.config)
    decode = _exported(sae.decode, weights, f, *([x] if needs_x else []))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {ENCODE: encode, DECODE: decode}
    for name, program in written.items():
        (folder / name).write_bytes(program.serialize())
    files.write_safetensors(params, folder / WEIGHTS)
    return [folder / name for name in (*written, WEIGHTS)]


def _exported(function: Any, *arguments: Any) -> jax.export.Exported:
    return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


def _struct(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
    """Its shape and dtype, as JAX will take it."""
    taken = jax.dtypes.canonicalize_dtype(leaf.dtype)
    require(
        taken == leaf.dtype,
        f"weights are {leaf.dtype}, which JAX takes for {taken} unless jax_enable_x64 is set",
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
