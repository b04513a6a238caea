"""Run the synthetic tests of the papers: copying, induction heads, needles, counting, functions learned in context.

The tasks, their sizes, arms and thresholds are in `synthetic_table.py`, with the claims that they judge; multi-query
associative recall is in `recall.py`. Sequences of training are never repeated. A run ends where the validation
sequences are solved, and has its number of steps otherwise. The learning rate of every arm of a task is found by the
same search from the same start, in full runs with a seed of their own; the best one is run with the other seeds and
judged by fresh sequences, longer ones too where a task asks for them. There is no weight decay, as in the papers.
Verdicts are computed from these scores.

    python benchmarks/claims/synthetic.py --tasks selective_copying copying induction_heads --threads 1
    python benchmarks/claims/synthetic.py --threads 1 --minutes 30 --resume benchmarks/results/synthetic-DATE.jsonl

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and tasks may be added.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import torch.nn.functional as F
from circumstances import RESULTS, positive
from from_scratch_training import Trainer
from result_file import ResultFile, open_results, search
from synthetic_arms import ARMS, SequenceModel, make, parameters
from synthetic_claims import NOT_RUN
from synthetic_functions import Examples, VectorRetrieval
from synthetic_plot import draw_results
from synthetic_table import CLAIMS, SETTINGS, AnyTask
from synthetic_tasks import Batch
from torch import Tensor
from tqdm import tqdm

from ssm_zoo.kernels.cpu_products import fast_products

# Purposes of a run.
TUNING, RESULT = "tuning", "result"
# Neighbours of a rate in the search.
FACTORS = ((0.5,), (2.0,))
# Seeds of the sequences that judge settings and results; those that train have the run's.
VALIDATION, FRESH = 10**6, 10**6 + 1
# Tokens of a chunk in long tests, and of the sequences that are assessed at a time.
CHUNK, PART = 1024, 2**15


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file."""

    purpose: str
    task: str
    sizes: dict[str, Any]
    arm: str
    width: int
    rate: float
    seed: int
    steps: int
    batch: int


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Return the mean cross-entropy in nats, or the mean squared error, of the answers that are asked for."""
    answers, targets = model(batch.inputs)[batch.asked].float(), batch.targets[batch.asked]
    return F.mse_loss(answers, targets) if targets.is_floating_point() else F.cross_entropy(answers, targets)


def score_of(answers: Tensor, targets: Tensor) -> float:
    """Return the share of right classes; of numbers, 1 minus the squared error in parts of that of the answer 0.

    Args:
        answers: (n, o) numbers, or scores of classes.
        targets: (n, o) numbers, or (n) classes.
    """
    if targets.is_floating_point():
        return 1 - float((answers - targets).square().mean() / targets.square().mean())
    return float((answers.argmax(-1) == targets).float().mean())


@torch.no_grad()
def answers_of(model: SequenceModel, task: AnyTask, batch: Batch) -> Tensor:
    """Return the (B, T, outputs) answers, or (B, 1, outputs) of the last position where no other is asked; sequences
    of more than `CHUNK` tokens are then read in chunks."""
    model.eval()
    found = []
    for inputs in batch.inputs.split(max(PART // batch.inputs.shape[1], 1)):
        whole = not task.last_only or inputs.shape[1] <= CHUNK
        answers = model(inputs) if whole else model.last(inputs, CHUNK)[:, None]
        found.append(answers[:, -1:] if task.last_only else answers)
    model.train()
    return torch.cat(found).float()


def assess(model: SequenceModel, task: AnyTask, batch: Batch) -> float:
    """Return the model's score."""
    if task.last_only:
        return score_of(answers_of(model, task, batch)[:, 0], batch.targets[:, -1])
    return score_of(answers_of(model, task, batch)[batch.asked], batch.targets[batch.asked])


