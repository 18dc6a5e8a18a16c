"""Activations of Hugging Face models, by forward hooks on named modules.

A site is a module by its name in `model.named_modules()`, and holds what the module gives (of a tuple, the
first element); `NAME:input` holds what it is given, its first argument. A module that runs more than once
in a forward pass counts the first time: the model is stopped as soon as all sites have been seen, so nobody
looks whether one would come again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax.base import InputError, require
from sae_jax.language_models.site import (
    Edit,
    Site,
    first,
    flattened,
    nearest,
    require_same_shape,
    with_first,
)

INPUT = ":input"


class _Enough(Exception):  # noqa: N818, it is an event and not an error
    """Every site has been seen; the rest of the forward pass is not needed."""


def load(path: str | Path, *, revision: str | None = None, device: str = "cpu") -> Any:
    """A Hugging Face model from disk or the hub, of the class it was saved as and in its own dtype.

    Code that comes with a model is never run.

    Args:
      path: a folder, or a name on the hub.
      revision: branch, tag or commit on the hub.
      device: where torch puts it.

    Returns:
      The model, in evaluation mode, its weights without gradients.

    Raises:
      InputError: transformers missing, no model there, a damaged one, or one that lacks weights.

    Example:
      >>> model = load("models/gpt2")
    """
    transformers = _transformers()

    def read():
        config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        name = (config.architectures or ["no class"])[0]
        kind: Any = getattr(transformers, name, None)
        require(kind is not None, f"{path} was saved as {name}, which transformers does not have")
        return kind.from_pretrained(path, revision=revision, dtype="auto", output_loading_info=True)

    model, found = _read("model", path, read)
    missing = sorted(found["missing_keys"])
    require(
        not missing,
        f"{path} lacks {len(missing)} weights of {type(model).__name__}, {missing[:1]} among them",
    )
    model.config.use_cache = False  # keys and values of past tokens would only fill memory
    return _read("model", path, lambda: model.requires_grad_(False).eval().to(device))


def tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer saved beside a model, on disk or on the hub.

    Args:
      path: a folder, or a name on the hub.
      revision: branch, tag or commit on the hub.

    Raises:
      InputError: transformers missing, no tokenizer there, or a damaged one.
    """
    auto = _transformers().AutoTokenizer
    options = {"revision": revision, "trust_remote_code": False}
    made = _read("tokenizer", path, lambda: auto.from_pretrained(path, **options))
    # for a model that was saved alone, transformers makes up a tokenizer that knows no word
    require(
        len(made) > len(made.all_special_ids), f"there is no tokenizer's vocabulary beside the model {path}"
    )
    return made


def sites(model: Any, context: int = 7) -> tuple[Site, ...]:
    """The modules that give [batch, context, ...] floats, found by running the model once.

    Args:
      model: a Hugging Face model that reads tokens.
      context: tokens in the trial. A number unlike any other in the model tells this axis from heads, say.

    Returns:
      Sites in the order of `model.named_modules()`; their inputs can be named too, with `:input` behind.

    Raises:
      InputError: the model reads no tokens, or fewer than `context` of them.
    """
    found = {}
    modules = _modules(model)

    def see(name: str, value: Any) -> None:
        fits = getattr(value, "ndim", 0) > 2 and tuple(value.shape[:2]) == (2, context)
        if name not in found and fits and value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            found[name] = Site(name, value[0, 0].numel(), dtype, type(modules[name]).__name__)

    with _hooked(modules, modules, see):
        _forward(model, np.zeros((2, context), np.int32))
    return tuple(found[name] for name in modules if name in found)


