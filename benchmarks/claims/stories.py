"""Train a hybrid, Transformers, a masked mixer and Mamba-2 on TinyStories: held-out loss at equal training compute.

Claim to check (arXiv 2409.01482, 12 hours on one RTX 3060 at widths of 512 and 1024): a Transformer with a masked
mixing in series after each attention is best, a tuned Llama-style Transformer and a masked mixer follow, and a
GPT-1-style Transformer is worst. Here everything is much smaller, and Mamba-2 is added.

Compute is equal in two senses:

* equal time: `--seconds` of CPU time on this machine, by the median step of each arm, measured in turn at the start;
* equal FLOPs: as many as the Llama-style Transformer does in that time, counted by torch while an arm trains for a
  step: matrix products, forward and backward, attention as the products it is made of, all of its square. Elementwise
  work counts for none: norms, activations, softmax, decays and short convolution of Mamba-2.

The rate is constant after the warm-up, so one run passes through both ends: no schedule has to end at either. Each
arm's rate and the size of its embedding at initialisation are tuned by the same search from the same start, in trials
of equal length on a part of the held-out text, and the best is run with every seed and judged by another part. A text
is one stream of stories, cut into windows of 128 tokens; the paper has one story a row.

    python benchmarks/claims/stories.py tinystories.txt --threads 1
    python benchmarks/claims/stories.py tinystories.txt --threads 1 --minutes 12
    python benchmarks/claims/stories.py tinystories.txt --threads 1 --resume benchmarks/results/stories-1.jsonl

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, held_out_loss, loss_of
from mixer_arms import ARMS, GPT, HYBRID, LLAMA, MAMBA2, MIXER, Sizes, make
from result_file import ResultFile, open_results, search
from stories_plot import draw
from stories_text import ids_of, learn_tokenizer, read_stories
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# What a run is for, and what a result is about.
TRIAL, RESULT = "trial", "result"
TIME, FLOPS = "equal time", "equal FLOPs"
# Sizes of about equal FLOPs: as in the paper a mixer is wider than a Transformer.
SIZES = {
    HYBRID: Sizes(192, 4, mlp=512),
    LLAMA: Sizes(192, 4, mlp=512),
    MIXER: Sizes(240, 4),
    GPT: Sizes(192, 4),
    MAMBA2: Sizes(192, 6),
}
# Neighbours of a setting in the search: half and double of the rate, and of the embedding's standard deviation.
FACTORS = ((1.0, 0.5), (1.0, 2.0), (0.5, 1.0), (2.0, 1.0))
# The paper's order: the first of each pair has the lower loss.
CLAIMS = ((HYBRID, LLAMA), (LLAMA, MIXER), (MIXER, GPT))


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file. All have the same `--held-out`."""

    purpose: str
    arm: str
    rate: float
    embedding: float
    seed: int
    steps: int
    batch: int


@dataclass(frozen=True)
class Cost:
    """Cost of a training step of an arm, and its number of steps in a result.

    Attributes:
        seconds: CPU time of a step.
        flops: FLOPs of a step.
        fitting: steps in equal time.
        equal: steps to equal FLOPs.
    """

    seconds: float
    flops: int
    fitting: int
    equal: int

    @property
    def steps(self) -> int:
        """Return the steps of a run, which ends at the later of both ends."""
        return max(self.fitting, self.equal)


