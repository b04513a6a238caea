"""Compare the layouts of arXiv 2407.05489 in translation: equal parameters, tuning, pairs and evaluation.

Tasks, each with arms of `translation_arms.py` that are trained from scratch with a vocabulary of their training pairs:

* `synthetic`: a synthetic language (`translation_tasks.py`) whose sentences have a name of random letters that is not
  in the training text. Scored: the share of names that are kept, by the length of the name and by the number of words
  of the sentence, which is the distance from a name to its copy.
* `en-de`, `en-fr`: multi30k (`--data FOLDER`), BLEU and chrF of its test corpora.
* `length`: multi30k en-de, trained on single sentences (the models of `en-de`) and on random concatenations of up to 5
  (CAT-5), tested on the same sentences joined by 1 to 10.

The learning rate of each arm is the one out of `--rates` (the same for all) with the lowest held-out loss after
`--tuning-steps`, with seed 0; `en-fr` and `length` take that of `en-de`. Then every arm is trained with each of
`--seeds`. Schedule, batches, label smoothing and dropout are the same for all. Beside the scores stand those of the
copied source, and of chance: random characters as names, the target of another pair.

    python benchmarks/claims/translation.py --tasks synthetic --work FOLDER
    python benchmarks/claims/translation.py --tasks en-de --data FOLDER --work FOLDER
    python benchmarks/claims/translation.py --tasks en-de en-fr length --data FOLDER --work FOLDER --resume FILE

A row is written after each run. `--resume FILE` continues the file with the same data; an interrupted run goes on in
`--work` after its last checkpoint. `--plan` prints the runs that are left. At the end the tables and the verdicts of
`translation_claims.py` are printed, and a picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import yaml
from circumstances import RESULTS, positive
from result_file import ResultFile, finished_or, open_results
from translation_arms import ARMS, DEFAULT, Sizes, configuration
from translation_claims import verdicts
from translation_plot import draw_results
from translation_table import tables
from translation_tasks import Language, multi30k, other_targets, part_of, segments, write_pairs

from ssm_zoo.conversion.load_model import load_model, load_tokenizer
from ssm_zoo.evaluation.translation import translate
from ssm_zoo.evaluation.translation_format import translation_format
from ssm_zoo.evaluation.translation_scores import score_translations
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.training.parallel_text import ParallelText
from ssm_zoo.training.translation import finetune_translation
from ssm_zoo.training.translation_settings import parse_translation_settings

TASKS = ("synthetic", "en-de", "en-fr", "length")
STEPS = {"synthetic": 3400, "en-de": 2400, "en-fr": 2400}
VOCABULARY = {"synthetic": 600, "en-de": 2000, "en-fr": 2000}
SECONDS = {"mamba": 0.32, "mamba-mha": 0.29, "retnet": 0.13, "transformer": 0.12}
"""CPU seconds of a step, on one thread of an AMD EPYC with other work on the machine (2026-11-30)."""
TUNED_ON = {"en-fr": "en-de"}
NAMES = (3, 6, 12)
"""Characters of a name in the tests of `synthetic`; training has 2 to 8."""
WORDS = (5, 10, 20, 40)
"""Words of a sentence in the tests of `synthetic`; training has 1 to 20."""
TRAINED_WORDS = [words for words in range(1, 21) for _ in range(20 // words)]
"""Numbers of words to draw from: about as many words in short sentences as in long ones. From short ones the lexicon is
learnt in a few hundred steps; with 3 to 20 alike, the Transformer had learnt none of it after 400."""
CORPORA = ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
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
        sizes = (self.width, self.layers, self.vocabulary, self.pairs, f"{self.dropout:g}")
        return "-".join(map(str, (*parts, self.seed, *sizes)))


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
        task: a key of `STEPS`.
        pairs: pairs to train on at most.
        test_texts: sentences of each test at most.
        data: folder of multi30k.
    """
    if task == "synthetic":
        language = Language()
        grid = {
            f"names of {name}, {words} words": language.pairs(test_texts, [words], [name], f"test {name} {words}")
            for name in NAMES
            for words in WORDS
        }
        training = TRAINED_WORDS, range(2, 9)
        return Texts(
            language.pairs(pairs, *training, "train"), language.pairs(min(pairs, 500), *training, "heldout"), grid
        )
    if data is None:
        raise SystemExit(f"--data must be the folder of multi30k for the task {task}")
    target = task.removeprefix("en-")
    tests = {name: part_of(multi30k(data, target, name), test_texts) for name in CORPORA}
    if task == "en-de":
        tests |= {f"{count} sentences": segments(tests[CORPORA[0]], count) for count in SEGMENTS}
    return Texts(part_of(multi30k(data, target, "train"), pairs), multi30k(data, target, "val"), tests)


