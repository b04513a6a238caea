"""Compare the plan of a distillation, printed before it starts, with the memory and time that the run takes.

Three sizes of random Llama teachers and five students, each run in a process of its own on the CPU: discrete Mamba-2
in every second layer (hidden-state alignment, then logit distillation of all weights), the same with a sequential
calibration and a refit by ridge regression, the same in all layers, half of which wait for the second stage (logit
distillation of all weights in both), and attention over a bounded memory in all layers (logit distillation), with equal
slots and with slots that are divided among the heads. WikiText-2, a tokenizer learnt from it. A row has the planned
peak of the resident memory and the measured one, and the planned and measured seconds of the division of slots, the
calibration, the stages (with refits) and the evaluations. All seconds are CPU time, of one thread: other programs on
the machine change it less than the time on the wall.

    python benchmarks/claims/run_plan.py

The file is rewritten after each run. `--resume FILE` continues it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS
from result_file import open_results
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ssm_zoo.distill import measuring, plan_fits
from ssm_zoo.distill import run as running
from ssm_zoo.distill.data import read_texts
from ssm_zoo.distill.plan import RunPlan
from ssm_zoo.distill.recipe import parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.training import trainer

# Width, layers, heads, key-value heads, vocabulary; batch and length of a step.
SIZES = {
    "tiny": (64, 4, 4, 2, 1024, 4, 128),
    "small": (384, 8, 6, 3, 8192, 4, 256),
    "medium": (768, 12, 12, 4, 16384, 8, 256),
}
MIXERS: dict[str, dict[str, Any]] = {
    "discrete_mamba2": {"layers": "odd", "mixer": "discrete_mamba2"},
    "bounded_attention": {"layers": "all", "mixer": "bounded_attention", "slots": "equal"},
    "stepwise": {"layers": "all", "mixer": "discrete_mamba2"},
    "fitted": {"layers": "odd", "mixer": "discrete_mamba2", "calibration": "sequential", "calibration_tokens": 16384},
    "divided_slots": {"layers": "all", "mixer": "bounded_attention", "slots": "calibrated"},
}
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A run: the size of its teacher, and its mixer."""

    size: str
    mixer: str


def save_teacher(folder: Path, size: str) -> None:
    """Write a random teacher with a tokenizer learnt from WikiText-2."""
    width, layers, heads, groups, vocabulary, *_ = SIZES[size]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(read_texts("builtin:wikitext2", "train"), trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width // heads,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def recipe_of(case: Case, teacher: Path) -> Any:
    """Return the recipe of a run."""
    *_, batch, length = SIZES[case.size]
    stage = {"tokens": STEPS * batch * length, "batch_size": batch, "learning_rate": 1e-4}
    stages = [{**stage, "name": "logits", "objective": "logit_distillation", "train": "all"}]
    if case.mixer in ("discrete_mamba2", "fitted"):
        refit = "ridge" if case.mixer == "fitted" else "none"
        stages.insert(0, {**stage, "name": "align", "objective": "hidden_state_alignment", "refit": refit})
    if case.mixer == "stepwise":
        stages.insert(0, {**stages[0], "name": "half", "layers": "odd"})
    return parse_recipe(
        {
            "teacher": str(teacher),
            "student": MIXERS[case.mixer],
            "data": {"train": "builtin:wikitext2", "heldout": "builtin:wikitext2", "sequence_length": length},
            "stages": stages,
            "evaluation": {
                "tokens": 2048,
                "long_length": 1024,
                "repeat_distances": [416],
                "context_lengths": [512],
                "prefill_limit": 512,
            },
        }
    )


def run_in_this_process(case: Case, teacher: Path, output: Path) -> dict[str, Any]:
    """Return the planned and the measured numbers of a run."""
    clock = SimpleNamespace(monotonic=time.process_time)
    for module in (measuring, plan_fits, trainer, running):
        module.time = clock  # pyright: ignore[reportAttributeAccessIssue]
    plans: list[RunPlan] = []

    def on_plan(plan: RunPlan) -> bool:
        plans.append(plan)
        return True

    report = distill(recipe_of(case, teacher), output, command="run_plan", on_plan=on_plan)
    (plan,) = plans
    measured = report["peak_memory_bytes"]
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    return {
        "parameters": report["teacher"]["parameters"],
        "planned_bytes": plan.peak,
        "measured_bytes": measured,
        "ratio": plan.peak / measured,
        "planned_seconds": {stage.name: stage.seconds for stage in plan.stages},
        "measured_seconds": seconds,
        "planned_preparation_seconds": {"slots": plan.slots_seconds, "calibration": plan.calibration_seconds},
        "measured_preparation_seconds": {"slots": 0.0, **report["preparation"]},
        "planned_evaluation_seconds": plan.evaluation_seconds,
        "measured_evaluation_seconds": sum(row["seconds"] for row in report["evaluations"]),
        "plan": plan.as_mapping(),
    }


def run_alone(case: Case) -> dict[str, Any]:
    """Run in a new process, whose peak memory is that of this run only."""
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder) / "teacher", case.size)
        command = [sys.executable, __file__, "--alone", case.size, case.mixer, folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{case.size} {case.mixer}: planned / measured peak {found['ratio']:.3f}", flush=True)
    return found


def main(arguments: list[str]) -> None:
    """Run the cases that the result file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes of the teacher")
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS), help="students")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--resume", type=Path, help="result file to continue")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--alone", nargs=3, metavar=("SIZE", "MIXER", "FOLDER"), help="one run, in this process")
    options = parser.parse_args(arguments)
    if options.alone:
        size, mixer, folder = options.alone
        found = run_in_this_process(Case(size, mixer), Path(folder) / "teacher", Path(folder) / "run")
        print(json.dumps(found))
        return
    free = ("sizes", "mixers", "alone")
    results = open_results(options, parser, "claims/run_plan.py", arguments, free=free)
    for size in options.sizes:
        for mixer in options.mixers:
            results.run(Case(size, mixer), run_alone)


if __name__ == "__main__":
    main(sys.argv[1:])
