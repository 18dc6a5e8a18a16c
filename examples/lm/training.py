"""Training the language model: steps of optax in the package's one compiled loop."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Scalar
from optax.contrib import MuonDimensionNumbers, muon

from sae_jax.base import Batch
from sae_jax.train import run


@struct.dataclass
class Windows:
    """A source of contexts that begin anywhere in a stream of tokens."""

    tokens: Int[Array, "n"]
    batch_size: int = struct.field(pytree_node=False)
    context: int = struct.field(pytree_node=False)

    def batch(self, i: Int[Array, ""]) -> Batch:
        """Step i's contexts, and the tokens that follow each of their tokens."""
        last = len(self.tokens) - self.context
        starts = jax.random.randint(jax.random.fold_in(jax.random.key(0), i), (self.batch_size,), 0, last)
        window = self.tokens[starts[:, None] + jnp.arange(self.context + 1)]
        return Batch(window[:, :-1], window[:, 1:])

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """The first `rows` contexts of the stream that do not overlap."""
        inputs, targets = (contexts_of(each, self.context) for each in (self.tokens[:-1], self.tokens[1:]))
        for at in range(0, min(rows, len(inputs)), self.batch_size):
            chosen = slice(at, min(at + self.batch_size, rows))
            yield Batch(inputs[chosen], targets[chosen])


def cross_entropy(model: nnx.Module, batch: Batch) -> Float[Array, "batch context"]:
    """-log p of each next token, in nats."""
    logits = model(batch.x)
    right = batch.y[..., None] == jnp.arange(logits.shape[-1])
    # summed rather than looked up: the gradient of a gather is a scatter, which is slow on CPU
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(right, logits, 0).sum(axis=-1)


def optimizer(steps: int, lr: float) -> optax.GradientTransformation:
    """Muon for the matrices of attention and MLP, Adam at half its rate for the rest.

    Both warm up over a twentieth of the steps and come down along a cosine.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    schedule = optax.warmup_cosine_decay_schedule(0, lr, max(1, steps // 20), steps, lr / 100)

    def matrices(params):
        """Which weights are matrices from one space to another; the rows of an embedding are no such."""
        name = jax.tree_util.keystr
        return jax.tree.map_with_path(
            lambda path, leaf: (
                MuonDimensionNumbers(0, 1) if leaf.ndim == 2 and "embed" not in name(path) else None
            ),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, adam_b2=0.99, adam_learning_rate=lambda i: schedule(i) / 2,
             muon_weight_dimension_numbers=matrices),
    )  # fmt: skip


def train(model: nnx.Module, source: Windows, steps: int, lr: float = 2e-2) -> tuple[nnx.Module, float]:
    """Train a language model, and tell how it goes.

    Args:
      model: with its weights at the start.
      source: of contexts.
      steps: of training.
      lr: the learning rate at its peak.

    Returns:
      The trained model, and how many tokens it saw per second.
    """
    graph, params = nnx.split(model, nnx.Param)
    chain = optimizer(steps, lr)

    def loss(params, batch) -> Scalar:
        return cross_entropy(nnx.merge(graph, params), batch).mean()

    def step(state, batch):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = chain.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    began = time.monotonic()
    tokens = source.batch_size * source.context
    look = progress(steps, tokens)
    (params, _), _ = run(step, (params, chain.init(params)), source, steps, points=100, between=look)
    return nnx.merge(graph, params), steps * tokens / (time.monotonic() - began)


def progress(steps: int, tokens_per_step: int, every: float = 15.0):
    """A `between` that prints loss, tokens/s and time left, every so many seconds."""
    began = told = time.monotonic()

    def between(done, state, history):
        nonlocal told
        now = time.monotonic()
        if len(history["loss"]) and (now - told > every or done == steps):
            told = now
            rate = done / (now - began)
            print(
                f"  step {done:,} of {steps:,}: loss {history['loss'][-5:].mean():.3f}, "
                f"{rate * tokens_per_step:,.0f} tokens/s, {(steps - done) / rate:.0f} s left",
                flush=True,
            )

    return between


def contexts_of(
    tokens: Int[Array | np.ndarray, "n"], context: int
) -> Int[Array | np.ndarray, "contexts context"]:
    """A stream of tokens as contexts that do not overlap; what is left over at its end is left out."""
    return tokens[: len(tokens) // context * context].reshape(-1, context)


def held_out(
    model: nnx.Module, tokens: Int[np.ndarray, "n"], context: int, batch_size: int = 64
) -> Float[np.ndarray, "predicted"]:
    """-log p of each token but the first, in contexts that do not overlap; each begins knowing nothing."""
    source = Windows(jnp.asarray(tokens), batch_size, context)
    losses = nnx.jit(cross_entropy)
    return np.concatenate(
        [np.asarray(losses(model, each)).ravel() for each in source.evaluation(len(tokens))]
    )
