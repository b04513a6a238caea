"""Compare the layouts of arXiv 2407.05489 in translation: equal parameters, tuning, pairs and evaluation.

Three tasks, each with arms of `translation_arms.py` that are trained from scratch with a vocabulary of their training
pairs:

* `synthetic`: a synthetic language (`translation_tasks.py`) whose sentences have a name of random letters that is not
  in the training text. Scored: the share of names that are kept, by the length of the name and by the number of words
  of the sentence, which is the distance from a name to its copy.
* `en-de`, `en-fr`: multi30k (`--data FOLDER`), BLEU and chrF of test_2016_flickr.
* `length`: multi30k en-de, trained on single sentences and on random concatenations of up to 5 (CAT-5), tested on 1 to
  10 joined sentences.

The learning rate of each arm is the one out of `--rates` (the same for all) with the lowest held-out loss after
`--tuning-steps`, with seed 0; CAT-5 takes that of single sentences. Then every arm is trained with each of `--seeds`.
Schedule, batches, label smoothing and dropout are the same for all. Beside the scores stand those of the copied source.

    python benchmarks/claims/translation.py --tasks synthetic --threads 2 --work FOLDER
    python benchmarks/claims/translation.py --tasks en-de length --data FOLDER --threads 2 --work FOLDER

A row is written after each run. `--resume FILE` continues the file with the same threads and data; an interrupted run
goes on in `--work` after its last checkpoint. At the end the tables are printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import yaml
from circumstances import RESULTS, positive
from result_file import ResultFile, open_results
from translation_arms import ARMS, Sizes, configuration
from translation_tasks import Language, multi30k, part_of, segments, write_pairs

from ssm_zoo.conversion.load_model import load_model, load_tokenizer
from ssm_zoo.evaluation.translation import translate
from ssm_zoo.evaluation.translation_format import translation_format
from ssm_zoo.evaluation.translation_scores import score_translations
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.parallel_text import ParallelText
from ssm_zoo.training.translation import finetune_translation
from ssm_zoo.training.translation_settings import parse_translation_settings

TASKS = ("synthetic", "en-de", "en-fr", "length")
NAMES = (3, 6, 12)
"""Characters of a name in the tests of `synthetic`; training has 2 to 8."""
WORDS = (5, 15, 40)
"""Words of a sentence in the tests of `synthetic`; training has 3 to 20."""
SEGMENTS = (1, 2, 3, 5, 10)
CONCATENATED = 5


@dataclass(frozen=True)
class Run:
    """A run: what tells it from all others in the file."""

    arm: str
    task: str
    purpose: str  # "tuning" or "comparison"
    concatenate: int
    learning_rate: float
    steps: int
    seed: int
    width: int
    layers: int
    vocabulary: int
    pairs: int
    test_texts: int
    beams: int
    dropout: float

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        parts = (self.arm, self.task, self.purpose, f"cat{self.concatenate}", f"{self.learning_rate:g}", self.steps)
        return "-".join(map(str, (*parts, self.seed, self.width, self.layers, self.pairs)))


@dataclass(frozen=True)
class Texts:
    """The texts of a task: what is trained on, the loss is measured on, and by name what is translated."""

    train: ParallelText
    heldout: ParallelText
    tests: dict[str, ParallelText]


@cache
def texts_of(task: str, pairs: int, test_texts: int, data: Path | None) -> Texts:
    """Return the texts of a task.

    Args:
        task: one of `TASKS`.
        pairs: pairs to train on at most.
        test_texts: texts of each test at most.
        data: folder of multi30k.
    """
    if task == "synthetic":
        language = Language()
        grid = {
            f"names of {name}, {words} words": language.pairs(test_texts, [words], [name], f"test {name} {words}")
            for name in NAMES
            for words in WORDS
        }
        training = range(3, 21), range(2, 9)
        return Texts(
            language.pairs(pairs, *training, "train"), language.pairs(min(pairs, 500), *training, "heldout"), grid
        )
    if data is None:
        raise SystemExit(f"--data must be the folder of multi30k for the task {task}")
    target = "fr" if task == "en-fr" else "de"
    test = multi30k(data, target, "test_2016_flickr")
    counts = SEGMENTS if task == "length" else (1,)
    joined = {f"{count} sentences": part_of(segments(test, count), test_texts) for count in counts}
    return Texts(part_of(multi30k(data, target, "train"), pairs), multi30k(data, target, "val"), joined)


def measure(run: Run, texts: Texts, work: Path) -> dict[str, Any]:
    """Carry a run out and return its row; a run whose numbers are not finite has none but "diverged"."""
    folder, sources = work / run.name, work / "texts" / f"{run.task}-{run.pairs}"
    sizes = Sizes(run.width, run.layers)
    config = configuration(run.arm, sizes, run.vocabulary)
    chosen = work / "configurations" / f"{run.arm}-{run.width}-{run.layers}-{run.vocabulary}.yaml"
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text(yaml.safe_dump(config), encoding="utf-8")
    settings = parse_translation_settings(
        {
            "model": str(chosen),
            "train": [write_pairs(texts.train, sources.with_name(f"{sources.name}-train.txt"))],
            "heldout": [write_pairs(texts.heldout, sources.with_name(f"{sources.name}-heldout.txt"))],
            "train_tokenizer": run.vocabulary,
            "concatenate": run.concatenate,
            "learning_rate": run.learning_rate,
            "steps": run.steps,
            "warmup": 0.1,
            "seed": run.seed,
            "residual_dropout": run.dropout,
            "checkpoint_every": 1000,
        }
    )
    try:
        report = finetune_translation(settings, folder)
    except ValueError as error:
        if "Lower learning_rate" not in str(error):
            raise
        shutil.rmtree(folder)
        return {"diverged": str(error), "heldout_loss": None}
    row: dict[str, Any] = {
        "parameters": report["parameters"]["all"],
        "heldout_loss": report["evaluations"][-1]["loss"],
        "predicted_tokens": report["tokens"],
        "trained_pairs": {key: report["data"]["train"][key] for key in ("read", "pairs", "dropped")},
        "seconds": round(report["seconds"], 1),
    }
    if run.purpose == "comparison":
        row["tests"] = {name: tested(run, folder / "model", pairs) for name, pairs in texts.tests.items()}
    shutil.rmtree(folder)  # the rows do not need it
    return row


def tested(run: Run, model: Path, pairs: ParallelText) -> dict[str, Any]:
    """Return the scores of a model's translations and of the copied sources."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class = AutoModelForSeq2SeqLM if run.arm.startswith("encdec") else AutoModelForCausalLM
    loaded: Any = load_model(model, auto_class)
    form = translation_format(load_tokenizer(model), loaded.config)
    most = 2 * max(map(len, form.encode(pairs.targets)))
    found = translate(loaded, form, pairs.sources, beams=run.beams, max_new_tokens=most)
    scores = score_translations(found.texts, pairs.sources, pairs.targets)
    copied = score_translations(pairs.sources, pairs.sources, pairs.targets)
    numbers = {key: scores[key] for key in ("bleu", "bleu_signature", "chrf", "chrf_signature")}
    return {
        **numbers,
        "entity_recall": scores["entities"]["recall"],
        "entities": scores["entities"]["entities"],
        "copied": {key: copied[key] for key in ("bleu", "chrf")},
        "texts": len(pairs),
        "hit_the_limit": found.finished.count(False),
        "tokens_per_second": round(found.tokens / found.seconds, 1),
    }


