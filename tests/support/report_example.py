"""A distillation report as a run writes it, one whose texts try to be markup, and how to read Markdown back.

For the tests of reports and of model cards. The numbers are made up by a formula, so that every layer, head and
stage has its own.
"""

import math
import re
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt

NUM_LAYERS, HEADS = 12, 6
CONVERTED = [layer for layer in range(NUM_LAYERS) if layer % 2]

# Name, kind, loss, KL, agreement, training tokens before it.
_EVALUATIONS = (
    ("teacher", "teacher", 3.6741, None, None, 0),
    ("mixers zeroed", "zeroed", 8.6688, 5.2153, 0.1121, 0),
    ("step 0", "start", 6.0412, 2.6125, 0.3012, 0),
    ("matrices", "stage", 4.9876, 1.5231, 0.4401, 51_200),
    ("align", "stage", 3.9023, 0.2811, 0.7122, 153_600),
    ("distil", "stage", 3.7215, 0.1012, 0.8123, 204_800),
)
_STAGES = (
    ("matrices", "matrix_orientation", 50, 120.5, "Frobenius norm of the matrix error", 9.0, 2.0),
    ("align", "hidden_state_alignment", 100, 250.25, "relative squared error", 1.4, 0.05),
    ("distil", "logit_distillation", 50, 310.75, "divergence (nats/token)", 0.35, 0.09),
)
_PROMPTS = ("The capital of France is", "Once upon a time, there was a little")


HOSTILE = (
    "</code></pre><script>alert(1)</script>\n```\n# heading\n![x](http://evil.example/i.png)\n"
    "````\n[link](http://evil.example)\n| a | b |\n---\n<details>\x1b[31m"
)
HOSTILE_NAME = "x`|<b>[l](http://evil.example)</b>\n\n# y"


