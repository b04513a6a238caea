"""Closed-form initialisation of a student's mixers from the teacher's statistics, before any training step.

Copied projections do not determine decays, and an un-normalised state has another scale than softmax's averages, so a
student may start orders of magnitude away from its teacher. Two fits on a few thousand tokens correct both.

1. Half-lives: each head gets the candidate whose mixing matrix, applied to the teacher's values, is closest to the
   attention's output, up to scale. (Comparing the matrices themselves would choose badly: many heads attend to the
   first token, whose value is almost zero, and a matrix without decay fits that column best.)
2. Output projection: the teacher's attention output is approximately a linear function of the input of the student's
   `out_proj`. The least-squares solution, with one factor per head or for the whole matrix (shrunk towards the copied
   one), is on these tokens at least as good as an output of zero.

A masked mixer has no decays: before step 2 its weights are set to the teacher's average attention over the same tokens.
A head whose attention does not depend on its input is one constant matrix, which is what a masked mixer learns. PAPA
replaces a head by the same average over a corpus (Hassid et al., "How Much Does Attention Actually Attend?", Findings
of EMNLP 2022), for encoders; here it is causal: row i is the average over the documents with more than i tokens, and
therefore sums to 1.

Symbols: B batch, L length, D width, E inner width, H heads, P head width, N positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling import ZooHybridForCausalLM
from .data import TokenWindows
from .healing import heal
from .least_squares import Moments, add_moments, ridge, scale_heads
from .recipe import Recipe, StudentSpec
from .student import entering, output_projection, student_mixer
from .teacher import Teacher

# Candidates for a head's half-life, in tokens; with the last one the state hardly decays.
_HALF_LIVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
HALF_LIFE_WINDOWS = 2
"""Windows that half-lives are chosen on, at most: there is a matrix for every candidate, and more hardly change it."""
# Ridge strength, as a share of the mean square of the inputs of `out_proj`.
_RIDGE = 1e-2


def calibration_windows(recipe: Recipe, train: TokenWindows) -> Tensor:
    """Return the (N, L) windows of the training text for the calibration and the refits of a recipe, each once."""
    length = recipe.calibration_length
    count = min(max(recipe.student.calibration_tokens // length, 1), train.count(length))
    # With another seed than the training, which therefore starts with other windows.
    return train.batch(0, count, length, recipe.seed + 1)


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
    """Set half-lives, average attention and output projections of the converted layers, in place.

    Args:
        student: the student of :func:`~ssm_zoo.distill.student.build_student`.
        teacher: its teacher, in evaluation mode.
        spec: student's part of the recipe; `half_life` and `calibration` select the steps.
        layers: converted layers.
        windows: (N, L) int64 token windows; masked mixing needs at least as many tokens as positions.
        batch_size: windows in one forward.
        progress: show progress bars.
    """
    masked = with_ability(student, layers, "set_average_attention")
    if masked:
        documents, positions = list(windows), student.config.max_position_embeddings
        averages = average_attention(teacher, masked, documents, positions, batch_size=batch_size, progress=progress)
        for layer, matrix in averages.items():
            student_mixer(student, layer).set_average_attention(matrix)  # pyright: ignore[reportCallIssue]
    state_space = with_ability(student, layers, "set_half_lives")
    if state_space and spec.half_life == "calibrated":
        calibrate_half_lives(student, teacher, state_space, windows[:HALF_LIFE_WINDOWS])
    if spec.calibration == "sequential":
        heal(student, teacher, layers, windows, gates=True, batch_size=batch_size, progress=progress)
    elif spec.calibration != "none":
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
    """Compute each head's mean attention between each pair of positions.

    Args:
        teacher: the teacher, in evaluation mode.
        layers: layers of the teacher, each once.
        documents: (T) token ids of each document, of any lengths; only the first N tokens are used.
        positions: number of positions, N.
        batch_size: documents in one forward pass, padded on the right.
        progress: show a progress bar.

    Returns:
        For each layer (H, N, N) float32 on the teacher's device, zero above the diagonal; rows sum to 1.

    Raises:
        ValueError: if no document has N tokens, or an argument is out of range. Nothing is computed in these cases.
    """
    if positions < 1 or batch_size < 1:
        raise ValueError(f"`positions` and `batch_size` must be at least 1, got {positions} and {batch_size}.")
    longest = max((len(document) for document in documents), default=0)
    if longest < positions:
        raise ValueError(
            f"`documents` must have one with at least `positions` = {positions} tokens, but the longest of "
            f"{len(documents)} has {longest}."
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

        # No mask is needed: attention is causal, and the padding follows the tokens.
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
        layers: converted layers.
        windows: (N, L) int64 token windows; for "sequential" at least two.
        method: "head_scale" (one factor per head), "ridge" (the whole matrix, shrunk towards the scaled one), both on
            the teacher's activations, or "sequential" (`healing.py`, on the student's). Biases are unchanged.
        batch_size: windows in one forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: if a mixer has no output projection. Nothing is changed in this case.
    """
    if method == "sequential":
        heal(student, teacher, layers, windows, batch_size=batch_size, progress=progress)
        return
    projections = {layer: output_projection(student, layer) for layer in layers}
    moments: dict[int, Moments] = {}

    def on_layer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        inputs = _entering_out_proj(student, layer, normed_input).flatten(0, 1)
        target = attention_output.flatten(0, 1).float()
        bias = projections[layer].bias
        if isinstance(bias, Tensor):
            target = target - bias.detach()
        add_moments(moments, layer, Moments.of(inputs, target))

    for batch in tqdm(windows.split(batch_size), desc="fit", unit="batch", disable=not progress, leave=False):
        ids = batch.to(teacher.model.device)
        teacher.capture(ids, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    for layer, moment in moments.items():
        weight = projections[layer].weight
        heads = int(student_mixer(student, layer).num_heads)  # pyright: ignore[reportArgumentType]
        fitted = scale_heads(weight.detach().double(), moment.inputs, moment.cross, heads)
        if method == "ridge":
            fitted = ridge(fitted, moment.inputs, moment.cross, _RIDGE)
        with torch.no_grad():
            weight.copy_(fitted)


@torch.no_grad()
def calibrate_half_lives(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], windows: Tensor
) -> None:
    """Give each head of state-space layers the half-life that matches the teacher best on (N, L) windows, in place."""

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


def with_ability(student: ZooHybridForCausalLM, layers: Sequence[int], ability: str) -> list[int]:
    """Return the layers whose mixer has an attribute, i.e. supports an operation (`modeling/mixer.py`)."""
    return [layer for layer in layers if hasattr(student_mixer(student, layer), ability)]


@torch.no_grad()
def _entering_out_proj(student: ZooHybridForCausalLM, layer: int, normed_input: Tensor) -> Tensor:
    """Return the (B, L, E) input of the mixer's output projection."""
    mixer = student_mixer(student, layer)

    def run(normed: Tensor) -> None:
        mixer(normed.float(), student.backbone.sequence_of(normed))

    return entering(output_projection(student, layer), run, [normed_input])[0]
