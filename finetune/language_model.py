"""A whole finetuning of a language model: from settings to a folder with an adapter or a model, and a report.

The output folder holds `run.json` (what the run is), `coverage.json` (which adapters learn), `before.json` (the loss
before training), `checkpoints/` (the Trainer's), and at the end `adapter/`, `model/` if all weights were trained or the
adapter was merged, `report.json` and `plots/loss.png`. Starting the same settings on the same folder goes on at the
last whole checkpoint.
"""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..conversion.formatting import without_folders
from ..conversion.machine import describe_machine
from ..conversion.output_folder import claim_output_folder, read_json, result_folder, write_json
from ..conversion.provenance import provenance
from ..modeling.causal_lm import ZooForCausalLM
from .adapters import add_adapters, compute_dtype, load_base, load_tokenizer, merged, pinned
from .card import write_card
from .coverage import adapter_coverage, print_coverage
from .packing import PackedDocuments, RowCollator
from .plot import write_loss_plot
from .settings import LanguageModelSettings
from .texts import encode, fingerprint, read_documents

KIND = "ssm-zoo finetuning of a language model"
# Points of the curve that are kept, whatever its length.
_HISTORY = 200
_KEPT_CHECKPOINTS = 2
_STATE = "trainer_state.json"


@dataclass
class _Run:
    settings: LanguageModelSettings
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: ZooForCausalLM | PeftModel
    train: PackedDocuments
    heldout: PackedDocuments
    documents: dict[str, int]
    state: PartialState

    @property
    def device(self) -> torch.device:
        assert self.state.device is not None
        return self.state.device

    @property
    def collator(self) -> RowCollator:
        padding = self.tokenizer.pad_token_id
        return RowCollator(padding if isinstance(padding, int) else 0)

    def compute(self) -> Any:
        """Context of every forward and backward."""
        dtype = compute_dtype(self.settings)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


def finetune_language_model(
    settings: LanguageModelSettings, output: str | Path, *, merge: bool = False
) -> dict[str, Any]:
    """Carry out a finetuning, or go on with it.

    Args:
        settings: what to do.
        output: a new or empty folder, or the folder of an earlier start with the same settings.
        merge: also write the model with the adapter merged into its weights, as a self-contained folder.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: if settings, model, texts and folder do not fit together, before anything is written; or if the
            loss is not finite.
    """
    if merge and settings.method == "full":
        raise ValueError("merge: got True; accepted: False with method 'full', which leaves nothing to merge")
    run = _prepare(pinned(settings), Path(output))
    before, coverage = _first_look(run)
    history, steps = _train(run)
    after = _evaluate(run, "after")
    report = _report(run, [before, after], coverage, history, steps)
    if run.state.is_main_process:
        _write_results(run, report, merge)
    run.state.wait_for_everyone()
    return report


def _prepare(settings: LanguageModelSettings, output: Path) -> _Run:
    """Load and check everything, then claim the folder."""
    state = PartialState()
    texts = {
        field: read_documents(
            getattr(settings, field), field, separator=settings.separator, text_field=settings.text_field
        )
        for field in ("train", "heldout")
    }
    model, tokenizer = load_base(settings), load_tokenizer(settings)
    ids = {
        field: encode(documents, tokenizer, model.config.vocab_size, progress=state.is_main_process)
        for field, documents in texts.items()
    }
    rows = {}
    for field, documents in ids.items():
        try:
            rows[field] = PackedDocuments(documents, settings.row_tokens, packing=settings.packing)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    set_seed(settings.seed)
    trained = add_adapters(model, settings) if settings.method == "lora" else model
    if not settings.load_in_4bit:
        trained.to(state.device)  # pyright: ignore[reportArgumentType]
    if state.is_main_process:
        data = {field: fingerprint(documents) for field, documents in ids.items()}
        claim_output_folder(output, {**settings.model_dump(mode="json"), "data": data}, KIND)
    state.wait_for_everyone()
    counts = {field: len(documents) for field, documents in texts.items()}
    return _Run(settings, output, tokenizer, trained, rows["train"], rows["heldout"], counts, state)


