"""The training objectives: each computes the loss of a stage from a batch of token ids.

Targets are streamed: during one forward pass of the teacher, the student's layer runs forward and backward on each
layer's activations as soon as they are computed. The activations of one layer are in memory at a time, and none are
stored (the hidden states of an epoch would be terabytes; arXiv 2408.10189 does not store them either).

The gradients are therefore computed together with the loss. The loss returns them in its backward pass (`_Computed`),
where wrappers that average or shard gradients over processes expect them. For the same reason the student's weights are
only used by calling a block, or the wrapped module that contains the whole student.

Every loss is a mean over sequences, so the losses of the parts of a batch can be averaged.

Symbols: B batch, L length, D width, H heads, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.hidden_states import head_of
from ..modeling import ZooHybridForCausalLM
from .recipe import StageSpec
from .student import student_mixer
from .teacher import Teacher

# Names of the losses in reports and plots.
LOSS_NAMES = {
    "matrix_orientation": "Frobenius norm of the matrix error",
    "hidden_state_alignment": "relative squared error",
    "logit_distillation": "divergence (nats/token)",
}
# Bound on one model's float32 logits in memory at one time in `chunked_logit_loss`.
_LOGITS_BYTES = 64 * 2**20


def objective(
    stage: StageSpec, student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Return the function that computes a stage's loss, with gradients, from (B, L) token ids.

    Args:
        stage: the stage.
        student: the student, whose trained weights require gradients.
        teacher: the teacher, frozen and in evaluation mode.
        layers: converted layers; the loss of a layer-wise objective is the mean over them.
    """
    if stage.objective == "matrix_orientation":
        return lambda ids: matrix_orientation(student, teacher, layers, ids)
    if stage.objective == "hidden_state_alignment":
        return lambda ids: hidden_state_alignment(student, teacher, layers, ids, target=stage.target)
    return lambda ids: logit_distillation(
        student, teacher, ids, kl=stage.kl, temperature=stage.temperature, ce_weight=stage.ce_weight
    )


def matrix_orientation(student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], ids: Tensor) -> Tensor:
    """Compute MOHAWK's stage 1: the distance of mixing and attention matrices, on the teacher's hidden states.

    The (B, H, L, L) matrices of one layer are in memory at a time.
    """

    def loss(layer: int, normed_input: Tensor) -> Tensor:
        with torch.no_grad():
            attention = teacher.attention_matrix(layer, normed_input)
        sequence = student.backbone.sequence_of(normed_input)
        mixer: Any = student_mixer(student, layer)
        return matrix_loss(mixer.hidden_attention(normed_input, sequence), attention)

    return _mean_over_layers(student, teacher, layers, ids, ("normed_input",), loss)


def hidden_state_alignment(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], ids: Tensor, *, target: str
) -> Tensor:
    """Compute MOHAWK's stage 2: the distance of mixers' (or blocks') outputs, on the teacher's hidden states."""

    def of_mixer(layer: int, normed_input: Tensor, attention_output: Tensor) -> Tensor:
        output, *_ = student_mixer(student, layer)(normed_input, student.backbone.sequence_of(normed_input))
        return alignment_loss(output, attention_output)

    def of_block(layer: int, block_input: Tensor, block_output: Tensor) -> Tensor:
        forward: Any = type(student.backbone.layers[layer]).forward
        sequence = student.backbone.sequence_of(block_input)
        output, *_ = forward(student.backbone.layers[layer], block_input, sequence)
        # Without the residual stream, which both have in common and which would hide the differences.
        return alignment_loss(output - block_input, block_output - block_input)

    if target == "mixer_output":
        return _mean_over_layers(student, teacher, layers, ids, ("normed_input", "attention_output"), of_mixer)
    return _mean_over_layers(student, teacher, layers, ids, ("block_input", "block_output"), of_block)


def logit_distillation(
    student: ZooHybridForCausalLM, teacher: Teacher, ids: Tensor, *, kl: str, temperature: float, ce_weight: float
) -> Tensor:
    """Compute MOHAWK's stage 3: the divergence of the student's predictions from the teacher's."""
    with torch.no_grad():
        theirs = teacher.model.base_model(ids, use_cache=False).last_hidden_state
    mine = student.backbone(ids, use_cache=False).last_hidden_state
    return chunked_logit_loss(
        mine,
        head_of(student),
        theirs,
        head_of(teacher.model),
        ids,
        kl=kl,
        temperature=temperature,
        ce_weight=ce_weight,
    )


