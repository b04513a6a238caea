"""Do objectives for recall help a state-space model to look up numbers? Phone books of 32 to 256 entries.

Birdie (arXiv 2411.01030) claims that a mixture of training objectives, at rates that a bandit chooses, and inputs that
are read in both directions close most of the gap between state-space models and Transformers in retrieval. Here
Mamba-2 reads phone books with looked-up numbers (`birdie_task.py`): as next tokens, as samples of the fixed mixture of
`ssm-zoo train --objectives birdie`, or at the rates of its bandit, causally or with inputs in both directions.

All arms read as many tokens of equally many parameters. The learning rate of every arm is found by the same search from
the same start, in full runs with a seed of their own, judged by validation books; the best one is run with the other
seeds, and judged by fresh books. Chance is printed: a number at random, and a number of the book at random.

    python benchmarks/claims/birdie.py --threads 1
    python benchmarks/claims/birdie.py --threads 1 --resume benchmarks/results/birdie-20261130T120000Z.jsonl

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
from birdie_plot import draw_results, table
from birdie_task import ARMS, PREFIX, Model, PhoneBooks, accuracy, mixture
from circumstances import RESULTS, positive
from from_scratch_training import Trainer
from result_file import ResultFile, open_results, search
from torch import Tensor
from tqdm import tqdm

from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.objective_rates import Rates
from ssm_zoo.training.objective_rows import ObjectiveStream
from ssm_zoo.training.objective_settings import ObjectiveMix
from ssm_zoo.training.objective_trainer import losses_by
from ssm_zoo.training.packing import RowCollator

TUNING, RESULT = "tuning", "result"
# Neighbours of a rate in the search.
FACTORS = ((0.5,), (2.0,))
# Seeds of the books that judge settings and results; those that train have the run's.
VALIDATION, FRESH = 10**6, 10**6 + 1


@dataclass(frozen=True)
class Size:
    """The task, the models, tokens of a row, rows of a step, and steps."""

    task: PhoneBooks
    model: Model
    row: int
    batch: int
    steps: int


SIZES = {
    "cpu": Size(PhoneBooks((32, 64, 128, 256), 16, 32), Model(128, 4, 64, 32), row=2200, batch=4, steps=2000),
    "small": Size(PhoneBooks((8, 16, 32), 8, 16, 64), Model(64, 2, 32, 16), row=340, batch=16, steps=1500),
}


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file."""

    purpose: str
    size: str
    arm: str
    rate: float
    initializer_range: float
    seed: int
    steps: int
    batch: int


class _Loss:
    """The loss of a batch, which keeps the part of each objective."""

    def __init__(self, mix: ObjectiveMix) -> None:
        self.count, self.parts = len(mix.objectives), torch.zeros(2, len(mix.objectives))

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "objective"}
        outputs = model(**inputs, use_cache=False)
        self.parts = losses_by(batch["objective"], outputs.logits.detach(), batch["labels"], self.count)
        return outputs.loss


def execute(run: Run, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Train and assess, and return the run's row."""
    objectives, direction = ARMS[run.arm]
    task, mix = size.task, mixture(objectives, run.steps)
    documents = task.documents(options.documents, torch.Generator().manual_seed(run.seed))
    rows = ObjectiveStream(
        documents,
        mix,
        task.tokens,
        size.row,
        step_rows=run.batch,
        seed=run.seed,
        prefixes=direction == PREFIX,
    )
    rates, loss, collate = Rates(mix, run.steps), _Loss(mix), RowCollator()
    rows.rates = rates.at
    model: Any = size.model.make(direction, task.vocabulary, run.initializer_range, run.seed)
    trainer, source = Trainer(model, run.rate, run.steps, loss), iter(rows)

    def books(seed: int, count: int) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {entries: task.draw(entries, count, generator) for entries in task.entries}

    def assess(judges: dict[int, Tensor]) -> dict[str, float]:
        return {str(entries): accuracy(model, task, entries, part) for entries, part in judges.items()}

    validation, tokens = books(VALIDATION, options.validation), 0
    curve, sums, counts, start = [], [0.0] * loss.count, [0.0] * loss.count, time.process_time()
    for step in tqdm(
        range(1, run.steps + 1), desc=f"{run.arm}, {run.purpose}, {run.rate:g}, seed {run.seed}", mininterval=5
    ):
        batch = collate([next(source) for _ in range(run.batch)])
        tokens += int((batch["seq_idx"] >= 0).sum())
        trainer.step(batch)
        parts = loss.parts.tolist()
        rates.add(*parts)
        rates.end_of_step(step)
        sums = [total + part for total, part in zip(sums, parts[0], strict=True)]
        counts = [total + part for total, part in zip(counts, parts[1], strict=True)]
        if step % options.evaluate_every == 0 or step == run.steps:
            losses = {n: s / c for n, s, c in zip(mix.names, sums, counts, strict=True) if c}
            now = dict(zip(mix.names, rates.at(step), strict=True))
            curve.append({"step": step, "validation": assess(validation), "losses": losses, "rates": now})
            sums, counts = [0.0] * loss.count, [0.0] * loss.count
    seconds = time.process_time() - start
    result = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens}
    return {**result, "fresh": assess(books(FRESH, options.fresh)), "curve": curve, "cpu_seconds": seconds}


