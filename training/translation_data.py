"""Rows of a training to translate: pairs become ids and labels, packed or in padded rows of similar length."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from ..evaluation.translation_format import TranslationFormat
from .packing import IGNORED, Document, PackedDocuments, Row, first_fit_decreasing
from .parallel_text import ParallelText
from .texts import check_ids, fingerprint
from .translation_settings import TranslationSettings

# Batches among which rows are sorted by length: enough to fill each with similar ones, few enough to keep them random.
_POOL = 50


@dataclass(frozen=True)
class TranslationRows:
    """The rows of one text.

    Attributes:
        rows: to train on, or to measure the loss on.
        counts: "pairs" in the rows; "dropped" and "cut", pairs with a side that was too long; "source_tokens" and
            "target_tokens", the means of the pairs in the rows.
        fingerprint: SHA-256 of ids and labels.
    """

    rows: "PackedDocuments | PackedPairs"
    counts: dict[str, Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)


class PackedPairs(Dataset):
    """Rows for an encoder-decoder, packed in advance, for :class:`PackedPairCollator`.

    Args:
        documents: (length,) ids that the encoder reads and (length',) labels that the decoder predicts, of each pair.
        budget: maximum number of tokens of a row on either side, at least that of every pair.
        packing: False puts every pair into its own row.

    Attributes:
        tokens: number of ids and labels.
        targets: number of labels, all of which are predicted.
        longest: numbers of ids and of labels of the pairs that have most of them.
    """

    def __init__(self, documents: Sequence[Document], budget: int, *, packing: bool) -> None:
        longest = [max(len(ids), len(labels)) for ids, labels in documents]
        bins = first_fit_decreasing(longest, budget) if packing else [[index] for index in range(len(documents))]
        self._rows = [[documents[index] for index in items] for items in bins]
        self.tokens = sum(len(ids) + len(labels) for ids, labels in documents)
        self.targets = sum(len(labels) for _, labels in documents)
        self.longest = max(len(ids) for ids, _ in documents), max(len(labels) for _, labels in documents)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """(length,) "input_ids" and "seq_idx", (length',) "labels" and "decoder_seq_idx" of a row, not yet padded."""
        ids, labels = zip(*self._rows[index], strict=True)
        return {
            "input_ids": torch.cat(ids).long(),
            "seq_idx": _numbers(ids),
            "labels": torch.cat(labels).long(),
            "decoder_seq_idx": _numbers(labels),
        }


def _numbers(parts: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([len(part) for part in parts])
    return torch.arange(len(parts), dtype=torch.int32).repeat_interleave(lengths)


@dataclass(frozen=True)
class PackedPairCollator:
    """Collator that stacks rows of :class:`PackedPairs`, padded on the right to the longest of them.

    Attributes:
        pad_token_id: token of the padding, which has no effect on the results.
        start: token from which the decoder predicts the first label of a pair.
    """

    pad_token_id: int
    start: int

    def __call__(self, rows: Sequence[Row]) -> Row:
        """(B, L) "input_ids" and "seq_idx"; (B, L') "labels", "decoder_input_ids" and "decoder_seq_idx".

        The decoder's input is the start token and the labels without the last, of each pair.
        """
        fill = {"input_ids": self.pad_token_id, "seq_idx": -1, "labels": IGNORED, "decoder_seq_idx": -1}
        batch = {
            key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
            for key, value in fill.items()
        }
        numbers, decoder = batch["decoder_seq_idx"], F.pad(batch["labels"][:, :-1], (1, 0), value=self.start)
        decoder[:, 1:] = decoder[:, 1:].masked_fill(numbers[:, 1:] != numbers[:, :-1], self.start)
        return {**batch, "decoder_input_ids": decoder.masked_fill(numbers < 0, self.pad_token_id)}


class LengthBuckets(Sampler[int]):
    """Rows in a random order in which those of one batch have similar lengths.

    An epoch's order depends on the seed and the number of the epoch alone, so a resumed run continues it, if
    :class:`EpochOfRows` tells the epoch.

    Args:
        lengths: of the rows.
        batch: rows of a batch, of all processes.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        # Not the sum of both, by which epoch 1 of seed 0 would be epoch 0 of seed 1.
        draw = random.Random(f"{self._seed}/{self._epoch}/rows")
        order = list(range(len(self._lengths)))
        draw.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL * self._batch):
            pool = sorted(order[start : start + _POOL * self._batch], key=lambda index: -self._lengths[index])
            batches += [pool[first : first + self._batch] for first in range(0, len(pool), self._batch)]
        # A batch that is not full comes last, where the loader expects it.
        last = [batches.pop()] if batches and len(batches[-1]) < self._batch else []
        draw.shuffle(batches)
        for batch in [*batches, *last]:
            yield from batch


class EpochOfRows(TrainerCallback):
    """Tells the order of the rows which epoch begins, also when a run is resumed.

    In several processes accelerate nests the samplers of a resumed epoch so that the Trainer does not reach the order.

    Args:
        order: order of the rows of a training.
    """

    def __init__(self, order: LengthBuckets) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        # Not `state.epoch`, which counts by the processes of the checkpoint.
        steps = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
        self._order.set_epoch(state.global_step // steps)


def make_translation_rows(
    pairs: ParallelText, form: TranslationFormat, settings: TranslationSettings, vocab_size: int, field: str
) -> TranslationRows:
    """Tokenise pairs and put them into rows.

    Args:
        pairs: the texts.
        form: how texts become ids.
        settings: limits, and whether to pack.
        vocab_size: size of the model's vocabulary.
        field: name of the setting, for errors.

    Raises:
        ValueError: if a text has no tokens, or contains the separator or the end; if the model has no embedding for a
            token; or if no pair is short enough.
    """
    sides = form.encode(pairs.sources), form.encode(pairs.targets)
    marks = {form.after, form.end}
    for texts, encoded in zip((pairs.sources, pairs.targets), sides, strict=True):
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise ValueError(f"{field}: the tokenizer has no token for the text {text!r:.80}.")
            if marks & set(ids):
                mark: Any = form.tokenizer.convert_ids_to_tokens((marks & set(ids)).pop())
                raise ValueError(
                    f"{field}: the text {text!r:.80} contains {mark!r}, which separates or ends texts. Give another "
                    "`separator`, or leave the text out."
                )
    documents: list[Document] = []
    lengths: list[tuple[int, int]] = []
    dropped = cut = 0
    most = settings.max_tokens
    for source, target in zip(*sides, strict=True):
        if long := max(len(source), len(target)) > most:
            if settings.overlong == "drop":
                dropped += 1
                continue
            cut += 1
        ends = not long or len(target) <= most
        documents.append(form.example(source[:most], target[:most], ends=ends))
        lengths.append((min(len(source), most), min(len(target), most)))
    if not documents:
        raise ValueError(
            f"{field}: every pair has a side of more than {most} tokens. Raise `max_tokens`, or set `overlong` to "
            "'truncate'."
        )
    check_ids((max(int(ids.max()), int(labels.max())) for ids, labels in documents), vocab_size)
    # Without packing a row is as long as its pair.
    budget = settings.row_tokens if settings.packing else max(len(ids) for ids, _ in documents)
    kind = PackedPairs if form.is_encoder_decoder else PackedDocuments
    rows = kind(documents, budget, packing=settings.packing)
    means = [sum(side) / len(side) for side in zip(*lengths, strict=True)]
    counts = {"pairs": len(documents), "dropped": dropped, "cut": cut}
    counts |= {"source_tokens": means[0], "target_tokens": means[1]}
    return TranslationRows(rows, counts, fingerprint(documents))
