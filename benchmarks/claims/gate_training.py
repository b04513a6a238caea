"""Compare ways to train Taipan's gate: which tokens it selects, and what the model loses without their attention.

Taipan's paper (arXiv 2410.18572) trains the gate with Gumbel noise and a loss that pulls the rate of the noisy choice
to the capacity. In evaluation there is no noise, and such a gate may select nothing. Here ways to train it are
compared, on two tasks:

* `recall`: multi-query associative recall as in `recall.py`, 2, 4 and 8 pairs in turn, of the Taipan there with 4 state
  channels, too few for a Mamba-2 to answer 8 queries;
* `language`: text of WikiText-2 as in `length.py`.

A run ends with what the model selects and answers, or its loss, and once more with the gate knocked out: no token
attends. All ways have the same steps, batches, rate of learning and capacity; seeds differ in weights and data.

    python benchmarks/claims/gate_training.py --threads 1
    python benchmarks/claims/gate_training.py --tasks recall --ways paper threshold-dense-warmup --seeds 1 2 3

`--resume FILE` does not repeat the runs of a file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import length_models
import matplotlib
import recall_arms
import torch
from circumstances import RESULTS, positive
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, held_out_loss, tokens
from length import training_loss
from recall import FRESH, SIZES, VALIDATION
from recall_task import Task, assess, draw, recall_loss
from result_file import ResultFile, open_results
from torch import Tensor
from tqdm import tqdm

from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.modeling import TaipanForCausalLM, selective_attention
from ssm_zoo.modeling.selective_attention import SelectiveAttention, without_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RECALL, LANGUAGE = "recall", "language"
STATE = 4
LINES = ("-", "--", ":")
# Tokens of the held-out text that judge, and what a query of the language model sees.
JUDGED, WINDOW = 32768, 64
# Share of the steps after which annealed noise is gone, and in which the share of selected tokens falls.
ANNEALED, WARMED = 0.8, 0.3


@dataclass(frozen=True)
class Way:
    """A way to train the gate.

    Attributes:
        words: its description.
        keys: keys of the configuration.
        noise: scale of the noise at the start and, after `ANNEALED` of the steps, at the end.
        warmup: whether the share of selected tokens falls from 1.
        biased: whether the gate starts at the capacity: its weight of attention is that share, not one half.
    """

    words: str
    keys: dict[str, Any] = field(default_factory=dict)
    noise: tuple[float, float] = (1.0, 1.0)
    warmup: bool = False
    biased: bool = False


GUMBEL: dict[str, Any] = {"sal_selection": "gumbel", "sal_dense_training": False}
CAPACITY: dict[str, Any] = {"sal_selection": "capacity", "sal_dense_training": False}
DENSE = {"sal_dense_training": True}
ADDED = {"sal_fusion": "residual"}
WAYS = {
    "paper": Way("the paper's: noise, capacity loss", GUMBEL),
    "paper-dense": Way("the paper's, attention of all tokens in training", GUMBEL | DENSE),
    "annealed-dense": Way("the paper's, attention of all, noise annealed to zero", GUMBEL | DENSE, (1.0, 0.0)),
    "hard-dense": Way("no noise, capacity loss", GUMBEL | DENSE, (0.0, 0.0)),
    "threshold": Way("threshold that follows the capacity", CAPACITY),
    "threshold-dense": Way("threshold, attention of all tokens in training", CAPACITY | DENSE),
    "threshold-warmup": Way("threshold, share falls from all tokens", CAPACITY, warmup=True),
    "threshold-dense-warmup": Way("threshold, attention of all, share falls", CAPACITY | DENSE, warmup=True),
    "threshold-dense-warmup-biased": Way(
        "threshold, attention of all, share falls, the gate starts at the capacity",
        CAPACITY | DENSE,
        warmup=True,
        biased=True,
    ),
    "paper-added": Way("the paper's, attention is added to the stream", GUMBEL | ADDED),
    "threshold-dense-added": Way("threshold, attention of all, added", CAPACITY | DENSE | ADDED),
    "threshold-dense-warmup-added": Way(
        "threshold, attention of all, added, share falls", CAPACITY | DENSE | ADDED, warmup=True
    ),
}


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file."""

    task: str
    way: str
    capacity: float
    rate: float
    seed: int
    steps: int
    batch: int
    state: int


