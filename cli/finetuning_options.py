"""Options that the commands which finetune a model have in common."""

from enum import StrEnum
from typing import Annotated

import typer


class Method(StrEnum):
    LORA = "lora"
    FULL = "full"


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit, for a Hub id.")
]
HowTrained = Annotated[Method, typer.Option("--method", help="Adapters, or all weights.")]
Rank = Annotated[int, typer.Option("--rank", help="Rank of the adapters.")]
Alpha = Annotated[float, typer.Option("--alpha", help="Adapters are scaled by alpha / rank.")]
Dropout = Annotated[float, typer.Option("--dropout", help="Share of the adapters' inputs dropped.")]
Dora = Annotated[bool, typer.Option("--dora", help="Weight-decomposed adapters.")]
TargetModules = Annotated[
    str,
    typer.Option(
        "--target-modules", metavar="NAMES", help="Layers with adapters: all-linear, or in_proj,out_proj say."
    ),
]
AfterWarmup = Annotated[Schedule, typer.Option("--schedule", help="What follows the warm-up.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps in which the rate rises.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Of the matrices.")]
MaxGradNorm = Annotated[float, typer.Option("--max-grad-norm", help="Gradients are scaled down to it.")]
Seed = Annotated[int, typer.Option("--seed", help="Of initial adapters, order and dropout.")]


def targets(names: str) -> str | list[str]:
    """What `--target-modules` names, as the settings want it."""
    return names if names == "all-linear" else names.split(",")
