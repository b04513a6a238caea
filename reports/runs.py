"""Several distillation runs side by side: which can be compared, their rows, and the table as Markdown.

Runs are comparable if they have the same teacher, held-out text and measurements; students, stages and tokens may
differ. `RunsReport` is the content of `runs.json`, from which table and picture are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..harness.json_files import read_json_object
from ..harness.run_folder import read_json_or_none, recorded_recipe
from .distillation_report import Compared, Measured, Report, parse_report
from .markdown import MISSING, binary_size, code, count, number, percent, short, table
from .results import evaluation_rows

__all__ = ["KIND", "RunsReport", "compare_runs", "read_run", "runs_markdown"]

KIND = "ssm-zoo comparison of runs"
# Differences of a teacher's held-out loss between machines, as a share of it.
_ROUNDING = 1e-3
_SHOWN = ("teacher", "control", "start", "stage")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PositionKL(_Part):
    """Divergence from the teacher of the tokens at positions from `start` to `end` (excluded)."""

    start: int
    end: int
    kl: Measured


class Row(_Part):
    """A model of a run. The fields from `recall` on are those of the comparison at the end, None without it.

    Attributes:
        run: name of the run.
        name: name of the model; of a stage, its name.
        kind: "teacher", "control", "start" or "stage".
        trained_tokens: training tokens until then.
        loss: held-out loss, nats per token.
        gap: difference to the teacher's.
        kl: KL(teacher || model), nats per token.
        top1_agreement: share of tokens with the teacher's likeliest prediction.
        repeat_loss: loss on a passage that was read before.
        recall: accuracy of key-value recall, the mean over the lists that all runs measured.
        by_position: divergences by position, of the bins that all runs measured.
        tokens_per_second: of decoding, at the longest context that all runs measured.
        times_teacher: these, as a multiple of the same run's teacher's.
        cache_bytes: size of the cache there.
    """

    run: str
    name: str
    kind: str
    trained_tokens: int
    loss: Measured
    gap: Measured
    kl: Measured
    top1_agreement: Measured
    repeat_loss: Measured
    recall: float | None = None
    by_position: list[PositionKL] = []
    tokens_per_second: float | None = None
    times_teacher: float | None = None
    cache_bytes: int | None = None


class Run(_Part):
    """A run, with what distinguishes it from the others."""

    name: str
    mixers: dict[str, int]
    trained_tokens: int
    training_seconds: float
    peak_memory_bytes: int
    hardware: str
    created: str
    command: str


class RunsReport(_Part):
    """Runs with the same teacher and held-out text, and the rows of all of them.

    Attributes:
        teacher: source of the teacher.
        heldout: sources of the held-out text.
        predictions: number of scored predictions.
        repeat_distance: tokens between a passage and its repetition.
        recall_lists: pairs and distance of the lists of which `Row.recall` is the mean.
        context: context of speed and cache in tokens; None without any that all runs measured.
        runs: the runs.
        rows: for each run the teacher, the control, the student before training and after each stage.
        notes: sentences on what limits the comparison.
    """

    teacher: str
    heldout: list[str]
    predictions: int
    repeat_distance: int | None
    recall_lists: list[tuple[int, int]]
    context: int | None
    runs: list[Run]
    rows: list[Row]
    notes: list[str]


def read_run(folder: Path) -> Report:
    """Return the report of a finished distillation.

    Raises:
        ValueError: naming the folder, if it is none.
    """
    path = folder / "report.json"
    if not folder.is_dir():
        raise ValueError(f"RUN: there is no folder {folder}.")
    if not path.is_file():
        unfinished = (folder / "run.json").is_file()
        remedy = "has not finished. Resume it with its own command." if unfinished else "is not the folder of a run."
        raise ValueError(f"RUN: {folder} {remedy} (It has no report.json.)")
    values = read_json_object(path)
    if values.get("kind") != "distillation":
        raise ValueError(f"RUN: {folder} must be a finished distillation, got a report of kind {values.get('kind')!r}.")
    try:
        return parse_report(values)
    except ValueError as error:
        raise ValueError(f"RUN: {folder} has a damaged report. {error}") from None


def compare_runs(folders: Sequence[Path]) -> RunsReport:
    """Read finished distillations, check that they can be compared, and return their rows.

    Raises:
        ValueError: if a folder is not a finished distillation, or two differ in teacher, held-out text or measurements.
    """
    names = run_names(folders)
    reports = [read_run(folder) for folder in folders]
    for folder, report in zip(folders[1:], reports[1:], strict=True):
        _refuse_difference(folders[0], reports[0], folder, report)
    places = _Places([report for report in reports if report.comparison is not None])
    first = reports[0]
    return RunsReport(
        teacher=first.teacher.source,
        heldout=first.data.heldout_sources,
        predictions=first.evaluation("teacher").tokens,
        repeat_distance=_evaluation_settings(first).get("repeat_distance"),
        recall_lists=places.recall,
        context=places.context,
        runs=[_run(name, report) for name, report in zip(names, reports, strict=True)],
        rows=[row for name, report in zip(names, reports, strict=True) for row in _rows(name, report, places)],
        notes=_notes(reports),
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: that of its folder or, where two are equal, its path.

    Raises:
        ValueError: if a folder is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise ValueError(f"RUN: {folders[index]} is named twice.")
    names = [folder.name for folder in resolved]
    return [str(folder) if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]


class _Places:
    """Where all runs with a comparison at the end were measured."""

    def __init__(self, reports: Sequence[Report]) -> None:
        teachers = [report.comparison.teacher for report in reports if report.comparison is not None]

        def common(of: Callable[[Compared], list[Any]]) -> list[Any]:
            found = [of(teacher) for teacher in teachers]
            return [place for place in found[0] if all(place in other for other in found)] if found else []

        self.bins = common(lambda model: [(row.start, row.end) for row in model.by_position])
        self.recall = common(lambda model: [(row.pairs, row.distance) for row in model.recall])
        self.context = max(common(lambda model: [row.context for row in model.decoding]), default=None)


def _rows(name: str, report: Report, places: _Places) -> list[Row]:
    last = report.students[-1].name
    compared = {} if report.comparison is None else {model.kind: model for model in report.comparison.models}
    rows = []
    for part in evaluation_rows(report):
        if part.kind not in _SHOWN:
            continue
        model = compared.get(part.kind) if part.kind != "stage" or part.name == last else None
        values = {field: getattr(part, field) for field in Row.model_fields if hasattr(part, field)}
        at_the_end = {} if model is None else _at_the_end(model, compared["teacher"], places)
        rows.append(Row(**{**values, "run": name, **at_the_end}))
    return rows


def _at_the_end(model: Compared, teacher: Compared, places: _Places) -> dict[str, Any]:
    """Return the fields of a row from the comparison at the end of a run."""
    found: dict[str, Any] = {}
    recalls = [row.accuracy for row in model.recall if (row.pairs, row.distance) in places.recall]
    if recalls:
        found["recall"] = sum(recalls) / len(recalls)
    if model.kind != "teacher":
        bins = [row for row in model.by_position if (row.start, row.end) in places.bins]
        found["by_position"] = [PositionKL(start=row.start, end=row.end, kl=row.kl) for row in bins]
    for row, theirs in zip(model.decoding, teacher.decoding, strict=True):
        if row.context == places.context:
            found["tokens_per_second"] = 1 / row.decode_seconds
            found["times_teacher"] = theirs.decode_seconds / row.decode_seconds
            found["cache_bytes"] = row.cache_bytes
    return found


def _run(name: str, report: Report) -> Run:
    mixers = [report.student.mixer_types[layer] for layer in report.student.layers]
    return Run(
        name=name,
        mixers={mixer: mixers.count(mixer) for mixer in dict.fromkeys(mixers)},
        trained_tokens=sum(stage.tokens for stage in report.stages),
        training_seconds=sum(stage.seconds for stage in report.stages),
        peak_memory_bytes=report.peak_memory_bytes,
        hardware=_hardware(report),
        created=report.created,
        command=report.command,
    )


def _hardware(report: Report) -> str:
    hardware = report.hardware
    return hardware.gpu or f"{hardware.cpu or 'unknown CPU'}, {hardware.cores} cores"


def _evaluation_settings(report: Report) -> dict[str, Any]:
    found = report.recipe.get("evaluation")
    return found if isinstance(found, dict) else {}


def _refuse_difference(first: Path, a: Report, other: Path, b: Report) -> None:
    """Raise a ValueError unless two runs have the same teacher, held-out text and measurements.

    The fingerprints that a run records decide, as far as both folders have them.
    """
    checks = [
        ("teacher", a.teacher.source, b.teacher.source),
        *(("teacher's " + part, *pair) for part, pair in _both(_teacher_parts(first), _teacher_parts(other)).items()),
        ("held-out text", a.data.heldout_sources, b.data.heldout_sources),
        ("number of held-out tokens", a.data.heldout_tokens, b.data.heldout_tokens),
        *(("held-out tokens", *pair) for pair in _both(_heldout(first), _heldout(other)).values()),
        *(
            (f"evaluation.{key}", *pair)
            for key, pair in _both(_evaluation_settings(a), _evaluation_settings(b)).items()
            if key in ("tokens", "sequence_length", "repeat_distance")
        ),
        ("number of scored predictions", a.evaluation("teacher").tokens, b.evaluation("teacher").tokens),
    ]
    for what, here, there in checks:
        if here != there:
            raise ValueError(
                f"RUN: {other} cannot be compared with {first}: the {what} must be the same, got {_told(there)} and "
                f"{_told(here)}."
            )
    losses = [report.evaluation("teacher").loss for report in (a, b)]
    same_dtype = a.recipe.get("dtype") == b.recipe.get("dtype")
    if same_dtype and None not in losses and not math.isclose(*losses, rel_tol=_ROUNDING):  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"RUN: {other} cannot be compared with {first}: the teacher's held-out loss must be the same, got "
            f"{number(losses[1])} and {number(losses[0])}. Teacher or held-out text are not the same."
        )


def _both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the pairs of values of the keys that both have."""
    return {key: (a[key], b[key]) for key in a if key in b}