def example_report() -> dict[str, Any]:
    """A run of three stages that each improve; a fresh dict of the kinds that JSON knows at every call."""
    return {
        "format": 1,
        "kind": "distillation",
        "created": "2026-01-31T12:34:56+00:00",
        "command": "ssm-zoo distill recipe.yaml runs/first --set seed=3",
        "hardware": {"cpu": "Example CPU @ 2.50GHz", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
        "versions": {"python": "3.12.1", "torch": "2.13.0+cpu", "transformers": "5.23.0", "ssm-zoo": "0.1.0"},
        "recipe": {
            "teacher": "example-org/Teacher-135M",
            "student": {"layers": "odd", "mixer": "discrete_mamba2"},
            "data": {"train": "builtin:wikitext2", "heldout": "builtin:wikitext2", "sequence_length": 256},
            "stages": [
                {
                    "name": name,
                    "objective": objective,
                    "train": "all" if name == "distil" else "mixers",
                    "tokens": steps * 1024,
                    "sequence_length": 256,
                    "batch_size": 4,
                    "learning_rate": 5e-4 if name == "distil" else 2e-3,
                }
                for name, objective, steps, *_ in _STAGES
            ],
            "seed": 3,
        },
        "teacher": {
            "source": "example-org/Teacher-135M",
            "model_type": "llama",
            "parameters": 134_515_008,
            "licence": "apache-2.0",
        },
        "student": {
            "model_type": "zoo_hybrid",
            "parameters": 136_200_123,
            "layers": list(CONVERTED),
            "num_layers": NUM_LAYERS,
            "mixer_types": [
                "discrete_mamba2" if layer in CONVERTED else "full_attention" for layer in range(NUM_LAYERS)
            ],
        },
        "data": {
            "train_tokens": 274_321,
            "heldout_tokens": 36_123,
            "train_sources": ["builtin:wikitext2"],
            "heldout_sources": ["builtin:wikitext2"],
        },
        "evaluations": [_evaluation(index, *values) for index, values in enumerate(_EVALUATIONS)],
        "stages": [_stage(*values) for values in _STAGES],
        "processes": 1,
        "peak_memory_bytes": 1_610_612_736,
    }


def hostile_report() -> dict[str, Any]:
    """A report whose free texts all try to be markup."""
    report = example_report()
    for part in report["evaluations"]:
        for sample in part["samples"]:
            sample["completion"] = HOSTILE
    report["evaluations"][0]["samples"][0]["prompt"] = HOSTILE
    report["evaluations"][-1]["name"] = report["stages"][-1]["name"] = HOSTILE_NAME
    report["recipe"]["stages"][-1]["name"] = HOSTILE_NAME
    report["stages"][-1]["objective"] = report["stages"][-1]["loss_name"] = HOSTILE_NAME
    report["command"] = HOSTILE
    report["recipe"]["prompts"] = [HOSTILE, HOSTILE_NAME]
    report["teacher"] |= {"source": HOSTILE_NAME, "model_type": HOSTILE_NAME, "licence": HOSTILE_NAME}
    report["student"]["mixer_types"][0] = HOSTILE_NAME
    report["data"] |= {"train_sources": [HOSTILE_NAME], "heldout_sources": [HOSTILE_NAME]}
    report["hardware"] |= {"cpu": HOSTILE_NAME, "gpu": HOSTILE_NAME}
    report["versions"][HOSTILE_NAME] = HOSTILE_NAME
    report["created"] = HOSTILE_NAME
    return report


def markup(text: str) -> tuple[list[str], list[str], list[str]]:
    """What a Markdown renderer finds in a text: HTML, targets of links and pictures, and headings."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    html = [token.content.strip() for token in (*tokens, *inline) if token.type in ("html_block", "html_inline")]
    targets = [str(token.attrs.get("src", token.attrs.get("href"))) for token in inline if token.attrs]
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return html, targets, headings


def table_after(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its header."""
    lines = text[text.index(f"## {heading}\n") :].splitlines()
    rows = [line for line in lines[: _next_gap(lines)] if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def _next_gap(lines: list[str]) -> int:
    """Where the first table of the lines ends."""
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    return next(index for index, line in enumerate(lines) if index > start and not line.startswith("|"))


def _evaluation(
    index: int, name: str, kind: str, loss: float, kl: float | None, agreement: float | None, tokens: int
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": kl,
        "top1_agreement": agreement,
        "repeat_loss": None if kind == "zeroed" else loss / 4,
        "tokens": 16_320,
        "trained_tokens": tokens,
        "seconds": 11.5 + index,
        "samples": []
        if kind == "zeroed"
        else [
            {
                "prompt": prompt,
                "completion": f" a place that {name} knows well.\n\nIt is",
                "repetition": index / 50,
            }
            for prompt in _PROMPTS
        ],
        "layers": [_layer(index - 2, layer) for layer in CONVERTED] if kind in ("start", "stage") else [],
    }


def _layer(stages: int, layer: int) -> dict[str, Any]:
    shrunk = (0.35 + 0.01 * layer) ** stages
    return {
        "layer": layer,
        "output_error": (1.4 + 0.9 * math.sin(layer)) * shrunk,
        "matrix_error": [(1.1 + 0.5 * math.cos(layer + 2 * head)) * shrunk for head in range(HEADS)],
        "half_life": [None if layer == 1 and head == 0 else 4.0 * 2**head + layer for head in range(HEADS)],
    }


def _stage(
    name: str, objective: str, steps: int, seconds: float, loss_name: str, first: float, last: float
) -> dict[str, Any]:
    return {
        "name": name,
        "objective": objective,
        "tokens": steps * 1024,
        "steps": steps,
        "seconds": seconds,
        "loss_name": loss_name,
        "history": [
            {
                "step": step,
                "loss": last + (first - last) * math.exp(-6 * step / steps) * (1 + 0.1 * math.sin(3 * step)),
                "learning_rate": 2e-3 * (1 - step / (steps + 1)),
                "gradient_norm": 1 + 5 / step,
            }
            for step in range(1, steps + 1)
        ],
    }
