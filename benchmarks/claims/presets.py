"""Compare the recipes of `ssm-zoo distill` on one teacher: equal layers, tokens, order of the texts and evaluation.

Each preset is scaled down to `--tokens` training tokens. Its stages keep their shares of them, at least a step each, in
batches of 4 windows of 256 tokens, and all convert the same `--layers`, in steps where a preset has steps. What a
preset does besides (mixer, start, calibration, objectives, trained weights, schedules) is its own.

Papers choose learning rates for billions of tokens. Therefore the rates of a preset are multiplied by a factor, the one
out of `--factors` (the same for all presets) with the lowest held-out loss after `--tuning-tokens`, with seed 0, on the
first half of the held-out text. No rate is raised above 2e-3. The runs that are compared are scored on the second half:
loss, KL and agreement in windows of 256 tokens, and the loss on a passage that was read 416 tokens before. A bounded
memory (`zoo`) holds more than 256 tokens, so that only the last one says what it forgets. Where a preset trains on the
teacher's text, its share of the tokens is written and read in the same manner; `run_seconds` include the writing.

    python benchmarks/claims/presets.py --teacher FOLDER --tokens 102400 --layers 15 --threads 2 --work FOLDER

A row is written after each run. `--resume FILE` continues the file; an interrupted run goes on in `--work` after its
last whole stage. At the end a table is printed and a picture drawn beside the file.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, nameable, positive
from presets_plot import draw, table_of
from result_file import open_results

from ssm_zoo.distill.data import read_texts
from ssm_zoo.distill.recipe import Recipe, parse_recipe, resolve_layers
from ssm_zoo.distill.recipe_files import load_recipe, preset_names
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.teacher import load_teacher
from ssm_zoo.kernels.cpu_products import fast_products

ORDER = ("mohawk", "mamba_in_llama", "radlads", "lolcats", "priming", "supra", "mamba2_hybrid", "zoo")
PRESETS = tuple(name for name in ORDER if name in preset_names())
PATTERNS = ("every:4", "odd", "except:4", "except:8", "all")  # each contains the ones before it
BATCH, LENGTH = 4, 256
STEP = BATCH * LENGTH
PROMPT_LENGTH = 32  # of text that a teacher writes, in texts of 256 tokens
EVALUATION = {"sequence_length": LENGTH, "batch_size": 4, "repeat_distance": 416, "final": False}
HIGHEST_RATE = 2e-3
RATES = ("learning_rate", "other_learning_rate", "norm_learning_rate", "mlp_learning_rate", "embedding_learning_rate")


@dataclass(frozen=True)
class Run:
    """A run: what tells it from all others in the file."""

    preset: str
    purpose: str  # "tuning" or "comparison"
    factor: float
    tokens: int
    layers: int
    seed: int
    dtype: str
    teacher: str
    train: str
    heldout: str
    evaluation_tokens: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.preset}-{self.purpose}-{self.factor:g}-{self.tokens}-{self.layers}-{self.seed}-{self.dtype}"


@dataclass(frozen=True)
class Places:
    """Paths of the teacher and the texts. Rows do not contain them, since they name private folders."""

    teacher: str
    num_layers: int
    train: str
    heldout: dict[str, Path] = field(default_factory=dict)  # by purpose


def steps_of(tokens: list[int], steps: int) -> list[int]:
    """Divide steps in the proportions of the stages' tokens: at least one each, the rest by largest remainders."""
    if steps < len(tokens):
        raise SystemExit(f"--tokens must be at least {len(tokens) * STEP}, a step of {STEP} for each stage")
    exact = [steps * part / sum(tokens) for part in tokens]
    found = [max(int(part), 1) for part in exact]
    while sum(found) != steps:
        change = 1 if sum(found) < steps else -1
        movable = [index for index, count in enumerate(found) if change > 0 or count > 1]
        found[max(movable, key=lambda index: change * (exact[index] - found[index]))] += change
    return found


def raised(rate: float, factor: float) -> float:
    """Return a learning rate times a factor, as far as `HIGHEST_RATE` or the preset's own rate allows."""
    return min(rate * factor, max(HIGHEST_RATE, rate))


