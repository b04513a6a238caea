"""The Transformer that a student is distilled from: loading it, reading its attention, streaming its activations.

A teacher adapter names the parts of one model family and gives the weights of a layer's attention in one shape, an
`AttentionView`, whatever the family's own layout. `capture` runs one forward and hands each layer's activations to
a callback as they come up; nothing is kept: stored targets would cost L x D numbers for every layer and row.

Symbols: B batch, L length, D width, H query heads, KV key and value heads, P head width, R rotated channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..conversion.formats.format import refuse_quantised
from ..conversion.load_model import WeightsError, load_model, load_tokenizer, quiet_loading
from .fetch import check_place, gguf_to_folder, is_gguf, load_gguf, teacher_commit

__all__ = [
    "CAPTURES",
    "AttentionView",
    "LlamaAdapter",
    "TeacherAdapter",
    "capture",
    "gguf_to_folder",
    "load_teacher",
    "teacher_adapter",
    "teacher_commit",
]

# What `capture` can hand over for a layer, in the order in which a forward produces it.
CAPTURES = ("block_input", "normed_input", "attention_output", "block_output")


def load_teacher(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, frozen and in evaluation mode.

    Only safetensors and GGUF weights are read. All of the model's weights must be there and finite.

    Args:
        source: a folder, a Hub id, or the path of a .gguf file.
        dtype: dtype of the weights.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run the code that the source brings, e.g. of its tokenizer.

    Returns:
        The model, none of whose parameters requires a gradient, and the tokenizer.

    Raises:
        ValueError: if the source cannot be loaded; the message says why.
    """
    check_place(source, revision)
    if is_gguf(source):
        model, tokenizer = load_gguf(source, dtype=dtype)
    else:
        options: dict[str, Any] = {"field": "teacher", "revision": revision, "trust_remote_code": trust_remote_code}
        try:
            with quiet_loading(str(source), "teacher"):
                values, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision or "main")
            refuse_quantised(values)
            tokenizer = load_tokenizer(source, **options)
            model = load_model(source, AutoModelForCausalLM, dtype=dtype, **options)
        except WeightsError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].removeprefix("teacher: ")
            raise ValueError(
                f"teacher: cannot load {str(source)!r}; accepted: a .gguf file, or a folder or Hub id with the "
                f"safetensors weights and tokenizer of a causal language model of transformers. Reason: {reason}"
            ) from error
    return model.eval().requires_grad_(False), tokenizer


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Causal softmax attention of one layer, with the weights in one shape for all families.

    The tensors share their storage with the teacher's and are detached. Head h reads key and value head
    h // (H / KV). With R < P only the first R channels of a head are rotated, in halves (GPT-NeoX order).

    Attributes:
        q: (H*P, D) query weights, head by head.
        k: (KV*P, D) key weights.
        v: (KV*P, D) value weights.
        o: (D, H*P) output weights.
        num_heads: H.
        num_key_value_heads: KV, a divisor of H.
        head_dim: P; H*P need not equal D.
        scaling: factor on the scores, positive; 1 / sqrt(P) for most families.
        q_bias: (H*P,) or None.
        k_bias: (KV*P,) or None.
        v_bias: (KV*P,) or None.
        o_bias: (D,) or None.
        rotary: the teacher's own module (hidden, position_ids) -> cos, sin, each (B or 1, L, R); None without
            rotary positions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scaling: float
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    rotary: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, accepted: a divisor of {self.num_heads}"
            )
        D = self.q.shape[-1]
        rows, key_rows = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        expected = {"q": (rows, D), "k": (key_rows, D), "v": (key_rows, D), "o": (D, rows)}
        for name, shape in expected.items():
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {shape}")
            if bias is not None and tuple(bias.shape) != shape[:1]:
                raise ValueError(f"{name}_bias: got shape {tuple(bias.shape)}, expected {shape[:1]}")

    def expand_heads(self, rows: Tensor) -> Tensor:
        """Give each query head its own copy of the key or value rows it reads.

        Args:
            rows: (KV*P, ...) a key or value weight or bias.

        Returns:
            (H*P, ...) a new tensor: whole heads repeated, not rows.
        """
        heads = rows.unflatten(0, (self.num_key_value_heads, self.head_dim))
        return heads.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=0).flatten(0, 1)

    def queries_keys(self, hidden: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet in the scores: with bias, rotated, keys repeated for the heads of a group.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: (B, L) or (1, L) integer positions; 0 to L-1 if None.

        Returns:
            Queries and keys, each (B, L, H, P), without the scaling.
        """
        queries = F.linear(hidden, self.q, self.q_bias).unflatten(-1, (self.num_heads, self.head_dim))
        keys = F.linear(hidden, self.k, self.k_bias).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        if self.rotary is not None:
            if position_ids is None:
                position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
            cos, sin = self.rotary(hidden, position_ids)
            queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        return queries, keys.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2)

    def values(self, hidden: Tensor) -> Tensor:
        """Values (B, L, H, P), repeated for the heads of a group, of normed hidden states (B, L, D)."""
        values = F.linear(hidden, self.v, self.v_bias).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        return values.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2)

    def attention_matrix(
        self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights after the softmax.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: (B, L) or (1, L) integer positions; 0 to L-1 if None.
            mask: (B, L), nonzero at real tokens, or (B, L, L), nonzero where row i may look at column j; in
                addition to the causal mask.

        Returns:
            (B, H, L, L) float32 (float64 for float64 input). Rows sum to 1; one that may look nowhere is 0.
        """
        queries, keys = self.queries_keys(hidden, position_ids)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = torch.einsum("bihp,bjhp->bhij", queries.to(dtype), keys.to(dtype)) * self.scaling
        visible = _visible(hidden, mask)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return weights.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)

    def head_outputs(self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What each head puts into the output projection, without an L x L matrix in memory where torch can.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: as in `attention_matrix`.
            mask: as in `attention_matrix`.

        Returns:
            (B, L, H, P), in the dtype of `hidden`.
        """
        queries, keys = (states.transpose(1, 2) for states in self.queries_keys(hidden, position_ids))
        values = self.values(hidden).transpose(1, 2)
        if mask is None:
            outputs = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=self.scaling)
        else:
            visible = _visible(hidden, mask)
            outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=self.scaling)
            # torch leaves open what a row without any visible column gives.
            outputs = outputs.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
        return outputs.transpose(1, 2)

    def attention_output(
        self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Output of the whole attention module, (B, L, D); arguments as in `attention_matrix`."""
        return F.linear(self.head_outputs(hidden, position_ids, mask).flatten(2), self.o, self.o_bias)


class TeacherAdapter(ABC):
    """The parts of one teacher model that distillation needs, under the same names for every family.

    Args:
        model: the teacher, with its language-model head.
    """

    model_type: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""

    @abstractmethod
    def input_norm(self, layer: int) -> nn.Module:
        """The norm whose output the layer's attention reads."""

    @abstractmethod
    def attention_module(self, layer: int) -> nn.Module:
        """The layer's attention, without norm and residual."""

    @abstractmethod
    def attention(self, layer: int) -> AttentionView:
        """The layer's attention as weights in the common shape."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def layer(self, layer: int) -> nn.Module:
        """The block with this index, from 0.

        Raises:
            ValueError: if there is no such block.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer: got {layer}, accepted: 0 to {self.num_layers - 1}")
        return self.layers[layer]

    def attention_matrix(
        self, layer: int, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights (B, H, L, L) of one layer, see `AttentionView.attention_matrix`."""
        return self.attention(layer).attention_matrix(hidden, position_ids, mask)

    def head_outputs(
        self, layer: int, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Outputs (B, L, H, P) of one layer's heads, see `AttentionView.head_outputs`."""
        return self.attention(layer).head_outputs(hidden, position_ids, mask)

    def attention_output(
        self, layer: int, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Output (B, L, D) of one layer's attention, see `AttentionView.attention_output`."""
        return self.attention(layer).attention_output(hidden, position_ids, mask)


class LlamaAdapter(TeacherAdapter):
    """Llama and what shares its model type (SmolLM2, TinyLlama, ...): grouped keys and values, rotary positions.

    Args:
        model: a `LlamaForCausalLM`.

    Raises:
        ValueError: if the model has no language-model head.
    """

    model_type = "llama"

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, LlamaForCausalLM):
            raise ValueError(f"teacher: got a {type(model).__name__}, accepted: LlamaForCausalLM")
        super().__init__(model)
        self.decoder = model.model

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self.decoder.layers

    def input_norm(self, layer: int) -> nn.Module:
        """The norm whose output the layer's attention reads."""
        return self.layer(layer).get_submodule("input_layernorm")

    def attention_module(self, layer: int) -> nn.Module:
        """The layer's attention, without norm and residual."""
        return self.layer(layer).get_submodule("self_attn")

    def attention(self, layer: int) -> AttentionView:
        """The layer's attention as weights in the common shape."""
        module = self.attention_module(layer)
        weights: dict[str, Tensor] = {}
        for name in "qkvo":
            projection = module.get_submodule(f"{name}_proj")
            weights |= {name: projection.get_parameter("weight").detach()}
            if projection.bias is not None:
                weights |= {f"{name}_bias": projection.get_parameter("bias").detach()}
        config = self.model.config
        return AttentionView(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scaling=config.head_dim**-0.5,
            rotary=self.decoder.rotary_emb,
            **weights,
        )


ADAPTERS: dict[str, type[TeacherAdapter]] = {adapter.model_type: adapter for adapter in (LlamaAdapter,)}


def teacher_adapter(model: PreTrainedModel) -> TeacherAdapter:
    """The adapter of the model's family.

    Raises:
        ValueError: if there is none for its `config.model_type`.
    """
    model_type = model.config.model_type
    if model_type not in ADAPTERS:
        raise ValueError(f"teacher: got a model of type {model_type!r}, accepted: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[model_type](model)


def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    layers: Sequence[int],
    what: Sequence[str],
    *,
    on_layer: Callable[..., None],
    stop_after_last: bool = True,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Any:
    """Run the teacher once and hand over activations of the chosen layers, each layer's as soon as they are there.

    The callback runs inside the teacher's forward, with gradients enabled, so that it can run a student layer and
    its backward. The tensors it gets carry no graph, may be used in one, and are not kept here after it returns;
    it must not change them in place. An error that it raises ends the forward and reaches the caller.

    Args:
        model: the teacher, of a family with an adapter, in evaluation mode.
        input_ids: (B, L) integer token ids.
        layers: indices of the layers, each once, in any order; the callback sees them from the first to the last.
        what: names out of `CAPTURES`: "block_input" (B, L, D) residual stream before the layer, "normed_input"
            (B, L, D) what its attention reads, "attention_output" (B, L, D) what its attention adds to the stream,
            "block_output" (B, L, D) the stream after the layer.
        on_layer: called as `on_layer(layer, **tensors)` with the names of `what` as keywords.
        stop_after_last: end the forward after the last chosen layer's callback, without later layers and the head.
        attention_mask: (B, L) mask for padding, as the model takes it.
        position_ids: (B, L) positions, as the model takes them.

    Returns:
        None if the forward was ended early, otherwise the model's output with its logits.

    Raises:
        ValueError: if an argument is none of the above; nothing has run then.
    """
    adapter = teacher_adapter(model)
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, accepted: integers (B, L)"
        )
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, accepted: at least one layer, each once")
    if isinstance(what, str) or not what or len(set(what)) != len(what) or not set(what) <= set(CAPTURES):
        raise ValueError(f"what: got {what!r}, accepted: at least one, each once, out of {', '.join(CAPTURES)}")
    if model.training:
        raise ValueError("teacher: the model is in training mode; call eval() before taking targets from it")
    last = max(layers)
    modules = {layer: (adapter.layer(layer), adapter.input_norm(layer)) for layer in layers}
    waiting: dict[str, Tensor] = {}

    def receive(layer: int, name: str, value: Any) -> None:
        waiting[name] = value[0] if isinstance(value, tuple) else value
        if len(waiting) < len(what):
            return
        tensors = dict(waiting)
        waiting.clear()
        with torch.enable_grad():
            on_layer(layer, **tensors)
        if stop_after_last and layer == last:
            raise _ForwardStoppedError

    handles = []
    try:
        for layer, (block, norm) in modules.items():
            if "block_input" in what:
                handles.append(block.register_forward_pre_hook(_input_hook(receive, layer), with_kwargs=True))
            attention = adapter.attention_module(layer)
            for name, module in zip(CAPTURES[1:], (norm, attention, block), strict=True):
                if name in what:
                    handles.append(module.register_forward_hook(_output_hook(receive, layer, name)))
        # Tensors made in inference mode could not be saved for a student's backward.
        with torch.inference_mode(False), torch.no_grad():
            return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    except _ForwardStoppedError:
        return None
    finally:
        for handle in handles:
            handle.remove()


class _ForwardStoppedError(Exception):
    """Leaves the teacher's forward once everything asked for has been handed over."""


def _input_hook(receive: Callable[[int, str, Any], None], layer: int) -> Callable[..., None]:
    """A forward pre-hook that passes the block's hidden states on."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(layer, "block_input", args[0] if args else kwargs["hidden_states"])

    return hook


def _output_hook(receive: Callable[[int, str, Any], None], layer: int, name: str) -> Callable[..., None]:
    """A forward hook that passes the module's output on under a name."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        receive(layer, name, output)

    return hook


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of (B, L, heads, P) by angles given as cos and sin, each (B or 1, L, R)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def _visible(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B or 1, 1, L, L) bool, True where row i may look at column j: at or before it, and allowed by the mask."""
    B, L = hidden.shape[:2]
    causal = torch.ones(L, L, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask is None:
        return causal
    if tuple(mask.shape) not in ((B, L), (B, L, L)):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, accepted: {(B, L)} or {(B, L, L)}")
    allowed = mask.to(torch.bool)
    return causal & (allowed[:, None, None, :] if allowed.ndim == 2 else allowed[:, None])
