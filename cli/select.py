"""`ssm-zoo select`: choose the layers that a recipe converts, and the heads that it keeps exact."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..distill.selection_settings import SelectionSettings, parse_selection
from ..harness.processes import command_line
from .options import with_settings
from .sources import limit_waiting


@with_settings(SelectionSettings)
def select(
    values: dict[str, Any],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FOLDER", help="New or empty folder to write to, or one to resume in."),
    ],
) -> None:
    """Choose which layers of a Transformer to convert, by measurements.

    Writes selection.yaml, the part of a recipe with student.layers and student.exact_heads, with its evidence
    (selection.json) and a plot (selection.png) beside it. The same command resumes an interrupted selection.
    """
    settings = parse_selection(values)
    from rich.console import Console

    from ..distill.selection_run import EVIDENCE, FRAGMENT, PLOT
    from ..distill.selection_run import select as run

    limit_waiting()
    report = run(settings, output, command=command_line(sys.argv[1:]))
    _print_scores(report, Console())
    typer.echo(f"convert: --set student.layers={_compact(report['layers'])}")
    if report["exact_heads"]:
        typer.echo(f"keep exact: --set student.exact_heads={_compact(report['exact_heads'])}")
    typer.echo(f"recipe: {output / FRAGMENT}   evidence: {output / EVIDENCE}   plot: {output / PLOT}")


def _compact(value: Any) -> str:
    """Return a list as YAML without spaces, so that a shell takes it for one word."""
    return str(value).replace(" ", "")


def _print_scores(report: dict[str, Any], console: Any) -> None:
    """Print a row for each layer with its score by each method; * marks the layers that the method converts."""
    from rich.table import Table

    table = Table("layer")
    for name in report["methods"]:
        table.add_column(name, justify="right")
    for layer in range(report["teacher"]["num_layers"]):
        cells = []
        for method in report["methods"].values():
            score = next((f"{row['score']:.4f}" for row in method["rows"] if row["layer"] == layer), "")
            cells.append(f"{score} *" if layer in method["layers"] else f"{score}  ")
        table.add_row(str(layer), *cells)
    console.print(table)
    typer.echo("* converted; each method's scores say what the layer's attention is worth")
