"""Tiny checkpoints with tokenizers, as the tests of the command line load them."""

from pathlib import Path

import torch
from families import VOCAB, make_model
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CARD = "---\nlibrary_name: transformers\n---\n\n# My card\n"
CHAT_TEMPLATE = "{% for message in messages %}q {{ message['content'] }} a {% endfor %}"


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """Save a tokenizer with one token a character, of as many characters as the tiny models know, letters first."""
    vocabulary = {"</s>": 0}
    for character in [" ", *map(chr, range(97, 123)), *map(chr, range(33, 97))][: VOCAB - 1]:
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def save_zoo_checkpoint(folder: Path) -> None:
    """Save a zoo model with what its folder may hold besides: tokenizer, chat template, licence, card, a plot."""
    folder.mkdir()
    (folder / "LICENSE").write_text("My licence\n")
    (folder / "README.md").write_text(CARD)
    (folder / "plots").mkdir()
    (folder / "plots" / "losses.png").write_bytes(b"\x89PNG")
    make_model("all-four").save_pretrained(folder)
    save_tokenizer(folder, CHAT_TEMPLATE)


def save_llama(folder: Path) -> None:
    """Save a model of a family that is not the zoo's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
