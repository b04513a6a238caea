"""Plan of a run: the memory of each process and the time of each stage, before the run starts.

Parameters, gradients and optimiser are counted. Activations are measured: a step of one or a few sequences is carried
out for each stage, and extrapolated to the batch, in which they are linear. The step changes nothing. What is resident
when the plan is made (program, texts, teacher and student) is read from the system. Times are measured in steps of
their own, since the count of the tensors in memory slows a step down, most of all one of many small operations. Those
of slots, calibration and refits are measured in one layer (`plan_fits.py`).

Symbols: B sequences of a process per step, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from ..evaluation.hidden_states import KeptStates
from ..evaluation.language_modeling import PASSAGE, evaluate_language_model, repeat_loss
from ..harness.machine import resident_memory
from ..modeling import ZooHybridForCausalLM
from ..reports.markdown import binary_size, count, short, table
from ..training.sharding import sharded_by
from ..training.trainer import set_gradient_checkpointing
from .adapters import adapted
from .calibrate import calibration_windows
from .comparison import WINDOWS
from .data import TokenWindows
from .distiller import StageWindows, StudentInStage, saved_parameters, trained_parameters
from .layer_errors import layer_errors, layer_windows
from .logit_losses import tokens_at_once
from .measuring import peak_of, seconds_of
from .plan_fits import calibration_seconds, fit_seconds, slots_seconds
from .recipe import Recipe
from .slots import divides_slots, division_windows
from .stepwise import Conversion
from .stored_logits import StoredLogits
from .student import position_limit
from .teacher import Teacher

_FLOAT = torch.float32.itemsize
# Resident memory of libraries that a run imports after its plan: metrics, the Trainer, plots. Measured on Linux.
_IMPORTED_LATER = 88 * 2**20
# Numbers that are updated to measure the time of an update, too many for a cache.
_UPDATED = 2**22
# Parts that are measured besides the stages, for the progress bar.
_MEASURED = 6


@dataclass(frozen=True)
class StagePlan:
    """A stage in one process; sizes in bytes.

    Attributes:
        name: name of the stage.
        steps: optimiser steps.
        tokens: training tokens, over all processes.
        parameters: numbers that are trained.
        optimiser: moments of AdamW.
        activations: largest sum of activations and gradients in a step.
        logits: a chunk of a model's logits, part of the activations; 0 for a layer-wise objective.
        peak: largest memory of the stage, with what is resident.
        seconds: duration of all steps and of the refit.
    """

    name: str
    steps: int
    tokens: int
    parameters: int
    optimiser: int
    activations: int
    logits: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class RunPlan:
    """A run in one process; sizes in bytes.

    Attributes:
        processes: number of processes.
        device: type of the device on which the memory is.
        resident: memory in use before the first evaluation.
        teacher: weights of the teacher, part of it.
        student: weights of the student, part of it.
        evaluation: peak of the evaluations, with what is resident.
        comparison: peak of the comparison at the end, 0 without it.
        stages: the stages.
        evaluation_seconds: duration of all evaluations, without continuations and comparison.
        slots_seconds: duration of the division of slots, 0 without it.
        calibration_seconds: duration of the calibration, 0 without it.
    """

    processes: int
    device: str
    resident: int
    teacher: int
    student: int
    evaluation: int
    comparison: int
    stages: list[StagePlan]
    evaluation_seconds: float
    slots_seconds: float = 0.0
    calibration_seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Largest memory of a process."""
        return max(self.resident, self.evaluation, self.comparison, *(stage.peak for stage in self.stages))

    @property
    def seconds(self) -> float:
        """Duration of the slots' division, calibration, stages and evaluations."""
        before = self.slots_seconds + self.calibration_seconds
        return before + self.evaluation_seconds + sum(stage.seconds for stage in self.stages)

    def as_mapping(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        return {**asdict(self), "peak": self.peak, "seconds": self.seconds}


def make_plan(
    recipe: Recipe,
    teacher: Teacher,
    student: ZooHybridForCausalLM,
    layers: Sequence[int],
    windows: TokenWindows,
    heldout: TokenWindows,
    compute: Callable[[], AbstractContextManager[Any]],
    stored: StoredLogits | None = None,
    conversion: Conversion | None = None,
    *,
    progress: bool = False,
) -> RunPlan:
    """Measure and count what each stage of a recipe needs in each of the processes that `accelerate launch` started.

    Args:
        recipe: the recipe.
        teacher: the teacher, on the device of the run.
        student: the student before training; it is not changed.
        layers: converted layers.
        windows: the training text.
        heldout: the held-out text.
        compute: makes the context of a forward pass in the recipe's dtype.
        stored: the teacher's logits, if they are stored.
        conversion: the layers of each stage; None: those of the recipe.
        progress: say what is measured, and show a progress bar.
    """
    conversion = conversion or Conversion(teacher, recipe, layers)
    planner = _Planner(recipe, teacher, student, layers, windows, heldout, compute, stored, conversion)
    if progress:
        tqdm.write("plan: measuring memory and time of a training step of each stage, of evaluations and of fits")
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=_MEASURED + len(recipe.stages), desc="plan", disable=not progress, leave=False) as bar,
    ):
        planner.bar = bar
        return planner.plan()


