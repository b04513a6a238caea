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
from ..modeling.modeling_hybrid import DiscreteMamba2Mixer, half_life_to_bias
from ..modeling.modeling_mamba2 import Mamba2Mixer
from ..modeling.position_mixers import DenseMixer
from ..modeling.rotary import llama_rope_parameters
from .attention_view import AttentionView
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
    if spec.mixer != "sliding_attention":
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
        if isinstance(mixer, DiscreteMamba2Mixer):
            _set_half_lives(mixer, spec)
            if spec.copy_projections:
                copy_attention(teacher.attention(layer), mixer)
        elif isinstance(mixer, Mamba2Mixer):
            _set_decays(mixer, spec)
            if spec.copy_projections:
                copy_attention(teacher.attention(layer), mixer)
        elif isinstance(mixer, DenseMixer) and spec.copy_projections:
            copy_values(teacher.attention(layer), mixer)
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


@torch.no_grad()
def copy_attention(view: AttentionView, mixer: nn.Module) -> None:
    """Start a mixer from an attention layer: v to x, k to B, q to C, o to out_proj; key-value heads are repeated whole.

    The scale of the scores goes into C. Softplus features take keys and queries as they are: the larger its argument,
    the more softplus tells apart. The gate stays open, the skip D is 0, and the decay does not depend on the input yet.
    In a Mamba-2 mixer the gate keeps its random projection (it has no bias to hold it open).

    Args:
        view: the teacher's attention.
        mixer: a `DiscreteMamba2Mixer` or `Mamba2Mixer` with H heads of P channels and P state channels.

    Raises:
        ValueError: if the mixer's sizes differ from the attention's.
    """
    assert isinstance(mixer, DiscreteMamba2Mixer | Mamba2Mixer)
    sizes = (mixer.num_heads, mixer.head_dim, mixer.state_size)
    if sizes != (view.num_heads, view.head_dim, view.head_dim):
        raise ValueError(
            f"student: its mixer has {sizes[0]} heads of {sizes[1]} channels with state_size {sizes[2]}; copying needs "
            f"the attention's {view.num_heads} heads of {view.head_dim}, and state_size {view.head_dim}"
        )
    nonlinear = isinstance(mixer, DiscreteMamba2Mixer) and mixer.feature_map != "identity"
    query_scale = 1.0 if nonlinear else view.scaling
    inner = view.num_heads * view.head_dim
    rows = [view.expand_heads(view.v), view.expand_heads(view.k), view.q * query_scale]
    start = 0 if isinstance(mixer, DiscreteMamba2Mixer) else inner  # Mamba-2's z rows come first
    weight = mixer.in_proj.weight
    weight[start : start + 3 * inner] = torch.cat(rows).to(weight)
    weight[-mixer.num_heads :] = 0.0
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        for part, (bias, scale) in enumerate(((view.v_bias, 1.0), (view.k_bias, 1.0), (view.q_bias, query_scale))):
            if bias is not None:
                whole = bias if part == 2 else view.expand_heads(bias)
                mixer.in_proj.bias[start + part * inner : start + (part + 1) * inner] = whole.to(weight) * scale
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, :, -1] = 1.0
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
    mixer.D.zero_()
    mixer.out_proj.weight.copy_(view.o)
    if mixer.out_proj.bias is not None:
        if view.o_bias is None:
            mixer.out_proj.bias.zero_()
        else:
            mixer.out_proj.bias.copy_(view.o_bias)


@torch.no_grad()
def copy_values(view: AttentionView, mixer: DenseMixer) -> None:
    """Start a masked mixer's projections as an attention layer's: v to in_proj, o to out_proj; key-value heads are
    repeated whole.

    Raises:
        ValueError: if the mixer has no projections, or other heads.
    """
    sizes = (view.num_heads, view.head_dim)
    if mixer.in_proj is None or mixer.out_proj is None or (mixer.num_heads, mixer.head_dim) != sizes:
        raise ValueError(
            f"student: its mixer has {mixer.num_heads} heads of {mixer.head_dim} channels, and "
            f"{'no' if mixer.in_proj is None else 'with'} projections; copying needs the attention's {sizes[0]} heads "
            f"of {sizes[1]}, with projections"
        )
    mixer.in_proj.weight.copy_(view.expand_heads(view.v))
    mixer.in_proj.bias.copy_(view.expand_heads(view.v_bias) if view.v_bias is not None else torch.zeros(()))
    mixer.out_proj.weight.copy_(view.o)
    mixer.out_proj.bias.copy_(view.o_bias if view.o_bias is not None else torch.zeros(()))