def capture(
    model: Any, names: Iterable[str]
) -> Callable[[Int[np.ndarray, "batch context"]], dict[str, Float[np.ndarray, "batch context _"]]]:
    """A function from tokens to the activations of these sites.

    The model runs as it is, on the attention mask `tokens >= 0`, with its own padding token where there is
    none, and only as far as the last site. An encoder-decoder reads the same tokens on both sides.

    Args:
      model: a Hugging Face model that reads tokens, in evaluation mode.
      names: of modules, each perhaps with `:input` behind.

    Returns:
      A function of tokens [batch, context] that gives by name [batch, context, width] in the sites' own
      dtypes, to the bit what the model computes; axes beyond the context are flattened.

    Raises:
      InputError: no such module, or training mode. When called: tokens beyond the vocabulary, contexts
        beyond the model's positions, a module that does not run, or one that gives another shape.

    Example:
      >>> activations = capture(model, ["transformer.h.1.mlp"])
      >>> activations(tokens)["transformer.h.1.mlp"].shape
      (32, 128, 768)
    """
    names, modules = tuple(dict.fromkeys(names)), _modules(model)
    require(len(names) > 0, "name at least one module to take activations from")
    _require_usable(model, names, modules)

    def activations(
        tokens: Int[np.ndarray, "batch context"],
    ) -> dict[str, Float[np.ndarray, "batch context _"]]:
        seen = {}

        def see(name: str, value: Any) -> None:
            if name in seen:
                return
            # a later layer may add to it in place, as Falcon's does
            seen[name] = flattened(name, value, tokens.shape).clone()
            if len(seen) == len(names):
                raise _Enough

        with suppress(_Enough), _hooked(modules, names, see):
            _forward(model, tokens)
        for name in names:
            _require_run(model, name, name in seen)
        return {name: _numpy(seen[name]) for name in names}

    return activations


def splice(model: Any, name: str) -> Callable[..., Float[Array, "batch context vocabulary"]]:
    """A function from tokens and an edit to the logits with the site's value replaced.

    Args:
      model: a Hugging Face model that predicts next tokens, in evaluation mode.
      name: of a module, perhaps with `:input` behind.

    Returns:
      `(tokens, edit=None) -> logits`. `edit` is given the site's value [batch, context, width] as a JAX array
      and gives back one of that shape, which is cast to the site's dtype; None leaves the model as it is.
      Arrays pass on the device where torch and JAX share one, otherwise over the host.

    Raises:
      InputError: as for `capture`, a model that does not predict next tokens, or an edit that changes the
        shape.

    Example:
      >>> spliced = splice(model, "transformer.h.1.mlp")
      >>> logits = spliced(tokens, lambda x: trained(x))
    """
    modules = _modules(model)
    _require_usable(model, [name], modules)
    require(
        model.can_generate() and not model.config.is_encoder_decoder,
        f"a splice is measured by the prediction of next tokens, which {type(model).__name__} does not make",
    )

    def spliced(
        tokens: Int[np.ndarray, "batch context"], edit: Edit | None = None
    ) -> Float[Array, "batch context vocabulary"]:
        seen = set()

        def see(name: str, value: Any) -> Any:
            if name in seen or edit is None:
                return None
            seen.add(name)
            given = _to_jax(flattened(name, value, tokens.shape).clone())
            edited = edit(given)
            require_same_shape(name, edited, given)
            return _to_torch(edited, value)

        with _hooked(modules, [name], see):
            logits = _forward(model, tokens).logits
        _require_run(model, name, edit is None or name in seen)
        return _to_jax(logits)

    return spliced


