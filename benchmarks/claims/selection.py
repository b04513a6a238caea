"""Compare choices of layers to convert, at equal numbers of layers, by the student before any training.

`ssm-zoo select` ranks the layers of a teacher by several methods; its evidence has the layers that each would convert.
For each method two students. "window": the teacher with a window of 32 tokens and 4 sinks in these layers, as the
method `restore` has it in all layers. "mamba2": discrete Mamba-2 (positive features, normalised, rotary, as in the
recipe `mamba2_hybrid`), calibrated in closed form on training text of WikiText-2, and beside it the control that costs
nothing, the teacher with a window and sinks of as many bytes in the same layers. All are scored on held-out windows of
512 tokens: loss gap, KL, agreement of the most likely token, and the loss on a passage read 416 tokens before.

    ssm-zoo select TEACHER --data builtin:wikitext2 --output FOLDER --layers 15 --method restore,uniform
    python benchmarks/claims/selection.py TEACHER FOLDER/selection.json --threads 1

The file is rewritten after each method. `--resume FILE` continues it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from result_file import open_results

from ssm_zoo.distill.calibrate import calibrate
from ssm_zoo.distill.data import TokenWindows, read_texts, tokenize
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_control, build_student
from ssm_zoo.distill.teacher import Teacher, load_teacher
from ssm_zoo.evaluation.hidden_states import KeptStates
from ssm_zoo.evaluation.language_modeling import evaluate_language_model, repeat_loss
from ssm_zoo.harness.json_files import read_json_object

LENGTH, CALIBRATION_LENGTH, REPEAT_DISTANCE = 512, 256, 416
# As in the demonstration: the calibration reads other windows than a training, whose seed is 0.
SEED = 1
WINDOW = {"mixer": "bounded_attention", "window": 32, "sinks": 4, "rows": 36, "slots": "equal", "chunk_size": 4}
STUDENTS: dict[str, dict[str, Any]] = {
    "window": {**WINDOW, "calibration": "none"},
    "mamba2": {"feature_map": "softplus", "normalize": True, "rotary": True, "calibration": "ridge"},
}


@dataclass(frozen=True)
class Choice:
    """The layers that a method would convert, and the student that has other mixers there."""

    method: str
    student: str
    layers: list[int]


def measure(
    teacher: Teacher,
    choice: Choice,
    train: TokenWindows,
    held_out: TokenWindows,
    options: argparse.Namespace,
    kept: KeptStates,
) -> dict[str, Any]:
    """Return the scores of the student of a choice, and of its control."""
    spec = StudentSpec(**STUDENTS[choice.student], calibration_tokens=options.calibration_tokens)
    models: dict[str, Any] = {"scores": build_student(teacher, spec, choice.layers)}
    started = time.monotonic()
    if choice.student != "window":
        texts = train.batch(0, options.calibration_tokens // CALIBRATION_LENGTH, CALIBRATION_LENGTH, SEED)
        calibrate(models["scores"], teacher, spec, choice.layers, texts)
        models["control"] = build_control(teacher, models["scores"], choice.layers, LENGTH)
    seconds = time.monotonic() - started
    windows = held_out.windows(LENGTH)[: options.tokens // LENGTH]
    kept.name(teacher.model, "teacher")
    found: dict[str, Any] = {}
    for name, model in models.items():
        scores = evaluate_language_model(model, windows, teacher=teacher.model, batch_size=1, kept=kept)
        found[name] = {
            "gap": scores["loss"] - scores["teacher_loss"],
            "kl": scores["kl"],
            "top1_agreement": scores["top1_agreement"],
            "repeat_loss": repeat_loss(model, held_out.windows(1)[:, 0], REPEAT_DISTANCE) if options.repeat else None,
        }
    return {**found, "predictions": scores["tokens"], "calibration_seconds": round(seconds, 1)}


def main(arguments: list[str]) -> None:
    """Measure the choices that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("evidence", type=Path, help="selection.json of a selection for this teacher")
    parser.add_argument("--methods", nargs="+", help="those to compare; by default all of the selection")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--repeat", action=argparse.BooleanOptionalAction, default=True, help="measure repeat losses")
    parser.add_argument("--calibration-tokens", type=positive, default=16384)
    parser.add_argument("--tokens", type=positive, default=6144, help="held-out tokens")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ranked = read_json_object(options.evidence)["methods"]
    if unknown := sorted(set(options.methods or ()) - set(ranked)):
        parser.error(f"--methods must be among {', '.join(ranked)}, which {options.evidence} has, got {unknown}")
    free = ("evidence", "methods", "students", "threads")
    results = open_results(options, parser, "claims/selection.py", arguments, free=free)
    teacher = load_teacher(options.teacher)
    train, held_out = (
        TokenWindows(tokenize(read_texts("builtin:wikitext2", split), teacher.tokenizer))
        for split in ("train", "heldout")
    )
    kept = KeptStates()
    for student in options.students:
        for method in options.methods or ranked:
            choice = Choice(method, student, ranked[method]["layers"])
            print(results.run(choice, lambda it: measure(teacher, it, train, held_out, options, kept)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
