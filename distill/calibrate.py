"""Closed-form start of a student's mixers from the teacher's statistics, before any training step.

Copied projections say nothing about decays, and an un-normalised state has another scale than softmax's averages: a
student may start orders of magnitude away from its teacher. Two looks at a few thousand tokens mend both.

1. Half-lives: for each head, of a few candidates the one whose mixing matrix, applied to the teacher's values, comes
   closest to the attention's output, up to scale. (Closest as matrices would be another one: many heads rest on the
   first token, whose value is next to nothing, and a matrix that never forgets fits that column best.)
2. Output projection: the teacher's attention output is a linear function of what enters the student's `out_proj`, up to
   an error. Its least-squares solution, one factor per head or the whole matrix shrunk towards the copied one, cannot
   do worse on these tokens than saying nothing.

A masked mixer has no decays: its weights become the teacher's average attention over the same tokens, before 2. A head
whose attention does not depend on its input is one constant matrix, which is what a masked mixer learns. The average
over a corpus is the constant that PAPA puts in a head's place (Hassid et al., "How Much Does Attention Actually
Attend?", Findings of EMNLP 2022), there of encoders, here causal: row i is the average over the documents that have
more than i tokens, and so sums to 1 as their rows do.

Symbols: B batch, L length, D width, E inner width, H heads, P head width, N positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling import ZooHybridForCausalLM
from .recipe import StudentSpec
from .student import student_mixer
from .teacher import Teacher

# Half-lives in tokens that a head may get; the last one hardly forgets.
_HALF_LIVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
# Ridge strength, as a share of the mean square of the inputs of `out_proj`.
_RIDGE = 1e-2


@dataclass
class _Moments:
    """Second moments of what enters `out_proj` (E) and of the teacher's attention output (D), in float64."""

    inputs: Tensor  # (E, E)
    cross: Tensor  # (E, D)


