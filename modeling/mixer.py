"""The interface of token mixers: rows of the table of mixers, parameters in float32, initialisation.

A mixer is a module that is called as `mixer(hidden_states, sequence, past_key_values, output_attentions)` with normed
(B, L, D) states. It returns (B, L, D) and its (B, H, L, past + L) mixing matrix or None; a mixer that selects tokens
also returns its (B, L, 2) scores and (B, L) decisions. These attributes are optional:

| attribute | meaning |
|---|---|
| `num_heads` | H, heads of the mixing matrix; calibration and half-lives go by it |
| `initialise()` | sets the first values of its parameters, after its linear layers have transformers' |
| `begin_pass(sequence)` | called before each forward of the model, but not where gradient checkpointing repeats it |
| `wanted_rate` | of a mixer that selects tokens: the rate that the capacity loss pulls to; None: it has no such loss |
| `float32_parameters` | names of the parameters that are kept in float32 |
| `hidden_attention(hidden_states, sequence)` | the mixing matrix alone, to align it with attention |
| `matrix_factors(hidden_states, sequence)` | its factors (`SSDFactors`), to align it without computing it |
| `start_from(view)` | copies an attention layer's projections, an `AttentionView` of `distill/teacher.py` |
| `set_half_lives(half_lives)` | gives each of `num_heads` heads a half-life in tokens, (H) |
| `set_gates(weight, bias)` | gives each head the gate `1 + bias + weight @ hidden`, (H, D) and (H) |
| `set_average_attention(matrix)` | takes the (H, N, N) mean attention of a layer for its weights |
| `out_proj` or `o_proj` | the linear layer over `num_heads` heads with which it ends, which calibration may fit |

Decay rates, step sizes and skips act over the whole length of a text, and their updates are small: with the 8 bits of
bfloat16 an update below 0.4 % of a value is lost. They are therefore float32 in every model that is made with
`dtype=torch.bfloat16` or `torch.float16`, by `from_pretrained`, by `from_config`, or under such a default dtype.

A cast of a finished model, `model.to(dtype)` or `.half()`, casts all its parameters, as in every PyTorch module and in
transformers. A warning says what is lost.

FSDP needs one dtype in each unit: FSDP1 for all parameters, FSDP2 for those that are trained. A model takes this dtype
automatically, with the same warning. In a process that `accelerate launch` started for FSDP, or that has an Accelerator
with an FSDP plugin, all parameters have the dtype that the model is loaded in. A model that was made before, as under
`torchrun` with transformers' Trainer, takes it when it is sharded. Under mixed precision accelerate then keeps the
trained parameters in float32.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .prefix import prefix_alone

logger = logging.get_logger(__name__)

ALL_OF_THEM = "parameters like `A_log`"
LOAD_IN_FLOAT32 = "load the model in float32, with mixed precision, to keep them exact"


@dataclass
class MixerSettings:
    """Base class of the settings of a kind of mixer in `zoo_hybrid`, which are strict dataclasses."""

    def complete(self, config: Any) -> None:
        """Fill in defaults that depend on the sizes of the model."""

    def check(self, config: Any) -> None:
        """Raise ValueError where the settings contradict the sizes of the model."""


@dataclass(frozen=True)
class FromAttention:
    """Instructions for distillation to replace an attention layer by a kind of mixer.

    Attributes:
        keys: maps the teacher's configuration and the student's part of a recipe to the keys of `ZooHybridConfig` that
            the kind needs; raises ValueError where the teacher's sizes do not fit.
        options: fields of the student's part of a recipe (`StudentSpec` in `distill/recipe.py`) that apply to it. Three
            of them need something of the mixer: "half_life" `set_half_lives` and `hidden_attention`, "calibration"
            `num_heads` and `out_proj` or `o_proj`, "copy_projections" `start_from`.
        is_attention: whether the mixer takes over the parameters of the attention layer unchanged.
        learned_features: whether it always has feature maps that a stage can train alone.
    """

    keys: Callable[[Any, Any], dict[str, Any]]
    options: tuple[str, ...]
    is_attention: bool = False
    learned_features: bool = False


@dataclass(frozen=True)
class TokenMixer:
    """A row of the table of token mixers: all that the rest of the project knows about a kind.

    Attributes:
        label: description for readers who have not seen the code.
        make: builds the module from the model's configuration, the kind's settings and the index of the block.
        settings: class of the settings.
        cache_layer: kind of the cache layer, or a function of the mapping of settings in a configuration.
        bidirectional: whether the mixer can read a document in both directions, if the configuration says so.
        bounded: whether the mixer has no positions beyond `max_position_embeddings`.
        prefix: whether the mixer reads prefixes in both directions with `prefix_bidirectional` (`prefix.py`).
        student: instructions to replace an attention layer; None if that is not possible.
        tags: tags of model cards on the Hub.
        flat: top-level keys of configurations from before 2026-11 -> names of the settings.
    """

    label: str
    make: Callable[[Any, Any, int], nn.Module]
    settings: type[MixerSettings] = MixerSettings
    cache_layer: str | Callable[[Any], str] = "zoo_recurrent"
    bidirectional: bool = False
    bounded: bool = False
    prefix: bool = False
    student: FromAttention | None = None
    tags: tuple[str, ...] = ()
    flat: dict[str, str] = field(default_factory=dict)


def distillation(method: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a method that only distillation calls and that exported code leaves out."""
    return method


