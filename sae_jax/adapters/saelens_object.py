"""A trained SAE as a live object of SAELens."""

from tempfile import TemporaryDirectory
from typing import Any

from sae_jax.base import require
from sae_jax.folds import plain_of
from sae_jax.formats import saelens
from sae_jax.trained import TrainedSAE


def export_saelens(trained: TrainedSAE) -> Any:
    """The same SAE as SAELens's own object, for its evaluations, its hooked transformers and dashboards.

    A BatchTopK is a JumpReLU there, and decoder norms that features are chosen by are folded into the
    encoder. Needs sae_lens.

    Args:
      trained: the SAE and its weights, in any dtype.

    Returns:
      A `sae_lens.SAE` on the CPU, in the dtype of `W_dec`; metadata such as `hook_name` goes along.

    Raises:
      InputError: what SAELens has no form for: a crosscoder, a transcoder of `topk` or `gated`, a layer norm
        before a skip connection.

    Example:
      >>> export_saelens(sae_jax.load("sae/")).encode(torch.randn(8, 64))

    Source: SAELens 6, `SAE.load_from_disk`.
    """
    architecture = trained.sae.config.get("architecture")
    known = saelens.name_there(plain_of(trained.sae)) is not None
    require(known, f"SAELens has no form for this {architecture}: {saelens.HAS_NO_FORM}")
    import sae_lens

    with TemporaryDirectory() as folder:
        trained.save(folder, "saelens")
        return sae_lens.SAE.load_from_disk(folder, device="cpu")