def calibrate(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    spec: StudentSpec,
    layers: Sequence[int],
    windows: Tensor,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> None:
    """Set half-lives, average attention and output projections of the converted layers as `spec` says, in place.

    Args:
        student: the student of :func:`~ssm_zoo.distill.student.build_student`.
        teacher: its teacher, in evaluation mode.
        spec: `half_life` and `calibration` say what is done.
        layers: converted layers.
        windows: (N, L) int64 token windows, for masked mixing at least as long as it has positions.
        batch_size: windows in one forward.
        progress: show progress bars.
    """
    masked = _with(student, layers, "set_average_attention")
    if masked:
        documents, positions = list(windows), student.config.max_position_embeddings
        averages = average_attention(teacher, masked, documents, positions, batch_size=batch_size, progress=progress)
        for layer, matrix in averages.items():
            student_mixer(student, layer).set_average_attention(matrix)  # pyright: ignore[reportCallIssue]
    state_space = _with(student, layers, "set_half_lives")
    if state_space and spec.half_life == "calibrated":
        # A matrix per candidate: one window tells as much about a decay as many do.
        _calibrate_half_lives(student, teacher, state_space, windows[: min(2, len(windows))])
    if spec.calibration != "none":
        fit_output_projections(
            student, teacher, layers, windows, spec.calibration, batch_size=batch_size, progress=progress
        )


def average_attention(
    teacher: Teacher,
    layers: Sequence[int],
    documents: Sequence[Tensor],
    positions: int,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> dict[int, Tensor]:
    """Mean attention of each head between each pair of positions.

    Args:
        teacher: in evaluation mode.
        layers: layers of it, each once.
        documents: (T) token ids each, of any lengths, the rows of a (documents, T) tensor say; a document counts with
            its first N tokens.
        positions: N.
        batch_size: documents in one forward, filled up at their right.
        progress: show a progress bar.

    Returns:
        For each layer (H, N, N) float32 on the teacher's device, zero above the diagonal; rows sum to 1.

    Raises:
        ValueError: if no document reaches position N - 1, or an argument is out of range; nothing has run then.
    """
    if positions < 1 or batch_size < 1:
        raise ValueError(f"positions and batch_size must be at least 1, got {positions} and {batch_size}")
    longest = max((len(document) for document in documents), default=0)
    if longest < positions:
        raise ValueError(
            f"positions: got {positions}, but the longest of the {len(documents)} documents has {longest} tokens; "
            "accepted: at most that"
        )
    device = teacher.model.device
    heads = {layer: teacher.attention(layer).num_heads for layer in layers}
    sums = {layer: torch.zeros(heads[layer], positions, positions, device=device) for layer in layers}
    reached = torch.zeros(positions, device=device)
    starts = range(0, len(documents), batch_size)
    for start in tqdm(starts, desc="average attention", unit="batch", disable=not progress, leave=False):
        rows = [document[:positions] for document in documents[start : start + batch_size] if len(document)]
        if not rows:
            continue
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
        length = ids.shape[1]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        real = torch.arange(length, device=device) < lengths[:, None]
        reached[:length] += real.sum(0)

        def on_layer(layer: int, normed_input: Tensor, real: Tensor = real, length: int = length) -> None:
            with torch.no_grad():
                matrix = teacher.attention_matrix(layer, normed_input) * real[:, None, :, None]
                sums[layer][:, :length, :length] += matrix.sum(0)

        # Without a mask: a document's tokens look back, and its padding follows them.
        teacher.capture(ids, layers, ("normed_input",), on_layer=on_layer)
    return {layer: total / reached[:, None] for layer, total in sums.items()}


def fit_output_projections(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    windows: Tensor,
    method: str,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> None:
    """Fit the output projections of the converted layers to the teacher's attention outputs, in place.

    Args:
        student: the student.
        teacher: its teacher, in evaluation mode.
        layers: converted layers; those of attention are left alone.
        windows: (N, L) int64 token windows.
        method: "head_scale", one factor per head, or "ridge", the whole matrix, shrunk towards the scaled one. A bias
            stays as it is.
        batch_size: windows in one forward.
        progress: show a progress bar.
    """
    layers = _with(student, layers, "out_proj")
    moments: dict[int, _Moments] = {}

    def on_layer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        entering = _entering_out_proj(student, layer, normed_input).flatten(0, 1).float()
        target = attention_output.flatten(0, 1).float()
        bias = student_mixer(student, layer).get_submodule("out_proj").bias
        if isinstance(bias, Tensor):
            target = target - bias.detach()
        with torch.autocast(entering.device.type, enabled=False):  # a batch in float32, the sum in float64
            inputs, cross = (entering.T @ entering).double(), (entering.T @ target).double()
        if layer in moments:
            moments[layer].inputs += inputs
            moments[layer].cross += cross
        else:
            moments[layer] = _Moments(inputs, cross)

    for batch in tqdm(windows.split(batch_size), desc="fit", unit="batch", disable=not progress, leave=False):
        ids = batch.to(teacher.model.device)
        if layers:
            teacher.capture(ids, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    for layer, moment in moments.items():
        mixer = student_mixer(student, layer)
        weight = mixer.get_submodule("out_proj").get_parameter("weight")
        heads = int(mixer.num_heads)  # pyright: ignore[reportArgumentType]
        fitted = scale_heads(weight.detach().double(), moment.inputs, moment.cross, heads)
        if method == "ridge":
            fitted = ridge(fitted, moment.inputs, moment.cross, _RIDGE)
        with torch.no_grad():
            weight.copy_(fitted)


def _with(student: ZooHybridForCausalLM, layers: Sequence[int], ability: str) -> list[int]:
    """Those of the layers whose mixer has an attribute that says what it can do (`modeling/mixer.py`)."""
    return [layer for layer in layers if hasattr(student_mixer(student, layer), ability)]


def scale_heads(weight: Tensor, inputs: Tensor, cross: Tensor, heads: int) -> Tensor:
    """The output projection with the best factor for each head's columns.

    Minimises `|| sum_h s_h W_h y_h - t ||^2` over s; the normal equations have one row and column per head.

    Args:
        weight: (D, E) output projection W.
        inputs: (E, E) sum of `y y^T`.
        cross: (E, D) sum of `y t^T`.
        heads: H, into which E is divided.

    Returns:
        (D, E) scaled projection.
    """
    columns = weight.unflatten(1, (heads, -1))  # (D, H, P)
    blocks = inputs.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # (H, P, H, P)
    normal = torch.einsum("dhp,hpgq,dgq->hg", columns, blocks, columns)
    right = torch.einsum("dhp,hpd->h", columns, cross.unflatten(0, (heads, -1)))
    normal = normal + torch.eye(heads, dtype=normal.dtype, device=normal.device) * normal.diagonal().mean() * 1e-6
    return (columns * torch.linalg.solve(normal, right)[None, :, None]).flatten(1)


def ridge(weight: Tensor, inputs: Tensor, cross: Tensor, strength: float) -> Tensor:
    """The least-squares output projection, shrunk towards `weight`.

    Args:
        weight: (D, E) projection to stay near.
        inputs: (E, E) sum of `y y^T`.
        cross: (E, D) sum of `y t^T`.
        strength: penalty on the squared distance, relative to the mean of the diagonal of `inputs`.

    Returns:
        (D, E) projection.
    """
    penalty = strength * inputs.diagonal().mean()
    regular = inputs + penalty * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    return torch.linalg.solve(regular, cross + penalty * weight.T).T


@torch.no_grad()
def _entering_out_proj(student: ZooHybridForCausalLM, layer: int, normed_input: Tensor) -> Tensor:
    """(B, L, E) what the mixer's output projection reads."""
    mixer = student_mixer(student, layer)
    seen: list[Tensor] = []
    handle = mixer.get_submodule("out_proj").register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        mixer(normed_input.float(), student.backbone.sequence_of(normed_input))
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def _calibrate_half_lives(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], windows: Tensor
) -> None:
    def on_layer(layer: int, normed_input: Tensor) -> None:
        mixer = student_mixer(student, layer)
        values = teacher.attention(layer).values(normed_input).transpose(1, 2).float()  # (B, H, L, P)
        target = teacher.attention_matrix(layer, normed_input).float() @ values
        heads = int(mixer.num_heads)  # pyright: ignore[reportArgumentType]
        errors = []
        with torch.no_grad():
            sequence = student.backbone.sequence_of(normed_input)
            for half_life in _HALF_LIVES:
                mixer.set_half_lives(torch.full((heads,), half_life, dtype=torch.float64))  # pyright: ignore[reportCallIssue]
                matrix = mixer.hidden_attention(normed_input.float(), sequence)  # pyright: ignore[reportCallIssue]
                output = matrix.float() @ values
                # 1 - cos^2 of the angle between the two, as vectors: the relative error with the best scale
                product = (output * target).sum((0, 2, 3)).square()
                errors.append(1 - product / (output.square().sum((0, 2, 3)) * target.square().sum((0, 2, 3))))
            best = torch.stack(errors).argmin(0)
            chosen = torch.tensor(_HALF_LIVES, dtype=torch.float64)[best.cpu()]
            mixer.set_half_lives(chosen)  # pyright: ignore[reportCallIssue]

    teacher.capture(windows.to(teacher.model.device), layers, ("normed_input",), on_layer=on_layer)
