"""Compare ways to train a student with a bounded memory: equal start, tokens, order of the texts and evaluation.

All start from the recipe `zoo`: every layer converted, 340 rows of 8 bits per key-value head, slots divided on training
windows drawn by the seed. Each trains on `--tokens` tokens in windows of 2,048, one a step.

    none             no training
    ridge            no training: output projections fitted to the teacher's in closed form, on as many tokens
    sequential       no training: output and down projections fitted layer after layer, on the same number of tokens
    forward          KL(teacher || student): the recipe
    reverse          KL(student || teacher)
    layers           the output of each converted attention, on the teacher's hidden states
    own stream       the same on the student's own hidden states
    last state       the last hidden states, end to end
    MLPs             the forward KL; norms, MLPs and embeddings are trained too, at a tenth of the rate
    teacher's text   the forward KL on continuations that the teacher wrote
    both             the sequential fit, then the forward KL, each on the same tokens

The learning rate of a way is the one out of `--rates`, the same for all, with the lowest KL on a held-out window that
the comparison does not use, after half of the tokens, with the first seed. Scores: loss gap, KL and agreement on 6,144
tokens of WikiText-2's held-out text in windows of 2,048, and the loss on a passage that was read 416 and 1,500 tokens
before.

    python benchmarks/claims/memory_training.py TEACHER --threads 1 --work FOLDER

A row is written after each run. `--resume FILE` continues the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from accelerate import PartialState
from bounded_memory import TOKENS, scores
from circumstances import RESULTS, positive
from result_file import open_results

from ssm_zoo.distill.calibrate import calibrate
from ssm_zoo.distill.data import TokenWindows, read_texts, tokenize
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.pseudo_labels import pseudo_labels
from ssm_zoo.distill.recipe import Recipe, parse_recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.slots import WINDOWS, divide_slots
from ssm_zoo.distill.student import build_student, set_slots
from ssm_zoo.distill.teacher import Teacher, load_teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model
from ssm_zoo.harness.whole_files import write_text_whole
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.trainer import train_or_load

LENGTH = 2048
DISTILLATION = {"objective": "logit_distillation"}
CLOSED_FORM = ("none", "ridge", "sequential")  # values of `student.calibration`
WAYS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(CLOSED_FORM, DISTILLATION),  # the stage is skipped
    "forward": DISTILLATION,
    "reverse": {**DISTILLATION, "kl": "reverse"},
    "layers": {"objective": "hidden_state_alignment"},
    "own stream": {"objective": "hidden_state_alignment", "stream": "student"},
    "last state": {"objective": "last_state_alignment"},
    "MLPs": {**DISTILLATION, "train": "all"},
    "teacher's text": {**DISTILLATION, "text": "teacher"},
    "both": DISTILLATION,
}


@dataclass
class Run:
    """A run: what tells it from all others in the file."""

    way: str
    purpose: str  # "tuning" or "comparison"
    learning_rate: float
    seed: int


@dataclass
class Setting:
    """Teacher, texts, folder and training tokens, the same for all runs."""

    teacher: Teacher
    name: str  # of the teacher
    train: TokenWindows
    held_out: TokenWindows
    work: Path
    tokens: int

    def tokens_of(self, run: Run) -> int:
        """Return the tokens that a run reads: half of them in the search for a rate."""
        return self.tokens // 2 if run.purpose == "tuning" else self.tokens

    def recipe(self, run: Run) -> Recipe:
        """Return the recipe of a run."""
        values = load_recipe(
            "zoo", [f"{key}=builtin:wikitext2" for key in ("data.train", "data.heldout")] + ["teacher=x"]
        )
        mapping = values.model_dump(exclude_unset=True)
        common = {"name": "stage", "tokens": self.tokens_of(run), "sequence_length": LENGTH, "batch_size": 1}
        rates = {"learning_rate": run.learning_rate or 1.0}
        if run.way == "MLPs":
            rates["other_learning_rate"] = run.learning_rate / 10
        mapping["stages"] = [{**common, **rates, **WAYS[run.way]}]
        mapping["data"]["sequence_length"] = LENGTH
        if run.way in (*CLOSED_FORM, "both"):
            fit = "sequential" if run.way == "both" else run.way
            mapping["student"] |= {"calibration": fit, "calibration_tokens": self.tokens}
        if run.way == "teacher's text":
            mapping["data"]["pseudo_labels"] = {"tokens": self.tokens, "batch_size": 2}
        return parse_recipe({**mapping, "seed": run.seed, "checkpoint_every": 10**6})


def start(recipe: Recipe, setting: Setting) -> Any:
    """Return an untrained student with the slots of the recipe's seed, which are divided once and kept in a file."""
    teacher = setting.teacher
    layers = list(range(teacher.num_layers))
    student = build_student(teacher, recipe.student, layers, seed=recipe.seed)
    file = setting.work / f"slots-{setting.name}-{recipe.seed}.json"
    if not file.exists():
        settings = student.config.settings_of("bounded_attention")
        windows = setting.train.batch(0, WINDOWS, LENGTH, recipe.seed + 1)
        write_text_whole(file, json.dumps(divide_slots(teacher, layers, settings, recipe.student.rows, windows)))
    set_slots(student, *json.loads(file.read_text()))
    return student


