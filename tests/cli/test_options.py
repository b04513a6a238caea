"""Options generated from settings: every option of earlier releases is there, with its default and a help text."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.cli.options import with_settings
from ssm_zoo.harness.settings import Option, SettingsBase

# Command to option to default, as released. Add to it what becomes public; nothing may go.
RELEASED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "released_options.json").read_text())


class Settings(SettingsBase):
    """Settings of every sort of option."""

    model: Annotated[str, Option(argument=True, metavar="MODEL")]
    """The model."""
    texts: list[str]
    """The texts."""
    rank: int = 16
    """The rank."""
    steps: int | None = None
    """The steps,
    on two lines."""
    kind: Literal["a", "b"] = "a"
    """The kind."""
    packing: Annotated[bool, Option(negative=True)] = True
    """The packing."""
    merge: bool = False
    """The merge."""
    names: Annotated[list[str], Option(parse=lambda text: text.split(","), metavar="NAMES")] = []
    """The names."""
    rate: Annotated[float, Option(default="0.1 for a, 0.2 for b")]
    """The rate."""
    overrides: Annotated[list[str], Option(name="--set")] = []
    """The overrides."""


def parameters(command: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Return command to option to typer's parameter."""
    found = {path or "ssm-zoo": {"/".join([*each.opts, *each.secondary_opts]): each for each in command.params}}
    for name, below in getattr(command, "commands", {}).items():
        found |= parameters(below, f"{path} {name}".strip())
    return found


@pytest.mark.parametrize("command", RELEASED)
def test_no_released_option_is_lost_or_changes_its_default(command: str) -> None:
    there = parameters(typer.main.get_command(app))[command]
    assert {name: there[name].default for name in RELEASED[command] if name in there} == RELEASED[command]


def test_every_option_of_every_command_has_a_help_text() -> None:
    for command, options in parameters(typer.main.get_command(app)).items():
        for name, parameter in options.items():
            assert parameter.help, f"{command} {name}"


@pytest.fixture
def typed() -> Any:
    """Run a command with the settings; what it was given comes back."""
    program, given = typer.Typer(rich_markup_mode=None), []

    @program.command()
    @with_settings(Settings)
    def command(
        values: dict[str, Any], output: Annotated[Path, typer.Argument(help="The output.")], private: bool = False
    ) -> None:
        given.append((values, output, private))

    def run(*arguments: str) -> Any:
        given.clear()
        result = CliRunner().invoke(program, list(arguments))
        return given[0] if given else result

    return run


def test_a_command_gets_what_was_typed_and_nothing_else(typed: Any) -> None:
    assert typed("m", "out", "--texts", "a", "--texts", "b") == (
        {"model": "m", "texts": ["a", "b"]},
        Path("out"),
        False,
    )
    line = "m out --texts a --rank 16 --steps 3 --kind b --no-packing --merge --names x,y --rate 2 --set k=v --private"
    values, _, private = typed(*line.split())
    assert private
    assert values == {
        "model": "m",
        "texts": ["a"],
        "rank": 16,
        "steps": 3,
        "kind": "b",
        "packing": False,
        "merge": True,
        "names": ["x", "y"],
        "rate": 2.0,
        "overrides": ["k=v"],
    }


@pytest.mark.parametrize("line", ["m out", "m --texts a", "m out --texts a --kind c", "m out --texts a --rank x"])
def test_what_the_settings_cannot_hold_is_refused(typed: Any, line: str) -> None:
    assert typed(*line.split()).exit_code == 2


def test_help_is_the_docstring_and_the_default(typed: Any) -> None:
    text = " ".join(typed("--help").stdout.replace("│", " ").split())
    for part in ("The steps, on two lines.", "The rank.", "16", "0.1 for a, 0.2 for b", "--set", "--no-packing"):
        assert part in text
