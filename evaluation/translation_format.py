"""The sequences of ids that a translating model reads and writes, the same in training and in evaluation.

Decoder-only: `source SEP` is the prompt, `target EOS` follows (arXiv 2407.05489). Encoder-decoder: the encoder reads
`source EOS`, the decoder writes `target EOS` after its start token. A tokenizer that puts a beginning-of-text token
before every text puts it before the source here, too. Texts are encoded without special tokens, so a text that
contains the name of one, e.g. "</s>", is read letter by letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not a target."""


@dataclass(frozen=True)
class TranslationFormat:
    """Conversion of texts to token ids.

    Attributes:
        tokenizer: the model's tokenizer.
        is_encoder_decoder: whether source and target are two sequences.
        before: ids before every source, e.g. a beginning-of-text token.
        after: id after every source: the separator, or the end-of-text token for an encoder-decoder.
        end: id after every target.
        padding: id of padding, which has no effect on results.
        start: id that an encoder-decoder's decoder reads first; None otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool
    before: tuple[int, ...]
    after: int
    end: int
    padding: int
    start: int | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text alone."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded: Any = self.tokenizer(list(texts), **options)["input_ids"] if texts else []
        return encoded

    def prompt(self, source: Sequence[int]) -> list[int]:
        """Return the ids from which a model translates a source."""
        return [*self.before, *source, self.after]

    def example(self, source: Sequence[int], target: Sequence[int], *, ends: bool = True) -> tuple[Tensor, Tensor]:
        """Return the ids and the labels of a pair.

        Args:
            source: ids of the source.
            target: ids of the target.
            ends: the target ends here; False if it was cut, so that the model does not learn to stop there.

        Returns:
            Two (length,) int32 tensors. Decoder-only: the whole sequence, and for each of its tokens the id if it
            belongs to the target or is its end, otherwise -100; the model shifts them, so the first token of the target
            is predicted from the separator. Encoder-decoder: what the encoder reads, and what the decoder writes.
        """
        prompt, written = self.prompt(source), [*target, self.end] if ends else list(target)
        if self.is_encoder_decoder:
            return torch.tensor(prompt, dtype=torch.int32), torch.tensor(written, dtype=torch.int32)
        labels = [IGNORED] * len(prompt) + written
        return torch.tensor(prompt + written, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32)

    def longest(self, most: int) -> int:
        """Return the number of ids of a pair with `most` tokens a side: its sequence, or the longer of its two."""
        return len(self.before) + 1 + (most if self.is_encoder_decoder else 2 * most + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens and without surrounding white space."""
        text: Any = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()


def translation_format(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str = "model"
) -> TranslationFormat:
    """Return the format of a model's sequences.

    Args:
        tokenizer: the model's tokenizer. For a decoder-only model its `sep_token` stands between source and target.
        config: the model's configuration.
        name: what errors call the model.

    Raises:
        ValueError: if the tokenizer lacks an end-of-text token or a separator that is needed, or the configuration a
            start token.
    """
    end, separator = tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)
    if not isinstance(end, int):
        raise ValueError(f"{name}: the tokenizer must have an `eos_token`, which ends a translation, got none.")
    both = bool(config.is_encoder_decoder)
    if not both and (not isinstance(separator, int) or separator == end):
        problem = "none" if separator is None else "its `eos_token`"
        raise ValueError(
            f"{name}: the tokenizer must have a `sep_token` between source and target, got {problem}. Train the model "
            "with `ssm-zoo finetune translate`, which saves one with it."
        )
    start = None
    if both:
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        if not isinstance(start, int):
            raise ValueError(f"{name}: `decoder_start_token_id` or `bos_token_id` must be configured, got None.")
    padding = tokenizer.pad_token_id
    return TranslationFormat(
        tokenizer,
        both,
        () if both else _before(tokenizer),
        end if both else int(separator or 0),
        end,
        padding if isinstance(padding, int) else end,
        start,
    )


def _before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the beginning-of-text token if the tokenizer puts it before texts."""
    start = tokenizer.bos_token_id
    encoded: Any = tokenizer("a", verbose=False)["input_ids"]
    return (start,) if isinstance(start, int) and encoded[:1] == [start] else ()


@dataclass(frozen=True)
class TranslationCollator:
    """Collator of prompts and references for evaluation: prompts end where generation begins.

    Attributes:
        padding: id of padding in prompts.
        is_encoder_decoder: pad the prompts on the right, as an encoder reads them; otherwise on the left.
    """

    padding: int
    is_encoder_decoder: bool = False

    def __call__(self, prompts: Sequence[Sequence[int]], references: Sequence[Sequence[int]] = ()) -> dict[str, Tensor]:
        """Return the padded tensors of a batch.

        Args:
            prompts: ids of each prompt.
            references: ids of each reference, as many as there are prompts; empty if there are none.

        Returns:
            "input_ids" and "attention_mask" (B, L), and, if there are references, "labels" (B, L'), padded on the right
            with -100.
        """
        if references and len(references) != len(prompts):
            raise ValueError(f"`references` must be as many as `prompts`, {len(prompts)}, got {len(references)}.")
        longest = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            fill, ones = [self.padding] * (longest - len(prompt)), [1] * len(prompt)
            zeros = [0] * len(fill)
            ids.append([*prompt, *fill] if self.is_encoder_decoder else [*fill, *prompt])
            mask.append(ones + zeros if self.is_encoder_decoder else zeros + ones)
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if references:
            width = max(map(len, references))
            batch["labels"] = torch.tensor([[*each, *[IGNORED] * (width - len(each))] for each in references])
        return batch
