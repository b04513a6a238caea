"""`ssm-zoo evaluate rerank`: re-rank first-stage lists with rerankers, and compare them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .evaluation_report import Report, check_output, model_name, write_report
from .options import Revision, Seed, TrustRemoteCode
from .sources import model_source


def rerank(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a reranker.")],
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, as in BEIR; FOLDER,SPLIT is the same as "
            "--split.",
        ),
    ],
    split: Annotated[
        str | None, typer.Option("--split", metavar="SPLIT", help="Judgements to use, if there are several.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries", metavar="FILE", help="Only these queries: an id a line. `finetune rerank` writes heldout.txt."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="FILE", help="First-stage lists, a run file in TREC's format; by default BM25's."
        ),
    ] = None,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Documents of each list that are re-ranked.")] = 100,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="SOURCE", help="Another reranker, or a file with its run, to compare; may be repeated."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts in one forward pass.")] = 32,
    resamples: Annotated[int, typer.Option("--resamples", min=1, help="Resamples of the paired tests.")] = 10_000,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", metavar="FOLDER", help="Also write the lists as run files in TREC's format."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the measures (PNG).")] = None,
    output: Report = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files even if they are no earlier results of this command, and run files with the same "
            "names.",
        ),
    ] = False,
) -> None:
    """Measure how well rerankers order the documents that a first stage has found.

    Reports nDCG@10, MRR@10, MAP and recall by ir-measures beside the first stage, with the paired bootstrap interval
    and the randomisation test of every pair of systems on nDCG@10 and MRR@10. Ties are broken as in trec_eval.
    --revision is that of MODEL. Needs sentence-transformers and ir-measures, and bm25s without --run (the extra
    "rerank").
    """
    from ..evaluation.compare_rerankers import compare_rerankers, first_stage_name, new_names
    from ..evaluation.reranking_data import folder_and_split, write_run
    from ..harness.published import decoration

    check_output(output, "rerank", overwrite)
    if plot is not None:
        _check_plot(plot, output, overwrite)
    place, named = folder_and_split(folder)
    if named is not None and split is not None:
        raise ValueError(f"`folder` and --split must not both name the judgements, got {folder!r} and {split!r}.")
    split = split or named
    others = [source if Path(source).is_file() else model_source(source) for source in against or []]
    called = [Path(source).name if Path(source).is_file() else model_name(source) for source in against or []]
    names = new_names([model_name(model), *called])
    sources = dict(zip(names, [model_source(model, revision), *others], strict=True))
    files = {} if runs is None else _run_files(runs, [*names, first_stage_name(run, names)], overwrite)
    found, lists = compare_rerankers(
        sources,
        place,
        split=split,
        only=queries,
        run=run,
        depth=depth,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    _print(found)
    settings = {
        "model": model_name(model),
        "folder": Path(place).resolve().name,
        "split": split,
        "only": None if queries is None else queries.name,
        "run": None if run is None else run.name,
        "depth": depth,
        "against": names[1:],
        "batch_size": batch_size,
        "resamples": resamples,
        "seed": seed,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    write_report(output, "rerank", settings, found)
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_run(lists[name], path, path.stem)
        typer.echo(f"run: {path}")
    if plot is not None:
        with decoration("the plot"):
            from ..reports.reranking_plot import write_reranking_plot

            plot.parent.mkdir(parents=True, exist_ok=True)
            write_reranking_plot({**found, "settings": settings}, plot)
            typer.echo(f"plot: {plot}")


def _run_files(folder: Path, names: Sequence[str], overwrite: bool) -> dict[str, Path]:
    """Return the run file of each system, after checking that all can be written.

    Raises:
        ValueError: naming the file that cannot, or that would be replaced without --overwrite.
    """
    from ..harness.whole_files import check_output_file, check_writable

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--runs: {folder} must be a folder, and it is a file.")
    check_writable(folder, [folder, *folder.absolute().parents], "--runs")
    files: dict[str, Path] = {}
    taken: set[str] = set()
    for name in names:
        word = made = re.sub(r"[^\w.-]+", "_", name)
        number = 1
        # Some file systems do not distinguish upper and lower case.
        while made.casefold() in taken:
            number += 1
            made = f"{word}-{number}"
        taken.add(made.casefold())
        files[name] = folder / f"{made}.trec"
        check_output_file(files[name], "--runs")
        if files[name].exists() and not overwrite:
            raise ValueError(f"--runs: {files[name]} exists. Choose another folder, or replace it with --overwrite.")
    return files


def _check_plot(path: Path, report: Path | None, overwrite: bool) -> None:
    """Check that the picture can be written, is no other file of the command and replaces no file of somebody else.

    Raises:
        ValueError: if it cannot, has another ending than .png, is the report, or exists without an earlier report.
    """
    from ..harness.whole_files import check_output_file

    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot: the picture needs a name that ends in .png, got {path}.")
    if report is not None and path.resolve() == report.resolve():
        raise ValueError(f"--plot: {path} is also the report of --output. Give the picture a name of its own.")
    check_output_file(path, "--plot")
    if path.exists() and not (overwrite or (report is not None and report.exists())):
        raise ValueError(f"--plot: {path} exists. Choose another name, or replace it with --overwrite.")


def _print(found: dict[str, Any]) -> None:
    """Print a table of the measures, and one of the comparisons."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, systems = Console(), found["systems"]
    table = Table(title=f"{found['queries']:,} queries, {found['pairs']:,} pairs", title_justify="left")
    for heading in ("", *systems):
        table.add_column(Text(heading), justify="right" if heading else "left")
    for key in next(iter(systems.values()))["intervals"]:
        table.add_row(key, *(f"{system[key]:.4f}" for system in systems.values()))
    console.print(table)
    if found["without_relevant"]:
        typer.echo(f"queries without a relevant document, left out: {found['without_relevant']:,}")
    for name, system in systems.items():
        if system["without_list"]:
            typer.echo(f"{name}: {system['without_list']:,} queries have no list and count as 0")
        if system.get("cut"):
            limit = "" if system["max_tokens"] is None else f", {system['max_tokens']:,} tokens"
            what = f"longer than what it reads ({system['rule']['rule']}{limit})"
            typer.echo(f"{name}: {system['cut']:.1%} of the pairs are {what}")
    table = Table(title="Paired comparisons", title_justify="left")
    for heading in ("", "measure", "difference", "95 % interval", "p (randomisation)", "p (Holm)"):
        table.add_column(heading, justify="right" if heading not in ("", "measure") else "left")
    for each in found["comparisons"]:
        table.add_row(
            Text(f"{each['first']} - {each['second']}"),
            each["measure"],
            f"{each['difference']:+.4f}",
            Text(f"[{each['low']:+.4f}, {each['high']:+.4f}]"),
            f"{each['p_randomisation']:.4f}",
            f"{each['p_holm']:.4f}",
        )
    console.print(table)
