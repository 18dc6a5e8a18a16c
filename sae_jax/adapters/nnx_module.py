"""A trained SAE as a Flax module."""

from flax import nnx
from jaxtyping import Array, Float

from sae_jax.trained import TrainedSAE


class SAEModule(nnx.Module):
    """A trained SAE as a Flax module, to stand in a network like any other layer.

        f = encode(x);  x_hat = decode(f)

    Each weight is an `nnx.Param` under its own name (`module.W_dec`), so that optimizers, filters and
    checkpoints of the network see it.

    Args:
      trained: the SAE and its weights.

    Example:
      >>> network.sae = SAEModule(sae_jax.load("sae/"))
      >>> x_hat = network.sae(x)
    """

    def __init__(self, trained: TrainedSAE):
        self._sae = trained.sae
        self._names = tuple(trained.params)
        for name, leaf in trained.params.items():
            setattr(self, name, nnx.Param(leaf))

    def encode(self, x: Float[Array, "*batch_and_d_in"]) -> Float[Array, "*batch d_sae"]:
        """Features of `x`."""
        return self._sae.encode(self._params(), x)

    def decode(
        self, f: Float[Array, "*batch d_sae"], x: Float[Array, "*batch_and_d_in"] | None = None
    ) -> Float[Array, "*batch_and_d_out"]:
        """Reconstruction from features; a skip connection and a layer norm need `x` for their part."""
        return self._sae.decode(self._params(), f, x)

    def __call__(self, x: Float[Array, "*batch_and_d_in"]) -> Float[Array, "*batch_and_d_out"]:
        """Reconstruction of `x`."""
        return self.decode(self.encode(x), x)

    def _params(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in self._names}
