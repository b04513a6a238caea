"""Train a masked mixer, a Transformer and Mamba-2 to embed texts, and measure what they find, with BM25 beside them.

Claim to check (arXiv 2409.01482): a masked mixer that was trained as a causal language model finds more than a
Transformer, both finetuned by InfoNCE. Here the models have equal width and about equal size, and do the same:

1. train for `--steps` as causal language models on the stories and abstracts that are searched later, those of
   TinyStories that are held out excepted;
2. finetune all weights with InfoNCE by `ssm_zoo.training.embedder`, `--share` times over the pairs of each task. A
   text's embedding is the mean over its tokens, the temperature 0.1. With the paper's last token and 0.02 hardly a
   loss falls below that of guessing within the some 90 steps that a CPU has time for.

Tasks: `stories`, the first sentence of a story searches for the rest of it, among the held-out stories. No easy task,
nor a fair one to words: many stories begin alike, and the rest of a story names who the first sentence names.
`cranfield`, questions on aerodynamics search 1,400 abstracts (Cranfield in the layout of BEIR); its queries are split,
and none that judges has been trained on. Measured are top-1 among 32 and nDCG@10 among all, also before step 2 and by
BM25, which reads whole texts, where the models read `--length` tokens; chance is exact.

Each arm's rates are tuned by the same searches from the same start, in short runs on parts that judge no result: of
step 1 by held-out loss, of step 2 for each task by top-1 among 32.

    python benchmarks/claims/retrieval.py tinystories.txt cranfield --threads 1
    python benchmarks/claims/retrieval.py tinystories.txt cranfield --resume benchmarks/results/retrieval-1.jsonl

`--resume` does not repeat the runs of a file, so a comparison that is cut off loses one run, and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from from_scratch_training import Trainer, batches, held_out_loss
from mixer_arms import LLAMA, MAMBA2, MIXER, equal_sizes, make
from result_file import ResultFile, open_results, search
from retrieval_plot import draw
from retrieval_texts import Task, beir_task, stories_task, write_pairs
from stories_text import END, ids_of, learn_tokenizer, read_stories
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ssm_zoo.evaluation.embedder import load_embedder
from ssm_zoo.evaluation.retrieval import bm25_scores, chance_levels, embedder_scores, evaluate_retrieval
from ssm_zoo.training.embedder import finetune_embedder
from ssm_zoo.training.embedder_settings import parse_embedder_settings

COMPARED = (MIXER, LLAMA, MAMBA2)
STORIES, CRANFIELD = "stories", "cranfield"
# What a run is for.
PRETRAINING, TRIAL, RESULT = "trial of the language model", "trial", "result"
BEFORE, AFTER = "before", "after"
POOL = 32
FACTORS = ((0.5,), (2.0,))


@dataclass(frozen=True)
class Run:
    """A run; its fields identify it in a file.

    Attributes:
        purpose: a trial of the language model ends with it, the others with a finetuning.
        arm: kind of model.
        seed: of initial weights, order and pools.
        rate: learning rate as a language model.
        steps: of the language model.
        task: what it is finetuned for.
        tuned: learning rate of the finetuning.
        share: passes over the task's pairs.
    """

    purpose: str
    arm: str
    seed: int
    rate: float
    steps: int
    task: str = ""
    tuned: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Data:
    """Data of the runs of a file: ids of the language model, ids that judge it, its tokenizer, and the tasks."""

    train: Tensor
    judged: Tensor
    tokenizer: ByteLevelBPETokenizer
    tasks: dict[str, Task]


def read_data(text: Path, folder: Path, vocabulary: int) -> Data:
    """Return the tasks, and a tokenizer learnt from what the language models are trained on."""
    stories = read_stories(text)
    tasks = {STORIES: stories_task(stories), CRANFIELD: beir_task(folder)}
    judging = len(stories.train) // 10
    texts = [*stories.train[:-judging], *tasks[CRANFIELD].results.documents.values()]
    tokenizer = learn_tokenizer(texts, vocabulary)
    return Data(ids_of(tokenizer, texts), ids_of(tokenizer, stories.train[-judging:]), tokenizer, tasks)


def measures(found: dict[str, Any]) -> dict[str, float]:
    """Return the reported part of `evaluate_retrieval` or `chance_levels`."""
    return {"top1": found["pools"][0]["accuracy"], "ndcg": found["ndcg@10"]}


class Comparison:
    """The comparison, whose runs are those of a result file; models lie in a folder."""

    def __init__(self, file: ResultFile, data: Data, options: argparse.Namespace, folder: Path) -> None:
        self.file, self.data, self.options, self.folder = file, data, options, folder
        self.pretrained = lru_cache(maxsize=None)(self.pretrain)

    def pretrain(self, arm: str, seed: int, rate: float, steps: int) -> tuple[Path, float, int]:
        """Return the folder of a trained language model and tokenizer, its held-out loss and its parameter count."""
        options = self.options
        model = make(arm, equal_sizes(arm, options.width), options.vocabulary, options.length, seed)
        trainer = Trainer(model, rate, steps)
        found = batches(self.data.train, options.batch, steps, seed, options.length)
        for windows in tqdm(found, total=steps, desc=f"{arm}, {rate:g}", mininterval=2, leave=False):
            trainer.step(windows)
        folder = self.folder / f"{arm}-{seed}-{rate:g}-{steps}"
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.data.tokenizer._tokenizer, eos_token=END, pad_token=END
        )
        tokenizer.save_pretrained(folder)
        loss = held_out_loss(model, self.data.judged[: options.held_out + 1], 64, options.length)
        return folder, loss, sum(p.numel() for p in model.parameters())

    def evaluate(self, embedder: Any, task: Task, seed: int) -> dict[str, float]:
        """Return the retrieval metrics of an embedder at the results of a task."""
        scores = embedder_scores(embedder, task.results)
        return measures(evaluate_retrieval(task.results, scores, pools=[POOL], seed=seed))

    def execute(self, run: Run) -> dict[str, Any]:
        """Train, finetune and measure; return the row of the run."""
        start, options = time.process_time(), self.options
        folder, loss, size = self.pretrained(run.arm, run.seed, run.rate, run.steps)
        row: dict[str, Any] = {"parameters": size, "held_out": loss}
        if run.purpose != PRETRAINING:
            task = self.data.tasks[run.task]
            with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                for name, pairs in (("train", task.train), ("trials", task.trials)):
                    write_pairs(pairs, Path(temporary) / f"{name}.jsonl")
                settings = {
                    "model": str(folder),
                    "method": "full",
                    "train": [f"{temporary}/train.jsonl"],
                    "heldout": [f"{temporary}/trials.jsonl"],
                    "learning_rate": run.tuned,
                    "epochs": run.share,
                    "batch_size": options.pairs,
                    "pool_size": POOL,
                    "max_tokens": options.length,
                    "pooling": options.pooling,
                    "temperature": options.temperature,
                    "seed": run.seed,
                }
                report = finetune_embedder(parse_embedder_settings(settings), f"{temporary}/run")
                row |= {"steps_of_finetuning": report["steps"], "trial": measures(report["evaluations"][-1])}
                if run.purpose == RESULT:
                    plain = load_embedder(str(folder), pooling=options.pooling, max_tokens=options.length, device="cpu")
                    row[BEFORE] = self.evaluate(plain, task, run.seed)
                    row[AFTER] = self.evaluate(load_embedder(f"{temporary}/run/model", device="cpu"), task, run.seed)
        return {**row, "cpu_seconds": time.process_time() - start}

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of the run, after executing it unless the file has the row."""
        return self.file.run(run, self.execute)

    def rates(self, arm: str) -> tuple[float, dict[str, float]]:
        """Return learning rate of an arm as a language model, and of its finetuning for each task."""
        options = self.options
        base = Run(PRETRAINING, arm, 0, 0.0, options.trial_steps)
        (rate,) = search(lambda rate: self.row(replace(base, rate=rate))["held_out"], (options.rate,), FACTORS)
        tuned = {}
        for task in self.data.tasks:
            trial = Run(TRIAL, arm, 0, rate, options.steps, task, 0.0, options.trial_share)
            (tuned[task],) = search(
                lambda value, trial=trial: -self.row(replace(trial, tuned=value))["trial"]["top1"],
                (options.tuned,),
                FACTORS,
            )
        return rate, tuned

    def beside(self, task: Task) -> dict[str, Any]:
        """Return the metrics of chance and of BM25 at the results of a task."""
        found = evaluate_retrieval(task.results, bm25_scores(task.results), pools=[POOL], seed=self.options.seeds[0])
        about = {"queries": len(task.results.queries), "documents": len(task.results.documents)}
        about |= {"pairs": len(task.train)}
        return {**about, "chance": measures(chance_levels(task.results, [POOL])), "bm25": measures(found)}

    def compare(self) -> dict[str, Any]:
        """Run everything and return the summary."""
        options = self.options
        rates = {arm: self.rates(arm) for arm in COMPARED}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seed in options.seeds:
            for arm, (rate, tuned) in rates.items():
                for task, value in tuned.items():
                    run = Run(RESULT, arm, seed, rate, options.steps, task, value, options.share)
                    found.setdefault((task, arm), []).append(self.row(run))
        tasks = {}
        for name, task in self.data.tasks.items():
            arms = {}
            for arm, (rate, tuned) in rates.items():
                rows = found[name, arm]
                arms[arm] = {"rate": rate, "tuned": tuned[name], "held_out": mean(row["held_out"] for row in rows)}
                for state in (BEFORE, AFTER):
                    arms[arm][state] = {
                        measure: {"mean": mean(values), "low": min(values), "high": max(values)}
                        for measure in ("top1", "ndcg")
                        for values in [[row[state][measure] for row in rows]]
                    }
            tasks[name] = {**self.beside(task), "arms": arms}
        return {"purpose": "summary", "seeds": options.seeds, "pool": POOL, "tasks": tasks}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="retrieval.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="stories with <|endoftext|> between them; the last tenth is held out")
    parser.add_argument("beir", type=Path, help="folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    parser.add_argument("--width", type=positive, default=128, help="a multiple of 8")
    parser.add_argument("--vocabulary", type=positive, default=2048)
    parser.add_argument("--length", type=positive, default=64, help="tokens that the models read of a text")
    parser.add_argument("--pooling", choices=("last", "mean"), default="mean")
    parser.add_argument("--temperature", type=float, default=0.1, help="of InfoNCE")
    parser.add_argument("--rate", type=float, default=4e-3, help="of the language model: what the search starts from")
    parser.add_argument("--steps", type=positive, default=250, help="of the language model")
    parser.add_argument("--trial-steps", type=positive, default=80, help="of its trials")
    parser.add_argument("--batch", type=positive, default=8, help="windows in a step of it")
    parser.add_argument("--held-out", type=positive, default=4096, help="tokens that judge it")
    parser.add_argument("--tuned", type=float, default=1e-3, help="of the finetuning: what the search starts from")
    parser.add_argument("--pairs", type=positive, default=32, help="in a step of it")
    parser.add_argument("--share", type=float, default=2.0, help="passes over the pairs")
    parser.add_argument("--trial-share", type=float, default=0.5, help="of its trials")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the results; trials have 0")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file, of equal options")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = read_data(options.text, options.beir, options.vocabulary)
    free = ("rate", "steps", "trial_steps", "tuned", "share", "trial_share", "seeds", "threads")
    file = open_results(options, parser, "claims/retrieval.py", arguments, "sentence-transformers", "bm25s", free=free)
    file.drop(lambda row: row["purpose"] == "summary")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(file.add(Comparison(file, data, options, Path(folder)).compare()), indent=1))
    draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
