"""`ssm-zoo finetune`: train a model of the zoo further."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.command_line import process_number
from .finetune_embed import embed
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

finetune = typer.Typer(no_args_is_help=True, help="Train a model of the zoo further, by adapters or as a whole.")


@finetune.callback()
def group() -> None:
    """Train a model of the zoo further, by adapters or as a whole."""


@finetune.command("lm")
def language_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a zoo model, or folder of a run.")],
    output: Output,
    train: Train,
    heldout: Heldout,
    revision: Revision = None,
    separator: Separator = None,
    text_field: TextField = "text",
    method: HowTrained = Method.LORA,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    dropout: Dropout = 0.0,
    dora: Dora = False,
    target_modules: TargetModules = "all-linear",
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Keep the base in 4 bits (QLoRA); needs bitsandbytes.")
    ] = False,
    packing: Packing = True,
    row_tokens: RowTokens = 1024,
    batch_size: BatchSize = 4,
    gradient_accumulation: GradientAccumulation = 1,
    epochs: Epochs = None,
    steps: Steps = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak; 2e-4 for adapters, 5e-5 for all weights.")
    ] = None,
    schedule: AfterWarmup = Schedule.COSINE,
    warmup: Warmup = 0.05,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    dtype: Dtype = ComputeDtype.AUTO,
    gradient_checkpointing: GradientCheckpointing = False,
    seed: Seed = 0,
    checkpoint_every: CheckpointEvery = 200,
    trust_remote_code: TrustRemoteCode = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write the model with the adapter in its weights.")
    ] = False,
    repo: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", metavar="REPO", help="Upload the adapter; the model, if merged or trained as a whole."
        ),
    ] = None,
    private: Private = False,
) -> None:
    """Finetune on text as a language model. Measures the held-out loss before and after."""
    from ..training.settings import parse_settings

    values: dict[str, Any] = {
        "model": model_source(model),
        "revision": revision,
        "train": train,
        "heldout": heldout,
        "separator": unescaped(separator),
        "text_field": text_field,
        "method": method.value,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "dora": dora,
        "target_modules": targets(target_modules),
        "load_in_4bit": load_in_4bit,
        "packing": packing,
        "row_tokens": row_tokens,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "steps": steps,
        "learning_rate": learning_rate,
        "schedule": schedule.value,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "dtype": dtype.value,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "trust_remote_code": trust_remote_code,
        **({} if epochs is None else {"epochs": epochs}),
    }
    settings = parse_settings(values)
    whole = merge or settings.method == "full"
    if private and repo is None:
        raise ValueError("--private: accepted with --push-to-hub only")
    if repo is not None:
        if not whole and Path(settings.model).is_dir():
            raise ValueError(
                f"--push-to-hub: the adapter's base is the folder {settings.model}, which others do not have; push the "
                "base first and name its Hub id, or push the merged model with --merge"
            )
        check_push_target(repo, private=private)
    from ..training.language_model import finetune_language_model

    report = finetune_language_model(settings, output, merge=merge)
    if process_number():  # of several processes the first one speaks
        return
    folder = output / ("model" if whole else "adapter")
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    typer.echo(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    typer.echo(f"report: {output / 'report.json'}   {folder.name}: {folder}")
    if repo is not None:
        from ..reports.training_card import write_card

        write_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


finetune.command("embed")(embed)
