"""Turn texts into token windows. There is no state: the recipe alone determines the tokens that step n reads.

Symbols: B batch (sequences per step over all processes), L sequence length, W windows in the text.

A text becomes one row of token ids, cut into W windows of L tokens; the remainder at the end is not read. Step n reads
the windows at positions n B ... n B + B - 1 of an endless sequence of random permutations of the windows. Resuming
needs only the step number, and any number of processes reads the same global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..harness.text_files import read_text_file
from ..training.conversations import Example, encode_examples, read_examples
from ..training.packing import IGNORED
from ..training.sources import BUILTIN, DATASETS, ROW_FILES, builtin_text, read_rows, text_at

_PIECE_CHARACTERS = 64 * 1024
_CUT_TRIES = 16
_CUT_CONTEXT = 200


def read_texts(sources: str | Sequence[str], split: Literal["train", "heldout"]) -> list[str]:
    """Read the texts that a recipe's `data.train` or `data.heldout` names.

    Args:
        sources: paths of UTF-8 text files, whatever their suffix; of `.jsonl` and `.parquet` files, and
            "datasets:PATH,SPLIT" or "datasets:PATH,CONFIG,SPLIT", whose rows have a field "text"; or "builtin:NAME"
            for a text that ships with the package.
        split: which part of a built-in text to take.

    Returns:
        One text for every text file and for every row that is not blank, with "\\n" as line ends.

    Raises:
        ValueError: naming the first source that is missing, is not a file, is malformed or is empty.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise ValueError(f"`data.{split}` must name one or more text files or 'builtin:NAME', got no source.")
    return [text for name in names for text in _read(name, split)]


def _read(name: str, split: str) -> list[str]:
    field = f"data.{split}"
    if name.startswith(DATASETS) or Path(name).suffix in ROW_FILES:
        texts = [text_at(row, "text", place) for place, row in read_rows(name, field)]
    else:
        texts = [builtin_text(name, split, field) if name.startswith(BUILTIN) else read_text_file(name, field)]
    found = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts if text.strip()]
    if not found:
        raise ValueError(f"{field}: {name!r} has no text.")
    return found


def read_conversations(sources: str | Sequence[str], split: Literal["train", "heldout"], kind: str) -> list[Example]:
    """Read conversations, or prompts with completions, that a recipe's `data.train` or `data.heldout` names.

    Args:
        sources: `.jsonl` and `.parquet` files and data sets.
        split: the field, for errors.
        kind: content of the rows, "messages" or "prompt_completion".

    Raises:
        ValueError: naming source, row and field of the first mistake.
    """
    return read_examples([sources] if isinstance(sources, str) else list(sources), f"data.{split}", kind)


