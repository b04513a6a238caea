"""The report of a distillation: `report.json`, `report.md` with `plots/`, and a table for the terminal.

All of them are made from one dict (`ssm_zoo.reports.distillation_report`), so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..harness.published import decoration
from ..harness.run_folder import write_json
from ..harness.whole_files import write_text_whole, write_whole
from ..reports.card_parts import machine_table
from ..reports.comparison_tables import comparison_names, comparison_rows, comparison_section
from ..reports.distillation_plots import draw
from ..reports.distillation_report import Comparison, Report, parse_report
from ..reports.distillation_tables import (
    PLOT_CAPTIONS,
    command_block,
    evaluations_table,
    layers_table,
    limits_list,
    plot_image,
    recipe_block,
    samples_section,
    stages_table,
    verdict_list,
)
from ..reports.markdown import MISSING, code, count, number, percent, seconds, short, table
from ..reports.results import (
    EvaluationRow,
    evaluation_rows,
    exact_heads,
    recovered_sentence,
    summary_sentence,
    verdicts,
)
from .objectives import loss_name
from .stages import StageSpec

__all__ = ["EvaluationRow", "evaluation_table", "finite", "print_table", "stage_entry", "write_report"]


def write_report(folder: Path, report: dict[str, Any], with_plots: Callable[[], object] = lambda: None) -> None:
    """Write `plots/*.png`, `report.md` and, last, `report.json`; each file appears complete or not at all.

    Plots of an earlier report for which this report has no data are removed. Numbers that are not finite become null
    in `report.json`, since JSON cannot represent them.

    Args:
        folder: folder of the run; created if missing.
        report: see `ssm_zoo.reports.distillation_report`.
        with_plots: writes what needs the plots. It is called before the report, by which a finished run is known.

    Raises:
        ValueError: if a key of the report is missing or has a wrong value. Nothing is written in this case.
    """
    checked = parse_report(report)
    folder = Path(folder)
    plots, drawn = folder / "plots", []
    plots.mkdir(parents=True, exist_ok=True)
    with decoration("the plots"):
        for name, figure in draw(checked).items():
            write_whole(plots / name, partial(figure.savefig, format="png"))
            drawn.append(name)
    for name in PLOT_CAPTIONS.keys() - set(drawn):
        (plots / name).unlink(missing_ok=True)
    with_plots()
    write_text_whole(folder / "report.md", _markdown(checked, drawn))
    write_json(folder / "report.json", finite(report))


def stage_entry(stage: StageSpec, history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the part of a report on a trained stage."""
    return {
        "name": stage.name,
        "objective": stage.objective,
        "tokens": stage.steps * stage.batch_size * stage.sequence_length,
        "steps": stage.steps,
        "seconds": seconds,
        "loss_name": loss_name(stage),
        "history": [
            {
                "step": point["step"],
                "loss": point["loss"],
                "learning_rate": point["learning_rate"],
                "gradient_norm": point["grad_norm"],
            }
            for point in history
        ],
    }


