"""`ssm-zoo finetune embed`: make an embedder of a model of the zoo."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from ..harness.command_line import process_number
from .finetuning_options import (
    AfterWarmup,
    Alpha,
    Dora,
    Dropout,
    HowTrained,
    MaxGradNorm,
    Method,
    Rank,
    Revision,
    Schedule,
    Seed,
    TargetModules,
    Warmup,
    WeightDecay,
    targets,
)
from .loading_options import TrustRemoteCode
from .push import announce, check_push_target, push_folder
from .run_folder import model_source
from .training_options import (
    CheckpointEvery,
    ComputeDtype,
    Dtype,
    Epochs,
    GradientCheckpointing,
    Output,
    Private,
    Steps,
)


class Pooling(StrEnum):
    LAST = "last"
    MEAN = "mean"


def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a zoo model, or folder of a run.")],
    output: Output,
    train: Annotated[
        list[str],
        typer.Option(
            "--train", metavar="PAIRS", help="To train on: .jsonl, .csv, .tsv, datasets:PATH,SPLIT; may be repeated."
        ),
    ],
    heldout: Annotated[
        list[str],
        typer.Option("--heldout", metavar="PAIRS", help="Pairs that retrieval is measured on before and after."),
    ],
    anchor: Annotated[str, typer.Option("--anchor", metavar="COLUMN", help="Of the texts to search with.")] = "anchor",
    positive: Annotated[
        str, typer.Option("--positive", metavar="COLUMN", help="Of what they should find.")
    ] = "positive",
    negatives: Annotated[
        str | None,
        typer.Option("--negatives", metavar="COLUMNS", help="Of what they should not find: negative_1,negative_2 say."),
    ] = None,
    revision: Revision = None,
    pooling: Annotated[
        Pooling, typer.Option("--pooling", help="A text's embedding: its last token's state, or the mean.")
    ] = Pooling.LAST,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longer texts are cut.")] = 512,
    query_prompt: Annotated[str, typer.Option("--query-prompt", metavar="TEXT", help="Put before every anchor.")] = "",
    document_prompt: Annotated[
        str, typer.Option("--document-prompt", metavar="TEXT", help="Put before every positive and negative.")
    ] = "",
    temperature: Annotated[float, typer.Option("--temperature", help="Cosines are divided by it in the loss.")] = 0.02,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Search for the anchor by the positive, too.")] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Pairs in a step, in each process: the more, the more negatives.")
    ] = 32,
    mini_batch_size: Annotated[
        int | None,
        typer.Option("--mini-batch-size", help="Texts in one forward, where a batch does not fit (GradCache)."),
    ] = None,
    method: HowTrained = Method.LORA,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    dropout: Dropout = 0.0,
    dora: Dora = False,
    target_modules: TargetModules = "all-linear",
    epochs: Epochs = None,
    steps: Steps = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak; 2e-4 for adapters, 1e-4 for all weights.")
    ] = None,
    schedule: AfterWarmup = Schedule.COSINE,
    warmup: Warmup = 0.05,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    dtype: Dtype = ComputeDtype.AUTO,
    gradient_checkpointing: GradientCheckpointing = False,
    seed: Seed = 0,
    pool_size: Annotated[
        int, typer.Option("--pool-size", help="Candidates, one of them right, of the held-out accuracy.")
    ] = 32,
    checkpoint_every: CheckpointEvery = 200,
    trust_remote_code: TrustRemoteCode = False,
    repo: Annotated[str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the embedder.")] = None,
    private: Private = False,
) -> None:
    """Finetune to embed texts, by InfoNCE on pairs of texts that belong together.

    Needs sentence-transformers, the extra "embed", which loads the result. Measures retrieval from the held-out texts
    before and after. Given again, the same command goes on at the last checkpoint.
    """
    from ..training.embedder_settings import parse_embedder_settings

    values: dict[str, Any] = {
        "model": model_source(model),
        "revision": revision,
        "train": train,
        "heldout": heldout,
        "anchor": anchor,
        "positive": positive,
        "negatives": negatives.split(",") if negatives else [],
        "pooling": pooling.value,
        "max_tokens": max_tokens,
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "temperature": temperature,
        "symmetric": symmetric,
        "batch_size": batch_size,
        "mini_batch_size": mini_batch_size,
        "method": method.value,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "dora": dora,
        "target_modules": targets(target_modules),
        "steps": steps,
        "learning_rate": learning_rate,
        "schedule": schedule.value,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "dtype": dtype.value,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
        "pool_size": pool_size,
        "checkpoint_every": checkpoint_every,
        "trust_remote_code": trust_remote_code,
        **({} if epochs is None else {"epochs": epochs}),
    }
    settings = parse_embedder_settings(values)
    if private and repo is None:
        raise ValueError("--private: accepted with --push-to-hub only")
    if repo is not None:
        check_push_target(repo, private=private)
    from ..training.embedder import finetune_embedder

    report = finetune_embedder(settings, output)
    if process_number():  # of several processes the first one speaks
        return
    folder, (before, after) = output / "model", report["evaluations"]
    typer.echo(f"held-out nDCG@10: {before['ndcg@10']:.4f} before, {after['ndcg@10']:.4f} after")
    typer.echo(f"report: {output / 'report.json'}   model: {folder}")
    if repo is not None:
        from ..reports.embedder_card import write_embedder_card

        write_embedder_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))
