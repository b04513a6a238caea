"""Compare closed-form calibrations of a student that is not trained: none, single-pass ridge, sequential healing.

Nothing is trained. Each arm builds a student, calibrates it on training windows of 256 tokens of WikiText-2 and is
scored on held-out ones: loss gap, KL, agreement of the most likely token, and the loss on a passage read 416 tokens
before. Three mixers: discrete Mamba-2 as in the preset `demo` (positive features, normalised, rotary) and in its plain
form, in every second layer; attention over a bounded memory of 96 rows in all layers.

    python benchmarks/claims/healing.py TEACHER --threads 1 --tokens 8192 32768 65536

The file is rewritten after each arm. `--resume FILE` continues it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from result_file import open_results

from ssm_zoo.distill.calibrate import calibrate
from ssm_zoo.distill.data import TokenWindows, read_texts, tokenize
from ssm_zoo.distill.recipe import StudentSpec, resolve_layers
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher, load_teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model, repeat_loss
from ssm_zoo.kernels.cpu_products import fast_products

LENGTH, REPEAT_DISTANCE = 256, 416
# As in the demonstration: the calibration reads other windows than the training, whose seed is 0.
SEED = 1
STUDENTS: dict[str, dict[str, Any]] = {
    "normalised": {"layers": "odd", "feature_map": "softplus", "normalize": True, "rotary": True},
    "bounded": {"layers": "all", "mixer": "bounded_attention", "rows": 96, "slots": "equal"},
    "plain": {"layers": "odd"},
}


def arms(students: list[str], tokens: list[int]) -> list[dict[str, Any]]:
    """Return the arms, student by student."""
    methods = [(method, count) for count in sorted(tokens) for method in ("sequential", "ridge")]
    return [
        {"student": name, "calibration": method, "calibration_tokens": count}
        for name in students
        for method, count in (*methods, ("none", 0))
    ]


def measure(teacher: Teacher, arm: dict[str, Any], train: TokenWindows, held_out: TokenWindows, windows: int) -> dict:
    """Return the scores of an arm's student, and the seconds of its calibration."""
    options = {**STUDENTS[arm["student"]], "calibration": arm["calibration"]}
    spec = StudentSpec(**options, calibration_tokens=max(arm["calibration_tokens"], 2 * LENGTH))
    layers = resolve_layers(spec.layers, teacher.num_layers)
    student = build_student(teacher, spec, layers)
    started = time.monotonic()
    texts = train.batch(0, spec.calibration_tokens // LENGTH, LENGTH, SEED)
    calibrate(student, teacher, spec, layers, texts)
    seconds = time.monotonic() - started
    scores = evaluate_language_model(student, held_out.windows(LENGTH)[:windows], teacher=teacher.model, batch_size=4)
    return {
        "converted_layers": len(layers),
        "gap": scores["loss"] - scores["teacher_loss"],
        "kl": scores["kl"],
        "top1_agreement": scores["top1_agreement"],
        "repeat_loss": repeat_loss(student, held_out.windows(1)[:, 0], REPEAT_DISTANCE),
        "teacher_loss": scores["teacher_loss"],
        "predictions": scores["tokens"],
        "calibration_seconds": round(seconds, 1),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8192, 32768], help="for the calibration")
    parser.add_argument("--windows", type=positive, default=24, help="held-out windows")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    free = ("students", "tokens", "threads")
    results = open_results(options, parser, "claims/healing.py", arguments, free=free)
    teacher = load_teacher(options.teacher)
    train, held_out = (
        TokenWindows(tokenize(read_texts("builtin:wikitext2", split), teacher.tokenizer))
        for split in ("train", "heldout")
    )
    for arm in arms(options.students, options.tokens):
        if not results.find(arm):
            print(results.add({**arm, **measure(teacher, arm, train, held_out, options.windows)}), flush=True)


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
