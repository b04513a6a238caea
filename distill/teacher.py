"""The Transformer that a student is distilled from: loading it, reading its attention, streaming its activations.

A :class:`Teacher` is made once and handed to all that need it. It names the parts of one model family and gives the
weights of a layer's attention in one shape, an `AttentionView`. `Teacher.capture` runs one forward and hands each
layer's activations to a callback as they come up; nothing is kept: stored targets would cost L x D numbers for every
layer and row.

Symbols: B batch, L length, D width, H heads, P head width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
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
from .attention_view import AttentionView
from .fetch import check_place, is_gguf, load_gguf

# What `Teacher.capture` can hand over for a layer, in the order in which a forward produces it.
CAPTURES = ("block_input", "normed_input", "attention_output", "block_output")


class Teacher(ABC):
    """A model that a student is distilled from, its parts under the same names for every family.

    Args:
        model: with its language-model head.
        tokenizer: the model's; None where no text is read.
    """

    model_type: ClassVar[str]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise ValueError("teacher: it was made without a tokenizer")
        return self._tokenizer

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

    def capture(
        self,
        input_ids: Tensor,
        layers: Sequence[int],
        what: Sequence[str],
        *,
        on_layer: Callable[..., None],
        stop_after_last: bool = True,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Run the model once and hand over activations of the chosen layers, each layer's as soon as they are there.

        The callback runs inside the teacher's forward, with gradients enabled, so that it can run a student layer and
        its backward. The tensors it gets carry no graph, may be used in one, and are not kept here after it returns;
        it must not change them in place. An error that it raises ends the forward and reaches the caller.

        Args:
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
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, accepted: integers (B, L)"
            )
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers: got {list(layers)}, accepted: at least one layer, each once")
        if isinstance(what, str) or not what or len(set(what)) != len(what) or not set(what) <= set(CAPTURES):
            raise ValueError(f"what: got {what!r}, accepted: at least one, each once, out of {', '.join(CAPTURES)}")
        if self.model.training:
            raise ValueError("teacher: the model is in training mode; call eval() before taking targets from it")
        last = max(layers)
        modules = {layer: (self.layer(layer), self.input_norm(layer)) for layer in layers}
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
                attention = self.attention_module(layer)
                for name, module in zip(CAPTURES[1:], (norm, attention, block), strict=True):
                    if name in what:
                        handles.append(module.register_forward_hook(_output_hook(receive, layer, name)))
            # Tensors made in inference mode could not be saved for a student's backward.
            with torch.inference_mode(False), torch.no_grad():
                return self.model(
                    input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
                )
        except _ForwardStoppedError:
            return None
        finally:
            for handle in handles:
                handle.remove()


class LlamaTeacher(Teacher):
    """Llama and what shares its model type (SmolLM2, TinyLlama, ...): grouped keys and values, rotary positions.

    Args:
        model: a `LlamaForCausalLM`.
        tokenizer: as of :class:`Teacher`.

    Raises:
        ValueError: if the model has no language-model head.
    """

    model_type = "llama"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, LlamaForCausalLM):
            raise ValueError(f"teacher: got a {type(model).__name__}, accepted: LlamaForCausalLM")
        super().__init__(model, tokenizer)
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


FAMILIES: dict[str, type[Teacher]] = {family.model_type: family for family in (LlamaTeacher,)}


def as_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Teacher:
    """Make a model a teacher.

    Raises:
        ValueError: if there is no :class:`Teacher` for its `config.model_type`.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"teacher: got a model of type {model_type!r}, accepted: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](model, tokenizer)


def load_teacher(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a causal language model and its tokenizer as a teacher: frozen and in evaluation mode.

    Only safetensors and GGUF weights are read. All of the model's weights must be there and finite.

    Args:
        source: a folder, a Hub id, or the path of a .gguf file.
        dtype: dtype of the weights.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run the code that the source brings, e.g. of its tokenizer.

    Raises:
        ValueError: if the source cannot be loaded, or there is no :class:`Teacher` for the model's family; the message
            says why.
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
    return as_teacher(model.eval().requires_grad_(False), tokenizer)


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
