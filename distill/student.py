"""Build a student from a Transformer: convert it to `zoo_hybrid`, and replace the token mixer of chosen layers.

With an identity convolution, an open gate and copied projections, a discrete Mamba-2 mixer starts as linear attention
with decay and the teacher's queries, keys and values: un-normalised with the identity feature map (MOHAWK's mixer,
arXiv 2408.10189), or with softplus features and rows that sum to 1. A masked mixer starts with the teacher's values and
average attention (`calibrate.py`).

Symbols: D width, H heads, KV key and value heads, P head width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion.formats.format import own_tensors
from ..modeling import ZooHybridConfig, ZooHybridForCausalLM
from ..modeling.mixer import FromAttention
from ..modeling.token_mixers import TOKEN_MIXERS
from .recipe import StudentSpec
from .teacher import Teacher

# First tokens that the control keeps, and tokens by which its window moves: the fewer, the more of it is in use.
_SINKS, _CONTROL_CHUNK = 4, 4
# Shortest and longest half-life with half_life "calibrated", before the calibration.
_UNCALIBRATED = (4.0, 64.0)


def build_student(teacher: Teacher, spec: StudentSpec, layers: Sequence[int], *, seed: int = 0) -> ZooHybridForCausalLM:
    """Build a student with new token mixers in some layers; everything else is copied from the teacher.

    Args:
        teacher: the teacher.
        spec: the student's part of a recipe. `calibration`, "calibrated" half-lives and the averages of masked mixing
            are set later by `calibrate`; until then heads have half-lives of 4 to 64 tokens, or random weights.
        layers: the layers whose mixer is replaced; without any the student computes the teacher's logits.
        seed: seed of the weights that are not copied.

    Returns:
        The student in float32, in evaluation mode, on the teacher's device.

    Raises:
        ValueError: if the teacher's sizes do not fit the mixer, an exact head is in no converted layer, or a head is to
            be untied that is not tied.
    """
    config = student_config(teacher, spec, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ZooHybridForCausalLM(config)
    chosen = tuple(f"backbone.layers.{layer}.mixer." for layer in layers)
    replaced = () if _replacement(spec).is_attention else chosen
    tensors = {name: each.load() for name, each in teacher.zoo_tensors.items() if not name.startswith(replaced)}
    if spec.untie:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    result = student.load_state_dict(tensors, strict=False)
    missing = [name for name in own_tensors(student) if name in result.missing_keys and not name.startswith(chosen)]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    if teacher.model.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.model.generation_config)
    for layer in layers:
        mixer = student_mixer(student, layer)
        if hasattr(mixer, "set_half_lives"):
            mixer.set_half_lives(_half_lives(spec, mixer.num_heads))  # pyright: ignore[reportCallIssue, reportArgumentType]
        if spec.copy_projections and hasattr(mixer, "start_from"):
            mixer.start_from(teacher.attention(layer))  # pyright: ignore[reportCallIssue]
    student.to(device=teacher.model.device, dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return student.eval()


def position_limit(student: ZooHybridForCausalLM) -> int | None:
    """Return the number of positions that the student or its teacher has weights for; None: any."""
    return student.config.max_position_embeddings if student.config.is_bounded else None


def student_mixer(student: ZooHybridForCausalLM, layer: int) -> nn.Module:
    """Return the token mixer of a layer."""
    return student.backbone.layers[layer].get_submodule("mixer")


def output_projection(student: ZooHybridForCausalLM, layer: int) -> nn.Linear:
    """Return the linear layer with which the token mixer of a layer ends.

    Raises:
        ValueError: if the mixer has none.
    """
    mixer = student_mixer(student, layer)
    for name in ("out_proj", "o_proj"):
        projection = getattr(mixer, name, None)
        if isinstance(projection, nn.Linear):
            return projection
    raise ValueError(
        f"calibration must be 'none' for layer {layer}: its mixer, a {type(mixer).__name__}, has no output projection "
        "that could be fitted."
    )


def entering(projection: nn.Module, run: Callable[[Tensor], object], inputs: Iterable[Tensor]) -> list[Tensor]:
    """Return what enters a layer of a module, for each of the inputs with which `run` runs the module."""
    found: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    try:
        for each in inputs:
            run(each)
    finally:
        handle.remove()
    return found


def set_slots(student: ZooHybridForCausalLM, slots: list[list[int]], decays: list[list[float]]) -> None:
    """Give the heads of a bounded memory their slots and decays, see `BoundedAttentionSettings`."""
    student.config.bounded_attention.update(slots=slots, score_decay=decays)
    settings = student.config.settings_of("bounded_attention")
    settings.check(student.config)
    for layer, numbers in enumerate(slots):
        if numbers:
            student_mixer(student, layer).settings = settings  # pyright: ignore[reportAttributeAccessIssue]


def build_control(
    teacher: Teacher, student: ZooHybridForCausalLM, layers: Sequence[int], length: int
) -> ZooHybridForCausalLM:
    """Build the control arm of a student, which costs nothing: window and sinks in place of its mixers, untrained.

    Args:
        teacher: the teacher.
        student: the student that it is compared with.
        layers: converted layers.
        length: tokens after which both caches have as many bytes in these layers, on average and rounded down. Exact
            heads of the student count with their `length` keys and values; after more tokens its cache is the larger.

    Returns:
        The teacher with attention to the last tokens and the first ones in `layers`.
    """
    kv_dtype = "auto"
    if "bounded_attention" in (student.config.mixer_types or []):
        kv_dtype = student.config.settings_of("bounded_attention").kv_dtype
    width = int(teacher.zoo_config.head_dim or 0)
    vector = width + torch.bfloat16.itemsize if kv_dtype == "int8" else width * torch.float32.itemsize
    row = int(teacher.zoo_config.num_key_value_heads or 0) * (2 * vector + torch.float32.itemsize)  # and a score
    rows = max(cache_bytes(student, layers, length) // (row * len(layers)), 1)
    sinks = min(_SINKS, rows - 1)
    window = rows - sinks
    spec = StudentSpec(
        mixer="bounded_attention",
        window=window,
        sinks=sinks,
        rows=rows,
        slots="equal",
        chunk_size=min(_CONTROL_CHUNK, window),
        kv_dtype=kv_dtype,  # pyright: ignore[reportArgumentType]
    )
    return build_student(teacher, spec, layers)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, layers: Sequence[int], length: int) -> int:
    """Return the bytes of the cache of some layers after `length` tokens of one text.

    Numbers of the model's dtype count as float32, quantised ones and their scales as what they are. Positions and
    counts of tokens are left out.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    total = 0
    for layer in layers:
        for name, value in vars(cache.layers[layer]).items():
            if not isinstance(value, Tensor) or value.dtype == torch.long:
                continue
            quantised = value.dtype == torch.int8 or name.endswith("_scales")
            total += value.numel() * (value.itemsize if quantised else torch.float32.itemsize)
    return total


