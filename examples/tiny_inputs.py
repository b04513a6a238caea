"""Stand-ins for the models that the examples work on, used with --tiny: random weights, seconds on a CPU, no download.

The texts are real: the examples read the WikiText-2 excerpt that is part of this repository.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ssm_zoo.modeling  # noqa: F401 - registers the zoo's families with transformers' Auto classes

TEXTS = Path(__file__).resolve().parents[1] / "distill" / "data" / "wikitext2"
VOCABULARY = 257


def paragraphs(name: str, number: int) -> list[str]:
    """Return the first paragraphs of the "train" or "heldout" text that are long enough to learn from."""
    lines = (TEXTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if len(line) > 200][:number]


def save_tiny_teacher(folder: Path) -> Path:
    """Save a random Transformer of the Llama family with a tokenizer, in place of SmolLM2-135M."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "initializer_range": 0.3}  # large enough weights that attention matters
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    _save_byte_tokenizer(folder)
    return folder


def save_tiny_model(folder: Path) -> Path:
    """Save a random Mamba-2 with a tokenizer, in place of a model of yours."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "state_size": 16, "eos_token_id": 0}
    config = AutoConfig.for_model("zoo_mamba2", vocab_size=VOCABULARY, **sizes)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    _save_byte_tokenizer(folder)
    return folder


def save_tiny_mamba(folder: Path) -> Path:
    """Save a random Mamba of transformers' own class with a tokenizer, in place of state-spaces/mamba-130m-hf."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    _save_byte_tokenizer(folder)
    return folder


def save_tiny_student(folder: Path) -> Path:
    """Save an untrained student of a random Transformer with its tokenizer, in place of a distilled one."""
    from ssm_zoo.distill.recipe import StudentSpec
    from ssm_zoo.distill.student import build_student
    from ssm_zoo.distill.teacher import load_teacher

    teacher = load_teacher(save_tiny_teacher(folder.parent / "tiny-teacher"))
    build_student(teacher, StudentSpec(half_life=(4.0, 64.0)), layers=[1, 3]).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


def _save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are an end-of-text mark and the 256 bytes: no text is unknown to it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(folder)
