"""Parts that the model cards of all trainings share, from the report of the run."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..harness.published import public_command, without_folders
from ..harness.whole_files import write_text_whole
from .markdown import code, count, fenced, gibibytes, number, percent, seconds, table

LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

repository, revision = "{repository}", "main"
model = AutoModelForCausalLM.from_pretrained(repository, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision, trust_remote_code=True)"""
LOADED_ALONE = "With torch and transformers alone; the code of the model is in this repository."
_HUB_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl
gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0
ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
"""Licence identifiers that the Hub accepts in a model card (huggingface.co/docs/hub/repositories-licenses)."""

OUR_CODE = "The code in this repository is ssm-zoo's, under Apache-2.0."


def write_trained_card(folder: Path, metadata: ModelCardData, sections: dict[str, str]) -> None:
    """Write README.md from the template of trainings, so that it is never seen half-written.

    Args:
        folder: folder of the model or adapter.
        metadata: the front matter.
        sections: Markdown for each placeholder of the template.
    """
    template = resources.files("ssm_zoo.model_cards").joinpath("trained.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(metadata, template_str=template, **sections)
    write_text_whole(folder / "README.md", f"{str(card).rstrip()}\n")


def common_sections(report: dict[str, Any]) -> dict[str, str]:
    """Return the sections for what the reports of all language models have; see `ssm_zoo.training.report`."""
    data = report["data"]
    return {
        **repetition(report),
        "summary": _summary(report),
        "data": f"Training text: {_text(data['train'])} Held-out text: {_text(data['heldout'])}",
        "evaluations": _evaluations(report),
        "figure": "Training loss over the steps, and the held-out loss before and after.",
    }


def repetition(report: dict[str, Any]) -> dict[str, str]:
    """Return the sections that tell how to repeat a run."""
    return {
        "command": fenced(public_command(report["command"]), "sh"),
        "machine": machine_table(report),
        "settings": fenced(yaml.safe_dump(report["settings"], sort_keys=False, allow_unicode=True, width=100), "yaml"),
    }


def base_model(source: str) -> str | None:
    """Return a source if it is a Hub id, otherwise None."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    # A name without an organisation may be that of a folder.
    return source if "/" in source and not source.lower().endswith(".gguf") else None


def linked_source(source: str) -> str:
    """Return the name of a source, with a link if it is on the Hub."""
    base = base_model(source)
    return f"[{base}](https://huggingface.co/{base})" if base else code(without_folders(source))


def licence_fields(licence: str | None, source: str) -> dict[str, str]:
    """Return the front matter on the licence of a source; identifiers that the Hub does not know are "other" there."""
    licence = (licence or "").strip()
    if not licence:
        return {}
    if licence.lower() in _HUB_LICENCES.split():
        return {"license": licence.lower()}
    base = base_model(source)
    link = {"license_link": f"https://huggingface.co/{base}"} if base else {}
    return {"license": "other", "license_name": licence, **link}


def licence_sentences(licence: str | None, owner: str, *, with_code: bool = True) -> str:
    """Return sentences on the licences of weights and code.

    Args:
        licence: licence of the weights from which these derive.
        owner: those weights, e.g. "the base model's".
        with_code: whether the code is in the same repository.
    """
    licence = (licence or "").strip()
    ours = f" {OUR_CODE}" if with_code else ""
    if not licence:
        return (
            f"The weights derive from {owner}, whose licence is not recorded: find it out before you use or share "
            f"them.{ours}"
        )
    return f"The weights derive from {owner} and stay under its licence, {code(licence)}.{ours}"


def optimisation(report: dict[str, Any], schedule: str) -> str:
    """Return a sentence on the optimiser, the steps and the batches.

    Args:
        report: report of the run.
        schedule: the schedule, to follow "peak learning rate 0.001, ".
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
    if data["targets"] is None:
        return f"{sources}, {count(data['documents'])} documents, of which samples were made while training."
    return (
        f"{sources}, {count(data['documents'])} documents with {count(data['targets'])} predicted tokens in "
        f"{count(data['rows'])} rows{filled}."
    )


def _evaluations(report: dict[str, Any]) -> str:
    """Return the table of the first and the last evaluation; the plot shows the others."""
    rows = [
        (part["name"], number(part["loss"]), number(part["perplexity"], 2), count(part["tokens"]))
        for part in (report["evaluations"][0], report["evaluations"][-1])
    ]
    return table(("Held-out text", "Loss (nats per token)", "Perplexity", "Predictions"), rows)


def machine_table(report: dict[str, Any]) -> str:
    """Return the table of machine, date and versions of a run."""
    hardware = report["hardware"]
    cpu = code(hardware["cpu"]) if hardware["cpu"] else "unknown"
    cores = f", {count(hardware['cores'])} cores" if hardware["cores"] is not None else ""
    threads = f"; threads used: {report['threads']}" if "threads" in report else ""
    peak = report.get("peak_memory_bytes")
    used = f"; the main process used {gibibytes(peak)}" if peak is not None else ""
    rows = [
        ("Date", code(report["created"])),
        ("CPU", cpu + cores + threads),
        ("Memory", gibibytes(hardware["memory_bytes"]) + used),
        ("GPU", code(hardware["gpu"]) if hardware["gpu"] else "none"),
        ("Processes", count(report["processes"])),
        ("Versions", ", ".join(f"{code(name)} {code(version)}" for name, version in report["versions"].items())),
    ]
    return table(("Machine and versions", "Value"), rows, left=2)
