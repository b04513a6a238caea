"""What a training leaves behind, whatever was trained: the report, and folders that appear whole."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import nn

from ..harness.machine import describe_machine
from ..harness.published import decoration, public_argument
from ..harness.whole_files import new_folder
from ..reports.training_plots import write_loss_plot
from .packing import PackedDocuments
from .settings import RunSettings, TrainingSettings
from .sources import DATASETS
from .stream import TextStream
from .trainer import TrainingRun, compute_dtype


class Run(Protocol):
    """What a run has, whatever is trained."""

    @property
    def settings(self) -> RunSettings: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def state(self) -> PartialState: ...


def report_head(run: Run, kind: str, command: str, *distributions: str) -> dict[str, Any]:
    """How the report of every run begins; paths are without their folders.

    Args:
        run: the run, with the trained model.
        kind: what sort of run this is.
        command: what repeats it.
        *distributions: that took part, besides those that always do.
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
        "compute_dtype": str(compute_dtype(settings)).removeprefix("torch."),
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
    """What the report of every training as a language model says.

    Args:
        run: the run, with the trained model.
        kind: what sort of run this is.
        command: what repeats it.
        evaluations: held-out losses, the first before and the last after the training.
        history: the points of the curve.
        *distributions: that took part, besides those that always do.
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


def _measures(rows: PackedDocuments | TextStream, settings: TrainingSettings) -> dict[str, Any]:
    """What is known of rows; of a stream nothing is."""
    if isinstance(rows, TextStream):
        return {"targets": None, "rows": None, "filled": None}
    filled = rows.tokens / (len(rows) * settings.row_tokens) if settings.packing else None
    return {"targets": rows.targets, "rows": len(rows), "filled": filled}


def public_sources(sources: list[str]) -> list[str]:
    """Sources without the folders of this machine."""
    return [public_argument(text) if text.startswith(DATASETS) else Path(text).name for text in sources]


def write_plots(run: TrainingRun[Any], report: dict[str, Any]) -> None:
    """Write `plots/` into the folder of the run."""
    plots = run.output / "plots"
    with decoration("the plot"):
        plots.mkdir(exist_ok=True)
        write_loss_plot(report, plots / "loss.png")


def write_folder(
    run: TrainingRun[Any],
    name: str,
    save: Callable[[str], object],
    card: Callable[[Path, dict[str, Any]], None],
    report: dict[str, Any],
) -> None:
    """Write a folder of the run with weights and what stands beside them: tokenizer, plots, card.

    Args:
        run: the run; its plots are written.
        name: of the folder.
        save: writes the weights into a folder.
        card: writes the card into a folder, from the report.
        report: of the run.
    """
    with new_folder(run.output / name, overwrite=True) as folder:
        save(str(folder))
        run.tokenizer.save_pretrained(folder)
        with decoration("the plot in the model's folder"):
            shutil.copytree(run.output / "plots", folder / "plots")
        with decoration("the model card"):
            card(folder, report)
