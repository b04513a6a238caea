"""The training objectives: each computes the loss of a stage from a batch of token ids.

The layer-wise objectives stream their targets (`streaming.py`). Every loss is a mean over sequences, so the losses of
the parts of a batch can be averaged.

Symbols: B batch, L length, D width, H heads, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.hidden_states import head_of
from ..kernels.matrix_distance import RowDistances, row_distances, row_distances_reference
from ..modeling import ZooHybridForCausalLM
from .layer_losses import alignment_loss, matrix_norm
from .logit_losses import chunked_logit_loss, chunked_loss, cross_entropy, stored_logit_loss
from .stages import StageSpec
from .streaming import mean_over_layers, mean_over_own_stream
from .student import student_mixer
from .teacher import Teacher

_MATRIX_NORMS = {
    "frobenius": "Frobenius norm of the matrix error",
    "relative": "relative Frobenius norm of the matrix error",
    "rows": "relative norm of the rows' errors",
}


def loss_name(stage: StageSpec) -> str:
    """Return the name of a stage's loss in reports and plots."""
    if stage.objective == "matrix_orientation":
        return _MATRIX_NORMS[stage.matrix_norm]
    if stage.objective != "logit_distillation":
        return "relative squared error"
    if stage.ce_weight == 1:
        return "cross-entropy (nats/token)"
    return "divergence (nats/token)"


def objective(
    stage: StageSpec,
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    learnt_share: float | None = None,
) -> Callable[..., Tensor]:
    """Return the function that computes a stage's loss, with gradients, from (B, L) token ids.

    That of logit distillation also takes `learnt`, (B, L) bool: the tokens to learn, and `top_ids` and `top_log_probs`
    of stored logits.

    Args:
        stage: the stage.
        student: the student, whose trained weights require gradients.
        teacher: the teacher, frozen and in evaluation mode.
        layers: converted layers; the loss of a layer-wise objective is the mean over them.
        learnt_share: share of the training text's tokens that are learnt, if there is a choice.
    """
    if stage.objective == "matrix_orientation":
        return lambda ids: matrix_orientation(student, teacher, layers, ids, norm=stage.matrix_norm)
    if stage.objective == "hidden_state_alignment":
        options = {"target": stage.target, "stream": stage.stream}
        return lambda ids: hidden_state_alignment(student, teacher, layers, ids, **options)
    if stage.objective == "last_state_alignment":
        return lambda ids: last_state_alignment(student, teacher, ids)
    names = ("kl", "temperature", "ce_weight", "reverse_weight", "jsd_beta")
    chosen: dict[str, Any] = {name: getattr(stage, name) for name in names} | {"learnt_share": learnt_share}
    return lambda ids, **given: logit_distillation(student, teacher, ids, **given, **chosen)


def matrix_orientation(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], ids: Tensor, *, norm: str
) -> Tensor:
    """Compute MOHAWK's stage 1: the distance of mixing and attention matrices, on the teacher's hidden states.

    Memory is linear in the length for mixers with `matrix_factors`. Of others the (B, H, L, L) matrices of one layer
    are in memory at a time.
    """

    def loss(layer: int, normed_input: Tensor) -> Tensor:
        return matrix_norm(matrix_distances(student, teacher, layer, normed_input), norm)

    return mean_over_layers(student, teacher, layers, ids, ("normed_input",), loss)


def matrix_distances(student: ZooHybridForCausalLM, teacher: Teacher, layer: int, normed_input: Tensor) -> RowDistances:
    """Compute the squared distances between the rows of a mixer's matrix and the teacher's attention.

    Args:
        student: the student; the mixer of `layer` has `matrix_factors` or `hidden_attention`.
        teacher: the teacher.
        layer: the layer.
        normed_input: (B, L, D) states that the attention reads.
    """
    mixer: Any = student_mixer(student, layer)
    sequence = student.backbone.sequence_of(normed_input)
    if not hasattr(mixer, "matrix_factors"):
        with torch.no_grad():
            attention = teacher.attention_matrix(layer, normed_input)
        return row_distances_reference(mixer.hidden_attention(normed_input, sequence), attention)
    view = teacher.attention(layer)
    with torch.no_grad():
        queries, keys = view.queries_keys(normed_input)
    limits = {"window": view.window, "softcap": view.softcap}
    return row_distances(mixer.matrix_factors(normed_input, sequence), queries, keys, view.scaling, **limits)


