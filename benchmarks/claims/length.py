"""Train small models at one context length and read on: held-out loss at that length and at multiples of it.

Taipan, Mamba-2, a hybrid of Mamba-2 and full attention, and a Transformer, of equal size (`length_models.py`), are
trained on the same real text at the same length, with the same batches, optimiser and schedule. Each learning rate is
tuned by the same search from the same start, in shorter runs, judged by the loss of one part of the held-out text at
the training length. The best is run with every seed and judged by the rest of the held-out text: at the training length
and at multiples of it, with the same targets at every length (`length_evaluation.py`). So a curve that rises is a model
that reads worse with more text before it.

Claims to check (arXiv 2410.18572, figure 1a, at 0.2 to 1.3 billion parameters): beyond the training length Taipan's
loss stays flat, Mamba-2's rises, Transformer and hybrid break.

    python benchmarks/claims/length.py --threads 1
    python benchmarks/claims/length.py --threads 1 --resume benchmarks/results/length-20261127T120000Z.jsonl

`--resume` does not repeat the runs of a file, so one that is cut off loses one run, and seeds or arms may be added.
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
import torch.nn.functional as F
from circumstances import RESULTS, positive
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, held_out_loss, tokens
from length_evaluation import evaluate, windows_of
from length_models import ARMS, make, parameters
from length_plot import draw
from result_file import ResultFile, open_results, search
from torch import Tensor
from tqdm import tqdm

from ssm_zoo.modeling.outputs import add_aux_loss

# What a run is for.
TRIAL, RESULT = "trial", "result"
# Neighbours of a learning rate in the search.
FACTORS = ((0.5,), (2.0,))
# Tokens of a forward of the evaluation, and places that are averaged for the loss by position.
BUDGET, PLACES = 4096, 64


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file. All are judged by the same text."""

    purpose: str
    arm: str
    rate: float
    seed: int
    steps: int
    batch: int
    window: int


def training_loss(model: Any, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy of (B, LENGTH + 1) windows, for Taipan with the capacity loss."""
    output = model(windows[:, :-1], use_cache=False)
    loss = F.cross_entropy(output.logits.float().flatten(0, 1), windows[:, 1:].flatten())
    return add_aux_loss(loss, output, model.config, windows)


@dataclass(frozen=True)
class Data:
    """Data of the runs of a file.

    Attributes:
        train: ids to train on.
        judged: ids that judge learning rates.
        windows: (N, M + 1) windows that judge the result.
        lengths: tokens of context, rising, M the last.
    """

    train: Tensor
    judged: Tensor
    windows: Tensor
    lengths: list[int]


def split(ids: tuple[Tensor, Tensor], judge: int, count: int, multiples: list[int]) -> Data:
    """Return the training ids, the first `judge` held-out ids, and then `count` windows of the longest context.

    Raises:
        ValueError: if the held-out text is too short.
    """
    train, held_out = ids
    lengths = [LENGTH * multiple for multiple in multiples]
    return Data(train, held_out[: judge + 1], windows_of(held_out[judge:], lengths[-1], count), lengths)


def execute(run: Run, data: Data) -> dict[str, Any]:
    """Train, and return the row of the run."""
    start = time.process_time()
    model = make(run.arm, VOCABULARY, run.window, run.seed)
    trainer = Trainer(model, run.rate, run.steps, training_loss)
    losses = []
    bar = tqdm(batches(data.train, run.batch, run.steps, run.seed), total=run.steps, mininterval=2)
    bar.set_description(f"{run.arm}, rate {run.rate:g}, seed {run.seed}")
    for batch in bar:
        losses.append(trainer.step(batch))
    trained = time.process_time() - start
    result: dict[str, Any] = {"judged": held_out_loss(model, data.judged, 32)}
    if run.purpose == RESULT:
        result |= evaluate(model, data.windows, data.lengths, PLACES, BUDGET)
    seconds = {"train_cpu_seconds": trained, "cpu_seconds": time.process_time() - start}
    return {"length": LENGTH, "parameters": parameters(model), "train": losses, **result, **seconds}


def over_seeds(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "low": min(values), "high": max(values)}


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, data: Data, options: argparse.Namespace) -> None:
        self.file, self.data, self.options = file, data, options

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.data))

    def judge(self, trial: Run, rate: float) -> float:
        """Return the loss by which `trial` with this rate is judged."""
        return self.row(dataclasses.replace(trial, rate=rate))["judged"]

    def arm(self, arm: str) -> dict[str, Any]:
        """Run everything of one arm and return its summary."""
        options = self.options
        trial = Run(TRIAL, arm, 0.0, 0, options.trial_steps, options.batch, options.window)
        (rate,) = search(partial(self.judge, trial), (options.rate,), FACTORS)
        run = dataclasses.replace(trial, purpose=RESULT, rate=rate, steps=options.steps)
        rows = [self.row(dataclasses.replace(run, seed=seed)) for seed in options.seeds]
        lengths = list(rows[0]["held_out"])
        places = {length: [row["by_position"][length] for row in rows] for length in lengths}
        summary: dict[str, Any] = {
            "purpose": "summary",
            "arm": arm,
            "length": rows[0]["length"],
            "lengths": [int(length) for length in lengths],
            "parameters": rows[0]["parameters"],
            "rate": rate,
            "seeds": options.seeds,
            "steps": options.steps,
            "held_out": {length: over_seeds([row["held_out"][length] for row in rows]) for length in lengths},
            "change": {length: over_seeds([row["change"][length]["mean"] for row in rows]) for length in lengths},
            "by_position": {
                length: [mean(values) for values in zip(*found, strict=True)] for length, found in places.items()
            },
        }
        if "selection_rate" in rows[0]:
            chosen = {length: [row["selection_rate"][length] for row in rows] for length in lengths}
            summary["selection_rate"] = {length: over_seeds(values) for length, values in chosen.items()}
        return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="length.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arm", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--rate", type=float, default=6e-3, help="learning rate that the search starts from")
    parser.add_argument("--trial-steps", type=positive, default=250, help="steps of a trial")
    parser.add_argument("--steps", type=positive, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the best rate; trials have 0")
    parser.add_argument("--batch", type=positive, default=4, help=f"windows of {LENGTH} tokens a step")
    parser.add_argument("--window", type=positive, default=LENGTH // 2, help="tokens that a query of Taipan sees")
    parser.add_argument("--multiples", type=positive, nargs="+", default=[1, 2, 4, 8], help=f"of {LENGTH} tokens")
    parser.add_argument("--judge", type=positive, default=8 * 1024, help="held-out tokens that judge learning rates")
    parser.add_argument("--windows", type=positive, default=30, help="longest windows of the held-out text after them")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="continue this result file, of equal --multiples, --judge and --windows",
    )
    options = parser.parse_args(arguments)
    options.multiples = sorted(set(options.multiples))
    if options.multiples[0] != 1 or any(options.multiples[-1] % multiple for multiple in options.multiples):
        parser.error(f"--multiples must begin with 1 and each divide the last, got {options.multiples}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    free = ("arm", "rate", "trial_steps", "steps", "seeds", "batch", "window", "threads")
    file = open_results(options, parser, "claims/length.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary" and row["arm"] in options.arm)
    data = split(tokens(), options.judge, options.windows, options.multiples)
    comparison = Comparison(file, data, options)
    for arm in options.arm:
        summary = file.add(comparison.arm(arm))
        print(json.dumps({key: summary[key] for key in ("arm", "rate", "held_out", "change")}, indent=1), flush=True)
        draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
