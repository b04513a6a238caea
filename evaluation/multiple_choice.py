"""Multiple choice under four orders of the options: which of four texts continues a passage?

Questions are drawn from ordinary text, so that they need no data set and exist in every language: a passage, the text
that follows it, and three texts from elsewhere as the other options, under the letters A to D. The letter after
"Answer:" that is the most likely next token is the model's choice. Small models choose by the letter and not by what
stands behind it. Therefore each question is asked in four orders, in which each option has each letter once: a model
that always says the same letter scores 1/4, and its choices are not consistent.

Symbols: Q questions, P tokens of a passage, T tokens of an option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.rollback import restore, snapshot
from .hidden_states import evaluating, last_logits

__all__ = ["ORDERS", "Questions", "compare_choices", "draw_questions", "multiple_choice"]

ORDERS = 4
"""Options of a question, and orders in which it is asked."""
_LETTERS = "ABCD"
_QUESTION, _ANSWER = "\n\nWhich text comes next?\n", "Answer:"


@dataclass(frozen=True)
class Questions:
    """Questions of equal lengths.

    Attributes:
        passages: (Q, P) tokens.
        options: (Q, 4, T) tokens.
        answers: (Q) number of the option that follows the passage.
    """

    passages: Tensor
    options: Tensor
    answers: Tensor


def draw_questions(text: Tensor, questions: int, *, passage: int = 96, option: int = 16, seed: int = 0) -> Questions:
    """Draw questions from a text: their passages spread evenly over it, other options from anywhere else.

    Args:
        text: (tokens) int64 ids of ordinary text.
        questions: Q, positive.
        passage: P, positive.
        option: T, positive.
        seed: seed of the other options and of their places.

    Raises:
        ValueError: if an argument is too small, or the text is too short for four options that do not overlap the
            passage, or each other.
    """
    for field, value in (("questions", questions), ("passage", passage), ("option", option)):
        if value < 1:
            raise ValueError(f"`{field}` must be at least 1, got {value}")
    places = (len(text) - passage - option) // option  # pieces outside of a passage and its continuation
    if places < 2 * ORDERS:
        least = passage + (2 * ORDERS + 1) * option
        raise ValueError(f"`text` must have at least {least} tokens, got {len(text)}")
    last = len(text) - passage - option
    found: list[Tensor] = []
    passages, answers = [], []
    for index in range(questions):
        start = index * last // max(questions - 1, 1)
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # Pieces of each side by itself: none goes from one side of the passage to the other.
        before, behind = start // option, start + passage + option
        pieces = torch.randperm(before + (len(text) - behind) // option, generator=generator)[: ORDERS - 1].tolist()
        begins = [piece * option if piece < before else behind + (piece - before) * option for piece in pieces]
        others = [text[begin : begin + option] for begin in begins]
        answer = int(torch.randint(ORDERS, (), generator=generator))
        others.insert(answer, text[start + passage : start + passage + option])
        passages.append(text[start : start + passage])
        found.append(torch.stack(others))
        answers.append(answer)
    return Questions(torch.stack(passages), torch.stack(found), torch.tensor(answers))


def multiple_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Questions, *, limit: int | None = None
) -> dict[str, Any] | None:
    """Ask a model, each question in four orders of its options.

    Args:
        model: a causal language model with a cache.
        tokenizer: its tokenizer.
        questions: of :func:`draw_questions`.
        limit: largest number of tokens that the model reads.

    Returns:
        None if a text would be longer than `limit`, or if a letter is not one token after "Answer:"; otherwise a
        dictionary with
            "questions": Q.
            "accuracy": share of right choices, in [0, 1], over all questions and orders.
            "accuracies": that share for each of the four orders.
            "consistency": share of the questions with the same choice in all orders.
            "letters": share of each letter among the choices.
            "choices": for each question the numbers of the options that were chosen, one for each order.
    """
    words = _Words(tokenizer)
    length = questions.passages.shape[1] + words.length(questions.options.shape[2])
    if len(set(words.letters)) < ORDERS or (limit is not None and length > limit):
        return None
    choices = []
    with evaluating(model), torch.no_grad():
        for passage, options in zip(questions.passages, questions.options, strict=True):
            cache = DynamicCache(config=model.config)
            last_logits(model, passage[None], cache)
            copy, rows = DynamicCache(config=model.config), words.orders(options)
            restore(copy, snapshot(cache))
            copy.batch_repeat_interleave(ORDERS)
            choices.append(last_logits(model, rows, copy)[:, words.letters].argmax(-1).cpu())
    letters = torch.stack(choices)  # (Q, 4)
    chosen = (letters + torch.arange(ORDERS)) % ORDERS
    right = chosen == questions.answers[:, None]
    return {
        "questions": len(chosen),
        "accuracy": float(right.double().mean()),
        "accuracies": right.double().mean(0).tolist(),
        "consistency": float((chosen == chosen[:, :1]).all(1).double().mean()),
        "letters": (torch.bincount(letters.flatten(), minlength=ORDERS) / letters.numel()).tolist(),
        "choices": chosen.tolist(),
    }


def compare_choices(choices: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Return the share of choices, over questions and orders, that are the reference's, in [0, 1].

    Args:
        choices: "choices" of :func:`multiple_choice`.
        reference: those of another model, of the same questions.

    Raises:
        ValueError: if there are none, or their numbers differ.
    """
    ours, theirs = ([choice for question in each for choice in question] for each in (choices, reference))
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"`reference` must have as many choices, one or more, got {len(theirs)} for {len(ours)}")
    return sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(ours)


class _Words:
    """The fixed parts of a question as tokens; `letters` are the tokens of which one is the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def tokens(text: str) -> Tensor:
            return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

        self.question, self.answer, self.end = tokens(_QUESTION), tokens(_ANSWER), tokens("\n")
        self.marks = [tokens(f"{letter}:") for letter in _LETTERS]
        # The token that follows "Answer:", which may hold the space before the letter.
        whole = [tokens(f"{_ANSWER} {letter}") for letter in _LETTERS]
        self.letters = [int(each[-1]) for each in whole if torch.equal(each[:-1], self.answer)]

    def length(self, option: int) -> int:
        """Tokens of a question beside its passage."""
        marks = sum(len(mark) for mark in self.marks)
        return len(self.question) + marks + ORDERS * (option + len(self.end)) + len(self.answer)

    def orders(self, options: Tensor) -> Tensor:
        """(4, T) options to the (4, L) texts after the passage: in the order s, the letter j has the option j + s."""
        rows = []
        for order in range(ORDERS):
            lines = [
                part
                for number, mark in enumerate(self.marks)
                for part in (mark, options[(number + order) % ORDERS], self.end)
            ]
            rows.append(torch.cat([self.question, *lines, self.answer]))
        return torch.stack(rows)
