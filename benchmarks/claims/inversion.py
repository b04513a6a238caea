"""Recover the input of masked mixers, Transformers and Mamba-2 from their last block, before and after training.

Claim to check (arXiv 2409.01482): hidden states of masked mixers give their tokens back, those of Transformers hardly;
training brings the two closer, and wider models keep more. Here small causal language models of equal width and about
equal size read 32 tokens of TinyStories. Inputs are sought that give the same hidden states
(`ssm_zoo.evaluation.inversion`), and the share of the tokens that are read at their place in them is the accuracy: by
chance 1 / vocabulary. Of the last token's hidden state alone it says how much has been moved there.

All arms have the same texts, steps and restarts. At `--tuned-width` the rate of each arm's training is tuned by the
held-out loss, and for each arm, state of training and place that is compared the first step size of the descent by how
close the hidden states come on other text: by the same searches from the same start. Other widths take what is found.

What is large in the stream of residuals is easily read from it, so that the embedding's size decides much. So all is
measured with a standard deviation of 1 at its start, as the paper's mixers have, and with 0.05, which is nearer to what
is usual for Transformers; each with a rate of its own.

    python benchmarks/claims/inversion.py tinystories.txt --threads 1
    python benchmarks/claims/inversion.py tinystories.txt --threads 1 --resume benchmarks/results/inversion-1.jsonl

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from from_scratch_training import Trainer, batches, held_out_loss, windows_of
from inversion_plot import draw
from mixer_arms import LLAMA, MAMBA2, MIXER, equal_sizes, make
from result_file import ResultFile, open_results, search
from stories_text import ids_of, learn_tokenizer, read_stories
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ssm_zoo.evaluation.inversion import invert_representation

COMPARED = (MIXER, LLAMA, MAMBA2)
# What a run is for.
TRAINING, DESCENT, RESULT = "trial of the training", "trial of the descent", "result"
ALL, LAST = "all", "last"
# Standard deviations of the embedding at initialisation.
LARGE, SMALL = 1.0, 0.05
# Neighbours of a rate, and of a first step size, in the search.
RATES, SIZES = ((0.5,), (2.0,)), ((0.25,), (4.0,))


@dataclass(frozen=True)
class Run:
    """A model and what is done with it; the fields identify it in a file.

    Attributes:
        purpose: a trial of the training gives a held-out loss, the others an inversion.
        arm: kind of model.
        width: its D.
        embedding: standard deviation of its embedding at initialisation.
        seed: of initial weights, training batches and choice of texts.
        rate: learning rate of the training.
        steps: steps of the training, 0 for an untrained model.
        places: whose hidden states are compared, "all" or "last".
        size: first step size of the descent, 0 where there is none.
    """

    purpose: str
    arm: str
    width: int
    embedding: float
    seed: int
    rate: float
    steps: int
    places: str = ALL
    size: float = 0.0


@dataclass(frozen=True)
class Data:
    """Data of the runs of a file: ids for training, ids that judge trials, ids that judge results."""

    train: Tensor
    trials: Tensor
    results: Tensor


class Comparison:
    """The comparison, whose runs are those of a result file."""

    def __init__(self, file: ResultFile, data: Data, options: argparse.Namespace) -> None:
        self.file, self.data, self.options = file, data, options
        self.trained = lru_cache(maxsize=16)(self.train)

    def train(self, arm: str, width: int, embedding: float, seed: int, rate: float, steps: int) -> PreTrainedModel:
        """Return a trained model."""
        options = self.options
        sizes = equal_sizes(arm, width)
        model = make(arm, sizes, options.vocabulary, options.length, seed, embedding=embedding)
        trainer = Trainer(model, rate, max(steps, 1))
        found = batches(self.data.train, options.batch, steps, seed, options.length)
        for windows in tqdm(found, total=steps, desc=f"{arm}, {width}, {rate:g}", mininterval=2, leave=False):
            trainer.step(windows)
        return model

    def execute(self, run: Run) -> dict[str, Any]:
        """Train and invert, and return the run's row."""
        start, options = time.process_time(), self.options
        model = self.trained(run.arm, run.width, run.embedding, run.seed, run.rate, run.steps)
        row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        if run.purpose == TRAINING or run.steps:
            row["held_out"] = held_out_loss(model, self.data.trials, 128, options.length)
        if run.purpose != TRAINING:
            ids = self.data.results if run.purpose == RESULT else self.data.trials
            windows = windows_of(ids, options.length)[:, 1:]
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(run.seed))
            found = invert_representation(
                model,
                windows[order[: options.texts]],
                positions="last" if run.places == LAST else "all",
                steps=options.descent,
                learning_rate=run.size,
                restarts=options.restarts,
                initial_std=None,
                seed=run.seed,
                progress=True,
            )
            row |= {"accuracy": found.accuracy, "chance": found.chance, "readable": found.readable}
            row["left"] = float((found.objective / found.initial).mean())
        return {**row, "cpu_seconds": time.process_time() - start}

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after executing it unless the file has the row."""
        return self.file.run(run, self.execute)

    def rate(self, arm: str, embedding: float) -> float:
        """Return the learning rate of an arm's training."""
        options = self.options
        trial = Run(TRAINING, arm, options.tuned_width, embedding, 0, 0.0, options.steps)
        (rate,) = search(lambda rate: self.row(replace(trial, rate=rate))["held_out"], (options.rate,), RATES)
        return rate

    def size(self, run: Run) -> float:
        """Return the first step size for what a run is about."""
        trial = replace(run, purpose=DESCENT, width=self.options.tuned_width, seed=0)
        # By how close the hidden states come, which takes no knowledge of the tokens.
        (size,) = search(lambda size: self.row(replace(trial, size=size))["left"], (self.options.size,), SIZES)
        return size

    def cells(self) -> Iterator[Run]:
        """Return the runs of the first seed without their step sizes; every seed repeats them."""
        options = self.options
        for arm in COMPARED:
            for embedding in (LARGE, SMALL):
                base = Run(RESULT, arm, 0, embedding, options.seeds[0], self.rate(arm, embedding), 0)
                for steps in (0, options.steps):
                    for width in options.widths:
                        yield replace(base, width=width, steps=steps)
                    yield replace(base, width=options.tuned_width, steps=steps, places=LAST)

    def compare(self) -> dict[str, Any]:
        """Run everything and return the summary."""
        options = self.options
        cells = []
        for cell in self.cells():
            sized = replace(cell, size=self.size(cell))
            rows = [self.row(replace(sized, seed=seed)) for seed in options.seeds]
            found = [row["accuracy"] for row in rows]
            about = {"arm": cell.arm, "width": cell.width, "embedding": cell.embedding, "places": cell.places}
            about |= {"trained": cell.steps > 0, "size": sized.size, "rate": cell.rate}
            spread = {"mean": mean(found), "low": min(found), "high": max(found)}
            cells.append({**about, **spread, "readable": mean(row["readable"] for row in rows)})
        about = {"steps": options.steps, "descent": options.descent, "texts": options.texts, "seeds": options.seeds}
        about |= {"length": options.length, "vocabulary": options.vocabulary, "tuned_width": options.tuned_width}
        return {"purpose": "summary", "chance": 1 / options.vocabulary, **about, "cells": cells}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="inversion.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="stories with <|endoftext|> between them; the last tenth is held out")
    parser.add_argument("--widths", type=positive, nargs="+", default=[32, 64, 128, 256], help="multiples of 8")
    parser.add_argument(
        "--tuned-width", type=positive, default=128, help="where training is tuned and the rest measured"
    )
    parser.add_argument("--vocabulary", type=positive, default=1024)
    parser.add_argument("--length", type=positive, default=32, help="tokens of a text")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate that the search starts from")
    parser.add_argument("--steps", type=positive, default=150, help="of the training")
    parser.add_argument("--batch", type=positive, default=8, help="texts in a step of it")
    parser.add_argument("--texts", type=positive, default=4, help="that are inverted with each seed")
    parser.add_argument("--size", type=float, default=0.02, help="first step size that the search starts from")
    parser.add_argument("--descent", type=positive, default=200, help="steps of it")
    parser.add_argument("--restarts", type=positive, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; trials have 0")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file, of equal options")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    stories = read_stories(options.text)
    tokenizer = learn_tokenizer(stories.train, options.vocabulary)
    half = len(stories.held_out) // 2
    encode = partial(ids_of, tokenizer)
    data = Data(encode(stories.train), encode(stories.held_out[:half]), encode(stories.held_out[half:]))
    free = ("widths", "rate", "steps", "size", "seeds", "threads")
    file = open_results(options, parser, "claims/inversion.py", arguments, free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    print(json.dumps(file.add(Comparison(file, data, options).compare()), indent=1))
    draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
