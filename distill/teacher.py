"""The Transformer that a student is distilled from: load it, read its attention, and stream its activations.

A :class:`Teacher` is created once for a run. Its family is a checkpoint format in `conversion/formats/`, whose rules
locate its norms and attention and convert the weights of a layer's attention to a common layout, `AttentionView`.
`Teacher.capture` runs one forward pass and passes each layer's activations to a callback as soon as they are computed.
They are not stored, which would take L x D numbers for every layer and row.

Symbols: B batch, L length, D width, H heads, P head width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.formats import TEACHERS
from ..conversion.formats.format import config_errors, empty_model, refuse_quantised
from ..conversion.load_model import WeightsError, load_model, load_tokenizer, quiet_loading
from ..conversion.rules import LazyTensor, lazy
from ..modeling.layers import make_norm, position_type
from ..modeling.modeling_hybrid import make_rotary
from .attention_view import AttentionView
from .fetch import check_place, is_gguf, load_gguf

# Activations of a layer that `Teacher.capture` can pass on, in the order in which a forward pass computes them.
CAPTURES = ("block_input", "normed_input", "attention_output", "block_output")


class Teacher:
    """A model that a student is distilled from.

    Its checkpoint format maps configuration and keys to a `zoo_hybrid` with attention in every block; no other code
    depends on the family.

    Args:
        model: a model of transformers with a language-model head and softmax attention in every block.
        tokenizer: the model's tokenizer; None if no text is read.

    Raises:
        ValueError: if there is no format for such a teacher, the model has no language-model head, or `zoo_hybrid`
            cannot express its configuration.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        form = TEACHERS.get(model.config.model_type)
        if form is None:
            known = " or ".join(sorted(TEACHERS))
            raise ValueError(f"teacher must be a model of type {known}, got {model.config.model_type!r}.")
        assert form.model_class is not None
        if not isinstance(model, form.model_class):
            raise ValueError(f"teacher must be a {form.model_class.__name__}, got a {type(model).__name__}.")
        with config_errors("teacher"):
            self.zoo_config: Any = form.zoo_config(model.config)
        self.mapper = form.mapper(empty_model(form.zoo_class, self.zoo_config))
        self.model = model
        self._rotary: dict[str, nn.Module] = {"rope": make_rotary(self.zoo_config).to(model.device)}
        if self.zoo_config.local_rope_parameters is not None:
            self._rotary["local_rope"] = make_rotary(self.zoo_config, local=True).to(model.device)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise ValueError("The teacher was made without a tokenizer. Pass one to read text.")
        return self._tokenizer

    @property
    def zoo_tensors(self) -> dict[str, LazyTensor]:
        """The model's tensors by the keys of `zoo_hybrid`, without a head that is tied to the embedding."""
        return self.mapper.to_ours({key: lazy(tensor) for key, tensor in self.model.state_dict().items()})

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.zoo_config.num_hidden_layers

    @property
    def positions(self) -> int | None:
        """Number of positions that the model has weights for; None: any."""
        return self.zoo_config.max_position_embeddings if self.zoo_config.is_bounded else None

    def layer(self, layer: int) -> nn.Module:
        """Return the block with this index, from 0."""
        return self._above_output(layer, 3)

    def attention_module(self, layer: int) -> nn.Module:
        """Return the layer's attention, without norms and residual."""
        return self._above_output(layer, 2)

    def _above_output(self, layer: int, levels: int) -> nn.Module:
        """Return the module some levels above the weight of the output projection of a layer's attention.

        Raises:
            ValueError: if there is no such layer.
        """
        key = self.mapper.theirs_of(self._prefix(layer) + "mixer.o_proj.weight")
        return self.model.get_submodule(key.rsplit(".", levels)[0])

    def _prefix(self, layer: int) -> str:
        """Return the prefix of the zoo's keys of a block."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}.")
        return f"backbone.layers.{layer}."

    def attention(self, layer: int) -> AttentionView:
        """Return the layer's attention as weights in the common layout."""
        tensors, mixer, config = self.zoo_tensors, self._prefix(layer) + "mixer.", self.zoo_config
        weights = {name: tensors[f"{mixer}{name}_proj.weight"].load() for name in "qkvo"}
        biases = {name: tensors.get(f"{mixer}{name}_proj.bias") for name in "qkvo"}
        weights |= {f"{name}_bias": bias.load().to(weights[name]) for name, bias in biases.items() if bias is not None}
        norms: dict[str, Any] = {f"{name}_norm": self._qk_norm(mixer + f"{name}_norm.", tensors) for name in "qk"}
        head_dim = int(config.head_dim or 0)
        scalar = head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
        windowed = config.mixer_types[layer] == "sliding_attention"
        return AttentionView(
            num_heads=config.num_attention_heads,
            num_key_value_heads=int(config.num_key_value_heads or 0),
            head_dim=head_dim,
            scaling=scalar**-0.5,
            rotary=self._rotary.get(position_type(config, layer)),
            softcap=config.attn_logit_softcapping,
            window=config.settings_of("sliding_attention").sliding_window if windowed else None,
            **weights,
            **norms,
        )

    def _qk_norm(self, prefix: str, tensors: dict[str, LazyTensor]) -> nn.Module | None:
        """Return the norm of queries or keys whose tensors have a prefix of the zoo's keys; None if there is none."""
        parameters = {key[len(prefix) :]: tensor.load() for key, tensor in tensors.items() if key.startswith(prefix)}
        if not parameters:
            return None
        norm = make_norm(self.zoo_config.norm_type, len(parameters["weight"]), self.zoo_config.rms_norm_eps)
        norm.load_state_dict(parameters, assign=True)
        return norm.requires_grad_(False)

    def attention_matrix(
        self, layer: int, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the (B, H, L, L) attention weights of one layer; see `AttentionView.attention_matrix`."""
        return self.attention(layer).attention_matrix(hidden, position_ids, mask)

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
        """Run the model once and pass each chosen layer's activations to a callback as soon as they are computed.

        The callback runs within the teacher's forward pass, with gradients enabled, so that it can run a student's
        layer forward and backward. The tensors have no graph, can be used in one, and are released when the callback
        returns. It must not change them in place. An error in the callback ends the forward pass and is raised here.

        Args:
            input_ids: (B, L) integer token ids.
            layers: indices of the layers, each once, in any order; the callback sees them from the first to the last.
            what: names out of `CAPTURES`: "block_input" (B, L, D) residual stream before the layer, "normed_input"
                (B, L, D) what its attention reads, "attention_output" (B, L, D) what its attention returns, before a
                norm behind it, "block_output" (B, L, D) the stream after the layer.
            on_layer: callback, called as `on_layer(layer, **tensors)` with the names of `what` as keywords.
            stop_after_last: end the forward pass after the last callback, without later layers and the head.
            attention_mask: (B, L) mask for padding, as the model takes it.
            position_ids: (B, L) positions, as the model takes them.

        Returns:
            None if the forward pass was ended early, otherwise the model's output with its logits.

        Raises:
            ValueError: if an argument is not as described. Nothing is computed in this case.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers of shape (B, L), got {input_ids.dtype} of shape {tuple(input_ids.shape)}."
            )
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers must name at least one layer, and each once, got {list(layers)}.")
        if isinstance(what, str) or not what or len(set(what)) != len(what) or not set(what) <= set(CAPTURES):
            raise ValueError(f"what must name at least one of {', '.join(CAPTURES)}, and each once, got {what!r}.")
        if self.model.training:
            raise ValueError("The teacher must be in evaluation mode. Call eval() before taking targets from it.")
        last = max(layers)
        modules = {layer: (self.layer(layer), self.attention_module(layer)) for layer in layers}
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
            for layer, (block, attention) in modules.items():
                names = ((block, "block_input", "block_output"), (attention, "normed_input", "attention_output"))
                for module, before, after in names:
                    if before in what:
                        hook = _input_hook(receive, layer, before)
                        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                    if after in what:
                        handles.append(module.register_forward_hook(_output_hook(receive, layer, after)))
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


