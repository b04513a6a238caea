"""One of two processes in which transformers' Trainer trains models on the CPU; started by test_distributed.py.

The models exist before the Trainer and its Accelerator do, as under `torchrun`: they do not know that they will be
sharded. Every case is a model of the registry, as `zoo/AutoModelForX`, and a way (`WAYS`). Prints a line of JSON for
each: the losses of two steps, and how far the gathered weights are from what one process gets (`worst` of those that
are trained, `frozen` of all, relative to the largest of a tensor where that is above 1) and from their start (`moved`).

First come the checkpoints of `save_together.py`.
    python train_with_trainer.py (first | every) FOLDER TRAINING...
"""

import copy
import gc
import itertools
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from families import ENCODERS, FAMILIES, VOCAB, draw_ids, make_config, perturb
from peft import LoraConfig, get_peft_model
from save_together import save_and_resume
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from train_distributed import BF16, sgd, shard_on_cpus, weights_of
from transformers import AutoModel, Trainer, TrainingArguments

from ssm_zoo import modeling
from ssm_zoo.modeling import selective_attention

ROWS, LENGTH = 4, 9
BESIDE = {"retrieval": modeling.RetrievalMixerConfig(hidden_size=16, num_hidden_layers=2, max_position_embeddings=6)}
"""Configurations that are registered, but of no family."""


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Attributes:
        version: of FSDP; 0 is DDP.
        dtype: that the model is made in.
        mixed: bfloat16 mixed precision.
        lora: None, or the dtype of adapters on it.
    """

    version: int
    dtype: torch.dtype = torch.float32
    mixed: bool = True
    lora: torch.dtype | None = None


WAYS = {
    f"{kind}-{name}": Way(version, dtype, mixed, lora)
    for version, kind in ((0, "ddp"), (1, "fsdp1"), (2, "fsdp2"))
    for name, dtype, mixed, lora in (
        ("float32", torch.float32, False, None),
        ("mixed", torch.float32, True, None),
        ("loaded-bf16", BF16, True, None),
        ("all-bf16", BF16, False, None),
        ("lora", BF16, True, torch.float32),
        ("bf16-lora", BF16, True, BF16),
    )
}


def registry() -> dict[str, tuple[str, str]]:
    """Every model there is, as `name/AutoModelForX`: its model_type and the Auto class."""
    found = {}
    for name in [*FAMILIES, *ENCODERS, *BESIDE]:
        config = BESIDE[name] if name in BESIDE else make_config(name)
        absent = "AutoModelForCausalLM" if name in ENCODERS else "AutoModelForMaskedLM"
        for auto in type(AutoModel.from_config(config)).auto_classes:
            if auto != absent:
                found[f"{name}/{auto}"] = (config.model_type, auto)
    return found


def cases(*, every: bool) -> list[tuple[str, str]]:
    """Models and ways: one model of every type and head, and with them every way.

    Or of `every` family the causal language model in all ways, and its other heads in one after the other.
    """
    models = registry()
    first = {kind: model for model, kind in reversed(models.items())}.values()
    ways = itertools.cycle(WAYS)
    if not every:
        return [(model, next(ways)) for model in first]
    found = []
    for model, (_, auto) in models.items():
        found += [(model, way) for way in (WAYS if auto == "AutoModelForCausalLM" else [next(ways)])]
    return found


def make(model: str, way: Way) -> Any:
    name, auto = model.split("/")
    torch.manual_seed(0)
    config = copy.deepcopy(BESIDE[name]) if name in BESIDE else make_config(name, pad_token_id=0)
    made = getattr(transformers, auto).from_config(config, dtype=way.dtype)
    perturb(made)
    if way.lora is not None:  # not zero at first, so that all of them learn, and small, so that training is stable
        settings = LoraConfig(r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
        made = get_peft_model(made, settings, autocast_adapter_dtype=way.lora == torch.float32)
    return made.train()


def rows_for(model: str) -> list[dict[str, Any]]:
    """What a model learns from: the same number of labels in every row."""
    name, auto = model.split("/")
    torch.manual_seed(1)
    if name in BESIDE:
        width = BESIDE[name].hidden_size
        queries, candidates = torch.randn(ROWS, width), torch.randn(ROWS, 4, width)
        return [
            {"query_embeds": query, "candidate_embeds": of, "labels": index % 4}
            for index, (query, of) in enumerate(zip(queries, candidates, strict=True))
        ]
    ids = draw_ids(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    elif auto == "AutoModelForTokenClassification":
        inputs["labels"] = (ids % 2).masked_fill(mask == 0, -100)
    elif auto == "AutoModelForSequenceClassification":
        inputs["labels"] = torch.arange(ROWS) % 2
    else:  # embeddings, which are drawn to random ones
        assert auto == "AutoModel", "a head without a loss here"
        inputs["labels"] = draw_ids(ROWS) / VOCAB
    return [{key: value[row] for key, value in inputs.items()} for row in range(ROWS)]


def loss_of(model: Any, inputs: dict[str, Any]) -> Any:
    """Loss of a batch: the model's own, or of an embedder's mean embedding."""
    labels = inputs["labels"]
    if labels.is_floating_point():
        embeddings = model(**{key: value for key, value in inputs.items() if key != "labels"}).last_hidden_state
        return (embeddings[:, -1].float() - labels[:, None]).square().mean()
    return model(**inputs).loss


class CPUTrainer(Trainer):
    """The Trainer, where accelerate shards on CPUs too: it looks for FSDP on accelerators alone."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            shard_on_cpus(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        if inputs["labels"].is_floating_point():
            return loss_of(model, inputs)
        return super().compute_loss(model, inputs, *arguments, **options)


