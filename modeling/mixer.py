"""What a token mixer is: the row that the table of mixers has of it, its parameters in float32, its first values.

A mixer is a module that is called as `mixer(hidden_states, sequence, past_key_values, output_attentions)`, with normed
(B, L, D) states, and returns (B, L, D) and its (B, H, L, past + L) mixing matrix or None; one that chooses tokens also
its (B, L, 2) scores and (B, L) decisions. What else it can do, it says by having it:

| attribute | meaning |
|---|---|
| `num_heads` | H, heads of the mixing matrix; calibration and half-lives go by it |
| `initialise()` | sets the first values of its parameters, after its linear layers have transformers' |
| `float32_parameters` | names of the parameters that stay in float32 |
| `hidden_attention(hidden_states, sequence)` | the mixing matrix alone, to align it with attention |
| `start_from(view)` | copies an attention layer's projections, an `AttentionView` of `distill/teacher.py` |
| `set_half_lives(half_lives)` | gives each of `num_heads` heads a half-life in tokens, (H) |
| `set_average_attention(matrix)` | takes the (H, N, N) mean attention of a layer for its weights |
| `out_proj` | a linear layer over `num_heads` heads, which calibration may fit |

Decay rates, step sizes and skips act over the whole length of a text, or are moved by steps that bfloat16 rounds away:
with 8 bits an update below 0.4 % of a value is lost. So they are float32 however a model comes about with
`dtype=torch.bfloat16` or `torch.float16`: by `from_pretrained`, `from_config`, or its class under such a default dtype.

A cast of a finished model, `model.to(dtype)` or `.half()`, is a cast of all its parameters, as of every PyTorch module
and in transformers. A warning says what it costs.

FSDP needs one dtype in each unit: FSDP1 of all its parameters, FSDP2 of those that are trained. Both give it to a model
without being asked, with the same warning. In a process that `accelerate launch` started for FSDP, or in which an
Accelerator with an FSDP plugin exists, a model takes the dtype it is loaded in throughout. A model that exists before,
as under `torchrun` with transformers' Trainer, takes it when it is sharded. Under mixed precision accelerate then keeps
the trained parameters in float32.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

ALL_OF_THEM = "parameters like `A_log`"
LOAD_IN_FLOAT32 = "load the model in float32, with mixed precision, to keep them exact"


@dataclass
class MixerSettings:
    """The settings of a kind of mixer in `zoo_hybrid`: a strict dataclass, which checks itself, derives from this."""

    def complete(self, config: Any) -> None:
        """Fill in what was not given and depends on the sizes of the model."""

    def check(self, config: Any) -> None:
        """Raise ValueError where the settings contradict the sizes of the model."""


@dataclass(frozen=True)
class FromAttention:
    """How distillation puts a kind of mixer in the place of an attention layer.

    Attributes:
        keys: from the teacher's configuration and the student's part of a recipe the keys of `ZooHybridConfig` that the
            kind needs; raises ValueError where the teacher's sizes do not fit.
        options: fields of the student's part of a recipe that mean something for this kind, `StudentSpec` in
            `distill/recipe.py`. Three of them need something of the mixer: "half_life" `set_half_lives` and
            `hidden_attention`, "calibration" `num_heads` and `out_proj`, "copy_projections" `start_from`.
        is_attention: whether the mixer takes the parameters of the attention layer as they are.
    """

    keys: Callable[[Any, Any], dict[str, Any]]
    options: tuple[str, ...]
    is_attention: bool = False


@dataclass(frozen=True)
class TokenMixer:
    """A row of the table of token mixers: all that the rest of the project knows of a kind.

    Attributes:
        label: what it is, for a reader who has not seen the code.
        make: makes the module, from the model's configuration, the kind's settings and the number of the block.
        settings: class of its settings.
        cache_layer: kind of its cache layer; where the settings decide, a function of the mapping that a configuration
            has of them.
        bounded: whether it knows no positions beyond `max_position_embeddings`.
        student: how it takes the place of an attention layer; None: it cannot.
        tags: for model cards on the Hub.
        flat: the keys that its settings had in configurations of before 2026-11, all in one, to their names now.
    """

    label: str
    make: Callable[[Any, Any, int], nn.Module]
    settings: type[MixerSettings] = MixerSettings
    cache_layer: str | Callable[[Any], str] = "zoo_recurrent"
    bounded: bool = False
    student: FromAttention | None = None
    tags: tuple[str, ...] = ()
    flat: dict[str, str] = field(default_factory=dict)


def distillation(method: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a method that only distillation calls: exported code goes without it."""
    return method


