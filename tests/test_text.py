"""Texts to contexts: what a context holds, which positions are kept, and reading from anywhere."""

import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.base import InputError
from sae_jax.language_models import PADDING, contexts, from_tokens, read_texts

WORDS = "one two three four five six seven eight nine ten".split()
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]"]
PAD, UNK, BOS, EOS, CLS, SEP = range(6)
TEXTS = ["one two three", "four", "", "five six seven eight nine ten one", "two three"]


def word_level(template=None, **named):
    """A tokenizer that knows the words above, one token each from 6 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, i) for i, word in enumerate(SPECIAL)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **named)


@pytest.fixture(scope="module")
def gpt():
    return word_level(bos_token="[BOS]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def bert():
    return word_level("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")


def words(ids):
    """Tokens as a line: words by number, special tokens by their first letter, padding as a dot."""
    return " ".join("." if i == PADDING else SPECIAL[i][1] if i < 6 else str(i - 5) for i in ids)


def lines(batches):
    return [words(row) for batch in batches for row in batch.tokens]


# What a context holds


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        # documents 123, 4, 5678910 1, 23
        ("context", ["B 1 2 3 B", "B 4 B 5 6", "B 7 8 9 10", "B 1 B 2 3"]),
        ("document", ["B 1 2 3 B", "4 B 5 6 7", "8 9 10 1 B"]),
        ("none", ["1 2 3 4 5", "6 7 8 9 10"]),
    ],
)
def test_documents_are_packed_into_one_stream(gpt, begin, expected):
    assert lines(contexts(TEXTS, gpt, 5, begin=begin)) == expected


def test_a_document_alone_is_cut_off_or_padded(gpt, bert):
    assert lines(contexts(TEXTS, gpt, 4, pack=False)) == ["1 2 3 .", "4 . . .", "5 6 7 8", "2 3 . ."]
    alone = lines(contexts(TEXTS, bert, 4, pack=False))
    assert alone == ["C 1 2 S", "C 4 S .", "C S . .", "C 5 6 S", "C 2 3 S"]


def test_packed_documents_bring_no_special_tokens_of_the_tokenizer(bert):
    assert lines(contexts(TEXTS, bert, 5, begin="none")) == ["1 2 3 4 5", "6 7 8 9 10"]
    # BERT has no BOS
    assert lines(contexts(TEXTS, bert, 5))[0] == "C 1 2 3 C"


def test_without_bos_and_cls_a_context_begins_with_eos():
    assert lines(contexts(TEXTS, word_level(eos_token="[EOS]"), 4))[0] == "E 1 2 3"


def test_a_bos_in_the_text_is_not_doubled(gpt):
    assert lines(contexts(["[BOS] one two", "[BOS] three four"], gpt, 6)) == ["B 1 2 B 3 4"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([*WORDS, "[BOS]"]), max_size=12), max_size=8),
    st.integers(2, 9),
    st.sampled_from(["context", "document", "none"]),
)
def test_packing_is_that_of_saelens(gpt, batching, documents, context, begin):
    import torch

    tokens = [torch.tensor(gpt.convert_tokens_to_ids(document)) for document in documents if document]
    theirs = batching.concat_and_batch_sequences(
        tokens,
        context,
        begin_batch_token_id=BOS if begin == "context" else None,
        begin_sequence_token_id=BOS if begin == "document" else None,
        sequence_separator_token_id=BOS if begin == "context" else None,
    )
    ours = contexts((" ".join(document) for document in documents), gpt, context, begin=begin)
    assert lines(ours) == [words(row.tolist()) for row in theirs]


@pytest.fixture(scope="module")
def batching():
    """SAELens's file alone: the package takes ten seconds to import."""
    folder = importlib.util.find_spec("sae_lens").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("batching", f"{folder}/tokenization_and_batching.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Which positions are kept


def test_padding_and_special_tokens_are_not_kept(gpt, bert):
    (batch,) = contexts(["one [EOS] two [UNK]", "three"], gpt, 3, begin="context")
    assert words(batch.tokens[0]) == "B 1 E"
    np.testing.assert_array_equal(batch.kept[0], [False, True, False])
    (batch,) = contexts(["one nothing", "three"], bert, 5, pack=False)
    assert [words(row) for row in batch.tokens] == ["C 1 U S .", "C 3 S . ."]
    # an unknown word is text
    np.testing.assert_array_equal(batch.kept, [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]])
    (batch,) = contexts(["one nothing", "three"], bert, 5, pack=False, keep_special=True)
    np.testing.assert_array_equal(batch.kept, batch.tokens != PADDING)


def test_tokens_already_made_come_in_batches(tmp_path):
    tokens = np.arange(21).reshape(7, 3)
    tokens[2, 1:] = PADDING
    np.save(tmp_path / "tokens.npy", tokens)
    batches = list(from_tokens(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 3, special=[0, 20]))
    assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), tokens)
    kept = np.concatenate([batch.kept for batch in batches])
    np.testing.assert_array_equal(kept, (tokens > 0) & (tokens < 20))
    assert all(type(batch.tokens) is np.ndarray and batch.tokens.dtype == np.int32 for batch in batches)


# Batches


