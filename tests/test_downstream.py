"""Downstream figures against their formulas, over models spliced by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sae_jax
from sae_jax import InputError, metrics
from sae_jax.cli import main
from sae_jax.language_models import PADDING, Contexts, nnx_capture, torch_hooks

VOCABULARY, WIDTH = 29, 8
SITE = {"nnx": "hidden", "gpt2": "transformer.h.0.mlp"}


class Causal(nnx.Module):
    """A mean over what came before, then neurons beside it: each position tells on the next ones."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.into = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def hidden(self, tokens):
        return nnx.relu(5 * self.into(self.before(tokens)))

    def before(self, tokens):
        x = self.embed(jnp.maximum(tokens, 0))
        return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]

    def after(self, tokens, hidden):
        mixed = jnp.cumsum(hidden, axis=1) / jnp.arange(1, hidden.shape[1] + 1)[:, None]
        return self.head(self.before(tokens) + mixed)

    def __call__(self, tokens):
        return self.after(tokens, self.hidden(tokens))


@pytest.fixture(scope="module")
def causal():
    return Causal(nnx.Rngs(0))


@pytest.fixture(scope="module")
def gpt2(torch):
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # to wait for one another takes threads longer than so small a model
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=32, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    yield transformers.GPT2LMHeadModel(config).eval()
    torch.set_num_threads(threads)


@pytest.fixture(params=["nnx", "gpt2"])
def spliced(request):
    """The function under measurement, of either kind of model."""
    if request.param == "nnx":
        return nnx_capture.splice(request.getfixturevalue("causal"), SITE["nnx"])
    return torch_hooks.splice(request.getfixturevalue("gpt2"), SITE["gpt2"])


def causal_by_hand(model, tokens, edit):
    hidden = np.asarray(model.hidden(tokens))
    return np.asarray(model.after(tokens, jnp.asarray(edit(hidden))))


def gpt2_by_hand(torch, model, tokens, edit):
    def hook(module, args, output):
        return torch.from_numpy(edit(output.detach().numpy()).astype(np.float32))

    handle = model.transformer.h[0].mlp.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(np.maximum(tokens, 0)).long()).logits.numpy()
    finally:
        handle.remove()


def contexts(seed=0, sizes=(3, 3), context=9):
    """Batches of these sizes, each context with padding behind it, and every third position not kept."""
    rng = np.random.default_rng(seed)
    batches = []
    for size in sizes:
        tokens = rng.integers(0, VOCABULARY, (size, context), dtype=np.int32)
        lengths = rng.integers(3, context + 1, size)
        tokens[np.arange(context) >= lengths[:, None]] = PADDING
        batches.append(Contexts(tokens, (tokens >= 0) & (rng.random(tokens.shape) > 1 / 3)))
    return batches


FAR = sae_jax.relu(WIDTH, 12)
BOTH = sae_jax.relu(WIDTH, 2 * WIDTH)


def trained(seed=0):
    """An SAE far from perfect."""
    params = FAR.init(jax.random.key(seed))
    return FAR, {**params, "b_enc": 0.1 + params["b_enc"], "b_dec": params["b_dec"] - 0.2}


def identity():
    """relu(x) - relu(-x)."""
    both = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]).astype(np.float32)
    params = {"W_enc": both.T, "b_enc": np.zeros(2 * WIDTH), "W_dec": both, "b_dec": np.zeros(WIDTH)}
    return BOTH, {name: jnp.float32(leaf) for name, leaf in params.items()}