def check_sizes(settings: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError where one of the named settings, if given, is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def float32_parameter(*shape: int) -> nn.Parameter:
    """A parameter of that kind, uninitialised; float64 where that is the default dtype, and under FSDP that dtype."""
    dtype = torch.get_default_dtype()
    if not under_fsdp():
        dtype = torch.promote_types(dtype, torch.float32)
    elif dtype in (torch.float16, torch.bfloat16):
        warn_of_dtype(ALL_OF_THEM, dtype, LOAD_IN_FLOAT32)
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def under_fsdp() -> bool:
    """Whether accelerate shards models with FSDP in this process, which needs one dtype in each block."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on", "y", "t")


def initialise_alone(initialise: Callable[..., None], *arguments: Any) -> None:
    """Call `initialise` and put torch's CPU generator back to where it was: a model draws its own values later, and
    with a given seed they are the same whatever its mixers have drawn for themselves."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        initialise(*arguments)


def warn_of_dtype(parameters: str, dtype: torch.dtype, remedy: str) -> None:
    """Say once that parameters which ought to be in float32 are not."""
    name = str(dtype).partition(".")[2]
    logger.warning_once(f"{parameters} are in {name} now, in which small steps of an optimizer are lost; {remedy}")


def matrix_rows(matrix: Callable[..., Tensor], factors: tuple[Tensor, ...], sequence: Any, cache: Any) -> Tensor | None:
    """The (B, H, L, past + L) rows of the new tokens in a recurrent mixer's matrix.

    A state does not say which tokens it is made of. The cache therefore keeps the factors of the matrix, once it is
    asked for at the first tokens.

    Args:
        matrix: makes the (B, H, K, K) matrix of (B, K, ...) factors and their `Sequence`.
        factors: (B, L, ...) each, of the new tokens.
        sequence: their `Sequence`.
        cache: the mixer's layer of the cache, or None.

    Returns:
        The rows, or None where the cache holds tokens and did not keep their factors.
    """
    if cache is None:
        return matrix(*factors, sequence)
    kept = cache.keep_factors(factors, sequence.past)
    return None if kept is None else matrix(*kept, sequence.whole())[:, :, sequence.past :]


def is_single_step(hidden_states: Tensor, sequence: Any, cache: Any) -> bool:
    """Whether the in-place step may be taken: one token, a state to go on from, no padding, no gradients.

    Args:
        hidden_states: (B, L, D) inputs of a mixer.
        sequence: their `Sequence`.
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
    """Start a state-space mixer from an attention layer: v to x, k to B, q to C, o to out_proj; key-value heads are
    repeated whole. The skip D is 0, and the decay does not depend on the input yet.

    Args:
        mixer: has H heads of P channels and P state channels, whose `in_proj` has rows for x, B and C one after the
            other, and in its last H rows those of the decay.
        view: the attention.
        first: row of `in_proj` that x starts at.
        query_scale: factor on the queries; that of the scores, where nothing else has it.

    Raises:
        ValueError: if the mixer's sizes differ from the attention's.
    """
    sizes = (mixer.num_heads, mixer.head_dim, mixer.state_size)
    if sizes != (view.num_heads, view.head_dim, view.head_dim):
        raise ValueError(
            f"student: its mixer has {sizes[0]} heads of {sizes[1]} channels with state_size {sizes[2]}; copying needs "
            f"the attention's {view.num_heads} heads of {view.head_dim}, and state_size {view.head_dim}"
        )
    inner = view.num_heads * view.head_dim
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    rows = [view.expand_heads(view.v), view.expand_heads(view.k), view.q * query_scale]
    weight[first : first + 3 * inner] = torch.cat(rows).to(weight)
    weight[-mixer.num_heads :] = 0.0
    if bias is not None:
        bias.zero_()
        biases = [None if part is None else view.expand_heads(part) for part in (view.v_bias, view.k_bias)]
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


def copy_output(out_proj: nn.Linear, view: Any) -> None:
    """Give an output projection an attention layer's weight, and its bias or none."""
    out_proj.weight.copy_(view.o)
    if out_proj.bias is not None:
        out_proj.bias.copy_(view.o_bias if view.o_bias is not None else torch.zeros(()))
