"""A model whose weights are shared out over processes, by FSDP2 or DeepSpeed: what one process needs of all of it.

What does the sharding, and how, is accelerate's business (`accelerate launch --config_file ...`); examples are in
`examples/launch/`.
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
    """Return what `accelerate launch` was told to share weights out by: "FSDP", "DeepSpeed" or nothing.

    Raises:
        ValueError: if it is FSDP of version 1, which has one dtype and one requires_grad for a whole block.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"accelerate: fsdp_version: got {version}; accepted: 2")
        return "FSDP"
    return "DeepSpeed" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


class Sharding:
    """How a Trainer's model is sharded, and the way back to whole tensors.

    Methods that gather have to be called in all processes at once.

    Args:
        trainer: with its model, which is not sharded yet.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.fsdp = bool(trainer.is_fsdp_enabled)
        self.deepspeed = bool(trainer.is_deepspeed_enabled)
        if self.active and trainer.is_world_process_zero():
            how = "FSDP2" if self.fsdp else "DeepSpeed"
            tqdm.write(f"the weights are shared out over {trainer.accelerator.num_processes} processes by {how}")
        # Sharding turns the model's own tensors into parts, in place, and there is no way back.
        self._copy: Any = copy.deepcopy(trainer.model).to("cpu") if self.active else None

    @property
    def active(self) -> bool:
        """Whether weights are sharded."""
        return self.fsdp or self.deepspeed

    @staticmethod
    def choose(trainer: Any) -> None:
        """Let a Trainer shard on CPUs too if FSDP was asked for: accelerate would replicate there without a word."""
        state = trainer.accelerator.state
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU
        if asked:
            plugin = FullyShardedDataParallelPlugin()
            if trainer.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
            state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
            trainer.is_fsdp_enabled = True

    def whole_state(self) -> dict[str, Tensor]:
        """All weights by name, on the CPU; in float32 where that is what is trained."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        gathered: dict[int, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            owner = parameters.get(name, tensor)
            if id(owner) not in gathered:  # tied weights once
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
        """The Trainer's model, or, if it is sharded, a copy with its weights."""
        if not self.active:
            return self._trainer.model
        self._copy.load_state_dict(self.whole_state())
        if self.deepspeed:
            unset_hf_deepspeed_config()  # else what is loaded from now on would be shared out, too
        return self._copy.to(self._trainer.args.device)

    def whole_optimizer(self) -> dict[str, Any]:
        """The optimiser's state as it would be without FSDP, on the CPU."""
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
    """Scale the gradients of some parameters, sharded or not, down to a norm, in place, and return what it was."""
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in chosen if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(chosen, max_norm, norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _part_like(value: Any, parameter: Tensor) -> Any:
    """This process's part of a moment of a sharded parameter; another value as it is."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
