"""One SAE in every format that can hold it, and how far each is from where it began.

    python examples/11_every_format.py [--out FOLDER]

Ten seconds on two CPU cores; needs PyTorch for the `.pt` formats. A row for each pair of an architecture
and a format: the largest relative difference of features and of reconstructions after writing and reading,
which is 0 where nothing had to be folded and a few roundings of float32 (6e-8) where something had; or why
the format does not hold it.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import sae_jax
from sae_jax import formats
from sae_jax.convert import convert

D_IN, D_SAE = 64, 256


def models() -> dict[str, sae_jax.SAE]:
    """An SAE of each kind."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    return {
        "relu": sae_jax.relu(**sizes),
        "topk": sae_jax.topk(**sizes, k=8),
        "batch_topk": sae_jax.batch_topk(**sizes, k=8, threshold_init=0.5),
        "jumprelu": sae_jax.jumprelu(**sizes, threshold_init=0.5),
        "gated": sae_jax.gated(**sizes),
        "transcoder": sae_jax.transcoder(**sizes, d_out=D_IN, skip=True),
        "crosscoder": sae_jax.crosscoder(**sizes, sources=2),
    }


def main() -> None:
    """Write each SAE in each format, read it, and tell the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("formats"))
    out = parser.parse_args().out
    for name, sae in models().items():
        drawn = sae.init(jax.random.key(0))
        # biases start at 0, where a forgotten one would not show
        params = {leaf: values + 0.1 * jnp.cos(jnp.arange(values.size).reshape(values.shape))
                  for leaf, values in drawn.items()}  # fmt: skip
        start = out / name / "start"
        sae_jax.TrainedSAE(sae, params).save(start)
        for form in formats.FORMATS:
            try:
                done = convert(start, out / name / form, form, overwrite=True)[0]
            except sae_jax.InputError as error:
                print(f"{name:12} {form:20} {error}")
                continue
            told = done.difference
            print(f"{name:12} {form:20} {told.features:.1e} {told.reconstructions:.1e}")


if __name__ == "__main__":
    main()
