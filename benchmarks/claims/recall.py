"""Can it recall? Taipan, Mamba-2 and a Transformer of equal size on multi-query associative recall (`recall_task.py`).

Taipan's paper (arXiv 2410.18572) claims that selective attention recalls what a state-space model's fixed state cannot
hold. Here Taipan is a Mamba-2 layer and a layer of selective attention, beside two layers of Mamba-2 with the same
state size, two with a larger one, and two of full attention; all have as many parameters within 2 % (`recall_arms.py`).

Sequences of training are never repeated. Its steps take turns in the number of pairs, from few to as many as have room,
since from many alone a model of any kind learns slowly; Mamba-2's paper raises the number in stages. A run ends where
99 % of the validation queries are answered with every number of pairs, and has its number of steps otherwise. The
learning rate of every arm is found by the same search from the same start, in full runs with a seed of their own,
judged by the validation sequences; the best one is run with the other seeds, and judged by fresh sequences.

    python benchmarks/claims/recall.py --threads 1
    python benchmarks/claims/recall.py --threads 1 --resume benchmarks/results/recall-20261125T120000Z.jsonl
    python benchmarks/claims/recall.py --size paper --device cuda

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from from_scratch_training import Trainer
from recall_arms import ARMS, Sizes, make, parameters
from recall_plot import draw_curves
from recall_task import Task, assess, draw, recall_loss
from result_file import ResultFile, open_results, search
from tqdm import tqdm

from ssm_zoo.kernels.cpu_products import fast_products

# What a run is for.
TUNING, RESULT = "tuning", "result"
# Share of the validation queries at which a run is done.
SOLVED = 0.99
# Neighbours of a rate in the search.
FACTORS = ((0.5,), (2.0,))
# Seeds of the sequences that judge settings and results; those that train have the run's.
VALIDATION, FRESH = 10**6, 10**6 + 1


@dataclass(frozen=True)
class Size:
    """Length of the sequences and numbers of their pairs; sizes of the models; sequences of a step, and steps."""

    length: int
    pairs: list[int]
    models: Sizes
    batch: int
    steps: int


# Pairs are those of Mamba-2's paper: a 32nd, a 16th, an 8th and, on a GPU, a quarter of the length. On a CPU there are
# too few steps for more: with 16 pairs and 512 tokens none of the arms begins to learn within 1,000.
SIZES = {
    "cpu": Size(64, [2, 4, 8], Sizes(128, width=64, state=16, large_state=64, capacity=0.15), batch=32, steps=4000),
    "paper": Size(
        256, [8, 16, 32, 64], Sizes(8192, width=128, state=16, large_state=256, capacity=0.15), batch=256, steps=16000
    ),
}


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file."""

    purpose: str
    length: int
    pairs: list[int]
    vocabulary: int
    state: int
    arm: str
    rate: float
    initializer_range: float
    seed: int
    steps: int
    batch: int