@contextmanager
def _hooked(modules: dict[str, Any], names: Iterable[str], see: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `see(name, value)` at each site; what it returns, unless None, takes the value's place."""
    handles = []
    try:
        for name in names:
            hook = _before if name.endswith(INPUT) else _after
            handles.append(hook(modules[name.removesuffix(INPUT)], name, see))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(module: Any, name: str, see: Callable[[str, Any], Any]) -> Any:
    def hook(module, args, output):
        value = see(name, first(output))
        return None if value is None else with_first(output, value)

    return module.register_forward_hook(hook)


def _before(module: Any, name: str, see: Callable[[str, Any], Any]) -> Any:
    def hook(module, args, kwargs):
        given = args or kwargs
        value = see(name, first(given))
        if value is None:
            return None
        given = with_first(given, value)
        return (given, kwargs) if args else (args, given)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _forward(model: Any, tokens: np.ndarray) -> Any:
    """The model on tokens, PADDING where there is none."""
    import torch

    config = model.config.get_text_config()
    _require_fitting(type(model).__name__, config, tokens)
    padding = max(getattr(config, "pad_token_id", None) or 0, 0)  # some configs say -1 for none
    there = tokens >= 0
    ids = torch.from_numpy(np.where(there, tokens, padding)).long()
    inputs = {"input_ids": ids, "attention_mask": torch.from_numpy(there).long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})


def _require_fitting(kind: str, config: Any, tokens: np.ndarray) -> None:
    vocabulary = getattr(config, "vocab_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    if vocabulary is None:
        raise InputError(f"{kind} has no vocabulary, and only models that read tokens can be used")
    require(
        tokens.ndim == 2 and tokens.dtype.kind in "iu",
        f"tokens must be integers [batch, context], got {tokens.dtype} {list(tokens.shape)}",
    )
    largest = int(tokens.max(initial=0))
    require(
        largest < vocabulary,
        f"model and tokenizer do not match: the largest token is {largest}, and {kind} knows {vocabulary}, "
        "from 0",
    )
    require(
        positions is None or tokens.shape[1] <= positions,
        f"{kind} reads at most {positions} tokens at once, got a context of {tokens.shape[1]}",
    )


def _modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name}


def _require_usable(model: Any, names: Iterable[str], modules: dict[str, Any]) -> None:
    kind = type(model).__name__
    for name in names:
        module = name.removesuffix(INPUT)
        if module not in modules:
            raise InputError(f"{kind} has no module {module}; the nearest are {nearest(module, modules)}")
    require(not model.training, f"{kind} is in training mode, with dropout: call model.eval() first")


def _require_run(model: Any, name: str, seen: bool) -> None:
    require(seen, f"{name} does not run in a forward pass of {type(model).__name__}: hook a module that does")


def _shared_device(tensor: Any) -> bool:
    """Whether JAX computes where the tensor lies."""
    return {"cuda": "gpu"}.get(tensor.device.type, tensor.device.type) == jax.default_backend()


def _to_jax(tensor: Any) -> Array:
    tensor = tensor.contiguous()
    return jax.dlpack.from_dlpack(tensor) if _shared_device(tensor) else jnp.asarray(_numpy(tensor))


def _to_torch(array: Array, like: Any) -> Any:
    """The array with the dtype, shape and device of a tensor, in memory of its own."""
    import torch

    array = jax.block_until_ready(jnp.asarray(array))
    # float32 holds each value of the narrower types, of which torch takes not all from numpy
    shared = _shared_device(like)
    tensor = torch.from_dlpack(array) if shared else torch.from_numpy(np.array(array, np.float32))
    return tensor.to(like.device, like.dtype, copy=True).reshape(like.shape)


def _numpy(tensor: Any) -> np.ndarray:
    """The tensor's memory as an array, copied only from another device."""
    import torch

    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.dtype("bfloat16"))
    return tensor.numpy()


def _transformers() -> Any:
    try:
        import torch  # noqa: F401, without it transformers imports and then fails at the first model
        import transformers
    except ImportError:
        raise InputError("language models need transformers: pip install 'sae-jax[lm]'") from None
    return transformers


def _read(what: str, path: str | Path, read: Callable[[], Any]) -> Any:
    """`read()`, its dozen ways to fail as one sentence."""
    text = str(path)
    only_a_folder = text.startswith(("/", ".", "~")) or text.count("/") > 1
    require(not only_a_folder or Path(path).is_dir(), f"there is no folder {path} to read a {what} from")
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # the hub, safetensors, JSON and torch all raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no {what} can be read from {path}: {reason}") from None
