"""Options that the commands which load a model or a tokenizer have in common."""

from typing import Annotated

import typer

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model or tokenizer brings along. Read it first; models of the zoo need none.",
    ),
]