def trained(student: Any, recipe: Recipe, setting: Setting) -> Any:
    """Return the student after the recipe's stage."""
    state, windows = PartialState(), setting.train
    if recipe.data.pseudo_labels is not None:  # the same text for all rates of a seed
        folder = setting.work / f"text-{setting.name}-{recipe.seed}-{setting.tokens}"
        folder.mkdir(parents=True, exist_ok=True)
        windows = pseudo_labels(recipe, setting.teacher, windows, folder, contextlib.nullcontext, state)
    layers, device = list(range(setting.teacher.num_layers)), torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=setting.work) as place:
        trainer = Distiller(
            student, setting.teacher, layers, windows, recipe, 0, Path(place), state.num_processes, device, {}
        )
        model, _ = train_or_load(trainer, None, recipe.stages[0].steps)
    return model.student.eval()


def measure(run: Run, setting: Setting) -> dict[str, Any]:
    """Train and score a run; `kl` is None if the training diverged."""
    recipe = setting.recipe(run)
    student = start(recipe, setting)
    started = time.process_time()
    windows = setting.train.batch(0, setting.tokens // LENGTH, LENGTH, run.seed + 1)
    layers = list(range(setting.teacher.num_layers))
    calibrate(student, setting.teacher, recipe.student, layers, windows, batch_size=1)
    if run.way not in CLOSED_FORM:
        try:
            student = trained(student, recipe, setting)
        except ValueError as error:
            if "Lower learning_rate" not in str(error):
                raise
            return {"diverged": str(error), "kl": None}
    seconds = time.process_time() - started
    used = {"read_tokens": 0 if run.way == "none" else setting.tokens_of(run), "cpu_seconds": round(seconds, 1)}
    if run.purpose == "tuning":
        after = TOKENS // LENGTH  # after the comparison's windows
        windows = setting.held_out.windows(LENGTH)[after : after + 1]
        return {
            "kl": evaluate_language_model(student, windows, teacher=setting.teacher.model, batch_size=1)["kl"],
            **used,
        }
    found = scores(student, setting.teacher, setting.held_out, [LENGTH])
    row = found["by_length"][LENGTH]
    kept = {name: row[name] for name in ("kl", "top1_agreement", "gap", "teacher_loss", "tokens")}
    return {**kept, "repeat_loss": found["repeat_loss"], **used}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=positive, default=8192, help="training tokens of a run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--work", type=Path, required=True, help="folder for slots and the teacher's text")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    free = ("ways", "seeds", "threads", "rates")
    results = open_results(options, parser, "claims/memory_training.py", arguments, free=free)
    teacher = load_teacher(options.teacher)
    train, held_out = (
        TokenWindows(tokenize(read_texts("builtin:wikitext2", split), teacher.tokenizer))
        for split in ("train", "heldout")
    )
    options.work.mkdir(parents=True, exist_ok=True)
    setting = Setting(teacher, Path(options.teacher).name, train, held_out, options.work, options.tokens)

    def row_of(*run: Any) -> dict[str, Any]:
        row = results.run(Run(*run), lambda run: measure(run, setting))
        print(
            {key: row.get(key) for key in ("way", "purpose", "learning_rate", "seed", "kl", "repeat_loss")}, flush=True
        )
        return row

    for way in options.ways:
        rate = 0.0
        if way not in CLOSED_FORM:
            tried = [row_of(way, "tuning", rate, options.seeds[0]) for rate in options.rates]
            finite = [row for row in tried if row["kl"] is not None]
            if not finite:
                raise SystemExit(f"{way} diverges with all --rates {options.rates}: give lower ones")
            rate = min(finite, key=lambda row: row["kl"])["learning_rate"]
        for seed in options.seeds:
            row_of(way, "comparison", rate, seed)


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
