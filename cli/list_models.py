"""`ssm-zoo list`: the models of the zoo."""

import json
from dataclasses import asdict
from typing import Annotated

import typer


def list_models(
    pattern: Annotated[
        str,
        typer.Argument(metavar="PATTERN", help="Part of the names, e.g. mamba2, or a shell pattern, e.g. 'mamba2-*'."),
    ] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the models of the zoo: sizes, sources, loaders.

    Lists the models that can be built by name, then the families that have no named sizes: the number of parameters,
    the libraries whose checkpoints `ssm-zoo convert` reads, and the classes of transformers that load it.
    `ssm-zoo train NAME` trains one from scratch. Cards of models that `ssm-zoo reproduce` trains again come last.
    """
    from ..conversion.catalogue import list_models as find
    from ..conversion.catalogue import matches
    from .reproduce import cards

    found = find(pattern)
    reproducible = [name for name in cards() if matches(name, pattern)]
    if not found and not reproducible:
        raise ValueError(f"PATTERN: no model has a name like {pattern!r}. `ssm-zoo list` without PATTERN lists all.")
    if as_json:
        typer.echo(json.dumps({"models": [asdict(each) for each in found], "cards": reproducible}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "family", "parameters", "converted from", "loaded by")
    table.columns[2].justify = "right"
    for each in found:
        loaders = [name.removeprefix("AutoModelFor") for name in each.loaded_by if name != "AutoModel"]
        table.add_row(
            each.name,
            each.model_type,
            "any" if each.parameters is None else f"{each.parameters:,}",
            ", ".join(each.sources) or "-",
            f"AutoModel{', …For' if loaders else ''}{', …For'.join(loaders)}",
        )
    if found:
        Console().print(table)
    for name in reproducible:
        typer.echo(f"ssm-zoo reproduce {name}: trains the model of model_cards/{name}.md again")
