"""A one-layer language model, its MLP in features: from text to SAEs that can be read.

    python examples/08_one_layer_lm.py [--out runs/lm] [--quick]

Seventeen and a half minutes on two CPU cores; `--quick` is the same in less than a minute, and too small
to show anything. The model of "Towards Monosemanticity" (a residual stream of 128, an MLP of 512 ReLU
neurons) is trained on the source of Python's standard library, in tokens made from it, and held against
a 5-gram model. A million of its MLP's activations go to a store, and from there SAEs of 512 to 4,096
features are trained, TopK over k and the recipe of that paper over its l1. Prints of each its L0,
explained variance, dead features and how much of the MLP's part in the loss it recovers, all on text
that nothing was trained on. Writes `frontier.png`, `features.md` with the contexts in which features are
strongest, and a dashboard of them all.

What is finished is kept in `--out`, and a second call goes on from there.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lm import byte_pairs, corpus, ngram, page, training
from lm.model import OneLayer
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import checkpoint, features, recipes, report, resampling, transforms
from sae_jax.data import Store, is_store, open_store
from sae_jax.language_models import from_tokens, nnx_capture
from sae_jax.metrics import downstream
from sae_jax.report import figures

SITE, D_IN, ORDER = "mlp.hidden", 512, 5
RANDOM = 30


class Size(NamedTuple):
    """How much of everything."""

    files: int
    """One in so many files is read."""
    vocabulary: int
    context: int
    batch: int
    """Contexts per step of the language model."""
    steps: int
    rows: int
    """Activations that SAEs are trained on, about."""
    held_out: int
    """Activations of validation text that they are measured on, about."""
    widths: tuple[int, ...]
    k: tuple[int, ...]
    l1: tuple[float, ...]
    sae_steps: int
    sae_batch: int


FULL = Size(
    files=1, vocabulary=2048, context=128, batch=16, steps=8000, rows=1_000_000, held_out=32_768,
    widths=(512, 1024, 2048, 4096), k=(8, 16), l1=(5.0, 10.0), sae_steps=800, sae_batch=1024,
)  # fmt: skip
QUICK = Size(
    files=40, vocabulary=400, context=32, batch=16, steps=100, rows=8192, held_out=2048,
    widths=(64,), k=(4, 16), l1=(0.1,), sae_steps=60, sae_batch=256,
)  # fmt: skip


class Text(NamedTuple):
    """The corpus in tokens."""

    train: np.ndarray
    validation: np.ndarray
    spelling: list[bytes]
    """What each token stands for."""


def in_tokens(size: Size, out: Path) -> Text:
    """Read the corpus, make tokens from its training part, and write both in them."""
    kept = out / "tokens.npz"
    if not kept.exists():
        texts = corpus.read()
        train, validation = texts.train[:: size.files], texts.validation[:: size.files]
        merges = byte_pairs.learn(train, size.vocabulary)
        parts = [np.concatenate(byte_pairs.encode(each, merges)) for each in (train, validation)]
        np.savez(kept, train=parts[0], validation=parts[1], merges=merges)
    with np.load(kept) as found:
        return Text(found["train"], found["validation"], byte_pairs.spelled(found["merges"]))


def language_model(size: Size, text: Text, out: Path) -> OneLayer:
    """Train the language model, or take it from where it was kept."""
    model = OneLayer(size.vocabulary, rngs=nnx.Rngs(0))
    kept, state = out / "language_model.safetensors", nnx.state(model, nnx.Param)
    if not kept.exists():
        source = training.Windows(jnp.asarray(text.train, jnp.int32), size.batch, size.context)
        weights = sum(leaf.size for leaf in jax.tree.leaves(state))
        # a product costs two operations per weight and token, and its gradients twice that
        products = 6 * (weights - model.embed.embedding.size) + 12 * size.context * model.width
        each = size.batch * size.context
        print(f"  {weights:,} weights, {size.steps:,} steps of {each:,} tokens", flush=True)
        model, rate = training.train(model, source, size.steps)
        print(f"  {products / 1e6:.2f} MFLOP per token, {products * rate / 1e9:.0f} GFLOP/s")
        save_file({name: np.asarray(leaf) for name, leaf in named(nnx.state(model, nnx.Param)).items()}, kept)
    weights = load_file(kept)
    for name, leaf in named(state).items():
        leaf.set_value(jnp.asarray(weights[name]))
    nnx.update(model, state)
    return model


def named(state: nnx.State) -> dict[str, nnx.Param]:
    """The weights by dotted names."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def against_ngrams(model: OneLayer, text: Text, size: Size) -> dict[str, float]:
    """The language model's loss on validation text, and that of n-grams on the same tokens."""
    ours = training.held_out(model, text.validation, size.context)
    predicted = text.validation[1 : 1 + len(ours)]
    spelled = sum(len(text.spelling[token]) for token in predicted.tolist())
    found = {"tokens": len(ours), "bytes": spelled, "language model": ours.mean()}
    for order in (ORDER - 2, ORDER - 1, ORDER, ORDER + 1):
        theirs = ngram.losses(text.train, text.validation, size.vocabulary, order)
        found[f"{order}-grams"] = theirs[1 : 1 + len(ours)].mean()
    print(f"Loss on {len(ours):,} tokens of validation text ({spelled / len(ours):.2f} bytes each)")
    for name in list(found)[2:]:
        per_byte = found[name] * len(ours) / spelled
        print(f"  {name:<16}{found[name]:.4f} nats per token   {per_byte / np.log(2):.4f} bits per byte")
    return {name: float(value) for name, value in found.items()}