def measure(run: Run, texts: Texts, work: Path) -> dict[str, Any]:
    """Carry a run out and return its row; a run whose numbers are not finite has none but "diverged"."""
    start = time.process_time()
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
            "max_tokens": 200,
            "row_tokens": 512,
            "batch_size": 2,
            "learning_rate": run.learning_rate,
            "steps": run.steps,
            "warmup": 0.1,
            "seed": run.seed,
            "residual_dropout": run.dropout,
            "checkpoint_every": 500,
        }
    )
    try:
        report = finished_or(folder, lambda: finetune_translation(settings, folder))
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
        # A corpus is also the joined test of one sentence, and is translated once.
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        row["tests"] = {}
        for name, pairs in texts.tests.items():
            key = tuple(pairs.sources)
            if key not in found:
                found[key] = tested(run, folder / "model", pairs)
            row["tests"][name] = found[key]
    shutil.rmtree(folder)  # the rows do not need it
    return {**row, "cpu_seconds": round(time.process_time() - start, 1)}


def tested(run: Run, model: Path, pairs: ParallelText) -> dict[str, Any]:
    """Return the scores of a model's translations, of the copied sources and of other targets."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class = AutoModelForSeq2SeqLM if run.arm.startswith("encdec") else AutoModelForCausalLM
    loaded: Any = load_model(model, auto_class)
    form = translation_format(load_tokenizer(model), loaded.config)
    # A model that has not learnt to end is cut not far behind the longest target.
    most = 10 + 5 * max(map(len, form.encode(pairs.targets))) // 4
    found = translate(loaded, form, pairs.sources, beams=run.beams, max_new_tokens=most, batch_size=64)
    scores = score_translations(found.texts, pairs.sources, pairs.targets)
    copied = score_translations(pairs.sources, pairs.sources, pairs.targets)
    chance = score_translations(other_targets(pairs), pairs.sources, pairs.targets)
    numbers = {key: scores[key] for key in ("bleu", "bleu_signature", "chrf", "chrf_signature")}
    return {
        **numbers,
        "entity_recall": scores["entities"]["recall"],
        "entities": scores["entities"]["entities"],
        "copied": {key: copied[key] for key in ("bleu", "chrf")},
        "chance": {key: chance[key] for key in ("bleu", "chrf")},
        "texts": len(pairs),
        "hit_the_limit": found.finished.count(False),
        "tokens_per_second": round(found.tokens / found.seconds, 1),
    }


def run_of(options: argparse.Namespace, task: str, **values: Any) -> Run:
    """Return a run of a task with the sizes of the command line."""
    common = {key: getattr(options, key) for key in ("width", "layers", "pairs", "test_texts", "beams", "dropout")}
    vocabulary = options.vocabulary or VOCABULARY[task]
    return Run(task=task, vocabulary=vocabulary, **{**common, "concatenate": 1, **values})


def trials(options: argparse.Namespace, task: str, arm: str) -> list[Run]:
    """Return the runs that choose the learning rate of an arm."""
    shared: dict[str, Any] = {"purpose": "tuning", "steps": options.tuning_steps, "seed": 0}
    task = TUNED_ON.get(task, task)
    return [run_of(options, task, arm=arm, learning_rate=rate, **shared) for rate in options.rates]


def compared_runs(options: argparse.Namespace, name: str, arm: str, rate: float) -> list[Run]:
    """Return the runs of an arm that are compared in a task of the command line."""
    task, concatenated = ("en-de", (1, CONCATENATED)) if name == "length" else (name, (1,))
    shared: dict[str, Any] = {"purpose": "comparison", "steps": options.steps or STEPS[task], "learning_rate": rate}
    return [
        run_of(options, task, arm=arm, concatenate=count, seed=seed, **shared)
        for count in concatenated
        for seed in options.seeds
    ]


def compare(results: ResultFile, options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Tune every arm on a task, train it with every seed, and return the rows that are compared."""

    def row_of(run: Run) -> dict[str, Any]:
        texts = texts_of(run.task, options.pairs, options.test_texts, options.data)
        row = results.run(run, lambda run: measure(run, texts, options.work))
        shown = ("arm", "task", "purpose", "concatenate", "learning_rate", "seed", "parameters", "heldout_loss")
        print({key: row.get(key) for key in shown}, flush=True)
        return row

    task, compared = "en-de" if name == "length" else name, []
    for arm in options.arms:
        rate = options.rates[0]
        if len(options.rates) > 1:
            tried = [row_of(run) for run in trials(options, task, arm)]
            finite = [row for row in tried if row["heldout_loss"] is not None]
            if not finite:
                raise SystemExit(f"{arm} diverges with all of {options.rates}: give lower learning rates")
            rate = min(finite, key=lambda row: row["heldout_loss"])["learning_rate"]
        compared += [row_of(run) for run in compared_runs(options, name, arm, rate)]
    return compared


