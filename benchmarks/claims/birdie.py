"""Do objectives for recall help a state-space model to look up numbers? Phone books of 32 to 256 entries.

Birdie (arXiv 2411.01030) claims that a mixture of training objectives, at rates that a bandit chooses, and inputs that
are read in both directions close most of the gap between state-space models and Transformers in retrieval. Here
Mamba-2 reads phone books with looked-up numbers (`birdie_task.py`): as next tokens, as samples of the fixed mixture of
`ssm-zoo train --objectives birdie`, or at the rates of its bandit, causally or with inputs in both directions.

All arms have rows of equally many tokens, and equally many parameters. The learning rate of every arm is the one of
`--rates`, the same for all, with the lowest loss of the numbers of validation books after `--tuning-steps`, with a seed
of its own; it is run with the other seeds, and judged by fresh books. Chance is printed: a number at random, and the
book's most frequent number; so are the verdicts of `birdie_claims.py`.

    python benchmarks/claims/birdie.py --threads 1
    python benchmarks/claims/birdie.py --threads 1 --resume benchmarks/results/birdie-20261130T120000Z.jsonl

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
`--plan` prints the runs that are left.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from birdie_claims import verdicts
from birdie_plot import draw_results, table
from birdie_task import ARMS, BANDIT, CAUSAL, FIXED, NEXT, PREFIX, Model, PhoneBooks, answer, mixture
from circumstances import RESULTS, positive
from from_scratch_training import Trainer
from result_file import ResultFile, open_results
from torch import Tensor
from tqdm import tqdm

from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.objective_rates import Rates
from ssm_zoo.training.objective_rows import ObjectiveStream
from ssm_zoo.training.objective_settings import ObjectiveMix
from ssm_zoo.training.objective_trainer import losses_by
from ssm_zoo.training.packing import RowCollator

TUNING, RESULT = "tuning", "result"
# The objectives alone, and all of Birdie.
DEFAULT = [f"{NEXT}, {CAUSAL}", f"{FIXED}, {CAUSAL}", f"{BANDIT}, {CAUSAL}", f"{BANDIT}, {PREFIX}"]
# CPU seconds of a step, on one thread of an AMD EPYC with other work on the machine (2026-11-30).
SECONDS = {arm: 0.36 if arm.endswith(PREFIX) else 0.19 for arm in ARMS}
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
    "cpu": Size(
        PhoneBooks((32, 64, 128, 256), 64, 256, 256, easier=(2, 4, 8, 16)),
        *(Model(96, 2, 64, 32), 1200, 4, 2000),
    ),
    "small": Size(PhoneBooks((8, 16, 32), 8, 64, 32, 64), Model(64, 2, 32, 16), row=340, batch=16, steps=1500),
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

    def assess(judges: dict[int, Tensor], name: str = "validation") -> dict[str, dict[str, float]]:
        answers = {str(entries): answer(model, task, entries, part) for entries, part in judges.items()}
        return {
            name: {entries: of.accuracy for entries, of in answers.items()},
            f"{name}_loss": {entries: of.loss for entries, of in answers.items()},
        }

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
            curve.append({"step": step, **assess(validation), "losses": losses, "rates": now})
            sums, counts = [0.0] * loss.count, [0.0] * loss.count
    seconds = time.process_time() - start
    result = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens}
    fresh = assess(books(FRESH, options.fresh), "fresh") if run.purpose == RESULT else {}
    return {**result, **fresh, "curve": curve, "cpu_seconds": seconds}


def judged(row: dict[str, Any]) -> float:
    """Return the loss of the numbers of the validation books at the end: it falls before many are right."""
    return mean(row["curve"][-1]["validation_loss"].values())


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, options: argparse.Namespace) -> None:
        self.file, self.size, self.options = file, SIZES[options.size], options

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.size, self.options))

    def trials(self, arm: str) -> list[Run]:
        """Return the runs that choose the learning rate of an arm."""
        options = self.options
        steps = options.tuning_steps or self.steps // 3
        shared = {"size": options.size, "initializer_range": options.range, "batch": options.batch or self.size.batch}
        return [Run(TUNING, arm=arm, rate=rate, seed=0, steps=steps, **shared) for rate in options.rates]

    @property
    def steps(self) -> int:
        """Steps of a run that is compared."""
        return self.options.steps or self.size.steps

    def plan(self) -> str:
        """Return the runs that the file does not have, and their steps."""
        left: dict[str, int] = {}
        count = 0
        for arm in self.options.arms:
            trials = [run for run in self.trials(arm) if not self.file.find(dataclasses.asdict(run))]
            # The rate is not known before the tuning.
            wanted = {"purpose": RESULT, "arm": arm, "size": self.options.size, "steps": self.steps}
            seeds = [seed for seed in self.options.seeds if not self.file.find({**wanted, "seed": seed})]
            left[arm] = sum(run.steps for run in trials) + len(seeds) * self.steps
            count += len(trials) + len(seeds)
        return f"{count} runs: {self.file.prediction(left, SECONDS)}"

    def summary(self) -> dict[str, Any]:
        """Tune every arm and train it with every seed; returns the summary."""
        options, task = self.options, self.size.task
        arms: dict[str, Any] = {}
        for arm in options.arms:
            best = min(self.trials(arm), key=lambda trial: judged(self.row(trial)))
            trial = dataclasses.replace(best, purpose=RESULT, steps=self.steps)
            runs = [dataclasses.replace(trial, seed=seed) for seed in options.seeds]
            arms[arm] = {"rate": trial.rate, **summary_of([self.row(run) for run in runs])}
        shared = {"size": options.size, "initializer_range": options.range, "steps": self.steps}
        shared["batch"] = options.batch or self.size.batch
        chance = {str(entries): task.chance(entries) for entries in task.entries}
        return {"purpose": "summary", **shared, "seeds": options.seeds, "chance": chance, "arms": arms}


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters and tokens of the runs of an arm, and for each number of entries the accuracy on fresh
    books."""
    summary: dict[str, Any] = {"parameters": rows[0]["parameters"], "tokens": mean(row["tokens"] for row in rows)}
    for entries in rows[0]["fresh"]:
        found = [row["fresh"][entries] for row in rows]
        summary[entries] = {"mean": mean(found), "low": min(found), "high": max(found), "seeds": found}
    return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="birdie.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="small: books of 8 to 32 entries")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=DEFAULT)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2], help="learning rates to try")
    parser.add_argument("--range", type=float, default=0.05, help="initializer_range of all arms")
    parser.add_argument("--steps", type=positive, help="the size's if not given")
    parser.add_argument("--tuning-steps", type=positive, help="a third of the steps if not given")
    parser.add_argument("--batch", type=positive, help="rows of a step; the size's if not given")
    parser.add_argument("--documents", type=positive, default=80000, help="documents to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; tuning has 0")
    parser.add_argument("--evaluate-every", type=positive, default=200, help="steps")
    parser.add_argument("--validation", type=positive, default=8, help="books of each number of entries")
    parser.add_argument("--fresh", type=positive, default=64, help="books of each number of entries")
    parser.add_argument("--plan", action="store_true", help="print the runs that are left, and run nothing")
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file, of equal --size")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    size.model.make(PREFIX, size.task.vocabulary, options.range, 0)  # sizes that do not fit are an error now
    free = ("arms", "rates", "range", "steps", "tuning_steps", "batch", "seeds", "threads")
    file = open_results(options, parser, "claims/birdie.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    comparison = Comparison(file, options)
    if options.plan:
        print(comparison.plan())
        return
    summary = comparison.summary()
    summary = file.add({**summary, "claims": verdicts(summary)})
    print(table(summary))
    for found in summary["claims"]:
        print(f"{found['verdict']}: {found['text']} {'; '.join(found['because'])}")
    draw_results(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