def make(run: Run) -> TaipanForCausalLM:
    """Return a freshly initialised Taipan of the task."""
    way = WAYS[run.way]
    if run.task == RECALL:
        sizes = recall_arms.Sizes(
            SIZES["cpu"].models.vocabulary, SIZES["cpu"].models.width, run.state, 64, run.capacity
        )
        model: Any = recall_arms.make(recall_arms.TAIPAN, sizes, 0.05, run.seed)
    else:
        model = length_models.make(length_models.TAIPAN, VOCABULARY, WINDOW, run.seed)
    config = copy.deepcopy(model.config)
    keys = {**way.keys, "attention_capacity": run.capacity, "state_size": run.state}
    keys["sal_warmup_steps"] = round(WARMED * run.steps) if way.warmup else 0
    for key, value in keys.items():
        setattr(config, key, value)
    torch.manual_seed(run.seed)
    model = TaipanForCausalLM(config)
    if way.biased:
        start = math.log(run.capacity / (1 - run.capacity))
        for layer in (module for module in model.modules() if isinstance(module, SelectiveAttention)):
            with torch.no_grad():
                layer.gate.bias.copy_(torch.tensor([0.0, start]))
                layer.threshold.fill_(start)
    return model


@contextmanager
def noise_of(scale: list[float]) -> Iterator[None]:
    """Multiply the gate's noise by the number in `scale`, which may change, while the context lasts."""
    original = selective_attention.logistic_noise
    selective_attention.logistic_noise = lambda like: scale[0] * original(like)
    try:
        yield
    finally:
        selective_attention.logistic_noise = original


def train(run: Run, model: Any, trainer: Trainer, stream: Any, judge: Any, every: int) -> list[dict[str, Any]]:
    """Train, and return what `judge` says every so many steps."""
    first, last = WAYS[run.way].noise
    scale, curve = [first], []
    with noise_of(scale), tqdm(total=run.steps, desc=f"{run.task}, {run.way}, seed {run.seed}", mininterval=5) as bar:
        for step in range(1, run.steps + 1):
            scale[0] = first + (last - first) * min(step / (ANNEALED * run.steps), 1)
            trainer.step(next(stream))
            bar.update()
            if step % every == 0 or step == run.steps:
                curve.append({"step": step, **judge(model)})
    return curve


def execute_recall(run: Run, every: int) -> dict[str, Any]:
    """Train on recall. Returns for each number of pairs what `assess` measures on fresh sequences, and the accuracy
    without attention."""
    model = make(run)
    tasks = [Task(SIZES["cpu"].length, pairs, SIZES["cpu"].models.vocabulary) for pairs in SIZES["cpu"].pairs]

    def judged(model: Any, seed: int, count: int) -> dict[str, Any]:
        found = {}
        for task in tasks:
            batch = draw(task, count, torch.Generator().manual_seed(seed))
            with without_attention(model):
                without = assess(model, batch)["accuracy"]
            found[str(task.pairs)] = {**assess(model, batch), "without attention": without}
        return found

    def stream() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(run.seed)
        while True:
            for task in tasks:
                yield draw(task, run.batch, generator)

    trainer = Trainer(model, run.rate, run.steps, recall_loss)
    curve = train(run, model, trainer, stream(), lambda model: judged(model, VALIDATION, 128), every)
    return {"parameters": recall_arms.parameters(model), "curve": curve, "fresh": judged(model, FRESH, 512)}


def execute_language(run: Run, every: int) -> dict[str, Any]:
    """Train on text. Returns the held-out loss, the selection rate, and the loss without attention."""
    model = make(run)
    text, held_out = tokens()
    judge_ids = held_out[: JUDGED + 1]

    def judged(model: Any) -> dict[str, Any]:
        loss = held_out_loss(model, judge_ids, 32)
        with without_attention(model):
            without = held_out_loss(model, judge_ids, 32)
        return {"loss": loss, "selected": selected(model, judge_ids), "loss without attention": without}

    trainer = Trainer(model, run.rate, run.steps, training_loss)
    stream = batches(text, run.batch, run.steps, run.seed)
    curve = train(run, model, trainer, stream, judged, every)
    return {"parameters": length_models.parameters(model), "curve": curve, "fresh": judged(model)}


