"""The model card of a finetuned model or adapter, filled in from the report of its run and from nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..harness.published import without_folders
from .card_parts import LOAD_MODEL, LOADED_ALONE, OUR_CODE, common_sections, optimisation, write_trained_card
from .hub_licences import HUB_LICENCES
from .markdown import code, count, fenced, table

_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, repository, revision = "{base}", "{repository}", "main"
model = AutoModelForCausalLM.from_pretrained(base{base_revision}, trust_remote_code=True)
model = PeftModel.from_pretrained(model, repository, revision=revision)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)"""


def write_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of an adapter or a model, so that it is never seen half-written.

    Args:
        folder: what `save_pretrained` wrote; it holds `adapter_config.json` if it is an adapter's.
        report: of the run; see `ssm_zoo.training.language_model`.
        repo_id: the repository that the card is for, if known: its title, and what the example loads.
    """
    adapter = (folder / "adapter_config.json").is_file()
    write_trained_card(folder, _metadata(report, adapter), _sections(report, adapter, repo_id))


def hub_id(report: dict[str, Any]) -> str | None:
    """The base model's Hub id, None where it has none."""
    source = report["base"]["source"]
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source if "/" in source else None


def linked_base(report: dict[str, Any]) -> str:
    """The base model's name, with a link to it where it is on the Hub."""
    base = hub_id(report)
    return f"[{base}](https://huggingface.co/{base})" if base else code(without_folders(report["base"]["source"]))


def base_fields(report: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads of the base model: which it is, and its licence."""
    base, licence = hub_id(report), (report["base"]["licence"] or "").strip()
    fields: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune" if base else None}
    if licence.lower() in HUB_LICENCES:
        return {**fields, "license": licence.lower()}
    if licence:  # the Hub refuses identifiers that it does not know
        return {**fields, "license": "other", "license_name": licence}
    return fields


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
    """What the template's holes are filled with; all of it Markdown."""
    settings, base = report["settings"], hub_id(report)
    name = report["base"]["source"]
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
        "introduction": f"{linked_base(report)} ({code(report['base']['model_type'])}), finetuned as a language model "
        f"with ssm-zoo: {method_of(report)}"
        f"{'' if adapter or settings['method'] == 'full' else ', merged into the weights'}.",
        "loading": loading,
        "snippet": fenced(snippet, "python"),
        "training": optimisation(report, f"{code(settings['schedule'])} schedule"),
        "adapters": adapters_of(report),
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": licence_of(report, adapter),
    }


def method_of(report: dict[str, Any]) -> str:
    """What was trained, in half a sentence."""
    settings, parameters = report["settings"], report["parameters"]
    share = f"{count(parameters['trained'])} of {count(parameters['all'])} parameters trained"
    if settings["method"] == "full":
        return f"all weights, {share}"
    kind = "DoRA" if settings["dora"] else "LoRA"
    bits = " over a base in 4 bits" if settings.get("load_in_4bit") else ""
    return f"{kind} of rank {count(settings['rank'])} and alpha {settings['alpha']:g}{bits}, {share}"


def adapters_of(report: dict[str, Any]) -> str:
    """Which kinds of layers carry adapters, which do not, and which adapters are dead."""
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
    bare = sorted({entry["module"].rpartition(".")[2] for entry in coverage["without_adapter"]})
    without = f" Linear layers without an adapter: {', '.join(map(code, bare))}." if bare else ""
    explained = f"*Dead* adapters got no gradient.{without}"
    return "\n\n".join([table(("Projection", "Adapters", "Parameters", "Dead"), rows), explained])


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; the held-out text is what was given for it, and no other ability was measured.",
        "What the base model should not be used for, this one should not either.",
    ]
    if report["evaluations"][-1]["loss"] >= report["evaluations"][0]["loss"]:
        sentences.insert(0, "**The held-out loss did not fall.**")
    if report["coverage"] is not None and report["coverage"]["dead"]:
        sentences.insert(
            0, f"**{count(len(report['coverage']['dead']))} adapters got no gradient and learnt nothing.**"
        )
    return sentences


def licence_of(report: dict[str, Any], adapter: bool) -> str:
    """Whose licence the weights are under, and that of the code if it is there."""
    licence = (report["base"]["licence"] or "").strip()
    ours = "" if adapter else f" {OUR_CODE}"
    if not licence:
        return (
            "The weights derive from the base model's, whose licence is not recorded: find it out before you use or "
            f"share them.{ours}"
        )
    return f"The weights derive from the base model's and stay under its licence, {code(licence)}.{ours}"
