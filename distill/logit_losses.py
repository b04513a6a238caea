"""Divergences of two models' predictions, computed for a few tokens at a time.

Symbols: B batch, L length, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streaming import attach_gradients

# Bound on one model's float32 logits in memory at one time in `chunked_logit_loss`.
_LOGITS_BYTES = 64 * 2**20


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    kl: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """Return the sum over tokens of the divergence of two models' predictions, mixed with the cross-entropy.

    The divergence is multiplied by the squared temperature, which preserves the scale of its gradient (Hinton et al.,
    arXiv 1503.02531, section 2).

    Args:
        student: (tokens, V) logits.
        teacher: (tokens, V) logits.
        targets: (tokens) next tokens, -100 where there is none.
        kl: "forward", KL(teacher || student), or "reverse", KL(student || teacher).
        temperature: divides both models' logits, positive.
        ce_weight: weight of the cross-entropy in [0, 1]; that of the divergence is the rest.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    first, second = (log_teacher, log_student) if kl == "forward" else (log_student, log_teacher)
    loss = (first.exp() * (first - second)).sum() * temperature**2
    if ce_weight:
        cross_entropy = F.cross_entropy(student.float(), targets, ignore_index=-100, reduction="sum")
        loss = (1 - ce_weight) * loss + ce_weight * cross_entropy
    return loss


def chunked_logit_loss(
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    input_ids: Tensor,
    *,
    kl: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """Compute :func:`logit_loss` per token for a few tokens at a time, without (B, L, V) logits in memory.

    Args:
        student_hidden: (B, L, D) input of the student's head, with its graph.
        student_head: the student's head.
        teacher_hidden: (B, L, D) input of the teacher's head.
        teacher_head: the teacher's head.
        input_ids: (B, L) tokens; the target of a position is the next one.
        kl: as in :func:`logit_loss`.
        temperature: as in :func:`logit_loss`.
        ce_weight: as in :func:`logit_loss`.

    Returns:
        The loss, a mean over the B L positions.
    """
    trained = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    tokens = input_ids.numel()
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100).flatten()
    chunk = max(_LOGITS_BYTES // (4 * student_head.get_parameter("weight").shape[0]), 1)
    total = torch.zeros((), device=input_ids.device)
    of_hidden: list[Tensor] = []
    of_head: list[Tensor] = []
    rows = zip(
        student_hidden.detach().flatten(0, 1).split(chunk),
        teacher_hidden.flatten(0, 1).split(chunk),
        targets.split(chunk),
        strict=True,
    )
    for mine, theirs, target in rows:
        mine = mine.requires_grad_()
        with torch.no_grad():
            teacher = teacher_head(theirs)
        loss = logit_loss(student_head(mine), teacher, target, kl=kl, temperature=temperature, ce_weight=ce_weight)
        loss = loss / tokens
        total += loss.detach()
        of_mine, *parts = torch.autograd.grad(loss, [mine, *trained])
        of_hidden.append(of_mine)
        of_head = [whole + part for whole, part in zip(of_head, parts, strict=True)] if of_head else parts
    return attach_gradients(total, [student_hidden, *trained], [torch.cat(of_hidden).view_as(student_hidden), *of_head])