def check_sizes(settings: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError where one of the named settings, if given, is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def complete_heads(config: Any) -> None:
    """Fill in `num_key_value_heads` and `head_dim` of attention where they are not given."""
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if config.head_dim is None and config.num_attention_heads > 0:
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({config.hidden_size}) if head_dim is not given, "
                f"got {config.num_attention_heads}"
            )
        config.head_dim = config.hidden_size // config.num_attention_heads


def check_heads(config: Any) -> None:
    """Raise ValueError where the sizes of attention heads are out of range or do not fit together."""
    check_sizes(config, "num_attention_heads", "num_key_value_heads", "head_dim")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads ({config.num_attention_heads}), "
            f"got {config.num_key_value_heads}"
        )


def float32_parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised float32 parameter, or one of the default dtype if that is float64 or under FSDP."""
    dtype = torch.get_default_dtype()
    if not under_fsdp():
        dtype = torch.promote_types(dtype, torch.float32)
    elif dtype in (torch.float16, torch.bfloat16):
        warn_of_dtype(ALL_OF_THEM, dtype, LOAD_IN_FLOAT32)
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def under_fsdp() -> bool:
    """Return whether accelerate shards models with FSDP in this process, which needs one dtype in each block."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on", "y", "t")


def initialise_alone(initialise: Callable[..., None], *arguments: Any) -> None:
    """Call `initialise` and restore torch's CPU generator, so that the values that the model draws later depend on the
    seed alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        initialise(*arguments)


def warn_of_dtype(parameters: str, dtype: torch.dtype, remedy: str) -> None:
    """Warn once that parameters are not in float32."""
    name = str(dtype).partition(".")[2]
    logger.warning_once(f"{parameters} are in {name} now, in which small steps of an optimizer are lost; {remedy}")


def matrix_rows(matrix: Callable[..., Tensor], factors: tuple[Tensor, ...], sequence: Any, cache: Any) -> Tensor | None:
    """Return the (B, H, L, past + L) rows of the new tokens in a recurrent mixer's matrix.

    A state does not tell which tokens it consists of. The cache therefore keeps the factors of the matrix, if the
    matrix is asked for from the first tokens on.

    Args:
        matrix: computes the (B, H, K, K) matrix from (B, K, ...) factors and their `Sequence`.
        factors: (B, L, ...) each, of the new tokens.
        sequence: the `Sequence` of the new tokens.
        cache: the mixer's layer of the cache, or None.

    Returns:
        The rows, or None if the cache holds tokens without their factors.
    """
    if cache is None:
        return matrix(*factors, sequence)
    kept = cache.keep_factors(factors, sequence.past)
    return None if kept is None else matrix(*kept, sequence.whole())[:, :, sequence.past :]


def scan_both_ways(
    forward: Any, reverse: Any, inputs: tuple[Tensor, ...], sequence: Any, cache: Any, output_attentions: bool
) -> tuple[Tensor, Tensor | None]:
    """Scan (B, L, ...) inputs forwards and add a scan from the end of every document, in an encoder, or of its prefix.

    Args:
        forward: has the method `scan(*inputs, sequence, cache, output_attentions)` and the `config`, whose
            `prefix_bidirectional` restricts the other direction to the prefixes of `sequence`.
        reverse: the same for the other direction; None in a causal model.
        inputs: what is scanned.
        sequence: the `Sequence` of the inputs.
        cache: the mixer's layer of the cache, or None.
        output_attentions: whether to return the matrices of both directions, one after the other along the heads.
    """
    y, attention = forward.scan(*inputs, sequence, cache, output_attentions)
    if reverse is None:
        return y, attention
    if not forward.config.prefix_bidirectional:
        ahead, attention_ahead = reverse.scan(*map(sequence.reverse, inputs), sequence, None, output_attentions)
        if attention is not None:
            attention = torch.cat([attention, sequence.reverse(sequence.reverse(attention_ahead, 2), 3)], dim=1)
        return y + sequence.reverse(ahead), attention
    if sequence.prefix is None:
        return y, None if attention is None else torch.cat([attention, torch.zeros_like(attention)], dim=1)
    alone = prefix_alone(sequence)
    ahead, attention_ahead = reverse.scan(*map(alone.reverse, inputs), alone, None, output_attentions)
    if attention is not None:
        attention_ahead = alone.reverse(alone.reverse(attention_ahead, 2), 3)
        attention = torch.cat([attention, attention_ahead * sequence.prefix[:, None, :, None]], dim=1)
    return y + alone.blank(alone.reverse(ahead)), attention


def is_single_step(hidden_states: Tensor, sequence: Any, cache: Any) -> bool:
    """Return whether the in-place step applies: one token, a cached state, no padding, no gradients.

    Args:
        hidden_states: (B, L, D) inputs of a mixer.
        sequence: the `Sequence` of the inputs.
        cache: the mixer's layer of the cache, or None.
    """
    return (
        cache is not None
        and cache.is_initialized
        and hidden_states.shape[1] == 1
        and sequence.seq_idx is None
        and not torch.is_grad_enabled()
    )


def start_from_attention(mixer: Any, view: Any, *, first: int, query_scale: float) -> None:
    """Copy an attention layer into a state-space mixer: v to x, k to B, q to C, o to out_proj.

    Each key-value head is repeated for its query heads. The skip D is 0, and the decay does not depend on the input.

    Args:
        mixer: has H heads of P channels and P state channels; its `in_proj` has consecutive rows for x, B and C, and
            the rows of the decay last.
        view: the attention layer.
        first: first row of x in `in_proj`.
        query_scale: factor on the queries, e.g. the scaling of the scores. With a norm of the queries, which would
            undo it, it is applied to the values.

    Raises:
        ValueError: if the sizes of mixer and attention differ, or the mixer lacks the norms of queries and keys.
    """
    if view.q_norm is not None and getattr(mixer, "q_norm", None) is None:
        raise ValueError(
            f"`student.copy_projections` must be False for a teacher with norms of queries and keys, which a "
            f"{type(mixer).__name__} does not have, got True"
        )
    sizes = (mixer.num_heads, mixer.head_dim, mixer.state_size)
    if sizes != (view.num_heads, view.head_dim, view.head_dim):
        raise ValueError(
            f"the student's mixer must have the attention's {view.num_heads} heads of {view.head_dim} channels, and "
            f"state_size {view.head_dim}, to copy its projections; got {sizes[0]} heads of {sizes[1]} channels and "
            f"state_size {sizes[2]}"
        )
    inner = view.num_heads * view.head_dim
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    value_scale = 1.0
    if view.q_norm is not None:
        value_scale, query_scale = query_scale, 1.0
        _copy_norm(mixer.q_norm, view.q_norm, lambda rows: rows)
        _copy_norm(mixer.k_norm, view.k_norm, view.expand_heads)
    rows = [view.expand_heads(view.v) * value_scale, view.expand_heads(view.k), view.q * query_scale]
    weight[first : first + 3 * inner] = torch.cat(rows).to(weight)
    weight[-mixer.num_heads :] = 0.0
    if bias is not None:
        bias.zero_()
        biases = [None if part is None else view.expand_heads(part) for part in (view.v_bias, view.k_bias)]
        biases[0] = None if biases[0] is None else biases[0] * value_scale
        biases.append(None if view.q_bias is None else view.q_bias * query_scale)
        for part, values in enumerate(biases):
            if values is not None:
                bias[first + part * inner : first + (part + 1) * inner] = values.to(weight)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, :, -1] = 1.0
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
    mixer.D.zero_()
    copy_output(mixer.out_proj, view)


def _copy_norm(norm: nn.Module, view_norm: nn.Module, expand: Callable[[Tensor], Tensor]) -> None:
    """Copy a norm of queries or keys; `expand` repeats the heads of one that is over the width of all of them."""
    for (_, mine), (_, theirs) in zip(norm.named_parameters(), view_norm.named_parameters(), strict=True):
        mine.copy_(theirs if theirs.shape == mine.shape else expand(theirs))


def copy_output(out_proj: nn.Linear, view: Any) -> None:
    """Copy the output projection of an attention layer: the weight, and the bias or zeros."""
    out_proj.weight.copy_(view.o)
    if out_proj.bias is not None:
        out_proj.bias.copy_(view.o_bias if view.o_bias is not None else torch.zeros(()))
