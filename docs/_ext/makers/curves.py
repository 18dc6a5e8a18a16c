"""A picture of each architecture, drawn by its own functions: `NAME.png`.

Of those that differ in their activation, what the first of two latents gives over its pre-activation, while
the second stays at 1; of the others, what a small one has learned.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sae_jax
from sae_jax.architectures.crosscoder import decoder_shares
from sae_jax.report.figures import CATEGORIES, save

PI = np.linspace(-1, 2, 1201, dtype=np.float32)
THRESHOLD, BANDWIDTH = 0.8, 0.3


def axes() -> Axes:
    return Figure(figsize=(4.6, 3.0), layout="constrained").add_subplot()


def curve(sae: sae_jax.SAE, title: str, **leaves: float | list[float]) -> Axes:
    """The first latent's value over its pre-activation; the second's pre-activation is 1."""
    params = {
        **{name: jnp.zeros_like(leaf) for name, leaf in sae.init(jax.random.key(0)).items()},
        "W_enc": jnp.eye(2),
        "W_dec": jnp.eye(2),
        **{name: jnp.asarray(value, jnp.float32) for name, value in leaves.items()},
    }
    f = np.array(sae.encode(params, jnp.stack([PI, jnp.ones_like(PI)], axis=1))[:, 0])
    f[1:][np.abs(np.diff(f)) > 0.1] = np.nan  # a jump is no slope
    ax = axes()
    ax.plot(PI, PI, color="#999", lw=1, ls=":")
    ax.plot(PI, f, color=CATEGORIES[0], lw=2)
    ax.set(title=title, xlabel="pre-activation of the latent", ylabel="f", ylim=(-0.15, 2.1))
    ax.grid(alpha=0.25)
    return ax


def relu() -> Axes:
    return curve(sae_jax.relu(2, 2), "b_enc = -0.5", b_enc=[-0.5, 0])


def topk() -> Axes:
    return curve(sae_jax.topk(2, 2, k=1), "k = 1, the other latent at 1")


def batch_topk() -> Axes:
    return curve(sae_jax.batch_topk(2, 2, k=1), f"once trained, threshold {THRESHOLD}", threshold=THRESHOLD)


def jumprelu() -> Axes:
    ax = curve(sae_jax.jumprelu(2, 2), f"threshold {THRESHOLD}", threshold=[THRESHOLD] * 2)
    band = THRESHOLD - BANDWIDTH / 2, THRESHOLD + BANDWIDTH / 2
    ax.axvspan(*band, color=CATEGORIES[1], alpha=0.2, lw=0, label="the threshold takes gradient here")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def gated() -> Axes:
    title = "b_gate = -0.5, b_mag = 0.2, r_mag = -0.3"
    return curve(sae_jax.gated(2, 2), title, b_gate=[-0.5, 0], b_mag=[0.2, 0], r_mag=[-0.3, 0])


def trained(
    sae: sae_jax.SAE, source: sae_jax.data.Source, steps: int, lr: float = 3e-3
) -> sae_jax.TrainedSAE:
    """An SAE after some steps of Adam."""
    optimizer = optax.adam(lr)
    state = sae_jax.init(sae, optimizer, jax.random.key(0))
    state, _ = sae_jax.run(sae_jax.make_step(sae, optimizer), state, source, steps)
    return sae_jax.TrainedSAE(sae, state.params)


def matryoshka() -> Axes:
    """Explained variance by the first latents alone, with and without nesting."""
    world = sae_jax.synthetic.matryoshka_tree()
    makers = {
        "Matryoshka of BatchTopK": sae_jax.matryoshka(20, 20, prefixes=(4, 8, 20), k=2),
        "BatchTopK": sae_jax.batch_topk(20, 20, k=2),
    }
    x = next(iter(world.labelled(4096)))[0].x
    ax = axes()
    for (name, sae), hue in zip(makers.items(), CATEGORIES, strict=False):
        one = trained(sae, world, 1500)
        f = one.encode(x)
        error = [jnp.square(one.decode(jnp.where(jnp.arange(20) < m, f, 0)) - x).sum() for m in range(21)]
        ax.plot(1 - np.array(error) / float(jnp.square(x - x.mean(axis=0)).sum()), color=hue, label=name)
    for m in (4, 8, 20):
        ax.axvline(m, color="#999", lw=1, ls=":")
    ax.set(title="prefixes 4, 8 and 20", xlabel="the first m latents alone", ylabel="explained variance")
    ax.set_xticks((0, 4, 8, 12, 16, 20))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def transcoder() -> Axes:
    """y = |x| - x / 2 by eight latents and a skip connection: the sum, and what it is made of."""
    x = np.linspace(-2, 2, 512, dtype=np.float32)[:, None]
    y = np.abs(x) - x / 2
    sae = sae_jax.transcoder(1, 8, d_out=1, skip=True, l1=1e-3)
    one = trained(sae, sae_jax.in_memory(x, y=y, batch_size=128), 3000, 1e-2)
    f, W_dec = np.asarray(one.encode(x)), np.asarray(one.params["W_dec"])
    ax = axes()
    for part in (f * W_dec[:, 0]).T:
        ax.plot(x, part, color=CATEGORIES[2], lw=1)
    ax.plot(x, x * np.asarray(one.params["W_skip"]), color=CATEGORIES[3], lw=1, ls="--", label="skip")
    ax.plot([], [], color=CATEGORIES[2], lw=1, label="each latent")
    ax.plot(x, y, color="#999", lw=4, alpha=0.6, label="y")
    ax.plot(x, one(x), color=CATEGORIES[0], lw=1.5, label="the transcoder")
    ax.set(title="y = |x| - x/2", xlabel="x")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return ax


def crosscoder() -> Axes:
    """Where latents live, of two sources that share some features and have some of their own."""
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(2, 24, 16)) / 4
    directions[1, :6], directions[0, 6:12] = 0, 0  # six of the first alone, six of the second, twelve of both
    amounts = np.maximum(draw.normal(size=(8192, 24)) - 1, 0)
    x = np.einsum("nf,sfd->nsd", amounts, directions).astype(np.float32)
    one = trained(sae_jax.crosscoder(16, 48, sources=2, l1=0.05), sae_jax.in_memory(x, batch_size=512), 3000)
    alive = np.asarray(one.encode(x) > 0).mean(axis=0) > 1e-3
    ax = axes()
    ax.hist(np.asarray(decoder_shares(one.params)[0])[alive], bins=np.linspace(0, 1, 21), color=CATEGORIES[0])
    ax.set(title="6 features of each source, 12 of both", ylabel="latents")
    ax.set_xlabel("share of the first source in the decoder's norm")
    ax.grid(alpha=0.25)
    return ax


DRAWN: tuple[Callable[[], Axes], ...] = (
    relu, topk, batch_topk, jumprelu, gated, matryoshka, transcoder, crosscoder,
)  # fmt: skip

if __name__ == "__main__":
    for draw in DRAWN:
        save(draw(), f"{draw.__name__}.png", dpi=110)
