"""The model card of a distilled student, filled in from the report of its run and from nothing else.

Every number of a card is in the report. Facts that the report lacks (a licence, a Hub id) are left out, or the card
says that they are unknown. Paths of the machine are reduced to their last names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..harness.published import without_folders
from ..harness.whole_files import write_text_whole
from ..modeling.token_mixers import TOKEN_MIXERS
from .card_parts import base_model, licence_fields, licence_sentences, linked_source, machine_table
from .comparison_tables import comparison_section
from .distillation_report import Report, parse_report
from .distillation_tables import (
    PLOT_CAPTIONS,
    command_block,
    evaluations_table,
    layers_table,
    limits_list,
    plot_image,
    recipe_block,
    samples_section,
    stages_table,
    verdict_list,
)
from .markdown import code, count, fenced
from .results import recovered_sentence, summary_sentence

# Texts that ship with the package: their data set on the Hub, and a description.
_DATA_SETS = {
    "builtin:wikitext2": ("Salesforce/wikitext", "WikiText-2, lightly detokenised, CC BY-SA 3.0"),
}
# A name without characters that Markdown could interpret.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)
_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

repository, revision = "{repository}", "main"
model = AutoModelForCausalLM.from_pretrained(repository, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision, trust_remote_code=True)

inputs = tokenizer("The capital of France is", return_tensors="pt")
tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""


def render_card(report: dict[str, Any], *, repo_id: str | None = None, plots: Sequence[str] = ()) -> str:
    """Return the text of a README.md for the student of a distillation.

    Args:
        report: see `ssm_zoo.reports.distillation_report`.
        repo_id: the repository of the card, if known, for the title and the example.
        plots: paths of pictures, relative to the card, with slashes.

    Returns:
        Markdown with YAML front matter that the Hub accepts.

    Raises:
        ValueError: if the report lacks a key or has a wrong value, or `repo_id` is no Hub id.
    """
    checked = parse_report(report)
    if repo_id is not None:
        _check_repo_id(repo_id)
    card = ModelCard.from_template(
        _metadata(checked, repo_id),
        template_str=resources.files("ssm_zoo.model_cards").joinpath("template.md").read_text(encoding="utf-8"),
        **_sections(checked, repo_id, plots),
    )
    return f"{str(card).rstrip()}\n"


def write_card(folder: str | Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md, with the pictures that are in the folder's `plots/`, so that it is never seen half-written.

    Args:
        folder: folder of the exported student.
        report: see `ssm_zoo.reports.distillation_report`.
        repo_id: the repository of the card, if known.

    Raises:
        ValueError: as for `render_card`, or if there is no such folder; nothing is written then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be the folder of an exported model, got {str(folder)!r}.")
    known = list(PLOT_CAPTIONS)
    names = [path.name for path in (folder / "plots").glob("[!.]*.png")]
    names.sort(key=lambda name: (known.index(name) if name in known else len(known), name))
    card = render_card(report, repo_id=repo_id, plots=[f"plots/{name}" for name in names])
    write_text_whole(folder / "README.md", card)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be a Hub id ORGANISATION/NAME, got {repo_id!r} ({error}).") from None


def _sections(report: Report, repo_id: str | None, plots: Sequence[str]) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    teacher, student, data = report.teacher, report.student, report.data
    name = _model_name(report, repo_id).split("/")[-1]
    return {
        "title": name if _PLAIN_NAME.fullmatch(name) else code(name),
        "introduction": f"{linked_source(teacher.source)} with the token mixers of {count(len(student.layers))} of its "
        f"{count(student.num_layers)} layers replaced, distilled from the original with ssm-zoo.",
        "summary": summary_sentence(report),
        "recovered": recovered_sentence(report),
        "description": f"A {code(student.model_type)} model of {count(student.parameters)} parameters, from a "
        f"{code(teacher.model_type)} model of {count(teacher.parameters)}. Its token mixers:",
        "layers": layers_table(report),
        "snippet": fenced(_SNIPPET.format(repository=repo_id or "<this repository>"), "python"),
        "data": f"Training text: {_texts(data.train_sources)}, {count(data.train_tokens)} tokens. Held-out text: "
        f"{_texts(data.heldout_sources)}, {count(data.heldout_tokens)} tokens.",
        "stages": stages_table(report) if report.stages else "No stage was trained.",
        "verdicts": verdict_list(report),
        "evaluations": evaluations_table(report),
        "comparison": "" if report.comparison is None else comparison_section(report.comparison),
        "plots": "\n\n".join(plot_image(path) for path in plots),
        "samples": samples_section([report.evaluation("teacher"), report.students[-1]]),
        "limits": limits_list(report),
        "command": command_block(report),
        "machine": machine_table(report.model_dump()),
        "recipe": recipe_block(report),
        "licence": licence_sentences(teacher.licence, "the teacher's"),
    }


def _metadata(report: Report, repo_id: str | None) -> ModelCardData:
    """Return the front matter, without unknown values."""
    base = base_model(report.teacher.source)
    rows = (TOKEN_MIXERS[mixer] for mixer in dict.fromkeys(report.student.mixer_types) if mixer in TOKEN_MIXERS)
    data_sets = sorted({_DATA_SETS[name][0] for name in report.data.train_sources if name in _DATA_SETS})
    licence: dict[str, Any] = {**licence_fields(report.teacher.licence, report.teacher.source)}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        # The Hub has no relation for a student, which starts from the teacher's weights and is trained further.
        base_model_relation="finetune" if base else None,
        tags=[
            "ssm-zoo",
            report.student.model_type,
            *dict.fromkeys(tag for row in rows for tag in row.tags),
            "distillation",
            "custom_code",
        ],
        datasets=data_sets or None,
        model_name=_model_name(report, repo_id),
        eval_results=_eval_results(report),
        **licence,
    )


def _eval_results(report: Report) -> list[EvalResult]:
    """Return the student's held-out scores, without those that are not finite."""
    student = report.students[-1]
    sources = report.data.heldout_sources
    known = _DATA_SETS.get(sources[0]) if len(sources) == 1 else None
    scores = (
        ("loss", "Held-out loss (nats per token)", student.loss),
        ("perplexity", "Held-out perplexity (per token)", student.perplexity),
        ("kl_divergence", "KL(teacher || student) (nats per token)", student.kl),
        ("top1_agreement", "Top-1 agreement with the teacher", student.top1_agreement),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=known[0] if known else "text",
            dataset_name=f"Held-out text: {known[1] if known else ', '.join(map(without_folders, sources))}",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in scores
        if value is not None
    ]


def _model_name(report: Report, repo_id: str | None) -> str:
    if repo_id:
        return repo_id
    teacher = without_folders(report.teacher.source).rstrip("/").split("/")[-1]
    return f"{teacher}-{report.student.model_type.replace('_', '-')}"


def _texts(sources: Sequence[str]) -> str:
    """Return the names of the sources, with a description of those that ship with the package."""
    named = [
        f"{code(source)} ({_DATA_SETS[source][1]})" if source in _DATA_SETS else code(without_folders(source))
        for source in sources
    ]
    return ", ".join(named) or "text whose source is not recorded"