def activations(model: OneLayer, tokens: np.ndarray, size: Size, rows: int, out: Path) -> Store:
    """A store of the MLP's activations on about so many tokens, of contexts drawn from all of them."""
    if not is_store(out) or not open_store(out, unfinished=True).manifest.complete:
        contexts = training.contexts_of(tokens, size.context)
        chosen = np.random.default_rng(0).permutation(len(contexts))[: rows // size.context]
        about = {
            "model": "examples/08_one_layer_lm.py",
            "data": f"the library of Python {platform.python_version()}",
        }
        capture = nnx_capture.capture(model, [SITE])
        sae_jax.harvest(capture, from_tokens(contexts[chosen]), out, about=about)
    return open_store(out)


def groups(size: Size, x: np.ndarray) -> Iterator[sae_jax.Group]:
    """TopK over k, and the recipe of "Towards Monosemanticity" over l1, at each width."""

    def unit_rows(learning_rate):
        return optax.chain(optax.adam(learning_rate), transforms.unit_norm_decoder())

    def resampled(learning_rate):
        # the recipe's own chain, but four resamplings within these steps rather than within 100,000
        chain = optax.chain(transforms.project_decoder_gradient(), unit_rows(learning_rate))
        every = size.sae_steps // 5
        return resampling.anthropic(chain, every=every, last=4 * every, dead_after=every // 2)

    for width in size.widths:
        # AuxK looks at latents that were silent for longer than these runs last
        topk = partial(sae_jax.topk, D_IN, width, auxk=0)
        yield sae_jax.Group(topk, unit_rows, sae_jax.grid(k=size.k, lr=[3e-3]))
        bricken = recipes.anthropic_2023(d_in=D_IN, d_sae=width, l1=size.l1[0], x=x)
        yield sae_jax.Group(bricken.factory, resampled, sae_jax.grid(l1=size.l1, lr=[3e-3]))


def saes(size: Size, acts: Store, out: Path) -> sae_jax.SweepResult:
    """Train the SAEs from the store, or take them from where they were kept."""
    if not (out / "sweep.json").exists():
        x = acts.site().read(0, min(acts.rows, 32_768)).astype(np.float32)
        source = sae_jax.stored(acts.site(), batch_size=size.sae_batch)
        began = told = time.monotonic()

        def look(seen: sae_jax.Look) -> None:
            nonlocal told
            if (now := time.monotonic()) - told > 15:
                told = now
                share = seen.member_steps / seen.total
                left = (now - began) * (1 - share) / share
                print(f"  {share:.0%} of the steps of all SAEs, {left:.0f} s left", flush=True)

        result = sae_jax.sweep_all(
            list(groups(size, x)), source=source, steps=size.sae_steps, evaluate_rows=8192, look=look
        )
        result.save(out)
    return sae_jax.SweepResult.load(out)


def judged(result, model: OneLayer, text: Text, acts: Store, size: Size) -> dict[str, np.ndarray]:
    """Figures by name, an entry per SAE, on validation text."""
    contexts = training.contexts_of(text.validation, size.context)
    spread = np.linspace(0, len(contexts) - 1, min(len(contexts), size.held_out // size.context)).astype(int)
    batches = list(from_tokens(contexts[spread]))
    capture, spliced = nnx_capture.capture(model, [SITE]), nnx_capture.splice(model, SITE)
    rows = np.concatenate([np.asarray(capture(batch.tokens)[SITE]).reshape(-1, D_IN) for batch in batches])
    source, mean = sae_jax.in_memory(rows, size.sae_batch), acts.manifest.sites[SITE].mean
    found = []
    for index in range(len(result.status)):
        sae, params = result.member(index)
        measured = sae_jax.evaluate(sae, params, source.evaluation(len(rows)))
        measured |= downstream(spliced, sae, params, batches, mean=mean)
        found.append({name: float(value) for name, value in measured.items() if value.ndim == 0})
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def table(result: sae_jax.SweepResult) -> str:
    """A row per SAE."""
    lines = [f"{'':36}{'L0':>7}{'EV':>8}{'dead':>8}{'CE':>8}{'recovered':>11}{'of mean':>9}"]
    columns = {**result.grid, **result.metrics}
    for index, name in enumerate(names(result)):
        one = {key: column[index] for key, column in columns.items()}
        lines.append(
            f"{name:36}{one['l0']:7.1f}{one['explained_variance']:8.3f}{one['dead_fraction']:8.1%}"
            f"{one['ce_sae']:8.3f}{one['loss_recovered']:11.1%}{one['loss_recovered_mean']:9.1%}"
        )
    return "\n".join(lines)


def names(result: sae_jax.SweepResult) -> list[str]:
    """What each SAE is."""
    k, l1, width = (result.grid[name] for name in ("k", "l1", "d_sae"))
    return [
        f"{width[i]:,} features, "
        + (f"TopK, k {k[i]:g}" if np.isfinite(k[i]) else f"Bricken et al., l1 {l1[i]:g}")
        for i in range(len(k))
    ]


def picture(result: sae_jax.SweepResult) -> Figure:
    """Loss recovered against L0, a line per width and kind."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    ax = figure.add_subplot()
    l0, recovered = result.metrics["l0"], result.metrics["loss_recovered"]
    widths = np.unique(result.grid["d_sae"]).tolist()
    for kind, dash in (("topk", "-"), ("relu", ":")):
        for width, hue in zip(widths, figures.CATEGORIES, strict=False):
            line = (result.grid["architecture"] == kind) & (result.grid["d_sae"] == width)
            label = f"{width:,}, " + ("TopK" if kind == "topk" else "Bricken et al.")
            ax.plot(l0[line], recovered[line], dash, marker="o", color=hue, label=label)
    ax.axhline(0.79, color="#777", lw=1)
    ax.text(
        ax.get_xlim()[1], 0.792, "79 %, published for 4,096 features ", ha="right", fontsize=8, color="#555"
    )
    ax.set_xscale("log")
    ticks = (4, 8, 16, 32, 64)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(figures.LABELS["l0"])
    ax.set_ylabel("share of the MLP's loss contribution recovered")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return figure


def in_contexts(found: features.Observed) -> list[page.Feature]:
    """The features active in ten contexts or more that read differently, each with its strongest ones."""
    promoted = found.weighed.promoted
    assert promoted is not None
    shown = (
        page.Feature(
            str(feature),
            found.seen.density[feature],
            [found.word(token) for token in promoted.places[feature, :6].tolist()],
            page.read_differently(features.contexts(found, found.seen.strongest, feature)),
        )
        for feature in range(found.d_sae)
    )
    return [feature for feature in shown if len(feature.contexts) >= page.OF]


def neurons() -> sae_jax.TrainedSAE:
    """The MLP's neurons, as an SAE whose features they are."""

    def itself(params, x, *_):
        return x

    own = jnp.eye(D_IN)
    sae = sae_jax.SAE(lambda key: {}, itself, itself, itself, {"architecture": "neurons", "d_in": D_IN})
    return sae_jax.TrainedSAE(sae, {"W_enc": own, "W_dec": own})


def read(
    result: sae_jax.SweepResult, model: OneLayer, acts: Store, text: Text, out: Path
) -> dict[str, dict[str, int]]:
    """Show features of the SAE that recovers most at an L0 below 20, and neurons beside them.

    Returns:
      Of features and of neurons, how many there are, how many are active in ten contexts, how many of those
      were drawn, and how many of these, and of all active ones, have a word in common.
    """
    recovered = np.where(result.metrics["l0"] < 20, result.metrics["loss_recovered"], -np.inf)
    chosen = int(recovered.argmax())
    print(
        f"  {names(result)[chosen]}: L0 {result.metrics['l0'][chosen]:.1f}, {recovered[chosen]:.1%} recovered"
    )
    scale = model.norm_out.scale[...][:, None]
    to_logits = np.asarray(model.mlp.out.kernel[...] @ (scale * model.unembed.kernel[...]))
    words = [spelled.decode(errors="replace") for spelled in text.spelling]
    counts = {}
    for kind, trained in {"features": result.member(chosen), "neurons": neurons()}.items():
        found = features.observe(
            trained,
            features.of_store(acts),
            words=words,
            unembedding=to_logits,
            options=features.Options(strongest=30, before=12, after=4),
        )
        if kind == "features":
            told = {"SAE": f"{names(result)[chosen]}, of examples/08_one_layer_lm.py"}
            report.write_dashboard(found._replace(about=told), out / "dashboard")
        active = in_contexts(found)
        order = np.random.default_rng(0).permutation(len(active))[:RANDOM]
        drawn = [active[place] for place in order.tolist()]
        common, of_all = (
            sum(page.evident(each.contexts) is not None for each in some) for some in (drawn, active)
        )
        about = (
            f"{len(active):,} of {found.d_sae:,} {kind} are active in ten contexts or more that read "
            f"differently. Of {len(drawn)} of them, drawn at random, {common} have a word in common in "
            f"{page.AGREE} of their ten strongest contexts or more; of all of them {of_all:,}."
        )
        print(f"  {about}")
        (out / f"{kind}.md").write_text(page.page(kind.capitalize(), about, drawn))
        counts[kind] = {
            "all": found.d_sae, "active": len(active), "drawn": len(drawn), "word in common": common,
            "word in common, of all": of_all,
        }  # fmt: skip
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    parser.add_argument("--quick", action="store_true", help="everything, at a size that shows nothing")
    options = parser.parse_args()
    size, out = QUICK if options.quick else FULL, options.out
    checkpoint.claim(out, size._asdict())
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    say("The standard library's source, in tokens")
    text = in_tokens(size, out)
    print(f"  {len(text.train):,} tokens to train on, {len(text.validation):,} of other files to validate on")
    say("The language model")
    model = language_model(size, text, out)
    say("Beside n-grams, on text that neither has seen")
    found = against_ngrams(model, text, size)
    say("The MLP's activations, to a store")
    acts = activations(model, text.train, size, size.rows, out / "activations")
    say(f"{len(size.widths) * (len(size.k) + len(size.l1))} SAEs on {acts.rows:,} rows")
    result = saes(size, acts, out / "saes")
    say("What they recover, on text that nothing was trained on")
    measured = judged(result, model, text, acts, size)
    result = result._replace(metrics=measured)
    clean, zero, mean = (measured[f"ce_{name}"][0] for name in ("clean", "zero", "mean"))
    print(f"  loss {clean:.3f}, without the MLP {zero:.3f}, with its mean {mean:.3f}\n{table(result)}")
    picture(result).savefig(out / "frontier.png", dpi=150)
    say("Features and neurons in their contexts")
    told = {
        "loss": found,
        "read": read(result, model, acts, text, out),
        "saes": {"name": names(result), **{key: column.tolist() for key, column in measured.items()}},
    }
    (out / "figures.json").write_text(json.dumps(told, indent=1) + "\n")
    say(f"frontier.png, features.md, neurons.md and dashboard/index.html are in {out}")


if __name__ == "__main__":
    main()
