"""The option by which code that a source brings is run or copied; without it, no command does either, and none asks."""

from typing import Annotated

import typer

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run or copy the code that a model or its tokenizer brings along. The zoo's need none.",
    ),
]
