"""The tokenizer of a model that is trained from scratch: somebody's, the bytes, or one that is learnt."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..conversion.byte_tokenizer import byte_tokenizer
from ..conversion.load_model import load_tokenizer

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


def load_vocabulary(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; of "bytes" the one whose tokens are the 256 bytes.

    Args:
        source: folder, Hub id or "bytes".
        revision: branch, tag or commit, for a Hub id.
        trust_remote_code: run the code that the source brings.
    """
    if source == BYTES:
        return byte_tokenizer()
    return load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)


def learn_vocabulary(documents: Sequence[str], entries: int, *, progress: bool) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE as GPT-2's: no text is unknown to it. The same texts give the same tokenizer.

    Args:
        documents: the texts.
        entries: of the vocabulary, 257 or more: the end of a text, the bytes, and what is merged of them. There are
            fewer if the texts have no more pairs to merge.
        progress: show a progress bar.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def entries_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a model needs for a tokenizer: its largest id and one. The ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1
