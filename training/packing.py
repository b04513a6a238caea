"""Documents of different lengths in rows without padding between them (PackMamba, arXiv 2408.03865).

A packed row gives the same results as its documents one by one: the models reset their state wherever `seq_idx`
changes, and the first token of a document is never a target. A batch of B rows with L tokens has

    input_ids     (B, L) token ids
    labels        (B, L) the same ids, -100 at the first token of each document and at padding
    seq_idx       (B, L) number of the document in its row, -1 at padding
    position_ids  (B, L) position in the document, 0 at padding

and where its rows have them

    prefix_mask   (B, L) 1 at the tokens of an input that is read in both directions, 0 elsewhere
    objective     (B, L) number of the training objective of each token, -1 at padding

A document longer than a row is cut into pieces of whole rows. Each piece begins with the last token of the one before,
as input only, so that every token but the document's first is a target exactly once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..evaluation.translation_format import IGNORED

Row = dict[str, Tensor]
Document = tuple[Tensor, Tensor]
"""Token ids and labels, which are the ids where a token is a target."""


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins: the longest first, each into the first bin that still has room for it.

    At most 11/9 of the fewest possible bins and one more (Dosa 2007). O(n log n): a tree of maxima finds the bin.

    Args:
        lengths: of the items, 0 to `capacity`.
        capacity: of a bin.

    Returns:
        The items' indices for each bin, in the order in which they were put there; no bin is empty.

    Raises:
        ValueError: if an item is longer than a bin.
    """
    if any(not 0 <= length <= capacity for length in lengths):
        raise ValueError(f"`lengths` must be from 0 to {capacity}, got {min(lengths)} to {max(lengths)}.")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    # Node i has the children 2 i and 2 i + 1; the leaves are the room in the bins, which are all there from the start.
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = [[] for _ in lengths]
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[item] else 2 * node + 1
        bins[node - leaves].append(item)
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [items for items in bins if items]


@dataclass(frozen=True)
class PackingCollator:
    """Collator for transformers' Trainer that packs the documents of a batch.

    An item is a mapping with "input_ids" and, if not every token is a target, "labels", both (length,) lists or
    tensors. Other entries are ignored, so it does not matter whether the Trainer removes unused columns. Items without
    tokens are skipped.

    Attributes:
        budget: tokens of a row, at least 2: documents are packed into as many rows as first-fit-decreasing needs, and
            longer ones are cut. None: one row with all documents and no padding.
        pad_token_id: token of the padding, which has no effect on the results.

    Raises:
        ValueError: if `budget` is below 2, an item's labels are not as long as its ids, or no item has a token.
    """

    budget: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Row:
        """(B, L) tensors as described in this file; L is the budget, or the number of tokens."""
        documents = [document for document in map(_document, items) if len(document[0])]
        if not documents:
            raise ValueError(f"`items` must have at least one token, got {len(items)} items without tokens.")
        if self.budget is None:
            return pad_rows([_row(documents)], None, self.pad_token_id)
        pieces = [piece for document in documents for piece in _pieces(document, self.budget)]
        return pad_rows([_row(group) for group in _pack(pieces, self.budget)], self.budget, self.pad_token_id)


class PackedDocuments(Dataset):
    """Dataset of rows packed in advance, for :class:`RowCollator`.

    Packing all documents at once wastes less space than packing batch by batch, and the number of rows, and so of
    steps, is known. The Trainer's sampler shuffles the rows by its seed and resumes in that order. The documents of a
    row have similar lengths, so a step should read several rows.

    Args:
        documents: (length,) integer token ids of each, or ids and labels if not every token is a target. Documents and
            pieces without a target are skipped.
        budget: maximum number of tokens of a row, at least 2. Longer documents are cut.
        packing: False puts every document, or piece of a document, into its own row.

    Attributes:
        tokens: number of tokens in all rows.
        targets: number of tokens that are predicted.
        longest: number of tokens of the longest document, or piece of one.

    Raises:
        ValueError: if `budget` is below 2, or nothing is left to predict.
    """

    def __init__(self, documents: Sequence[Tensor | Document], budget: int, *, packing: bool = True) -> None:
        _check_budget(budget)
        pairs = [(part, part) if isinstance(part, Tensor) else part for part in documents]
        pieces = [piece for pair in pairs if len(pair[0]) > 1 for piece in _pieces(pair, budget)]
        targets = [int((labels[1:] != IGNORED).sum()) for _, labels in pieces]
        pieces = [piece for piece, number in zip(pieces, targets, strict=True) if number]
        if not pieces:
            raise ValueError(f"One of the documents must have two tokens or more, got {len(documents)} shorter ones.")
        self._rows = _pack(pieces, budget) if packing else [[piece] for piece in pieces]
        self.tokens = sum(len(ids) for row in self._rows for ids, _ in row)
        self.targets = sum(targets)
        self.longest = max(len(ids) for ids, _ in pieces)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """(length,) tensors of a row, not yet padded."""
        return _row(self._rows[index])


@dataclass(frozen=True)
class RowCollator:
    """Collator that stacks rows of :class:`PackedDocuments`, padded to the longest of them.

    Attributes:
        pad_token_id: token of the padding, which has no effect on the results.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Row]) -> Row:
        """(B, L) tensors as described in this file."""
        return pad_rows(rows, None, self.pad_token_id)


def pad_rows(rows: Sequence[Row], length: int | None, pad_token_id: int) -> Row:
    """Return (B, L) tensors of rows padded on the right to `length`, or to the longest of them."""
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "seq_idx": -1, "position_ids": 0}
    fill |= {key: value for key, value in {"prefix_mask": 0, "objective": -1}.items() if key in rows[0]}
    length = max(len(row["input_ids"]) for row in rows) if length is None else length
    return {
        key: torch.stack([F.pad(row[key], (0, length - len(row[key])), value=value) for row in rows])
        for key, value in fill.items()
    }


def _check_budget(budget: int | None) -> None:
    if budget is not None and budget < 2:
        raise ValueError(f"`budget` must be at least 2 (a token and its successor), got {budget}.")


def _document(item: Mapping[str, Any]) -> Document:
    ids = torch.as_tensor(item["input_ids"])
    labels = torch.as_tensor(item["labels"]) if "labels" in item else ids
    if ids.dim() != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"`labels` must have the (length,) shape of `input_ids`, got {tuple(labels.shape)} for {tuple(ids.shape)}."
        )
    return ids, labels


def _pieces(document: Document, budget: int) -> list[Document]:
    """Cut a document into pieces of at most `budget` tokens that overlap by one."""
    ids, labels = document
    starts = range(0, max(len(ids) - 1, 1), budget - 1)
    return [(ids[start : start + budget], labels[start : start + budget]) for start in starts]


def _pack(pieces: Sequence[Document], budget: int) -> list[list[Document]]:
    """Distribute pieces over rows."""
    bins = first_fit_decreasing([len(ids) for ids, _ in pieces], budget)
    return [[pieces[index] for index in items] for items in bins]


def _row(documents: Sequence[Document]) -> Row:
    """Concatenate documents into the (length,) tensors of a row."""
    lengths = torch.tensor([len(ids) for ids, _ in documents])
    position = torch.cat([torch.arange(len(ids)) for ids, _ in documents])
    return {
        "input_ids": torch.cat([ids for ids, _ in documents]).long(),
        "labels": torch.cat([labels for _, labels in documents]).long().masked_fill(position == 0, IGNORED),
        "seq_idx": torch.arange(len(documents), dtype=torch.int32).repeat_interleave(lengths),
        "position_ids": position,
    }
