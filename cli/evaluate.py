"""`ssm-zoo evaluate`: measure a model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..harness.text_files import check_text
from .computing import ComputingCommand
from .evaluate_length import length
from .evaluate_rerank import rerank
from .evaluate_translation import translation
from .evaluation_report import Overwrite, Report, check_output, model_name, write_report
from .options import Dtype, Revision, Seed, TrustRemoteCode
from .sources import model_source

evaluate = typer.Typer(no_args_is_help=True, help="Measure a model.")
evaluate.command("rerank", cls=ComputingCommand)(rerank)
evaluate.command("translation", cls=ComputingCommand)(translation)
evaluate.command("length", cls=ComputingCommand)(length)

Pooling = Literal["last", "mean"]


@evaluate.command("retrieval", cls=ComputingCommand)
def retrieval(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of an embedder, or of a plain model.")
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, as in BEIR."
        ),
    ],
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="Judgements to use.")] = "test",
    revision: Revision = None,
    pooling: Annotated[
        Pooling | None, typer.Option("--pooling", help="How a plain model embeds a text; an embedder knows its own.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Tokens of a text at most, for a plain model.")
    ] = None,
    query_prompt: Annotated[
        str, typer.Option("--query-prompt", metavar="TEXT", help="Text put before every query, for a plain model.")
    ] = "",
    document_prompt: Annotated[
        str,
        typer.Option("--document-prompt", metavar="TEXT", help="Text put before every document, for a plain model."),
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in one forward pass.")] = 32,
    pools: Annotated[
        str,
        typer.Option(
            "--pools",
            metavar="SIZES",
            help="Pool sizes for the accuracy: candidates including the right one, e.g. 32,100.",
        ),
    ] = "32",
    bm25: Annotated[bool, typer.Option("--bm25", help="Also measure BM25, with bm25s.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    output: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how well an embedder retrieves relevant documents, from all documents and from small pools.

    Reports nDCG@10, MRR@10, recall and top-1 accuracy over all documents; the share of queries whose relevant document
    scores best in a pool, with its 95 % interval; and the values of a random ranking. Needs sentence-transformers and
    ir-measures.
    """
    check_output(output, "retrieval", overwrite)
    sizes = [_number(size, "pools", int) for size in pools.split(",")]
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}")
    check_text(query_prompt, "query_prompt")
    check_text(document_prompt, "document_prompt")
    source = model_source(model, revision)
    from ..evaluation.embedder import load_embedder
    from ..evaluation.retrieval import bm25_scores, chance_levels, embedder_scores, evaluate_retrieval, read_beir

    data = read_beir(folder, split)
    how = {"pools": sizes, "seed": seed, "progress": True}
    measured: dict[str, dict[str, Any]] = {}
    if bm25:
        measured["BM25"] = evaluate_retrieval(data, bm25_scores(data), **how)
    embedder = load_embedder(
        source,
        revision=revision,
        trust_remote_code=trust_remote_code,
        pooling=pooling,
        max_tokens=max_tokens,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    name = model_name(model)
    scores = embedder_scores(embedder, data, batch_size=batch_size, progress=True)
    measured = {name: evaluate_retrieval(data, scores, **how), **measured, "chance": chance_levels(data, sizes)}
    _print_retrieval(measured, f"{len(data.queries):,} queries, {len(data.documents):,} documents")
    settings = {"split": split, "pooling": pooling, "max_tokens": embedder.max_seq_length}
    settings |= {"prompts": dict(embedder.prompts), "batch_size": batch_size, "pools": sizes, "seed": seed}
    settings |= {"revision": revision, "trust_remote_code": trust_remote_code}
    found = {"queries": len(data.queries), "documents": len(data.documents), "systems": measured}
    write_report(output, "retrieval", {"model": name, "folder": folder.resolve().name, **settings}, found)


@evaluate.command("lm-eval", cls=ComputingCommand)
def lm_eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Tasks, groups or patterns, e.g. arc_easy,lambada*.")
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            metavar="FOLDER",
            help="Folder with tasks of your own in YAML. Python functions that they name are run.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples before every question, instead of the task's number.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first documents of every task.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in one forward pass.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", help="Tokens of a text at most; by default those of the model or tokenizer, or else 2,048."
        ),
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    output: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model.

    Built-in tasks load their data from the Hub; tasks of your own can use local files. Needs lm-eval.
    """
    check_output(output, "lm-eval", overwrite)
    from ..evaluation.lm_eval_tasks import check_lm_eval_numbers, evaluate_lm_eval_tasks, find_lm_eval_tasks

    names = [name.strip() for name in tasks.split(",")]
    settings: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    check_lm_eval_numbers(**settings)
    source = model_source(model, revision)
    manager = find_lm_eval_tasks(names, include_path)
    import torch
    from transformers import AutoModelForCausalLM

    from ..conversion.load_model import load_model, load_tokenizer

    loading: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(source, **loading)
    loaded: Any = load_model(source, AutoModelForCausalLM, dtype=dtype, **loading)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    found = evaluate_lm_eval_tasks(loaded, tokenizer, names, task_manager=manager, seed=seed, **settings)
    _print_lm_eval(found["results"])
    folder = None if include_path is None else include_path.resolve().name
    described = {"model": model_name(model), "tasks": names, "include_path": folder, "dtype": dtype, "seed": seed}
    described |= {"revision": revision, "trust_remote_code": trust_remote_code}
    write_report(output, "lm-eval", {**described, **settings}, found)


@evaluate.command("inversion", cls=ComputingCommand)
def inversion(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A .txt file, whose beginning is cut into texts.")],
    revision: Revision = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a text.")] = 64,
    texts: Annotated[int, typer.Option("--texts", help="Number of texts.")] = 8,
    steps: Annotated[int, typer.Option("--steps", help="Steps of gradient descent.")] = 500,
    learning_rate: Annotated[
        str, typer.Option("--learning-rate", metavar="RATES", help="Initial step sizes to try, e.g. 0.02,0.002.")
    ] = "0.02",
    restarts: Annotated[int, typer.Option("--restarts", help="Attempts from different noise.")] = 1,
    initial_std: Annotated[
        str,
        typer.Option(
            "--initial-std",
            metavar="STD",
            help="Standard deviation of the noise; embedding takes that of the embeddings.",
        ),
    ] = "1",
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="BLOCK", help="Block whose output is compared; head compares the input of the LM head."
        ),
    ] = "-1",
    positions: Annotated[
        Literal["all", "last"], typer.Option("--positions", help="Compare all positions, or only the last one.")
    ] = "all",
    reading: Annotated[
        Literal["pinv", "cosine"],
        typer.Option("--reading", help="Read tokens by the pseudo-inverse of the embeddings, or by the angle to them."),
    ] = "pinv",
    top_k: Annotated[int, typer.Option("--top-k", help="Tokens read at a position, one of which has to be right.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    output: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how much of the input is left in a model's hidden states, by searching for inputs that produce them."""
    check_output(output, "inversion", overwrite)
    rates = [_number(rate, "learning_rate", float) for rate in learning_rate.split(",")]
    std = None if initial_std == "embedding" else _number(initial_std, "initial_std", float)
    block: Any = target if target == "head" else _number(target, "target", int)
    for field, value in (("tokens", tokens), ("texts", texts)):
        if value < 1:
            raise ValueError(f"`{field}` must be at least 1, got {value}")
    source = model_source(model, revision)
    import torch
    from transformers import AutoModelForCausalLM

    from ..conversion.load_model import load_model, load_tokenizer
    from ..evaluation.inversion import invert_representation
    from ..harness.text_files import read_text_file

    content = read_text_file(text, "text")
    loading: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    ids: Any = load_tokenizer(source, **loading)(content, verbose=False)["input_ids"]
    if len(ids) < texts * tokens:
        needed = f"{texts * tokens:,} tokens, {texts} times {tokens}"
        raise ValueError(f"text: {text} must have at least {needed}, got {len(ids):,}")
    loaded: Any = load_model(source, AutoModelForCausalLM, dtype=torch.float32, **loading)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {
        "target": block,
        "positions": positions,
        "steps": steps,
        "learning_rate": rates,
        "restarts": restarts,
        "initial_std": std,
        "reading": reading,
        "top_k": top_k,
        "seed": seed,
    }
    windows = torch.tensor(ids[: texts * tokens]).view(texts, tokens)
    found = invert_representation(loaded, windows, **settings, progress=True)
    left = (found.objective / found.initial.clamp(min=1e-30)).median().item()
    typer.echo(
        f"accuracy {found.accuracy:.4f} (modified Hamming metric {found.hamming:.4f}); chance {found.chance:.4f}, "
        f"reading alone {found.readable:.4f}; {left:.2%} of the objective is left (median)"
    )
    numbers: dict[str, Any] = {key: getattr(found, key) for key in ("accuracy", "hamming", "chance", "readable")} | {
        key: getattr(found, key).tolist() for key in ("row_hamming", "objective", "initial", "attempt")
    }
    described = {"model": model_name(model), "text": text.name, "tokens": tokens, "texts": texts, **settings}
    described |= {"revision": revision, "trust_remote_code": trust_remote_code}
    write_report(output, "inversion", described, numbers)


def _number(text: str, field: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"`{field}` must be a number, got {text!r}") from None


def _print_retrieval(measured: dict[str, dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    systems = list(measured.values())
    table = Table(title=title, title_justify="left")
    for heading in ("", *measured):
        table.add_column(heading, justify="right" if heading else "left")
    for key in systems[0]:
        if key != "pools":
            table.add_row(key, *(f"{system[key]:.4f}" for system in systems))
    for pool in zip(*(system["pools"] for system in systems), strict=True):
        cells = [
            f"{one['accuracy']:.4f}" + (f" [{one['low']:.3f}, {one['high']:.3f}]" if "low" in one else "")
            for one in pool
        ]
        table.add_row(f"right among {pool[0]['size']}", *(cell.replace("[", "\\[") for cell in cells))
    Console().print(table)


def _print_lm_eval(results: dict[str, dict[str, Any]]) -> None:
    """Print a table with a row for every metric of every task."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric")
    for heading in ("value", "standard error"):
        table.add_column(heading, justify="right")
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                cells = [f"{cell:.4f}" if isinstance(cell, float) else "" for cell in (value, error)]
                table.add_row(task, metric if kind == "none" else f"{metric} ({kind})", *cells)
    Console().print(table)
