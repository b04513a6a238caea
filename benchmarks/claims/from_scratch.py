"""Train `zoo_mamba` and `zoo_mamba2` from scratch beside transformers' own classes of equal size, on real text.

Both sides have the same sizes, data, order, optimiser and schedule. They compute the same function (the parity tests
show it), so what differs is how they start, ours from the papers' initialisation and theirs from transformers' own, and
how long a step takes. Each side is tuned by the same search from the same start: learning rate and `initializer_range`
in short trials, judged by a part of the held-out text, and from there in full runs, judged by the training loss of
their last tenth. The best setting is run with every seed and judged by another part of the held-out text:

* at equal tokens: the same steps;
* in equal time: the peer with as many steps as its own class makes in our time, its schedule ending there.

Because the function is the same, all runs of the peer go through our class from its initial weights, which takes a part
of the time. `--confirm` steps are run again with transformers' class itself and compared; its seconds per step are
measured in turn with ours in the same process. Time is CPU time, which other programs do not lengthen much: on one
thread of an idle machine it is the wall's.

    python benchmarks/claims/from_scratch.py --threads 1
    python benchmarks/claims/from_scratch.py --threads 1 --resume benchmarks/results/from_scratch-20261125T120000Z.jsonl

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
from statistics import mean, median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from from_scratch_plot import OURS, PEER, draw
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, held_out_loss, tokens
from result_file import ResultFile, open_results, search
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2ForCausalLM, ZooMambaConfig, ZooMambaForCausalLM

# The arm beside OURS and PEER: transformers' own class.
CLASS = "theirs"
# What a run is for.
TRIAL, TOKENS, TIME, CONFIRM = "trial", "equal tokens", "equal time", "confirm"
# Neighbours of a setting in the search: half and double of rate and of `initializer_range`.
FACTORS = ((1.0, 0.5), (1.0, 2.0), (0.5, 1.0), (2.0, 1.0))
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 64, "head_dim": 64, "num_heads": 8, "n_groups": 1},
}


@dataclass(frozen=True)
class Run:
    """A training run; its fields identify it in a file. All have the same `--held-out`.

    `steps` is the length of the schedule, `stop` the number of steps taken of it.
    """

    purpose: str
    family: str
    arm: str
    rate: float
    initializer_range: float
    seed: int
    steps: int
    stop: int
    batch: int


def make(family: str, arm: str, seed: int, **options: Any) -> nn.Module:
    """Return a freshly initialised model of 3 million parameters; `options` are further fields of its configuration."""
    common = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 6, "tie_word_embeddings": True}
    common |= SIZES[family] | options
    ours, theirs = (ZooMambaForCausalLM, ZooMambaConfig), (MambaForCausalLM, MambaConfig)
    if family == "mamba2":
        ours, theirs = (ZooMamba2ForCausalLM, ZooMamba2Config), (Mamba2ForCausalLM, Mamba2Config)
    torch.manual_seed(seed)
    if arm == OURS:
        return ours[0](ours[1](**common))
    peer = theirs[0](theirs[1](**common))
    if arm == CLASS:
        return peer
    model = ours[0](ours[1](**common))
    model.load_state_dict(peer.state_dict())
    return model


def execute(run: Run, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the row of the run.

    Trials are judged at their end by one part of the held-out text, other runs by the next part, every
    `options.evaluate_every` steps.
    """
    model = make(run.family, run.arm, run.seed, initializer_range=run.initializer_range)
    trainer = Trainer(model, run.rate, run.steps)
    begin = 0 if run.purpose == TRIAL else options.held_out
    held_out = data[1][begin : begin + options.held_out + 1]
    often = min(options.evaluate_every, max(run.stop // 6, 1))
    every = run.stop if run.purpose in (TRIAL, CONFIRM) else often
    losses, curve, start = [], [], time.process_time()
    name = f"{run.family}, {run.arm}, {run.purpose}, {run.rate:g}, {run.initializer_range:g}"
    bar = tqdm(batches(data[0], run.batch, run.stop, run.seed), total=run.stop, desc=name, mininterval=2)
    for step, windows in enumerate(bar, start=1):
        losses.append(trainer.step(windows))
        if step % every == 0 or step == run.stop:
            curve.append({"step": step, "held_out": held_out_loss(model, held_out, 32)})
            bar.set_postfix(held_out=f"{curve[-1]['held_out']:.3f}")
    size = sum(p.numel() for p in model.parameters())
    result = {"held_out": curve[-1]["held_out"], "curve": curve, "train": losses}
    return {"parameters": size, **result, "cpu_seconds": time.process_time() - start}


def seconds_per_step(family: str, data: tuple[Tensor, Tensor], batch: int, repeats: int) -> dict[str, float]:
    """Return median CPU time of a training step of our class and of transformers', in turn, after one step of each."""
    trainers = {arm: Trainer(make(family, arm, 0), 1e-3, 1000) for arm in (OURS, CLASS)}
    times: dict[str, list[float]] = {arm: [] for arm in trainers}
    for windows in batches(data[0], batch, repeats + 1, 0):
        for arm, trainer in trainers.items():
            begin = time.process_time()
            trainer.step(windows)
            times[arm].append(time.process_time() - begin)
    return {arm: median(found[1:]) for arm, found in times.items()}


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
        self.file, self.data, self.options = file, data, options

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after training it unless the file has the row."""
        return self.file.run(run, lambda run: execute(run, self.data, self.options))

    def judge(self, run: Run, rate: float, std: float) -> float:
        """Return the loss by which `run` with this rate and `initializer_range` is judged in the search."""
        row = self.row(dataclasses.replace(run, rate=rate, initializer_range=std))
        return row["held_out"] if run.purpose == TRIAL else mean(row["train"][-max(run.stop // 10, 1) :])

    def family(self, family: str) -> dict[str, Any]:
        """Run everything of one family and return its summary."""
        options = self.options
        timing = self.file.find({"purpose": "timing", "family": family})
        if timing is None:
            seconds = seconds_per_step(family, self.data, options.batch, options.time_steps)
            timing = self.file.add({"purpose": "timing", "family": family, "seconds_per_step": seconds})
        seconds = timing["seconds_per_step"]
        base = Run(TOKENS, family, OURS, 0.0, 0.0, 0, options.steps, options.steps, options.batch)
        sides = {}
        for arm in (OURS, PEER):
            length = options.trial_steps
            trial = dataclasses.replace(base, purpose=TRIAL, arm=arm, steps=length, stop=length)
            point = search(partial(self.judge, trial), (options.rate, options.range), FACTORS)
            full = dataclasses.replace(base, arm=arm, seed=options.seeds[0])
            rate, std = search(partial(self.judge, full), point, FACTORS)
            sides[arm] = {"rate": rate, "initializer_range": std}
        fitting = max(int(options.steps * seconds[OURS] / seconds[CLASS]), 1)
        lengths = {(OURS, TOKENS): options.steps, (PEER, TOKENS): options.steps, (PEER, TIME): fitting}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in lengths}
        for seed in options.seeds:
            for (arm, purpose), steps in lengths.items():
                run = Run(purpose, family, arm, **sides[arm], seed=seed, steps=steps, stop=steps, batch=options.batch)
                found[arm, purpose].append(self.row(run))
        summary: dict[str, Any] = {"purpose": "summary", "family": family, "seconds_per_step": seconds}
        for (arm, purpose), rows in found.items():
            ends = [row["held_out"] for row in rows]
            numbers = {"steps": lengths[arm, purpose], "mean": mean(ends), "low": min(ends), "high": max(ends)}
            summary[f"{arm}, {purpose}"] = {**sides[arm], **numbers, "seeds": options.seeds}
        if options.confirm:
            peer = found[PEER, TOKENS][0]
            run = dataclasses.replace(base, purpose=CONFIRM, arm=CLASS, **sides[PEER], seed=peer["seed"])
            confirmed = self.row(dataclasses.replace(run, stop=min(options.confirm, options.steps)))
            pairs = zip(confirmed["train"], peer["train"], strict=False)
            summary["confirmed"] = {"steps": confirmed["stop"], "largest_difference": max(abs(a - b) for a, b in pairs)}
        return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="from_scratch.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate that the search starts from")
    parser.add_argument("--range", type=float, default=0.05, help="initializer_range that the search starts from")
    parser.add_argument("--trial-steps", type=positive, default=80, help="steps of a trial")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="of the best settings, the first also of the full search; trials have 0",
    )
    parser.add_argument("--batch", type=positive, default=4, help=f"windows of {LENGTH} tokens a step")
    parser.add_argument("--held-out", type=positive, default=8 * 1024, help="tokens that judge trials; as many others")
    parser.add_argument("--evaluate-every", type=positive, default=50, help="steps")
    parser.add_argument("--time-steps", type=positive, default=3, help="steps of each class that are timed")
    parser.add_argument("--confirm", type=int, default=20, help="steps to repeat with transformers' class; 0: none")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="continue this result file, of equal --batch and --held-out"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    free = ("family", "rate", "range", "trial_steps", "steps", "seeds", "confirm")
    file = open_results(options, parser, "claims/from_scratch.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary" and row["family"] in options.family)
    comparison = Comparison(file, tokens(), options)
    summaries = [comparison.family(family) for family in options.family]
    for summary in summaries:
        print(json.dumps(file.add(summary), indent=1))
    draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
