"""The model card of a finetuned reranker, filled in from the report of its run and from nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..harness.published import without_folders
from .card_parts import licence_sentences, linked_source, repetition, write_trained_card
from .markdown import code, count, fenced, number, percent, seconds, table
from .training_card import adapters_of, base_fields, dead_adapters, method_of

_LOAD = """\
from sentence_transformers import CrossEncoder

repository, revision = "{repository}", "main"
model = CrossEncoder(repository, revision=revision, trust_remote_code=True)
print(model.predict([("a query", "a document"), ("a query", "another document")]))"""
_MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map": "MAP", "recall@10": "Recall@10"}
_LOSSES = {
    "lce": "localised contrastive loss: cross-entropy of the positive among its group",
    "binary": "binary cross-entropy of every document",
    "margin_mse": "MarginMSE on a teacher's scores",
    "listnet": "ListNet on graded lists",
    "lambda": "LambdaLoss (NDCG-Loss2++) on graded lists",
}


def write_reranker_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of a reranker, so that it is never seen half-written.

    Args:
        folder: a folder that sentence-transformers wrote.
        report: report of the run; see `ssm_zoo.training.reranker`.
        repo_id: the repository of the card, if known, for the title and the example.
    """
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="text-ranking",
        tags=[
            "sentence-transformers",
            "cross-encoder",
            "reranker",
            "ssm-zoo",
            report["base"]["model_type"],
            "custom_code",
        ],
        **base_fields(report),
    )
    write_trained_card(folder, metadata, _sections(report, repo_id))


def _sections(report: dict[str, Any], repo_id: str | None) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    settings, reranking = report["settings"], report["reranking"]
    source = report["base"]["source"]
    name = without_folders(source).rpartition("/")[2]
    merged = "" if settings["method"] == "full" else ", merged into the weights"
    return {
        **repetition(report),
        "title": code(repo_id.rpartition("/")[2] if repo_id else f"{name}, a reranker"),
        "introduction": f"{linked_source(source)} ({code(report['base']['model_type'])}), finetuned with ssm-zoo to "
        f"score how well a document answers a query: {method_of(report)}{merged}. Higher is better; the score is a "
        f"logit and is not a probability. The tokenizer makes this text of a pair, "
        f"{code(repr(report['template'])[1:-1])}, and cuts the document, never the "
        f"query, at {count(reranking['max_tokens'])} tokens in all.{_rule(reranking)}",
        "summary": _summary(report),
        "loading": "With torch, transformers and sentence-transformers; the code of the model is in this repository. "
        "`AutoModelForSequenceClassification` of transformers loads it, too: call the tokenizer with (query, document) "
        "and `truncation='only_second'`.",
        "snippet": fenced(_LOAD.format(repository=repo_id or "<this repository>"), "python"),
        "data": _data(report),
        "training": _training(report),
        "adapters": adapters_of(report),
        "evaluations": _evaluations(report),
        "figure": "Training loss over the steps, and the ranking of the held-out lists before and after.",
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": licence_sentences(report["base"]["licence"], "the base model's"),
    }


def _rule(reranking: dict[str, Any]) -> str:
    if reranking["rule"] != "maxp":
        return ""
    return (
        f" A document is scored by the best of its first {count(reranking['max_passages'])} passages of "
        f"{count(reranking['passage_tokens'])} tokens, one every {count(reranking['stride'])} tokens (MaxP). "
        "`CrossEncoder` scores the beginning of what it is given: give it passages, or use `ssm-zoo evaluate rerank`."
    )


def _summary(report: dict[str, Any]) -> str:
    before, after = (evaluation["ndcg@10"] for evaluation in report["evaluations"])
    change = "rose" if after > before else "did not rise"
    first = report["first_stage"]
    beside = f", {number(first['ndcg@10'])} in the order of {first['name']}" if first else ""
    return f"nDCG@10 of the held-out lists {change}: {number(before)} before, {number(after)} after{beside}."


def _data(report: dict[str, Any]) -> str:
    train, held = report["data"]["train"], report["data"]["heldout"]
    out = [f"{count(number)} {reason}" for reason, number in train["left_out"].items()]
    left = f" Left out: {', '.join(out)}." if out else ""
    source = "a part of the same queries" if held["split"] else ", ".join(map(code, held["sources"]))
    empty = f"; {count(held['without_list'])} have an empty list and count as 0" if held["without_list"] else ""
    cut = f", {percent(train['cut'])} cut" if train["cut"] else ""
    return (
        f"To train on: {', '.join(map(code, train['sources']))}, {count(train['groups'])} groups of "
        f"{count(train['queries'])} queries with {count(train['pairs'])} pairs ({train['tokens']:.0f} tokens on "
        f"average{cut}).{left} Held out: {source}, {count(held['queries'])} queries with {count(held['pairs'])} "
        f"documents in their lists{empty}."
    )


def _training(report: dict[str, Any]) -> str:
    settings = report["settings"]
    groups = settings["batch_size"] * settings["gradient_accumulation"] * report["processes"]
    packed = "packed" if settings["packing"] else "padded"
    return (
        f"{_LOSSES[settings['loss']][0].upper()}{_LOSSES[settings['loss']][1:]}; AdamW, {count(report['steps'])} steps "
        f"of {count(groups)} groups in {packed} rows, peak learning rate {settings['learning_rate']:g}, "
        f"{code(settings['schedule'])} schedule, computed in {code(report['compute_dtype'])}, seed "
        f"{settings['seed']}; {seconds(report['seconds'])} seconds."
    )


def _evaluations(report: dict[str, Any]) -> str:
    before, after = report["evaluations"]
    first, depth = report["first_stage"], report["settings"]["depth"]
    # Lists from files are whole.
    names = _MEASURES | ({f"recall@{depth}": f"Recall@{depth}"} if first and depth != 10 else {})
    systems = [before, after, *([first] if first else [])]
    rows = [(name, *(number(system[key]) for system in systems)) for key, name in names.items()]
    headings = ("Held out", "Before", "After", *([first["name"]] if first else []))
    whose = (
        f"the best {count(depth)} documents of the first stage at most"
        if first
        else "all documents that the files give for its query, in no order"
    )
    explained = f"Each list has {whose}. nDCG has trec_eval's linear gain; equal scores are ordered as trec_eval does."
    return "\n\n".join([table(headings, rows), explained])


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; ranking was measured on the queries held out for it, and nowhere else.",
        "What the base model should not be used for, this one should not either.",
    ]
    before, after = report["evaluations"]
    first = report["first_stage"]
    if first and after["ndcg@10"] <= first["ndcg@10"]:
        sentences.insert(0, f"**nDCG@10 of the held-out lists is not above that of {first['name']}.**")
    if after["ndcg@10"] <= before["ndcg@10"]:
        sentences.insert(0, "**nDCG@10 of the held-out lists did not rise.**")
    return dead_adapters(report) + sentences
