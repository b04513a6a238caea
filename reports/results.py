"""Results of a distillation: the table of evaluations, the gain of each stage, the recovered fraction, the limits.

Report, model card and command line share these rows and sentences. They say so if a stage did not improve the held-out
loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .distillation_report import Evaluation, Report
from .markdown import code, count, number, percent, ranges

# Losses are compared as they are printed, so that an improvement is always visible.
_DIGITS = 4
# A smaller budget is small compared to all published recipes (RADLADS 0.35e9, arXiv 2505.03005; MOHAWK 3e9).
_SMALL_BUDGET = 100_000_000


class EvaluationRow(Evaluation):
    """A row of the table of evaluations.

    Attributes:
        gap: difference to the teacher's loss, in nats.
        trained_seconds: seconds of training until then, over all stages.
    """

    gap: float | None
    trained_seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether a stage improved the student, and the sentence on it, to follow the stage's name."""

    stage: str
    improved: bool
    sentence: str


def evaluation_rows(report: Report) -> list[EvaluationRow]:
    """Return the evaluations in order, with the gap to the teacher and the duration of the training before each."""
    teacher = report.evaluation("teacher").loss
    durations = {stage.name: stage.seconds for stage in report.stages}
    trained, rows = 0.0, []
    for part in report.evaluations:
        if part.kind == "stage":
            trained += durations[part.name]
        gap = None if part.kind == "teacher" or part.loss is None or teacher is None else part.loss - teacher
        rows.append(EvaluationRow(**dict(part), gap=gap, trained_seconds=trained))
    return rows


def recovered_fraction(report: Report) -> float | None:
    """Return (L0 - LS) / (L0 - LT), the share of the loss due to silenced mixers that the student recovers.

    L0 is the loss with the converted mixers silenced, LS the student's at the end, LT the teacher's. The fraction is
    None if a loss is not finite, or if silencing the mixers does not increase the loss.
    """
    floor, reached = report.evaluation("zeroed").loss, report.students[-1].loss
    teacher = report.evaluation("teacher").loss
    if floor is None or reached is None or teacher is None or floor <= teacher:
        return None
    return (floor - reached) / (floor - teacher)


def recovered_sentence(report: Report) -> str:
    """Return a sentence on the recovered fraction, with the losses from which it is computed."""
    fraction = recovered_fraction(report)
    losses = [report.evaluation("zeroed").loss, report.students[-1].loss, report.evaluation("teacher").loss]
    floor, reached, teacher = (number(loss, _DIGITS) for loss in losses)
    given = f"L0 = {floor} (converted mixers zeroed), LS = {reached} (student), LT = {teacher} (teacher)"
    if fraction is None:
        return f"The recovered fraction (L0 - LS) / (L0 - LT) is not defined here: {given}, in nats per token."
    return f"Recovered fraction (L0 - LS) / (L0 - LT) = {percent(fraction)}, with {given}, in nats per token."


def summary_sentence(report: Report) -> str:
    """Return a sentence on the held-out losses of student and teacher and their gap, the primary number."""
    teacher, student = report.evaluation("teacher"), report.students[-1]
    if student.loss is None or teacher.loss is None:
        return f"Held-out loss: {number(student.loss)} (student), {number(teacher.loss)} (teacher): not finite."
    gap = student.loss - teacher.loss
    where = "above" if gap >= 0 else "below"
    return (
        f"Held-out loss {number(student.loss, _DIGITS)} nats per token, {number(abs(gap), _DIGITS)} {where} the "
        f"teacher's {number(teacher.loss, _DIGITS)}, on {count(student.tokens)} predictions."
    )


def verdicts(report: Report) -> list[Verdict]:
    """Return a verdict on each stage, compared with the student before it."""
    return [_verdict(before, after) for before, after in pairwise(report.students)]


def layer_groups(report: Report) -> list[tuple[str, str, int]]:
    """Return (token mixer, its layers as text, their number), in the order of first appearance."""
    groups: dict[str, list[int]] = {}
    for layer, mixer in enumerate(report.student.mixer_types):
        groups.setdefault(mixer, []).append(layer)
    return [(mixer, ranges(layers), len(layers)) for mixer, layers in groups.items()]


def stage_setting(report: Report, stage: str, key: str) -> Any:
    """Return a setting of a stage in the recipe that was run; None if the recipe does not have it."""
    stages = report.recipe.get("stages")
    for settings in stages if isinstance(stages, list) else []:
        if isinstance(settings, dict) and settings.get("name") == stage:
            return settings.get(key)
    return None