def flops_per_step(model: nn.Module, windows: Tensor) -> int:
    """Return the FLOPs of forward and backward by torch's counter, which needs attention to be decomposed on a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(model, windows).backward()
    return counter.get_total_flops()


def measure_costs(train: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return CPU time (median of alternating steps), FLOPs and parameters of a training step by arm."""
    models = {arm: make(arm, SIZES[arm], VOCABULARY, LENGTH, 0) for arm in ARMS}
    windows = next(batches(train, options.batch, 1, 0))
    flops = {arm: flops_per_step(model, windows) for arm, model in models.items()}
    trainers = {arm: Trainer(model, 1e-3, 1000) for arm, model in models.items()}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for batch in batches(train, options.batch, options.time_steps + 1, 0):
        for arm, trainer in trainers.items():
            begin = time.process_time()
            trainer.step(batch)
            times[arm].append(time.process_time() - begin)
    return {
        arm: {
            "seconds": median(times[arm][1:]),
            "flops": flops[arm],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for arm, model in models.items()
    }


def plan(measured: dict[str, Any], seconds: float) -> dict[str, Cost]:
    """Return the steps of each arm in equal time, and to the FLOPs of the Llama-style Transformer in that time."""
    budget = seconds / measured[LLAMA]["seconds"] * measured[LLAMA]["flops"]
    return {
        arm: Cost(
            found["seconds"],
            found["flops"],
            max(int(seconds / found["seconds"]), 1),
            max(int(budget / found["flops"]), 1),
        )
        for arm, found in measured.items()
    }


def execute(run: Run, cost: Cost, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the row of the run.

    Trials are judged at their end by one part of the held-out text, results by the next part, every
    `options.evaluate_every` steps and at equal FLOPs and time.
    """
    model = make(run.arm, SIZES[run.arm], VOCABULARY, LENGTH, run.seed, embedding=run.embedding)
    trainer = Trainer(model, run.rate, run.steps, warmup=options.warmup, floor=1.0)
    begin = 0 if run.purpose == TRIAL else options.held_out
    held_out = data[1][begin : begin + options.held_out + 1]
    stops = {run.steps}
    if run.purpose == RESULT:
        stops |= {cost.fitting, cost.equal, *range(options.evaluate_every, run.steps, options.evaluate_every)}
    losses, curve, start = [], [], time.process_time()
    name = f"{run.arm}, {run.purpose}, {run.rate:g}, {run.embedding:g}, {run.seed}"
    bar = tqdm(batches(data[0], run.batch, run.steps, run.seed), total=run.steps, desc=name, mininterval=2)
    for step, windows in enumerate(bar, start=1):
        losses.append(trainer.step(windows))
        if step in stops:
            curve.append({"step": step, "held_out": held_out_loss(model, held_out, 32)})
            bar.set_postfix(held_out=f"{curve[-1]['held_out']:.3f}")
    return {
        "held_out": curve[-1]["held_out"],
        "curve": curve,
        "train": losses,
        "cpu_seconds": time.process_time() - start,
    }


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
        self.file, self.data, self.options = file, data, options
        costs = file.find({"purpose": "costs"})
        if costs is None:
            costs = file.add({"purpose": "costs", "arms": measure_costs(data[0], options)})
        self.costs = plan(costs["arms"], options.seconds)

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.costs[run.arm], self.data, self.options))

    def tune(self, arm: str) -> tuple[float, float]:
        """Return rate and embedding's size of an arm."""
        trial = Run(TRIAL, arm, 0.0, 0.0, 0, self.options.trial_steps, self.options.batch)
        rate, embedding = search(
            lambda rate, embedding: self.row(replace(trial, rate=rate, embedding=embedding))["held_out"],
            (self.options.rate, 1.0),
            FACTORS,
        )
        return rate, embedding

    def compare(self) -> dict[str, Any]:
        """Run everything and return the summary."""
        options = self.options
        settings = {arm: self.tune(arm) for arm in ARMS}
        losses: dict[str, dict[str, list[float]]] = {TIME: {}, FLOPS: {}}
        for seed in options.seeds:
            for arm, (rate, embedding) in settings.items():
                cost = self.costs[arm]
                row = self.row(Run(RESULT, arm, rate, embedding, seed, cost.steps, options.batch))
                curve = {point["step"]: point["held_out"] for point in row["curve"]}
                for sense, step in ((TIME, cost.fitting), (FLOPS, cost.equal)):
                    losses[sense].setdefault(arm, []).append(curve[step])
        summary: dict[str, Any] = {"purpose": "summary", "seconds": options.seconds, "seeds": options.seeds}
        summary["batch"], summary["settings"] = options.batch, {}
        for arm, (rate, embedding) in settings.items():
            cost = self.costs[arm]
            summary["settings"][arm] = {
                "rate": rate,
                "embedding": embedding,
                "seconds_per_step": cost.seconds,
                "flops_per_step": cost.flops,
                "steps": {TIME: cost.fitting, FLOPS: cost.equal},
            }
        for sense, found in losses.items():
            summary[sense] = {
                "order": sorted(found, key=lambda arm: mean(found[arm])),
                **{arm: {"mean": mean(ends), "low": min(ends), "high": max(ends)} for arm, ends in found.items()},
                "claims": [self.claim(found, *pair) for pair in CLAIMS],
            }
        return summary

    @staticmethod
    def claim(found: dict[str, list[float]], lower: str, higher: str) -> dict[str, Any]:
        """Return the mean difference of the losses of two arms over the seeds, and the number of seeds that agree."""
        gaps = [b - a for a, b in zip(found[lower], found[higher], strict=True)]
        return {"lower": lower, "higher": higher, "gap": mean(gaps), "seeds_that_agree": sum(gap > 0 for gap in gaps)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="stories.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="stories with <|endoftext|> between them; the last tenth is held out")
    parser.add_argument("--seconds", type=float, default=75.0, help="CPU time of a result's training")
    parser.add_argument("--trial-steps", type=positive, default=80)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate that the search starts from")
    parser.add_argument("--warmup", type=positive, default=25, help="steps in which the rate rises")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; trials have 0")
    parser.add_argument("--batch", type=positive, default=4, help=f"windows of {LENGTH} tokens a step")
    parser.add_argument("--held-out", type=positive, default=8 * 1024, help="tokens that judge trials; as many others")
    parser.add_argument("--evaluate-every", type=positive, default=100, help="steps")
    parser.add_argument("--time-steps", type=positive, default=25, help="steps of each arm that are timed")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="continue this result file, of equal --batch and --held-out"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    stories = read_stories(options.text)
    tokenizer = learn_tokenizer(stories.train)
    data = ids_of(tokenizer, stories.train), ids_of(tokenizer, stories.held_out)
    free = ("trial_steps", "rate", "seeds")
    file = open_results(options, parser, "claims/stories.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    print(json.dumps(file.add(Comparison(file, data, options).compare()), indent=1))
    draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