def constant(value):
    """Gives `value` whatever it reads."""
    sae, params = identity()
    return sae, {**jax.tree.map(jnp.zeros_like, params), "b_dec": jnp.float32(value)}


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_formula(by_hand, sae, params, batches):
    """The figures of the docstring. `by_hand(tokens, edit) -> logits`."""
    W_enc, b_enc, W_dec, b_dec = (np.asarray(params[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    seen = []
    for tokens, kept in batches:
        by_hand(tokens, lambda x: (seen.append(x[kept]), x)[1])  # noqa: B023
    mean = np.concatenate(seen).astype(np.float64).mean(axis=0)
    values = {
        "clean": lambda x: x,
        "sae": lambda x: np.maximum(x @ W_enc + b_enc, 0) @ W_dec + b_dec,
        "zero": np.zeros_like,
        "mean": lambda x: np.broadcast_to(mean, x.shape),
    }
    ce, kl = {name: [] for name in values}, {name: [] for name in values}
    for tokens, kept in batches:
        for name, value in values.items():
            logits = by_hand(tokens, lambda x: np.where(kept[..., None], value(x), x))  # noqa: B023
            log_q, log_p = log_softmax(logits), log_softmax(by_hand(tokens, lambda x: x))
            for row, position in np.ndindex(*tokens.shape):
                if position + 1 < tokens.shape[1] and tokens[row, position + 1] >= 0:
                    q, p = log_q[row, position], log_p[row, position]
                    ce[name].append(-q[tokens[row, position + 1]])
                    kl[name].append((np.exp(p) * (p - q)).sum())
    ce, kl = ({name: np.mean(values) for name, values in each.items()} for each in (ce, kl))
    return {
        **{f"ce_{name}": value for name, value in ce.items()},
        "loss_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        **{f"kl_{name}": value for name, value in kl.items() if name != "clean"},
        "kl_recovered": 1 - kl["sae"] / kl["zero"],
    }


@pytest.mark.parametrize("kind", ["nnx", "gpt2"])
def test_figures_are_their_formulas(kind, causal, gpt2, torch):
    if kind == "nnx":
        logits, by_hand = nnx_capture.splice(causal, SITE[kind]), partial(causal_by_hand, causal)
    else:
        logits, by_hand = torch_hooks.splice(gpt2, SITE[kind]), partial(gpt2_by_hand, torch, gpt2)
    sae, params = trained()
    ours = metrics.downstream(logits, sae, params, contexts(sizes=(5, 2)))
    expected = by_formula(by_hand, sae, params, contexts(sizes=(5, 2)))
    assert list(ours) == [
        "ce_clean", "ce_sae", "ce_zero", "ce_mean", "loss_recovered", "loss_recovered_mean",
        "kl_sae", "kl_zero", "kl_mean", "kl_recovered",
    ]  # fmt: skip
    assert set(ours) == set(expected)
    for name, value in expected.items():
        # the shares are quotients of differences, which are known to 1e-6 of what is subtracted
        np.testing.assert_allclose(
            ours[name], value, rtol=1e-4 if "recovered" in name else 1e-5, err_msg=name
        )
        assert ours[name].dtype == np.float64
    # and the model is one in which every figure is there to be told from the others
    assert min(ours["kl_sae"], ours["kl_zero"], ours["kl_mean"]) > 0.01
    assert min(abs(ours[name] - ours["ce_clean"]) for name in ("ce_sae", "ce_zero", "ce_mean")) > 0.01


def test_all_is_recovered_by_the_identity_and_nothing_by_zeros(spliced):
    perfect = metrics.downstream(spliced, *identity(), contexts())
    assert perfect["ce_sae"] == perfect["ce_clean"] != perfect["ce_zero"]
    assert perfect["kl_sae"] == 0
    assert perfect["loss_recovered"] == perfect["loss_recovered_mean"] == perfect["kl_recovered"] == 1
    empty = metrics.downstream(spliced, *constant(np.zeros(WIDTH)), contexts())
    assert empty["loss_recovered"] == empty["kl_recovered"] == 0
    assert empty["ce_clean"] == perfect["ce_clean"]
    mean = metrics.mean_activation(spliced, contexts())
    constantly = metrics.downstream(spliced, *constant(mean), contexts())
    assert constantly["ce_sae"] == constantly["ce_mean"]
    assert constantly["loss_recovered_mean"] == 0


def test_padding_and_batches_change_nothing(spliced):
    sae, params = trained()
    whole = contexts(sizes=(6,))
    (tokens, kept), pad = whole[0], [(0, 0), (0, 4)]
    longer = Contexts(np.pad(tokens, pad, constant_values=PADDING), np.pad(kept, pad))
    apart = [Contexts(tokens[rows], kept[rows]) for rows in (slice(4), slice(4, 6))]
    expected = metrics.downstream(spliced, sae, params, whole)
    for others in ([longer], apart):
        found = metrics.downstream(spliced, sae, params, others)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_what_is_not_kept_keeps_its_own_activations(spliced):
    """Where only last positions are replaced, which predict nothing, the model predicts as before."""
    tokens = contexts(sizes=(4,))[0].tokens
    last = np.zeros(tokens.shape, bool)
    last[np.arange(4), (tokens >= 0).sum(axis=1) - 1] = True
    found = metrics.downstream(spliced, *constant(np.full(WIDTH, 100.0)), [Contexts(tokens, last)])
    assert found["ce_sae"] == found["ce_zero"] == found["ce_mean"] == found["ce_clean"]
    assert found["kl_sae"] == found["kl_zero"] == 0
    # and nothing is there to recover
    for name in ("loss_recovered", "loss_recovered_mean", "kl_recovered"):
        assert np.isnan(found[name]), name


def test_a_mean_may_be_given(spliced):
    sae, params = trained()
    mean = metrics.mean_activation(spliced, contexts())
    assert mean.dtype == np.float64
    of_its_own = metrics.downstream(spliced, sae, params, contexts())
    given = metrics.downstream(spliced, sae, params, iter(contexts()), mean=mean)
    assert given == of_its_own
    shifted = metrics.downstream(spliced, sae, params, contexts(), mean=mean + np.arange(WIDTH))
    changed = {name for name, value in shifted.items() if value != given[name]}
    assert changed == {"ce_mean", "loss_recovered_mean", "kl_mean"}


def test_another_sae_of_the_same_shape_compiles_nothing(spliced, compilations):
    sae, params = trained()
    metrics.downstream(spliced, sae, params, contexts())
    before = len(compilations)
    metrics.downstream(spliced, sae, trained(seed=1)[1], contexts(seed=1))
    assert len(compilations) == before


def test_tokens_that_a_model_rules_out_add_nothing(causal):
    logits = nnx_capture.splice(causal, SITE["nnx"])

    def ruled_out(tokens, edit):
        return jnp.pad(logits(tokens, edit), [(0, 0), (0, 0), (0, 3)], constant_values=-jnp.inf)

    expected = metrics.downstream(logits, *trained(), contexts())
    found = metrics.downstream(ruled_out, *trained(), contexts())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_a_model_in_half_precision_is_summed_in_single(gpt2, torch):
    half = torch.nn.Module.to(type(gpt2)(gpt2.config), torch.bfloat16).eval()
    half.load_state_dict(gpt2.state_dict())
    logits = torch_hooks.splice(half, SITE["gpt2"])
    found = metrics.downstream(logits, *identity(), contexts())
    assert found["loss_recovered"] == 1
    whole = metrics.downstream(torch_hooks.splice(gpt2, SITE["gpt2"]), *identity(), contexts())
    assert found["ce_clean"] == pytest.approx(whole["ce_clean"], rel=0.02)


def test_figures_are_saelens_own(torch, sae_lens, tmp_path):
    """`get_recons_loss` per position; SAELens takes KL at the last position too, which predicts nothing."""
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=1, d_model=WIDTH, n_ctx=9, d_head=4, d_vocab=VOCABULARY, act_fn="relu", seed=0,
        initializer_range=0.5,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    site = "blocks.0.hook_mlp_out"

    def logits(tokens, edit):
        def hook(x, hook):
            return x if edit is None else torch.tensor(np.asarray(edit(jnp.asarray(x.numpy()))))

        with torch.no_grad():
            return jnp.asarray(
                model.run_with_hooks(torch.tensor(tokens).long(), fwd_hooks=[(site, hook)]).numpy()
            )

    sae, params = trained()
    sae_jax.TrainedSAE(sae, params).save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9), dtype=np.int32)

    def of_saelens(ignored):
        found = get_recons_loss(
            theirs, model, ActivationScaler(), torch.tensor(tokens).long(), compute_kl=True,
            compute_ce_loss=True, ignore_tokens=ignored, hook_name=site,
        )  # fmt: skip
        return {name: float(value[:, :8].mean()) for name, value in found.items()}

    ours = metrics.downstream(logits, sae, params, [Contexts(tokens, np.ones(tokens.shape, bool))])
    found = of_saelens([])
    found["score"] = (found["ce_loss_with_ablation"] - found["ce_loss_with_sae"]) / (
        found["ce_loss_with_ablation"] - found["ce_loss_without_sae"]
    )
    for name, there in {
        "ce_clean": "ce_loss_without_sae", "ce_sae": "ce_loss_with_sae", "ce_zero": "ce_loss_with_ablation",
        "kl_sae": "kl_div_with_sae", "kl_zero": "kl_div_with_ablation", "loss_recovered": "score",
    }.items():  # fmt: skip
        assert ours[name] == pytest.approx(found[there], rel=1e-4), name
    # a token that it is told to ignore keeps its activations from the SAE, though not from the ablation
    ours = metrics.downstream(logits, sae, params, [Contexts(tokens, tokens != 3)])
    found = of_saelens([3])
    assert ours["ce_sae"] == pytest.approx(found["ce_loss_with_sae"], rel=1e-5)
    assert ours["kl_sae"] == pytest.approx(found["kl_div_with_sae"], rel=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (sae_jax.transcoder(WIDTH, 3, d_out=WIDTH), "is a transcoder"),
        (sae_jax.crosscoder(WIDTH, 3), "is a crosscoder"),
        (sae_jax.relu(WIDTH + 1, 3), f"reads {WIDTH + 1} columns, but the site has {WIDTH}"),
    ],
    ids=["transcoder", "crosscoder", "width"],
)
def test_an_sae_that_does_not_stand_at_the_site(spliced, sae, message):
    with pytest.raises(InputError, match=message):
        metrics.downstream(spliced, sae, sae.init(jax.random.key(0)), contexts())


