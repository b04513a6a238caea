"""Sequential healing: solve one converted layer after another on the activations of the partly converted student.

A single-pass fit (`calibrate.py`) makes each mixer imitate the teacher's attention on the *teacher's* activations. Once
several layers are converted, a layer reads the errors of those before it, and nothing makes up for them. Here the
residual streams of both models advance together, one block at a time, and a converted layer is solved when the streams
have reached it:

0. Before the training, the gates of a mixer that has them (`gates.py`).
1. The output projection W of the mixer minimises `|| W y - (r - x) ||^2`, where x is the student's stream before the
   mixer, y what enters the projection when the mixer reads that stream, and r the teacher's stream after its attention.
   The target contains the errors of all earlier layers, so that each layer corrects them as far as it can.
2. The down projection of the MLP is solved in the same way, with the teacher's stream after its MLP.

Errors are relative to the mean square of the stream at their token, by which the norm of the next reader divides: the
first token of a window, whose stream may be thousands of times as large, would decide all otherwise. The larger of both
streams counts. Otherwise a token at which only the student's stream is that large would dominate the fit. A token's
weight is 1 plus the attention that it receives in the teacher, summed over the tokens that attend to it and averaged
over heads and layers, because an error at a token spreads to every token that attends to it. Half of all attention may
rest on the first token. If it had the weight of any other, a student could lose the large activation by which later
layers recognise this token.

A fifth of the windows is held out and chooses the ridge strength; a projection that no strength improves is left as it
is. GPTQ quantises a model in the same order and for the same reason (arXiv 2210.17323).

The activations of all windows are kept, for one layer at a time: both streams and what enters one projection.

Symbols: B batch, L length, D width.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..conversion.formats.format import empty_model
from ..modeling import ZooHybridConfig, ZooHybridForCausalLM
from .gates import fit_gates
from .least_squares import Moments, add_moments, cross_validated_ridge
from .student import entering, output_projection, student_mixer
from .teacher import Teacher

# One window of so many is held out, and at least one.
_HELD_OUT = 5


def heal(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    windows: Tensor,
    *,
    gates: bool = False,
    batch_size: int = 4,
    progress: bool = True,
) -> None:
    """Solve the output projection and the MLP's down projection of each converted layer, in the order of depth.

    Args:
        student: the student, changed in place. Its half-lives and slots must have been chosen.
        teacher: its teacher.
        layers: converted layers.
        windows: (N, L) int64 token windows, at least two.
        gates: fit the gates of mixers that have them (`gates.py`), which must be open.
        batch_size: windows in one forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: if there are fewer than two windows, a mixer has no output projection, or mixer and MLP do not
            follow one another with a norm before each. Nothing is changed in these cases.
    """
    steps = heal_steps(student, teacher, layers, windows, gates=gates, batch_size=batch_size)
    with tqdm(total=max(layers) + 1, desc="heal", unit="layer", disable=not progress, leave=False) as bar:
        next(steps)
        for _ in steps:
            bar.update()


@torch.no_grad()
def heal_steps(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    windows: Tensor,
    *,
    gates: bool = False,
    batch_size: int = 4,
) -> Generator[None, None, None]:
    """Do what :func:`heal` does, and yield when the tokens are weighted and after each block up to the last converted.

    Arguments and errors are those of :func:`heal`.
    """
    if len(windows) < 2:
        raise ValueError(
            f"`windows` must be at least 2, of which one is held out, got {len(windows)}. Give more tokens."
        )
    check_blocks(student.config)
    projections = {layer: output_projection(student, layer) for layer in layers}
    held_out = torch.arange(len(windows)) % _HELD_OUT == _HELD_OUT - 1
    held_out[-1] |= not held_out.any()
    fitted, chosen = (windows[rows].to(teacher.model.device).split(batch_size) for rows in (~held_out, held_out))
    original = _as_hybrid(teacher)
    weights = [1 + _attention_received(teacher, ids) for ids in (*fitted, *chosen)]
    mine = [_embedded(student.backbone, student, ids) for ids in (*fitted, *chosen)]
    theirs = [_embedded(original, student, ids) for ids in (*fitted, *chosen)]
    yield
    for layer in range(max(layers) + 1):
        block, other = student.backbone.layers[layer], original.layers[layer].to(theirs[0])
        if gates and layer in projections and hasattr(student_mixer(student, layer), "set_gates"):
            normed = [block.get_submodule("input_layernorm")(hidden) for hidden in mine]
            outputs = entering(projections[layer], partial(_mixed, block, student), mine)
            targets = entering(other.mixer.o_proj, partial(_mixed, other, student), theirs)
            fit_gates(student_mixer(student, layer), normed, outputs, targets, len(fitted))
            del normed, outputs, targets
        _advance(theirs, partial(_mixed, other, student))
        if layer in projections:
            heads = int(student_mixer(student, layer).num_heads)  # pyright: ignore[reportArgumentType]
            _solve(projections[layer], partial(_mixed, block, student), mine, theirs, weights, len(fitted), heads)
        else:
            _advance(mine, partial(_mixed, block, student))
        _advance(theirs, partial(_transformed, other))
        if layer in projections:
            _solve(
                block.get_submodule("mlp.down_proj"), partial(_transformed, block), mine, theirs, weights, len(fitted)
            )
        else:
            _advance(mine, partial(_transformed, block))
        yield


def check_blocks(config: ZooHybridConfig) -> None:
    """Raise a ValueError if a student's blocks are not those that :func:`heal` solves half by half."""
    if config.use_parallel_residual or config.norm_placement != "before":
        raise ValueError(
            "a sequential calibration or refit needs blocks whose mixer and MLP follow one another, with a norm before "
            f"each and none behind it, got use_parallel_residual={config.use_parallel_residual} and "
            f"norm_placement={config.norm_placement!r}. Choose another calibration."
        )