def load_teacher(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a causal language model and its tokenizer as a teacher: frozen and in evaluation mode.

    Only safetensors and GGUF weights are read. They must be complete and finite.

    Args:
        source: a folder, a Hub id, or the path of a .gguf file.
        dtype: dtype of the weights.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run code that comes with the source, e.g. of its tokenizer.

    Raises:
        ValueError: if the source cannot be loaded, or its model cannot be a :class:`Teacher`.
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
                f"teacher: cannot load {str(source)!r}. Give a .gguf file, or a folder or Hub id with the safetensors "
                f"weights and tokenizer of a causal language model of transformers. Reason: {reason}"
            ) from error
    return Teacher(model.eval().requires_grad_(False), tokenizer)


class _ForwardStoppedError(Exception):
    """Ends the teacher's forward pass after the last callback."""


def _input_hook(receive: Callable[[int, str, Any], None], layer: int, name: str) -> Callable[..., None]:
    """Return a forward pre-hook that passes on the module's (B, L, D) input under a name."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(layer, name, args[0] if args else kwargs["hidden_states"])

    return hook


def _output_hook(receive: Callable[[int, str, Any], None], layer: int, name: str) -> Callable[..., None]:
    """Return a forward hook that passes on the module's output under a name."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        receive(layer, name, output)

    return hook
