"""The model card of a model trained from scratch, filled in from the report of its run and from nothing else."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from .card_parts import LOAD_MODEL, LOADED_ALONE, OUR_CODE, common_sections, optimisation, write_trained_card
from .markdown import code, count, fenced, number, percent, table


def write_from_scratch_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of the model, so that it is never seen half-written.

    Args:
        folder: a folder that `save_pretrained` wrote.
        report: report of the run; see `ssm_zoo.training.from_scratch`.
        repo_id: the repository of the card, if known, for the title and the example.
    """
    # Without a licence, since that of the training text is unknown.
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ssm-zoo", report["model"]["model_type"], "custom_code"],
    )
    write_trained_card(folder, metadata, _sections(report, repo_id))


def _sections(report: dict[str, Any], repo_id: str | None) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    common, model_type = common_sections(report), report["model"]["model_type"]
    return {
        **common,
        "title": code(repo_id.rpartition("/")[2] if repo_id else f"{model_type}, trained from scratch"),
        "introduction": f"A {code(model_type)} with {count(report['parameters']['all'])} parameters, trained from "
        f"scratch as a language model with ssm-zoo. It has predicted {count(report['tokens'])} tokens.",
        "loading": LOADED_ALONE,
        "snippet": fenced(LOAD_MODEL.format(repository=repo_id or "<this repository>"), "python"),
        "data": f"{common['data']} {_tokenizer(report)}",
        "training": optimisation(report, _schedule(report)),
        "adapters": "",
        "settings": "\n\n".join([common["settings"], "CONFIG, with what the tokenizer decided:", _config(report)]),
        "evaluations": "\n\n".join(filter(None, [common["evaluations"], _objectives(report), _selection(report)])),
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": _licence(report),
    }


def _tokenizer(report: dict[str, Any]) -> str:
    source, entries = report["tokenizer"]["source"], count(report["tokenizer"]["entries"])
    if source is None:
        return f"Tokenizer: a byte-level BPE of {entries} entries, learnt from the training text."
    return f"Tokenizer: {code(source)}, {entries} entries."


def _config(report: dict[str, Any]) -> str:
    return fenced(yaml.safe_dump(report["model"]["config"], sort_keys=False), "yaml")


def _schedule(report: dict[str, Any]) -> str:
    """Return the schedule, to follow "peak learning rate 0.001, "."""
    settings, warmup = report["settings"], report["settings"]["warmup"]
    rising = f"{count(warmup)} steps" if isinstance(warmup, int) else f"{percent(warmup)} of the steps"
    betas = " and ".join(f"{beta:g}" for beta in settings["betas"])
    return (
        f"reached in {rising}, then a cosine to {settings['final_learning_rate']:g}, betas {betas}, weight decay "
        f"{settings['weight_decay']:g} of the matrices, gradients clipped to {settings['max_grad_norm']:g} (recipe "
        f"{code(settings['recipe'])})"
    )


def _objectives(report: dict[str, Any]) -> str:
    """Return the table of the losses of several training objectives; empty for the next token alone."""
    first, last = report["evaluations"][0], report["evaluations"][-1]
    if "objectives" not in first:
        return ""
    points, names = report["history"], list(first["objectives"])
    samples = [sum(point[f"samples/{name}"] for point in points) for name in names]
    rows = [
        (
            code(name),
            percent(points[-1][f"rate/{name}"]),
            percent(made / sum(samples)),
            number(first["objectives"][name]),
            number(last["objectives"][name]),
        )
        for name, made in zip(names, samples, strict=True)
    ]
    header = (
        "Objective",
        "Rate at the end",
        "Share of all samples",
        "Held-out loss before (nats per target)",
        "After",
    )
    intro = "Trained on samples of several objectives, with a loss on their targets ([figure](plots/objectives.png))."
    return f"{intro}\n\n{table(header, rows)}"


def _selection(report: dict[str, Any]) -> str:
    """Return sentences on the share of held-out tokens that selective layers select, and on the loss without them;
    empty without such layers."""
    last = report["evaluations"][-1]
    if not (rates := last.get("selection_rate")):
        return ""
    text = f"Of the held-out tokens, the selective layers select, in order: {', '.join(map(percent, rates))}."
    if (without := last.get("loss_without_attention")) is not None:
        text += (
            f" If none of them attends, the held-out loss is {number(without)} instead of {number(last['loss'])} nats."
        )
    return text


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; the held-out text is what was given for it, and no other ability was measured.",
        "It continues text as its training text goes on; what it writes may be wrong or offensive, or be that text.",
    ]
    if report["evaluations"][-1]["loss"] >= report["evaluations"][0]["loss"]:
        sentences.insert(0, "**The held-out loss did not fall.**")
    return sentences


def _licence(report: dict[str, Any]) -> str:
    ours = report["tokenizer"]["source"] in (None, "bytes")
    whose = "licence of the training text is" if ours else "licences of the training text and of the tokenizer are"
    return f"The {whose} not known to ssm-zoo: find out before you use or share the weights. {OUR_CODE}"
