"""`ssm-zoo evaluate length`: measure a model on a long text by position."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .evaluation_report import Overwrite, Report, check_output, check_picture, model_name, write_report
from .options import Dtype, Revision, TrustRemoteCode
from .sources import model_source


def length(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A .txt file, whose beginning is read.")],
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens of a window; by default all tokens of the text.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Windows to read, each from an empty cache.")] = 1,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of one forward.")] = 1024,
    first: Annotated[int, typer.Option("--first", help="End of the first bin of positions; the others double.")] = 128,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model on a long text by position: loss, time and memory.

    The text is read in chunks with a cache, so that memory does not grow with the length where the cache does not.
    With --output a picture of the same name is written beside the report.
    """
    check_output(output, "length", overwrite)
    picture = check_picture(output, overwrite)
    for field, value, least in (
        ("tokens", tokens, 2),
        ("windows", windows, 1),
        ("chunk", chunk, 1),
        ("first", first, 2),
    ):
        if value is not None and value < least:
            raise ValueError(f"`{field}` must be at least {least}, got {value}")
    source = model_source(model, revision)
    import torch
    from transformers import AutoModelForCausalLM

    from ..conversion.load_model import load_model, load_tokenizer
    from ..evaluation.long_texts import evaluate_long_texts
    from ..harness.text_files import read_text_file

    content = read_text_file(text, "text")
    loading: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    ids: Any = load_tokenizer(source, **loading)(content, verbose=False)["input_ids"]
    size = len(ids) // windows if tokens is None else tokens
    if size < 2 or len(ids) < windows * size:
        needed = f"{windows * max(size, 2):,} tokens, {windows} times {max(size, 2):,}"
        raise ValueError(f"text: {text} must have at least {needed}, got {len(ids):,}")
    loaded: Any = load_model(source, AutoModelForCausalLM, dtype=dtype, **loading)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = evaluate_long_texts(
        loaded, torch.tensor(ids[: windows * size]).view(windows, size), chunk=chunk, first=first
    )
    _print_length(rows)
    settings = {"tokens": size, "windows": windows, "chunk": chunk, "first": first, "dtype": dtype}
    settings |= {"revision": revision, "trust_remote_code": trust_remote_code}
    write_report(output, "length", {"model": model_name(model), "text": text.name, **settings}, {"by_position": rows})
    if picture is not None:
        from ..harness.whole_files import write_whole
        from ..reports.length_plot import draw_length

        figure = draw_length({model_name(model): rows})
        write_whole(picture, lambda temporary: figure.savefig(temporary, format="png"))
        typer.echo(f"picture: {picture}")


def _print_length(rows: list[dict[str, Any]]) -> None:
    """Print a table with a row for every bin of positions."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("positions", "loss", "tokens per second", "cache, MiB", "memory, MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = [f"{row[key] / 2**20:,.1f}" for key in ("cache_bytes", "memory_bytes")]
        speed = f"{row['read'] / row['seconds']:,.0f}"
        table.add_row(f"{row['start']:,} to {row['end'] - 1:,}", f"{row['loss']:.4f}", speed, *sizes)
    Console().print(table)
