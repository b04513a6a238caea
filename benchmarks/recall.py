"""Can it recall? Taipan, Mamba-2 and a Transformer of equal size on multi-query associative recall (`recall_task.py`).

Taipan's paper (arXiv 2410.18572) claims that selective attention recalls what a state-space model's fixed state cannot
hold. Here Taipan is a Mamba-2 layer and a layer of selective attention, beside two layers of Mamba-2 with the same
state size, two with a larger one, and two of full attention; all have as many parameters within 2 % (`recall_arms.py`).

The learning rate of every arm is found by the same search from the same start, in full runs on the task with most
pairs, with a seed of their own, judged by validation sequences. With the best one every task is run with every other
seed, and judged by fresh sequences. Training sequences are never repeated. A run ends where it answers 99 % of the
validation queries, and has its number of steps otherwise.

    python benchmarks/recall.py --threads 1
    python benchmarks/recall.py --threads 1 --resume benchmarks/results/recall-20261125T120000Z.jsonl
    python benchmarks/recall.py --size paper --device cuda

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from circumstances import RESULTS, circumstances, positive
from from_scratch_training import Trainer
from recall_arms import ARMS, Sizes, make, parameters
from recall_plot import draw_curves
from recall_task import Task, assess, draw, recall_loss
from result_file import ResultFile, search
from tqdm import tqdm

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
    """Length of the task and numbers of its pairs; sizes of the models; sequences of a step, and steps."""

    length: int
    pairs: tuple[int, ...]
    models: Sizes
    batch: int
    steps: int


SIZES = {
    "cpu": Size(64, (8, 16), Sizes(512, width=64, state=16, large_state=64, capacity=0.15), batch=64, steps=1000),
    "paper": Size(
        256, (16, 32, 64), Sizes(8192, width=128, state=16, large_state=256, capacity=0.15), batch=256, steps=16000
    ),
}


@dataclass(frozen=True)
class Run:
    """A training run; its fields tell it from every other one of a file."""

    purpose: str
    length: int
    pairs: int
    vocabulary: int
    arm: str
    rate: float
    initializer_range: float
    seed: int
    steps: int
    batch: int


def sequences(run: Run, count: int, seed: int, device: torch.device) -> Any:
    """`count` sequences of the run's task."""
    generator = torch.Generator(device).manual_seed(seed)
    return draw(Task(run.length, run.pairs, run.vocabulary), count, generator)