def evaluation_table(report: dict[str, Any]) -> list[EvaluationRow]:
    """Return the evaluations of a report in order, one row each, with the gap to the teacher.

    Raises:
        ValueError: as `write_report`.
    """
    return evaluation_rows(parse_report(report))


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print the table of evaluations, the comparison at the end, the gain of each stage, and the recovered fraction.

    Raises:
        ValueError: as `write_report`.
    """
    checked = parse_report(report)
    evaluations = Table(title=Text(f"{checked.teacher.source} to {checked.student.model_type}"), title_justify="left")
    evaluations.add_column("model")
    for heading in ("loss", "gap", "KL", "top-1", "repeat", "tokens"):
        evaluations.add_column(heading, justify="right", no_wrap=True)
    for row in evaluation_rows(checked):
        cells = (
            f"after {row.name}" if row.kind == "stage" else row.name,
            number(row.loss),
            number(row.gap, sign=True),
            number(row.kl),
            percent(row.top1_agreement),
            number(row.repeat_loss),
            count(row.trained_tokens),
        )
        # As Text, since a name may have square brackets, which rich would take for a style.
        evaluations.add_row(*map(Text, cells))
    console.print(evaluations)
    if checked.comparison is not None:
        console.print(_comparison_table(checked.comparison))
    for verdict in verdicts(checked):
        console.print(Text(f"{verdict.stage} {verdict.sentence}", style="" if verdict.improved else "bold yellow"))
    console.print(Text(summary_sentence(checked)))
    console.print(Text(recovered_sentence(checked)))


def _comparison_table(comparison: Comparison) -> Table:
    """Return the table of teacher, control and student for the terminal."""
    found = Table()
    found.add_column("at the end")
    for name in comparison_names(comparison):
        found.add_column(Text(name), justify="right")
    for label, cells in comparison_rows(comparison):
        found.add_row(*map(Text, (label, *cells)))
    return found


def _markdown(report: Report, plots: Iterable[str]) -> str:
    """Return the text of report.md."""
    student, data = report.student, report.data
    trained = sum(stage.tokens for stage in report.stages)
    duration = sum(stage.seconds for stage in report.stages)
    evaluating = sum(part.seconds for part in report.evaluations)
    images = {name: plot_image(f"plots/{name}") for name in plots}
    parts = [
        f"# Distillation of {code(report.teacher.source)} to {code(student.model_type)}",
        f"{summary_sentence(report)} {recovered_sentence(report)}",
        "## What was done",
        f"{count(len(student.layers))} of the {count(student.num_layers)} layers of {code(report.teacher.source)} "
        f"({code(report.teacher.model_type)}, {count(report.teacher.parameters)} parameters, licence "
        f"{code(report.teacher.licence) if report.teacher.licence else 'not known'}) have a new token mixer. The "
        f"student has {count(student.parameters)} parameters. Its stages read {count(trained)} tokens in "
        f"{seconds(duration)} seconds, out of a text of {count(data.train_tokens)} tokens "
        f"({_sources(data.train_sources)}); the held-out text has {count(data.heldout_tokens)} "
        f"({_sources(data.heldout_sources)}). The evaluations took {seconds(evaluating)} seconds more.",
        layers_table(report),
        stages_table(report) if report.stages else "",
        "## Evaluations",
        "On the held-out text. *Mixers zeroed* is the student with the converted mixers' outputs set to zero: the "
        "floor. *Window + sinks* is the control that costs nothing: the teacher, whose converted layers see only the "
        f"last tokens and the first four, in a cache of as many bytes as the student's{_equal_at(report)}. *Step 0* is "
        "the student before training. *Repeat loss* is the loss on a passage that was read before, at a distance "
        f"{_distance(report)}. Tokens and seconds are those of training, over all stages so far.",
        evaluations_table(report),
        images.get("heldout.png", ""),
        "## Did every stage help?",
        verdict_list(report),
        images.get("losses.png", ""),
        *_comparison_parts(report, images),
        *_layer_parts(report, images),
        *_sample_parts(report),
        "## Limits",
        limits_list(report),
        "## To repeat it",
        command_block(report),
        machine_table(report.model_dump()),
        "The recipe of the run, with all defaults:",
        recipe_block(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _comparison_parts(report: Report, images: dict[str, str]) -> list[str]:
    """Return the section on teacher, control and student side by side."""
    if report.comparison is None:
        return []
    heading = "## Beside teacher and control"
    return [heading, images.get("comparison.png", ""), comparison_section(report.comparison)]


def _layer_parts(report: Report, images: dict[str, str]) -> list[str]:
    """Return the section on the converted layers' errors before and after training."""
    measured = [part for part in report.students if part.layers]
    if not measured:
        return []
    errors = [{row.layer: row for row in part.layers} for part in measured]
    header = ["Layer", *(f"Output error, {_when(part.name, part.kind)}" for part in measured)]
    header += ["Matrix error, first", "Matrix error, last", "Half-life (tokens)"]
    rows = []
    for layer in sorted(set().union(*errors)):
        found = [rows_of.get(layer) for rows_of in errors]
        present = [row for row in found if row is not None]
        half_lives = [value for value in present[-1].half_life if value is not None]
        still = len(present[-1].half_life) - len(half_lives)
        spread = MISSING
        if half_lives:
            spread = f"{short(median(half_lives))} ({short(min(half_lives))} to {short(max(half_lives))})"
        if still:
            spread += f", {still} without decay"
        outputs = [short(row.output_error) if row is not None else MISSING for row in found]
        rows.append((str(layer), *outputs, _mean(present[0].matrix_error), _mean(present[-1].matrix_error), spread))
    return [
        "## Layers",
        "Relative errors of each converted mixer on the teacher's hidden states: of its output, `||y - t|| / ||t||`, "
        "and of its mixing matrix, the mean over the heads. An output of zero has the error 1. The half-life is the "
        "number of tokens after which a head's state has halved; at the end, median (shortest to longest head).",
        table(header, rows),
        images.get("layers.png", ""),
        images.get("heads.png", ""),
    ]


def _sample_parts(report: Report) -> list[str]:
    samples = samples_section(report.evaluations)
    if not samples:
        return []
    return ["## What it writes", "Greedy continuations, unedited, of the recipe's prompts.", samples]


def _when(name: str, kind: str) -> str:
    return f"after {code(name)}" if kind == "stage" else name


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return short(sum(known) / len(known)) if known else MISSING


def _distance(report: Report) -> str:
    distance = report.recipe.get("evaluation", {}).get("repeat_distance")
    return "beyond the window" if distance is None else f"of {count(distance)} tokens"


def _equal_at(report: Report) -> str:
    """Return when the caches of control and student have as many bytes, if the student's goes on growing."""
    length = report.recipe.get("evaluation", {}).get("sequence_length")
    return f" after {count(length)} tokens" if exact_heads(report) and isinstance(length, int) else ""


def _sources(sources: list[str]) -> str:
    return ", ".join(code(source) for source in sources) or "source not recorded"


def finite(value: Any) -> Any:
    """Return the value with None in place of every float that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
