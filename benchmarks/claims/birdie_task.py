"""Phone books: documents to train on, questions that judge a model, and the models and objectives that are compared.

A document is a phone book and looked-up entries of it: entries of a name and a number, a token each, a token that ends
the book, then some of its names in random order, each with its number, and a token that ends the document. All names of
a book differ. Only the numbers behind the book can be known. (With two tokens for a name and two for a number, Mamba-2
had hardly begun to look up after 2,800 steps: 2 to 5 % of the numbers of 32 entries.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_zoo.harness.settings import check
from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2ForCausalLM
from ssm_zoo.training.objective_settings import MIXES, ObjectiveMix
from ssm_zoo.training.objectives import CONTROLLED, ObjectiveTokens

NEXT, FIXED, BANDIT = "next token", "fixed mix", "bandit"
CAUSAL, PREFIX = "causal", "prefix-bidirectional"
# Objectives and direction of each arm. A model that reads prefixes in both directions has no prefix in next-token
# training, and there is nothing to compare.
ARMS = {
    f"{objectives}, {direction}": (objectives, direction)
    for objectives, direction in ((NEXT, CAUSAL), (FIXED, CAUSAL), (FIXED, PREFIX), (BANDIT, CAUSAL), (BANDIT, PREFIX))
}
# Largest difference of the numbers of parameters, in parts of the causal model's.
EQUAL = 0.05
ENTRY = 2
# The best that can be answered without looking up.
BLIND = "the most frequent number of the book"
# Documents that are assessed at a time.
PART = 32


@dataclass(frozen=True)
class PhoneBooks:
    """Sizes of the task.

    Args:
        entries: numbers of entries that are judged; a document to train on has one of them or of `easier`.
        lookups: entries that are looked up behind the book at most.
        names: different names.
        numbers: different numbers.
        sentinels: sentinel tokens of the objectives.
        easier: smaller numbers of entries in documents to train on: looking up is first learnt from short books.
    """

    entries: tuple[int, ...]
    lookups: int
    names: int
    numbers: int
    sentinels: int = 128
    easier: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (*self.easier, *self.entries)
        if min(*sizes, self.lookups, self.numbers) < 1 or max(sizes) > self.names:
            raise ValueError(
                f"entries, lookups and numbers must be at least 1, and entries at most names ({self.names}), got "
                f"{sizes}, {self.lookups} and {self.numbers}"
            )

    @property
    def end_of_book(self) -> int:
        """Return the token behind a book; the one behind a document is next."""
        return self.names + self.numbers

    @property
    def tokens(self) -> ObjectiveTokens:
        """Return the ids of the objectives' tokens, behind those of the documents."""
        first = self.end_of_book + 2
        control = {name: first + index for index, name in enumerate(CONTROLLED)}
        first += len(control)
        sentinels = list(range(first + 3, first + 3 + self.sentinels))
        return ObjectiveTokens(control, sentinels, first, first + 1, first + 2, list(range(self.end_of_book)))

    @property
    def vocabulary(self) -> int:
        """Return V, a multiple of 8."""
        return -(-(self.tokens.sentinels[-1] + 1) // 8) * 8

    def asked(self, entries: int) -> int:
        """Return the number of entries that are looked up."""
        return min(entries, self.lookups)

    def length(self, entries: int) -> int:
        """Return the tokens of a document."""
        return ENTRY * (entries + self.asked(entries)) + 2

    def draw(self, entries: int, batch: int, generator: torch.Generator) -> Tensor:
        """Draw (B, length) documents."""
        names = torch.rand(batch, self.names, generator=generator).argsort(-1)[:, :entries]
        numbers = torch.randint(self.numbers, (batch, entries), generator=generator)
        book = torch.stack([names, self.names + numbers], dim=-1)
        asked = torch.rand(batch, entries, generator=generator).argsort(-1)[:, : self.asked(entries)]
        answers = book.gather(1, asked[..., None].expand(-1, -1, ENTRY))
        ends = torch.full((batch, 2, 1), self.end_of_book)
        return torch.cat([book.flatten(1), ends[:, 0], answers.flatten(1), ends[:, 1] + 1], dim=1)

    def documents(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Draw documents to train on, about equally many tokens of every number of entries."""
        sizes = (*self.easier, *self.entries)
        whole = sum(1 / self.length(entries) for entries in sizes)
        parts = [
            self.draw(entries, max(1, round(count / self.length(entries) / whole)), generator) for entries in sizes
        ]
        return [document for part in parts for document in part]

    def chance(self, entries: int) -> dict[str, float]:
        """Return the accuracy of a number that is drawn from all, and of the one that is in the book most often.

        The second is a mean over a thousand books.
        """
        numbers = torch.randint(self.numbers, (1000, entries), generator=torch.Generator().manual_seed(0))
        most = F.one_hot(numbers, self.numbers).sum(1).amax(1).double().mean() / entries
        return {"any number": 1 / self.numbers, BLIND: float(most)}


@dataclass(frozen=True)
class Answers:
    """Accuracy and loss of the answers of a model.

    Attributes:
        accuracy: share of the looked-up names whose number is the most likely token.
        loss: mean cross-entropy of the numbers, in nats; ln(numbers) for a number at random.
    """

    accuracy: float
    loss: float


@torch.no_grad()
def answer(model: Any, task: PhoneBooks, entries: int, documents: Tensor) -> Answers:
    """Judge the looked-up numbers of documents, given the lookups before each of them.

    A model that reads prefixes in both directions reads the book and its end as one.
    """
    model.eval()
    book = ENTRY * entries + 1
    found, loss = 0, 0.0
    for part in documents.split(PART):
        prefix = {}
        if model.config.prefix_bidirectional:
            prefix = {"prefix_mask": (torch.arange(part.shape[1]) < book).long().expand(len(part), -1)}
        logits = model(part, use_cache=False, **prefix).logits[:, book:-2:ENTRY]
        wanted = part[:, book + 1 : -1 : ENTRY]
        found += int((logits.argmax(-1) == wanted).sum())
        loss += float(F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum"))
    model.train()
    asked = len(documents) * task.asked(entries)
    return Answers(found / asked, loss / asked)


@dataclass(frozen=True)
class Model:
    """Sizes of Mamba-2: D, blocks, N and P."""

    width: int
    layers: int
    state: int
    head: int

    def make(self, direction: str, vocabulary: int, initializer_range: float, seed: int) -> nn.Module:
        """Return a freshly initialised model.

        Raises:
            ValueError: if the two directions differ in parameters by more than `EQUAL`.
        """
        counts = []
        for prefix in (direction == PREFIX, False, True):
            torch.manual_seed(seed)
            config = ZooMamba2Config(
                vocab_size=vocabulary,
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                state_size=self.state,
                head_dim=self.head,
                initializer_range=initializer_range,
                prefix_bidirectional=prefix,
            )
            with torch.device("meta" if counts else "cpu"):
                made = ZooMamba2ForCausalLM(config)
            counts.append((sum(p.numel() for p in made.parameters()), made))
        smaller, larger = counts[1][0], counts[2][0]
        if larger - smaller > EQUAL * smaller:
            raise ValueError(
                f"the sizes must let both directions have equal parameters within {EQUAL:.0%}, got {smaller} and "
                f"{larger}: raise width"
            )
        return counts[0][1]


def mixture(objectives: str, steps: int) -> ObjectiveMix:
    """Return the mixture of an arm; its bandit decides 20 times."""
    if objectives == NEXT:
        return check(ObjectiveMix, {"objectives": [{"objective": "next_token", "rate": 1.0}]})
    mix = MIXES["birdie"]
    return check(ObjectiveMix, mix if objectives == FIXED else {**mix, "bandit": {"every": max(steps // 20, 1)}})
