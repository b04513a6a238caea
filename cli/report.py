"""`ssm-zoo report`: compare finished distillations."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

_MARKDOWN, _NUMBERS, _PLOT = "runs.md", "runs.json", "runs.png"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of finished distillations.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Folder to write to, by default report in the current one. An earlier report is replaced.",
        ),
    ] = Path("report"),
) -> None:
    """Compare finished distillations in one table and one picture.

    The runs must have the same teacher and the same held-out text. Prints the table, and writes runs.md (the table),
    runs.png (the picture) and runs.json (the numbers of both) into a folder, whose path it prints: that of --output, or
    report/ in the current folder.
    """
    from ..harness.run_folder import write_json
    from ..harness.whole_files import new_folder, write_text_whole
    from ..reports.runs import KIND, compare_runs, runs_markdown
    from ..reports.runs_plot import draw_runs

    _check_folder(output, KIND)
    found = compare_runs(runs)
    with new_folder(output, overwrite=True) as folder:
        draw_runs(found).savefig(folder / _PLOT, format="png")
        write_text_whole(folder / _MARKDOWN, runs_markdown(found, _PLOT))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / _NUMBERS, {"format": 1, "kind": KIND, "created": created, **found.model_dump(mode="json")})
    typer.echo(runs_markdown(found))
    typer.echo(f"written to {output.absolute()}: {_MARKDOWN}, {_PLOT} and {_NUMBERS}")


def _check_folder(folder: Path, kind: str) -> None:
    """Raise a ValueError unless a folder is new, empty, or holds an earlier report and nothing else."""
    from ..harness.run_folder import read_json_or_none
    from ..harness.whole_files import check_writable

    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--output: {folder} must be a new or empty folder, got a file or link.")
    check_writable(folder, folder.absolute().parents, "--output")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found = read_json_or_none(folder / _NUMBERS) if _NUMBERS in names else None
    ours = isinstance(found, dict) and found.get("kind") == kind and names <= {_MARKDOWN, _NUMBERS, _PLOT}
    if names and not ours:
        raise ValueError(f"--output: {folder} is not empty and holds something other than an earlier report.")
