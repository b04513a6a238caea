"""Output of a training, whatever is trained: measurements, the report, plots, and folders with weights."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..harness.machine import describe_machine
from ..harness.published import decoration
from ..harness.run_folder import read_json_or_none, write_json
from ..harness.whole_files import new_folder
from ..reports.training_plots import write_loss_plot
from .adapters import print_coverage
from .packing import PackedDocuments
from .settings import FinetuningSettings, RunSettings, TrainingSettings
from .sources import public_sources
from .stream import PositionedRows
from .trainer import TrainingRun, compute_dtype


class Run(Protocol):
    """Parts that every run has."""

    @property
    def settings(self) -> RunSettings: ...
    @property
    def output(self) -> Path: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def state(self) -> PartialState: ...


def measured_once(run: Run, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a measurement of the start of a run, from `NAME.json` if the run is resumed; otherwise write that file."""
    path = run.output / f"{name}.json"
    found = read_json_or_none(path)
    run.state.wait_for_everyone()  # until every process has looked for the file
    if found is None:
        found = measure()
        if run.state.is_main_process:
            write_json(path, found)
    return found


def measured_coverage(run: Run, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return and print the coverage of the model's adapters, measured once for a run; None if it has no adapters."""
    if not isinstance(run.model, PeftModel):
        return None
    coverage = measured_once(run, "coverage", measure)
    if run.state.is_main_process:
        print_coverage(coverage, Console())
    return coverage


def report_head(run: Run, kind: str, command: str, *distributions: str) -> dict[str, Any]:
    """Return the part of the report that all runs have; paths are reduced to their last names.

    Args:
        run: the run, with the trained model.
        kind: kind of the run.
        command: command that repeats the run.
        *distributions: packages whose versions are recorded in addition to the usual ones.
    """
    settings = run.settings
    sources = {field: public_sources(getattr(settings, field)) for field in ("train", "heldout")}
    trained = [p.numel() for p in run.model.parameters() if p.requires_grad]
    return {
        "format": 1,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **describe_machine(*distributions),
        "processes": run.state.num_processes,
        "threads": torch.get_num_threads(),
        "settings": {**settings.identity, **sources},
        "compute_dtype": str(compute_dtype(settings.dtype)).removeprefix("torch."),
        "parameters": {"trained": sum(trained), "all": sum(p.numel() for p in run.model.parameters())},
    }


def common_report(
    run: TrainingRun[Any],
    kind: str,
    command: str,
    evaluations: list[dict[str, Any]],
    history: list[dict[str, Any]],
    *distributions: str,
) -> dict[str, Any]:
    """Return the part of the report that all trainings of language models have.

    Args:
        run: the run, with the trained model.
        kind: kind of the run.
        command: command that repeats the run.
        evaluations: held-out losses, the first before and the last after the training.
        history: points of the curve.
        *distributions: packages whose versions are recorded in addition to the usual ones.
    """
    settings, rows = run.settings, {"train": run.rows.train, "heldout": run.rows.heldout}
    return {
        **report_head(run, kind, command, *distributions),
        "data": {
            field: {
                "sources": public_sources(getattr(settings, field)),
                "documents": run.rows.documents[field],
                **_measures(packed, settings),
            }
            for field, packed in rows.items()
        },
        "evaluations": evaluations,
        "steps": run.steps,
        "seconds": history[-1]["seconds"],
        "history": history,
    }


def base_report(
    settings: FinetuningSettings, report: dict[str, Any], model_type: str, origin: tuple[str, str | None]
) -> dict[str, Any]:
    """Return the parts of a finetuning's report about its settings and base model.

    Args:
        settings: settings of the run.
        report: the report so far.
        model_type: model type of the base.
        origin: public name and licence of the base.
    """
    source, licence = origin
    public = {"model": source, "learning_rate": settings.peak_learning_rate}
    base = {"source": source, "revision": settings.revision, "model_type": model_type, "licence": licence}
    return {"settings": {"model": source} | report["settings"] | public, "base": base}


def _measures(rows: PackedDocuments | PositionedRows, settings: TrainingSettings) -> dict[str, Any]:
    """Return the sizes of packed rows; those of a stream are unknown."""
    if isinstance(rows, PositionedRows):
        return {"targets": None, "rows": None, "filled": None}
    filled = rows.tokens / (len(rows) * settings.row_tokens) if settings.packing else None
    return {"targets": rows.targets, "rows": len(rows), "filled": filled}


def write_plots(
    output: Path, report: dict[str, Any], draw: Callable[[dict[str, Any], Path], None] = write_loss_plot
) -> None:
    """Write `plots/loss.png` into the folder of a run."""
    plots = output / "plots"
    with decoration("the plot"):
        plots.mkdir(exist_ok=True)
        draw(report, plots / "loss.png")


def write_folder(
    output: Path,
    name: str,
    save: Callable[[str], object],
    card: Callable[[Path, dict[str, Any]], None],
    report: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a folder with weights, tokenizer, plots and card; it appears complete or not at all.

    Args:
        output: folder of the run, which has the plots.
        name: name of the folder to write.
        save: writes the weights into a folder.
        card: writes the card for a report into a folder.
        report: report of the run.
        tokenizer: tokenizer to save, if `save` does not save it.
    """
    with new_folder(output / name, overwrite=True) as folder:
        save(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        with decoration("the plots in the model's folder"):
            shutil.copytree(output / "plots", folder / "plots")
        with decoration("the model card"):
            card(folder, report)