def by_number(answers: Tensor, batch: Batch) -> list[float]:
    """Return the score at each position that is asked in all sequences, in order."""
    positions = batch.asked[0].nonzero()[:, 0].tolist()
    return [score_of(answers[:, place], batch.targets[:, place]) for place in positions]


def judge_result(model: SequenceModel, name: str, arm: str, device: torch.device) -> dict[str, Any]:
    """Return the scores in all tests of a task, those of the estimator beside it, and the scores by the number of
    examples."""
    setting = SETTINGS[name]
    task, tests, baseline = setting.task, {}, {}
    for index, (test, about) in enumerate(setting.tests.items()):
        if about.arms is not None and arm not in about.arms:
            continue
        batch = task.draw(about.count, torch.Generator(device).manual_seed(FRESH + index), **about.options)
        tests[test] = assess(model, task, batch)
        if isinstance(task, Examples | VectorRetrieval):
            baseline[test] = score_of(task.baseline(batch)[batch.asked], batch.targets[batch.asked])
    found: dict[str, Any] = {"tests": tests}
    if isinstance(task, Examples | VectorRetrieval):
        batch = task.draw(512, torch.Generator(device).manual_seed(FRESH + len(setting.tests)))
        found["baseline"] = baseline
        found["by_examples"] = by_number(answers_of(model, task, batch), batch)
        found["baseline_by_examples"] = by_number(task.baseline(batch), batch)
    return found


def execute(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train until the validation sequences are solved or the steps are over, and return the run's row."""
    device, setting = torch.device(options.device), SETTINGS[run.task]
    model = make(run.arm, setting.sizes(), run.seed).to(device)
    trainer = Trainer(model, run.rate, run.steps, loss_of, decay=0.0)
    validation = setting.task.draw(options.validation, torch.Generator(device).manual_seed(VALIDATION))
    generator = torch.Generator(device).manual_seed(run.seed)
    losses, curve, solved, start = [], [], False, time.process_time()
    label = f"{run.task}, {run.arm}, {run.purpose}, {run.rate:g}, seed {run.seed}"
    with tqdm(total=run.steps, desc=label, mininterval=5) as bar:
        for step in range(1, run.steps + 1):
            losses.append(trainer.step(setting.task.draw(run.batch, generator)))
            bar.update()
            if step % options.evaluate_every and step != run.steps:
                continue
            score = assess(model, setting.task, validation)
            curve.append({"step": step, "loss": mean(losses), "score": score})
            losses = []
            bar.set_postfix(score=f"{score:.3f}")
            if solved := setting.solved is not None and score >= setting.solved:
                break
    seconds = time.process_time() - start
    found = judge_result(model, run.task, run.arm, device) if run.purpose == RESULT else {}
    result = {"parameters": parameters(model), "solved": solved, "trained": curve[-1]["step"], **found}
    return {**result, "curve": curve, "cpu_seconds": seconds}


def judged(row: dict[str, Any]) -> float:
    """Return the steps to the solution; without one, all steps times 2 minus the score, which counts from 0 to 1."""
    score = row["curve"][-1]["score"]
    return row["trained"] if row["solved"] else row["steps"] * (2 - min(max(score, 0.0), 1.0))


def chosen(task: str, options: argparse.Namespace) -> list[str]:
    """Return the arms of a task that the command line asks for."""
    return [arm for arm in SETTINGS[task].arms if options.arms is None or arm in options.arms]


class Comparison:
    """The comparison, whose runs are those of a result file.

    Attributes:
        found: the results of each task and arm whose seeds are complete.
    """

    def __init__(self, file: ResultFile, options: argparse.Namespace) -> None:
        self.file, self.options = file, options
        self.found: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.options))

    def judge(self, run: Run, rate: float) -> float:
        """Return the number by which `run` with this rate is judged."""
        return judged(self.row(dataclasses.replace(run, rate=rate)))

    def run(self) -> None:
        """Tune every arm of every task and train it with every seed.

        Raises:
            SystemExit: if the time is up.
        """
        for task in self.options.tasks:
            for arm in chosen(task, self.options):
                self.found[task, arm] = self.results(task, arm)

    def results(self, task: str, arm: str) -> list[dict[str, Any]]:
        """Return the rows of an arm's seeds, after tuning."""
        options, setting = self.options, SETTINGS[task]
        shared: dict[str, Any] = {
            "sizes": dataclasses.asdict(setting.task),
            "width": setting.width,
            "steps": options.steps or setting.steps,
            "batch": options.batch or setting.batch,
        }
        start = options.rate or setting.rate
        trial = Run(TUNING, task=task, arm=arm, rate=start, seed=0, **shared)
        (rate,) = search(partial(self.judge, trial), (start,), FACTORS)
        runs = [dataclasses.replace(trial, purpose=RESULT, rate=rate, seed=seed) for seed in options.seeds]
        return [self.row(run) for run in runs]

    def summary(self) -> dict[str, Any]:
        """Return the scores of all tasks and arms whose seeds are complete, and the verdicts."""
        tasks: dict[str, Any] = {}
        for (task, arm), rows in self.found.items():
            setting = SETTINGS[task]
            about = tasks.setdefault(task, {"chance": setting.task.chance, "solved": setting.solved, "arms": {}})
            tests = {test: [row["tests"][test] for row in rows] for test in rows[0]["tests"]}
            about["arms"][arm] = {
                "rate": rows[0]["rate"],
                "parameters": rows[0]["parameters"],
                "trained": [row["trained"] for row in rows],
                "tests": tests,
            }
            if "baseline" in rows[0]:
                about["baseline"] = rows[0]["baseline"]
        verdicts = [claim.verdict(self.found) for claim in CLAIMS]
        return {"purpose": "summary", "seeds": self.options.seeds, "tasks": tasks, "verdicts": verdicts}


