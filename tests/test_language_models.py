"""Activations of real models, saved and loaded as a user's are: the model's own, to the bit."""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sae_jax
from sae_jax.base import InputError
from sae_jax.language_models import PADDING, Site, contexts, nnx_capture, torch_hooks, unembedding, words

VOCABULARY, CONTEXT = 48, 12
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
KINDS = {
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16}),
    "llama": (
        "LlamaForCausalLM",
        {**SHAPE, "intermediate_size": 64, "max_position_embeddings": 16, "num_key_value_heads": 2},
    ),
    "gemma": (
        "GemmaForCausalLM",
        {
            **SHAPE,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "head_dim": 8,
            "num_key_value_heads": 2,
        },
    ),
    "bert": ("BertForMaskedLM", {**SHAPE, "intermediate_size": 64, "max_position_embeddings": 16}),
    "falcon": ("FalconForCausalLM", {**SHAPE, "parallel_attn": True}),
    "albert": (
        "AlbertForMaskedLM",
        {**SHAPE, "intermediate_size": 64, "embedding_size": 16, "max_position_embeddings": 16},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"num_layers": 1, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread(torch):
    """Several threads of torch only wait for one another in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small model of a kind, made once and saved in a dtype."""
    import torch
    import transformers

    made = {}

    def folder(kind, dtype="float32"):
        if (kind, dtype) not in made:
            name, shape = KINDS[kind]
            torch.manual_seed(0)
            config = getattr(transformers, name).config_class(**SMALL, **shape)
            made[kind, dtype] = tmp_path_factory.mktemp(kind)
            model = getattr(transformers, name)(config).to(getattr(torch, dtype))
            model.save_pretrained(made[kind, dtype])
        return made[kind, dtype]

    return folder


def own(folder):
    """The model as transformers loads it, with nothing of ours."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()


def inputs(tokens):
    import torch

    tokens = torch.from_numpy(tokens).long()
    return {"input_ids": tokens.clamp(min=0), "attention_mask": (tokens >= 0).long()}


def under_plain_hooks(model, names, given):
    """What each module gives, copied in the hook, by torch alone."""
    import torch

    seen = {}

    def keep(name):
        def hook(module, args, output):
            output = output if torch.is_tensor(output) else output[0]
            seen.setdefault(name, output.clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        logits = model(**given).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def full(rng):
    """Three contexts without padding."""
    return rng.integers(3, VOCABULARY, (3, CONTEXT)).astype(np.int32)


@pytest.fixture
def padded(full):
    full[0, 5:] = PADDING
    full[2, 1:] = PADDING
    return full


# torch: what a model's sites are


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("gpt2", {"transformer.h.1.mlp.c_fc": 128, "transformer.h.0.attn": 32, "lm_head": VOCABULARY}),
        ("llama", {"model.layers.1.mlp.up_proj": 64, "model.layers.0": 32, "model.embed_tokens": 32}),
        ("bert", {"bert.encoder.layer.0.intermediate": 64, "bert.encoder.layer.1": 32}),
        ("t5", {"encoder.block.0.layer.1.DenseReluDense.wi": 64, "decoder.block.0": 32}),
    ],
)
def test_sites_are_the_modules_that_give_a_vector_per_token(folder, kind, some):
    model = torch_hooks.load(folder(kind))
    sites = torch_hooks.sites(model)
    widths = {site.name: site.width for site in sites}
    assert widths.items() >= some.items()
    assert {site.dtype for site in sites} == {"float32"}
    # given positions and no tokens, and never run itself
    assert not {"transformer.wpe", "transformer.h", "model.rotary_emb"} & set(widths)
    assert hooks_left(model) == 0
    order = [name for name, _ in model.named_modules()]
    assert [site.name for site in sites] == sorted(widths, key=order.index)


def test_a_site_tells_its_kind_and_dtype(folder):
    sites = {site.name: site for site in torch_hooks.sites(torch_hooks.load(folder("llama", "bfloat16")))}
    mlp = "model.layers.0.mlp"
    assert sites[mlp] == Site(mlp, width=32, dtype="bfloat16", kind="LlamaMLP")


# torch: activations


@pytest.mark.parametrize("tokens", ["full", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_activations_are_the_models_own_to_the_bit(folder, kind, tokens, request):
    tokens = request.getfixturevalue(tokens)
    model = torch_hooks.load(folder(kind))
    names = [site.name for site in torch_hooks.sites(model)]
    assert len(names) > 10
    given = inputs(tokens)
    if kind == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    expected, _ = under_plain_hooks(own(folder(kind)), names, given)
    found = torch_hooks.capture(model, names)(tokens)
    assert list(found) == names
    for name in names:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected[name].numpy())
    # each site on its own, with the model stopped elsewhere
    for name in names[:: len(names) // 4]:
        alone = torch_hooks.capture(model, [name])(tokens)
        np.testing.assert_array_equal(alone[name], expected[name].numpy())


def test_bfloat16_stays_bfloat16(folder, padded):
    name = "model.layers.1.mlp.up_proj"
    expected, _ = under_plain_hooks(own(folder("llama", "bfloat16")), [name], inputs(padded))
    found = torch_hooks.capture(torch_hooks.load(folder("llama", "bfloat16")), [name])(padded)[name]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), expected[name].float().numpy())


def test_an_input_is_what_the_module_is_given(folder, full):
    model = torch_hooks.load(folder("llama"))
    layer = "model.layers.0"
    sites = [f"{layer}.mlp.down_proj:input", f"{layer}.self_attn:input", f"{layer}.input_layernorm"]
    found = torch_hooks.capture(model, sites)(full)
    # given by keyword
    np.testing.assert_array_equal(found[sites[1]], found[sites[2]])
    handle = model.get_submodule(f"{layer}.mlp.down_proj").register_forward_pre_hook(
        lambda module, args: found.update(theirs=args[0].numpy())
    )
    model(**inputs(full))
    handle.remove()
    np.testing.assert_array_equal(found[sites[0]], found["theirs"])


def test_the_model_stops_after_the_last_site(folder, full):
    model = torch_hooks.load(folder("gpt2"))
    ran = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("transformer.h.0.mlp", "transformer.h.1.ln_1", "lm_head")
    ]
    torch_hooks.capture(model, ["transformer.h.0", "transformer.h.0.attn"])(full)
    assert ran == ["transformer.h.0.mlp"]
    for handle in handles:
        handle.remove()
    # and is none the worse for it
    _, clean = under_plain_hooks(own(folder("gpt2")), [], inputs(full))
    np.testing.assert_array_equal(model(**inputs(full)).logits.numpy(), clean.numpy())


def test_a_value_is_that_of_its_moment(folder, full):
    """Falcon adds the attention to the MLP's output in place, after the MLP has given it."""
    names = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    expected, _ = under_plain_hooks(own(folder("falcon")), names, inputs(full))
    model = torch_hooks.load(folder("falcon"))
    found = torch_hooks.capture(model, names)(full)
    np.testing.assert_array_equal(found[names[0]], expected[names[0]].numpy())


def test_what_an_edit_was_given_stays_as_it_was(folder, full):
    model = torch_hooks.load(folder("gpt2"))
    block, given, kept = model.get_submodule("transformer.h.0"), [], []
    block.ln_2.register_forward_hook(lambda module, args, output: given.append(output))

    def overwrite(module, args, output):
        """As a layer does that adds to its own input in place."""
        given[0].zero_()

    block.mlp.register_forward_hook(overwrite)
    torch_hooks.splice(model, "transformer.h.0.mlp:input")(full, lambda x: kept.append(x) or x)
    assert not given[0].any()
    assert kept[0].any()


def test_a_module_that_runs_twice_counts_the_first_time(folder, full):
    """ALBERT's two layers are one module."""
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    expected, _ = under_plain_hooks(own(folder("albert")), [name], inputs(full))
    found = torch_hooks.capture(torch_hooks.load(folder("albert")), [name])(full)
    np.testing.assert_array_equal(found[name], expected[name].numpy())


def test_hooks_go_even_when_the_model_fails(folder, full):
    model = torch_hooks.load(folder("gpt2"))
    attention = model.get_submodule("transformer.h.1.attn")
    attention.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        torch_hooks.capture(model, ["lm_head"])(full)
    with pytest.raises(ZeroDivisionError):
        torch_hooks.splice(model, "transformer.h.0.mlp")(full, lambda x: x)
    assert hooks_left(model) == 0


# torch: splicing


@pytest.mark.parametrize(
    ("kind", "dtype", "name"),
    [
        ("gpt2", "float32", "transformer.h.0.mlp"),
        ("gpt2", "float32", "transformer.h.0.attn"),
        ("llama", "float32", "model.layers.0"),
        ("llama", "bfloat16", "model.layers.1.self_attn"),
        ("llama", "float32", "model.layers.0.self_attn:input"),
        ("falcon", "float32", "transformer.h.0.mlp.dense_4h_to_h:input"),
    ],
)
def test_a_splice_replaces_one_value(folder, padded, kind, dtype, name):
    import torch

    model = torch_hooks.load(folder(kind, dtype))
    spliced = torch_hooks.splice(model, name)
    theirs = own(folder(kind, dtype))
    _, clean = under_plain_hooks(theirs, [], inputs(padded))
    for edit in (None, lambda x: x, lambda x: x.astype(jnp.float32)):
        logits = spliced(padded, edit)
        assert isinstance(logits, jax.Array)
        assert logits.shape == (*padded.shape, VOCABULARY)
        assert str(logits.dtype) == dtype
        np.testing.assert_array_equal(np.float32(logits), clean.float().numpy())

    def zero(value):
        return (torch.zeros_like(value[0]), *value[1:]) if isinstance(value, tuple) else value * 0

    module = theirs.get_submodule(name.removesuffix(":input"))
    if name.endswith("self_attn:input"):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "hidden_states": zero(kwargs["hidden_states"])}),
            with_kwargs=True,
        )
    elif name.endswith(":input"):
        module.register_forward_pre_hook(lambda module, args: zero(args))
    else:
        module.register_forward_hook(lambda module, args, output: zero(output))
    _, zeroed = under_plain_hooks(theirs, [], inputs(padded))
    assert not torch.equal(zeroed, clean)
    np.testing.assert_array_equal(np.float32(spliced(padded, jnp.zeros_like)), zeroed.float().numpy())
    assert hooks_left(model) == 0


