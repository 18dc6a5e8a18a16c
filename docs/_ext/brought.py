"""What a reader of the pages brings: arrays, texts, a language model and someone's SAE, each a small one.

    python brought.py FOLDER

Every page runs in a folder that holds them by the names that the pages use, so that commands run as they
stand there, without a network.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import sae_jax

ROWS, D_IN = 4096, 32
TEXTS = {"books/one.txt": 200, "held-out.txt": 60}
"""How often the line stands in each."""
LINE = "Of the tokens of a text, a model of six layers makes activations; of these an SAE makes features.\n"


def make(folder: Path) -> None:
    """Write all of it to a new folder."""
    (folder / "books").mkdir(parents=True)
    for name, times in TEXTS.items():
        (folder / name).write_text(LINE * times)
    draw = np.random.default_rng(0).normal
    directions, amounts = draw(size=(64, D_IN)), np.maximum(draw(size=(ROWS, 64)) - 1.2, 0)
    rows = (amounts @ directions).astype(np.float32)
    np.save(folder / "acts.npy", rows)
    np.save(folder / "before.npy", rows)
    np.save(folder / "after.npy", np.tanh(rows))
    language_model(folder / "gpt2")
    sae = sae_jax.relu(D_IN, 64, apply_b_dec_to_input=True)
    sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0))).save(
        folder / "trainer_0", format="dictionary_learning"
    )


def language_model(folder: Path) -> None:
    """A GPT-2 of six narrow layers that was never trained, with a token for every byte."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{letter: i for i, letter in enumerate(letters, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_positions": 128, "n_embd": D_IN, "n_layer": 6, "n_head": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(letters) + 1, **shape, **ids)).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