def plan(results: ResultFile, options: argparse.Namespace) -> str:
    """Return the numbers of runs and steps that the file does not have, and the CPU hours by its rows."""
    missing: list[dict[str, Any]] = []
    for name in options.tasks:
        task = "en-de" if name == "length" else name
        for arm in options.arms:
            wanted = [dataclasses.asdict(run) for run in trials(options, task, arm) if len(options.rates) > 1]
            for run in compared_runs(options, name, arm, 0.0):
                # The rate is not known before the tuning.
                fields = dataclasses.asdict(run)
                del fields["learning_rate"]
                wanted.append(fields)
            # Tasks share runs.
            missing += [fields for fields in wanted if fields not in missing and not results.find(fields)]
    left = {arm: sum(fields["steps"] for fields in missing if fields["arm"] == arm) for arm in options.arms}
    return f"{len(missing)} runs of {', '.join(options.tasks)}: {results.prediction(left, SECONDS)}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["synthetic"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(DEFAULT))
    parser.add_argument("--data", type=Path, help="folder of multi30k, with train.en.gz and so on")
    parser.add_argument("--pairs", type=positive, default=29_000, help="pairs to train on at most")
    parser.add_argument("--test-texts", type=positive, default=200, help="sentences of each test at most")
    parser.add_argument("--vocabulary", type=positive, help=f"by default {VOCABULARY}")
    parser.add_argument("--width", type=positive, default=96, help="width of Mamba")
    parser.add_argument("--layers", type=positive, default=8, help="layers of Mamba")
    parser.add_argument("--steps", type=positive, help=f"steps of 1,024 tokens; by default {STEPS}")
    parser.add_argument("--tuning-steps", type=positive, default=600)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3], help="learning rates to try")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--beams", type=positive, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--plan", action="store_true", help="print the runs that are left, and run nothing")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    return parser


def main(arguments: list[str]) -> None:
    """Carry out the runs that the file does not hold yet, and print tables and verdicts."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Rows have these as fields, or are chosen by them.
    free = vars(options).keys() - {"data"}
    results = open_results(options, parser, "claims/translation.py", arguments, "sacrebleu", free=free)
    if options.plan:
        print(plan(results, options))
        return
    compared = {name: compare(results, options, name) for name in options.tasks}
    for name, rows in compared.items():
        print(f"{tables(name, rows)}\n", flush=True)
    for found in verdicts(compared):
        print(f"{found['verdict']}: {found['text']} {'; '.join(found['because'])}")
    draw_results(compared, results.path.with_suffix(".png"))


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
