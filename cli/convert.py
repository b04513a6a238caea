"""`ssm-zoo convert`: checkpoints of other libraries to ours and back."""

from pathlib import Path
from typing import Annotated

import typer

from .loading_options import TrustRemoteCode
from .run_folder import model_source


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a checkpoint, or folder of a run.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder to write to.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="zoo, transformers, state-spaces, cartesia or maskedmixers. If not given: zoo; of a zoo checkpoint, "
            "transformers.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16. If not given: the source's."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pytorch_model.bin or its shards; nothing but tensors is loaded."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds a checkpoint.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set an option that cannot be inferred from tensor shapes (checkpoints without config.json), e.g. "
            "pad_mode=as_trained.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit, for a Hub id.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            "--strip-prefix",
            metavar="PREFIX",
            help="Remove PREFIX from the keys that begin with it. Those that a wrapper left are found without it.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Load both models, in float32, and compare their logits."),
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a checkpoint: transformers' mamba, mamba2, falcon_mamba, bamba, jamba; state-spaces; llamba; masked,
    Toeplitz and recurrent mixers; the zoo's.

    Prints what was read and written, and how far the logits of both sides are apart. OUT appears whole or not at
    all. What the other side cannot express is refused by the name of its field. No code of SRC is run; that of its
    tokenizer is copied with --trust-remote-code only.
    """
    from transformers.utils import logging

    from ..conversion.convert import convert as write

    logging.disable_progress_bar()
    report = write(
        model_source(source),
        folder,
        to=to,
        dtype=dtype,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        verify=verify,
        settings=settings or (),
        revision=revision,
        prefix=prefix,
        trust_remote_code=trust_remote_code,
    )
    typer.echo("\n".join([str(folder), *report.lines()]))
