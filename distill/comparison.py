"""Compare teacher, control and trained student once, at the end of a run: how far each of them sees, and at what cost.

The evaluations after every stage are short. This one is made for three models only: loss and divergence by position up
to several times the training length, repeat loss at several distances, key-value recall, multiple choice, agreement of
the greedy continuations with the teacher's, seconds of a decode step, and bytes of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.by_position import evaluate_by_position
from ..evaluation.decoding import LEAST_CONTEXT, measure_decoding
from ..evaluation.hidden_states import KeptStates
from ..evaluation.key_value_recall import key_value_recall
from ..evaluation.language_modeling import PASSAGE, compare_continuations, repeat_loss
from ..evaluation.multiple_choice import compare_choices, draw_questions, multiple_choice
from .recipe import EvaluationSpec

# Windows of the loss by position, at most.
WINDOWS = 4
_TEACHER = "teacher"
_LEAST_FOR_QUESTIONS = 512  # held-out tokens


@dataclass
class Comparison:
    """Models, texts and settings of a comparison.

    Attributes:
        models: teacher, control and student, by the kinds of their evaluations: "teacher", "control" and "stage".
        evaluations: the last evaluation of each kind, as in the report.
        tokenizer: the teacher's tokenizer.
        heldout: (tokens) held-out ids.
        spec: the recipe's part on the evaluation.
        sequence_length: training length, `data.sequence_length`.
        positions: largest number of tokens that the student reads; None: any.
        compute: makes the context of a forward in the recipe's dtype.
        kept: hidden states that the evaluations have kept.
        seed: seed of the lists of keys and values.
        seconds: duration of each part, filled in by :func:`compare`.
    """

    models: Mapping[str, PreTrainedModel]
    evaluations: Mapping[str, Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    heldout: Tensor
    spec: EvaluationSpec
    sequence_length: int
    positions: int | None
    compute: Callable[[], AbstractContextManager[Any]]
    kept: KeptStates
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Record the duration of a part."""
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started


def compare(comparison: Comparison) -> dict[str, Any]:
    """Measure everything, and return it as it stands in the report.

    All but the speed is measured in the recipe's dtype. The speed is that of the dtype of the weights, float32, since
    autocast converts weights at every step.

    Returns:
        "models": for each model a dictionary with its "name", its "kind" and its measurements; "seconds" of each part.
        Lengths beyond the student's positions, and those for which the held-out text is too short, are left out.
    """
    with comparison.compute():
        parts = {
            "by_position": _by_position(comparison),
            "repeat": _repeat(comparison),
            "recall": _recall(comparison),
            "choice": _choice(comparison),
            "continuations": _continuations(comparison),
        }
    parts["decoding"] = _decoding(comparison)
    models = [
        {"name": row["name"], "kind": kind, **{part: found[kind] for part, found in parts.items()}}
        for kind, row in comparison.evaluations.items()
    ]
    return {"models": models, "seconds": comparison.seconds}


def _fits(comparison: Comparison, tokens: int) -> bool:
    """Return whether the student can read so many tokens."""
    return comparison.positions is None or tokens <= comparison.positions


def _by_position(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the loss by position, in up to four windows: no more than the evaluations read, whose states are kept."""
    length = min(comparison.spec.long_length or 8 * comparison.sequence_length, len(comparison.heldout))
    if comparison.positions is not None:
        length = min(length, comparison.positions)
    tokens = min(comparison.spec.tokens, len(comparison.heldout))
    count = min(WINDOWS, max(tokens // length, 1))
    windows = comparison.heldout[: count * length].view(count, length)
    with comparison.timed("by_position"):
        return evaluate_by_position(comparison.models, windows, teacher=_TEACHER, kept=comparison.kept)


def _repeat(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the repeat losses; that at the distance of the evaluations is known."""
    spec = comparison.spec
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in comparison.models}
    with comparison.timed("repeat"):
        for distance in sorted(spec.repeat_distances):
            if not _fits(comparison, 2 * PASSAGE + distance) or len(comparison.heldout) < PASSAGE + distance:
                continue
            for kind, model in comparison.models.items():
                loss = comparison.evaluations[kind]["repeat_loss"] if distance == spec.repeat_distance else None
                if loss is None:
                    loss = repeat_loss(model, comparison.heldout, distance)
                found[kind].append({"distance": distance, "loss": loss})
    return found


def _recall(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    with comparison.timed("recall"):
        return {
            kind: key_value_recall(
                model,
                comparison.tokenizer,
                comparison.heldout,
                pairs=comparison.spec.recall_pairs,
                limit=comparison.positions,
                seed=comparison.seed,
            )
            for kind, model in comparison.models.items()
        }


def _choice(comparison: Comparison) -> dict[str, dict[str, Any] | None]:
    """Return the answers to multiple-choice questions, with the share of equal choices as "agreement"; or None."""
    none = dict.fromkeys(comparison.models)
    questions = comparison.spec.choice_questions
    if not questions or len(comparison.heldout) < _LEAST_FOR_QUESTIONS:
        return none
    drawn = draw_questions(comparison.heldout, questions, seed=comparison.seed)
    with comparison.timed("choice"):
        found = {
            kind: multiple_choice(model, comparison.tokenizer, drawn, limit=comparison.positions)
            for kind, model in comparison.models.items()
        }
    theirs = found[_TEACHER]
    if theirs is None:
        return none
    rows: dict[str, dict[str, Any] | None] = {}
    for kind, row in found.items():
        assert row is not None  # since the teacher's is not: tokenizer, questions and limit are the same
        agreement = compare_choices(row["choices"], theirs["choices"])
        rows[kind] = {**{key: value for key, value in row.items() if key != "choices"}, "agreement": agreement}
    return rows


def _continuations(comparison: Comparison) -> dict[str, dict[str, float] | None]:
    """Return the agreement of the evaluations' continuations; None for a run that began before they had tokens."""
    samples = {kind: row["samples"] for kind, row in comparison.evaluations.items()}
    if not all(found and all("tokens" in sample for sample in found) for found in samples.values()):
        return dict.fromkeys(samples)
    return {kind: compare_continuations(found, samples[_TEACHER]) for kind, found in samples.items()}


def _decoding(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    contexts = [context for context in comparison.spec.context_lengths if _fits(comparison, context)]
    limit = comparison.spec.prefill_limit
    if comparison.positions is not None:
        limit = max(limit, LEAST_CONTEXT, *contexts, 0)  # all inputs of a mixer with positions must be read
    if not contexts:
        return {kind: [] for kind in comparison.models}
    with comparison.timed("decoding"):
        return measure_decoding(comparison.models, contexts, prefill_limit=limit, seed=comparison.seed)
