"""Compare families as rerankers, at equal parameters, pretraining, groups and tuning (RankMamba, arXiv 2403.18276).

For each corpus: its queries are split once into train, dev and test; one BPE is learnt from its documents; every arm is
pretrained as a language model on the documents (texts alone, no judgements) for `--pretrain-steps`, then finetuned on
the train queries with the localised contrastive loss over 1 positive and 7 negatives of BM25. The learning rate of an
arm is the one of `--rates`, the same for all, with the best nDCG@10 on the dev queries with the first seed. The seeds
differ in everything: weights, pretraining, negatives, order. Scores are those of the test queries, with BM25's best
`--depth` documents re-ranked.

* `cranfield`: a folder in BEIR's layout (`--cranfield`).
* `docs`: docstrings of installed packages (`--packages`): the summary line, withheld, retrieves the rest of its page.

The bidirectional arms start from the causal pretraining of their family, whose weights they share. There is no
bidirectional Transformer in the zoo, so that arm of the paper is missing here.

    python benchmarks/claims/reranking.py --work FOLDER --cranfield beir/cranfield
    python benchmarks/claims/reranking.py --work FOLDER --cranfield beir/cranfield --resume FILE.jsonl

A row is written after each run: {"corpus", "arm", "purpose", "seed", "rate", ..., "ndcg@10", "mrr@10", "map",
"by_query", "bm25"}. An interrupted run goes on in `--work` at its last checkpoint. At the end a table is printed: mean
and range over the seeds, and the randomisation test against BM25 and the Transformer on each query's mean over the
seeds, with Holm's correction in brackets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # where reranking_speed.py is

from circumstances import RESULTS, positive
from reranking_speed import HYBRID, MAMBA, MAMBA2, RETNET, TRANSFORMER, Point, equal_size, keys_of
from reranking_texts import documentation, split_collection
from result_file import ResultFile, open_results
from transformers import AutoTokenizer

from ssm_zoo.evaluation.compare_rerankers import compare_rerankers
from ssm_zoo.evaluation.reranking_data import read_judged
from ssm_zoo.evaluation.significance import compare, holm
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.new_model import entries_of, learn_vocabulary
from ssm_zoo.training.reranker import finetune_reranker
from ssm_zoo.training.reranker_settings import parse_reranker_settings

BIDIRECTIONAL = " bidirectional"
ARMS = (TRANSFORMER, MAMBA, MAMBA2, RETNET, HYBRID, MAMBA2 + BIDIRECTIONAL, RETNET + BIDIRECTIONAL)
MEASURES = ("ndcg@10", "mrr@10", "map")


@dataclass(frozen=True)
class Run:
    """A run: what tells it from all others in the file."""

    corpus: str
    arm: str
    purpose: str  # "tuning" or "comparison"
    seed: int
    rate: float
    steps: int
    pretrain_steps: int
    width: int
    layers: int
    vocabulary: int
    max_tokens: int
    depth: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.corpus}-{self.arm}-{self.purpose}-{self.seed}-{self.rate:g}-{self.steps}".replace(" ", "-")


def make_corpora(options: argparse.Namespace) -> dict[str, Path]:
    """Return the folder of each corpus, split, which is made once."""
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
            texts = list(read_judged(folder, "train").documents.values())
            learn_vocabulary(texts, options.vocabulary, progress=False).save_pretrained(folder / "tokenizer")
            rows = [json.dumps({"text": text}) for text in texts if text.strip()]
            cut = max(1, len(rows) // 50)
            for part, own in (("heldout", rows[:cut]), ("train", rows[cut:])):
                (folder / f"{part}.jsonl").write_text("\n".join(own))
            (folder / "done").write_text(json.dumps(parts))
        found[name] = folder
    return found


def pretrain(run: Run, corpus: Path, work: Path, row_tokens: int) -> Path:
    """Return the folder of a run's pretrained model, which is trained once for all rates."""
    arm = run.arm.removesuffix(BIDIRECTIONAL)
    output = work / f"{run.corpus}-{arm}-pretrained-{run.seed}-{run.pretrain_steps}"
    if not (output / "report.json").is_file():
        entries = entries_of(AutoTokenizer.from_pretrained(corpus / "tokenizer"))
        point = Point(arm, "", run.max_tokens, 1, run.width, run.layers, entries, "float32", 1)
        kind, keys = keys_of(arm, point, equal_size(arm, point))
        settings = parse_from_scratch(
            {
                "config": {"model_type": kind.model_type, **keys},
                "tokenizer": str(corpus / "tokenizer"),
                "train": [str(corpus / "train.jsonl")],
                "heldout": [str(corpus / "heldout.jsonl")],
                "steps": run.pretrain_steps,
                "row_tokens": row_tokens,
                "batch_size": 8,
                "seed": run.seed,
                "learning_rate": 1e-3,
                "warmup": min(100, run.pretrain_steps // 10),
            }
        )
        train_from_scratch(settings, output, command="python benchmarks/claims/reranking.py")
    if not run.arm.endswith(BIDIRECTIONAL):
        return output / "model"
    folder = work / f"{output.name}-bidirectional"
    if not folder.is_dir():
        shutil.copytree(output / "model", folder, ignore=shutil.ignore_patterns("config.json"))
        config = json.loads((output / "model" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "bidirectional": True}))
    return folder


