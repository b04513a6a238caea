"""Translate texts with a causal language model or an encoder-decoder: greedily or by beam search, in batches.

    from ssm_zoo.evaluation.translation import translate
    from ssm_zoo.evaluation.translation_format import translation_format

    found = translate(model, translation_format(tokenizer, model.config), ["A text."], beams=5)
    print(found.texts)

The score of a hypothesis is the sum of the log-probabilities of its tokens, its end included, divided by their number
to the power of the length penalty. `transformers` counts the generated tokens alone, also for a decoder-only model,
whose sequences begin with the prompt; with the prompt in the length, all hypotheses of a long source would be divided
by nearly the same number, and the penalty would depend on the source.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .finite_logits import finite_logits
from .hidden_states import evaluating
from .translation_format import TranslationCollator, TranslationFormat

__all__ = ["Translations", "check_decoding", "translate"]


@dataclass(frozen=True)
class Translations:
    """Translations by a model, in the order of the sources.

    Attributes:
        texts: the translations.
        ids: generated ids of each, with the end if there is one.
        finished: whether each has an end; the others hit the limit.
        scores: score of each hypothesis; None for greedy search, or if they were not asked for.
        seconds: time of the generation.
    """

    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    scores: list[float] | None
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of generated tokens."""
        return sum(map(len, self.ids))


def check_decoding(beams: int, length_penalty: float | None, max_new_tokens: int, batch_size: int) -> None:
    """Check the settings of :func:`translate`.

    Raises:
        ValueError: naming the first that is not accepted or has no effect.
    """
    for name, value in (("beams", beams), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if length_penalty is not None:
        if beams == 1:
            raise ValueError(f"`length_penalty` has no effect with one beam, got {length_penalty}.")
        if not -100 <= length_penalty <= 100:
            raise ValueError(f"`length_penalty` must be a number from -100 to 100, got {length_penalty}.")


@torch.no_grad()
def translate(
    model: Any,
    form: TranslationFormat,
    sources: Sequence[str],
    *,
    beams: int = 5,
    length_penalty: float | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    scores: bool = False,
    progress: bool = False,
) -> Translations:
    """Translate texts. The results do not depend on the batches, whose texts have similar lengths.

    Args:
        model: a causal language model or an encoder-decoder, on its device.
        form: how its texts become ids.
        sources: the texts, none of them empty.
        beams: hypotheses that are followed; 1 takes the most likely token each time.
        length_penalty: exponent of the number of generated tokens in a hypothesis' score, 1 if None; only with beams.
        max_new_tokens: number of tokens at which a translation that has no end is cut.
        batch_size: texts in one call of `generate`.
        scores: also return the scores of the hypotheses, which needs the memory of all steps' logits.
        progress: show a progress bar.

    Raises:
        ValueError: if a setting is not accepted, a text has no tokens or is too long for the model, or the model
            computes logits that are not finite.
    """
    check_decoding(beams, length_penalty, max_new_tokens, batch_size)
    prompts = []
    for source, ids in zip(sources, form.encode(sources), strict=True):
        if not ids:
            raise ValueError(f"`sources`: the tokenizer has no token for the text {source!r:.80}.")
        prompts.append(form.prompt(ids))
    _check_lengths(prompts, model.config, max_new_tokens, form.is_encoder_decoder)
    collate = TranslationCollator(form.padding, form.is_encoder_decoder)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    written: dict[int, list[int]] = {}
    found: dict[int, float] = {}
    began = time.perf_counter()
    searching = {} if beams == 1 else {"length_penalty": 1.0 if length_penalty is None else length_penalty}
    with evaluating(model), _generating(model, form, max_new_tokens, num_beams=beams, **searching):
        bar = tqdm(total=len(prompts), desc="translating", unit="text", disable=not progress)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([prompts[index] for index in chosen])
            result = model.generate(
                **{key: tensor.to(model.device) for key, tensor in batch.items()},
                return_dict_in_generate=True,
                output_scores=scores and beams > 1,
            )
            before = 1 if form.is_encoder_decoder else batch["input_ids"].shape[1]
            for index, ids in zip(chosen, result.sequences[:, before:].tolist(), strict=True):
                written[index] = _until(ids, form.end, max_new_tokens)
            if scores and beams > 1:
                found |= dict(zip(chosen, result.sequences_scores.tolist(), strict=True))
            bar.update(len(chosen))
        bar.close()
    seconds = time.perf_counter() - began
    ids = [written[index] for index in range(len(prompts))]
    return Translations(
        texts=[form.decode(each) for each in ids],
        ids=ids,
        finished=[each[-1:] == [form.end] for each in ids],
        scores=[found[index] for index in range(len(prompts))] if found else None,
        seconds=seconds,
    )


def _until(ids: list[int], end: int, most: int) -> list[int]:
    """Return generated ids up to the first end, without the padding of the batch behind it."""
    return ids[: ids.index(end) + 1] if end in ids else ids[:most]


def _check_lengths(prompts: Sequence[Sequence[int]], config: Any, new: int, both: bool) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    needed = max(longest, new) if both else longest + new
    if isinstance(limit, int) and needed > limit and getattr(config, "context_overflow", None) != "window":
        raise ValueError(
            f"`sources` must fit into the max_position_embeddings of the model, {limit:,}, with `max_new_tokens`, got "
            f"{longest:,} tokens and {new:,}."
        )


@contextmanager
def _generating(model: Any, form: TranslationFormat, max_new_tokens: int, **options: Any) -> Iterator[None]:
    """Let a model's `generate` search as it is told, whatever its own generation settings are."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=form.end,
        pad_token_id=form.padding,
        decoder_start_token_id=form.start,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    try:
        with finite_logits(model):
            yield
    finally:
        model.generation_config = own
