"""Run a distillation: from a recipe to a folder with a student that loads anywhere, and a report.

The output folder contains `run.json` and `recipe.yaml` (the description of the run), `plan.json` (if a plan was made)
and `checkpoints/`; at the end also `student/` (a self-contained Hub folder with a card), `report.json`, `report.md` and
`plots/`. A run with the same recipe in the same folder resumes where it stopped.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..conversion.load_model import check_finite
from ..evaluation.hidden_states import KeptStates, head_of
from ..evaluation.language_modeling import PASSAGE, evaluate_language_model, generation_sample, repeat_loss
from ..harness.fingerprint import check_run, claim_run, fingerprint
from ..harness.json_files import read_json_object
from ..harness.machine import describe_machine, peak_memory
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, recorded_recipe
from ..harness.whole_files import write_text_whole
from ..modeling import ZooHybridForCausalLM
from ..reports.distillation_card import write_card
from ..reports.distillation_tables import public_recipe
from ..reports.markdown import number
from ..training.checkpoints import last_checkpoint, place, save_checkpoint
from ..training.report import write_folder
from ..training.trainer import CHECKPOINTS, check_trackers, computing, curve_of, processes, train_or_load
from .adapters import add_adapters, load_adapters, remove_adapters, targets
from .calibrate import calibrate, calibration_windows, fit_output_projections
from .comparison import Comparison, compare
from .data import TokenWindows
from .distiller import (
    WEIGHTS,
    Distiller,
    read_progress,
    refuse_old_checkpoints,
    saved_parameters,
    write_progress,
)
from .healing import check_blocks
from .inputs import check_inputs, check_stages, describe_texts, load_inputs
from .kept_plan import PLAN, circumstances, keep_plan, read_plan
from .layer_errors import layer_errors, layer_windows
from .plan import RunPlan, make_plan
from .pseudo_labels import pseudo_labels
from .recipe import Recipe, as_mapping, as_recorded, dump, resolve_layers
from .report import finite, stage_entry, write_report
from .slots import divide_slots, divides_slots, division_windows
from .stepwise import Conversion
from .stored_logits import StoredLogits, identity
from .student import build_control, build_student, position_limit, set_slots, zeroed_mixers
from .teacher import Teacher

_KIND = "ssm-zoo distillation run"
_CONTROL = "window + sinks"
# Places of the checkpoints before the first stage: without weights, and with those of the calibrated student.
_STARTED, _CALIBRATED = (0,), (0, 0)
_REMEDY = "Lower learning_rate, or choose dtype float32."
_REMEDY_OF_THE_TEACHER = "Choose dtype float32, or another teacher if it already is."


@dataclass
class _Progress:
    """Measurements of a run so far, which are saved with every checkpoint."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None  # of teacher, control and student, at the end
    slots: list[list[int]] | None = None  # of a bounded memory, once they are divided
    decays: list[list[float]] | None = None  # with the slots
    preparation: dict[str, float] = field(default_factory=dict)  # seconds of the slots' division and the calibration
    peak_memory_bytes: int = 0


@dataclass
class _Run:
    recipe: Recipe
    output: Path
    state: PartialState
    commit: str | None  # revision of a teacher on the Hub
    sources: dict[str, Any]  # what `run.json` records of the teacher and of stored logits
    teacher: Teacher
    student: ZooHybridForCausalLM
    layers: list[int]
    train: TokenWindows
    heldout: TokenWindows
    progress: _Progress
    conversion: Conversion
    stored: StoredLogits | None = None
    kept: KeptStates = field(default_factory=KeptStates)
    pseudo: TokenWindows | None = None  # the teacher's text

    @property
    def main(self) -> bool:
        return self.state.is_main_process

    @property
    def device(self) -> torch.device:
        assert self.state.device is not None
        return self.state.device

    def compute(self) -> Any:
        """Return the context of forward passes outside of a stage; within a stage the Trainer does this."""
        return computing(self.recipe.dtype, self.device)