@torch.no_grad()
def selected(model: Any, ids: Tensor) -> float:
    """Return the share of the tokens of a text that the layers select in evaluation."""
    model.eval()
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rates = [model(part, use_cache=False).selection_rate.mean() * len(part) for part in windows.split(32)]
    model.train()
    return float(sum(rates)) / len(windows)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean, the least and the largest of each number over the rows of a way."""

    def over(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: over([value[key] for value in values]) for key in values[0]}
        return {"mean": mean(values), "low": min(values), "high": max(values)}

    ends = over([row["fresh"] for row in rows])
    if rows[0]["task"] == RECALL:
        rates = [mean(found["selected all"] for found in row["fresh"].values()) for row in rows]
        ends["selected"] = over(rates)
    return ends


def summarise(file: ResultFile) -> None:
    """Add and print a summary of each way, for each capacity."""
    runs = [row for row in file.rows if "curve" in row]
    names = ("task", "way", "capacity", "steps", "state")
    for key in sorted({tuple(row[name] for name in names) for row in runs}):
        rows = [row for row in runs if tuple(row[name] for name in names) == key]
        task, way, capacity, steps, state = key
        about = {"summary": task, "of": way, "with capacity": capacity, "after steps": steps, "with state": state}
        about["seeds"] = [row["seed"] for row in rows]
        print(json.dumps(file.add({**about, **summary_of(rows)})))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a line for each run: recall of the most pairs with and without attention, queries and others selected; or
    the loss."""
    capacities = sorted({row["capacity"] for row in rows})
    tasks = [task for task in (RECALL, LANGUAGE) if any(row["task"] == task for row in rows)]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(22, 5 * len(tasks)), squeeze=False)
    pairs = str(max(SIZES["cpu"].pairs))
    panels: dict[str, Any] = {
        RECALL: {
            f"accuracy at {pairs} pairs": lambda point: point[pairs]["accuracy"],
            f"accuracy at {pairs} pairs without attention": lambda point: point[pairs]["without attention"],
            "selected queries / other tokens": lambda point: (
                point[pairs]["selected queries"] / max(point[pairs]["selected rest"], 0.01)
            ),
        },
        LANGUAGE: {
            "held-out loss, nats": lambda point: point["loss"],
            "loss without attention - loss": lambda point: point["loss without attention"] - point["loss"],
            "share of tokens selected": lambda point: point["selected"],
        },
    }
    for line, task in zip(axes, tasks, strict=True):
        for axis, (title, value) in zip(line, panels[task].items(), strict=True):
            named = set()
            for row in (row for row in rows if row["task"] == task):
                name, capacity = row["way"], row["capacity"]
                label = None if (name, capacity) in named else f"{name}, capacity {capacity:g}: {WAYS[name].words}"
                named.add((name, capacity))
                steps = [point["step"] for point in row["curve"]]
                style = {
                    "color": plt.colormaps["tab20"](list(WAYS).index(name)),
                    "linestyle": LINES[capacities.index(capacity) % len(LINES)],
                }
                axis.plot(steps, [value(point) for point in row["curve"]], label=label, alpha=0.8, **style)
            axis.set(title=f"{task}: {title}", xlabel="step")
            axis.grid(alpha=0.3)
        line[-1].legend(*line[0].get_legend_handles_labels(), fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gate_training.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", choices=(RECALL, LANGUAGE), nargs="+", default=[RECALL, LANGUAGE])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--capacity", type=float, default=0.15)
    parser.add_argument("--recall-rate", type=float, default=4e-3, help="learning rate of recall")
    parser.add_argument("--recall-steps", type=positive, default=4000, help="of 32 sequences")
    parser.add_argument("--language-rate", type=float, default=6e-3, help="learning rate of the language models")
    parser.add_argument("--language-steps", type=positive, default=500, help="of 4 windows")
    parser.add_argument("--language-state", type=positive, default=length_models.STATE, help="channels of their states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    numbers = {
        RECALL: (options.recall_rate, options.recall_steps, 32, STATE, 16, execute_recall),
        LANGUAGE: (options.language_rate, options.language_steps, 4, options.language_state, 4, execute_language),
    }
    for task in options.tasks:  # before anything is written: what a configuration refuses is an error
        make(Run(task, options.ways[0], options.capacity, 1.0, 0, 1, 1, STATE))
    free = {"tasks", "ways", "capacity", "seeds", "threads"}
    free |= {"recall_rate", "recall_steps", "language_rate", "language_steps", "language_state"}
    file = open_results(options, parser, "claims/gate_training.py", arguments, free=free)
    file.drop(lambda row: "summary" in row)
    for row in file.rows:  # of an earlier version
        row.setdefault("state", STATE if row["task"] == RECALL else length_models.STATE)
    for task in options.tasks:
        rate, steps, batch, state, points, execute = numbers[task]
        for seed in options.seeds:
            for way in options.ways:
                run = Run(task, way, options.capacity, rate, seed, steps, batch, state)
                file.run(
                    run, lambda run, execute=execute, steps=steps, points=points: execute(run, max(steps // points, 1))
                )
    summarise(file)
    plot([row for row in file.rows if "curve" in row], file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
