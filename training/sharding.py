"""Gather and distribute the weights and optimiser state of a model that FSDP2 or DeepSpeed shards over processes.

accelerate does the sharding (`accelerate launch --config_file ...`; examples are in `examples/launch/`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm.auto import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def sharded_by() -> str | None:
    """Return how `accelerate launch` is configured to shard weights: "FSDP", "DeepSpeed" or None.

    Raises:
        ValueError: for FSDP of version 1, which needs one dtype and one requires_grad for a whole block.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"accelerate: `fsdp_version` must be 2, got {version}.")
        return "FSDP"
    return "DeepSpeed" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


class Sharding:
    """The sharding of a Trainer's model, with methods that gather whole tensors.

    Methods that gather must be called in all processes at once.

    Args:
        trainer: a Trainer whose model is not sharded yet.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.fsdp = bool(trainer.is_fsdp_enabled)
        self.deepspeed = bool(trainer.is_deepspeed_enabled)
        if self.active and trainer.is_world_process_zero():
            how = "FSDP2" if self.fsdp else "DeepSpeed"
            tqdm.write(f"the weights are sharded over {trainer.accelerator.num_processes} processes by {how}")
        # Sharding replaces the model's tensors in place, and cannot be undone.
        self._copy: Any = copy.deepcopy(trainer.model).to("cpu") if self.active else None

    @property
    def active(self) -> bool:
        """Whether weights are sharded."""
        return self.fsdp or self.deepspeed

    @staticmethod
    def choose(trainer: Any) -> None:
        """Make a Trainer shard on CPUs if FSDP is configured: accelerate would silently replicate the model there."""
        state = trainer.accelerator.state
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU
        if asked:
            plugin = FullyShardedDataParallelPlugin()
            if trainer.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
            state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
            trainer.is_fsdp_enabled = True

    def whole_state(self) -> dict[str, Tensor]:
        """Gather all weights by name, on the CPU; trained weights are float32."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        gathered: dict[int, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            owner = parameters.get(name, tensor)
            if id(owner) not in gathered:  # tied weights are gathered once
                gathered[id(owner)] = self._gather(owner)
            state[name] = gathered[id(owner)]
        return state

    def _gather(self, tensor: Tensor) -> Tensor:
        if not self.deepspeed:
            return _whole(tensor)
        from deepspeed import zero  # pyright: ignore[reportMissingImports]
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        whole = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
        if whole is None:
            with zero.GatheredParameters([tensor]):
                whole = tensor.detach().clone()
        return whole.detach().cpu()

    def whole_model(self) -> Any:
        """Return the Trainer's model or, if it is sharded, a copy with the gathered weights."""
        if not self.active:
            return self._trainer.model
        self._copy.load_state_dict(self.whole_state())
        if self.deepspeed:
            unset_hf_deepspeed_config()  # otherwise models that are loaded later would be sharded, too
        return self._copy.to(self._trainer.args.device)

    def whole_optimizer(self) -> dict[str, Any]:
        """Gather the optimiser's state, as it would be without FSDP, on the CPU."""
        state = self._trainer.optimizer.state_dict()
        moments = {
            index: {key: _whole(value) if isinstance(value, Tensor) else value for key, value in parts.items()}
            for index, parts in state["state"].items()
        }
        return {**state, "state": moments}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Give each process its part of an optimiser's whole state."""
        optimizer = self._trainer.optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            index: {key: _part_like(value, parameters[index]) for key, value in parts.items()}
            for index, parts in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": moments})


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of parameters, sharded or not, down to a norm, in place; return the norm before."""
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in chosen if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(chosen, max_norm, norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _part_like(value: Any, parameter: Tensor) -> Any:
    """Return this process's part of a moment of a sharded parameter, or another value unchanged."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
