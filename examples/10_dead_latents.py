"""Two set-ups in which latents die, and what brings them back.

    python examples/10_dead_latents.py

One to two minutes on two CPU cores. Prints the share of latents that never fire after training:

- TopK on activations with a large mean that nothing subtracts: more than half of its latents never win a
  place among the k; AuxK, at SAELens's weight, leaves under 5 %;
- ReLU whose encoder biases start between -3 and 0: more than 20 % never fire; resampling leaves under 5 %.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

import sae_jax
from sae_jax import initialisation, resampling
from sae_jax.transforms import scale_by_adam, unit_norm_decoder

D_IN, D_SAE, STEPS = 64, 512, 2000


def chain(learning_rate):
    """Adam on unit decoder rows."""
    return optax.chain(scale_by_adam(), optax.scale(-learning_rate), unit_norm_decoder())


def resampled(learning_rate):
    """The same with resampling every 300 steps, up to step 1,500."""
    return resampling.anthropic(chain(learning_rate), every=300, last=1500, dead_after=150)


def biases_below_zero(params, key):
    """Latents that start ever further from firing."""
    return {**params, "b_enc": jnp.linspace(-3, 0, D_SAE)}


def main() -> None:
    x = sae_jax.synthetic.planted(40_000, D_IN).x
    mean = 2 * jax.random.normal(jax.random.key(5), (D_IN,))
    topk = partial(sae_jax.topk, D_IN, D_SAE, apply_b_dec_to_input=False, dead_after=100)
    relu = partial(sae_jax.relu, D_IN, D_SAE, mean_features=False, decoder_init_norm=1.0)
    relu = initialisation.starting(partial(relu, apply_b_dec_to_input=True), biases_below_zero)
    k, l1 = sae_jax.grid(k=[8], lr=[1e-3]), sae_jax.grid(l1=[0.3], lr=[1e-3])
    weak = partial(topk, auxk=1 / 32, auxk_loss=sae_jax.auxk.normalised)
    runs = {
        "TopK": (partial(topk, auxk=0.0), chain, k, x + mean),
        "TopK with AuxK": (topk, chain, k, x + mean),
        "TopK with AuxK, normalised, 1/32": (weak, chain, k, x + mean),
        "ReLU": (relu, chain, l1, x),
        "ReLU with resampling": (relu, resampled, l1, x),
    }
    print(f"{'':34} dead   L0  explained variance")
    for name, (factory, optimizer, grid, rows) in runs.items():
        source = sae_jax.in_memory(rows, batch_size=256)
        result = sae_jax.sweep(factory, optimizer, grid=grid, source=source, steps=STEPS, points=4)
        columns = ("dead_fraction", "l0", "explained_variance")
        dead, l0, explained = (result.table[column][0] for column in columns)
        print(f"{name:34} {dead:5.1%} {l0:5.1f} {explained:.3f}", flush=True)


if __name__ == "__main__":
    main()
