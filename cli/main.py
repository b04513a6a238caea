"""The `ssm-zoo` command: one sub-command per verb, each a thin layer over the package.

A command imports torch and transformers only when it runs, so that --help and mistakes in the command line are fast.
"""

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from .computing import ComputingCommand
from .convert import convert
from .distill import distill
from .errors import ReportingGroup
from .evaluate import evaluate
from .finetune import finetune
from .generate import generate
from .list_models import list_models
from .options import Revision, TrustRemoteCode
from .push import push
from .report import report
from .reproduce import reproduce
from .select import select
from .show import show
from .sources import model_source, student_folder
from .train import train

app = typer.Typer(
    cls=ReportingGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ssm-zoo {importlib.metadata.version('ssm-zoo')}")
        raise typer.Exit


@app.callback()
def ssm_zoo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
) -> None:
    """Distil, train, finetune, evaluate, convert and publish sub-quadratic sequence models."""


app.command(cls=ComputingCommand)(distill)
app.command(cls=ComputingCommand)(select)
app.command(cls=ComputingCommand)(train)
app.add_typer(finetune, name="finetune")
app.add_typer(evaluate, name="evaluate")


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a checkpoint, or folder of a run.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder to write to.")],
    revision: Revision = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the result without ssm-zoo and compare the logits.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a self-contained folder that loads without ssm-zoo.

    The model's code is that of the installed ssm-zoo. Tokenizer, licence, card and plots are copied, and the modules
    of an embedder or reranker. Code in SRC is neither run nor copied, except a tokenizer's with --trust-remote-code.
    """
    from transformers.utils import logging

    from ..conversion.export import export as write

    logging.disable_progress_bar()
    written = write(
        model_source(source, revision), folder, revision=revision, verify=verify, trust_remote_code=trust_remote_code
    )
    proven = "loads without ssm-zoo and gives the same logits, bit for bit" if verify else "not verified"
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in written.glob("*.py")]
    typer.echo(f"{written}: {proven}; code: {len(lengths)} files, {sum(lengths):,} lines")


@app.command()
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a finished distillation.")],
    repo_id: Annotated[
        str | None, typer.Option("--repo-id", metavar="ID", help="Hub id that the card's example loads.")
    ] = None,
) -> None:
    """Rewrite a student's model card from its run's report."""
    student = student_folder(run)
    from ..distill.run import read_report
    from ..reports.distillation_card import write_card

    write_card(student, read_report(run), repo_id=repo_id)
    typer.echo(student / "README.md")


app.command()(report)
app.command()(convert)
app.command(cls=ComputingCommand)(generate)
app.command()(show)
app.command()(push)
app.command("list")(list_models)
app.command()(reproduce)

if __name__ == "__main__":
    app(prog_name="ssm-zoo")
