"""Options that the commands which train on text have in common. Where a command gives no default, it is required."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ComputeDtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="Folder of the run. A run with the same settings in it goes on.")
]
Train = Annotated[
    list[str],
    typer.Option("--train", metavar="TEXT", help="Training text: .txt, .jsonl, datasets:PATH,SPLIT; may be repeated."),
]
Heldout = Annotated[
    list[str], typer.Option("--heldout", metavar="TEXT", help="Text that the loss is measured on before and after.")
]
Separator = Annotated[
    str | None,
    typer.Option(
        "--separator", metavar="TEXT", help="What stands between the documents of a .txt file; \\n is a line break."
    ),
]
TextField = Annotated[
    str, typer.Option("--text-field", metavar="NAME", help="Where .jsonl files and data sets hold the text.")
]
Packing = Annotated[
    bool, typer.Option("--packing/--no-packing", help="Several documents in a row, or one padded row for each.")
]
RowTokens = Annotated[int, typer.Option("--row-tokens", help="Most tokens of a row; more are cut.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Rows in one forward, in each process.")]
GradientAccumulation = Annotated[int, typer.Option("--gradient-accumulation", help="Forwards in one optimiser step.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the training text; 1.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps, instead of --epochs.")]
Dtype = Annotated[ComputeDtype, typer.Option("--dtype", help="To compute in; auto is bfloat16 on a GPU that has it.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for one more forward.")
]
CheckpointEvery = Annotated[int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")]
Private = Annotated[bool, typer.Option("--private", help="Only to a private repository.")]


def unescaped(separator: str | None) -> str | None:
    """A separator as the shell gives it, with its line breaks."""
    return None if separator is None else separator.replace("\\n", "\n")