def test_an_sae_can_be_spliced(folder, full):
    sae = sae_jax.relu(32, 64)
    trained = sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0)))
    spliced = torch_hooks.splice(torch_hooks.load(folder("gpt2")), "transformer.h.1")
    shift = jnp.abs(spliced(full, trained) - spliced(full, None)).max()
    assert 0 < float(shift) < 10


# torch: from disk


def test_a_saved_model_and_tokenizer_give_activations_of_texts(folder, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["the cat sat on the mat", "the dog sat on the cat", "a dog and a cat"] * 3
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    own(folder("gpt2")).save_pretrained(tmp_path)
    tokenizer = torch_hooks.tokenizer(tmp_path)
    activations = torch_hooks.capture(torch_hooks.load(str(tmp_path)), ["transformer.h.0.mlp.act"])
    batches = list(contexts(texts, tokenizer, 8, batch_size=2))
    assert len(batches) > 1
    for tokens, kept in batches:
        assert (tokens[:, 0] == 1).all()
        assert not kept[:, 0].any()
        assert kept.any()
        assert activations(tokens)["transformer.h.0.mlp.act"].shape == (*tokens.shape, 128)
    sentence = tokenizer("the cat", return_tensors="np")["input_ids"]
    assert tokenizer.decode(sentence[0]) == "the cat"


def test_weights_keep_the_dtype_they_were_saved_in(folder):
    model = torch_hooks.load(folder("llama", "bfloat16"))
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.bfloat16"}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training


def broken(folder, tmp_path, what):
    """A copy of a saved model in which something is wrong."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    changed = {"unknown": {"architectures": ["NoSuchModel"]}, "bare": {"architectures": None}}
    if what in changed:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed[what]}))
    if what == "headless":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if what == "gone":
        weights.unlink()
    if what == "garbled":
        config.write_text(config.read_text()[:-20])
    return tmp_path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown", "was saved as NoSuchModel, which transformers does not have"),
        ("bare", "was saved as no class, which transformers does not have"),
        ("headless", r"lacks 1 weights of LlamaForSequenceClassification, \['score.weight'\] among them"),
        ("cut", "no model can be read from"),
        ("gone", "no model can be read from .*model.safetensors"),
        ("garbled", "no model can be read from .*"),
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(folder, tmp_path, what, message):
    with pytest.raises(InputError, match=message) as caught:
        torch_hooks.load(broken(folder("llama"), tmp_path, what))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere to read a model from"):
        torch_hooks.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"there is no folder ./nowhere to read a tokenizer from"):
        torch_hooks.tokenizer("./nowhere")
    for kind, message in [
        ("gpt2", "there is no tokenizer's vocabulary"),
        ("llama", "no tokenizer can be read"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            torch_hooks.tokenizer(folder(kind))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no model can be read from"):
        torch_hooks.load(folder("gpt2"), device="nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"language models need transformers: pip install"):
        torch_hooks.load(folder("gpt2"))


# torch: bad input


def refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_wrong_name_is_answered_with_the_nearest(folder):
    model = torch_hooks.load(folder("gpt2"))
    for function in (lambda model, name: torch_hooks.capture(model, [name]), torch_hooks.splice):
        for name in ("transformer.h.1.mpl", "transformer.h.1.mpl:input"):
            message = r"has no module transformer\.h\.1\.mpl; the nearest are transformer\.h\.1\.mlp, .*, .*"
            refused(lambda f=function, name=name: f(model, name), message)
    refused(lambda: torch_hooks.capture(model, []), "name at least one module")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("gpt2", "transformer.h", r"transformer\.h does not run in a forward pass of GPT2LMHeadModel"),
        ("gpt2", "transformer.wpe", r"transformer\.wpe gives \[1, 12, 32\] for tokens \[3, 12\]"),
        ("gpt2", "transformer.wte:input", r"transformer\.wte:input gives \[3, 12\] for tokens"),
        ("llama", "model.rotary_emb", r"model\.rotary_emb gives \[1, 12, 8\]"),
    ],
)
def test_a_module_that_holds_no_activations_is_refused(folder, full, kind, name, message):
    model = torch_hooks.load(folder(kind))
    refused(lambda: torch_hooks.capture(model, [name])(full), message)
    refused(lambda: torch_hooks.splice(model, name)(full, lambda x: x), message)
    assert hooks_left(model) == 0


def test_tokens_that_do_not_fit_the_model_are_refused(folder, full, unchecked):
    activations = torch_hooks.capture(torch_hooks.load(folder("gpt2")), ["transformer.h.0"])
    beyond = np.where(full == full[1, 1], VOCABULARY, full)
    refused(
        lambda: activations(beyond),
        "model and tokenizer do not match: the largest token is 48, and GPT2LMHeadModel knows 48, from 0",
    )
    refused(
        lambda: activations(np.tile(full, 2)),
        "GPT2LMHeadModel reads at most 16 tokens at once, got a context of 24",
    )
    refused(lambda: activations(full[0]), r"tokens must be integers \[batch, context\], got int32 \[12\]")
    refused(lambda: activations(full.astype(float)), r"got float64 \[3, 12\]")


def test_a_model_without_a_vocabulary_is_refused(torch):
    import transformers

    config = transformers.ViTConfig(**SHAPE, intermediate_size=64, image_size=8, patch_size=4)
    refused(lambda: torch_hooks.sites(transformers.ViTModel(config).eval()), "ViTModel has no vocabulary")


def test_a_model_with_dropout_on_is_refused(folder):
    model = torch_hooks.load(folder("gpt2")).train()
    refused(lambda: torch_hooks.capture(model, ["lm_head"]), r"in training mode.*call model\.eval\(\)")


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_only_next_token_models_are_spliced(folder, kind):
    model = torch_hooks.load(folder(kind))
    name = torch_hooks.sites(model)[0].name
    refused(lambda: torch_hooks.splice(model, name), f"which {type(model).__name__} does not make")


def test_a_model_without_a_head_is_not_spliced(folder):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(folder("gpt2")).eval()
    assert torch_hooks.capture(model, ["h.0.mlp"])
    refused(lambda: torch_hooks.splice(model, "h.0.mlp"), "which GPT2Model does not make")


def test_an_edit_keeps_the_shape(folder, full):
    spliced = torch_hooks.splice(torch_hooks.load(folder("gpt2")), "transformer.h.0.mlp")
    message = r"the edit at transformer\.h\.0\.mlp must return \[3, 12, 32\], got \[3, 12, 31\]"
    refused(lambda: spliced(full, lambda x: x[..., 1:]), message)


# flax nnx

ran = []


def noted(x, label):
    """`x`, with a note taken if it is really computed."""
    return jax.pure_callback(
        lambda x: (ran.append(label), x)[1],
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
        vmap_method="sequential",
    )


class Block(nnx.Module):
    """A residual MLP that also gives something else, sows, and has dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def hidden(self, x):
        return jax.nn.relu(self.up(x))

    def __call__(self, x):
        hidden = self.hidden(x)
        self.sow(nnx.Intermediate, "doubled", 2 * hidden)
        return x + self.dropout(self.down(hidden)), "more"


class LanguageModel(nnx.Module):
    """Two blocks and a third that runs twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.twice = Block(rngs)
        self.heads = nnx.LinearGeneral(16, (4, 4), rngs=rngs)
        self.out = nnx.Linear(16, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.layers:
            x, _ = block(x)
        x, _ = self.twice(self.twice(x)[0])
        x = self.heads(noted(x, "heads")).reshape(x.shape)
        return noted(self.out(x), "out")


@pytest.fixture
def model():
    ran.clear()
    return LanguageModel(nnx.Rngs(0))


@pytest.fixture
def by_hand(model, full):
    """Every value, step by step and without a trace."""
    values, x = {}, model.embed(full)
    for name, block in [("layers.0", model.layers[0]), ("layers.1", model.layers[1]), ("twice", model.twice)]:
        hidden = jax.nn.relu(block.up(x))
        x = x + block.down(hidden)
        values |= {name: x, f"{name}.hidden": hidden, f"{name}.doubled": 2 * hidden}
    x = x + model.twice.down(jax.nn.relu(model.twice.up(x)))
    heads = model.heads(x).reshape(x.shape)
    return {**values, "heads": heads, "__call__": model.out(heads)}


def close(a, b):
    # compiled and not, the same sums are taken in two orders
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sites_of_a_module_are_its_methods_and_what_it_sows(model):
    sites = {site.name: site for site in nnx_capture.sites(model)}
    assert sites["layers.0"] == Site("layers.0", 16, "float32", "Block")
    assert sites["layers.1.hidden"] == Site("layers.1.hidden", 24, "float32", "Block")
    assert sites["twice.doubled"].width == 24
    assert sites["layers.0.up"].kind == "Linear"
    assert sites["heads"].width == 16
    assert sites["__call__"].width == VOCABULARY
    assert not ran


def test_values_are_those_of_a_run_by_hand(model, full, by_hand):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nnx_capture.capture(model, by_hand)(full)
    assert list(found) == list(by_hand)
    for name, value in by_hand.items():
        close(found[name], value)


def test_nothing_after_the_last_site_is_computed(model, full):
    jax.block_until_ready(nnx_capture.capture(model, ["layers.1.hidden", "twice"])(full))
    assert not ran
    jax.block_until_ready(nnx_capture.capture(model, ["heads"])(full))
    assert ran == ["heads"]


def test_the_second_call_compiles_nothing(model, full, compilations):
    activations = nnx_capture.capture(model, ["layers.0"])
    spliced = nnx_capture.splice(model, "layers.0")
    activations(full), spliced(full, lambda x: 2 * x), spliced(full, None)
    compilations.clear()
    activations(full + 0)
    spliced(full + 0, lambda x: x)
    spliced(full + 0, None)
    nnx_capture.capture(model, ["layers.0"])(full)
    assert compilations == []


def test_the_model_is_read_anew_and_left_as_it_is(model, full):
    activations = nnx_capture.capture(model, ["layers.0.hidden"])
    before = activations(full)["layers.0.hidden"]
    spliced = nnx_capture.splice(model, "layers.0.hidden")
    spliced(full, jnp.zeros_like)
    assert type(model.layers[0]) is Block
    assert not model.layers[0].dropout.deterministic
    assert not nnx.state(model, nnx.Intermediate)
    model.layers[0].up.kernel[...] *= 2
    model.layers[0].up.bias[...] *= 2
    close(activations(full)["layers.0.hidden"], 2 * before)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("name", ["layers.0", "layers.0.hidden", "twice", "heads"])
def test_an_nnx_splice_replaces_one_value(model, full, by_hand, name):
    spliced = nnx_capture.splice(model, name)
    close(spliced(full, None), by_hand["__call__"])
    close(spliced(full, lambda x: x), by_hand["__call__"])
    half = LanguageModel(nnx.Rngs(0))
    half.eval()
    edit_by_hand(half, name)
    logits = spliced(full, lambda x: (x / 2).astype(jnp.bfloat16).astype(jnp.float32))
    assert float(jnp.abs(logits - by_hand["__call__"]).max()) > 0.01
    np.testing.assert_allclose(logits, half(full), rtol=0.05, atol=0.05)
    assert logits.dtype == jnp.float32


def edit_by_hand(model, name):
    """Halve a value in the model's own code."""

    class Half(Block):
        times = 0

        def __call__(self, x):
            y, more = super().__call__(x)
            self.times += 1
            return (y / 2 if self.times == 1 else y), more

    class HalfHidden(Block):
        def hidden(self, x):
            return super().hidden(x) / 2

    class HalfHeads(nnx.LinearGeneral):
        def __call__(self, x):
            return super().__call__(x) / 2

    module = {"twice": model.twice, "heads": model.heads}.get(name, model.layers[0])
    module.__class__ = {"layers.0.hidden": HalfHidden, "heads": HalfHeads}.get(name, Half)


def test_an_edit_may_close_over_traced_arrays(model, full):
    spliced = nnx_capture.splice(model, "layers.0.hidden")
    scales = jnp.array([0.0, 0.5, 1.0])
    together = jax.jit(jax.vmap(lambda scale: spliced(full, lambda x: scale * x)))(scales)
    for scale, logits in zip(scales, together, strict=True):
        close(logits, spliced(full, lambda x, scale=scale: scale * x))
    slope = jax.grad(lambda scale: spliced_loss(model, full, scale))(0.5)
    assert np.isfinite(slope)


def spliced_loss(model, full, scale):
    """A number with a gradient; the callbacks above have none."""
    bare = Bare(model)
    return jnp.square(nnx_capture.splice(bare, "block.hidden")(full, lambda x: scale * x)).sum()


class Bare(nnx.Module):
    """One block between embedding and logits."""

    def __init__(self, model: LanguageModel):
        self.embed, self.block, self.out = model.embed, model.layers[0], model.out

    def __call__(self, tokens):
        return self.out(self.block(self.embed(tokens))[0])


def test_a_wrong_site_is_answered_with_the_nearest(model, full):
    message = r"LanguageModel has no site layers\.0\.hiden; the nearest are layers\.0\.hidden, .*, .*"
    refused(lambda: nnx_capture.capture(model, ["layers.0.hiden"])(full), message)
    refused(lambda: nnx_capture.splice(model, "layers.0.hiden")(full, lambda x: x), message)
    refused(lambda: nnx_capture.capture(model, []), "name at least one site")


def test_a_sown_value_is_captured_and_not_spliced(model, full):
    refused(
        lambda: nnx_capture.splice(model, "layers.0.doubled")(full, lambda x: x),
        r"layers\.0\.doubled is sown and not what a method gives, so it cannot be replaced; layers\.0.* can",
    )


def test_an_nnx_model_that_gives_no_logits_is_captured_and_not_spliced(model, full):
    class Headless(Bare):
        def __call__(self, tokens):
            return self.block(self.embed(tokens))

    headless = Headless(model)
    assert nnx_capture.capture(headless, ["block"])(full)["block"].shape == (3, 12, 16)
    refused(
        lambda: nnx_capture.splice(headless, "block")(full, lambda x: x),
        r"Headless must give logits \[batch, context, vocabulary\] for tokens \[3, 12\], got tuple",
    )


def test_what_does_not_fit_an_nnx_model_is_refused(model, full):
    spliced = nnx_capture.splice(model, "layers.0")
    refused(
        lambda: spliced(np.where(full == full[0, 0], VOCABULARY, full), None),
        "model and tokenizer do not match: the largest token is 48, and LanguageModel gives logits for 48",
    )
    message = r"the edit at layers\.0 must return \[3, 12, 16\], got \[3, 12\]"
    refused(lambda: spliced(full, lambda x: x[..., 0]), message)


@pytest.mark.parametrize(
    ("kind", "norm", "one_more"),
    [("gpt2", "transformer.ln_f", False), ("llama", "model.norm", False), ("gemma", "model.norm", True)],
)
def test_the_unembedding_has_the_scale_of_the_last_norm(folder, kind, norm, one_more):
    import torch

    model = torch_hooks.load(folder(kind))
    last = model.get_submodule(norm)
    with torch.no_grad():
        last.weight.uniform_(0.5, 2)
    scale = last.weight.detach().numpy() + one_more
    expected = model.get_output_embeddings().weight.detach().numpy().T * scale[:, None]
    np.testing.assert_allclose(unembedding(model), expected, rtol=2e-5, atol=1e-7)
    # what it says of a direction is what the model does: between two tokens, the spread of the norm aside
    x, v = torch.randn(2, 32)
    v -= v.mean()
    with torch.no_grad():
        before, after = (model.get_output_embeddings()(last((x * 0 + each)[None]))[0] for each in (v, -v))
    added = (before - after).numpy() / 2
    ours = v.numpy() @ unembedding(model)
    np.testing.assert_allclose(added / np.linalg.norm(added), ours / np.linalg.norm(ours), atol=1e-4)


def test_a_model_without_output_weights_writes_no_logits(folder):
    model = torch_hooks.load(folder("t5")).encoder
    with pytest.raises(InputError, match="no output weights"):
        unembedding(model)


@pytest.mark.parametrize(("name", "space"), [("bytes", "Ġ"), ("sentencepiece", "▁")])
def test_words_keep_the_space_before_them(name, space):
    import tokenizers
    import transformers

    vocabulary = {f"{space}the": 0, "cat": 1, "<unk>": 2, "Ã": 3}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    decoders = tokenizers.decoders
    model.decoder = decoders.ByteLevel() if name == "bytes" else decoders.Metaspace()
    word = words(transformers.PreTrainedTokenizerFast(tokenizer_object=model))
    assert (word(0), word(1)) == (" the", "cat")
    assert word(99) == "#99"
    assert word(-5) == "#-5"
