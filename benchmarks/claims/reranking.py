"""Compare families as rerankers, at equal parameters, pretraining, groups and tuning (RankMamba, arXiv 2403.18276).

The queries of each corpus are split once into train, dev and test. One BPE is learnt from the documents of all corpora.
Every arm is pretrained as a language model on these documents (texts alone, no judgements) for `--pretrain-steps`, and
then finetuned on the train queries of a corpus with the localised contrastive loss over 1 positive and 7 negatives of
BM25. The learning rate of an arm is the one of `--rates`, the same for all, with the best nDCG@10 on the dev queries
with the first seed. The seeds differ in everything: weights, pretraining, negatives, order. Scores are those of the
test queries, with BM25's best `--depth` documents re-ranked.

* `cranfield`: a folder in BEIR's layout (`--cranfield`).
* `docs`: docstrings of installed packages (`--packages`): the summary line, withheld, retrieves the rest of its page.

Bidirectional arms start from the causal pretraining of their family, whose weights they share. `--pretrained
NAME=FOLDER` adds rerankers that start from a model of the zoo with its own tokenizer, e.g. SmolLM2 and a student that
was distilled from it, and are finetuned with LoRA at one rate; they are compared with the first of them.

    python benchmarks/claims/reranking.py --work FOLDER --cranfield beir/cranfield
    python benchmarks/claims/reranking.py --work FOLDER --cranfield beir/cranfield --resume FILE.jsonl
    python benchmarks/claims/reranking.py --work FOLDER --cranfield beir/cranfield --resume FILE.jsonl \\
        --pretrained smollm2=FOLDER student=FOLDER

A row is written after each run: {"corpus", "arm", "seed", "rate", ..., "ndcg@10", "mrr@10", "map", "by_query", "dev",
"bm25", "random"}. An interrupted run goes on in `--work` at its last checkpoint. At the end the tables and verdicts of
`reranking_table.py` are printed, and a picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # where reranking_speed.py is

import numpy as np
import torch
from circumstances import RESULTS, positive
from reranking_plot import draw_results
from reranking_speed import HYBRID, MAMBA, MAMBA2, RETNET, TRANSFORMER, Point, equal_size, keys_of
from reranking_table import BIDIRECTIONAL, MEASURES, table_of, verdicts_of
from reranking_texts import documentation, split_collection
from result_file import ResultFile, finished_or, open_results
from transformers import AutoTokenizer

from ssm_zoo.evaluation.compare_rerankers import compare_rerankers
from ssm_zoo.evaluation.reranking import measure_run
from ssm_zoo.evaluation.reranking_data import bm25_run, read_judged
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.new_model import entries_of, learn_vocabulary
from ssm_zoo.training.reranker import finetune_reranker
from ssm_zoo.training.reranker_settings import parse_reranker_settings

ARMS = (TRANSFORMER, TRANSFORMER + BIDIRECTIONAL, MAMBA, MAMBA2, RETNET, HYBRID)
MORE_ARMS = (MAMBA2 + BIDIRECTIONAL, RETNET + BIDIRECTIONAL)
SECONDS = {TRANSFORMER: 0.6, TRANSFORMER + BIDIRECTIONAL: 0.6, MAMBA: 1.6, MAMBA2: 1.0, RETNET: 0.7, HYBRID: 0.7}
"""CPU seconds of a step with its share of all else, on one thread of an AMD EPYC with other work (2026-11-30)."""
SECONDS_OF_PRETRAINED = 28.0
"""The same of a model of 135M parameters with LoRA."""
PROBE = "probe"
"""Few dev queries, which show that a run with one rate has learnt something."""
SHUFFLES = 50


@dataclass(frozen=True)
class Run:
    """A run: what tells it from all others in the file; the sizes of a pretrained model are 0."""

    corpus: str
    arm: str
    seed: int
    rate: float
    steps: int
    batch: int
    pretrain_steps: int
    width: int
    layers: int
    vocabulary: int
    max_tokens: int
    depth: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.corpus}-{self.arm}-{self.seed}-{self.rate:g}-{self.steps}x{self.batch}".replace(" ", "-")


def make_corpora(options: argparse.Namespace) -> dict[str, Path]:
    """Return the folder of each corpus, split, and under "texts" that of the tokenizer and the pretraining's text.

    Each is made once.
    """
    found = {}
    for name in options.corpora:
        folder = options.work / name
        if not (folder / "done").is_file():
            source = options.cranfield
            if name == "docs":
                source = options.work / "docs-whole"
                documentation(options.packages, source, options.pages)
            if source is None:
                raise SystemExit("--cranfield must name the folder of the collection, or be left out of --corpora")
            parts = split_collection(source, folder)
            header, *judged = (folder / "qrels" / "dev.tsv").read_text().splitlines()
            first = set(list(dict.fromkeys(row.split("\t")[0] for row in judged))[:4])
            probe = [row for row in judged if row.split("\t")[0] in first]
            (folder / "qrels" / f"{PROBE}.tsv").write_text("\n".join([header, *probe]) + "\n")
            (folder / "done").write_text(json.dumps(parts))
        found[name] = folder
    shared = options.work / f"texts-{'-'.join(sorted(found))}-{options.vocabulary}"
    if not (shared / "done").is_file():
        texts = [text for name in sorted(found) for text in read_judged(found[name], "train").documents.values()]
        learn_vocabulary(texts, options.vocabulary, progress=False).save_pretrained(shared / "tokenizer")
        rows = [json.dumps({"text": text}) for text in texts if text.strip()]
        rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
        cut = max(1, len(rows) // 50)
        for part, own in (("heldout", rows[:cut]), ("train", rows[cut:])):
            (shared / f"{part}.jsonl").write_text("\n".join(own))
        (shared / "done").write_text("")
    return {**found, "texts": shared}


def pretrain(run: Run, texts: Path, work: Path, row_tokens: int) -> Path:
    """Return the folder of a run's pretrained model, which is trained once for all corpora and rates."""
    arm = run.arm.removesuffix(BIDIRECTIONAL)
    output = work / f"{texts.name}-{arm}-{run.width}x{run.layers}-pretrained-{run.seed}-{run.pretrain_steps}"
    if not (output / "report.json").is_file():
        entries = entries_of(AutoTokenizer.from_pretrained(texts / "tokenizer"))
        point = Point(arm, "", run.max_tokens, 1, run.width, run.layers, entries, "float32", 1)
        kind, keys = keys_of(arm, point, equal_size(arm, point))
        # As torch's linear layers begin, and so most of Mamba's; the default of 0.02 is for larger widths.
        keys["initializer_range"] = (3 * run.width) ** -0.5
        settings = parse_from_scratch(
            {
                "config": {"model_type": kind.model_type, **keys},
                "tokenizer": str(texts / "tokenizer"),
                "train": [str(texts / "train.jsonl")],
                "heldout": [str(texts / "heldout.jsonl")],
                "steps": run.pretrain_steps,
                "row_tokens": row_tokens,
                "batch_size": 4,
                "seed": run.seed,
                "learning_rate": 2e-3,
                "warmup": min(100, run.pretrain_steps // 10),
            }
        )
        train_from_scratch(settings, output, command="python benchmarks/claims/reranking.py")
    if not run.arm.endswith(BIDIRECTIONAL):
        return output / "model"
    folder = work / f"{output.name}-bidirectional"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(output / "model", folder, ignore=shutil.ignore_patterns("config.json"))
        config = json.loads((output / "model" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "bidirectional": True}))
    return folder


