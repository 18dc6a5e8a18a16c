"""The same SAE in other terms: each fold keeps what encoder and decoder compute, to rounding.

Folds work on numpy in float64 and give every leaf back in the dtype it had. Those that change the unit of
features say so. What an SAE needs only to be trained (penalties, AuxK, prefixes) does not survive a change
of architecture.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from sae_jax.architectures import find
from sae_jax.base import SAE, Params, require
from sae_jax.layer_norm import is_layer_normed, layer_normed

Folded = tuple[SAE, Params]

WRAPPERS = {"matryoshka": ("prefixes", "prefix_weights"), "transcoder": ("d_out", "skip")}
"""Architectures around another one, and the arguments that they keep for themselves."""

WITHOUT_PENALTY: dict[str, dict[str, Any]] = {
    "relu": {"l1": 0.0},
    "topk": {},
    "batch_topk": {},
    "jumprelu": {"l0_coefficient": 0.0},
    "gated": {"l1": 0.0},
}
"""The architectures that make features, each with what leaves out a penalty whose weight is not known."""


def inner(config: dict[str, Any]) -> dict[str, Any]:
    """The `config` of the architecture that makes the features: what a Matryoshka or a transcoder is `of`.

    Args:
      config: of any SAE.
    """
    name = config.get("architecture")
    if name not in WRAPPERS:
        return config
    left_out = ("architecture", "of", "normalize_activations", *WRAPPERS[name])
    arguments = {key: value for key, value in config.items() if key not in left_out}
    if name == "transcoder":
        arguments["apply_b_dec_to_input"] = False
    return inner(config["of"](**arguments).config)


def kind(sae: SAE) -> str:
    """What makes the features: relu, topk, batch_topk, jumprelu, gated, or crosscoder."""
    return str(inner(sae.config).get("architecture"))


def plain_sae(
    kind: str,
    d_in: int,
    d_sae: int,
    *,
    d_out: int | None = None,
    skip: bool = False,
    layer_norm: bool = False,
    **arguments: Any,
) -> SAE:
    """An SAE by what it computes, without a penalty.

    Args:
      kind: a key of `WITHOUT_PENALTY`.
      d_in: width of the input.
      d_sae: number of latents.
      d_out: of a transcoder: width of its output; None for an SAE.
      skip: of a transcoder: whether it has a skip connection.
      layer_norm: whether rows are normalised one by one.
      arguments: of the architecture: `k`, `apply_b_dec_to_input`, and the conventions of its loss.

    Example:
      >>> sae = plain_sae("jumprelu", 2304, 16384, apply_b_dec_to_input=False)
    """
    arguments = {**WITHOUT_PENALTY[kind], **arguments}
    if d_out is None:
        sae = find(kind)(d_in, d_sae, **arguments)
    else:
        arguments.pop("apply_b_dec_to_input", None)
        sae = find("transcoder")(d_in, d_sae, d_out=d_out, skip=skip, of=find(kind), **arguments)
    return layer_normed(sae) if layer_norm else sae


def plain(sae: SAE, params: Params) -> Folded:
    """The SAE by what it computes: no prefixes, nothing tied or rescaled, no leaf that only training needs.

        tied:            W_enc <- W_dec^T
        log_threshold:   threshold <- exp(log_threshold)
        log_penalty:     left out
        matryoshka:      what it is of

    Args:
      sae: of any architecture.
      params: its weights.

    Returns:
      A `relu`, `topk`, `batch_topk`, `jumprelu`, `gated`, a `transcoder` of one of them, or a `crosscoder`;
      numpy weights. Encoder and decoder compute what they did.
    """
    sae, params = untied(*fold_decoder_norms(sae, params))
    params = {name: np.asarray(leaf) for name, leaf in params.items() if name != "log_penalty"}
    if "log_threshold" in params:
        params["threshold"] = np.exp(params.pop("log_threshold"))
    return plain_of(sae), params


def plain_of(sae: SAE) -> SAE:
    """The model of `plain`, without weights."""
    config, core = sae.config, inner(sae.config)
    if kind(sae) == "crosscoder":
        sizes = {name: config[name] for name in ("d_in", "d_sae", "sources")}
        built = find("crosscoder")(**sizes, l1=0.0)
        return layer_normed(built) if is_layer_normed(sae) else built
    computed = {name: core[name] for name in ("k", "apply_b_dec_to_input") if name in core}
    return _as(sae, kind(sae), **computed)


def untied(sae: SAE, params: Params) -> Folded:
    """A `relu` whose encoder is its decoder transposed, with an encoder of its own."""
    if not inner(sae.config).get("tied"):
        return sae, params
    return _rebuilt(sae, tied=False), {"W_enc": np.asarray(params["W_dec"]).T, **params}


def fold_decoder_norms(sae: SAE, params: Params) -> Folded:
    """A TopK or BatchTopK that rescales by decoder norms, as one that need not: its rows are of norm 1.

        W_enc_i <- |W_dec_i| W_enc_i;   b_enc_i <- |W_dec_i| b_enc_i;   W_dec_i <- W_dec_i / |W_dec_i|

    Features, which are in units of decoder rows, and reconstructions stay the same. A row of zeros stays.

    Args:
      sae: of any architecture; one that does not rescale comes back as it is.
      params: its weights.

    Source: SAELens, which saves such SAEs so.
    """
    if not inner(sae.config).get("rescale_acts_by_decoder_norm"):
        return sae, params
    wide = _wide(params)
    norms = np.linalg.norm(wide["W_dec"], axis=-1)
    folded = {
        "W_enc": wide["W_enc"] * norms,
        "b_enc": wide["b_enc"] * norms,
        "W_dec": wide["W_dec"] / np.where(norms > 0, norms, 1)[:, None],
    }
    return _rebuilt(sae, rescale_acts_by_decoder_norm=False), _narrowed(params, folded)


def fold_b_dec(sae: SAE, params: Params, apply_b_dec_to_input: bool) -> Folded:
    """The SAE with `b_dec` subtracted from its input, or not: the other half of it moves into the biases.

        (x - b_dec) W_enc + b_enc  =  x W_enc + (b_enc - b_dec W_enc)

    Its own inverse, to rounding: `fold_b_dec(*fold_b_dec(sae, params, False), True)`.

    Args:
      sae: of any architecture with the argument; not a transcoder, whose b_dec is of another space.
      params: its weights.
      apply_b_dec_to_input: what it shall be; an SAE that is so already comes back as it is.

    Raises:
      InputError: a transcoder or crosscoder that would have to change.
    """
    now = bool(inner(sae.config).get("apply_b_dec_to_input", False))
    if now == apply_b_dec_to_input:
        return sae, params
    changeable = "d_out" not in sae.config and kind(sae) != "crosscoder"
    require(changeable, f"b_dec of a {sae.config['architecture']} is no point of its input")
    sae, params = untied(sae, params)
    wide = _wide(params)
    # with rescaling, pi is multiplied after b_enc is added
    moved = (wide["b_dec"] @ wide["W_enc"]) * (1 if apply_b_dec_to_input else -1)
    folded = {name: wide[name] + moved for name in ("b_enc", "b_gate") if name in wide}
    if "b_mag" in wide:
        folded["b_mag"] = wide["b_mag"] + np.exp(wide["r_mag"]) * moved
    return _rebuilt(sae, apply_b_dec_to_input=apply_b_dec_to_input), _narrowed(params, folded)


def rescale_latents(sae: SAE, params: Params, factors: Float[Array | np.ndarray, "d_sae"]) -> Folded:
    """The SAE with features in other units: `f_i <- factors_i f_i`; reconstructions stay the same.

        W_enc_i, b_enc_i, threshold_i  <-  times factors_i;      W_dec_i <- W_dec_i / factors_i
        gated: r_mag_i <- r_mag_i + log factors_i;  b_mag_i <- factors_i b_mag_i;  the gate stays

    Inverse: the same with `1 / factors`.

    Args:
      sae: a `relu`, `jumprelu` or `gated`, within a Matryoshka or transcoder too.
      params: its weights.
      factors: above 0.

    Raises:
      InputError: an architecture whose latents compete with one another, factors not above 0.

    Example:
      >>> norms = np.linalg.norm(params["W_dec"], axis=-1)
      >>> sae, params = rescale_latents(sae, params, norms)      # SAELens's fold_W_dec_norm
    """
    able = ("relu", "jumprelu", "gated")
    require(
        kind(sae) in able, f"latents of a {kind(sae)} compete in one unit; those of {', '.join(able)} not"
    )
    factors = np.asarray(factors, np.float64)
    require(bool((factors > 0).all() and np.isfinite(factors).all()), "factors must be finite and above 0")
    sae, params = untied(sae, params)
    wide = _wide(params)
    folded = {"W_dec": wide["W_dec"] / factors[:, None]}
    if "r_mag" in wide:
        folded |= {"r_mag": wide["r_mag"] + np.log(factors), "b_mag": wide["b_mag"] * factors}
    else:
        scaled = ("W_enc", "b_enc", "threshold")
        folded |= {name: wide[name] * factors for name in scaled if name in wide}
    if "log_threshold" in wide:
        folded["log_threshold"] = wide["log_threshold"] + np.log(factors)
    return sae, _narrowed(params, folded)


def batch_topk_as_jumprelu(sae: SAE, params: Params) -> Folded:
    """A BatchTopK as the JumpReLU that its `encode` is: every latent with the one threshold, at least 0.

    Inverse: `jumprelu_as_batch_topk`. Anything else comes back as it is.
    """
    if kind(sae) != "batch_topk":
        return sae, params
    sae, params = plain(sae, params)
    threshold = np.maximum(params["threshold"], 0)
    params = {**params, "threshold": np.full(sae.config["d_sae"], threshold, threshold.dtype)}
    return _as(sae, "jumprelu", **_subtracts(sae)), params


def jumprelu_as_batch_topk(sae: SAE, params: Params, k: int | float) -> Folded:
    """A JumpReLU whose thresholds are all the same as a BatchTopK of that threshold.

    Args:
      sae: a plain `jumprelu`.
      params: its weights.
      k: mean number of features per row, which training goes by and `encode` does not.

    Raises:
      InputError: another architecture, or thresholds that differ.
    """
    require(kind(sae) == "jumprelu", f"a {kind(sae)} is no BatchTopK")
    sae, params = plain(sae, params)
    threshold = np.unique(params["threshold"])
    require(threshold.size == 1, f"a BatchTopK has one threshold, this JumpReLU {threshold.size}")
    sae = _as(sae, "batch_topk", k=k, **_subtracts(sae))
    return sae, {**params, "threshold": threshold.reshape(())}


def relu_as_jumprelu(sae: SAE, params: Params) -> Folded:
    """A ReLU SAE as a JumpReLU whose thresholds are 0. Inverse: `jumprelu_as_relu`."""
    require(kind(sae) == "relu", f"a {kind(sae)} is not taken for a ReLU")
    sae, params = plain(sae, params)
    zeros = np.zeros_like(params["b_enc"])
    return _as(sae, "jumprelu", **_subtracts(sae)), {**params, "threshold": zeros}


def jumprelu_as_relu(sae: SAE, params: Params) -> Folded:
    """A JumpReLU without a threshold above 0 as the ReLU SAE that it is.

    Raises:
      InputError: another architecture, or thresholds above 0; how many.
    """
    require(kind(sae) == "jumprelu", f"a {kind(sae)} is not taken for a JumpReLU")
    sae, params = plain(sae, params)
    above = int((params["threshold"] > 0).sum())
    require(above == 0, f"a ReLU has no threshold, but {above} of this JumpReLU's are above 0")
    params = {name: leaf for name, leaf in params.items() if name != "threshold"}
    return _as(sae, "relu", **_subtracts(sae)), params


def gated_as_jumprelu(sae: SAE, params: Params) -> Folded:
    """A Gated SAE as the JumpReLU that it is, its gate and magnitude sharing one map of the input.

        W_enc_i <- exp(r_mag_i) W_enc_i;    b_enc <- b_mag;    threshold <- b_mag - exp(r_mag) b_gate

    A threshold below 0 is one that the ReLU makes needless. Not invertible: scale and bias of the gate merge.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix on the inference-time equivalence.
    """
    require(kind(sae) == "gated", f"a {kind(sae)} has no gate")
    sae, params = plain(sae, params)
    wide = _wide(params)
    scale = np.exp(wide["r_mag"])
    folded = {"W_enc": wide["W_enc"] * scale}
    kept = {name: leaf for name, leaf in params.items() if name not in ("b_gate", "b_mag", "r_mag")}
    threshold = (wide["b_mag"] - scale * wide["b_gate"]).astype(params["b_mag"].dtype)
    params = {**_narrowed(kept, folded), "b_enc": params["b_mag"], "threshold": threshold}
    return _as(sae, "jumprelu", **_subtracts(sae)), params


def as_jumprelu(sae: SAE, params: Params) -> Folded:
    """A `relu`, `batch_topk` or `gated` as the JumpReLU that it is; a JumpReLU as a plain one.

    Raises:
      InputError: a `topk`, whose latents are chosen by comparison with one another, or a crosscoder.
    """
    ways = {"relu": relu_as_jumprelu, "batch_topk": batch_topk_as_jumprelu, "gated": gated_as_jumprelu}
    able = (*ways, "jumprelu")
    require(kind(sae) in able, f"a {kind(sae)} is no JumpReLU, as one of {', '.join(able)} is")
    return ways.get(kind(sae), plain)(sae, params)


def _as(sae: SAE, kind: str, **arguments: Any) -> SAE:
    """A plain SAE of another kind between the same sites."""
    sizes = {name: sae.config[name] for name in ("d_in", "d_sae")}
    outer = {name: sae.config[name] for name in ("d_out", "skip") if name in sae.config}
    return plain_sae(kind, **sizes, **outer, layer_norm=is_layer_normed(sae), **arguments)


def _subtracts(sae: SAE) -> dict[str, bool]:
    return {"apply_b_dec_to_input": bool(inner(sae.config)["apply_b_dec_to_input"])}


def _rebuilt(sae: SAE, **changes: Any) -> SAE:
    """The same call with other arguments."""
    arguments = {**sae.config, **changes}
    arguments.pop("normalize_activations", None)
    built = find(arguments.pop("architecture"))(**arguments)
    return layer_normed(built) if is_layer_normed(sae) else built


def _wide(params: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}


def _narrowed(params: Params, folded: dict[str, np.ndarray]) -> Params:
    """`params` with the folded leaves in place, in the dtypes they had."""
    return {**params, **{name: leaf.astype(np.asarray(params[name]).dtype) for name, leaf in folded.items()}}