def table(summary: dict[str, Any]) -> str:
    """Return the summary as lines: a line for each task, arm and test, then the verdicts."""
    lines = [f"{'task':20}{'arm':14}{'test':22}{'chance':>8}  score of each seed"]
    for task, about in summary["tasks"].items():
        rows = [(arm, test, scores) for arm, found in about["arms"].items() for test, scores in found["tests"].items()]
        rows += [("(estimator)", test, [score]) for test, score in about.get("baseline", {}).items()]
        for arm, test, scores in rows:
            numbers = "  ".join(f"{score:6.3f}" for score in scores)
            lines.append(f"{task:20}{arm:14}{test:22}{about['chance']:8.3f}  {numbers}")
    for verdict in summary["verdicts"]:
        lines.append(f"{verdict['verdict']}: {verdict['claim']} ({verdict['source']})")
        lines += [f"    {reason}" for reason in verdict["because"] if verdict["verdict"] != NOT_RUN]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="synthetic.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="only these of each task's arms")
    parser.add_argument("--rate", type=float, help="learning rate that the search starts from; the task's if not given")
    parser.add_argument("--steps", type=positive, help="of a run that does not solve its task; the task's if not given")
    parser.add_argument("--batch", type=positive, help="sequences of a step; the task's if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; tuning has 0")
    parser.add_argument("--evaluate-every", type=positive, default=50, help="steps")
    parser.add_argument("--validation", type=positive, default=256, help="sequences that end a run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for task in options.tasks:
        for arm in chosen(task, options):
            make(arm, SETTINGS[task].sizes(), 0)  # before anything is written: sizes that do not fit are an error
    free = ("tasks", "arms", "rate", "steps", "batch", "seeds", "threads")
    file = open_results(options, parser, "claims/synthetic.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    comparison, end = Comparison(file, options), None
    try:
        comparison.run()
    except SystemExit as stop:  # the minutes are over: what is complete is summarised
        end = stop
    summary = comparison.summary()
    file.add(summary)
    print(table(summary))
    draw_results(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")
    if end is not None:
        raise end


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