@dataclass
class _Planner:
    recipe: Recipe
    teacher: Teacher
    student: ZooHybridForCausalLM
    layers: Sequence[int]
    windows: TokenWindows
    heldout: TokenWindows
    compute: Callable[[], AbstractContextManager[Any]]
    stored: StoredLogits | None
    conversion: Conversion
    bar: tqdm[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.student.device
        self.processes = PartialState().num_processes
        self.sharded = sharded_by() is not None
        self.shards = self.processes if self.sharded else 1  # of the student's weights, gradients and moments
        self.whole = _bytes(self.student)
        self.weights = self.whole // self.shards
        self.outside = _resident(self.device) - self.whole
        # Of a sharded student only a part stays in each process.
        self.resident = self.outside + self.weights
        self.kept = KeptStates()

    def plan(self) -> RunPlan:
        """Return the whole plan."""
        recipe, spec = self.recipe, self.recipe.evaluation
        texts = self.heldout.windows(spec.sequence_length)[: spec.batch_size]
        scored = max(min(spec.tokens, len(self.heldout)) // spec.sequence_length, 1) * spec.sequence_length
        self.kept.name(self.teacher.model, "teacher")
        with self.measured("first evaluation"):
            self.evaluate(texts)  # imports what an evaluation needs, and keeps the teacher's states
        in_a_token = self.kept.nbytes / texts.numel()

        def kept(models: int, tokens: int = scored) -> int:
            """Bytes of the hidden states of some models."""
            return min(self.kept.limit, int(models * tokens * in_a_token))

        stages = []
        for index, layers in enumerate(self.conversion.stages):
            stage = recipe.stages[index]
            with self.measured(f"stage {stage.name}"), self.conversion.converted(self.student, layers):
                refit = 0.0
                if stage.refit != "none":
                    fitted = calibration_windows(recipe, self.windows)
                    with self.compute():
                        refit = fit_seconds(self.student, self.teacher, layers, fitted, stage.refit)
                with adapted(self.student, stage, layers):
                    # With the states of teacher and control.
                    stages.append(self.stage(index, kept(2), refit))
        with self.measured("scores"):
            forward = peak_of(lambda: self.evaluate(texts), self.device)
            seconds = self.seconds_of_scores(texts, scored, kept(1) / max(scored * in_a_token, 1))
        # Teacher, zeroed mixers, control and step 0, then after each stage.
        seconds *= 4 + len(stages)
        # Recall is measured for all models but the one with zeroed mixers; errors of layers at step 0 and after each
        # stage.
        with self.measured("recall"):
            seconds += seconds_of(self.recall, self.device) * (3 + len(stages))
        with self.measured("errors of layers"):
            seconds += seconds_of(lambda: self.errors(texts), self.device) * (1 + len(stages))
            matrices = peak_of(lambda: self.errors(texts), self.device)
        with self.measured("division of slots"):
            slots = self.slots_seconds()
        with self.measured("calibration"), self.compute():
            parts = (self.student, self.teacher, recipe, self.layers, calibration_windows(recipe, self.windows))
            calibration = calibration_seconds(*parts)
        control = _bytes(self.teacher.model)  # about: it is a copy of the teacher with other attention
        comparison = 0
        if spec.final:
            length = max(spec.long_length or 8 * recipe.data.sequence_length, spec.prefill_limit)
            caches = _cache(self.teacher, max(spec.context_lengths, default=0))
            states = kept(3, scored + WINDOWS * length)
            comparison = self.resident + control + caches + states + int(forward * max(length / texts.numel(), 1.0))
        return RunPlan(
            processes=self.processes,
            device=self.device.type,
            resident=self.resident,
            teacher=_bytes(self.teacher.model),
            student=self.weights,
            # The control is gone when a stage's states are kept.
            evaluation=self.resident + max(forward + control + kept(2), max(forward, matrices) + kept(3)),
            comparison=comparison,
            stages=stages,
            evaluation_seconds=seconds,
            slots_seconds=slots,
            calibration_seconds=calibration,
        )

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Show what is measured, and count it afterwards."""
        self.bar.set_postfix_str(what)
        yield
        self.bar.update()

    def slots_seconds(self) -> float:
        """Return the seconds of the division of slots, if the recipe asks for it."""
        spec = self.recipe.student
        if not divides_slots(self.recipe):
            return 0.0
        windows = division_windows(self.recipe, self.teacher, self.windows)
        with self.compute():
            settings = self.student.config.settings_of(spec.mixer)
            return slots_seconds(self.teacher, self.layers, settings, spec.rows, windows)

    def evaluate(self, texts: Tensor) -> None:
        """Score the student on a batch of windows, as the evaluations do."""
        teacher, size = self.teacher.model, self.recipe.evaluation.batch_size
        with self.compute():
            evaluate_language_model(
                self.student, texts, teacher=teacher, batch_size=size, kept=self.kept, progress=False
            )

    def seconds_of_scores(self, texts: Tensor, scored: int, kept: float) -> float:
        """Return the seconds in which a model is scored on a number of tokens.

        Args:
            texts: a batch of windows, whose states are kept.
            scored: the number of tokens.
            kept: share of the teacher's states that is kept; the others are computed each time.
        """
        every = seconds_of(lambda: self.evaluate(texts), self.device)
        at_all = min(seconds_of(lambda: self.evaluate(texts[:1, :2]), self.device), every)  # however few the tokens are
        if kept < 1:
            self.kept.forget("teacher")
            every += (1 - kept) * (seconds_of(lambda: self.evaluate(texts), self.device) - every)
        return at_all + (every - at_all) * scored / texts.numel()

    def recall(self) -> None:
        """Measure the student's loss on repeated passages, as the evaluations do."""
        positions, distance = position_limit(self.student), self.recipe.evaluation.repeat_distance
        if positions is None or 2 * PASSAGE + distance <= positions:
            with self.compute():
                repeat_loss(self.student, self.heldout.windows(1)[:, 0], distance)

    def errors(self, texts: Tensor) -> None:
        """Measure the errors of the converted layers, as the evaluations do."""
        with self.compute():
            layer_errors(self.student, self.teacher, self.layers, layer_windows(texts).to(self.device))

    def stage(self, index: int, kept: int, refit: float) -> StagePlan:
        """Return the plan of a stage, while states of `kept` bytes are kept, with a refit of some seconds."""
        waiting = self.conversion.waiting.values()
        # Only parameters are sharded: neither mixers that wait nor the attention in their places, which is buffers.
        student = _size(self.student.parameters()) // self.shards + _size(self.student.buffers()) + _size(waiting)
        resident = self.outside + student + kept
        stage, layers = self.recipe.stages[index], self.conversion.stages[index]
        batch, length = stage.batch_size // self.processes, stage.sequence_length
        vocabulary = self.teacher.model.config.get_text_config().vocab_size
        logits = min(tokens_at_once(vocabulary), batch * length)  # tokens of a chunk
        model = StudentInStage(self.student, stage, self.teacher, layers, self.windows.learnt_share)
        rows = StageWindows(self.windows, self.recipe.stages, index, self.recipe.seed, self.stored)

        def step(sequences: int) -> None:
            inputs = default_collate([rows[item] for item in range(sequences)])
            with self.compute():
                model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).backward()
            model.zero_grad(set_to_none=True)

        less = self.recipe.gradient_checkpointing and not stage.layerwise
        with trainable(self.student, stage.train, layers) as trained, recomputing(self.student, less):
            # From a whole chunk of logits on, the memory is linear in the batch.
            activations, seconds = _extrapolated(step, batch, -(-logits // length), self.device)
            every = sum(parameter.numel() for parameter in trained)
            seconds += _seconds_of_an_update(trained, self.device) / self.shards
            largest = max((parameter.numel() for parameter in trained), default=0)
        numbers = every // self.shards
        activations -= _FLOAT * (every - numbers)  # gradients that other processes hold
        optimiser = 2 * _FLOAT * numbers
        # The update needs room for a number per weight: of all weights on a GPU, of one tensor at a time on a CPU.
        on_cpu = self.device.type == "cpu"
        update = _FLOAT * (numbers + (largest // self.shards if on_cpu else numbers))
        saved = saved_parameters(self.student, self.recipe, layers).values()
        copy = _size([*saved, *waiting]) if on_cpu else 0  # that a checkpoint is written from
        buckets = _FLOAT * numbers if self.processes > 1 and not self.sharded else 0  # of DDP
        whole = stage.objective == "logit_distillation"
        return StagePlan(
            name=stage.name,
            steps=stage.steps,
            tokens=stage.steps * stage.batch_size * length,
            parameters=numbers,
            optimiser=optimiser,
            activations=activations,
            logits=_FLOAT * vocabulary * logits if whole else 0,
            peak=resident + optimiser + buckets + max(activations, update, copy),
            seconds=seconds * stage.steps + refit,
        )


def plan_table(plan: RunPlan) -> str:
    """Return the plan as Markdown: the sizes of each stage, and a sentence on the whole run."""
    header = ["Stage", "Steps", "Tokens", "Trained", "Optimiser", "Activations", "Logits chunk", "Peak", "Time"]
    rows = [
        [
            stage.name,
            count(stage.steps),
            count(stage.tokens),
            f"{stage.parameters / 1e6:,.2f}M",
            *(binary_size(size) for size in (stage.optimiser, stage.activations, stage.logits, stage.peak)),
            _duration(stage.seconds),
        ]
        for stage in plan.stages
    ]
    before = {"division of slots": plan.slots_seconds, "calibration": plan.calibration_seconds}
    rows = [[name, *[""] * 7, _duration(seconds)] for name, seconds in before.items() if seconds] + rows
    rows.append(["evaluations", *[""] * 6, binary_size(plan.evaluation), _duration(plan.evaluation_seconds)])
    if plan.comparison:
        rows.append(["comparison at the end", *[""] * 6, binary_size(plan.comparison), ""])
    each = "" if plan.processes == 1 else f" in each of {plan.processes} processes"
    return (
        f"{table(header, rows)}\n\nPeak {binary_size(plan.peak)} on {plan.device}{each}, of which "
        f"{binary_size(plan.resident)} are resident before the first step (teacher {binary_size(plan.teacher)}, "
        f"student {binary_size(plan.student)}). About {_duration(plan.seconds)}, without continuations and "
        "the comparison."
    )


@contextmanager
def trainable(student: ZooHybridForCausalLM, train: str, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Let the parameters of a stage require gradients, and no others; yield them."""
    before = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    mixers, others = trained_parameters(student, train, layers)
    student.requires_grad_(False)
    chosen = [*mixers.values(), *others.values()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def recomputing(student: ZooHybridForCausalLM, on: bool) -> Iterator[None]:
    """Let a student recompute its blocks in the backward pass, as in training with gradient checkpointing, if `on`."""
    if not on:
        yield
        return
    set_gradient_checkpointing(student.train(), True)  # which has no effect in evaluation mode
    try:
        yield
    finally:
        set_gradient_checkpointing(student.eval(), False)


def _seconds_of_an_update(trained: Sequence[Tensor], device: torch.device) -> float:
    """Return the seconds in which gradients are clipped and AdamW updates weights, from those of a part of each."""
    numbers = sum(tensor.numel() for tensor in trained)
    share = min(_UPDATED / max(numbers, 1), 1.0)
    parts = [torch.zeros(max(int(share * tensor.numel()), 1), device=device, requires_grad=True) for tensor in trained]
    for part in parts:
        part.grad = torch.zeros_like(part)
    optimizer = torch.optim.AdamW(parts)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()

    update()  # makes the moments
    return seconds_of(update, device) / share


def _extrapolated(step: Callable[[int], object], batch: int, least: int, device: torch.device) -> tuple[int, float]:
    """Return the peak memory and the seconds of a step of `batch` sequences.

    They are measured with `least` sequences, from which on they are linear, and with twice as many; or with the whole
    batch, if it is not larger, after a step of one sequence that warms up.
    """
    many = min(2 * least, batch)
    few = least if many < batch else 1
    small, peak = (peak_of(lambda size=size: step(size), device) for size in (few, many))
    seconds = seconds_of(lambda: step(many), device)
    if many < batch:
        peak += int((peak - small) / (many - few) * (batch - many))
    return peak, seconds * batch / many


def _bytes(model: torch.nn.Module) -> int:
    return _size([*model.parameters(), *model.buffers()])


def _size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _cache(teacher: Teacher, context: int) -> int:
    """Return the bytes of the teacher's keys and values at a context, which is the largest cache of a comparison."""
    config = teacher.zoo_config
    return 2 * int(config.num_key_value_heads or 0) * int(config.head_dim or 0) * teacher.num_layers * context * _FLOAT


def _resident(device: torch.device) -> int:
    """Return the memory that is in use: of the GPU, or of this process and what it is going to import."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory() + _IMPORTED_LATER


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{short(seconds)} s"
    return f"{short(seconds / 60)} min" if seconds < 7200 else f"{short(seconds / 3600)} h"