class LossOf(nn.Module):
    """A model whose forward is its loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> Any:
        return loss_of(self.model, inputs)


def train_alone(model: Any, rows: list[dict[str, Any]], way: Way) -> list[float]:
    """Losses of two steps in this process, over all rows.

    FSDP's mixed precision rounds more than autocast, which leaves embeddings, norms and biases in float32: its forward
    sees bfloat16 copies of all parameters. So it does here.
    """
    batch = transformers.default_data_collator(rows)
    optimizer, losses, loss_model = sgd(model), [], LossOf(model)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=BF16) if way.mixed else nullcontext():
            copied = loss_model.named_parameters() if way.mixed and way.version else ()
            copies = {key: parameter.to(BF16) for key, parameter in copied}
            loss = functional_call(loss_model, copies, (batch,))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_together(model: Any, rows: list[dict[str, Any]], way: Way, folder: str) -> tuple[Any, list[float]]:
    """The wrapped model, and the losses of two steps of both processes."""
    sharding: dict[str, Any] = {}
    if way.version:
        sharding = {"fsdp": True, "fsdp_config": {"version": way.version, "sync_module_states": False}}
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=ROWS // 2,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=way.mixed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        **sharding,
    )
    trainer = CPUTrainer(model=model, args=arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    kind = {0: DistributedDataParallel, 1: FullyShardedDataParallel, 2: FSDPModule}[way.version]
    assert isinstance(trainer.model_wrapped, kind), type(trainer.model_wrapped)
    return trainer.model_wrapped, [point["loss"] for point in trainer.state.log_history if "loss" in point]


def compare(model: str, name: str, folder: str) -> None:
    """Train in one process and in both, and print how far they are apart."""
    way, rows = WAYS[name], rows_for(model)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for good
    AcceleratorState._reset_state(True)
    main_process = dist.get_rank() == 0
    alone = make(model, way)
    before = {key: parameter.detach().clone() for key, parameter in alone.named_parameters()}
    expected = train_alone(alone, rows, way) if main_process else []
    wrapped, losses = train_together(make(model, way), rows, way, folder)
    gathered = weights_of(wrapped, "ddp" if way.version == 0 else "fsdp")
    if main_process:
        reloaded = make(model, way)
        reloaded.load_state_dict(gathered)
        theirs = dict(reloaded.named_parameters())
        apart = {
            kind: max(
                float(((theirs[key] - ours).abs().max() / ours.abs().max().clamp(min=1)).detach())
                for key, ours in alone.named_parameters()
                if ours.requires_grad or kind == "frozen"
            )
            for kind in ("worst", "frozen")
        }
        moved = max(float((theirs[k] - p).detach().abs().max()) for k, p in before.items())
        print(json.dumps({"model": model, "way": name, "losses": losses, "alone": expected, "moved": moved, **apart}))


def main(chosen: list[tuple[str, str]], saving: str, trainings: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage in every training
    transformers.logging.set_verbosity_error()
    selective_attention.logistic_noise = torch.zeros_like  # rows of another batch would draw other noise
    dist.init_process_group("gloo")
    save_and_resume(Path(saving), trainings)
    with tempfile.TemporaryDirectory() as folder:
        for model, way in chosen:
            compare(model, way, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(cases(every=sys.argv[1] == "every"), sys.argv[2], sys.argv[3:])
