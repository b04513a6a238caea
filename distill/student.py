"""From a Transformer to its student: the same model as a `zoo_hybrid`, with the token mixer of chosen layers replaced.

With identity convolution, open gate and copied projections a discrete Mamba-2 mixer starts as linear attention with the
teacher's queries, keys and values and a decay: un-normalised with the identity feature map (MOHAWK's mixer,
arXiv 2408.10189), or with softplus features and rows that sum to 1. A masked mixer starts with its values and, by
calibration, its average attention (`calibrate.py`).

Symbols: D width, H heads, KV key and value heads, P head width.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..modeling import ZooHybridConfig, ZooHybridForCausalLM
from ..modeling.layers import llama_rope_parameters
from ..modeling.mixer import FromAttention
from ..modeling.token_mixers import TOKEN_MIXERS
from .recipe import StudentSpec
from .teacher import Teacher

# A half-life for heads whose recipe says "calibrated", before calibration has looked at the teacher.
_UNCALIBRATED = (4.0, 64.0)

# transformers' names of a Llama's parts, and ours.
_LLAMA_NAMES = {
    "model.embed_tokens.": "backbone.embeddings.",
    "model.layers.": "backbone.layers.",
    "model.norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
    ".self_attn.": ".mixer.",
}


def build_student(teacher: Teacher, spec: StudentSpec, layers: Sequence[int], *, seed: int = 0) -> ZooHybridForCausalLM:
    """Build a student with the token mixers of `layers` replaced as `spec` says; everything else is copied.

    Args:
        teacher: the teacher.
        spec: the student's part of a recipe. `calibration`, "calibrated" half-lives and the averages that masked
            mixing starts from are `calibrate`'s business; until then heads get half-lives of 4 to 64 tokens, and random
            weights.
        layers: layer numbers to convert; none gives the teacher itself in the student's code.
        seed: of what is not copied.

    Returns:
        The student in float32, in evaluation mode, on the teacher's device.

    Raises:
        ValueError: if the teacher's sizes do not fit the mixer.
    """
    config = _student_config(teacher, spec, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ZooHybridForCausalLM(config)
    state = {_student_name(name): tensor for name, tensor in teacher.model.state_dict().items()}
    converted = tuple(f"backbone.layers.{layer}.mixer." for layer in layers)
    if not _taking(spec).is_attention:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(converted)}
    result = student.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.startswith(converted)]
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    student.tie_weights()
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


def student_mixer(student: ZooHybridForCausalLM, layer: int) -> nn.Module:
    """The token mixer of a layer."""
    return student.backbone.layers[layer].get_submodule("mixer")


@contextmanager
def zeroed_mixers(student: ZooHybridForCausalLM, layers: Sequence[int]) -> Iterator[None]:
    """Within the context, the mixers of `layers` add nothing to the residual stream: the floor of every comparison."""
    handles = [
        # Not a product with 0: an untrained mixer's output may be infinite.
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


def _taking(spec: StudentSpec) -> FromAttention:
    """How the recipe's mixer takes the place of attention."""
    row = TOKEN_MIXERS[spec.mixer].student
    assert row is not None  # the recipe has no other
    return row


def _student_config(source: Teacher, spec: StudentSpec, layers: Sequence[int]) -> ZooHybridConfig:
    teacher = source.model.config
    mixers = ["full_attention"] * source.num_layers
    for layer in layers:
        if not 0 <= layer < source.num_layers:
            raise ValueError(f"layers: got {layer}, accepted: 0 to {source.num_layers - 1}")
        mixers[layer] = spec.mixer
    replaced = _taking(spec).keys(teacher, spec) if layers else {}
    shared = dict(
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        intermediate_size=teacher.intermediate_size,
        num_hidden_layers=teacher.num_hidden_layers,
        mixer_types=mixers,
        num_attention_heads=teacher.num_attention_heads,
        num_key_value_heads=teacher.num_key_value_heads,
        head_dim=teacher.head_dim,
        hidden_act=teacher.hidden_act,
        rms_norm_eps=teacher.rms_norm_eps,
        attention_bias=teacher.attention_bias,
        mlp_bias=teacher.mlp_bias,
        max_position_embeddings=teacher.max_position_embeddings,
        rope_parameters=llama_rope_parameters(teacher),
        initializer_range=teacher.initializer_range,
        tie_word_embeddings=teacher.tie_word_embeddings,
        pad_token_id=teacher.pad_token_id,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
    )
    return ZooHybridConfig(**(shared | replaced))


def _student_name(name: str) -> str:
    for theirs, ours in _LLAMA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _half_lives(spec: StudentSpec, heads: int) -> Tensor:
    """(H) half-lives in tokens, geometric over the heads."""
    shortest, longest = _UNCALIBRATED if isinstance(spec.half_life, str) else spec.half_life
    return shortest * (longest / shortest) ** torch.linspace(0.0, 1.0, heads)
