"""The model card of a finetuned model or adapter, filled in from the report of its run and from nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..harness.published import without_folders
from .card_parts import (
    LOAD_MODEL,
    LOADED_ALONE,
    base_model,
    common_sections,
    licence_fields,
    licence_sentences,
    linked_source,
    optimisation,
    write_trained_card,
)
from .markdown import code, count, fenced, table

_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, repository, revision = "{base}", "{repository}", "main"
model = AutoModelForCausalLM.from_pretrained(base{base_revision}, trust_remote_code=True)
model = PeftModel.from_pretrained(model, repository, revision=revision)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision, trust_remote_code=True)"""


def write_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of an adapter or a model, so that it is never seen half-written.

    Args:
        folder: a folder that `save_pretrained` wrote, with `adapter_config.json` if it is an adapter's.
        report: report of the run; see `ssm_zoo.training.language_model`.
        repo_id: the repository of the card, if known, for the title and the example.
    """
    adapter = (folder / "adapter_config.json").is_file()
    write_trained_card(folder, _metadata(report, adapter), _sections(report, adapter, repo_id))


def base_fields(report: dict[str, Any]) -> dict[str, Any]:
    """Return the front matter on the base model: its Hub id and its licence."""
    source, licence = report["base"]["source"], report["base"]["licence"]
    base = base_model(source)
    relation = "finetune" if base else None
    return {"base_model": base, "base_model_relation": relation, **licence_fields(licence, source)}


def _metadata(report: dict[str, Any], adapter: bool) -> ModelCardData:
    fields = base_fields(report)
    if adapter and fields["base_model"]:
        fields["base_model_relation"] = "adapter"
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["ssm-zoo", report["base"]["model_type"], *(["lora"] if adapter else ["custom_code"])],
        **fields,
    )


def _sections(report: dict[str, Any], adapter: bool, repo_id: str | None) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    settings, name = report["settings"], report["base"]["source"]
    base = base_model(name)
    revision = f", revision={report['base']['revision']!r}" if report["base"]["revision"] else ""
    snippet = (_ADAPTER if adapter else LOAD_MODEL).format(
        repository=repo_id or "<this repository>", base=base or "<the base model>", base_revision=revision
    )
    loading = (
        "With torch, transformers and peft; the code of the model is in the base model's repository."
        if adapter
        else LOADED_ALONE
    )
    return {
        **common_sections(report),
        "title": code(
            repo_id.rpartition("/")[2] if repo_id else f"{without_folders(name).rpartition('/')[2]}, finetuned"
        ),
        "introduction": f"{linked_source(name)} ({code(report['base']['model_type'])}), finetuned as a language model "
        f"with ssm-zoo: {method_of(report)}"
        f"{'' if adapter or settings['method'] == 'full' else ', merged into the weights'}.",
        "loading": loading,
        "snippet": fenced(snippet, "python"),
        "training": optimisation(report, f"{code(settings['schedule'])} schedule"),
        "adapters": adapters_of(report),
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": licence_sentences(report["base"]["licence"], "the base model's", with_code=not adapter),
    }


def method_of(report: dict[str, Any]) -> str:
    """Return a phrase on the method and the number of trained parameters."""
    settings, parameters = report["settings"], report["parameters"]
    share = f"{count(parameters['trained'])} of {count(parameters['all'])} parameters trained"
    if settings["method"] == "full":
        return f"all weights, {share}"
    kind = "DoRA" if settings["dora"] else "LoRA"
    bits = " over a base in 4 bits" if settings.get("load_in_4bit") else ""
    return f"{kind} of rank {count(settings['rank'])} and alpha {settings['alpha']:g}{bits}, {share}"


def adapters_of(report: dict[str, Any]) -> str:
    """Return the table of adapters by kind of layer, with the dead ones, and the layers without an adapter."""
    coverage = report["coverage"]
    if coverage is None:
        return ""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in coverage["adapters"]:
        kinds.setdefault(entry["kind"], []).append(entry)
    rows = [
        (
            code(kind),
            count(len(entries)),
            count(sum(e["parameters"] for e in entries)),
            count(sum(e["dead"] for e in entries)),
        )
        for kind, entries in kinds.items()
    ]
    bare: dict[str, set[str]] = {}
    for entry in coverage["without_adapter"]:
        bare.setdefault(entry["reason"], set()).add(entry["module"].rpartition(".")[2])
    whole = sorted(bare.pop("trained whole", ()))
    others = sorted(set().union(*bare.values()))
    without = f" Linear layers without an adapter: {', '.join(map(code, others))}." if others else ""
    without += f" Trained whole: {', '.join(map(code, whole))}." if whole else ""
    explained = f"*Dead* adapters got no gradient.{without}"
    return "\n\n".join([table(("Projection", "Adapters", "Parameters", "Dead"), rows), explained])


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; the held-out text is what was given for it, and no other ability was measured.",
        "What the base model should not be used for, this one should not either.",
    ]
    if report["evaluations"][-1]["loss"] >= report["evaluations"][0]["loss"]:
        sentences.insert(0, "**The held-out loss did not fall.**")
    return dead_adapters(report) + sentences


def dead_adapters(report: dict[str, Any]) -> list[str]:
    """Return a sentence on adapters that got no gradient, if there are any."""
    dead = report["coverage"]["dead"] if report["coverage"] is not None else ()
    return [f"**{count(len(dead))} adapters got no gradient and learnt nothing.**"] if dead else []
