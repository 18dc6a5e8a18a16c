"""Training nnx modules: the step of one, vmapped over sources and restarts, in the package's one loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Scalar

from sae_jax.base import Batch, Params, require
from sae_jax.data import Source
from sae_jax.train import History, run


@struct.dataclass
class Stacked:
    """Several sources as one, whose batches have an axis of sources in front; see `stacked`."""

    leaves: list[Array]
    """Of all sources: stacked where they differ, held once where they are equal."""
    axes: tuple[int | None, ...] = struct.field(pytree_node=False)
    """Per leaf 0 or None: stacked or not."""
    structure: Any = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    @property
    def batch_size(self) -> int:
        """Rows per step of each source."""
        return self.at(0).batch_size

    def at(self, index: int) -> Source:
        """One of the sources."""
        leaves = [
            leaf if axis is None else leaf[index] for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The batches of step `i`, [sources, batch, ...]."""
        draw = jax.vmap(
            lambda leaves: jax.tree.unflatten(self.structure, leaves).batch(i),
            in_axes=(list(self.axes),),
            axis_size=self.count,
        )
        return draw(self.leaves)

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """The sources' batches to measure on, side by side."""
        for batches in zip(*(self.at(index).evaluation(rows) for index in range(self.count)), strict=True):
            yield Batch(*(jnp.stack(arrays) for arrays in zip(*batches, strict=True)))


def stacked(sources: Sequence[Source]) -> Stacked:
    """Several sources of one kind as one source.

    What is equal in all of them is held once. Worlds that differ in their probabilities alone so draw their
    random numbers once for all, and a feature that fires in a sparse world fires in every denser one.

    Args:
      sources: of the same type, shapes and batch size.

    Raises:
      InputError: none, or sources that differ in more than their values.

    Example:
      >>> stacked([Features(toy_superposition(20, p)) for p in (0.1, 0.5)]).batch(0).x.shape
      (2, 1024, 20)
    """
    require(len(sources) > 0, "there are no sources to train on")
    structures = [jax.tree.structure(source) for source in sources]
    rows = [[np.asarray(leaf) for leaf in jax.tree.leaves(source)] for source in sources]
    shapes = [[leaf.shape for leaf in row] for row in rows]
    alike = all(each == structures[0] for each in structures) and all(each == shapes[0] for each in shapes)
    require(alike, "sources are trained on side by side only if they are alike in all but their values")
    columns = list(zip(*rows, strict=True))
    equal = [all(np.array_equal(column[0], leaf) for leaf in column[1:]) for column in columns]
    return Stacked(
        [
            jnp.asarray(column[0] if same else np.stack(column))
            for column, same in zip(columns, equal, strict=True)
        ],
        tuple(None if same else 0 for same in equal),
        structures[0],
        len(sources),
    )


class Fitted(NamedTuple):
    """Trained networks: one per source and seed."""

    graph: nnx.GraphDef
    """What the networks are, without their weights."""
    params: Params
    """Weights by name, [sources, seeds, ...]."""
    losses: Float[np.ndarray, "sources seeds"]
    """On rows that were kept for measuring, where the source keeps any."""
    history: History
    """`loss` [points, sources, seeds], and `step` [points]."""

    def best(self, source: int = 0) -> int:
        """Which restart on a source has the least loss."""
        return int(np.nanargmin(self.losses[source]))

    def model(self, source: int = 0, restart: int | None = None) -> nnx.Module:
        """One network, ready to be called.

        Args:
          source: which source it was trained on.
          restart: which seed, by place; None for the best.
        """
        place = self.best(source) if restart is None else restart
        return nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf[source, place], self.params))


def fit(
    build: Callable[..., nnx.Module],
    loss: Callable[[Any, Batch], Scalar],
    sources: Sequence[Source],
    optimizer: optax.GradientTransformation,
    *,
    seeds: Sequence[int] = (0,),
    steps: int,
    points: int = 100,
    evaluate_rows: int = 16_384,
) -> Fitted:
    """Train a network on each source from each seed, all in one compiled program.

    Every restart on a source sees the same batches. Each network follows the run of it alone.

    Args:
      build: makes the network from an argument `rngs`, such as `partial(Superposition, 6, 2)`; each
        `nnx.Param` of it is trained.
      loss: `loss(network, batch) -> scalar`.
      sources: one per level of sparsity, say; alike in all but their values.
      optimizer: an optax chain.
      seeds: of the initial weights; one restart each.
      steps: of training.
      points: about how many points of history to keep.
      evaluate_rows: about how many rows the final losses are taken on.

    Returns:
      A `Fitted`.

    Raises:
      InputError: no sources or no seeds, sources of different shapes, `steps` under 1.

    Example:
      >>> fitted = fit(partial(Superposition, 5, 2), importance_weighted(jnp.ones(5)),
      ...              [Features(toy_superposition(5, 0.05))], optax.adam(1e-3), seeds=range(64), steps=5000)
      >>> fitted.model().W[...]
    """
    require(len(seeds) > 0, "there are no seeds to start from")
    source = stacked(sources)
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))

    def start(seed):
        params = nnx.to_pure_dict(nnx.state(build(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param))
        return params, optimizer.init(params)

    def loss_of(params, batch):
        return loss(nnx.merge(graph, params), batch)

    def step(state, batch):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    def everywhere(function):
        """Over sources, each with its batch, and over the restarts that share it."""
        return jax.vmap(jax.vmap(function, in_axes=(0, None)))

    restarts = jax.vmap(start)(jnp.asarray(list(seeds), jnp.uint32))
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(sources)), restarts)
    (params, _), history = run(everywhere(step), state, source, steps, points=points)
    measure = jax.jit(everywhere(loss_of))
    measured = [(len(batch.x[0]), measure(params, batch)) for batch in source.evaluation(evaluate_rows)]
    rows, losses = zip(*measured, strict=True)
    return Fitted(graph, params, np.average(np.asarray(losses, float), axis=0, weights=rows), history)