def hidden_state_alignment(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], ids: Tensor, *, target: str, stream: str
) -> Tensor:
    """Compute MOHAWK's stage 2: the distance of mixers' (or blocks') outputs.

    The student's layers read the teacher's hidden states, or the student's own. On its own stream, the block's output
    is the stream after it, so that a layer corrects the errors of those before it.
    """
    of_mixer = target == "mixer_output"
    if stream == "student":
        what = ("attention_output",) if of_mixer else ("block_input", "block_output")
        loss = _of_own_mixer if of_mixer else _of_own_block
        return mean_over_own_stream(
            student, teacher, layers, ids, what, lambda layer, *tensors: loss(student, layer, *tensors)
        )

    def on_teachers_stream(layer: int, entering: Tensor, leaving: Tensor) -> Tensor:
        if of_mixer:
            output, *_ = student_mixer(student, layer)(entering, student.backbone.sequence_of(entering))
            return alignment_loss(output, leaving)
        # Without the residual stream, which both have in common and which would hide the differences.
        return alignment_loss(_run_block(student, layer, entering) - entering, leaving - entering)

    what = ("normed_input", "attention_output") if of_mixer else ("block_input", "block_output")
    return mean_over_layers(student, teacher, layers, ids, what, on_teachers_stream)


def _run_block(student: ZooHybridForCausalLM, layer: int, hidden: Tensor) -> Tensor:
    """Return the (B, L, D) output of a block, which may be within a call of it (`streaming.py`)."""
    block = student.backbone.layers[layer]
    forward: Any = type(block).forward
    return forward(block, hidden, student.backbone.sequence_of(hidden))[0]


def _of_own_mixer(
    student: ZooHybridForCausalLM, layer: int, hidden: Tensor, attention_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the error of the mixer's output, and the stream after the block."""
    outputs: list[Tensor] = []
    handle = student_mixer(student, layer).register_forward_hook(lambda _module, _args, out: outputs.append(out[0]))
    try:
        after = _run_block(student, layer, hidden)
    finally:
        handle.remove()
    return alignment_loss(outputs[0], attention_output), after


def _of_own_block(
    student: ZooHybridForCausalLM, layer: int, hidden: Tensor, block_input: Tensor, block_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the error of the stream after the block, relative to what the teacher's block adds, and the stream."""
    after = _run_block(student, layer, hidden)
    return alignment_loss(after - block_input, block_output - block_input), after


def last_state_alignment(student: ZooHybridForCausalLM, teacher: Teacher, ids: Tensor) -> Tensor:
    """Compute the distance of the last hidden states, which the heads read, end to end."""
    with torch.no_grad():
        theirs = teacher.model.base_model(ids, use_cache=False).last_hidden_state
    return alignment_loss(student.backbone(ids, use_cache=False).last_hidden_state, theirs)


def logit_distillation(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    ids: Tensor,
    *,
    top_ids: Tensor | None = None,
    top_log_probs: Tensor | None = None,
    learnt: Tensor | None = None,
    learnt_share: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute MOHAWK's stage 3: the divergence of the student's predictions from the teacher's.

    The teacher runs, or its most likely tokens are given (`stored_logits.py`), or it has no weight beside the
    cross-entropy. `options` are keyword arguments of :func:`logit_loss`.
    """
    if options.get("ce_weight") == 1:  # see StageSpec.reads_predictions
        mine = student.backbone(ids, use_cache=False).last_hidden_state
        return chunked_loss(mine, head_of(student), (), ids, cross_entropy, learnt, learnt_share)
    if top_ids is None or top_log_probs is None:
        with torch.no_grad():
            theirs = teacher.model.base_model(ids, use_cache=False).last_hidden_state
        mine = student.backbone(ids, use_cache=False).last_hidden_state
        options |= {"learnt": learnt, "learnt_share": learnt_share}
        return chunked_logit_loss(mine, head_of(student), theirs, head_of(teacher.model), ids, **options)

    def loss(logits: Tensor, target: Tensor, top: Tensor, log_probs: Tensor) -> Tensor:
        return stored_logit_loss(logits, top, log_probs, target, **options)

    mine = student.backbone(ids, use_cache=False).last_hidden_state
    return chunked_loss(mine, head_of(student), (top_ids, top_log_probs), ids, loss, learnt, learnt_share)