def exact_heads(report: Report) -> int:
    """Return the number of the student's key-value heads with full attention in layers with a bounded memory."""
    student = report.recipe.get("student")
    heads = student.get("exact_heads") if isinstance(student, dict) else None
    return len(heads) if isinstance(heads, list) else 0


def limits(report: Report) -> list[str]:
    """Return sentences on the limits of the results."""
    found = []
    tokens = sum(stage.tokens for stage in report.stages)
    if tokens < _SMALL_BUDGET:
        found.append(
            f"A small budget: {count(tokens)} training tokens in all. Published recipes of this kind spend "
            "hundreds of millions to billions."
        )
    scored = count(report.students[-1].tokens)
    text = f"The loss, divergence and agreement are over {scored} predictions of one held-out text"
    if read := report.data.heldout_in_training:
        text += f", and {', '.join(map(code, read))} was read in training, too: they say nothing about new text"
    elif set(report.data.train_sources) & set(report.data.heldout_sources):
        text += " from the same source as the training text, so they are in-domain numbers"
    found.append(f"{text}. They say little about other kinds of text.")
    found.append("No benchmark was run: nothing is claimed about question answering, reasoning, retrieval or code.")
    lengths = [stage_setting(report, stage.name, "sequence_length") for stage in report.stages]
    known = [length for length in lengths if isinstance(length, int)]
    if known:
        text = f"Trained on sequences of up to {count(max(known))} tokens."
        bins = [] if report.comparison is None else report.comparison.teacher.by_position
        if bins and bins[-1].end > max(known):
            found.append(f"{text} Its loss was measured on texts of up to {count(bins[-1].end)}.")
        else:
            found.append(f"{text} Longer contexts were not tested.")
    if exact := exact_heads(report):
        keep = "head keeps" if exact == 1 else "heads keep"
        found.append(f"Its cache grows with the context: {count(exact)} key-value {keep} all tokens (`exact_heads`).")
    found.append(
        "It inherits the teacher's biases and mistakes. Nothing was done to remove them, and whatever alignment "
        "the teacher had may have weakened."
    )
    repeated = [_mean_repetition(part) for part in (report.students[-1], report.evaluation("teacher"))]
    if repeated[0] is not None:
        text = f"In its greedy samples {percent(repeated[0])} of the 4-grams repeat earlier ones"
        found.append(text + ("." if repeated[1] is None else f" (teacher: {percent(repeated[1])})."))
    found.append("One run with one seed. Differences of a few thousandths of a nat need not be differences.")
    return found


def _verdict(before: Evaluation, after: Evaluation) -> Verdict:
    old, new = (None if part.loss is None else round(part.loss, _DIGITS) for part in (before, after))
    improved = new is not None and (old is None or new < old)
    if new is None:
        sentence = "did not improve on the one before: the held-out loss is not finite."
    elif old is None:
        sentence = f"brought the held-out loss, which was not finite, to {number(new, _DIGITS)} nats per token."
    else:
        difference = number(new - old, _DIGITS, sign=True)
        change = f"from {number(old, _DIGITS)} to {number(new, _DIGITS)} nats per token ({difference})"
        if improved:
            sentence = f"lowered the held-out loss {change}"
        elif new > old:
            sentence = f"did not improve on the one before: the held-out loss rose {change}"
        else:
            sentence = f"did not improve on the one before: the held-out loss stayed at {number(new, _DIGITS)}"
        if before.kl is not None and after.kl is not None:
            sentence += f"; KL to the teacher {_movement(number(before.kl), number(after.kl), after.kl - before.kl)}"
        if before.top1_agreement is not None and after.top1_agreement is not None:
            shares = percent(before.top1_agreement), percent(after.top1_agreement)
            sentence += f"; top-1 agreement {_movement(*shares, after.top1_agreement - before.top1_agreement)}"
        sentence += "."
    converted = [len(part.layers) for part in (before, after)]
    if all(converted) and converted[0] != converted[1]:  # layers that are converted step by step
        sentence += f" It has {count(converted[1])} converted layers, the one before {count(converted[0])}."
    return Verdict(after.name, improved, sentence)


def _movement(before: str, after: str, change: float) -> str:
    if before == after:
        return f"stayed at {after}"
    return f"{'rose' if change > 0 else 'fell'} from {before} to {after}"


def _mean_repetition(part: Evaluation) -> float | None:
    if not part.samples:
        return None
    return sum(sample.repetition for sample in part.samples) / len(part.samples)
