"""One of two processes that train every family with DDP, FSDP1 and FSDP2 on the CPU; started by test_distributed.py.

First with torch's own functions, then as accelerate prepares a model loaded in bfloat16, and with LoRA on such a model.
Prints a line of JSON for each family and way: the losses of two steps, and how far the gathered weights are from what
one process gets (`worst`, relative to the largest of a tensor where that is above 1) and from their start (`moved`).
"""

import functools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from families import FAMILIES, draw_ids, make_config, make_model, perturb
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from ssm_zoo.modeling import selective_attention

BF16 = torch.bfloat16
WAYS = ("ddp", "fsdp1", "fsdp1-bf16", "fsdp2", "fsdp2-bf16", "fsdp1-all-bf16", "fsdp2-all-bf16")
PREPARED = ("prepared-fsdp1", "prepared-fsdp2", "prepared-fsdp1-lora", "prepared-fsdp2-lora")
"""Mixed precision, of a model loaded in bfloat16."""


def make(name: str, way: str) -> Any:
    if way in PREPARED:
        torch.manual_seed(0)
        model = FAMILIES[name].causal_lm._from_config(make_config(name), dtype=BF16)
        perturb(model)
        if way.endswith("lora"):  # not zero at first, so that all of them learn, and small, so that training is stable
            model = get_peft_model(
                model, LoraConfig(r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
            )
        return model.train()
    model = make_model(name).train()
    return model.to(BF16) if way.endswith("all-bf16") else model


def wrap(model: Any, way: str) -> Any:
    """The model as accelerate wraps it: every block is a unit."""
    blocks = {type(block) for block in model.backbone.layers}
    mixed = way in ("fsdp1-bf16", "fsdp2-bf16")
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if way.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
            mixed_precision=MixedPrecision(param_dtype=BF16, reduce_dtype=BF16) if mixed else None,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=BF16) if mixed else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def sgd(model: Any) -> Any:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def shard_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make an Accelerator shard models. On CPUs it does not: it would use DDP, whatever plugin it is given."""
    state = accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    # Every view of the state is brought up to date from this one. FSDP1 takes no CPU with a number.
    PartialState._shared_state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
    state.__dict__.update(PartialState._shared_state)
    assert AcceleratorState().distributed_type == accelerator.distributed_type == DistributedType.FSDP


def accelerator_for(way: str) -> Accelerator:
    """An Accelerator that shards."""
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2 if "fsdp2" in way else 1,
        auto_wrap_policy="transformer_based_wrap",
        use_orig_params="fsdp1" in way or None,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    shard_on_cpus(accelerator, plugin)
    return accelerator


def prepare(model: Any, accelerator: Accelerator, way: str) -> tuple[Any, Any]:
    """Model and optimizer as transformers' Trainer has accelerate prepare them."""
    if "fsdp2" in way:
        return accelerator.prepare(model, sgd(model))
    if way.endswith("lora"):
        accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    model = accelerator.prepare(model)
    return model, sgd(model)


def train(model: Any, optimizer: Any, rows: slice) -> list[float]:
    """Losses of two steps."""
    ids = draw_ids(4, 9)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights_of(model: Any, way: str) -> dict[str, torch.Tensor]:
    """The whole state dict, on every process."""
    inner = model.module if way == "ddp" else model
    return get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True, cpu_offload=False))


def compare(name: str, way: str, accelerator: Accelerator | None) -> None:
    """Train in one process and in both, and print how far they are apart."""
    rank = dist.get_rank()
    alone = make(name, way)
    before = {key: parameter.detach().clone() for key, parameter in alone.named_parameters()}
    expected = train(alone, sgd(alone), slice(0, 4))
    if accelerator is None:
        model = wrap(make(name, way), way)
        optimizer = sgd(model)
    else:
        model, optimizer = prepare(make(name, way), accelerator, way)
        assert isinstance(model, FSDPModule if "fsdp2" in way else FullyShardedDataParallel)
    mean = torch.tensor(train(model, optimizer, slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(mean)
    gathered = weights_of(model, way)
    if rank == 0:
        reloaded = make(name, way)
        reloaded.load_state_dict(gathered)
        theirs = dict(reloaded.named_parameters())
        worst = max(
            float(((theirs[k] - p).abs().max() / p.abs().max().clamp(min=1)).detach())
            for k, p in alone.named_parameters()
        )
        moved = max(float((theirs[k] - p).detach().abs().max()) for k, p in before.items())
        result = {"losses": (mean / 2).tolist(), "alone": expected, "worst": worst, "moved": moved}
        print(json.dumps({"name": name, "way": way} | result), flush=True)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    selective_attention.logistic_noise = torch.zeros_like  # rows of another batch would draw other noise
    dist.init_process_group("gloo")
    for way in WAYS:
        for name in names:
            compare(name, way, None)
    for way in PREPARED:  # last: from here on a model knows that it will be sharded
        for name in names:
            compare(name, way, accelerator_for(way))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