def _first_look(run: _Run) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The held-out loss before training and the coverage; those of the first start, where it has measured them."""
    before, coverage = (read_json(run.output / name) for name in ("before.json", "coverage.json"))
    if before is None:
        if isinstance(run.model, PeftModel):
            rows = [run.train[index] for index in range(min(run.settings.batch_size, len(run.train)))]
            batch = {key: tensor.to(run.device) for key, tensor in run.collator(rows).items()}
            with run.compute():
                coverage = adapter_coverage(run.model, batch)
        before = _evaluate(run, "before")
        if run.state.is_main_process:
            if coverage is not None:
                write_json(run.output / "coverage.json", coverage)
            write_json(run.output / "before.json", before)
        run.state.wait_for_everyone()
    if run.state.is_main_process and coverage is not None:
        print_coverage(coverage, Console())
    return before, coverage


def heldout_loss(model: nn.Module, rows: PackedDocuments, collator: RowCollator, batch_size: int) -> dict[str, Any]:
    """Mean loss over all predictions of some rows, in evaluation mode.

    Args:
        model: a causal language model, or one with adapters.
        rows: the packed documents.
        collator: stacks rows.
        batch_size: rows in one forward.

    Returns:
        "loss" in nats a token, "perplexity", its exponential (None where that is no float), and "tokens", the number of
        predictions.
    """
    training, total = model.training, 0.0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):  # pyright: ignore[reportArgumentType]
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            # The sum over the targets, divided by 1.
            total += model(**batch, num_items_in_batch=1).loss.double().item()
    model.train(training)
    loss = total / rows.targets
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None, "tokens": rows.targets}


def _evaluate(run: _Run, name: str) -> dict[str, Any]:
    with run.compute():
        measured = heldout_loss(run.model, run.heldout, run.collator, run.settings.batch_size)
    if run.state.is_main_process:
        tqdm.write(f"{name}: held-out loss {measured['loss']:.4f}")
    return {"name": name, **measured}


class _Trainer(Trainer):
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices: not norms and biases, and not the SSMs' decay rates, of which Mamba-1 has a matrix."""
        return [name for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("A_log")]


class _Watch(TrainerCallback):
    """Adds the seconds of training so far to every point of the curve, and stops where the loss is not finite."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = max((point.get("seconds", 0.0) for point in state.log_history), default=0.0)
        self._started = time.monotonic() - before

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        point = state.log_history[-1]
        if "loss" in point:
            point["seconds"] = time.monotonic() - self._started
            if not math.isfinite(point["loss"]):
                raise ValueError(f"the loss is {point['loss']} at step {state.global_step}; lower learning_rate")


def _train(run: _Run) -> tuple[list[dict[str, Any]], int]:
    """Train, from the last whole checkpoint if there is one; the curve and the number of steps."""
    settings = run.settings
    in_a_step = settings.batch_size * settings.gradient_accumulation * run.state.num_processes
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(len(run.train) / in_a_step))
    every = math.ceil(steps / _HISTORY)
    arguments = TrainingArguments(
        output_dir=str(run.output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.peak_learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=compute_dtype(settings) == torch.bfloat16,
        **_checkpointing(settings),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # At a point of the curve, since the Trainer forgets the loss since the last one.
        save_steps=math.ceil(settings.checkpoint_every / every) * every,
        save_total_limit=_KEPT_CHECKPOINTS,
        report_to=[],
        use_cpu=run.device.type == "cpu",
        dataloader_pin_memory=run.device.type == "cuda",
    )
    trainer = _Trainer(
        model=run.model,
        args=arguments,
        train_dataset=run.train,
        data_collator=run.collator,  # pyright: ignore[reportArgumentType]
        callbacks=[_Watch()],
    )
    found = _last_checkpoint(run.output / "checkpoints")
    if found is None or _steps_done(found) < steps:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        points = trainer.state.log_history
    else:  # the Trainer would do one step more
        trainer._load_from_checkpoint(str(found))
        points = read_json(found / _STATE)["log_history"]
    keys = ("step", "loss", "grad_norm", "learning_rate", "seconds")
    return [{key: point[key] for key in keys} for point in points if "loss" in point], steps


def _checkpointing(settings: LanguageModelSettings) -> dict[str, Any]:
    """The Trainer's arguments for it: transformers 5.23 gave them another name and warns of the old one."""
    if not settings.gradient_checkpointing:
        return {}
    new = "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _last_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest checkpoint that is whole: its state is what it writes last."""
    found = [path for path in folder.glob("checkpoint-*") if isinstance(read_json(path / _STATE), dict)]
    return max(found, key=_steps_done, default=None)


