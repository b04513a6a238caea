"""Conversations, and prompts with completions, for training with a loss on the answers only.

A row with `messages` is a conversation, [{"role": "user", "content": "…"}, …], which the tokenizer's chat template
turns into text; the answers are the messages of the role "assistant". A row with `prompt` and `completion` has two
consecutive texts, or two lists of messages; the answer is the completion. A token has a label if its last character is
part of an answer. All other labels are -100.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import IGNORED, Document
from .sources import DATA_SETS, DATASETS, ROW_FILES, read_rows, text_at

Messages = list[dict[str, Any]]
# Found in a template that marks what the model generates.
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_ASSISTANT = "assistant"
_ROLES = ("system", "developer", "user", _ASSISTANT, "tool", "function")
# What a template raises itself, and what a mistake in its expressions raises.
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Example:
    """A checked row.

    Attributes:
        place: source and row number, for errors.
        prompt: prompt of the answer; None for a conversation, where the answers are the assistant's messages.
        completion: the answer, or the whole conversation.
    """

    place: str
    prompt: str | Messages | None
    completion: str | Messages


def read_examples(sources: Sequence[str], field: str, kind: str) -> list[Example]:
    """Read the rows of several sources, in order.

    Args:
        sources: sources that `ssm_zoo.training.sources.read_rows` accepts.
        field: name of the setting, for errors.
        kind: content of the rows, "messages" or "prompt_completion".

    Raises:
        ValueError: naming source, row and field of the first mistake.
    """
    examples = []
    for source in sources:
        found = list(examples_of(source, field, kind))
        if not found:
            raise ValueError(f"{field}: {source!r} has no rows.")
        examples += found
    return examples


def examples_of(source: str, field: str, kind: str) -> Iterator[Example]:
    """Yield the rows of one source; arguments and errors as for :func:`read_examples`."""
    if not source.startswith(DATASETS) and Path(source).suffix not in ROW_FILES:
        raise ValueError(
            f"`{field}` must be a .jsonl or .parquet file, {DATA_SETS}, with examples {kind!r}, got {source!r}."
        )
    return (example_of(row, place, kind) for place, row in read_rows(source, field))


def example_of(row: Mapping[str, Any], place: str, kind: str) -> Example:
    """Check a row; arguments and errors as for :func:`read_examples`."""
    if kind == "messages":
        return Example(place, None, _messages(row, "messages", place, answered=True))
    if isinstance(row.get("prompt"), list):
        return Example(place, _messages(row, "prompt", place), _messages(row, "completion", place, answered=True))
    prompt, completion = (text_at(row, key, place) for key in ("prompt", "completion"))
    if not completion:
        raise ValueError(f"{place}: `completion` must not be empty.")
    return Example(place, prompt, completion)


def _messages(row: Mapping[str, Any], key: str, place: str, *, answered: bool = False) -> Messages:
    messages = row.get(key)
    if key not in row:
        raise ValueError(f"{place}: `{key}` is missing; the row has {', '.join(map(repr, row)) or 'no field'}.")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: `{key}` must be a non-empty list of messages, got {messages!r:.80}.")
    kept = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{place}: `{key}.{index}` must be an object, got {message!r:.80}.")
        # In a parquet file, a field that only other messages have is null.
        message = {name: value for name, value in message.items() if value is not None}
        for name in ("role", "content"):
            if name not in message and not (name == "content" and "tool_calls" in message):
                raise ValueError(f"{place}: `{key}.{index}.{name}` is missing.")
            if name in message and not isinstance(message[name], str):
                raise ValueError(f"{place}: `{key}.{index}.{name}` must be a text, got {message[name]!r:.80}.")
        if message["role"] == _ASSISTANT and not message.get("content") and not message.get("tool_calls"):
            raise ValueError(f"{place}: `{key}.{index}.content` must not be empty in an answer.")
        kept.append(message)
    if answered and not any(message["role"] == _ASSISTANT for message in kept):
        raise ValueError(f"{place}: `{key}` must have a message of the role {_ASSISTANT!r} to learn from.")
    return kept


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, progress: bool = True, owner: str = "model"
) -> list[Document]:
    """Encode rows as documents with labels.

    A conversation consists of the tokens of the chat template. A prompt and completion given as texts are encoded with
    the tokenizer's special tokens; if the tokenizer has an end-of-text token, it is added and has a label.

    Args:
        examples: the rows.
        tokenizer: the model's tokenizer, which must be a fast one.
        progress: show a progress bar.
        owner: name of the setting that the tokenizer belongs to, for errors.

    Returns:
        (length,) int32 ids and labels for every row.

    Raises:
        ValueError: if the tokenizer is slow, has no chat template although a row needs one, or its template does not
            work with a row.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{owner}: the tokenizer ({type(tokenizer).__name__}) is a slow one, which cannot map tokens to "
            "characters. Use a model with a tokenizer.json to train on answers only."
        )
    encoded = []
    for example in tqdm(examples, desc="tokenising", unit="row", disable=not progress):
        ids, learnt = _encode(example, tokenizer, owner)
        row, mask = torch.tensor(ids, dtype=torch.int32), torch.tensor(learnt, dtype=torch.bool)
        if not mask[1:].any():
            raise ValueError(f"{example.place}: the answers have no token to learn from.")
        encoded.append((row, row.masked_fill(~mask, IGNORED)))
    return encoded


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, owner: str) -> tuple[list[int], list[bool]]:
    """Return the token ids of a row, and for each whether it has a label."""
    if isinstance(example.completion, str):
        assert isinstance(example.prompt, str)
        text = example.prompt + example.completion
        ids, learnt = _encode_spans(text, [(len(example.prompt), len(text))], tokenizer, special=True)
        end = tokenizer.eos_token_id
        if isinstance(end, int):
            if ids[-1:] != [end]:
                ids, learnt = [*ids, end], [*learnt, True]
            learnt[-1] = True  # the tokenizer may have added it itself
        return ids, learnt
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{owner}: the tokenizer has no chat template, which {example.place} needs. Save the tokenizer with one, "
            "or write the rows as `prompt` and `completion` texts."
        )
    template = tokenizer.get_chat_template()
    _check_roles(example, template)
    if example.prompt is None and _GENERATION.search(template):
        return _encode_marked(example, tokenizer)
    whole, spans = _answers(example, tokenizer)
    return _encode_spans(whole, spans, tokenizer, special=False)