def test_batches_are_the_same_each_time_and_only_the_last_is_short(gpt):
    texts = [" ".join(itertools.islice(itertools.cycle(WORDS), n)) for n in range(1, 40)]
    once, again = (list(contexts(iter(texts), gpt, 8, batch_size=6)) for _ in range(2))
    assert {len(batch.tokens) for batch in once[:-1]} == {6}
    assert 1 <= len(once[-1].tokens) <= 6
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.kept, b.kept)
    assert once[0].tokens.dtype == np.int32


def test_texts_are_read_as_they_are_needed(gpt):
    read = []
    endless = (read.append(n) or "one two three four five six seven" for n in itertools.count())
    batches = contexts(endless, gpt, 4, batch_size=4)
    assert not read
    for _ in range(3):
        next(batches)
    assert len(read) < 100


# Reading


def test_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "b.py").write_bytes("b\r\né".encode())
    (tmp_path / "books" / "a.txt").write_text("a")
    (tmp_path / "books" / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2", "more": 1}')
    (tmp_path / "books" / "deep" / "d").write_text("d")
    (tmp_path / "books" / "picture").write_bytes(b"\x89PNG\0")
    (tmp_path / "books" / ".git").mkdir()
    (tmp_path / "books" / ".git" / "HEAD").write_text("not a document")
    (tmp_path / "e.txt").write_text("e")
    assert list(read_texts(tmp_path / "books")) == ["a", "b\r\né", "c1", "c2", "d"]
    assert list(read_texts([str(tmp_path / "e.txt"), tmp_path / "books" / "a.txt"])) == ["e", "a"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text()), st.booleans())
def test_json_lines_give_back_their_texts(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("lines") / "texts.jsonl"
    rows = [json.dumps({"n": 1, "body": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes("\n".join(rows).encode())
    assert list(read_texts(path, column="body")) == texts


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_texts_or_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("any.txt", "any.jsonl"):
        (folder / name).write_bytes(data)
        texts, refused = read_or_refused(folder / name)
        if refused:
            assert "\n" not in refused
            assert name in refused
        else:
            assert "jsonl" in name or texts == [data.decode()]


def read_or_refused(path):
    try:
        return list(read_texts(path)), None
    except InputError as error:
        return None, str(error)


def test_datasets_on_disk_are_read(tmp_path):
    import datasets

    whole = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "two")
    assert list(read_texts(tmp_path / "one")) == ["a", "b"]
    assert list(read_texts([tmp_path / "two", str(tmp_path / "one")])) == ["a", "b", "a", "b"]
    assert list(read_texts(tmp_path / "two", split="test")) == ["b"]
    with pytest.raises(InputError, match=r"no column 'body'; it has text, n"):
        read_texts(tmp_path / "one", column="body")
    with pytest.raises(InputError, match=r"no split 'dev'; it has train, test"):
        read_texts(tmp_path / "two", split="dev")
    with pytest.raises(InputError, match=r"'n' in .*one must be text, got int"):
        list(read_texts(tmp_path / "one", column="n"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="no dataset can be read from it"):
        read_texts(tmp_path / "one")


# Bad input


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "é".encode() + b"\xff", r"a\.txt is not UTF-8: byte 2 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl is not UTF-8: byte 24 is 0xe9"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'\n["a"]', r"line 2 of .*a\.jsonl must be a JSON object, got list"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"line 1 of .*a\.jsonl has no 'text'; it has body, n"),
        ("a.jsonl", b'{"text": 3}', r"'text' in line 1 of .*a\.jsonl must be text, got int"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        list(read_texts(tmp_path))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    for missing in (tmp_path / "no.txt", "no.txt", "./no"):
        with pytest.raises(InputError, match=r"there is no file or folder .*no"):
            read_texts(missing)
    (tmp_path / "picture").write_bytes(b"\0")
    with pytest.raises(InputError, match="there are no text files in"):
        read_texts(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match="unheard-of is no file or folder here, and no dataset can be read"):
        read_texts("unheard-of")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"unheard-of needs the package datasets: pip install"):
        read_texts("unheard-of")


def unreachable(*args, **kwargs):
    """What the hub does from a machine without a network, half a minute sooner."""
    raise ConnectionError("Couldn't reach 'unheard-of' on the Hub\nsecond line")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"context": 0, "begin": "none"}, "context must be at least 1, got 0"),
        ({"context": 4, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context": 4, "begin": "bos"}, "begin must be context, document or none, got 'bos'"),
    ],
)
def test_contexts_that_cannot_be_made_are_refused(gpt, unchecked, arguments, message):
    with pytest.raises(InputError, match=message):
        contexts(TEXTS, gpt, **arguments)


def test_a_tokenizer_without_a_token_to_begin_with_is_refused():
    with pytest.raises(InputError, match="no BOS, CLS or EOS token to begin with: choose begin='none'"):
        contexts(TEXTS, word_level(), 4)
    assert lines(contexts(TEXTS, word_level(), 4, begin="none"))


@pytest.mark.parametrize(
    ("tokens", "batch_size", "message"),
    [
        (np.zeros(3, int), 1, r"tokens must be integers \[n, context\], got int64 \[3\]"),
        (np.zeros((3, 2)), 1, r"got float64 \[3, 2\]"),
        (np.zeros((3, 2), int), 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_tokens_that_are_none_are_refused(unchecked, tokens, batch_size, message):
    with pytest.raises(InputError, match=message):
        from_tokens(tokens, batch_size)