def adapted(model: Path, batch: int) -> dict[str, Any]:
    """Return the settings that are different for a pretrained model: LoRA, and a group at a time for its memory."""
    return {"model": str(model), "method": "lora", "batch_size": 1, "gradient_accumulation": batch}


def execute(run: Run, corpora: dict[str, Path], options: argparse.Namespace, pretrained: Path | None) -> dict[str, Any]:
    """Train, and measure on the dev queries before and after, and on the test queries."""
    corpus = corpora[run.corpus]
    if pretrained is None:
        model = pretrain(run, corpora["texts"], options.work, options.row_tokens)
        own: dict[str, Any] = {"model": str(model), "method": "full", "batch_size": run.batch}
    else:
        own = adapted(pretrained, run.batch)
    settings = parse_reranker_settings(
        {
            **own,
            "train": [f"{corpus},train"],
            "heldout": [f"{corpus},{PROBE if pretrained else 'dev'}"],
            "steps": run.steps,
            "learning_rate": run.rate,
            "max_tokens": run.max_tokens,
            "depth": run.depth,
            "seed": run.seed,
            "checkpoint_every": 20 if pretrained else 100,
        }
    )
    output = options.work / run.name
    start = time.process_time()
    report = finished_or(output, lambda: finetune_reranker(settings, output))
    found, _ = compare_rerankers(
        {run.arm: str(output / "model")}, corpus, split="test", depth=run.depth, resamples=1, progress=False
    )
    measured, bm25 = found["systems"][run.arm], found["systems"]["BM25"]
    by_chance = random_order(corpus, run.depth)
    shutil.rmtree(output)  # the rows do not need it
    return {
        **{name: measured[name] for name in MEASURES},
        "dev": {name: report["evaluations"][-1][name] for name in MEASURES},
        "before": {name: report["evaluations"][0][name] for name in MEASURES},
        "bm25": {name: bm25[name] for name in MEASURES},
        "random": {name: sum(of.values()) / len(of) for name, of in by_chance.items()},
        "by_query": {name: measured["by_query"][name] for name in MEASURES[:2]},
        "bm25_by_query": {name: bm25["by_query"][name] for name in MEASURES[:2]},
        "random_by_query": {name: by_chance[name] for name in MEASURES[:2]},
        "queries": found["queries"],
        "parameters": report["parameters"]["all"],
        "groups": report["data"]["train"]["groups"],
        "training_seconds": report["seconds"],
        "cpu_seconds": time.process_time() - start,
    }


