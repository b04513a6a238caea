"""Markdown sections that a distillation's report and its model card share.

Names, sources, samples and commands are not ours, so they are written as code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import yaml

from ..harness.published import public_argument, public_command
from ..modeling.token_mixers import TOKEN_MIXERS
from .distillation_report import Evaluation, Report
from .markdown import MISSING, code, count, fenced, number, percent, seconds, short, table
from .results import evaluation_rows, layer_groups, limits, stage_setting, verdicts

# The plots of a report, in the order in which they are shown.
PLOT_CAPTIONS = {
    "comparison.png": "Teacher, control and student: loss and KL by position, repeat loss, recall, decoding and cache",
    "heldout.png": "Held-out loss, KL divergence and top-1 agreement of every evaluation",
    "losses.png": "Training loss of every stage",
    "layers.png": "Relative output error of every converted layer",
    "heads.png": "Relative matrix error of every head, before and after",
}


def plot_image(path: str) -> str:
    """Return a picture by its path relative to the text, with the caption of a known plot."""
    caption = PLOT_CAPTIONS.get(PurePosixPath(path).name, "Plot")
    return f"![{caption}]({quote(path)})"


def layers_table(report: Report) -> str:
    """Return the table of token mixers and their layers."""
    header = ("Token mixer", "Layers (from 0)", "Number")
    rows = [
        (f"{code(mixer)}{f', {TOKEN_MIXERS[mixer].label}' if mixer in TOKEN_MIXERS else ''}", layers, count(size))
        for mixer, layers, size in layer_groups(report)
    ]
    return table(header, rows, left=2)


def evaluations_table(report: Report) -> str:
    """Return the table of loss, gap, divergence and agreement of all evaluations."""
    header = (
        "Model",
        "Loss (nats/token)",
        "Gap to teacher (nats)",
        "Perplexity",
        "KL (nats/token)",
        "Top-1 agreement",
        "Repeat loss",
        "Tokens so far",
        "Seconds so far",
    )
    rows = [
        (
            f"after {code(row.name)}" if row.kind == "stage" else code(row.name),
            number(row.loss),
            number(row.gap, sign=True),
            short(row.perplexity),
            number(row.kl),
            percent(row.top1_agreement),
            number(row.repeat_loss),
            count(row.trained_tokens),
            seconds(row.trained_seconds),
        )
        for row in evaluation_rows(report)
    ]
    return table(header, rows)


def stages_table(report: Report) -> str:
    """Return the table of the stages: objective, data, learning rate and duration."""
    header = (
        "Stage",
        "Objective",
        "Trained",
        "Tokens",
        "Steps",
        "Sequence length",
        "Sequences a step",
        "Peak learning rate",
        "Seconds",
    )
    rows = [
        (
            code(stage.name),
            code(stage.objective),
            _setting(report, stage.name, "train"),
            count(stage.tokens),
            count(stage.steps),
            _setting(report, stage.name, "sequence_length"),
            _setting(report, stage.name, "batch_size"),
            _setting(report, stage.name, "learning_rate"),
            seconds(stage.seconds),
        )
        for stage in report.stages
    ]
    return table(header, rows, left=3)


def verdict_list(report: Report) -> str:
    """Return a list that says for each stage whether it improved the student."""
    lines = []
    for verdict in verdicts(report):
        line = f"{code(verdict.stage)} {verdict.sentence}"
        lines.append(f"- {line}" if verdict.improved else f"- **{line}**")
    return "\n".join(lines) or "- No stage was trained."


def samples_section(evaluations: Iterable[Evaluation]) -> str:
    """Return all prompts with their continuations in these evaluations; empty if there are none."""
    prompts: dict[str, list[str]] = {}
    for part in evaluations:
        for sample in part.samples:
            name = f"After {code(part.name)}" if part.kind == "stage" else code(part.name)
            title = f"{name}, {percent(sample.repetition)} of its 4-grams repeated:"
            prompts.setdefault(sample.prompt, []).append(f"{title}\n\n{fenced(sample.completion)}")
    return "\n\n".join(f"Prompt:\n\n{fenced(prompt)}\n\n" + "\n\n".join(blocks) for prompt, blocks in prompts.items())


def limits_list(report: Report) -> str:
    """Return the list of limits."""
    return "\n".join(f"- {sentence}" for sentence in limits(report))


def command_block(report: Report) -> str:
    """Return the command, without the folders of the machine."""
    return fenced(public_command(report.command), "sh")


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the folders of the machine."""
    recipe = {**recipe}
    for key in ("teacher", "stored_logits"):
        if isinstance(recipe.get(key), str):
            recipe[key] = public_argument(recipe[key])
    if isinstance(recipe.get("data"), dict):
        recipe["data"] = {key: _relative(value) for key, value in recipe["data"].items()}
    return recipe


def recipe_block(report: Report) -> str:
    """Return the recipe as YAML, without the folders of the machine."""
    recipe = public_recipe(report.recipe)
    return fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100), "yaml")


def _setting(report: Report, stage: str, key: str) -> str:
    """Return a setting of a stage as a table cell."""
    value = stage_setting(report, stage, key)
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return count(value) if isinstance(value, int) else code(str(value))


def _relative(value: object) -> object:
    """Return a source or a list of sources without the folders of absolute paths, and other values unchanged."""
    if isinstance(value, list):
        return [_relative(part) for part in value]
    return public_argument(value) if isinstance(value, str) else value