@contextmanager
def zeroed_mixers(student: ZooHybridForCausalLM, layers: Sequence[int]) -> Iterator[None]:
    """Set the outputs of the mixers of `layers` to zero: the floor of every comparison."""
    handles = [
        # Zeros and not a product with 0, since the output of an untrained mixer may be infinite.
        student_mixer(student, layer).register_forward_hook(
            lambda _module, _args, out: (torch.zeros_like(out[0]), *out[1:])
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacement(spec: StudentSpec) -> FromAttention:
    """Return how the recipe's mixer replaces attention."""
    row = TOKEN_MIXERS[spec.mixer].student
    assert row is not None  # recipes accept no other mixer
    return row


def student_config(teacher: Teacher, spec: StudentSpec, layers: Sequence[int]) -> ZooHybridConfig:
    """Return the teacher's configuration with the new mixers in some layers and the settings of these mixers."""
    mixers = list(teacher.zoo_config.mixer_types)
    for layer in layers:
        if not 0 <= layer < teacher.num_layers:
            raise ValueError(f"layers must be from 0 to {teacher.num_layers - 1}, got {layer}.")
        mixers[layer] = spec.mixer
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    for layer, head in spec.exact_heads:
        if layer not in layers or head >= heads:
            converted = ", ".join(map(str, layers)) or "none"
            raise ValueError(
                f"student.exact_heads must be pairs of a converted layer (these are {converted}) and a key-value head "
                f"from 0 to {heads - 1}, got [{layer}, {head}]. Remove it: other layers keep full attention anyway."
            )
    replaced = _replacement(spec).keys(teacher.zoo_config, spec) if layers else {}
    kept = {kind for layer, kind in enumerate(teacher.zoo_config.mixer_types) if layer not in layers}
    for kind in kept & replaced.keys():
        own = getattr(teacher.zoo_config, kind)
        if own != replaced[kind]:
            raise ValueError(
                f"the settings of {kind} in the student must be the teacher's, {own}, as layers that are not converted "
                f"keep them, got {replaced[kind]}"
            )
    values: dict[str, Any] = {**copy.deepcopy(teacher.zoo_config.to_dict()), "mixer_types": mixers, **replaced}
    for kind in set(teacher.zoo_config.mixer_types) - set(mixers):
        del values[kind]
    if spec.untie:
        if not values["tie_word_embeddings"]:
            raise ValueError(
                "`student.untie` must be false for this teacher, whose head is not tied to its embedding, got true."
            )
        values["tie_word_embeddings"] = False
    return ZooHybridConfig(**values)


def _half_lives(spec: StudentSpec, heads: int) -> Tensor:
    """Return (H) half-lives in tokens, geometric over the heads."""
    shortest, longest = _UNCALIBRATED if isinstance(spec.half_life, str) else spec.half_life
    return shortest * (longest / shortest) ** torch.linspace(0.0, 1.0, heads)