def _student_config(source: Teacher, spec: StudentSpec, layers: Sequence[int]) -> ZooHybridConfig:
    teacher = source.model.config
    mixers = ["full_attention"] * source.num_layers
    for layer in layers:
        if not 0 <= layer < source.num_layers:
            raise ValueError(f"layers: got {layer}, accepted: 0 to {source.num_layers - 1}")
        mixers[layer] = spec.mixer
    if spec.normalize and spec.feature_map == "identity":
        raise ValueError(
            "student.normalize: got True with feature_map 'identity', whose row sums may be 0 or negative; accepted: "
            "feature_map 'softplus'"
        )
    inner = teacher.num_attention_heads * teacher.head_dim
    if spec.mixer == "mamba2" and inner % teacher.hidden_size:
        raise ValueError(
            f"student.mixer: 'mamba2' needs heads * head_dim ({inner}) to be a multiple of the teacher's hidden_size "
            f"({teacher.hidden_size}); accepted here: 'discrete_mamba2', 'sliding_attention'"
        )
    masked = spec.mixer == "masked_mixing"
    if masked and inner != teacher.hidden_size:
        raise ValueError(
            f"student.mixer: 'masked_mixing' needs heads * head_dim ({inner}) to be the teacher's hidden_size "
            f"({teacher.hidden_size}); accepted here: 'discrete_mamba2', 'sliding_attention'"
        )
    longest = teacher.max_position_embeddings
    if masked and teacher.rope_parameters["rope_type"] == "dynamic" and spec.positions > longest:
        raise ValueError(
            f"student.positions: must be at most {longest}, the teacher's max_position_embeddings, beyond which its "
            f"'dynamic' rotary embedding changes; got {spec.positions}"
        )
    config = ZooHybridConfig(
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
        max_position_embeddings=spec.positions if masked else longest,
        rope_parameters=llama_rope_parameters(teacher),
        state_size=teacher.head_dim,
        conv_kernel=spec.conv_kernel,
        feature_map=spec.feature_map,
        normalize=spec.normalize,
        ssm_rotary=spec.rotary,
        sliding_window=spec.sliding_window,
        mixing_heads=teacher.num_attention_heads if masked else 1,
        mixing_projections=True if masked else None,
        expand=max(inner // teacher.hidden_size, 1),
        mamba_head_dim=teacher.head_dim,
        n_groups=teacher.num_attention_heads if spec.mixer == "mamba2" else 1,
        initializer_range=teacher.initializer_range,
        tie_word_embeddings=teacher.tie_word_embeddings,
        pad_token_id=teacher.pad_token_id,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
    )
    return config


def _student_name(name: str) -> str:
    for theirs, ours in _LLAMA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _half_lives(spec: StudentSpec, heads: int) -> Tensor:
    """(H) half-lives in tokens, geometric over the heads."""
    shortest, longest = _UNCALIBRATED if isinstance(spec.half_life, str) else spec.half_life
    return shortest * (longest / shortest) ** torch.linspace(0.0, 1.0, heads)


@torch.no_grad()
def _set_half_lives(mixer: DiscreteMamba2Mixer, spec: StudentSpec) -> None:
    mixer.dt_bias.copy_(half_life_to_bias(_half_lives(spec, mixer.num_heads)))


@torch.no_grad()
def _set_decays(mixer: Mamba2Mixer, spec: StudentSpec) -> None:
    """Decay rate A = -1, and a step size whose decay halves the state every half-life."""
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(half_life_to_bias(_half_lives(spec, mixer.num_heads)))
