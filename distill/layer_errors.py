"""Errors of each converted layer, for the report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..modeling import ZooHybridForCausalLM
from .objectives import matrix_distances
from .student import student_mixer
from .teacher import Teacher


def layer_windows(windows: Tensor) -> Tensor:
    """Return those of the (N, L) held-out windows on which an evaluation measures the errors of each layer.

    Two, or one of 2,048 tokens or more: a matrix per head and layer is costly.
    """
    return windows[: 2 if windows.shape[1] < 2048 else 1]


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
                errors, targets = (
                    part.double().sum((0, 2)) for part in matrix_distances(student, teacher, layer, normed_input)
                )
                row["matrix_error"] = (errors / targets.clamp(min=1e-24)).sqrt().tolist()
            if hasattr(mixer, "log_decay"):
                rates = -mixer.log_decay(normed_input).float().mean((0, 1))  # pyright: ignore[reportCallIssue]
                row["half_life"] = [0.6931471805599453 / rate if rate > 1e-6 else None for rate in rates.tolist()]
            rows.append(row)

    teacher.capture(ids, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    return rows


def _relative(value: Tensor, target: Tensor) -> float:
    return float((value.float() - target.float()).norm() / target.float().norm().clamp(min=1e-12))
