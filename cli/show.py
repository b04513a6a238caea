"""`ssm-zoo show`: the mixing matrices of a model on a text, as numbers and pictures, beside those of its teacher."""

import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.text_files import check_text, read_text_file
from .evaluation_report import model_name
from .options import Dtype, Revision, TrustRemoteCode
from .sources import model_source

_MOST_TOKENS = 1024


def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a checkpoint, or folder of a run.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text that the model reads, or @FILE with the text.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Folder for pictures, matrices and numbers, new or empty."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="NUMBERS", help="Layers to show, e.g. 0,4-7; by default all.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads", metavar="NUMBERS", help="Heads to show; by default all, or the mean of more than 32 (Mamba-1)."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Compare with this model layer by layer, head by head."),
    ] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Also compute attention rollout through all layers.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TEXT", help="Text that the decoder of an encoder-decoder reads, or @FILE."),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", min=2, max=_MOST_TOKENS, help="Read only the first tokens: a matrix has their square."
        ),
    ] = 64,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show how a model mixes the tokens of a text: attention, or the hidden attention of a mixer without it.

    Prints for every layer how far its heads look back (in tokens), their share on the first token and their entropy;
    beside a teacher also the Jensen-Shannon divergence of the rows in bits and how often both have the same top token.
    With --output, writes pictures (heads x layers), attention.safetensors and attention.json. Signed weights, as those
    of Mamba, enter all numbers by their absolute values.
    """
    texts: dict[str, Any] = {"text": _read(text, "TEXT"), "target": None}
    if target is not None:
        texts["target"] = _read(target, "--target")
    chosen = {"layers": _numbers(layers, "--layers"), "heads": _numbers(heads, "--heads")}
    sources = {"model": model_source(model, revision)} | ({} if teacher is None else {"teacher": model_source(teacher)})
    names = [model_name(each) for each in (model, teacher) if each is not None]
    settings: dict[str, Any] = {
        "model": names[0],
        "teacher": names[1] if teacher is not None else None,
        "revision": revision,
        **{f"{side}_sha256": None if each is None else _sha256(each) for side, each in texts.items()},
        **chosen,
        "rollout": rollout,
        "max_tokens": max_tokens,
        "dtype": dtype,
    }
    commits: dict[str, str | None] = {"model": revision}
    if output is not None:
        from ..evaluation.attention_folder import check_attention_folder

        commits = _commits(sources, revision, output)
        settings["sources"] = _fingerprints(sources, commits)
        check_attention_folder(output, settings)

    from transformers.utils import logging

    from ..evaluation.attention_model import TextReader
    from ..evaluation.attention_report import check_same_layers, describe_stack, rollouts, token_texts
    from ..reports.attention_text import rollout_line, stack_lines

    logging.disable_progress_bar()
    reader = TextReader(
        texts["text"], texts["target"], max_tokens=max_tokens, dtype=dtype, trust_remote_code=trust_remote_code
    )
    stacks = [reader.read(sources["model"], field="MODEL", revision=commits["model"], **chosen)]
    if teacher is not None:
        stacks.append(reader.read(sources["teacher"], field="--teacher", revision=commits.get("teacher"), **chosen))
        check_same_layers(*stacks)
    tokens = {side: token_texts(reader.tokenizer, ids) for side, ids in reader.ids.items()}
    described = [describe_stack(*pair) for pair in zip(*stacks, strict=True)]
    flows = [rollouts(each, field) for each, field in zip(stacks, ("MODEL", "--teacher"), strict=False) if rollout]

    typer.echo(_heading(names, len(tokens["source"]), reader.text_tokens))
    for stack in described:
        typer.echo("\n".join(["", *stack_lines(stack)]))
    for name, flow in zip(names, flows, strict=False):
        typer.echo(f"\n{rollout_line(flow[-1].tolist(), [token['text'] for token in tokens['source']], name)}")
    if output is not None:
        from ..evaluation.attention_folder import write_attention

        last = dict(zip(sources, (flow[-1].tolist() for flow in flows), strict=False))
        report = {
            "settings": settings,
            "tokens": tokens,
            "text_tokens": reader.text_tokens,
            "stacks": described,
            "rollout_of_the_last_token": last or None,
        }
        write_attention(output, report, names, stacks, flows)
        typer.echo(f"\npictures, matrices and numbers: {output}")


def _read(text: str, field: str) -> str:
    """Return a text of the command line, or the content of @FILE."""
    found = read_text_file(text[1:], field) if text.startswith("@") else text
    check_text(found, field)
    if not found.strip():
        raise ValueError(f"{field} must not be empty.")
    return found


def _numbers(text: str | None, option: str) -> list[int] | None:
    """Return the numbers of e.g. "0,4-7", each once, in order."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        ends = () if match is None else (int(match[1]), int(match[2] or match[1]))
        if not ends or ends[1] < ends[0]:
            raise ValueError(f"{option} must be numbers and ranges like 0,4-7, got {text!r}.")
        found.update(range(ends[0], ends[1] + 1))
    return sorted(found)


def _heading(names: list[str], read: int, total: int) -> str:
    part = f"{read:,} tokens" if read == total else f"the first {read:,} of {total:,} tokens (--max-tokens)"
    beside = "" if len(names) == 1 else f", beside {names[1]} (behind the slash)"
    return (
        f"{names[0]} on {part}{beside}; means over heads and queries, of absolute weights\n"
        "distance: tokens between query and key; first: share on the first token; "
        f"entropy: nats, at most {math.log(read):.2f}"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _commits(sources: dict[str, str], revision: str | None, output: Path) -> dict[str, str | None]:
    """Return the commit of each Hub id; None for a folder."""
    from ..harness.fingerprint import pinned_revision

    given = {"model": revision}
    return {name: pinned_revision(source, given.get(name), output, name) for name, source in sources.items()}


def _fingerprints(sources: dict[str, str], commits: dict[str, str | None]) -> dict[str, dict[str, str]]:
    """Return what distinguishes the models from others of the same name, without their paths."""
    from ..harness.fingerprint import fingerprint

    found = {name: fingerprint(source, commits[name]) for name, source in sources.items()}
    return {name: {key: each[key] for key in each if key != "source"} for name, each in found.items()}