def _told(value: Any) -> str:
    """Return a value for an error; of a fingerprint, the beginning."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}…" if len(text) in (40, 64) and text.isalnum() else text


def _teacher_parts(folder: Path) -> dict[str, str]:
    """Return the fingerprint of a run's teacher: commit, or SHA-256 of weights, configuration and tokenizer."""
    sources = recorded_recipe(folder).get("sources")
    found = sources.get("teacher") if isinstance(sources, dict) else None
    return {key: value for key, value in found.items() if key != "source"} if isinstance(found, dict) else {}


def _heldout(folder: Path) -> dict[str, str]:
    """Return the fingerprint of a run's held-out tokens, if a checkpoint is left; empty otherwise."""
    for path in sorted((folder / "checkpoints").glob("*/progress.json")):
        found = read_json_or_none(path)
        data = found.get("data") if isinstance(found, dict) else None
        if isinstance(data, dict) and "heldout" in data:
            return {"heldout": data["heldout"]}
    return {}


def _notes(reports: Sequence[Report]) -> list[str]:
    notes = []
    tokens = [sum(stage.tokens for stage in report.stages) for report in reports]
    if len(set(tokens)) > 1:
        notes.append(f"The runs were not trained on the same number of tokens: {', '.join(map(count, tokens))}.")
    machines = {_hardware(report) for report in reports}
    if len(machines) > 1:
        notes.append("The runs were measured on different machines. Compare the multiples of the teacher's speed.")
    dtypes = sorted({str(report.recipe.get("dtype", "float32")) for report in reports})
    if len(dtypes) > 1:
        notes.append(f"The runs were measured in different dtypes, {' and '.join(dtypes)}. Rounding is part of the KL.")
    compared = [report for report in reports if report.comparison is not None]
    if len({report.recipe.get("seed", 0) for report in compared}) > 1:
        notes.append("The runs have different seeds, so their recall was measured on different keys and values.")
    without = len(reports) - len(compared)
    if without:
        which = "One run has" if without == 1 else f"{without} runs have"
        notes.append(f"{which} no comparison at the end (evaluation.final: false).")
    return notes


