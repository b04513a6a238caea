"""Scoring of documents that are too long to be read whole together with the query.

* "firstp": the beginning of the document, as many tokens as fit;
* "longp": the same with a longer limit (1,536 tokens in "State Space Models are Strong Text Rerankers");
* "maxp": passages of the document, which overlap; its score is that of the best one (Dai and Callan, arXiv 1905.09217).

The limit is the tokenizer's `model_max_length`. The rule is in the model's configuration under `reranking`, and a
cross-encoder without this entry is read as "firstp".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

CONFIG_KEY = "reranking"
"""Key of a model's configuration with the rule for long documents."""
TRUNCATION = "only_second"
"""The tokenizer's truncation of pairs in which the document alone is cut."""


@dataclass(frozen=True)
class LongDocuments:
    """Rule for documents that do not fit.

    Attributes:
        rule: see this file.
        passage_tokens: tokens of a passage ("maxp").
        stride: tokens between the beginnings of two passages ("maxp").
        max_passages: passages of a document at most; the rest is not read ("maxp").
    """

    rule: Literal["firstp", "maxp", "longp"] = "firstp"
    passage_tokens: int = 256
    stride: int = 128
    max_passages: int = 8

    def entry(self) -> dict[str, Any]:
        """Return the entry of the configuration."""
        return asdict(self) if self.rule == "maxp" else {"rule": self.rule}

    def parts(self, tokenizer: Any, document: str) -> list[str]:
        """Return the texts of a document that are scored, one or more.

        A passage begins and ends at tokens of the whole document.
        """
        if self.rule != "maxp":
            return [document]
        encoded = tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        places: list[tuple[int, int]] = encoded["offset_mapping"]
        passages = []
        for start in range(0, max(len(places), 1), self.stride):
            inside = places[start : start + self.passage_tokens]
            passages.append(document[inside[0][0] : inside[-1][1]] if inside else document)
            if start + self.passage_tokens >= len(places) or len(passages) == self.max_passages:
                break
        return passages

    def has_all(self, tokenizer: Any, document: str) -> bool:
        """Return whether the passages reach the end of a document; True for rules without passages."""
        if self.rule != "maxp":
            return True
        ids = tokenizer(document, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return len(ids) <= (self.max_passages - 1) * self.stride + self.passage_tokens


def long_documents(config: Any) -> LongDocuments:
    """Return the rule in a model's configuration; "firstp" if it has none.

    Raises:
        ValueError: if the entry is not one of this package's.
    """
    entry = getattr(config, CONFIG_KEY, None)
    if entry is None:
        return LongDocuments()
    known = isinstance(entry, dict) and entry.get("rule") in ("firstp", "maxp", "longp")
    sizes = {key: value for key, value in entry.items() if key != "rule"} if known else {}
    fields = LongDocuments.__dataclass_fields__
    if not known or not all(key in fields and type(value) is int and value > 0 for key, value in sizes.items()):
        raise ValueError(f"`{CONFIG_KEY}` in config.json must be written by `ssm-zoo finetune rerank`, got {entry!r}.")
    rule = LongDocuments(**entry)
    if rule.stride > rule.passage_tokens:
        raise ValueError(
            f"`{CONFIG_KEY}` in config.json must have a stride of at most passage_tokens, {rule.passage_tokens}, so "
            f"that no text between two passages is left out, got {rule.stride}."
        )
    return rule
