"""Compare students with a bounded memory, part by part, at equal numbers of keys and values, without training.

All attention layers keep 340 rows of keys and values of 8 bits per key-value head, on average over the heads: with
scores and positions no more bytes than 96 keys and values of float32 (`--rows 96 --kv-dtype auto`).

    window    the last tokens and the first four: the control that costs nothing
    equal     a window of 32, the first four tokens, and as many slots for every head
    divided   the slots divided among the heads, by errors on ordinary text
    decays    and a decay of the scores for every head
    recall    and errors on repeated passages: the recipe; "recall-0.1" and "recall-1" give these another weight
    exact     the recipe with the heads of `--exact`, which keep all tokens

Scored on WikiText-2's held-out text and on texts that nothing was chosen on: loss gap, KL and agreement in windows of
several lengths, and the loss on a passage that was read 416 and 1,500 tokens before.

    python benchmarks/claims/bounded_memory.py TEACHER --text speeches=FILE --threads 2

`--student NAME=FOLDER` scores a trained student, as an arm of that name.

The file is rewritten after each arm. `--resume FILE` continues it.
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
from result_file import open_results, option_values
from transformers import AutoModelForCausalLM

import ssm_zoo.modeling  # noqa: F401  (registers the models)
from ssm_zoo.distill.data import TokenWindows, read_texts, tokenize
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.slots import LENGTH, WINDOWS, divide_slots
from ssm_zoo.distill.student import build_control, build_student, set_slots
from ssm_zoo.distill.teacher import Teacher, load_teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model, repeat_loss
from ssm_zoo.kernels.cpu_products import fast_products

TOKENS = 6144
CHARACTERS = 2_000_000  # of a text, at most
DIVISIONS: dict[str, dict[str, Any]] = {
    "divided": {"recall": 0.0, "decays": [1.0]},
    "decays": {"recall": 0.0},
    "recall": {},
    "recall-0.1": {"recall": 0.1},
    "recall-1": {"recall": 1.0},
    "exact": {},
}


@dataclass
class Run:
    """An arm on a text, with its calibration windows drawn by `seed`."""

    arm: str
    text: str
    seed: int
    rows: int
    kv_dtype: str
    exact: list[list[int]]


def build(teacher: Teacher, run: Run, train: TokenWindows, options: argparse.Namespace) -> tuple[Any, float]:
    """Return the student of an arm, and the seconds of its calibration."""
    layers = options.layers or list(range(teacher.num_layers))
    spec = StudentSpec(
        mixer="bounded_attention",
        rows=options.rows,
        kv_dtype=options.kv_dtype,
        exact_heads=options.exact if run.arm == "exact" else [],
    )
    student = build_student(teacher, spec, layers)
    started = time.monotonic()
    if run.arm == "window":
        return build_control(teacher, student, layers, options.rows), 0.0
    if run.arm in DIVISIONS:
        settings = student.config.settings_of("bounded_attention")
        windows = train.batch(0, WINDOWS, LENGTH, run.seed)
        set_slots(student, *divide_slots(teacher, layers, settings, options.rows, windows, **DIVISIONS[run.arm]))
    return student, time.monotonic() - started


def read(source: str, split: str, teacher: Teacher) -> TokenWindows:
    """Return the tokens of a text."""
    return TokenWindows(tokenize([part[:CHARACTERS] for part in read_texts(source, split)], teacher.tokenizer))


def scores(
    student: Any, teacher: Teacher, text: TokenWindows, lengths: list[int], tokens: int = TOKENS
) -> dict[str, Any]:
    """Return the scores of a student on a text, by length and by distance."""
    found: dict[str, Any] = {"by_length": {}, "repeat_loss": {}}
    for length in lengths:
        windows = text.windows(length)[: tokens // length]
        row = evaluate_language_model(student, windows, teacher=teacher.model, batch_size=max(1024 // length, 1))
        kept = {name: row[name] for name in ("loss", "teacher_loss", "kl", "top1_agreement", "tokens")}
        found["by_length"][length] = {**kept, "gap": row["loss"] - row["teacher_loss"]}
    for distance in (416, 1500):
        found["repeat_loss"][distance] = repeat_loss(student, text.windows(1)[:, 0], distance)
    return found


def pair(text: str) -> tuple[int, int]:
    """Read "LAYER,HEAD"."""
    layer, head = text.split(",")
    return int(layer), int(head)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("--arms", nargs="*", default=["window", "equal", *(arm for arm in DIVISIONS if arm != "exact")])
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER", help="a trained student")
    parser.add_argument("--rows", type=positive, default=340)
    parser.add_argument("--layers", type=int, nargs="+", help="layers to convert; by default all")
    parser.add_argument("--kv-dtype", choices=["auto", "int8"], default="int8")
    parser.add_argument("--exact", type=pair, nargs="+", default=[], metavar="LAYER,HEAD", help="exact heads")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another text to score on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    options = parser.parse_args(arguments)
    if bool(options.exact) != ("exact" in options.arms):
        parser.error("--exact names the heads of the arm exact: give both or neither")
    torch.set_num_threads(options.threads)
    results = open_results(options, parser, "claims/bounded_memory.py", arguments, free=vars(options))
    common = option_values(options, ("teacher", "layers", "lengths"))
    results.complete([*common, "exact"], parser)
    for row in results.rows:  # the other arms have no exact heads
        row["exact"] = row["exact"] if row["arm"] == "exact" else []
    teacher = load_teacher(options.teacher)

    train = read("builtin:wikitext2", "train", teacher)
    texts = {"wikitext2": read("builtin:wikitext2", "heldout", teacher)}
    texts |= {name: read(path, "heldout", teacher) for name, path in (text.split("=", 1) for text in options.text)}
    memory = options.rows, options.kv_dtype
    trained = dict(each.split("=", 1) for each in options.student)
    for seed in options.seeds:
        for arm in [*options.arms, *trained]:
            exact = [list(head) for head in options.exact] if arm == "exact" else []
            runs = [Run(arm, name, seed, *memory, exact) for name in texts]
            todo = [run for run in runs if not results.find(vars(run) | common)]
            if not todo or (arm not in DIVISIONS and seed != options.seeds[0]):  # these have no seed
                continue
            if arm in trained:
                student, seconds = AutoModelForCausalLM.from_pretrained(trained[arm], dtype=torch.float32).eval(), 0.0
            else:
                student, seconds = build(teacher, todo[0], train, options)
            for run in todo:
                found = scores(student, teacher, texts[run.text], options.lengths)
                print(
                    results.add({**vars(run), **common, **found, "calibration_seconds": round(seconds, 1)}), flush=True
                )


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
