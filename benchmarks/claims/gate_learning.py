"""Does Taipan's gate learn which tokens need attention, and does its capacity loss hold the share of them?

The task is recall among fillers (`recall_task.py`): few tokens are queries, and only there attention helps. A Taipan of
a Mamba-2 layer and a layer of selective attention is trained as its paper says, with noise and a capacity loss (arXiv
2410.18572, equation 7; other ways are in `gate_training.py`), and on the way the share of tokens that the gate selects
is measured, on validation sequences, at the queries and elsewhere:

* as it trains, with the gate's noise: the share that the capacity loss is about;
* as it decodes, without: the tokens whose score says that attending is likelier than not.

    python benchmarks/claims/gate_learning.py --threads 1

`--resume` does not repeat the runs of a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import matplotlib
import torch
from circumstances import RESULTS, positive
from from_scratch_training import Trainer
from recall_arms import parameters
from recall_task import Task, assess, draw, recall_loss
from result_file import open_results
from tqdm import tqdm

from ssm_zoo.modeling import TaipanConfig, TaipanForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TASK = Task(length=64, pairs=4, vocabulary=96, fillers=32)
WIDTH = 64
# What is drawn of a curve: keys of its points, their words and colours.
LINES = {"queries": ("queries", "C0"), "all": ("all tokens", "C2"), "rest": ("other tokens", "C1")}
KINDS = {"drawn": "while training, with the gate's noise", "selected": "in decoding, without noise"}
# Sequences that judge have this seed; those that train have the run's.
VALIDATION = 10**6


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file."""

    capacity: float
    weight: float
    rate: float
    seed: int
    steps: int
    batch: int


def make(capacity: float, weight: float, seed: int) -> TaipanForCausalLM:
    """Return a freshly initialised Taipan; `weight` is that of the capacity loss."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": WIDTH, "num_attention_heads": 1}
    sizes |= {"state_size": 16, "mamba_head_dim": WIDTH, "sal_every": 1, "vocab_size": TASK.vocabulary}
    sizes |= {"attention_capacity": capacity, "router_aux_loss_coef": weight, "sal_selection": "gumbel"}
    return TaipanForCausalLM(TaipanConfig(**sizes, initializer_range=0.05))


def execute(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the row of the run."""
    model = make(run.capacity, run.weight, run.seed)
    trainer = Trainer(model, run.rate, run.steps, recall_loss)
    generator = torch.Generator().manual_seed(run.seed)
    validation = draw(TASK, options.validation, torch.Generator().manual_seed(VALIDATION))
    curve = [{"step": 0, **assess(model, validation)}]
    name = f"capacity {run.capacity:g}, seed {run.seed}"
    with tqdm(range(1, run.steps + 1), desc=name, mininterval=5) as bar:
        for step in bar:
            trainer.step(draw(TASK, run.batch, generator))
            if step % options.evaluate_every == 0 or step == run.steps:
                curve.append({"step": step, **assess(model, validation)})
                bar.set_postfix({key: f"{curve[-1][key]:.2f}" for key in ("accuracy", "drawn queries", "drawn rest")})
    return {"parameters": parameters(model), "curve": curve}


def summary_of(capacity: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over the seeds at the end of training, and of the share of all tokens also its range."""
    ends = [row["curve"][-1] for row in rows]
    means = {key: mean(end[key] for end in ends) for key in ends[0] if key != "step"}
    shares = [end["drawn all"] for end in ends]
    seeds = [row["seed"] for row in rows]
    return {"summary": capacity, "seeds": seeds, **means, "drawn all, range": [min(shares), max(shares)]}


def plot(found: dict[float, list[dict[str, Any]]], path: Path) -> None:
    """Draw the mean of the seeds as lines and their range as bands: a column for each capacity."""
    figure, axes = plt.subplots(len(KINDS), len(found), figsize=(7 * len(found), 8), squeeze=False, sharey=True)
    for column, (capacity, rows) in enumerate(found.items()):
        steps = [point["step"] for point in rows[0]["curve"]]
        for axis, (kind, words) in zip(axes[:, column], KINDS.items(), strict=True):
            keys = {f"{kind} {tokens}": style for tokens, style in LINES.items()}
            for key, (label, color) in (keys | {"accuracy": ("accuracy at the queries", "0.6")}).items():
                values = [[row["curve"][i][key] for row in rows] for i in range(len(steps))]
                axis.plot(steps, [mean(value) for value in values], color=color, label=label)
                low, high = [min(value) for value in values], [max(value) for value in values]
                axis.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            axis.axhline(capacity, color="black", linestyle="--", linewidth=1, label=f"capacity {capacity:g}")
            axis.set(title=f"capacity {capacity:g}: {words}", xlabel=f"step of {rows[0]['batch']} sequences")
            axis.set_ylabel("share of the tokens that attend")
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gate_learning.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--weight", type=float, default=1.0, help="of the capacity loss")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=32, help="sequences of a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--evaluate-every", type=positive, default=10, help="steps")
    parser.add_argument("--validation", type=positive, default=128, help="sequences that judge")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for capacity in options.capacities:
        make(capacity, options.weight, 0)  # before anything is written: what a configuration refuses is an error
    free = ("capacities", "weight", "rate", "steps", "batch", "seeds", "threads")
    file = open_results(options, parser, "claims/gate_learning.py", arguments, free=free)
    file.drop(lambda row: "summary" in row)
    found = {
        capacity: [
            file.run(
                Run(capacity, options.weight, options.rate, seed, options.steps, options.batch),
                lambda run: execute(run, options),
            )
            for seed in options.seeds
        ]
        for capacity in options.capacities
    }
    for capacity, rows in found.items():
        print(json.dumps(file.add(summary_of(capacity, rows)), indent=1))
    plot(found, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
