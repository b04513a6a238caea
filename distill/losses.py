"""The losses of distillation, as pure functions. Each is a mean over sequences, so that shards of a batch add up.

Symbols: B batch, L length, D width, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Bound on the float32 logits of one model alive at a time in `logit_loss_backward`.
_LOGITS_BYTES = 64 * 2**20


def matrix_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over sequences and heads of the Frobenius norm of the difference (MOHAWK, arXiv 2408.10189, eq. 2).

    Args:
        student: (B, H, L, L) mixing matrices.
        teacher: (B, H, L, L) attention matrices.
    """
    return (student - teacher).flatten(2).norm(dim=-1).mean()


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over sequences of the squared error relative to the target's square: 1 for a student that says nothing.

    MOHAWK's stage 2 takes the plain norm; relative to the target all layers count alike, whatever their scale.

    Args:
        student: (B, L, D) outputs.
        teacher: (B, L, D) targets.
    """
    error = (student.float() - teacher.float()).square().sum((1, 2))
    return (error / teacher.float().square().sum((1, 2)).clamp(min=1e-12)).mean()


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    kl: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """Sum over tokens of the divergence between two models' predictions, and of the cross-entropy if weighted in.

    The divergence is multiplied by the squared temperature, which keeps its gradient's scale (Hinton et al.,
    arXiv 1503.02531, section 2).

    Args:
        student: (tokens, V) logits.
        teacher: (tokens, V) logits.
        targets: (tokens) next tokens, -100 where there is none.
        kl: "forward", KL(teacher || student), or "reverse", KL(student || teacher).
        temperature: divides both models' logits, positive.
        ce_weight: share of the cross-entropy in [0, 1], the rest being the divergence.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    first, second = (log_teacher, log_student) if kl == "forward" else (log_student, log_teacher)
    loss = (first.exp() * (first - second)).sum() * temperature**2
    if ce_weight:
        cross_entropy = F.cross_entropy(student.float(), targets, ignore_index=-100, reduction="sum")
        loss = (1 - ce_weight) * loss + ce_weight * cross_entropy
    return loss


def logit_loss_backward(
    student_hidden: Tensor,
    student_head: torch.nn.Module,
    teacher_hidden: Tensor,
    teacher_head: torch.nn.Module,
    input_ids: Tensor,
    *,
    kl: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> float:
    """:func:`logit_loss` per token and its backward, a few tokens' logits at a time: (B, L, V) never exists.

    Gradients reach the head's parameters chunk by chunk and the hidden states at the end.

    Args:
        student_hidden: (B, L, D) what the student's head reads, with its graph.
        student_head: the student's head.
        teacher_hidden: (B, L, D) what the teacher's head reads.
        teacher_head: the teacher's head.
        input_ids: (B, L) tokens; the target of a position is the next one.
        kl: as in :func:`logit_loss`.
        temperature: as in :func:`logit_loss`.
        ce_weight: as in :func:`logit_loss`.

    Returns:
        The loss, a mean over the B L positions.
    """
    leaf = student_hidden.detach().requires_grad_()
    tokens = input_ids.numel()
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100).flatten()
    vocabulary = student_head.get_parameter("weight").shape[0]
    chunk = max(_LOGITS_BYTES // (4 * vocabulary), 1)
    total = 0.0
    rows = zip(
        leaf.flatten(0, 1).split(chunk), teacher_hidden.flatten(0, 1).split(chunk), targets.split(chunk), strict=True
    )
    for mine, theirs, target in rows:
        with torch.no_grad():
            teacher = teacher_head(theirs)
        loss = logit_loss(student_head(mine), teacher, target, kl=kl, temperature=temperature, ce_weight=ce_weight)
        (loss / tokens).backward()
        total += float(loss.detach())
    assert leaf.grad is not None
    student_hidden.backward(leaf.grad)
    return total / tokens