def runs_markdown(report: RunsReport, image: str | None = None) -> str:
    """Return the comparison as Markdown: a sentence, the table, the picture if there is one, notes."""
    runs = "1 run" if len(report.runs) == 1 else f"{len(report.runs)} runs"
    header = ["Run", "Model", "Tokens", "Loss", "Gap", "KL", "Top-1", f"Repeat loss{_at(report.repeat_distance)}"]
    ends = sorted({(part.start, part.end) for row in report.rows for part in row.by_position})[-1:]
    header += [f"KL at {count(start)}-{count(end)}" for start, end in ends]
    if report.recall_lists:
        header.append("Recall")
    if report.context is not None:
        header += [f"Tokens/s{_at(report.context)}", f"Cache{_at(report.context)}"]
    teacher = min((row for row in report.rows if row.kind == "teacher"), key=lambda row: row.cache_bytes is None)
    shown = [teacher, *(row for row in report.rows if row.kind != "teacher")]
    rows = [_cells(report, row, ends) for row in shown]
    parts = [
        f"# {runs} with the teacher {code(report.teacher)}",
        f"On {count(report.predictions)} predictions of {', '.join(map(code, report.heldout)) or 'a text'}, in nats "
        "per token. *Tokens* are those of training. *Recall* is the mean accuracy over lists of keys and values. Speed "
        "in brackets is a multiple of the same run's teacher. The teacher's row is that of the first "
        "run with a comparison at the end, or of the first run.",
        table(header, rows, left=2),
        f"![{runs}]({image})" if image else "",
        "\n".join(f"- {note}" for note in report.notes),
        table(
            ["Run", "New mixers", "Machine", "Training seconds", "Peak memory"],
            [
                [
                    code(run.name),
                    code(", ".join(f"{layers} x {mixer}" for mixer, layers in run.mixers.items())),
                    code(run.hardware),
                    short(run.training_seconds),
                    binary_size(run.peak_memory_bytes),
                ]
                for run in report.runs
            ],
            left=3,
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(report: RunsReport, row: Row, ends: Sequence[tuple[int, int]]) -> list[str]:
    cells = [
        "" if row.kind == "teacher" else code(row.run),
        f"after {code(row.name)}" if row.kind == "stage" else row.name,
        count(row.trained_tokens),
        number(row.loss),
        number(row.gap, sign=True),
        number(row.kl),
        percent(row.top1_agreement),
        number(row.repeat_loss),
    ]
    found = {(part.start, part.end): part.kl for part in row.by_position}
    cells += [number(found.get(end)) for end in ends]
    if report.recall_lists:
        cells.append(percent(row.recall))
    if report.context is not None:
        speed = short(row.tokens_per_second)
        if row.kind != "teacher" and row.times_teacher is not None:
            speed += f" ({short(row.times_teacher)}x)"
        cells += [speed, MISSING if row.cache_bytes is None else binary_size(row.cache_bytes)]
    return cells


def _at(place: int | None) -> str:
    return "" if place is None else f" at {count(place)}"
