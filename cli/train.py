"""`ssm-zoo train`: train a model of the zoo from scratch."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.command_line import command_line, process_number
from .loading_options import TrustRemoteCode
from .push import announce, check_push_target, push_folder
from .run_folder import model_folder, model_source
from .training_options import (
    BatchSize,
    CheckpointEvery,
    ComputeDtype,
    Dtype,
    Epochs,
    GradientAccumulation,
    GradientCheckpointing,
    Heldout,
    Output,
    Packing,
    Private,
    RowTokens,
    Separator,
    Steps,
    TextField,
    Train,
    unescaped,
)


class Recipe(StrEnum):
    MAMBA = "mamba"
    TAIPAN = "taipan"


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="Name of a preset (mamba-130m say), .yaml or .json file with model_type and configuration keys, or "
            "folder or Hub id of a zoo model, whose sizes are taken.",
        ),
    ],
    output: Output,
    train: Train,
    heldout: Heldout,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="TOKENIZER", help="Folder or Hub id; or bytes, whose tokens are bytes."),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            "--train-tokenizer", metavar="N", help="Learn a byte-level BPE of N entries on the training text instead."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a configuration key: hidden_size=256 say."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit, where CONFIG is a Hub id."),
    ] = None,
    recipe: Annotated[
        Recipe, typer.Option("--recipe", help="Whose optimiser and schedule, where the options below give nothing.")
    ] = Recipe.MAMBA,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak; mamba 3e-3 (for 130M), taipan 5e-4.")
    ] = None,
    final_learning_rate: Annotated[
        float | None, typer.Option("--final-learning-rate", help="That the cosine ends at; both 1e-5.")
    ] = None,
    warmup: Annotated[
        str | None,
        typer.Option(
            "--warmup",
            metavar="N|SHARE",
            help="Steps in which the rate rises, or their share; mamba 0.05, taipan 2000.",
        ),
    ] = None,
    betas: Annotated[
        str | None, typer.Option("--betas", metavar="B1,B2", help="Of AdamW; mamba 0.9,0.95, taipan 0.9,0.999.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Of the matrices; mamba 0.1, taipan 0.01.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="Gradients are scaled down to it; both 1.")
    ] = None,
    separator: Separator = None,
    text_field: TextField = "text",
    packing: Packing = True,
    row_tokens: RowTokens = 1024,
    batch_size: BatchSize = 4,
    gradient_accumulation: GradientAccumulation = 1,
    epochs: Epochs = None,
    steps: Steps = None,
    dtype: Dtype = ComputeDtype.AUTO,
    gradient_checkpointing: GradientCheckpointing = False,
    seed: Annotated[int, typer.Option("--seed", help="Of initial weights and order.")] = 0,
    evaluate_every: Annotated[
        int | None, typer.Option("--evaluate-every", help="Steps between held-out losses on the way; without it none.")
    ] = None,
    checkpoint_every: CheckpointEvery = 200,
    trust_remote_code: TrustRemoteCode = False,
    repo: Annotated[str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the model.")] = None,
    private: Private = False,
) -> None:
    """Train a language model from scratch on text. Measures the held-out loss before and after.

    The vocabulary's size and the special ids are the tokenizer's. Weights are float32. Given again, the same command
    goes on at the last checkpoint.

    Several processes: accelerate launch -m ssm_zoo.cli.main train CONFIG OUTPUT ...
    """
    from ..training.from_scratch_settings import parse_from_scratch

    given: dict[str, Any] = {
        "learning_rate": learning_rate,
        "final_learning_rate": final_learning_rate,
        "warmup": None if warmup is None else _number(warmup),
        "betas": None if betas is None else [_number(beta) for beta in betas.split(",")],
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "epochs": epochs,
    }
    settings = parse_from_scratch(
        {
            "config": str(model_folder(Path(config))) if Path(config).is_dir() else config,
            "revision": revision,
            "overrides": overrides or [],
            "tokenizer": None if tokenizer is None else model_source(tokenizer),
            "train_tokenizer": train_tokenizer,
            "recipe": recipe.value,
            **{name: value for name, value in given.items() if value is not None},
            "train": train,
            "heldout": heldout,
            "separator": unescaped(separator),
            "text_field": text_field,
            "packing": packing,
            "row_tokens": row_tokens,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "steps": steps,
            "dtype": dtype.value,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed,
            "evaluate_every": evaluate_every,
            "checkpoint_every": checkpoint_every,
            "trust_remote_code": trust_remote_code,
        }
    )
    if private and repo is None:
        raise ValueError("--private: accepted with --push-to-hub only")
    if repo is not None:
        check_push_target(repo, private=private)
    from ..training.from_scratch import train_from_scratch

    report = train_from_scratch(settings, output, command=command_line(sys.argv[1:]))
    if process_number():  # of several processes the first one speaks
        return
    folder, losses = output / "model", [evaluation["loss"] for evaluation in report["evaluations"]]
    typer.echo(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    typer.echo(f"report: {output / 'report.json'}   model: {folder}")
    if repo is not None:
        from ..reports.from_scratch_card import write_from_scratch_card

        write_from_scratch_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


def _number(text: str) -> int | float | str:
    """A whole number, a number with a point, or the text, for the settings to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
