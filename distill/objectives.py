"""The training objectives: each turns a batch of token ids into gradients of the student and a loss to show.

Targets are streamed: one forward of the teacher hands over each layer's activations when they come up, the student's
mixer runs forward and backward on them at once, and they are gone. One layer's activations are alive at a time, and
nothing is stored (an epoch of hidden states would be terabytes, arXiv 2408.10189 stores none either).

Symbols: B batch, L length, D width, H heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling import ZooHybridForCausalLM
from .losses import alignment_loss, logit_loss_backward, matrix_loss
from .recipe import StageSpec
from .student import student_mixer
from .teacher import capture, teacher_adapter

# What a stage's loss is called where people see it.
LOSS_NAMES = {
    "matrix_orientation": "Frobenius norm of the matrix error",
    "hidden_state_alignment": "relative squared error",
    "logit_distillation": "divergence (nats/token)",
}


def objective(
    stage: StageSpec, student: ZooHybridForCausalLM, teacher: PreTrainedModel, layers: Sequence[int]
) -> Callable[[Tensor], float]:
    """The function of a stage that takes (B, L) token ids, adds the gradients of its loss, and returns the loss.

    Args:
        stage: says which.
        student: its mixers, or all of it, require gradients.
        teacher: frozen, in evaluation mode.
        layers: converted layers; the loss of a layer-wise objective is the mean over them.
    """
    if stage.objective == "matrix_orientation":
        return lambda ids: matrix_orientation(student, teacher, layers, ids)
    if stage.objective == "hidden_state_alignment":
        return lambda ids: hidden_state_alignment(student, teacher, layers, ids, target=stage.target)
    return lambda ids: logit_distillation(
        student, teacher, ids, kl=stage.kl, temperature=stage.temperature, ce_weight=stage.ce_weight
    )


def matrix_orientation(
    student: ZooHybridForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], ids: Tensor
) -> float:
    """MOHAWK's stage 1: each mixer's mixing matrix towards the attention matrix, on the teacher's hidden states.

    One layer's (B, H, L, L) matrices are alive at a time.
    """
    adapter = teacher_adapter(teacher)
    losses: list[float] = []

    def on_layer(layer: int, normed_input: Tensor) -> None:
        with torch.no_grad():
            attention = adapter.attention_matrix(layer, normed_input)
        mixer = student_mixer(student, layer)
        sequence = student.backbone.sequence_of(normed_input)
        matrix = mixer.hidden_attention(normed_input, sequence)  # pyright: ignore[reportCallIssue]
        losses.append(_backward(matrix_loss(matrix, attention), len(layers)))

    capture(teacher, ids, layers, ("normed_input",), on_layer=on_layer)
    return sum(losses) / len(losses)


def hidden_state_alignment(
    student: ZooHybridForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], ids: Tensor, *, target: str
) -> float:
    """MOHAWK's stage 2: each mixer's (or block's) output towards the teacher's, on the teacher's hidden states."""
    losses: list[float] = []

    def on_mixer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        output, _ = student_mixer(student, layer)(normed_input, student.backbone.sequence_of(normed_input))
        losses.append(_backward(alignment_loss(output, attention_output), len(layers)))

    def on_block(layer: int, block_input: Tensor, block_output: Tensor) -> None:
        output, _ = student.backbone.layers[layer](block_input, student.backbone.sequence_of(block_input))
        # What the block adds: the residual stream that both share would make any block look good.
        losses.append(_backward(alignment_loss(output - block_input, block_output - block_input), len(layers)))

    if target == "mixer_output":
        capture(teacher, ids, layers, ("normed_input", "attention_output"), on_layer=on_mixer)
    else:
        capture(teacher, ids, layers, ("block_input", "block_output"), on_layer=on_block)
    return sum(losses) / len(losses)


def logit_distillation(
    student: ZooHybridForCausalLM,
    teacher: PreTrainedModel,
    ids: Tensor,
    *,
    kl: str,
    temperature: float,
    ce_weight: float,
) -> float:
    """MOHAWK's stage 3: the whole student's predictions towards the teacher's."""
    with torch.no_grad():
        theirs = teacher.base_model(ids, use_cache=False).last_hidden_state
    mine = student.backbone(ids, use_cache=False).last_hidden_state
    return logit_loss_backward(
        mine,
        student.lm_head,
        theirs,
        teacher.get_output_embeddings(),  # pyright: ignore[reportArgumentType]
        ids,
        kl=kl,
        temperature=temperature,
        ce_weight=ce_weight,
    )


def _backward(loss: Tensor, layers: int) -> float:
    (loss / layers).backward()
    return float(loss.detach())


@torch.no_grad()
def layer_errors(
    student: ZooHybridForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], ids: Tensor
) -> list[dict]:
    """How far each converted layer is from the teacher's, on the teacher's hidden states.

    Returns:
        For each layer a dictionary with "layer", "output_error" (`||y - t|| / ||t||` of the mixer's output),
        "matrix_error" (the same of the mixing matrix, for each head) and "half_life" (tokens in which a head's state
        halves, from its mean log-decay on these tokens; None where it does not decay). The last two are empty for
        attention, the last one for masked mixing too.
    """
    adapter = teacher_adapter(teacher)
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
                attention = adapter.attention_matrix(layer, normed_input)
                matrix = mixer.hidden_attention(normed_input, sequence)  # pyright: ignore[reportCallIssue]
                row["matrix_error"] = [
                    _relative(matrix[:, head], attention[:, head]) for head in range(attention.shape[1])
                ]
            if hasattr(mixer, "log_decay"):
                rates = -mixer.log_decay(normed_input).float().mean((0, 1))  # pyright: ignore[reportCallIssue]
                row["half_life"] = [0.6931471805599453 / rate if rate > 1e-6 else None for rate in rates.tolist()]
            rows.append(row)

    capture(teacher, ids, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    return rows


def _relative(value: Tensor, target: Tensor) -> float:
    return float((value.float() - target.float()).norm() / target.float().norm().clamp(min=1e-12))