def test_contexts_that_nothing_can_be_measured_on(causal):
    logits = nnx_capture.splice(causal, SITE["nnx"])
    tokens, kept = contexts(sizes=(3,))[0]
    with pytest.raises(InputError, match="give a list of them, or the mean"):
        metrics.downstream(logits, *trained(), iter(contexts()))
    for none in ([], [Contexts(tokens, np.zeros_like(kept))]):
        with pytest.raises(InputError, match="no position"):
            metrics.downstream(logits, *trained(), none)
    for short in ([], [Contexts(tokens[:, :1], kept[:, :1])]):
        with pytest.raises(InputError, match="no token that is to be predicted"):
            metrics.downstream(logits, *trained(), short, mean=np.zeros(WIDTH))
    with pytest.raises(InputError, match=r"mean must be \[8\], got \[3\]"):
        metrics.downstream(logits, *trained(), contexts(), mean=np.zeros(3))


# The command line


@pytest.fixture(scope="module")
def place(gpt2, tmp_path_factory):
    """A model with its tokenizer, an SAE, text and activations, as a user has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("downstream")
    gpt2.save_pretrained(place / "gpt2")
    words = {"<s>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(place / "gpt2")
    sae_jax.TrainedSAE(*trained()).save(place / "sae")
    sae = sae_jax.relu(WIDTH + 1, 3)
    sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0))).save(place / "wider")
    rng = np.random.default_rng(0)
    (place / "a.txt").write_text(" ".join(f"w{number}" for number in rng.integers(1, VOCABULARY, 200)))
    (place / "short.txt").write_text("w1 w2")
    np.save(place / "acts.npy", rng.normal(size=(50, WIDTH)).astype(np.float32))
    return place


@pytest.fixture
def run(place, monkeypatch, capsys):
    """`sae-jax eval` in that place: its exit status, stdout and stderr."""
    monkeypatch.chdir(place)

    def run(words):
        with pytest.raises(SystemExit) as ended:
            main(["eval", *words.split()])
        return ended.value.code, *capsys.readouterr()

    return run


MODEL = "--model gpt2 --hook transformer.h.0.mlp --text a.txt"


def test_eval_measures_in_a_model(run, place, gpt2):
    status, out, _ = run(f"sae {MODEL} --context 10 --contexts 7 --batch-size 40 --json")
    assert status == 0
    words = [int(word[1:]) for word in (place / "a.txt").read_text().split()]
    tokens = np.pad(np.reshape(words[:63], (7, 9)), [(0, 0), (1, 0)]).astype(np.int32)
    batches = [Contexts(tokens, tokens != 0)]
    expected = metrics.downstream(torch_hooks.splice(gpt2, SITE["gpt2"]), *trained(), batches)
    assert json.loads(out) == pytest.approx({name: float(each) for name, each in expected.items()}, rel=1e-4)
    # with rows beside it, the figures of both; and all contexts that there are, where it may read more
    status, out, _ = run(f"sae acts.npy {MODEL} --context 10")
    assert status == 0
    assert "50 rows of acts.npy and 22 contexts of a.txt, read by gpt2" in " ".join(out.split())
    for name in ("explained_variance", "loss_recovered", "kl_mean"):
        assert name in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sae", "say what to measure on: DATA, --world NAME or --model PATH"),
        ("sae --model gpt2 --text a.txt", "say where the SAE belongs: --hook NAME"),
        ("sae --model gpt2 --hook transformer.h.0.mlp", "say what the model is to read: --text FILES"),
        ("sae --model gpt2 --hook transformer.h.0.mpl --text a.txt", "the nearest are transformer.h.0.mlp"),
        (f"wider {MODEL} --context 10", f"this SAE reads {WIDTH + 1} columns, but the site has {WIDTH}"),
        (f"sae {MODEL}", "reads at most 32 tokens at once, got a context of 128"),
        (
            "sae --model gpt2 --hook transformer.h.0.mlp --text short.txt",
            "short.txt does not fill one context of 128",
        ),
        (f"sae {MODEL} --context 0", "--context must be at least 2, got 0"),
        (f"sae {MODEL} --contexts 0", "--contexts must be at least 1, got 0"),
        ("sae --model gpt2 --hook transformer.h.0.mlp --text b.txt", "there is no file or folder b.txt"),
        ("sae --model ./gpt3 --hook a --text a.txt", "there is no folder ./gpt3"),
        ("sae acts.npy --text a.txt", "--text is for --model PATH"),
        (f"sae {MODEL} --array a", "--array is for DATA"),
    ],
)
def test_eval_says_what_is_wrong_in_one_sentence(run, words, sentence):
    status, out, err = run(words)
    assert (status, out) == (2, "")
    # transformers shows a bar while it loads weights
    last = err.splitlines()[-1]
    assert last.startswith("sae-jax: ")
    assert sentence in last
    assert "Traceback" not in err
