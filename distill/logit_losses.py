"""Divergences of two models' predictions, computed for a few tokens at a time.

Symbols: B batch, L length, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streaming import attach_gradients

# Bound on one model's float32 logits in memory at one time.
_LOGITS_BYTES = 64 * 2**20


def logit_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 1.0, **options: Any
) -> Tensor:
    """Return the sum over tokens of the divergence of two models' predictions, mixed with the cross-entropy.

    The divergence is multiplied by the squared temperature, which preserves the scale of its gradient (Hinton et al.,
    arXiv 1503.02531, section 2).

    Args:
        student: (tokens, V) logits.
        teacher: (tokens, V) logits.
        targets: (tokens) next tokens, -100 where there is none.
        temperature: divides both models' logits, positive.
        **options: "kl": "forward" (the default), KL(teacher || student); "reverse", KL(student || teacher); "mixed", a
            weighted mean of both; or "jsd", the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section
            2). "ce_weight" (0): weight of the cross-entropy in [0, 1]; that of the divergence is the rest.
            "reverse_weight" (0.5): weight of the reverse KL in "mixed"; that of the forward KL is the rest. "jsd_beta"
            (0.5): weight of the teacher in the mixture M of "jsd", b KL(teacher || M) + (1 - b) KL(student || M).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return _loss(log_student, log_teacher, student, targets, temperature, **options)


def stored_logit_loss(
    student: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    """Compute :func:`logit_loss` with the teacher's k most likely tokens; all others count as one token.

    Args:
        student: (tokens, V) logits.
        top_ids: (tokens, k) tokens.
        top_log_probs: (tokens, k + 1) the teacher's log-probabilities of these and of all others, at the temperature.
        targets: as for :func:`logit_loss`.
        temperature: as for :func:`logit_loss`.
        **options: as for :func:`logit_loss`.
    """
    log_all = F.log_softmax(student.float() / temperature, dim=-1)
    log_student = torch.cat([log_all.gather(-1, top_ids), log_rest(log_all, top_ids)], dim=-1)
    return _loss(log_student, top_log_probs, student, targets, temperature, **options)


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens whose logits over a vocabulary may be in memory at one time."""
    return max(_LOGITS_BYTES // (torch.float32.itemsize * vocabulary), 1)


def log_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the (tokens, 1) log-probability of all tokens but the (tokens, k) given ones."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)


def _loss(
    log_student: Tensor,
    log_teacher: Tensor,
    student: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    kl: str = "forward",
    ce_weight: float = 0.0,
    reverse_weight: float = 0.5,
    jsd_beta: float = 0.5,
) -> Tensor:
    """Return the loss of log-probabilities at the temperature, and of the student's logits, see :func:`logit_loss`."""
    loss = _divergence(log_student, log_teacher, kl, reverse_weight, jsd_beta) * temperature**2
    if not ce_weight:
        return loss
    return (1 - ce_weight) * loss + ce_weight * cross_entropy(student, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over tokens of the cross-entropy of (tokens, V) logits; a target of -100 does not count."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def _divergence(log_student: Tensor, log_teacher: Tensor, kl: str, reverse_weight: float, jsd_beta: float) -> Tensor:
    """Return the sum over tokens of the divergence of log-probabilities, see :func:`logit_loss`."""
    if kl == "mixed":
        forward, reverse = _kl(log_teacher, log_student), _kl(log_student, log_teacher)
        return (1 - reverse_weight) * forward + reverse_weight * reverse
    if kl == "jsd":
        log_mixture = torch.logaddexp(log_teacher + math.log(jsd_beta), log_student + math.log1p(-jsd_beta))
        return jsd_beta * _kl(log_teacher, log_mixture) + (1 - jsd_beta) * _kl(log_student, log_mixture)
    return _kl(log_teacher, log_student) if kl == "forward" else _kl(log_student, log_teacher)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over tokens of KL(first || second) of log-probabilities."""
    return (first.exp() * (first - second)).sum()


def chunked_logit_loss(
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    input_ids: Tensor,
    *,
    learnt: Tensor | None = None,
    learnt_share: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute :func:`logit_loss` per token for a few tokens at a time, without (B, L, V) logits in memory.

    The larger the vocabulary, the fewer tokens at a time: an array of logits has at most 64 MiB.

    Args:
        student_hidden: (B, L, D) input of the student's head, with its graph.
        student_head: the student's head.
        teacher_hidden: (B, L, D) input of the teacher's head.
        teacher_head: the teacher's head.
        input_ids: (B, L) tokens; the target of a position is the next one.
        learnt: (B, L) bool, the tokens to learn: the loss is that of the positions before them. None: all positions.
        learnt_share: share of the learnt tokens in the whole training text, with `learnt`.
        **options: keyword arguments of :func:`logit_loss`.

    Returns:
        The loss, a mean over the B L positions, or over as many of them as are learnt on average. Means of the parts
        of a batch are then the mean of the batch, however the learnt tokens are distributed over them.
    """

    def loss(logits: Tensor, target: Tensor, their: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_head(their)
        return logit_loss(logits, teacher, target, **options)

    return chunked_loss(student_hidden, student_head, (teacher_hidden,), input_ids, loss, learnt, learnt_share)


def chunked_loss(
    student_hidden: Tensor,
    student_head: nn.Module,
    teachers: Sequence[Tensor],
    input_ids: Tensor,
    loss: Callable[..., Tensor],
    learnt: Tensor | None = None,
    learnt_share: float | None = None,
) -> Tensor:
    """Compute a loss of logits per token for a few tokens at a time; see :func:`chunked_logit_loss`.

    Args:
        student_hidden: as there.
        student_head: as there.
        teachers: (B, L, ...) what the loss needs of the teacher.
        input_ids: as there.
        loss: called with logits, targets and the teacher's part of some tokens; returns a sum over the tokens.
        learnt: as there.
        learnt_share: as there.
    """
    trained = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    tokens = input_ids.numel() * (learnt_share or 1.0)
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    hidden, *given = (part.flatten(0, 1) for part in (student_hidden.detach(), targets, *teachers))
    chosen = None
    if learnt is not None:
        chosen = F.pad(learnt[:, 1:], (0, 1), value=False).flatten().nonzero()[:, 0]
        hidden, *given = (part[chosen] for part in (hidden, *given))
    chunk = tokens_at_once(next(student_head.parameters()).shape[0])
    total = torch.zeros((), device=input_ids.device)
    of_hidden = torch.empty_like(hidden)
    of_head: list[Tensor] = []
    parts = (part.split(chunk) for part in (of_hidden, hidden, *given))
    for of_rows, mine, *others in zip(*parts, strict=True):
        mine = mine.requires_grad_()
        value = loss(student_head(mine), *others) / tokens
        total += value.detach()
        of_mine, *of_parts = torch.autograd.grad(value, [mine, *trained])
        of_rows.copy_(of_mine)
        if not of_head:
            of_head = list(of_parts)
            continue
        for whole, part in zip(of_head, of_parts, strict=True):
            whole += part
    if chosen is not None:
        of_hidden = torch.zeros_like(student_hidden).flatten(0, 1).index_copy(0, chosen, of_hidden)
    return attach_gradients(total, [student_hidden, *trained], [of_hidden.view_as(student_hidden), *of_head])
