"""The mixing matrices of a model on a text: softmax attention, and the hidden attention of the zoo's other mixers.

Every family of the zoo returns one matrix per head and layer with `output_attentions=True`; models of transformers
return those of their softmax attention. A matrix is what a mixer applies to its values: of Mamba it is the recurrence
with step sizes and the skip D, but without the convolution before and the gate behind it (Ali et al., "The Hidden
Attention of Mamba Models", arXiv 2403.01590; for Mamba-2, arXiv 2405.21060).

Each channel of Mamba-1 is a head, so that a layer has thousands of matrices. Of a layer with more than `MANY_HEADS`
only the mean is kept, and its statistics are computed as soon as the layer has run.

Symbols: H heads, K heads that are kept, L queries, M keys.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.families import FAMILIES
from ..modeling.native_models import MODEL_TYPES
from .attention_statistics import first_row, head_statistics, row_shares
from .hidden_states import evaluating

__all__ = ["MANY_HEADS", "AttentionStack", "LayerAttention", "read_attention"]

MANY_HEADS = 32
"""Most heads of a layer that are kept one by one without being asked for."""

_MOST_BYTES = 4 * 2**30
_PARTS = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """The matrices of one layer.

    Attributes:
        layer: its index, from 0.
        mixer: what mixes tokens in it.
        num_heads: H.
        heads: the K heads that are kept; None if only the mean of all heads is.
        matrices: (K, L, M) float32 weights on the CPU; if `heads` is None, (1, L, M) mean of all heads' shares.
        shares: (L, M) float64 mean of all heads' shares, on the CPU.
        start: first query that statistics count, see `first_row`.
        statistics: the output of `head_statistics`, of the kept heads or, if `heads` is None, of all.
    """

    layer: int
    mixer: str
    num_heads: int
    heads: tuple[int, ...] | None
    matrices: Tensor
    shares: Tensor
    start: int
    statistics: dict[str, Tensor]

    @property
    def signed(self) -> bool:
        """Whether a kept weight is negative."""
        return bool((self.matrices < 0).any())


@dataclass(frozen=True, eq=False)
class AttentionStack:
    """The layers of one stack of a model.

    Attributes:
        name: "layers", or "encoder", "decoder" or "cross" (cross-attention) of an encoder-decoder.
        num_layers: number of layers of the stack, also of those without a matrix.
        layers: the chosen layers that have matrices.
        shares: for every layer the (L, M) mean of its heads' shares, None for a layer without a mixer. All is None if
            a layer also mixes tokens in a way that its matrix does not show, as Mamba layers of transformers do.
    """

    name: str
    num_layers: int
    layers: tuple[LayerAttention, ...]
    shares: tuple[Tensor | None, ...] | None


def read_attention(
    model: PreTrainedModel,
    input_ids: Tensor,
    decoder_input_ids: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    field: str = "model",
) -> list[AttentionStack]:
    """Run a model on one text and return its mixing matrices.

    Args:
        model: any model of the zoo that reads tokens, or one of transformers with softmax attention, which has to be
            loaded with `attn_implementation="eager"`.
        input_ids: (1, L) token ids, L >= 2, without padding.
        decoder_input_ids: (1, L') token ids that the decoder of an encoder-decoder reads; without them, only its
            encoder is returned.
        layers: indices of the layers to keep; None: all.
        heads: indices of the heads to keep, in each of these layers; None: all, or the mean of more than `MANY_HEADS`.
        field: what errors call the model.

    Returns:
        One stack, or those of an encoder-decoder that have any of the layers.

    Raises:
        ValueError: if the model has no matrices or reads no tokens, the matrices would take more than 4 GiB, a layer or
            head does not exist, more than `MANY_HEADS` heads are chosen, or a weight is not finite.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be of shape (1, L) with L >= 2, got {tuple(input_ids.shape)}.")
    kind = model.config.model_type
    if model.main_input_name != "input_ids":
        raise ValueError(f"{field}: a model of type {kind} reads {model.main_input_name} and no text.")
    if heads is not None and len(heads) > MANY_HEADS:
        raise ValueError(f"heads: at most {MANY_HEADS} heads can be shown one by one, got {len(heads)}.")
    has_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if decoder_input_ids is not None and not has_decoder:
        raise ValueError(f"{field}: a target text needs an encoder-decoder, got a model of type {kind}.")
    ids: dict[str, Tensor] = {"input_ids": input_ids.to(model.device)}
    if has_decoder:
        start = input_ids[:, :1] if decoder_input_ids is None else decoder_input_ids
        ids["decoder_input_ids"] = start.to(model.device)
    with evaluating(model), torch.no_grad():
        two_tokens = _matrices(model, {name: each[:, :2] for name, each in ids.items()}, field)
        if has_decoder and decoder_input_ids is None:
            two_tokens = {"encoder": two_tokens["encoder"]}
        _check_choice(model, two_tokens, layers, heads, field)
        _check_size(model, two_tokens, ids, field)
        described: dict[int, LayerAttention] = {}
        handles = _describe_early(model, two_tokens, ids, described, layers, heads)
        try:
            found = _matrices(model, ids, field)
        finally:
            for handle in handles:
                handle.remove()
    stacks = [_stack(model, name, found[name], described, layers, heads, field) for name in two_tokens]
    return [stack for stack in stacks if stack.layers]


def _matrices(model: PreTrainedModel, ids: dict[str, Tensor], field: str) -> dict[str, dict[int, Tensor | None]]:
    """Run the model; return the (1, H, L, M) matrices of each stack by layer.

    A layer of a model of transformers that has no softmax attention is left out; one without any mixer is None.
    """
    kind = model.config.model_type
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        outputs: Any = model(**ids, output_attentions=True, return_dict=True, **options)
    except ValueError as error:
        raise ValueError(f"{field}: a model of type {kind} cannot be shown on this text: {error}") from error
    names = _PARTS if "decoder_input_ids" in ids else {"layers": "attentions"}
    found: dict[str, dict[int, Tensor | None]] = {}
    for name, attribute in names.items():
        matrices = getattr(outputs, attribute, None)
        if not matrices or all(matrix is None for matrix in matrices):
            raise ValueError(
                f"{field}: a model of type {kind} returns no attention matrices. Convert it to the zoo if "
                "`ssm-zoo convert` can; all families of the zoo that read tokens have them."
            )
        found[name] = dict(zip(_places(model, name, len(matrices), field), matrices, strict=True))
    return found


def _places(model: PreTrainedModel, stack: str, count: int, field: str) -> list[int]:
    """Return the indices of the layers that returned a matrix or None, since a hybrid of transformers may leave some
    out."""
    total, config = _num_layers(model, stack), model.config.get_text_config()
    if count == total:
        return list(range(total))
    places = [layer for layer, kind in enumerate(_layer_kinds(config)) if _attends(kind)]
    if len(places) != count:
        raise ValueError(
            f"{field}: a model of type {config.model_type} returns matrices for {count} of {total} layers, and its "
            "configuration does not tell which ones."
        )
    return places


def _layer_kinds(config: Any) -> list[str]:
    """Return the kinds of the layers of a hybrid of transformers; empty if the configuration does not have them."""
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or []
    return [str(kind) for kind in kinds]


def _attends(kind: str) -> bool:
    """Return whether a layer of a hybrid of transformers has softmax attention, perhaps beside another mixer."""
    return kind == "hybrid" or ("attention" in kind and "linear" not in kind)


def _num_layers(model: PreTrainedModel, stack: str) -> int:
    """Return the number of layers of a stack."""
    blocks = _blocks(model, stack)
    if blocks is not None:
        return len(blocks)
    config = model.config.get_text_config()
    if stack == "encoder":
        return int(getattr(config, "encoder_layers", None) or config.num_hidden_layers)
    if stack != "layers":
        found = (getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers"))
        return int(next((number for number in found if number), config.num_hidden_layers))
    return int(config.num_hidden_layers)


def _blocks(model: PreTrainedModel, stack: str) -> nn.ModuleList | None:
    """Return the blocks of a stack of a model of the zoo; None for other models."""
    if model.config.model_type not in FAMILIES:
        return None
    base: Any = model.base_model
    if stack != "layers":
        base = base.encoder if stack == "encoder" else base.decoder
    return base.layers


def _mixer_names(model: PreTrainedModel, stack: str) -> list[str]:
    """Return what mixes tokens in each layer: the kinds of a hybrid, otherwise classes of mixers."""
    blocks = _blocks(model, stack)
    if stack == "cross":
        return ["cross-attention"] * _num_layers(model, stack)
    if blocks is None:
        total, kinds = _num_layers(model, stack), _layer_kinds(model.config.get_text_config())
        if len(kinds) != total:
            return ["attention"] * total
        return [kind if "attention" in kind else f"attention ({kind})" for kind in kinds]
    base: Any = model.base_model
    config = (base if stack == "layers" else base.encoder if stack == "encoder" else base.decoder).config
    kinds = getattr(config, "mixer_types", None)
    return list(kinds) if kinds else [" + ".join(type(part).__name__ for part in _parts(block)) for block in blocks]


def _parts(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that mix tokens, whose matrices follow each other along the heads."""
    found = (getattr(block, name, None) for name in ("attention", "mixer", "reverse"))
    return [part for part in found if isinstance(part, nn.Module)]


def _check_choice(
    model: PreTrainedModel,
    two_tokens: dict[str, dict[int, Tensor | None]],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    field: str,
) -> None:
    """Raise a ValueError if a chosen layer or head does not exist, or no chosen layer has a matrix."""
    total = max(_num_layers(model, stack) for stack in two_tokens)
    chosen = range(total) if layers is None else layers
    if wrong := [layer for layer in chosen if not 0 <= layer < total]:
        raise ValueError(f"layers: {field} has the layers 0 to {total - 1}, got {wrong[0]}.")
    found = [(layer, matrices.get(layer)) for matrices in two_tokens.values() for layer in chosen]
    if all(matrix is None for _, matrix in found):
        raise ValueError(f"layers: none of the chosen layers of {field} has a matrix, got {list(chosen)}.")
    for layer, matrix in found:
        count = 0 if matrix is None else matrix.shape[1]
        if count and (wrong := [head for head in heads or () if not 0 <= head < count]):
            raise ValueError(f"heads: layer {layer} of {field} has the heads 0 to {count - 1}, got {wrong[0]}.")


def _check_size(
    model: PreTrainedModel, two_tokens: dict[str, dict[int, Tensor | None]], ids: dict[str, Tensor], field: str
) -> None:
    """Raise a ValueError if the matrices of a text would not fit into memory, after a forward over two tokens."""
    length = {name: each.shape[1] for name, each in ids.items()}
    source, target = length["input_ids"], length.get("decoder_input_ids", 0)
    sizes = {"layers": source**2, "encoder": source**2, "decoder": target**2, "cross": source * target}
    kept, most = 0, 0
    for name, matrices in two_tokens.items():
        early = _blocks(model, name) is not None  # see `_describe_early`
        for matrix in matrices.values():
            heads = 0 if matrix is None else matrix.shape[1]
            kept += 4 * (min(heads, MANY_HEADS) if early else heads) * sizes[name]
            most = max(most, 4 * heads * sizes[name])
    needed = kept + 4 * most  # a layer's own computation holds a few copies of its matrices
    if needed > _MOST_BYTES:
        fits = int(max(source, target) * math.sqrt(_MOST_BYTES / needed))
        raise ValueError(
            f"{field}: the matrices of {max(source, target):,} tokens take about {needed / 2**30:,.1f} GiB, more than "
            f"{_MOST_BYTES // 2**30}. Give at most {fits:,} tokens."
        )


def _describe_early(
    model: PreTrainedModel,
    two_tokens: dict[str, dict[int, Tensor | None]],
    ids: dict[str, Tensor],
    described: dict[int, LayerAttention],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
) -> list[Any]:
    """Let blocks with many heads give up their matrices as soon as their mixer has returned them.

    Args:
        model: the model.
        two_tokens: its matrices of two tokens.
        ids: what it is going to read.
        described: filled during the forward, by the id of the block.
        layers: as in :func:`read_attention`.
        heads: as in :func:`read_attention`.

    Returns:
        Handles of the hooks.
    """

    def hook_of(block: nn.Module, layer: int, mixer: str, length: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            mixed, matrix, *others = output
            if tuple(matrix.shape[2:]) != (length, length):
                return None  # the model pads the text, and cuts the matrices in the end
            described[id(block)] = _describe(matrix[0], layer, mixer, _heads_of(layer, layers, heads))
            return (mixed, matrix[:, :1].clone(), *others)

        return hook

    handles = []
    for stack, matrices in two_tokens.items():
        blocks = _blocks(model, stack)
        if blocks is None or stack == "cross":
            continue
        length = ids["decoder_input_ids" if stack == "decoder" else "input_ids"].shape[1]
        names = _mixer_names(model, stack)
        for layer, matrix in matrices.items():
            block: Any = blocks[layer]
            if matrix is not None and matrix.shape[1] > MANY_HEADS and len(_parts(block)) == 1:
                handles.append(block.mixer.register_forward_hook(hook_of(block, layer, names[layer], length)))
    return handles


def _heads_of(layer: int, layers: Sequence[int] | None, heads: Sequence[int] | None) -> Sequence[int] | None:
    """Return the heads to keep of a layer."""
    return heads if layers is None or layer in layers else None


def _stack(
    model: PreTrainedModel,
    name: str,
    matrices: dict[int, Tensor | None],
    described: dict[int, LayerAttention],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    field: str,
) -> AttentionStack:
    """Describe the layers of a stack."""
    total, blocks, mixers = _num_layers(model, name), _blocks(model, name), _mixer_names(model, name)
    found: dict[int, LayerAttention] = {}
    for layer, matrix in matrices.items():
        if matrix is None:
            continue
        early = None if blocks is None or name == "cross" else described.get(id(blocks[layer]))
        found[layer] = early or _describe(matrix[0], layer, mixers[layer], _heads_of(layer, layers, heads))
        if name == "cross":  # places of two texts have no distance
            found[layer].statistics.pop("distance", None)
        if not bool(found[layer].shares.isfinite().all()):
            raise ValueError(f"{field}: the matrices of layer {layer} are not finite. Try another dtype, e.g. float32.")
    kept = tuple(each for layer, each in found.items() if layers is None or layer in layers)
    # In the zoo, a block without a matrix has no mixer; in transformers, it may have one of another sort, or both.
    others = any("attention" not in kind or "linear" in kind for kind in _layer_kinds(model.config.get_text_config()))
    known = blocks is not None or (len(found) == total and not others and model.config.model_type not in MODEL_TYPES)
    shares = tuple(found[layer].shares if layer in found else None for layer in range(total)) if known else None
    return AttentionStack(name, total, kept, shares)


def _describe(matrix: Tensor, layer: int, mixer: str, heads: Sequence[int] | None) -> LayerAttention:
    """Describe the (H, L, M) matrices of a layer."""
    count, start = matrix.shape[0], first_row(matrix)
    kept = tuple(range(count)) if heads is None and count <= MANY_HEADS else None if heads is None else tuple(heads)
    total = torch.zeros(matrix.shape[1:], dtype=torch.float64, device=matrix.device)
    columns: defaultdict[str, list[Tensor]] = defaultdict(list)
    for part in matrix.split(MANY_HEADS):
        shares = row_shares(part)
        total += shares.sum(0)
        for key, values in head_statistics(shares, start).items():
            columns[key].append(values.cpu())
    statistics = {key: torch.cat(values) for key, values in columns.items()}
    mean = (total / count).cpu()
    if kept is None:
        return LayerAttention(layer, mixer, count, None, mean[None].float(), mean, start, statistics)
    statistics = {key: values[list(kept)] for key, values in statistics.items()}
    return LayerAttention(layer, mixer, count, kept, matrix[list(kept)].float().cpu(), mean, start, statistics)
