"""The model card of a finetuned embedder, filled in from the report of its run and from nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..harness.published import without_folders
from .card_parts import licence_sentences, linked_source, repetition, write_trained_card
from .markdown import code, count, fenced, number, percent, seconds, table
from .training_card import adapters_of, base_fields, dead_adapters, method_of

_LOAD = """\
from sentence_transformers import SentenceTransformer

repository, revision = "{repository}", "main"
model = SentenceTransformer(repository, revision=revision, trust_remote_code=True)
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))"""
_MEASURES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@10": "Recall@10",
    "recall@100": "Recall@100",
    "accuracy@1": "First is right",
}


def write_embedder_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of an embedder, so that it is never seen half-written.

    Args:
        folder: a folder that sentence-transformers wrote.
        report: report of the run; see `ssm_zoo.training.embedder`.
        repo_id: the repository of the card, if known, for the title and the example.
    """
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[
            "sentence-transformers",
            "feature-extraction",
            "ssm-zoo",
            report["base"]["model_type"],
            "custom_code",
        ],
        **base_fields(report),
    )
    write_trained_card(folder, metadata, _sections(report, repo_id))


def _sections(report: dict[str, Any], repo_id: str | None) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    settings, embedding = report["settings"], report["embedding"]
    source = report["base"]["source"]
    name = without_folders(source).rpartition("/")[2]
    merged = "" if settings["method"] == "full" else ", merged into the weights"
    pooled = "its last token's hidden state" if embedding["pooling"] == "last" else "the mean over its tokens"
    return {
        **repetition(report),
        "title": code(repo_id.rpartition("/")[2] if repo_id else f"{name}, an embedder"),
        "introduction": f"{linked_source(source)} ({code(report['base']['model_type'])}), finetuned to embed texts "
        f"with ssm-zoo: {method_of(report)}{merged}. A text of up to {count(embedding['max_tokens'])} tokens becomes "
        f"{count(embedding['size'])} numbers: {pooled}.{_prompts(settings)}",
        "summary": _summary(report),
        "loading": "With torch, transformers and sentence-transformers; the code of the model is in this repository. "
        "`AutoModel` of transformers loads it, too, and gives the hidden states.",
        "snippet": fenced(_LOAD.format(repository=repo_id or "<this repository>"), "python"),
        "data": f"To train on: {_pairs(report['data']['train'])} Held out: {_pairs(report['data']['heldout'])}",
        "training": _training(report),
        "adapters": adapters_of(report),
        "evaluations": _evaluations(report),
        "figure": "Training loss over the steps, and retrieval from the held-out texts before and after.",
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": licence_sentences(report["base"]["licence"], "the base model's"),
    }


def _prompts(settings: dict[str, Any]) -> str:
    named = {"queries": settings["query_prompt"], "documents": settings["document_prompt"]}
    given = [f"{code(prompt)} before {kind}" for kind, prompt in named.items() if prompt.strip()]
    return f" `encode_query` and `encode_document` put {' and '.join(given)}." if given else ""


def _summary(report: dict[str, Any]) -> str:
    before, after = (evaluation["ndcg@10"] for evaluation in report["evaluations"])
    change = "rose" if after > before else "did not rise"
    return (
        f"Among the held-out texts nDCG@10 {change}: {number(before)} before, {number(after)} after, "
        f"{number(report['chance']['ndcg@10'])} by chance."
    )


def _pairs(data: dict[str, Any]) -> str:
    negatives = f" with {count(data['negatives'])} hard negatives each" if data["negatives"] else ""
    tokens = {kind: f"{lengths['tokens']:.0f}" for kind, lengths in data["lengths"].items()}
    cut = data["lengths"]["documents"]["cut"]
    return (
        f"{', '.join(map(code, data['sources']))}, {count(data['pairs'])} pairs{negatives}, of "
        f"{count(data['queries'])} queries ({tokens['anchors']} tokens on average) and {count(data['documents'])} "
        f"documents ({tokens['documents']} tokens{f', {percent(cut)} cut' if cut else ''})."
    )


def _training(report: dict[str, Any]) -> str:
    settings, processes = report["settings"], report["processes"]
    both = ", in both directions" if settings["symmetric"] else ""
    mini = settings["mini_batch_size"]
    cached = f", {count(mini)} texts at a time by GradCache" if mini else ""
    return (
        f"InfoNCE on cosines with the other texts of a batch as negatives, temperature {settings['temperature']:g}"
        f"{both}; AdamW, {count(report['steps'])} steps of {count(settings['batch_size'] * processes)} pairs{cached}, "
        f"peak learning rate {settings['learning_rate']:g}, {code(settings['schedule'])} schedule, computed in "
        f"{code(report['compute_dtype'])}, seed {settings['seed']}; {seconds(report['seconds'])} seconds."
    )


def _evaluations(report: dict[str, Any]) -> str:
    before, after = report["evaluations"]
    chance, held = report["chance"], report["data"]["heldout"]
    rows = [(name, *(number(part[key]) for part in (before, after, chance))) for key, name in _MEASURES.items()]
    pool, *_ = after["pools"]
    cells = [percent(part["pools"][0]["accuracy"]) for part in (before, after, chance)]
    rows.append((f"Right among {count(pool['size'])}", *cells))
    explained = (
        f"{count(held['queries'])} queries over {count(held['documents'])} documents; chance is that of a random "
        f"order. *Right among {count(pool['size'])}*: a document of the query's scores best among those and others "
        f"drawn at random; the 95 % interval after training is {percent(pool['low'])} to {percent(pool['high'])} "
        "(bootstrap over the queries)."
    )
    return "\n\n".join([table(("Held out", "Before", "After", "Chance"), rows), explained])


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; retrieval was measured among the texts held out for it, and nowhere else.",
        "What the base model should not be used for, this one should not either.",
    ]
    before, after = report["evaluations"]
    if after["ndcg@10"] <= before["ndcg@10"]:
        sentences.insert(0, "**nDCG@10 of the held-out texts did not rise.**")
    return dead_adapters(report) + sentences
