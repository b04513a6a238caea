"""Parameters of mixers: those that stay in float32 beside weights in half precision, and first values.

Decay rates, step sizes and skips act over the whole length of a text, or are moved by steps that bfloat16 rounds away:
with 8 bits an update below 0.4 % of a value is lost. So they are float32 however a model comes about with
`dtype=torch.bfloat16` or `torch.float16`: by `from_pretrained`, `from_config`, or its class under such a default dtype.

A cast of a finished model, `model.to(dtype)` or `.half()`, is a cast of all its parameters, as of every PyTorch module
and in transformers: whoever needs one dtype throughout, as FSDP and DeepSpeed do of a unit's parameters, gets it so. A
warning says what it costs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias", "dt_proj.bias", "decay_value")


def float32_parameter(*shape: int) -> nn.Parameter:
    """A parameter of that kind, uninitialised; float64 where that is the default dtype."""
    return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def initialise_alone(initialise: Callable[..., None], *arguments: Any) -> None:
    """Call `initialise` and put torch's CPU generator back to where it was: a model draws its own values later, and
    with a given seed they are the same whatever its mixers have drawn for themselves."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        initialise(*arguments)


class KeepsFloat32:
    """A model with such parameters."""

    _keep_in_fp32_modules_strict: Any = list(FLOAT32_PARAMETERS)

    def post_init(self) -> None:
        assert isinstance(self, nn.Module)
        # Those of this model: transformers takes a name that is not there for a mistake.
        self._keep_in_fp32_modules_strict = [
            kept for kept in FLOAT32_PARAMETERS if any(_is(name, kept) for name, _ in self.named_parameters())
        ]
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        for name, parameter in self.named_parameters():
            found = [kept for kept in FLOAT32_PARAMETERS if _is(name, kept)]
            if found and parameter.dtype in (torch.float16, torch.bfloat16):
                logger.warning_once(
                    f"`{found[0]}` and parameters like it are in {str(parameter.dtype).partition('.')[2]} now, in "
                    "which small steps of an optimizer are lost; they stay in float32 where the dtype is given to "
                    "from_pretrained or from_config instead"
                )
                break
        return result


def _is(name: str, kept: str) -> bool:
    """Whether a parameter has this name, below whatever modules."""
    return f".{name}".endswith(f".{kept}")
