"""Texts to token windows, without state: which tokens step n reads follows from the recipe alone.

Symbols: B batch (sequences per step over all processes), L sequence length, W windows in the text.

A text becomes one row of token ids, cut into W windows of L tokens (what is left over at the end is not read).
Step n reads the windows at positions n B ... n B + B - 1 of an endless sequence: one random permutation of the
windows after another. Resuming needs no more than the step number, and any number of processes reads the same
global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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
        One text per source, of rows one per row that is not blank, line ends as "\\n", without a byte order mark.

    Raises:
        ValueError: naming the first source that is missing, is not a file, is malformed or is empty.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise ValueError(f"data.{split}: got no source; accepted: one or more text files or 'builtin:NAME'")
    return [text for name in names for text in _read(name, split)]


def _read(name: str, split: str) -> list[str]:
    if not name.startswith(DATASETS) and Path(name).suffix not in ROW_FILES:
        return [_read_text(name, split)]
    texts = [text_at(row, "text", place) for place, row in read_rows(name, f"data.{split}")]
    found = [_plain_line_ends(text) for text in texts if text.strip()]
    if not found:
        raise ValueError(f"data.{split}: {name!r} holds no text")
    return found


def _read_text(name: str, split: str) -> str:
    if name.startswith(BUILTIN):
        return builtin_text(name, split, f"data.{split}")
    if Path(name).is_file():
        data = Path(name).read_bytes()
    else:
        problem = "is not a file" if Path(name).exists() else "does not exist"
        raise ValueError(f"data.{split}: {name!r} {problem}; accepted: UTF-8 text files or 'builtin:NAME'")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start}: {error.reason}"
        raise ValueError(f"data.{split}: {name!r} is not UTF-8 text ({problem})") from None
    if not text.strip():
        raise ValueError(f"data.{split}: {name!r} holds no text")
    return _plain_line_ends(text)


def _plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> Tensor:
    """Turn texts into one row of token ids, an end-of-sequence token between two texts if the tokenizer has one.

    Each text is given to the tokenizer in pieces, so that the progress shows and an interrupt is obeyed, cut where
    that leaves the ids as they are. A tokenizer that marks the start of whatever it is given (SentencePiece's "▁")
    allows no cut and gets the whole text at once.

    Args:
        texts: the texts, in order.
        tokenizer: the teacher's. No special tokens of its own are added.
        progress: show a progress bar; off on all processes but the first.

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
    """Cut a text into pieces of at least `_PIECE_CHARACTERS` (but the last) that give the ids of the whole."""
    start = 0
    while (cut := _harmless_cut(text, start + _PIECE_CHARACTERS, tokenizer)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:]


def _harmless_cut(text: str, earliest: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find a line break from `earliest` on after which the text can be cut; None if none of the next ones will do.

    Which line breaks are token boundaries depends on the tokenizer: a blank line, or a full stop and a line break,
    can be one token. So the neighbourhood of each is tokenised whole and in two.
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
    # verbose: off, since the text is meant to be longer than what the model reads at once.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    A model with more embeddings than the tokenizer has tokens is common (padding to a multiple) and fine.

    Raises:
        ValueError: naming the largest id and the model's vocabulary size.
    """
    vocab_size: Any = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: the token {token!r} has id {largest}, but the model's vocab_size is {vocab_size} (ids up "
            f"to {vocab_size - 1}); the tokenizer and the model do not belong together"
        )


class TokenWindows:
    """A row of token ids that is read in windows.

    Args:
        ids: (tokens,) integers of 0 or more, below 2^31.

    Raises:
        ValueError: if `ids` is anything else.
    """

    def __init__(self, ids: Tensor) -> None:
        if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"ids: got shape {tuple(ids.shape)} of {ids.dtype}; accepted: (tokens,) integers")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 2**31):
            raise ValueError(f"ids: got values from {int(ids.min())} to {int(ids.max())}; accepted: 0 to 2^31 - 1")
        # A copy, so that nobody else changes it, in half the memory; what is handed out is int64.
        self._ids = ids.detach().to("cpu", torch.int32, copy=True).contiguous()
        self._permutation: tuple[tuple[int, int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def count(self, sequence_length: int) -> int:
        """W, the number of whole windows.

        Raises:
            ValueError: if there is none.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length: got {sequence_length}; accepted: 1 or more")
        if len(self) < sequence_length:
            raise ValueError(
                f"the text has {len(self)} tokens, fewer than one window of sequence_length = {sequence_length}; "
                "give more text or a shorter sequence_length"
            )
        return len(self) // sequence_length

    def windows(self, sequence_length: int) -> Tensor:
        """(W, L) int64: all whole windows in the order of the text."""
        count = self.count(sequence_length)
        return self._ids[: count * sequence_length].view(count, sequence_length).long()

    def batch(self, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
        """The windows that a step reads: a function of the arguments and the ids alone.

        Args:
            step: number of the step, from 0.
            batch_size: B; may exceed W, then windows repeat within a step.
            sequence_length: L.
            seed: of the permutations, from 0.

        Returns:
            (B, L) int64 ids.

        Raises:
            ValueError: if there is no whole window, or a number is below its range.
        """
        for field, value, low in (("step", step, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < low:
                raise ValueError(f"{field}: got {value}; accepted: {low} or more")
        positions = range(step * batch_size, (step + 1) * batch_size)
        return torch.stack([self.window(position, sequence_length, seed) for position in positions])

    def window(self, position: int, sequence_length: int, seed: int) -> Tensor:
        """Return the (L) int64 ids of a window in the endless sequence of shuffled ones, from 0."""
        count = self.count(sequence_length)
        epoch, place = divmod(position, count)
        start = int(self._shuffled(count, epoch, seed)[place]) * sequence_length
        return self._ids[start : start + sequence_length].long()

    def _shuffled(self, count: int, epoch: int, seed: int) -> Tensor:
        """(W,) order of the windows in an epoch. The last one is kept: it saves time and changes nothing."""
        key = (count, epoch, seed)
        if self._permutation is None or self._permutation[0] != key:
            # A hash, because seeds that differ by one can start similar streams in simple generators.
            digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._permutation = (key, torch.randperm(count, generator=generator))
        return self._permutation[1]

    def fingerprint(self) -> str:
        """SHA-256 of the ids, in hexadecimal. A checkpoint holds it, so that a run goes on with its own data."""
        digest = hashlib.sha256()
        for part in self._ids.split(1 << 20):
            digest.update(part.numpy().astype("<i4").tobytes())
        return digest.hexdigest()
