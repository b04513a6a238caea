"""Layers that several families share: norms, MLPs, rotary positions, short convolution, initialisation.

Symbols: B batch, L length, D width, K convolution width, P head width, R rotated channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import rotate_half

from ..kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..kernels.rms_norm import add_rms_norm, rms_norm
from .rollback import recorded
from .token_layout import Sequence

NORM_TYPES = ("rms_norm", "layer_norm", "unit_offset_rms_norm")
QK_NORMS = ("head", "width")
POSITION_TYPES = ("rope", "local_rope", "none")
_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_weight(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Cast the states to the dtype of a layer's weight, if the layer computes in that dtype.

    A quantised layer does not: its weight holds integers or 8-bit floats, or is a method, and it takes the model's
    dtype.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype != hidden_states.dtype and weight.dtype in _COMPUTED_IN:
        return hidden_states.to(weight.dtype)
    return hidden_states


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, except that a token whose variance overflows becomes NaN, not zeros that look healthy."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) normed."""
        y, _, reciprocal = torch.native_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        # 0 * (r / r) is NaN where r is 0 and 0 elsewhere; a single operation, as each decoding step repeats it.
        reciprocal = reciprocal.detach()
        return y.addcdiv_(reciprocal, reciprocal, value=0)


class PlainRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) normed."""
        return rms_norm(hidden_states, hidden_states.new_ones(hidden_states.shape[-1]), self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(..., D) normed; with `residual` the norm of `residual + hidden_states`, and that sum."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.eps)
        return add_rms_norm(hidden_states, residual, self.weight, self.eps)


class UnitOffsetRMSNorm(RMSNorm):
    """Root-mean-square norm over the last axis, multiplied by 1 + weight, as in Gemma."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.initialise()

    def initialise(self) -> None:
        init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As of :class:`RMSNorm`. Half precision is rounded once, after the product."""
        if residual is not None:
            hidden_states = residual + hidden_states
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        y = rms_norm(hidden_states.to(precise), 1 + self.weight.to(precise), self.eps).to(hidden_states.dtype)
        return y if residual is None else (y, hidden_states)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """Build a norm of one of NORM_TYPES."""
    kinds = {"rms_norm": RMSNorm, "layer_norm": LayerNorm, "unit_offset_rms_norm": UnitOffsetRMSNorm}
    return kinds[kind](size, eps)


def add_norm(norm: nn.Module, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum of two (..., D) tensors, and the sum."""
    if isinstance(norm, RMSNorm):
        return norm(hidden_states, residual=residual)
    total = residual + hidden_states
    return norm(total), total