def healed_parameters(student: ZooHybridForCausalLM, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the parameters outside of the mixers that :func:`heal` changes, by name."""
    names = [f"backbone.layers.{layer}.mlp.down_proj.weight" for layer in layers]
    return {name: student.get_parameter(name) for name in names}


def _as_hybrid(teacher: Teacher) -> Any:
    """Return the teacher as a `zoo_hybrid` without its head, which shares its tensors and has the blocks' two halves.

    The rotary embedding has no values: mixers get the student's, which is the same.
    """
    model = empty_model(ZooHybridForCausalLM, teacher.zoo_config)
    tensors = {name: tensor.load() for name, tensor in teacher.zoo_tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.backbone.eval()


def _attention_received(teacher: Teacher, ids: Tensor) -> Tensor:
    """Return the (B, L) attention that each token receives in the teacher, averaged over heads and layers."""
    received: list[Tensor] = []

    def on_layer(layer: int, normed_input: Tensor) -> None:
        with torch.no_grad():
            received.append(teacher.attention(layer).attention_received(normed_input).to(ids.device))

    teacher.capture(ids, range(teacher.num_layers), ("normed_input",), on_layer=on_layer)
    return torch.stack(received).float().mean(0)


def _embedded(backbone: Any, student: ZooHybridForCausalLM, ids: Tensor) -> Tensor:
    """Return the (B, L, D) input of the first block of either model in float32."""
    embeddings = backbone.embeddings(ids)
    return backbone.add_positions(embeddings, student.backbone.sequence_of(embeddings)).float()


def _mixed(block: nn.Module, student: ZooHybridForCausalLM, hidden: Tensor) -> Tensor:
    """Return what the token mixer of a block of either model adds to (B, L, D) streams."""
    normed = block.get_submodule("input_layernorm")(hidden)
    return block.get_submodule("mixer")(normed, student.backbone.sequence_of(hidden))[0]


def _transformed(block: nn.Module, hidden: Tensor) -> Tensor:
    """Return what the MLP of a block adds to (B, L, D) streams."""
    return block.get_submodule("mlp")(block.get_submodule("post_attention_layernorm")(hidden))


def _advance(streams: list[Tensor], half: Callable[[Tensor], Tensor]) -> None:
    """Add the output of half a block to the streams, in place of each (B, L, D) batch."""
    for index, hidden in enumerate(streams):
        streams[index] = hidden + half(hidden)


def _solve(
    projection: nn.Module,
    half: Callable[[Tensor], Tensor],
    mine: list[Tensor],
    theirs: list[Tensor],
    weights: list[Tensor],
    fitted: int,
    heads: int | None = None,
) -> None:
    """Solve the projection with which half a block ends, and add its output to the student's streams.

    Args:
        projection: a linear layer; its weight is replaced.
        half: half of the student's block.
        mine: the student's (B, L, D) streams before it.
        theirs: the teacher's streams after its half.
        weights: (B, L) weights of the tokens.
        fitted: number of batches that are fitted; the others are held out.
        heads: number of heads whose scales are fitted, if any.
    """
    weight, bias = projection.get_parameter("weight"), projection.bias
    batches, sums = entering(projection, half, mine), dict[bool, Moments]()
    for index, (inputs, hidden, wanted, each) in enumerate(zip(batches, mine, theirs, weights, strict=True)):
        target = wanted - hidden
        if isinstance(bias, Tensor):
            target = target - bias
        squares = [stream.square().mean(-1, keepdim=True) for stream in (wanted, hidden + projection(inputs))]
        larger = torch.maximum(*squares)
        scale = torch.where(larger > 0, each.sqrt()[..., None] * larger.rsqrt(), 0)  # zero streams have no error
        found = Moments.of((inputs * scale).flatten(0, 1), (target * scale).flatten(0, 1))
        add_moments(sums, index < fitted, found)
    weight.copy_(cross_validated_ridge(weight, sums[True], sums[False], heads))
    for index, inputs in enumerate(batches):
        mine[index] = mine[index] + projection(inputs)
