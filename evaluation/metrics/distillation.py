"""Metrics of next-token predictions, alone and against a teacher. They take logits and store numbers per token.

Symbols: T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Value
from torch import Tensor

from .metric import ZooMetric


class LogitMetric(ZooMetric):
    """A metric that takes logits (..., V), at least in float32 after conversion, and reduces them as they are added."""

    def add_batch(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> None:
        """Add predictions for some tokens.

        Args:
            predictions: (..., V) logits of the model.
            references: (..., V) logits of the teacher, or (...) tokens for :class:`Perplexity`.
            **inputs: further inputs of the metric, (...).

        Raises:
            ValueError: if the shapes differ or a token is outside the vocabulary.
        """
        with torch.no_grad():
            values = self._per_token(_rows(predictions), references, **inputs)
        super().add_batch(**{name: column.cpu().tolist() for name, column in values.items()})

    def add(self, *, prediction: Any = None, reference: Any = None, **inputs: Any) -> None:
        """Add the prediction of one token: (V,) logits and the other inputs of that token."""
        # evaluate.combine passes them under the plural names.
        named = {"predictions": prediction, "references": reference, **inputs}
        self.add_batch(**{name: torch.as_tensor(value)[None] for name, value in named.items()})

    def _per_token(self, predictions: Tensor, references: Any, **inputs: Any) -> dict[str, Tensor]:
        """Return (T,) values to store under the names of the inputs."""
        raise NotImplementedError


class Perplexity(LogitMetric):
    """Mean negative log-likelihood ("loss", nats per token) of the tokens, its exponential, and their number.

    Inputs: `predictions` (..., V) logits, `references` (...) the tokens that follow.
    """

    INPUTS = {"predictions": Value("float64"), "references": Value("int64")}

    def _per_token(self, predictions: Tensor, references: Any, **_: Any) -> dict[str, Tensor]:
        tokens = _tokens(references, predictions, "references")
        return {"predictions": token_losses(predictions, tokens), "references": tokens}

    def _compute(self, *, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        loss = _mean(predictions)
        return {"loss": loss, "perplexity": _exponential(loss), "tokens": len(references)}


class DistillationGap(LogitMetric):
    """Loss and perplexity of a student and its teacher, and the difference of the losses ("distillation_gap").

    Inputs: `predictions` and `references`, (..., V) logits of student and teacher; `labels`, (...) the tokens that
    follow.
    """

    INPUTS = {"predictions": Value("float64"), "references": Value("float64"), "labels": Value("int64")}

    def _per_token(self, predictions: Tensor, references: Any, *, labels: Any, **_: Any) -> dict[str, Tensor]:
        teacher, tokens = _teacher_rows(references, predictions), _tokens(labels, predictions, "labels")
        return {
            "predictions": token_losses(predictions, tokens),
            "references": token_losses(teacher, tokens),
            "labels": tokens,
        }

    def _compute(
        self, *, predictions: Sequence[float], references: Sequence[float], labels: Sequence[int]
    ) -> dict[str, float]:
        loss, teacher_loss = _mean(predictions), _mean(references)
        return {
            "loss": loss,
            "perplexity": _exponential(loss),
            "teacher_loss": teacher_loss,
            "teacher_perplexity": _exponential(teacher_loss),
            "distillation_gap": loss - teacher_loss,
            "tokens": len(labels),
        }


class KLDivergence(LogitMetric):
    """Mean of KL(teacher || student) ("kl") and the mean entropy of the teacher, both in nats per token.

    Inputs: `predictions` and `references`, (..., V) logits of student and teacher.
    """

    INPUTS = {"predictions": Value("float64"), "references": Value("float64")}

    def _per_token(self, predictions: Tensor, references: Any, **_: Any) -> dict[str, Tensor]:
        divergence, teacher = token_divergences(predictions, _teacher_rows(references, predictions))
        return {"predictions": divergence, "references": torch.special.entr(teacher).sum(-1)}

    def _compute(self, *, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"kl": _mean(predictions), "teacher_entropy": _mean(references)}


class Top1Agreement(LogitMetric):
    """Share of tokens for which student and teacher have the same most likely token ("top1_agreement").

    Inputs: `predictions` and `references`, (..., V) logits of student and teacher.
    """

    INPUTS = {"predictions": Value("int64"), "references": Value("int64")}

    def _per_token(self, predictions: Tensor, references: Any, **_: Any) -> dict[str, Tensor]:
        teacher = _teacher_rows(references, predictions)
        return {"predictions": predictions.argmax(-1), "references": teacher.argmax(-1)}

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        same = [ours == theirs for ours, theirs in zip(predictions, references, strict=True)]
        return {"top1_agreement": sum(same) / len(same)}


def _rows(logits: Any) -> Tensor:
    """Return (T, V) logits in float32 or a wider type."""
    logits = torch.as_tensor(logits)
    return logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))


def _teacher_rows(references: Any, student: Tensor) -> Tensor:
    teacher = _rows(references).to(student.device)
    if teacher.shape != student.shape:
        raise ValueError(
            f"`references` must have the shape of `predictions`, {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    return teacher


def _tokens(tokens: Any, logits: Tensor, field: str) -> Tensor:
    tokens = torch.as_tensor(tokens).to(logits.device).flatten()
    if len(tokens) != len(logits):
        raise ValueError(f"`{field}` must have one token for each of {len(logits):,} predictions, got {len(tokens):,}")
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < logits.shape[-1]):
        raise ValueError(
            f"`{field}` must be tokens from 0 to {logits.shape[-1] - 1}, got {tokens.min()} to {tokens.max()}"
        )
    return tokens


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (T,) negative log-likelihoods of the tokens, from (T, V) logits."""
    return torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


def token_divergences(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (T,) divergences KL(teacher || student) and the teacher's (T, V) probabilities, from (T, V) logits."""
    difference, p = student.log_softmax(-1), teacher.log_softmax(-1)
    # In place, since V is large: the sum of p (log p - log q), where 0 log 0 is 0.
    torch.sub(p, difference, out=difference)
    p.exp_()
    return difference.masked_fill_(p == 0, 0.0).mul_(p).sum(-1), p


def _mean(values: Sequence[float]) -> float:
    """Return the mean, without rounding errors of the sum."""
    return math.fsum(values) / len(values)


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
