"""`ssm-zoo convert`: convert checkpoints of other libraries to the zoo's and back."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Revision, TrustRemoteCode
from .sources import model_source


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a checkpoint, or folder of a run.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder to write to.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="zoo, transformers, state-spaces, cartesia, maskedmixers, torchscale or fla. By default zoo, or "
            "transformers if SRC is a zoo checkpoint.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16. By default that of SRC."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pytorch_model.bin or its shards; only tensors are loaded, no code."),
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
    revision: Revision = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            "--strip-prefix",
            metavar="PREFIX",
            help="Remove PREFIX from the keys that begin with it. Prefixes of known wrappers are removed without it.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Load both models in float32 and compare their logits."),
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a checkpoint between the zoo and other libraries.

    Reads transformers' mamba, mamba2, falcon_mamba, bamba, jamba and the decoders that can be teachers (llama, mistral,
    qwen, phi, gemma, gpt and others); state-spaces' Mamba and Mamba-2; Cartesia's llamba; RetNet of torchscale
    and flash-linear-attention; masked, Toeplitz and recurrent mixers; and the zoo's own.

    Prints what was read and written, and the largest difference between the logits of both sides. OUT is written whole
    or not at all. A setting that the target cannot express is refused by name. No code in SRC is run; its tokenizer's
    is copied only with --trust-remote-code.
    """
    from transformers.utils import logging

    from ..conversion.convert import convert as write

    logging.disable_progress_bar()
    report = write(
        model_source(source, revision),
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
