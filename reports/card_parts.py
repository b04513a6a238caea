"""What the model cards of all trainings say alike, from the report of the run."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..harness.published import public_command
from ..harness.whole_files import write_text_whole
from .markdown import code, count, fenced, gibibytes, number, percent, seconds, table

LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

repository, revision = "{repository}", "main"
model = AutoModelForCausalLM.from_pretrained(repository, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)"""
LOADED_ALONE = "With torch and transformers alone; the code of the model is in this repository."
OUR_CODE = "The code in this repository is ssm-zoo's, under Apache-2.0."


def write_trained_card(folder: Path, metadata: ModelCardData, sections: dict[str, str]) -> None:
    """Write README.md from the template of trainings, so that it is never seen half-written.

    Args:
        folder: of the model or adapter.
        metadata: what the Hub reads.
        sections: what the template's holes are filled with; all of it Markdown.
    """
    template = resources.files("ssm_zoo.model_cards").joinpath("trained.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(metadata, template_str=template, **sections)
    write_text_whole(folder / "README.md", f"{str(card).rstrip()}\n")


def common_sections(report: dict[str, Any]) -> dict[str, str]:
    """The sections that follow from what the reports of all language models have; see `ssm_zoo.training.report`."""
    data = report["data"]
    return {
        **repetition(report),
        "summary": _summary(report),
        "data": f"Training text: {_text(data['train'])} Held-out text: {_text(data['heldout'])}",
        "evaluations": _evaluations(report),
        "figure": "Training loss over the steps, and the held-out loss before and after.",
    }


def repetition(report: dict[str, Any]) -> dict[str, str]:
    """The sections that tell how to repeat a run."""
    return {
        "command": fenced(public_command(report["command"]), "sh"),
        "machine": _machine(report),
        "settings": fenced(yaml.safe_dump(report["settings"], sort_keys=False, allow_unicode=True, width=100), "yaml"),
    }


def optimisation(report: dict[str, Any], schedule: str) -> str:
    """How many steps of what, in a sentence.

    Args:
        report: of the run.
        schedule: how the learning rate goes on after "peak learning rate 0.001, ".
    """
    settings = report["settings"]
    rows = settings["batch_size"] * settings["gradient_accumulation"] * report["processes"]
    how = "packed" if settings["packing"] else "padded"
    return (
        f"AdamW, {count(report['steps'])} steps of {count(rows)} {how} rows of up to {count(settings['row_tokens'])} "
        f"tokens, peak learning rate {settings['learning_rate']:g}, {schedule}, computed in "
        f"{code(report['compute_dtype'])}, seed {settings['seed']}; {seconds(report['seconds'])} seconds."
    )


def _summary(report: dict[str, Any]) -> str:
    before, after = report["evaluations"][0]["loss"], report["evaluations"][-1]["loss"]
    change = "fell" if after < before else "did not fall"
    return f"The held-out loss {change}: {number(before)} before, {number(after)} after (nats per token)."


def _text(data: dict[str, Any]) -> str:
    filled = f", {percent(data['filled'])} filled" if data["filled"] is not None else ""
    sources = ", ".join(map(code, data["sources"]))
    if data["documents"] is None:
        return f"{sources}, read as a stream while training."
    return (
        f"{sources}, {count(data['documents'])} documents with {count(data['targets'])} predicted tokens in "
        f"{count(data['rows'])} rows{filled}."
    )


def _evaluations(report: dict[str, Any]) -> str:
    """The first and the last; the plot has those between."""
    rows = [
        (part["name"], number(part["loss"]), number(part["perplexity"], 2), count(part["tokens"]))
        for part in (report["evaluations"][0], report["evaluations"][-1])
    ]
    return table(("Held-out text", "Loss (nats per token)", "Perplexity", "Predictions"), rows)


def _machine(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    rows = [
        ("Date", code(report["created"])),
        ("CPU", f"{code(hardware['cpu'] or 'unknown')}, {hardware['cores']} cores; threads used: {report['threads']}"),
        ("Memory", gibibytes(hardware["memory_bytes"])),
        ("GPU", code(hardware["gpu"]) if hardware["gpu"] else "none"),
        ("Processes", count(report["processes"])),
        ("Versions", ", ".join(f"{code(name)} {code(version)}" for name, version in report["versions"].items())),
    ]
    return table(("Machine and versions", "Value"), rows, left=2)