def compare(results: ResultFile, options: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Tune every arm on a task, train it with every seed, and return the rows that are compared."""
    texts = texts_of(task, options.pairs, options.test_texts, options.data)
    common = {key: getattr(options, key) for key in ("width", "layers", "vocabulary", "pairs", "test_texts", "beams")}
    common |= {"task": task, "dropout": options.dropout}

    def row_of(arm: str, purpose: str, rate: float, steps: int, seed: int, concatenate: int = 1) -> dict[str, Any]:
        run = Run(arm, purpose=purpose, concatenate=concatenate, learning_rate=rate, steps=steps, seed=seed, **common)
        row = results.run(run, lambda run: measure(run, texts, options.work))
        shown = ("arm", "task", "purpose", "concatenate", "learning_rate", "seed", "parameters", "heldout_loss")
        print({key: row.get(key) for key in shown}, flush=True)
        return row

    compared = []
    for arm in options.arms:
        rate = options.rates[0]
        if len(options.rates) > 1:
            tried = [row_of(arm, "tuning", each, options.tuning_steps, 0) for each in options.rates]
            finite = [row for row in tried if row["heldout_loss"] is not None]
            if not finite:
                raise SystemExit(f"{arm} diverges with all of {options.rates}: give lower learning rates")
            rate = min(finite, key=lambda row: row["heldout_loss"])["learning_rate"]
        for concatenate in (1, CONCATENATED) if task == "length" else (1,):
            compared += [row_of(arm, "comparison", rate, options.steps, seed, concatenate) for seed in options.seeds]
    return compared


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a table of one task: the means over the seeds that did not diverge, with the least and the most."""
    score = "entity_recall" if rows[0]["task"] == "synthetic" else "bleu"
    digits = 3 if score == "entity_recall" else 2
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["concatenate"]), []).append(row)
    names = list(next((row["tests"] for row in rows if "tests" in row), {}))
    lines = [f"{rows[0]['task']}: {score}", " | ".join(["arm", "parameters", "seeds", *names])]
    for (arm, concatenate), seeds in groups.items():
        group = [row for row in seeds if "tests" in row]
        diverged = len(seeds) - len(group)
        label = ARMS[arm] + (f", CAT-{concatenate}" if concatenate > 1 else "")
        numbers = f"{len(seeds)}, {diverged} diverged" if diverged else str(len(seeds))
        if not group:
            lines.append(" | ".join([label, "-", numbers, *("-" for _ in names)]))
            continue
        cells = []
        for name in names:
            values = [row["tests"][name][score] for row in group]
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(" | ".join([label, f"{group[0]['parameters']:,}", numbers, *cells]))
    if score == "bleu" and names:
        first = next(row["tests"] for row in rows if "tests" in row)
        copied = (f"{first[name]['copied']['bleu']:.2f}" for name in names)
        lines.append(" | ".join(["copied source", "-", "-", *copied]))
    if score == "entity_recall":
        lines.append(" | ".join(["copied source", "-", "-", *("1 by definition" for _ in names)]))
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["synthetic"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--data", type=Path, help="folder of multi30k, with train.en.gz and so on")
    parser.add_argument("--pairs", type=positive, default=29_000, help="pairs to train on at most")
    parser.add_argument("--test-texts", type=positive, default=200, help="texts of each test at most")
    parser.add_argument("--vocabulary", type=positive, default=4000)
    parser.add_argument("--width", type=positive, default=128, help="width of Mamba")
    parser.add_argument("--layers", type=positive, default=8, help="layers of Mamba")
    parser.add_argument("--steps", type=positive, default=4000)
    parser.add_argument("--tuning-steps", type=positive, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3], help="learning rates to try")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--beams", type=positive, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    return parser


def main(arguments: list[str]) -> None:
    """Carry out the runs that the file does not hold yet, and print a table for each task."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Rows have these as fields, or are chosen by them.
    free = vars(options).keys() - {"threads", "data"}
    results = open_results(options, parser, "claims/translation.py", arguments, "sacrebleu", free=free)
    for task in options.tasks:
        print(table_of(compare(results, options, task)), flush=True)


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