def token_windows(
    rows: Sequence[str] | Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> TokenWindows:
    """Turn texts, or conversations, into a row of token ids that is read in windows.

    Raises:
        ValueError: if the tokenizer's chat template does not work with a conversation.
    """
    examples = [row for row in rows if isinstance(row, Example)]
    if not examples:
        return TokenWindows(tokenize([row for row in rows if isinstance(row, str)], tokenizer, progress=progress))
    documents = encode_examples(examples, tokenizer, progress=progress, owner="teacher")
    # The first token of a document does not follow from the document before it.
    learnt = [F.pad(labels[1:] != IGNORED, (1, 0), value=False) for _, labels in documents]
    return TokenWindows(torch.cat([ids for ids, _ in documents]), torch.cat(learnt))


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> Tensor:
    """Turn texts into one row of token ids, with an end-of-sequence token between texts if the tokenizer has one.

    Long texts are tokenised in pieces, to show the progress and react to an interrupt. They are cut only where the ids
    do not change. A tokenizer that marks the start of its input (SentencePiece's "▁") gets the whole text at once.

    Args:
        texts: the texts, in order.
        tokenizer: the teacher's tokenizer; it adds no special tokens.
        progress: show a progress bar.

    Returns:
        (tokens,) int64 ids.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    with tqdm(total=sum(map(len, texts)), desc="tokenising", unit="char", unit_scale=True, disable=not progress) as bar:
        for index, text in enumerate(texts):
            if index > 0 and isinstance(eos, int):
                ids.append(eos)
            for piece in _pieces(text, tokenizer):
                ids += _encode(piece, tokenizer)
                bar.update(len(piece))
    return torch.tensor(ids, dtype=torch.long)


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Cut a text into pieces of at least `_PIECE_CHARACTERS` (except the last) that give the ids of the whole text."""
    start = 0
    while (cut := _harmless_cut(text, start + _PIECE_CHARACTERS, tokenizer)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:]


def _harmless_cut(text: str, earliest: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find a line break from `earliest` on after which the text can be cut; None if none of the next ones works.

    Not every line break is a token boundary: a blank line, or a full stop and a line break, can be one token. The text
    around a line break is therefore tokenised as a whole and in two parts, and compared.
    """
    cut = earliest
    for _ in range(_CUT_TRIES):
        cut = text.find("\n", cut) + 1
        if cut in (0, len(text)):
            return None
        before, after = text[max(cut - _CUT_CONTEXT, 0) : cut], text[cut : cut + _CUT_CONTEXT]
        if _encode(before + after, tokenizer) == _encode(before, tokenizer) + _encode(after, tokenizer):
            return cut
    return None


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: the text is expected to be longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Check that the model has an embedding for every id of the tokenizer.

    More embeddings than tokens are common (padding to a multiple) and accepted.

    Raises:
        ValueError: naming the largest id and the model's vocabulary size.
    """
    vocab_size: Any = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: the token {token!r} has id {largest}, but the model's vocab_size is {vocab_size} (ids up "
            f"to {vocab_size - 1}). Use the tokenizer that belongs to the model."
        )


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all numbers.

    It is a hash, because seeds that differ by one can start similar streams in simple generators.
    """
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def repeat_a_passage(window: Tensor, seed: int) -> Tensor:
    """Return a window in which a passage stands twice: part of the text is overwritten by an earlier part.

    The passage has between 1/32 and 1/8 of the window's tokens. Its place and that of the repetition, behind it, are
    drawn from all that fit. Windows of fewer than 8 tokens have no room and remain as they are.

    Args:
        window: (L) tokens, or what there is for each token.
        seed: seed of length and places, which are the same for all windows of a length.
    """
    length = len(window)
    if length < 8:
        return window
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens = draw(max(length // 32, 1), length // 8)
    start = draw(0, length - 2 * tokens)
    place = draw(start + tokens, length - tokens)
    window = window.clone()
    window[place : place + tokens] = window[start : start + tokens]
    return window


class TokenWindows:
    """A row of token ids that is read in windows.

    Args:
        ids: (tokens,) integers from 0 to 2^31 - 1.
        learnt: (tokens,) bool, the tokens that logit distillation learns to predict, at least one; None: all.

    Raises:
        ValueError: if `ids` is not as described.
    """

    def __init__(self, ids: Tensor, learnt: Tensor | None = None) -> None:
        if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"`ids` must be (tokens,) integers, got shape {tuple(ids.shape)} of {ids.dtype}.")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 2**31):
            raise ValueError(f"`ids` must be from 0 to 2^31 - 1, got {int(ids.min())} to {int(ids.max())}.")
        # A private copy in half the memory; windows are returned as int64.
        self._ids = ids.detach().to("cpu", torch.int32, copy=True).contiguous()
        self._learnt = learnt
        self._permutation: tuple[tuple[int, int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def learnt_share(self) -> float | None:
        """Share of the tokens that are learnt; None: there is no choice."""
        return None if self._learnt is None else float(self._learnt.double().mean())

    def count(self, sequence_length: int) -> int:
        """Return W, the number of whole windows.

        Raises:
            ValueError: if there is none.
        """
        if sequence_length < 1:
            raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}.")
        if len(self) < sequence_length:
            raise ValueError(
                f"the text has {len(self)} tokens, fewer than one window of sequence_length = {sequence_length}; "
                "give more text or a shorter sequence_length"
            )
        return len(self) // sequence_length

    def windows(self, sequence_length: int) -> Tensor:
        """Return all whole windows in the order of the text, (W, L) int64."""
        count = self.count(sequence_length)
        return self._ids[: count * sequence_length].view(count, sequence_length).long()

    def batch(self, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
        """Return the windows that a step reads, which depend only on the arguments and the ids.

        Args:
            step: number of the step, from 0.
            batch_size: number of windows, B; if it exceeds W, windows repeat within a step.
            sequence_length: length of the windows, L.
            seed: seed of the permutations, at least 0.

        Returns:
            (B, L) int64 ids.

        Raises:
            ValueError: if there is no whole window, or an argument is too small.
        """
        for field, value, low in (("step", step, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < low:
                raise ValueError(f"`{field}` must be at least {low}, got {value}.")
        positions = range(step * batch_size, (step + 1) * batch_size)
        return torch.stack([self.window(position, sequence_length, seed) for position in positions])

    def window(self, position: int, sequence_length: int, seed: int) -> Tensor:
        """Return the (L) int64 ids of a window, by its position from 0 in the endless sequence of shuffled windows."""
        start = self._start(position, sequence_length, seed)
        return self._ids[start : start + sequence_length].long()

    def learnt(self, position: int, sequence_length: int, seed: int) -> Tensor | None:
        """Return (L) bool, which tokens of the window of :meth:`window` are learnt; None: there is no choice."""
        if self._learnt is None:
            return None
        start = self._start(position, sequence_length, seed)
        return self._learnt[start : start + sequence_length]

    def _start(self, position: int, sequence_length: int, seed: int) -> int:
        count = self.count(sequence_length)
        epoch, place = divmod(position, count)
        return int(self._shuffled(count, epoch, seed)[place]) * sequence_length

    def _shuffled(self, count: int, epoch: int, seed: int) -> Tensor:
        """Return the (W,) order of the windows in an epoch. The last one is cached."""
        key = (count, epoch, seed)
        if self._permutation is None or self._permutation[0] != key:
            generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
            self._permutation = (key, torch.randperm(count, generator=generator))
        return self._permutation[1]

    def fingerprint(self) -> str:
        """Return the SHA-256 in hexadecimal of the ids and of the choice of learnt ones; a resumed run checks it."""
        digest = hashlib.sha256()
        for part in self._ids.split(1 << 20):
            digest.update(part.numpy().astype("<i4").tobytes())
        if self._learnt is not None:
            digest.update(self._learnt.numpy().tobytes())
        return digest.hexdigest()
