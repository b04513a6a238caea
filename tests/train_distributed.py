"""One of two processes that train every family with DDP, FSDP1 and FSDP2 on the CPU; started by test_distributed.py.

Prints a line of JSON for each family and way: the losses of two steps and the largest difference of a gathered weight
from what one process gets.
"""

import functools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from families import FAMILIES, draw_ids, make_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from ssm_zoo.modeling import selective_attention

BF16 = torch.bfloat16
WAYS = ("ddp", "fsdp1", "fsdp1-bf16", "fsdp2", "fsdp2-bf16", "fsdp1-all-bf16", "fsdp2-all-bf16")


def make(name: str, way: str) -> Any:
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


def train(model: Any, rows: slice) -> list[float]:
    """Losses of two steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
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


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    selective_attention.logistic_noise = torch.zeros_like  # rows of another batch would draw other noise
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        for way in WAYS:
            alone = make(name, way)
            expected = train(alone, slice(0, 4))
            model = wrap(make(name, way), way)
            mean = torch.tensor(train(model, slice(2 * rank, 2 * rank + 2)))
            dist.all_reduce(mean)
            gathered = weights_of(model, way)
            if rank == 0:
                reloaded = make(name, way)
                reloaded.load_state_dict(gathered)
                theirs = dict(reloaded.named_parameters())
                worst = max(float((theirs[k] - p).detach().abs().max()) for k, p in alone.named_parameters())
                result = {"name": name, "way": way, "losses": (mean / 2).tolist(), "alone": expected, "worst": worst}
                print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
