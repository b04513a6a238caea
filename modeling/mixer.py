"""Parameters of mixers: those that stay in float32 beside weights in half precision, and first values.

Decay rates, step sizes and skips act over the whole length of a text, or are moved by steps that bfloat16 rounds away:
with 8 bits an update below 0.4 % of a value is lost. So they are float32 however a model comes about with
`dtype=torch.bfloat16` or `torch.float16`: by `from_pretrained`, `from_config`, or its class under such a default dtype.

A cast of a finished model, `model.to(dtype)` or `.half()`, is a cast of all its parameters, as of every PyTorch module
and in transformers: whoever needs one dtype throughout, as FSDP and DeepSpeed do of a unit's parameters, gets it so. A
warning says what it costs. A process that `accelerate launch` started for FSDP, or in which an Accelerator with an FSDP
plugin exists, gets it without asking: there a model takes the dtype it is loaded in throughout, with a warning. Under
mixed precision accelerate then keeps the trained parameters in float32.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias", "dt_proj.bias", "decay_value")


def float32_parameter(*shape: int) -> nn.Parameter:
    """A parameter of that kind, uninitialised; float64 where that is the default dtype, and under FSDP that dtype."""
    dtype = torch.get_default_dtype()
    if not under_fsdp():
        dtype = torch.promote_types(dtype, torch.float32)
    elif dtype in (torch.float16, torch.bfloat16):
        warn_of_dtype(
            "parameters like `A_log`", dtype, "load the model in float32, with mixed precision, to keep them exact"
        )
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