def _check_roles(example: Example, template: str) -> None:
    """Raise a ValueError for a role that is neither usual nor named by the template, which may drop its messages."""
    conversation = {"prompt": example.prompt or [], "completion": example.completion}
    if example.prompt is None:
        conversation = {"messages": example.completion}
    for key, messages in conversation.items():
        for index, message in enumerate(messages):
            assert isinstance(message, dict)
            if message["role"] not in _ROLES and (not message["role"].strip() or message["role"] not in template):
                raise ValueError(
                    f"{example.place}: `{key}.{index}.role` must be {', '.join(map(repr, _ROLES))} or one that the "
                    f"tokenizer's chat template names, got {message['role']!r}."
                )


def _encode_marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Encode a conversation with a template that marks what the model generates."""
    try:
        encoded: Any = tokenizer.apply_chat_template(
            example.completion,  # pyright: ignore[reportArgumentType]
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except _OF_TEMPLATES as error:
        raise _refused(example, error) from None
    return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def _answers(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation and the span of each answer, from the generation prompt to the answer's end."""

    def render(messages: Messages, *, asking: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)  # type: ignore[return-value]
        except _OF_TEMPLATES as error:
            if not messages:
                raise ValueError(
                    f"{example.place}: `messages.0` is an answer to nothing, which the tokenizer's chat template does "
                    "not accept. Begin with a message of another role."
                ) from None
            raise _refused(example, error) from None

    prompt, completion = example.prompt, example.completion
    assert isinstance(completion, list)
    if isinstance(prompt, list):
        messages, places = [*prompt, *completion], [(len(prompt), len(prompt) + len(completion))]
    else:
        messages = completion
        places = [(n, n + 1) for n, message in enumerate(messages) if message["role"] == _ASSISTANT]
    whole, spans = render(messages, asking=False), []
    for first, end in places:
        before, until = render(messages[:first], asking=True), render(messages[:end], asking=False)
        if not (until.startswith(before) and whole.startswith(until)):
            name = "prompt" if isinstance(prompt, list) else f"messages.{first}"
            raise ValueError(
                f"{example.place}: `{name}`: the tokenizer's chat template renders a message differently if others "
                "follow it, so the span of the answer is unknown. Mark answers in the template with "
                "{% generation %} … {% endgeneration %}, or give one row for each answer."
            )
        spans.append((len(before), len(until)))
    return whole, spans


def _refused(example: Example, error: Exception) -> ValueError:
    return ValueError(f"{example.place}: the tokenizer's chat template does not accept the messages: {error}")


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a text, and for each whether its last character lies in a span."""
    inside = bytearray(len(text))
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    # A special token that the tokenizer added has the offsets (0, 0).
    return encoded["input_ids"], [end > 0 and bool(inside[end - 1]) for _, end in encoded["offset_mapping"]]
