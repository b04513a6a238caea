"""The results of `ssm-zoo evaluate` as JSON: checked before anything is measured, written whole."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.processes import command_line

Report = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Also write the results as JSON, with all settings.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace FILE even if it is not an earlier result of this command.")
]


def model_name(model: str) -> str:
    """Return what to call a model: the name of its folder, or its Hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _kind(what: str) -> str:
    """Return the kind of an evaluation's report."""
    return f"ssm-zoo evaluation of {what}"


def check_output(path: Path | None, what: str, overwrite: bool) -> None:
    """Check, before anything is measured, that the report can be written.

    Raises:
        ValueError: if it cannot, or would replace a file that is no earlier report of this kind.
    """
    if path is None:
        return
    from ..harness.run_folder import read_json_or_none
    from ..harness.whole_files import check_output_file

    check_output_file(path, "--output")
    if path.exists() and not overwrite:
        found = read_json_or_none(path)
        if not isinstance(found, dict) or found.get("kind") != _kind(what):
            raise ValueError(
                f"--output: {path} exists and is no earlier {_kind(what)}. Choose another name, or replace it with "
                "--overwrite."
            )


def check_picture(path: Path | None, overwrite: bool) -> Path | None:
    """Return the name of the picture beside a report, after checking that it can be written; without a report, None.

    Raises:
        ValueError: if it cannot, has the report's own name, or would replace a file without an earlier report beside.
    """
    if path is None:
        return None
    from ..harness.whole_files import check_output_file

    picture = path.with_suffix(".png")
    if path.suffix.lower() == ".png":
        raise ValueError(f"--output: the report must not end in .png, the name of its picture, got {path}.")
    check_output_file(picture, "--output")
    if picture.exists() and not (path.exists() or overwrite):
        raise ValueError(
            f"--output: {picture}, the picture's name, exists. Choose another name, or replace it with --overwrite."
        )
    return picture


def write_report(path: Path | None, kind: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Write results with their settings, the command and the machine, and print where; None: nothing is written."""
    if path is None:
        return
    from ..harness.machine import describe_machine
    from ..harness.run_folder import write_json

    report = {
        "format": 1,
        "kind": _kind(kind),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]),
        **describe_machine("sentence-transformers", "bm25s", "ir-measures", "lm-eval", "sacrebleu"),
        "settings": settings,
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    typer.echo(f"report: {path}")