def normed(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """Apply a norm to (..., D) hidden states, in the dtype of its weight."""
    return norm(as_weight(norm, hidden_states))


def soft_capped(values: Tensor, cap: float) -> Tensor:
    """Return c tanh(x / c), which stays between -c and c."""
    return cap * (values / cap).tanh()


def hedgehog_features(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return learned positive features (Hedgehog, arXiv 2402.04347): softmax of a map of each head and of its negative.

    Args:
        x: (B, L, H, P) queries or keys.
        weight: (H, P, F) map of each head.

    Returns:
        (B, L, H, 2 F).
    """
    assert weight is not None
    mapped = torch.einsum("blhn,hnf->blhf", x, weight)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)


class ScaledEmbedding(nn.Embedding):
    """An embedding multiplied by a constant, which is rounded to the dtype of the weight, as in Gemma."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width)
        self.embed_scale = scale  # peft looks for this name

    def forward(self, input: Tensor) -> Tensor:
        scale = torch.tensor(self.embed_scale, dtype=self.weight.dtype, device=self.weight.device)
        return super().forward(input) * scale


class GatedMLP(nn.Module):
    """`down(act(gate(h)) * up(h))`."""

    def __init__(self, width: int, inner: int, *, act: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PlainMLP(nn.Module):
    """`down(act(up(h)))`."""

    def __init__(self, width: int, inner: int, *, act: str, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of P channels (arXiv 2104.09864; halves are paired, as in Llama).

    Args:
        x: (..., P) queries or keys.
        cos: (..., R) cosines of the positions, broadcastable over the other axes of `x`.
        sin: (..., R) sines.

    Returns:
        (..., P) in the dtype of `x`; the tables may be wider (under autocast, or where FSDP casts a block's inputs).
    """
    rotated = cos.shape[-1]
    part = x[..., :rotated]
    part = (part * cos + rotate_half(part) * sin).to(x.dtype)
    return part if rotated == x.shape[-1] else torch.cat([part, x[..., rotated:]], dim=-1)


def llama_rope_parameters(config: Any) -> dict[str, Any]:
    """Return the `rope_parameters` of a Llama configuration with the values that transformers' Llama derives.

    Without a scaling, Llama ignores `partial_rotary_factor`. The two scalings whose factor may be missing derive it
    from `max_position_embeddings`, which may be another number in our configuration.
    """
    given = dict(config.rope_parameters)
    if given["rope_type"] == "default":
        given.pop("partial_rotary_factor", None)
    if given["rope_type"] in ("longrope", "yarn") and given.get("factor") is None:
        given["factor"] = config.max_position_embeddings / given["original_max_position_embeddings"]
    return given


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution with PyTorch's parameters and our op.

    It is called as a module, so that hooks (e.g. of offloading) see every use of its weights.
    """

    def __init__(self, channels: int, width: int, *, bias: bool, activation: str | None = None) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)
        self.activation = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        *,
        in_place: bool = False,
        step: Callable[..., Tensor] = causal_conv1d_step,
    ) -> tuple[Tensor, Tensor]:
        """Convolve along L.

        Args:
            x: (B, L, D) inputs.
            state: (B, D, K-1) the previous inputs.
            seq_idx: (B, L) document of each token, negative at padding.
            in_place: update `state`, which must be given, in place; L must be 1 and `seq_idx` None.
            step: with `in_place`, an op with the first arguments of `causal_conv1d_step`. One that also does what
                follows the convolution needs a single launch; its result is returned with an axis L of 1.

        Returns:
            (B, L, D) outputs and the (B, D, K-1) state after them.
        """
        weight = self.weight[:, 0]
        if in_place:
            assert state is not None and seq_idx is None
            y = step(x[:, 0], state, weight, self.bias, activation=self.activation)
            return y[:, None], state
        y, state = causal_conv1d(
            x,
            weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            seq_idx=seq_idx,
            return_final_state=True,
        )
        return y, state


class GroupedAttention(nn.Module):
    """The sizes and projections of attention whose key-value heads each serve a group of query heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def add_projections(self, config: Any, bias: bool, layer_idx: int) -> None:
        """Create q_proj, k_proj, v_proj and o_proj, in this order, with the sizes of the model's configuration."""
        self.num_heads, self.num_kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.head_dim, width = int(config.head_dim or 0), config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=output_bias(config, bias))
        self.qk_norm = getattr(config, "qk_norm", None)
        self.q_norm = make_qk_norm(config, self.num_heads, self.head_dim)
        self.k_norm = make_qk_norm(config, self.num_kv_heads, self.head_dim)
        self.positions = position_type(config, layer_idx)
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        # By the names that transformers' attention functions look for.
        self.num_key_value_groups = self.num_heads // max(self.num_kv_heads, 1)
        scalar = getattr(config, "query_pre_attn_scalar", None)
        self.scaling, self.is_causal = (
            (self.head_dim if scalar is None else scalar) ** -0.5,
            not getattr(config, "bidirectional", False),
        )

    def to_heads(self, projected: Tensor, norm: nn.Module | None, sequence: Sequence) -> Tensor:
        """(B, L, ...) projected queries or keys to (B, L, heads, P): with norm and rotary embedding, if they have them.

        Args:
            projected: output of `q_proj` or `k_proj`.
            norm: `q_norm` or `k_norm`.
            sequence: where the tokens stand.
        """
        heads = normed_heads(projected, norm, self.qk_norm, self.head_dim)
        tables = sequence.rotary_tables(self.positions)
        if tables is None:
            return heads
        cos, sin = tables
        return rotate(heads, cos[:, :, None], sin[:, :, None])


def output_bias(config: Any, bias: bool) -> bool:
    """Return whether the output projection of a mixer has a bias, if its other projections have one or not."""
    given = getattr(config, "attention_output_bias", None)  # other families lack this and the following settings
    return bias if given is None else given


def position_type(config: Any, layer_idx: int) -> str:
    """Return the kind of positions in a block, one of POSITION_TYPES."""
    types = getattr(config, "position_types", None)
    return "rope" if types is None else types[layer_idx]


def make_qk_norm(config: Any, heads: int, width: int) -> nn.Module | None:
    """Build the norm of the queries or keys of heads of P channels; None if they have none."""
    kind = getattr(config, "qk_norm", None)
    if kind is None:
        return None
    return make_norm(config.norm_type, heads * width if kind == "width" else width, config.rms_norm_eps)


def normed_heads(projected: Tensor, norm: nn.Module | None, kind: str | None, width: int) -> Tensor:
    """(..., heads P) queries or keys to (..., heads, P), normed over the width of all heads or over each head."""
    if norm is not None and kind == "width":
        return norm(projected).unflatten(-1, (-1, width))
    heads = projected.unflatten(-1, (-1, width))
    return heads if norm is None else norm(heads)


def init_short_convolution(convolution: ShortConvolution) -> None:
    """Initialise weight and bias with PyTorch's default, U(+-1 / sqrt(K))."""
    _init_uniform(convolution, convolution.kernel_size[0] ** -0.5)


def init_linear(layer: nn.Linear) -> None:
    """Initialise weight and bias of a linear layer with PyTorch's default, U(+-1 / sqrt(fan in))."""
    _init_uniform(layer, layer.in_features**-0.5)


def _init_uniform(layer: nn.Linear | ShortConvolution, bound: float) -> None:
    init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        init.uniform_(layer.bias, -bound, bound)


def init_linear_normal(layer: nn.Linear) -> None:
    """Initialise a linear layer with Kaiming's normal, bias 0, as in the authors' Toeplitz and recurrent mixers."""
    init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    if layer.bias is not None:
        init.zeros_(layer.bias)


def inverse_softplus(x: Tensor) -> Tensor:
    """Return y with softplus(y) = x, for x > 0; exact for small x too."""
    return x + torch.log(-torch.expm1(-x))


def init_step_bias(bias: Tensor, smallest: float, largest: float, floor: float) -> None:
    """Set `bias` so that it alone gives step sizes log-uniform in [smallest, largest], and at least `floor`."""
    span = math.log(largest) - math.log(smallest)
    steps = (torch.rand_like(bias) * span + math.log(smallest)).exp()
    init.copy_(bias, inverse_softplus(steps.clamp(min=floor)))


class MixerBlock(GradientCheckpointingLayer):
    """norm -> mixer -> add, with the residual stream in float32 if `config.residual_in_fp32`."""

    def __init__(self, config: PreTrainedConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = mixer
        self.layer_idx = int(mixer.layer_idx)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) hidden states to (B, L, D), and the mixer's matrix if asked for."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        inputs = normed(self.norm, hidden_states)
        mixed, attention = recorded(self.mixer, self.layer_idx, inputs, sequence, past_key_values, output_attentions)
        return residual + mixed, attention