def execute(run: Run, corpus: Path, work: Path, row_tokens: int) -> dict[str, Any]:
    """Train and measure: on the dev queries to tune, on the test queries to compare."""
    model = pretrain(run, corpus, work, row_tokens)
    split = "dev" if run.purpose == "tuning" else "test"
    settings = parse_reranker_settings(
        {
            "model": str(model),
            "train": [f"{corpus},train"],
            "heldout": [f"{corpus},{split}"],
            "method": "full",
            "steps": run.steps,
            "learning_rate": run.rate,
            "max_tokens": run.max_tokens,
            "depth": run.depth,
            "seed": run.seed,
        }
    )
    output = work / run.name
    report = finetune_reranker(settings, output)
    found, _ = compare_rerankers(
        {run.arm: str(output / "model")}, corpus, split=split, depth=run.depth, resamples=1, progress=False
    )
    measured, bm25 = found["systems"][run.arm], found["systems"]["BM25"]
    return {
        **{name: measured[name] for name in MEASURES},
        "before": {name: report["evaluations"][0][name] for name in MEASURES},
        "bm25": {name: bm25[name] for name in MEASURES},
        "by_query": {name: measured["by_query"][name] for name in MEASURES[:2]},
        "bm25_by_query": {name: bm25["by_query"][name] for name in MEASURES[:2]},
        "queries": found["queries"],
        "parameters": report["parameters"]["all"],
        "groups": report["data"]["train"]["groups"],
        "training_seconds": report["seconds"],
    }


def compare_arms(options: argparse.Namespace, results: ResultFile) -> None:
    """Tune and compare all arms on all corpora."""
    corpora = make_corpora(options)
    shared = (options.steps, options.pretrain_steps, options.width, options.layers, options.vocabulary)
    sizes = (*shared, options.max_tokens, options.depth)
    for name, corpus in corpora.items():
        for arm in options.arms:

            def row(purpose: str, seed: int, rate: float, arm: str = arm, corpus: Path = corpus) -> dict[str, Any]:
                run = Run(corpus.name, arm, purpose, seed, rate, *sizes)
                return results.run(run, lambda run: execute(run, corpus, options.work, options.row_tokens))

            tuned = {rate: row("tuning", options.seeds[0], rate)["ndcg@10"] for rate in options.rates}
            best = max(tuned, key=lambda rate: tuned[rate])
            for seed in options.seeds:
                row("comparison", seed, best)
        rows = [one for one in results.rows if one["corpus"] == name and one["purpose"] == "comparison"]
        print(table_of(name, rows))


def table_of(corpus: str, rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of a corpus: mean and range over the seeds, and p-values on nDCG@10, Holm's included."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    means = {"BM25": rows[0]["bm25_by_query"]["ndcg@10"]}
    for arm, own in arms.items():
        values = [row["by_query"]["ndcg@10"] for row in own]
        means[arm] = {query: sum(of[query] for of in values) / len(values) for query in values[0]}
    against = {
        peer: {arm: compare(means[arm], means[peer])["p_randomisation"] for arm in arms if arm != peer}
        for peer in ("BM25", TRANSFORMER)
        if peer in means
    }
    corrected = {peer: dict(zip(of, holm(list(of.values())), strict=True)) for peer, of in against.items()}
    first = rows[0]["bm25"]
    lines = [
        f"{corpus}: {rows[0]['queries']} test queries",
        f"| arm | nDCG@10 | MRR@10 | MAP | {' | '.join(f'p against {peer}' for peer in against)} |",
        f"|---|---:|---:|---:|{'---:|' * len(against)}",
        f"| BM25 | {' | '.join(f'{first[name]:.3f}' for name in MEASURES)} |{' |' * len(against)}",
    ]
    for arm, own in arms.items():
        cells = []
        for name in MEASURES:
            values = [row[name] for row in own]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        cells += [f"{of[arm]:.3f} ({corrected[peer][arm]:.3f})" if arm in of else "" for peer, of in against.items()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run what the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpora, models and runs")
    parser.add_argument("--corpora", nargs="+", choices=("cranfield", "docs"), default=["cranfield", "docs"])
    parser.add_argument("--cranfield", type=Path, help="folder of the collection in BEIR's layout")
    parser.add_argument("--packages", nargs="+", default=["numpy", "scipy", "torch"], help="sources of docs")
    parser.add_argument("--pages", type=positive, default=4000, help="pages of docs at most")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--steps", type=positive, default=300, help="finetuning steps of 8 groups")
    parser.add_argument("--pretrain-steps", type=positive, default=2000)
    parser.add_argument("--row-tokens", type=positive, default=512, help="tokens of a row of the pretraining")
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--max-tokens", type=positive, default=384)
    parser.add_argument("--depth", type=positive, default=50)
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--resume", type=Path, help="result file to continue")
    options = parser.parse_args(arguments)
    packages, free = ("sentence-transformers", "ir-measures", "bm25s"), {"corpora", "arms", "seeds", "rates"}
    results = open_results(options, parser, "claims/reranking.py", arguments, *packages, free=free)
    compare_arms(options, results)


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
