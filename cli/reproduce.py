"""`ssm-zoo reproduce`: train the model of a card again, and compare the numbers.

The front matter of a card in model_cards/ has the command that makes the model, and the numbers that it gives:

    reproduce:
      command: [train, mamba2-130m, OUTPUT, --train, 'builtin:wikitext2', ...]
      numbers:
        evaluations.-1.loss: {value: 4.1234, tolerance: 0.02}

A number is found in the run's report.json by its dotted path. OUTPUT stands for the folder of the run, and SMOLLM2 for
the teacher of the demonstration, which is fetched from PyPI.
"""

import difflib
import math
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import Field

from ..harness.settings import SettingsBase, check

_FOLDERS = ("model", "student")


class Number(SettingsBase):
    """One number of a card."""

    value: float
    """Value of the card's run."""
    tolerance: Annotated[float, Field(ge=0)]
    """Largest accepted difference."""


class Reproduction(SettingsBase):
    """The front matter's `reproduce`."""

    command: Annotated[list[str], Field(min_length=2)]
    """Arguments of `ssm-zoo`."""
    numbers: Annotated[dict[str, Number], Field(min_length=1)]
    """Numbers by their dotted paths in the report."""


def cards() -> dict[str, Path]:
    """Return the cards with a command that makes their model, by name."""
    folder = Path(str(resources.files("ssm_zoo.model_cards")))
    found = sorted(folder.glob("*.md"))
    return {path.stem: path for path in found if "\nreproduce:\n" in path.read_text(encoding="utf-8")}


def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a card in model_cards/; see `ssm-zoo list`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Folder of the run, which is resumed.  [default: runs/NAME]"),
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", metavar="FILE", help="Also write the card with the numbers of this run.")
    ] = None,
) -> None:
    """Train the model of a card again and compare numbers.

    Prints a table. The exit status is 1 if a number differs by more than the card's tolerance.
    """
    found = cards()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        suggestion = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"NAME must be the name of a card, got {name!r}. {suggestion}Cards: {', '.join(found)}.")
    if card is not None:
        from ..harness.whole_files import check_output_file

        check_output_file(card, "--card")
    recipe = read_recipe(found[name])
    run = output or Path("runs") / name
    arguments = [_filled(argument, run) for argument in recipe.command]
    typer.echo(f"$ ssm-zoo {' '.join(arguments)}")
    done = subprocess.run([sys.executable, "-P", "-m", "ssm_zoo.cli.main", *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    from ..harness.json_files import read_json_object

    report = read_json_object(run / "report.json")
    measured = {path: number_at(report, path) for path in recipe.numbers}
    same = _print_comparison(name, recipe, measured)
    if card is not None:
        _write_card(card, run, recipe, measured)
    if not same:
        raise typer.Exit(1)


def read_recipe(card: Path) -> Reproduction:
    """Read the command and the numbers of a card.

    Raises:
        ValueError: if the card's front matter has none.
    """
    from ..harness.text_files import front_matter

    return check(Reproduction, front_matter(card).get("reproduce"), f"{card.name}: reproduce")


def number_at(report: dict[str, Any], path: str) -> float:
    """Return the number at a dotted path of a report.

    Raises:
        ValueError: if there is none.
    """
    value: Any = report
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"report.json must have a number at {path!r}, as the card has, got nothing") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"report.json must have a number at {path!r}, got {value!r}")
    return float(value)


def _filled(argument: str, run: Path) -> str:
    if argument == "OUTPUT":
        return str(run)
    if "SMOLLM2" in argument:
        from .demo import demo_teacher

        return argument.replace("SMOLLM2", str(demo_teacher()))
    return argument


def _print_comparison(name: str, recipe: Reproduction, measured: dict[str, float]) -> bool:
    """Print the numbers of the card beside those of the run; return whether they agree."""
    from rich.console import Console
    from rich.table import Column, Table

    number_column = Column("number", no_wrap=True)
    table = Table(number_column, "card", "this run", "difference", "tolerance", "", title=name, title_justify="left")
    same = True
    for path, number in recipe.numbers.items():
        difference = measured[path] - number.value
        agrees = math.isfinite(difference) and abs(difference) <= number.tolerance
        same = same and agrees
        cells = (f"{number.value:,.10g}", f"{measured[path]:,.10g}", f"{difference:+.2g}", f"{number.tolerance:g}")
        table.add_row(path, *cells, "same" if agrees else "differs")
    Console().print(table)
    return same


def _write_card(card: Path, run: Path, recipe: Reproduction, measured: dict[str, float]) -> None:
    """Write the card of the run's model with its recipe and numbers, without the plots, which lie beside the model."""
    from ..harness.text_files import front_matter
    from ..harness.whole_files import write_text_whole

    source = next(run / folder / "README.md" for folder in _FOLDERS if (run / folder / "README.md").is_file())
    numbers = {
        path: {"value": round(measured[path], 6), "tolerance": number.tolerance}
        for path, number in recipe.numbers.items()
    }
    values = {**front_matter(source), "reproduce": {"command": recipe.command, "numbers": numbers}}
    _, _, body = source.read_text(encoding="utf-8").split("---\n", 2)
    lines = [line for line in body.split("\n") if not line.startswith("![")]
    matter = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    card.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(card, f"---\n{matter}---\n" + "\n".join(lines))
    typer.echo(f"card: {card}")