def execute(run: Run, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Train until the validation sequences are solved or the steps are over, and return the run's row."""
    device = torch.device(options.device)
    model = make(run.arm, size.models, run.initializer_range, run.seed).to(device)
    trainer = Trainer(model, run.rate, run.steps, recall_loss)
    tasks = [Task(run.length, pairs, run.vocabulary) for pairs in run.pairs]

    def judges(seed: int, count: int) -> dict[str, Any]:
        generators = [torch.Generator(device).manual_seed(seed) for _ in tasks]
        return {
            str(task.pairs): draw(task, count, generator) for task, generator in zip(tasks, generators, strict=True)
        }

    validation, generator = judges(VALIDATION, options.validation), torch.Generator(device).manual_seed(run.seed)
    solved: dict[str, int | None] = dict.fromkeys(validation)
    losses, curve, start = [], [], time.process_time()
    with tqdm(total=run.steps, desc=f"{run.arm}, {run.purpose}, {run.rate:g}, seed {run.seed}", mininterval=5) as bar:
        for step in range(1, run.steps + 1):
            losses.append(trainer.step(draw(tasks[step % len(tasks)], run.batch, generator)))
            bar.update()
            if step % options.evaluate_every and step != run.steps:
                continue
            point = {pairs: assess(model, batch) for pairs, batch in validation.items()}
            curve.append({"step": step, "loss": mean(losses), "validation": point})
            losses = []
            for pairs, found in point.items():
                if found["accuracy"] >= SOLVED and solved[pairs] is None:
                    solved[pairs] = step
            bar.set_postfix({pairs: f"{found['accuracy']:.3f}" for pairs, found in point.items()})
            if all(found["accuracy"] >= SOLVED for found in point.values()):
                break
    seconds = time.process_time() - start
    fresh = {pairs: assess(model, batch) for pairs, batch in judges(FRESH, options.fresh).items()}
    result = {"parameters": parameters(model), "fresh": fresh, "solved": solved, "trained": curve[-1]["step"]}
    return {**result, "curve": curve, "cpu_seconds": seconds}


def judged(row: dict[str, Any]) -> float:
    """Return the steps to the solution; without one, all steps times one plus the unsolved share."""
    accuracy = [found["accuracy"] for found in row["curve"][-1]["validation"].values()]
    return row["trained"] if min(accuracy) >= SOLVED else row["steps"] * (2 - mean(accuracy))


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, size: Size, options: argparse.Namespace) -> None:
        self.file, self.size, self.options = file, size, options

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.size, self.options))

    def judge(self, run: Run, rate: float) -> float:
        """Return the number by which `run` with this rate is judged."""
        return judged(self.row(dataclasses.replace(run, rate=rate)))

    def summary(self) -> dict[str, Any]:
        """Tune every arm and train it with every seed; returns the summary."""
        options, size = self.options, self.size
        shared: dict[str, Any] = {
            "length": size.length,
            "pairs": size.pairs,
            "vocabulary": size.models.vocabulary,
            "state": size.models.state,
            "initializer_range": options.range,
            "steps": options.steps or size.steps,
            "batch": options.batch or size.batch,
        }
        arms: dict[str, Any] = {}
        for arm in options.arms:
            trial = Run(TUNING, arm=arm, rate=options.rate, seed=0, **shared)
            (rate,) = search(partial(self.judge, trial), (options.rate,), FACTORS)
            runs = [dataclasses.replace(trial, purpose=RESULT, rate=rate, seed=seed) for seed in options.seeds]
            arms[arm] = {"rate": rate, **summary_of([self.row(run) for run in runs])}
        return {"purpose": "summary", **shared, "seeds": options.seeds, "arms": arms}


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of the runs of an arm: for each number of pairs the accuracy on fresh sequences, the steps to
    the solution of each run, and the mean shares that the gate selects."""
    summary: dict[str, Any] = {"parameters": rows[0]["parameters"]}
    for pairs in rows[0]["fresh"]:
        found = [row["fresh"][pairs] for row in rows]
        accuracy = [values["accuracy"] for values in found]
        numbers = {"mean": mean(accuracy), "low": min(accuracy), "high": max(accuracy)}
        shares = {key: mean(values[key] for values in found) for key in found[0] if key != "accuracy"}
        summary[pairs] = {**numbers, "solved": [row["solved"][pairs] for row in rows], **shares}
    return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="recall.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="paper: that of Mamba-2's paper, for a GPU")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument(
        "--states", type=positive, nargs=2, metavar=("N", "LARGE"), help="states of Mamba-2, and larger ones"
    )
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate that the search starts from")
    parser.add_argument("--range", type=float, default=0.05, help="initializer_range of all arms")
    parser.add_argument("--steps", type=positive, help="of a run that does not solve its task; the size's if not given")
    parser.add_argument("--batch", type=positive, help="sequences of a step; the size's if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; tuning has 0")
    parser.add_argument("--evaluate-every", type=positive, default=50, help="steps")
    parser.add_argument(
        "--validation", type=positive, default=128, help="sequences of each number of pairs, which end a run"
    )
    parser.add_argument(
        "--fresh", type=positive, default=512, help="sequences of each number of pairs, which judge results"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="continue this result file, of equal --size and --states"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    if options.states is not None:
        state, large = options.states
        size = dataclasses.replace(size, models=dataclasses.replace(size.models, state=state, large_state=large))
    for arm in options.arms:
        make(arm, size.models, options.range, 0)  # before anything is written: sizes that do not fit are an error
    free = ("arms", "rate", "range", "steps", "batch", "seeds", "threads")
    file = open_results(options, parser, "claims/recall.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    print(json.dumps(file.add(Comparison(file, size, options).summary()), indent=1))
    draw_curves(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