def _mean_over_layers(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    ids: Tensor,
    what: Sequence[str],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Return the mean of the layers' losses on activations captured in one forward pass of the teacher."""
    losses: list[Tensor] = []

    def on_layer(layer: int, **captured: Tensor) -> None:
        block = student.backbone.layers[layer]

        def computed(*tensors: Tensor) -> Tensor:
            value = loss(layer, *tensors)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            return _computed(value, trained, torch.autograd.grad(value, trained, allow_unused=True))

        with _called_instead(block, computed):
            losses.append(block(*(captured[name] for name in what)))

    teacher.capture(ids, layers, what, on_layer=on_layer)
    return torch.stack(losses).mean()


@contextmanager
def _called_instead(block: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a block's forward by a function; sharded weights are gathered when the block is called."""
    before = block.__dict__.get("forward")
    block.forward = function
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


class _Computed(torch.autograd.Function):
    """A loss with precomputed gradients, which its backward pass returns once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *_tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(gradient * outer[0].to(gradient.dtype) for gradient in gradients)


def _computed(loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Attach gradients with respect to some tensors to a loss; None means that it does not depend on a tensor."""
    known = [(tensor, part) for tensor, part in zip(tensors, gradients, strict=True) if part is not None]
    return _Computed.apply(  # pyright: ignore[reportReturnType]
        loss.detach(), [part for _, part in known], *(tensor for tensor, _ in known)
    )


def matrix_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over sequences and heads of the difference's Frobenius norm (MOHAWK, arXiv 2408.10189, eq. 2).

    Args:
        student: (B, H, L, L) mixing matrices.
        teacher: (B, H, L, L) attention matrices.
    """
    return (student - teacher).flatten(2).norm(dim=-1).mean()


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over sequences of the squared error relative to the squared target; 1 for an output of zero.

    MOHAWK's stage 2 uses the plain norm. With the relative error all layers have the same weight.

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
    vocabulary = next(student_head.parameters()).shape[0]
    chunk = max(_LOGITS_BYTES // (4 * vocabulary), 1)
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
    return _computed(total, [student_hidden, *trained], [torch.cat(of_hidden).view_as(student_hidden), *of_head])


@torch.no_grad()
def layer_errors(student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], ids: Tensor) -> list[dict]:
    """Measure the errors of each converted layer on the teacher's hidden states.

    Returns:
        For each layer a dictionary with "layer", "output_error" (`||y - t|| / ||t||` of the mixer's output),
        "matrix_error" (the same for the mixing matrix of each head) and "half_life" (tokens after which a head's state
        has halved, from its mean log-decay on these tokens; None without decay). The last two are empty for attention;
        the last one is also empty for masked mixing.
    """
    rows: list[dict] = []

    def on_layer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        with torch.no_grad():
            mixer = student_mixer(student, layer)
            sequence = student.backbone.sequence_of(normed_input)
            output, _ = mixer(normed_input, sequence)
            row = {
                "layer": layer,
                "output_error": _relative(output, attention_output),
                "matrix_error": [],
                "half_life": [],
            }
            if hasattr(mixer, "hidden_attention"):
                attention = teacher.attention_matrix(layer, normed_input)
                matrix = mixer.hidden_attention(normed_input, sequence)  # pyright: ignore[reportCallIssue]
                row["matrix_error"] = [
                    _relative(matrix[:, head], attention[:, head]) for head in range(attention.shape[1])
                ]
            if hasattr(mixer, "log_decay"):
                rates = -mixer.log_decay(normed_input).float().mean((0, 1))  # pyright: ignore[reportCallIssue]
                row["half_life"] = [0.6931471805599453 / rate if rate > 1e-6 else None for rate in rates.tolist()]
            rows.append(row)

    teacher.capture(ids, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    return rows


def _relative(value: Tensor, target: Tensor) -> float:
    return float((value.float() - target.float()).norm() / target.float().norm().clamp(min=1e-12))