@claimed_folders_end()
def distill(
    recipe: Recipe,
    output: str | Path,
    *,
    command: str | None = None,
    trust_remote_code: bool = False,
    on_plan: Callable[[RunPlan], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume a recipe.

    Args:
        recipe: the recipe.
        output: a new or empty folder, or the folder of an unfinished run of the same recipe.
        command: command line for the report; None: the command line of this process.
        trust_remote_code: run code that comes with the teacher, e.g. of its tokenizer.
        on_plan: receives the plan of memory and time in every process, before anything is written; the run ends there
            if it returns False. The plan is measured, or read from the folder of an unfinished run on the same machine.
            None: no plan is made.

    Returns:
        The report, as in `report.json`; empty if the run ended with its plan.

    Raises:
        ValueError: if the recipe, the teacher, the texts and the folder do not fit together (nothing is written in this
            case); if the teacher has changed since the run was started, all of the run's checkpoints are damaged, or
            numbers are not finite (no result is written in these cases).
    """
    check_trackers(recipe.report_to)
    state = processes()
    check_stages(recipe, state.num_processes)
    if state.is_main_process:
        check_output_folder(output)
    refuse_old_checkpoints(Path(output))
    run = _prepare(recipe, Path(output), state, trust_remote_code)
    recorded = as_recorded(recipe, recorded_recipe(run.output, _KIND))
    plan, here = None, {}
    if on_plan is not None:
        if run.main:
            check_run(run.output, recorded, run.sources, _KIND)
        plan, here = _plan(run)
        if not on_plan(plan):
            return {}
    _claim(run, recorded)
    if plan is not None and run.main:
        keep_plan(run.output, plan, here)
    if recipe.data.pseudo_labels is not None:
        run.pseudo = pseudo_labels(recipe, run.teacher, run.train, run.output, run.compute, state)
    # Read now: the source may be gone when the training ends.
    origin = provenance(recipe.teacher, run.commit)
    found = last_checkpoint(run.output / CHECKPOINTS, main=run.main)
    if found is not None:
        _restore(run, found)
    if found is None or place(found) <= _CALIBRATED:
        _before_the_stages(run, calibrated=found is not None and place(found) == _CALIBRATED)
        found = None
    first, step = (0, 0) if found is None else place(found)
    for index in range(first, len(recipe.stages)):
        _train_stage(run, index, found if index == first and step > 0 else None)
    check_finite(run.student, "the trained student", _REMEDY)
    _compare(run)
    report = _report(run, origin, command or command_line(sys.argv[1:]))
    if run.main:
        _write_results(run, report)
    state.wait_for_everyone()
    return report


def _restore(run: _Run, found: Path) -> None:
    """Restore the student and the measurements from a checkpoint."""
    saved = read_progress(found)
    for split, here in _fingerprints(run).items():
        if saved["data"][split] != here:
            raise ValueError(f"data.{split}: the texts have changed since {found} was saved. Give the same texts.")
    if place(found) != _STARTED:
        weights = load_file(found / WEIGHTS)
        for name, parameter in saved_parameters(run.student, run.recipe, run.layers).items():
            parameter.data.copy_(weights[name])
    try:
        run.progress = _Progress(**saved["measured"])
    except TypeError as error:
        raise ValueError(
            f"{found} was written by another version of ssm-zoo ({error}). Finish the run with that version."
        ) from None
    slots = run.progress.slots
    if slots is not None:  # checkpoints without decays are from before heads had their own
        set_slots(run.student, slots, run.progress.decays or [[1.0] * len(numbers) for numbers in slots])


def _fingerprints(run: _Run) -> dict[str, str]:
    texts = {"train": run.train, "heldout": run.heldout, "pseudo_labels": run.pseudo}
    return {name: windows.fingerprint() for name, windows in texts.items() if windows is not None}


def _saved_progress(run: _Run) -> dict[str, Any]:
    """Return the content of a checkpoint besides weights and optimiser."""
    run.progress.peak_memory_bytes = max(run.progress.peak_memory_bytes, peak_memory())
    return {"data": _fingerprints(run), "measured": asdict(run.progress)}


def _report(run: _Run, origin: tuple[str, str | None], command: str) -> dict[str, Any]:
    recipe = run.recipe
    source, licence = origin
    return {
        "format": 1,
        "kind": "distillation",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **describe_machine(),
        "recipe": public_recipe(as_mapping(recipe)),
        "teacher": {
            "source": source,
            "model_type": run.teacher.model.config.model_type,
            "parameters": run.teacher.model.num_parameters(),
            "licence": licence,
        },
        "student": {
            "model_type": run.student.config.model_type,
            "parameters": run.student.num_parameters(),
            "layers": run.layers,
            "num_layers": run.student.config.num_hidden_layers,
            "mixer_types": run.student.config.mixer_types,
        },
        "data": describe_texts(recipe.data, run.train, run.heldout),
        "evaluations": run.progress.evaluations,
        "stages": run.progress.stages,
        "preparation": run.progress.preparation,
        "comparison": run.progress.comparison,
        "processes": run.state.num_processes,
        "peak_memory_bytes": max(run.progress.peak_memory_bytes, peak_memory()),
    }


def _write_results(run: _Run, report: dict[str, Any]) -> None:
    """Write plots, the student's folder and, last, the report: a run with a report has finished."""
    save, tokenizer = run.student.save_pretrained, run.teacher.tokenizer
    write_report(run.output, report, lambda: write_folder(run.output, "student", save, write_card, report, tokenizer))


def _prepare(recipe: Recipe, output: Path, state: PartialState, trust_remote_code: bool) -> _Run:
    """Load and check everything, and build the student; nothing is written."""
    teacher, commit, windows = load_inputs(recipe, output, state, trust_remote_code)
    layers = resolve_layers(recipe.student.layers, teacher.num_layers)
    student = build_student(teacher, recipe.student, layers, seed=recipe.seed)
    if recipe.is_healed:
        check_blocks(student.config)
    check_inputs(recipe, teacher, windows, position_limit(student))
    sources, stored = {"teacher": fingerprint(recipe.teacher, commit)}, None
    if recipe.stored_logits is not None:
        expected = identity(recipe, sources["teacher"], windows["train"].fingerprint())
        words = next(head_of(teacher.model).parameters()).shape[0]
        stored = StoredLogits(recipe.stored_logits, expected, words)
        sources["stored_logits"] = {"source": recipe.stored_logits, "config": stored.fingerprint}
    if any(stage.train == "lora" for stage in recipe.stages):
        targets(student, layers)  # raises where there are none
    known = (recipe, output, state, commit, sources, teacher, student, layers, windows["train"], windows["heldout"])
    return _Run(*known, _Progress(), Conversion(teacher, recipe, layers), stored)


def _claim(run: _Run, recorded: dict[str, Any]) -> None:
    """Claim the folder for the run, with its recipe as the run recorded it."""
    if run.main:
        claim_run(run.output, recorded, run.sources, _KIND)
        write_text_whole(run.output / "recipe.yaml", dump(run.recipe))
    run.state.wait_for_everyone()


def _plan(run: _Run) -> tuple[RunPlan, dict[str, Any]]:
    """Return the plan and what it depends on; an unfinished run keeps its plan."""
    here = circumstances(run.device, run.state.num_processes, _fingerprints(run))
    plan = read_plan(run.output, here)
    if plan is None:
        parts = (run.recipe, run.teacher, run.student, run.layers, run.train, run.heldout)
        plan = make_plan(*parts, run.compute, run.stored, run.conversion, progress=run.main)
    elif run.main:
        tqdm.write(f"plan: read from {run.output / PLAN}, measured when the run was started")
    return plan, here


def _before_the_stages(run: _Run, *, calibrated: bool) -> None:
    """Evaluate the teacher, the floor (zeroed mixers), the control that costs nothing, and the untrained student.

    The slots are divided before the control, whose cache has as many bytes, and the student is calibrated after it. A
    checkpoint is saved after each part. What the run's checkpoint holds is not repeated, nor is a calibration if the
    student is `calibrated`.
    """
    evaluated = {row["kind"] for row in run.progress.evaluations}
    if "teacher" not in evaluated:
        _evaluate(run, "teacher", "teacher", model=run.teacher.model)
        _save(run, _STARTED)
    if "zeroed" not in evaluated:
        with zeroed_mixers(run.student, run.layers):
            _evaluate(run, "mixers zeroed", "zeroed")
        _save(run, _STARTED)
    if run.progress.slots is None and divides_slots(run.recipe):
        _divide_slots(run)
        _save(run, _STARTED)
    if "control" not in evaluated:
        _evaluate(run, _CONTROL, "control", model=_control(run))
        _save(run, _STARTED)
    if not calibrated:
        _calibrate(run)
        _save(run, _CALIBRATED)
    if "start" not in evaluated:
        _evaluate(run, "step 0", "start")
        _save(run, _CALIBRATED)


def _calibrate(run: _Run) -> None:
    started = time.monotonic()
    with run.compute():
        windows = calibration_windows(run.recipe, run.train)
        calibrate(run.student, run.teacher, run.recipe.student, run.layers, windows, progress=run.main)
    check_finite(run.student, "the calibrated student", "Choose dtype float32, or calibration: none.")
    run.progress.preparation["calibration"] = time.monotonic() - started


def _control(run: _Run) -> ZooHybridForCausalLM:
    return build_control(run.teacher, run.student, run.layers, run.recipe.evaluation.sequence_length)


def _divide_slots(run: _Run) -> None:
    """Divide the slots of a bounded memory among the heads."""
    started, spec = time.monotonic(), run.recipe.student
    windows = division_windows(run.recipe, run.teacher, run.train)
    settings = run.student.config.settings_of(spec.mixer)
    with run.compute():
        slots, decays = divide_slots(run.teacher, run.layers, settings, spec.rows, windows, progress=run.main)
    run.progress.slots, run.progress.decays = slots, decays
    set_slots(run.student, slots, decays)
    run.progress.preparation["slots"] = time.monotonic() - started


def _evaluate(run: _Run, name: str, kind: str, model: PreTrainedModel | None = None) -> None:
    """Measure a model on the held-out text, in the recipe's dtype and on the main process, and record the results."""
    started = time.monotonic()
    row: dict[str, Any] = {"name": name, "kind": kind}
    if run.main:
        with run.compute():
            row |= _measure(run, kind, model or run.student)
        row["trained_tokens"] = sum(stage["tokens"] for stage in run.progress.stages)
        row["seconds"] = time.monotonic() - started
        tqdm.write(_one_line(row))
    run.state.wait_for_everyone()
    run.progress.evaluations.append(row)


def _measure(run: _Run, kind: str, model: PreTrainedModel) -> dict[str, Any]:
    """Return scores, continuations of the recipe's prompts, and the errors of the converted layers."""
    spec = run.recipe.evaluation
    windows = run.heldout.windows(spec.sequence_length)[: max(spec.tokens // spec.sequence_length, 1)]
    teacher = None if kind == "teacher" else run.teacher.model
    run.kept.name(run.teacher.model, "teacher")
    if kind in ("control", "stage"):
        run.kept.name(model, kind)  # for the comparison at the end
    scored = evaluate_language_model(model, windows, teacher=teacher, batch_size=spec.batch_size, kept=run.kept)
    row: dict[str, Any] = {key: scored.get(key) for key in ("loss", "perplexity", "kl", "top1_agreement", "tokens")}
    row["repeat_loss"] = None
    positions = position_limit(run.student)
    if kind != "zeroed" and (positions is None or 2 * PASSAGE + spec.repeat_distance <= positions):
        row["repeat_loss"] = repeat_loss(model, run.heldout.windows(1)[:, 0], spec.repeat_distance)
    row["samples"] = []
    if kind != "zeroed" and spec.prompts:
        row["samples"] = generation_sample(model, run.teacher.tokenizer, spec.prompts, spec.max_new_tokens)
    row["layers"] = []
    if kind in ("start", "stage"):
        ids = layer_windows(windows).to(run.device)
        row["layers"] = layer_errors(run.student, run.teacher, run.conversion.layers, ids)
    row = finite(row)
    # Only a student before training may have a loss that is not finite.
    lost = [key for key in ("loss", "kl") if row[key] is None and scored.get(key) is not None]
    if lost and kind in ("teacher", "stage"):
        who, remedy = ("the trained student", _REMEDY) if kind == "stage" else ("the teacher", _REMEDY_OF_THE_TEACHER)
        raise ValueError(f"evaluation: the held-out {lost[0]} of {who} is {scored[lost[0]]}. {remedy}")
    return row


def _one_line(row: dict[str, Any]) -> str:
    text = f"{row['name']}: held-out loss {number(row['loss'])}"
    if row["top1_agreement"] is not None:
        text += f", KL {number(row['kl'])}, top-1 agreement {row['top1_agreement']:.1%}"
    return f"{text} ({row['seconds']:.0f} s)"


def _train_stage(run: _Run, index: int, found: Path | None) -> None:
    """Train one stage, from its checkpoint if there is one, and evaluate the student after it."""
    run.kept.forget("stage")
    stage, conversion = run.recipe.stages[index], run.conversion
    conversion.convert(run.student, conversion.stages[index])
    if stage.train == "lora":
        add_adapters(run.student, stage, conversion.layers, run.recipe.seed, 3, index)
        if found is not None:
            load_adapters(run.student, load_file(found / WEIGHTS))
    trainer = Distiller(
        run.student,
        run.teacher,
        conversion.layers,
        run.train if run.pseudo is None or stage.text == "train" else run.pseudo,
        run.recipe,
        index,
        run.output,
        run.state.num_processes,
        run.device,
        _saved_progress(run),
        run.stored,
        conversion.waiting,
    )
    model, points = train_or_load(trainer, found, stage.steps)
    run.student = model.student.eval()
    remove_adapters(run.student, merge=True)
    history = curve_of(points)
    seconds, started = history[-1]["seconds"], time.monotonic()
    if stage.refit != "none":
        with run.compute():
            windows = calibration_windows(run.recipe, run.train)
            fit_output_projections(run.student, run.teacher, conversion.layers, windows, stage.refit, progress=run.main)
        check_finite(run.student, f"stages.{stage.name}: the student after its refit", _REMEDY)
        seconds += time.monotonic() - started
    run.progress.stages.append(stage_entry(stage, history, seconds))
    _evaluate(run, stage.name, "stage")
    _save(run, (index + 1, 0))


def _save(run: _Run, at: tuple[int, ...]) -> None:
    """Save a checkpoint outside of a stage: at the start of one, (stage, 0), or before there are weights to save."""
    if run.main:
        weights, progress = dict[str, Tensor](), _saved_progress(run)
        if at != _STARTED:
            weights = saved_parameters(run.student, run.recipe, run.conversion.layers) | run.conversion.waiting
        name = "-".join(map(str, ("checkpoint", *at)))
        save_checkpoint(run.output / CHECKPOINTS, name, lambda folder: write_progress(folder, weights, progress))
    run.state.wait_for_everyone()


def _compare(run: _Run) -> None:
    """Compare teacher, control and trained student on the main process, unless it is done, and record the results."""
    recipe = run.recipe
    if not recipe.evaluation.final or run.progress.comparison is not None:
        return
    if run.main:
        models = {"teacher": run.teacher.model, "control": _control(run), "stage": run.student}
        for kind, model in models.items():
            run.kept.name(model, kind)
        # Of the last stage. A run of an earlier version may lack the control.
        rows: dict[str, Any] = {"control": {"name": _CONTROL, "repeat_loss": None, "samples": []}}
        rows |= {row["kind"]: row for row in run.progress.evaluations if row["kind"] in models}
        comparison = Comparison(
            models=models,
            evaluations={kind: rows[kind] for kind in models},
            tokenizer=run.teacher.tokenizer,
            heldout=run.heldout.windows(1)[:, 0],
            spec=recipe.evaluation,
            sequence_length=recipe.data.sequence_length,
            positions=position_limit(run.student),
            compute=run.compute,
            kept=run.kept,
            seed=recipe.seed,
        )
        run.progress.comparison = finite(compare(comparison))
        tqdm.write(f"teacher, control and student side by side ({sum(comparison.seconds.values()):.0f} s)")
    _save(run, (len(recipe.stages), 0))


def read_report(output: str | Path) -> dict[str, Any]:
    """Return the report of a finished run.

    Raises:
        ValueError: if the folder has none.
    """
    path = Path(output) / "report.json"
    if not path.is_file():
        raise ValueError(f"{output} has no report.json. Give the folder of a finished distillation.")
    return read_json_object(path)
