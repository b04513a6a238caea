"""A tokenizer whose tokens are the 256 bytes: that of MambaByte (arXiv 2401.13660), which comes without one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: the id of a token is the value of the byte, nothing is added."""
    backend = Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def _byte_letters() -> dict[str, int]:
    """The letter that the tokenizers library writes for each byte, with the byte.

    A byte that is a visible character of Latin-1 is that character; the others are, in order, those from U+0100 on.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte if byte in visible else 0x100 + others.index(byte)): byte for byte in range(256)}