def scaled(run: Run, places: Places) -> Recipe:
    """Return the preset of a run for its number of tokens and layers."""
    given = [f"teacher={places.teacher}", f"data.train={places.train}", f"data.heldout={places.heldout[run.purpose]}"]
    values = load_recipe(run.preset, given).model_dump(exclude_unset=True)
    pattern = next((name for name in PATTERNS if len(resolve_layers(name, places.num_layers)) == run.layers), None)
    if pattern is None:
        counts = {name: len(resolve_layers(name, places.num_layers)) for name in PATTERNS}
        raise SystemExit(f"--layers must be one of {counts} for a teacher of {places.num_layers} layers")
    values["student"]["layers"] = pattern
    values["data"]["sequence_length"] = LENGTH
    share = run.tokens / sum(stage["tokens"] for stage in values["stages"])
    if spec := values["data"].get("pseudo_labels"):
        spec |= {"tokens": max(round(share * spec["tokens"]), LENGTH), "prompt_length": PROMPT_LENGTH}
    counts = steps_of([stage["tokens"] for stage in values["stages"]], run.tokens // STEP)
    for stage, steps in zip(values["stages"], counts, strict=True):
        stage |= {"tokens": steps * STEP, "batch_size": BATCH, "sequence_length": LENGTH}
        stage |= {name: raised(stage[name], run.factor) for name in RATES if stage.get(name) is not None}
        if stage.get("layers") is not None:
            chosen = resolve_layers(stage["layers"], places.num_layers)
            if len(chosen) >= run.layers or stage is values["stages"][-1]:
                del stage["layers"]
    values |= {
        "evaluation": {**EVALUATION, "tokens": run.evaluation_tokens},
        "seed": run.seed,
        "dtype": run.dtype,
        "checkpoint_every": 1000,
    }
    return parse_recipe(values, f"preset {run.preset}")


def measure(run: Run, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Carry a run out and return its row; a run whose numbers are not finite has none but "diverged"."""
    started = time.monotonic()
    try:
        report = distill(recipe, folder, command=f"benchmarks/claims/presets.py ({run.name})")
    except ValueError as error:
        if "Lower learning_rate" not in str(error):
            raise
        shutil.rmtree(folder)
        return {"diverged": str(error), "loss": None}
    for part in ("checkpoints", "student"):  # gigabytes that the rows do not need
        shutil.rmtree(folder / part, ignore_errors=True)
    rows = {row["name"]: row for row in report["evaluations"]}
    last, teacher = report["evaluations"][-1], rows["teacher"]
    seconds = sum(stage["seconds"] for stage in report["stages"])
    tokens = sum(stage["tokens"] for stage in report["stages"])
    scores = ("loss", "kl", "top1_agreement", "repeat_loss")
    return {
        "mixer": recipe.student.mixer,
        "loss": last["loss"],
        "gap": last["loss"] - teacher["loss"],
        **{name: last[name] for name in scores[1:]},
        "teacher_loss": teacher["loss"],
        "teacher_repeat_loss": teacher["repeat_loss"],
        "start": {name: rows["step 0"][name] for name in scores},
        "control": {name: rows["window + sinks"][name] for name in scores},
        "stages": [
            {
                "name": stage.name,
                "tokens": entry["tokens"],
                "learning_rate": stage.learning_rate,
                "seconds": round(entry["seconds"], 1),
                **{name: rows[stage.name][name] for name in scores},
            }
            for stage, entry in zip(recipe.stages, report["stages"], strict=True)
        ],
        "predictions": last["tokens"],
        "trained_tokens": tokens,
        "training_seconds": round(seconds, 1),
        "seconds_per_1000_tokens": round(1000 * seconds / tokens, 2),
        "run_seconds": round(time.monotonic() - started, 1),
    }


def halves(source: str, folder: Path) -> dict[str, Path]:
    """Write the two halves of a held-out text, cut at a line break, and return their files by purpose."""
    text = "\n\n".join(read_texts(source, "heldout"))
    cut = text.find("\n", len(text) // 2) + 1
    folder.mkdir(parents=True, exist_ok=True)
    found = {"tuning": folder / "heldout-tuning.txt", "comparison": folder / "heldout-comparison.txt"}
    for path, part in zip(found.values(), (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return found


def parser_of_options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder or Hub id")
    parser.add_argument("--train", default="builtin:wikitext2", help="training text")
    parser.add_argument("--heldout", default="builtin:wikitext2", help="held-out text")
    parser.add_argument("--tokens", type=positive, default=102_400, help="training tokens of a run")
    parser.add_argument("--tuning-tokens", type=positive, help="of a run of the search; a tenth of --tokens by default")
    parser.add_argument(
        "--evaluation-tokens", type=positive, default=6144, help="held-out tokens; a third for the search"
    )
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 8.0, 64.0], help="on the learning rates")
    parser.add_argument("--layers", type=positive, default=15, help="number of converted layers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    return parser


def main(arguments: list[str]) -> None:
    """Carry out the runs that the file does not hold yet, and show all."""
    parser = parser_of_options()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Rows have all of them.
    results = open_results(options, parser, "claims/presets.py", arguments, free=vars(options))
    num_layers = load_teacher(options.teacher).num_layers
    places = Places(options.teacher, num_layers, options.train, halves(options.heldout, options.work))
    names = {key: nameable(getattr(options, key)) for key in ("teacher", "train", "heldout")}
    common = {"layers": options.layers, "dtype": options.dtype, **names}
    scored = {"comparison": options.evaluation_tokens, "tuning": max(options.evaluation_tokens // 3, LENGTH)}

    def row_of(preset: str, purpose: str, factor: float, tokens: int, seed: int) -> dict[str, Any]:
        run = Run(preset, purpose, factor, tokens, seed=seed, evaluation_tokens=scored[purpose], **common)
        recipe = scaled(run, places)
        row = results.run(run, lambda run: measure(run, recipe, options.work / run.name))
        print({key: row.get(key) for key in ("preset", "purpose", "factor", "seed", "loss", "gap", "kl")}, flush=True)
        return row

    compared = []
    tuning = options.tuning_tokens or max(options.tokens // 10, 5 * STEP)
    for preset in options.presets:
        factor = options.factors[0]
        if len(options.factors) > 1:
            tried = [row_of(preset, "tuning", factor, tuning, 0) for factor in options.factors]
            finite = [row for row in tried if row["loss"] is not None]
            if not finite:
                raise SystemExit(f"{preset} diverges with all factors {options.factors}: give lower ones")
            factor = min(finite, key=lambda row: row["loss"])["factor"]
        compared += [row_of(preset, "comparison", factor, options.tokens, seed) for seed in options.seeds]
    print(table_of(compared))
    draw(compared, results.path.with_suffix(".png"))


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