def execute(run: Run, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Train until the validation sequences are solved or the steps are over, and return the run's row."""
    device = torch.device(options.device)
    model = make(run.arm, size.models, run.initializer_range, run.seed).to(device)
    trainer = Trainer(model, run.rate, run.steps, recall_loss)
    generator = torch.Generator(device).manual_seed(run.seed)
    task = Task(run.length, run.pairs, run.vocabulary)
    validation = sequences(run, options.validation, VALIDATION, device)
    losses, curve, solved, start = [], [], None, time.process_time()
    name = f"{run.pairs} pairs, {run.arm}, {run.purpose}, rate {run.rate:g}, seed {run.seed}"
    with tqdm(total=run.steps, desc=name, mininterval=5) as bar:
        for step in range(1, run.steps + 1):
            losses.append(trainer.step(draw(task, run.batch, generator)))
            bar.update()
            if step % options.evaluate_every == 0 or step == run.steps:
                curve.append({"step": step, "loss": mean(losses), **assess(model, validation)})
                losses = []
                bar.set_postfix(accuracy=f"{curve[-1]['accuracy']:.3f}")
                if curve[-1]["accuracy"] >= SOLVED:
                    solved = step
                    break
    seconds = time.process_time() - start
    fresh = assess(model, sequences(run, options.fresh, FRESH, device))
    return {"parameters": parameters(model), **fresh, "solved": solved, "curve": curve, "cpu_seconds": seconds}


def judged(row: dict[str, Any]) -> float:
    """What judges a setting: the steps to the solution; without one all, and as many more as the part not solved."""
    if row["solved"] is not None:
        return row["solved"]
    return row["steps"] * (2 - row["curve"][-1]["accuracy"])


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, size: Size, options: argparse.Namespace) -> None:
        self.file, self.size, self.options = file, size, options

    def row(self, run: Run) -> dict[str, Any]:
        """The run's row, trained now if the file has none."""
        return self.file.run(run, lambda run: execute(run, self.size, self.options))

    def judge(self, run: Run, rate: float) -> float:
        """What `run` with this rate is judged by."""
        return judged(self.row(dataclasses.replace(run, rate=rate)))

    def tuned(self, arm: str) -> Run:
        """The best run of an arm on the task with most pairs."""
        options, size = self.options, self.size
        run = Run(
            TUNING,
            length=size.length,
            pairs=max(size.pairs),
            vocabulary=size.models.vocabulary,
            arm=arm,
            rate=options.rate,
            initializer_range=options.range,
            seed=0,
            steps=options.steps or size.steps,
            batch=options.batch or size.batch,
        )
        (rate,) = search(partial(self.judge, run), (options.rate,), FACTORS)
        return dataclasses.replace(run, rate=rate)

    def task(self, pairs: int, tuned: list[Run]) -> dict[str, Any]:
        """Train every arm with every seed on the task with so many pairs; returns its summary."""
        arms: dict[str, Any] = {}
        for best in tuned:
            runs = [dataclasses.replace(best, purpose=RESULT, pairs=pairs, seed=seed) for seed in self.options.seeds]
            arms[best.arm] = {"rate": best.rate, **summary_of([self.row(run) for run in runs])}
        shared = {
            key: getattr(tuned[0], key) for key in ("length", "vocabulary", "initializer_range", "steps", "batch")
        }
        return {"purpose": "summary", "pairs": pairs, **shared, "seeds": self.options.seeds, "arms": arms}


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of an arm say together."""
    accuracy = [row["accuracy"] for row in rows]
    numbers = {"mean": mean(accuracy), "low": min(accuracy), "high": max(accuracy)}
    shares = {key: mean(row[key] for row in rows) for key in rows[0] if key.startswith(("selected", "drawn"))}
    return {"parameters": rows[0]["parameters"], **numbers, "solved": [row["solved"] for row in rows], **shares}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="recall.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="paper: that of Mamba-2's paper, for a GPU")
    parser.add_argument("--pairs", type=positive, nargs="+", help="tasks, if not all of the size's")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate that the search starts from")
    parser.add_argument("--range", type=float, default=0.05, help="initializer_range of all arms")
    parser.add_argument("--steps", type=positive, help="of a run that does not solve its task; the size's if not given")
    parser.add_argument("--batch", type=positive, help="sequences of a step; the size's if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; tuning has 0")
    parser.add_argument("--evaluate-every", type=positive, default=25, help="steps")
    parser.add_argument("--validation", type=positive, default=256, help="sequences that end a run and judge settings")
    parser.add_argument("--fresh", type=positive, default=1024, help="sequences that judge results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with this result file, of equal --size")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    for arm in options.arms:
        make(arm, size.models, options.range, 0)  # before anything is written: sizes that do not fit are an error
    now = datetime.now(UTC)
    path = options.resume or options.output / f"recall-{now:%Y%m%dT%H%M%SZ}.jsonl"
    file = ResultFile(path, circumstances(now, "recall.py", arguments))
    wanted = options.pairs or size.pairs
    file.drop(lambda row: row["purpose"] == "summary" and row["pairs"] in wanted)
    comparison = Comparison(file, size, options)
    tuned = [comparison.tuned(arm) for arm in options.arms]
    summaries = [comparison.task(pairs, tuned) for pairs in wanted]
    for summary in summaries:
        print(json.dumps(file.add(summary), indent=1))
    draw_curves(file.rows, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