def judged(row: dict[str, Any]) -> float:
    """Return the share of wrong answers to the validation books at the end."""
    return 1 - mean(row["curve"][-1]["validation"].values())


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, options: argparse.Namespace) -> None:
        self.file, self.size, self.options = file, SIZES[options.size], options

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.size, self.options))

    def judge(self, run: Run, rate: float) -> float:
        """Return the number by which `run` with this rate is judged."""
        return judged(self.row(dataclasses.replace(run, rate=rate)))

    def summary(self) -> dict[str, Any]:
        """Tune every arm and train it with every seed; returns the summary."""
        options, task = self.options, self.size.task
        shared: dict[str, Any] = {
            "size": options.size,
            "initializer_range": options.range,
            "steps": options.steps or self.size.steps,
            "batch": options.batch or self.size.batch,
        }
        arms: dict[str, Any] = {}
        for arm in options.arms:
            trial = Run(TUNING, arm=arm, rate=options.rate, seed=0, **shared)
            (rate,) = search(partial(self.judge, trial), (options.rate,), FACTORS)
            runs = [dataclasses.replace(trial, purpose=RESULT, rate=rate, seed=seed) for seed in options.seeds]
            arms[arm] = {"rate": rate, **summary_of([self.row(run) for run in runs])}
        chance = {str(entries): task.chance(entries) for entries in task.entries}
        return {"purpose": "summary", **shared, "seeds": options.seeds, "chance": chance, "arms": arms}


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters and tokens of the runs of an arm, and for each number of entries the accuracy on fresh
    books."""
    summary: dict[str, Any] = {"parameters": rows[0]["parameters"], "tokens": mean(row["tokens"] for row in rows)}
    for entries in rows[0]["fresh"]:
        found = [row["fresh"][entries] for row in rows]
        summary[entries] = {"mean": mean(found), "low": min(found), "high": max(found)}
    return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="birdie.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="small: books of 8 to 32 entries")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate that the search starts from")
    parser.add_argument("--range", type=float, default=0.05, help="initializer_range of all arms")
    parser.add_argument("--steps", type=positive, help="the size's if not given")
    parser.add_argument("--batch", type=positive, help="rows of a step; the size's if not given")
    parser.add_argument("--documents", type=positive, default=20000, help="documents to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; tuning has 0")
    parser.add_argument("--evaluate-every", type=positive, default=100, help="steps")
    parser.add_argument("--validation", type=positive, default=32, help="books of each number of entries")
    parser.add_argument("--fresh", type=positive, default=128, help="books of each number of entries")
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file, of equal --size")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    size.model.make(PREFIX, size.task.vocabulary, options.range, 0)  # sizes that do not fit are an error now
    free = ("arms", "rate", "range", "steps", "batch", "seeds", "threads")
    file = open_results(options, parser, "claims/birdie.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    summary = file.add(Comparison(file, options).summary())
    print(table(summary))
    print(json.dumps(summary["chance"]))
    draw_results(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