def _steps_done(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _report(
    run: _Run,
    evaluations: list[dict[str, Any]],
    coverage: Mapping[str, Any] | None,
    history: list[dict[str, Any]],
    steps: int,
) -> dict[str, Any]:
    settings = run.settings
    source, licence = provenance(settings.model)
    base: Any = run.model.get_base_model() if isinstance(run.model, PeftModel) else run.model
    trained = [p.numel() for p in run.model.parameters() if p.requires_grad]
    texts = {field: [_without_folder(text) for text in getattr(settings, field)] for field in run.documents}
    named = {"model": source, **texts}  # no paths of this machine
    return {
        "format": 1,
        "kind": KIND,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["ssm-zoo", *sys.argv[1:]]),
        **describe_machine("peft"),
        "processes": run.state.num_processes,
        "threads": torch.get_num_threads(),
        "settings": {**settings.model_dump(mode="json"), "learning_rate": settings.peak_learning_rate, **named},
        "compute_dtype": str(compute_dtype(settings)).removeprefix("torch."),
        "base": {
            "source": source,
            "revision": settings.revision,
            "model_type": base.config.model_type,
            "licence": licence,
        },
        "parameters": {"trained": sum(trained), "all": sum(p.numel() for p in run.model.parameters())},
        "data": {
            field: {
                "sources": texts[field],
                "documents": run.documents[field],
                "targets": rows.targets,
                "rows": len(rows),
                "filled": rows.tokens / (len(rows) * settings.row_tokens) if settings.packing else None,
            }
            for field, rows in (("train", run.train), ("heldout", run.heldout))
        },
        "evaluations": evaluations,
        "coverage": coverage,
        "steps": steps,
        "seconds": history[-1]["seconds"],
        "history": history,
    }


def _without_folder(source: str) -> str:
    """A source without the folders of this machine."""
    return without_folders(source) if source.startswith("datasets:") else Path(source).name


def _write_results(run: _Run, report: dict[str, Any], merge: bool) -> None:
    """The report, and the adapter and the model as folders that appear whole."""
    plots = run.output / "plots"
    plots.mkdir(exist_ok=True)
    write_loss_plot(report, plots / "loss.png")
    if isinstance(run.model, PeftModel):
        with result_folder(run.output / "adapter") as folder:
            run.model.save_pretrained(str(folder), save_embedding_layers=False)
            _add_company(run, report, folder)
    if merge:
        _write_model(run, report, merged(run.settings, run.output / "adapter"))
    elif not isinstance(run.model, PeftModel):
        _write_model(run, report, run.model)
    write_json(run.output / "report.json", report)


def _write_model(run: _Run, report: dict[str, Any], model: ZooForCausalLM) -> None:
    with result_folder(run.output / "model") as folder:
        model.save_pretrained(folder)
        _add_company(run, report, folder)


def _add_company(run: _Run, report: dict[str, Any], folder: Path) -> None:
    """What stands beside weights: tokenizer, plot, card."""
    run.tokenizer.save_pretrained(folder)
    shutil.copytree(run.output / "plots", folder / "plots")
    write_card(folder, report)