@cache
def random_order(corpus: Path, depth: int) -> dict[str, dict[str, float]]:
    """Return each measure by test query, for BM25's documents in random order: the mean over `SHUFFLES` orders."""
    judged, generator = read_judged(corpus, "test"), np.random.default_rng(0)
    lists = bm25_run(judged, depth)
    sums: dict[str, dict[str, float]] = {name: dict.fromkeys(judged.queries, 0.0) for name in MEASURES}
    for _ in range(SHUFFLES):
        shuffled = {query: {one: generator.random() for one in of} for query, of in lists.items()}
        for name, of in measure_run(judged, shuffled, depth).items():
            for query, value in of.items() if name in MEASURES else ():
                sums[name][query] += value / SHUFFLES
    return sums


def run_of(options: argparse.Namespace, corpus: str, arm: str, seed: int, rate: float, *, pretrained: bool) -> Run:
    """Return a run with the sizes of the command line."""
    if pretrained:
        sizes = (options.pretrained_steps, options.batch, 0, 0, 0, 0)
    else:
        new = (options.pretrain_steps, options.width, options.layers, options.vocabulary)
        sizes = (options.steps, options.batch, *new)
    return Run(corpus, arm, seed, rate, *sizes, options.max_tokens, options.depth)


def compare_arms(options: argparse.Namespace, results: ResultFile) -> list[dict[str, Any]]:
    """Tune and train all arms on all corpora; returns the rows that are compared."""
    corpora = make_corpora(options)

    def row_of(run: Run, model: Path | None) -> dict[str, Any]:
        row = results.run(run, lambda run: execute(run, corpora, options, model))
        print({key: row[key] for key in ("corpus", "arm", "seed", "rate", "dev", "ndcg@10", "mrr@10")}, flush=True)
        return row

    compared = []
    for corpus in options.corpora:
        for arm in options.arms:
            tried = [run_of(options, corpus, arm, options.seeds[0], rate, pretrained=False) for rate in options.rates]
            best = max(tried, key=lambda run: row_of(run, None)["dev"]["ndcg@10"]).rate
            runs = [run_of(options, corpus, arm, seed, best, pretrained=False) for seed in options.seeds]
            compared += [row_of(run, None) for run in runs]
        for text in options.pretrained:
            arm, _, folder = text.partition("=")
            rate, seeds = options.pretrained_rate, options.pretrained_seeds
            runs = [run_of(options, corpus, arm, seed, rate, pretrained=True) for seed in seeds]
            compared += [row_of(run, Path(folder)) for run in runs]
    return compared


