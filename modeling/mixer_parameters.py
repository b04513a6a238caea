"""Parameters of mixers: those that stay in float32 beside weights in half precision, and first values.

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
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias", "dt_proj.bias", "decay_value")


def float32_parameter(*shape: int) -> nn.Parameter:
    """A parameter of that kind, uninitialised; float64 where that is the default dtype, and under FSDP that dtype."""
    dtype = torch.get_default_dtype()
    if not under_fsdp():
        dtype = torch.promote_types(dtype, torch.float32)
    elif dtype in (torch.float16, torch.bfloat16):
        _warn("parameters like `A_log`", dtype, "load the model in float32, with mixed precision, to keep them exact")
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def under_fsdp() -> bool:
    """Whether accelerate shards models with FSDP in this process, which needs one dtype in each block."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on", "y", "t")


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
            kept
            for kept in FLOAT32_PARAMETERS
            if not under_fsdp() and any(_is(name, kept) for name, _ in self.named_parameters())
        ]
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        for name, parameter in self.named_parameters():
            found = [kept for kept in FLOAT32_PARAMETERS if _is(name, kept)]
            if found and parameter.dtype in (torch.float16, torch.bfloat16):
                remedy = "they stay in float32 where the dtype is given to from_pretrained or from_config instead"
                _warn(f"`{found[0]}` and parameters like it", parameter.dtype, remedy)
                break
        return result

    @property
    def _fsdp_use_orig_params(self) -> bool:
        """Whether FSDP keeps the parameters' names. torch sets it on every module of a model that it shards: FSDP1
        before it flattens the parameters, FSDP2 before the first forward, where it looks at their dtypes."""
        return self.__dict__.get("_fsdp_use_orig_params", False)

    @_fsdp_use_orig_params.setter
    def _fsdp_use_orig_params(self, value: bool) -> None:
        self.__dict__["_fsdp_use_orig_params"] = value
        assert isinstance(self, nn.Module)
        _take_one_dtype(self)


def _take_one_dtype(model: nn.Module) -> None:
    """Give the parameters that are kept in float32 the dtype that FSDP needs of them."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not _is_kept(name):
            continue
        # FSDP2's parameters are DTensors by now; it casts frozen ones one by one, which may differ.
        flattened = not hasattr(parameter, "placements")
        if not (flattened or parameter.requires_grad):
            continue
        owner, _, own_name = name.rpartition(".")
        dtype = _dtype_beside(owner, parameters, trained_only=not flattened)
        if dtype not in (torch.float16, torch.bfloat16) or dtype == parameter.dtype:
            continue
        _warn("parameters like `A_log`", dtype, "load the model in float32, with mixed precision, to keep them exact")
        if flattened:
            parameter.data = parameter.data.to(dtype)
        else:
            cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=True)
            setattr(model.get_submodule(owner), own_name, cast)


def _dtype_beside(module: str, parameters: dict[str, nn.Parameter], *, trained_only: bool) -> torch.dtype | None:
    """Dtype of the first parameter in this module that is not kept in float32, or else in the nearest around it."""
    others = [
        (name, parameter)
        for name, parameter in parameters.items()
        if not _is_kept(name) and parameter.is_floating_point() and (parameter.requires_grad or not trained_only)
    ]
    while module:
        beside = next((parameter.dtype for name, parameter in others if name.startswith(f"{module}.")), None)
        if beside is not None:
            return beside
        module = module.rpartition(".")[0]
    return others[0][1].dtype if others else None


def _warn(parameters: str, dtype: torch.dtype, remedy: str) -> None:
    """Say once that parameters which ought to be in float32 are not."""
    name = str(dtype).partition(".")[2]
    logger.warning_once(f"{parameters} are in {name} now, in which small steps of an optimizer are lost; {remedy}")


def _is(name: str, kept: str) -> bool:
    """Whether a parameter has this name, below whatever modules and in a layer with adapters too."""
    return f".{name}".replace(".base_layer.", ".").endswith(f".{kept}")


def _is_kept(name: str) -> bool:
    return any(_is(name, kept) for kept in FLOAT32_PARAMETERS)
