"""The program that `make kernel-package` runs: the kernels as a repository for the Kernel Hub.

python -m ssm_zoo.cli.kernel_package FOLDER
"""

from pathlib import Path
from typing import Annotated

import typer

from .errors import ReportingCommand

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=ReportingCommand)
def kernel_package(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to write to: new, empty, or an unchanged kernel package.")
    ],
    repo_id: Annotated[
        str | None, typer.Option("--repo-id", metavar="ID", help="Hub id that the card and build.toml name.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: check that the package in FOLDER is whole and unchanged.")
    ] = False,
) -> None:
    """Write the kernels as a repository that Hugging Face's package `kernels` loads, without ssm-zoo."""
    from ..conversion.kernel_package import BACKENDS, EXPORTS, VERSION, check_kernel_package, write_kernel_package

    if check:
        if repo_id is not None:
            raise ValueError(f"--repo-id has no effect with --check, got {repo_id}")
        check_kernel_package(folder)
        typer.echo(f"{folder}: a whole kernel package")
        return
    write_kernel_package(folder, repo_id=repo_id)
    names = sum(map(len, EXPORTS.values()))
    typer.echo(f"{folder}: version {VERSION} for {' and '.join(BACKENDS)}, {names} functions and classes")


if __name__ == "__main__":
    app()