def plan(results: ResultFile, options: argparse.Namespace) -> str:
    """Return the number of runs and steps that the file does not have, and the CPU hours by its rows."""
    left: dict[str, int] = {}
    runs = 0
    names = [text.partition("=")[0] for text in options.pretrained]
    arms = [(arm, options.steps, options.seeds) for arm in options.arms]
    arms += [(arm, options.pretrained_steps, options.pretrained_seeds) for arm in names]
    for corpus in options.corpora:
        for arm, steps, seeds in arms:
            wanted = {"corpus": corpus, "arm": arm, "steps": steps, "batch": options.batch}
            done = sum(wanted.items() <= row.items() for row in results.rows)
            # All rates with the first seed, the best one with the others.
            rates = len(options.rates) if arm in options.arms else 1
            count = max(0, rates + len(seeds) - 1 - done)
            runs += count
            left[arm] = left.get(arm, 0) + count * steps
    seconds = {**SECONDS, **dict.fromkeys(names, SECONDS_OF_PRETRAINED)}
    return f"{runs} runs: {results.prediction(left, seconds)}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpora, models and runs")
    parser.add_argument("--corpora", nargs="+", choices=("cranfield", "docs"), default=["cranfield", "docs"])
    parser.add_argument("--cranfield", type=Path, help="folder of the collection in BEIR's layout")
    parser.add_argument("--packages", nargs="+", default=["numpy", "scipy", "torch"], help="sources of docs")
    parser.add_argument("--pages", type=positive, default=2000, help="pages of docs at most")
    parser.add_argument("--arms", nargs="*", choices=(*ARMS, *MORE_ARMS), default=list(ARMS), help="none: --pretrained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--steps", type=positive, default=250, help="finetuning steps")
    parser.add_argument("--batch", type=positive, default=4, help="groups of a step")
    parser.add_argument("--pretrain-steps", type=positive, default=500, help="steps of 4 rows")
    parser.add_argument("--row-tokens", type=positive, default=512, help="tokens of a row of the pretraining")
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=4, help="layers of the Transformer")
    parser.add_argument("--vocabulary", type=positive, default=2048)
    parser.add_argument("--max-tokens", type=positive, default=128, help="tokens of a pair")
    parser.add_argument("--depth", type=positive, default=20, help="documents of a list that are re-ranked")
    parser.add_argument("--pretrained", nargs="*", default=[], metavar="NAME=FOLDER", help="models to adapt by LoRA")
    parser.add_argument("--pretrained-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrained-steps", type=positive, default=30)
    parser.add_argument("--pretrained-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--plan", action="store_true", help="print the runs that are left, and run nothing")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--resume", type=Path, help="result file to continue")
    return parser


def main(arguments: list[str]) -> None:
    """Run what the file does not hold, and print tables and verdicts."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for text in options.pretrained:
        name, found, folder = text.partition("=")
        if not found or name in (*ARMS, *MORE_ARMS) or not Path(folder).is_dir():
            parser.error(f"--pretrained must be NAME=FOLDER with a name of its own and a model's folder, got {text!r}")
    torch.set_num_threads(options.threads)
    packages = ("sentence-transformers", "ir-measures", "bm25s", "peft")
    free = {"arms", "seeds", "rates", "steps", "batch", "pretrain_steps", "width", "layers", "vocabulary", "threads"}
    free |= {"max_tokens", "depth", "pretrained", "pretrained_seeds", "pretrained_steps", "pretrained_rate"}
    results = open_results(options, parser, "claims/reranking.py", arguments, *packages, free=free)
    if options.plan:
        print(plan(results, options))
        return
    compared = compare_arms(options, results)
    if not compared:
        parser.error("--arms and --pretrained name nothing to run")
    reference = options.pretrained[0].partition("=")[0] if options.pretrained else None
    for corpus in options.corpora:
        rows = [row for row in compared if row["corpus"] == corpus]
        print(table_of(corpus, rows, reference), flush=True)
        print(verdicts_of(corpus, rows, reference), flush=True)
    draw_results(compared, results.path.with_suffix(".png"))


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
