"""The content of a distillation report (format 1), and its validation.

The run writes the report as a dict of JSON values; cards, tables and plots read it through these classes. A measurement
that is not finite (a diverged loss) or not defined (the divergence of the teacher from itself) is None.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..harness.settings import check, refused, wrong

Share = Annotated[float, Field(ge=0, le=1)]
Measured = Annotated[float | None, AfterValidator(lambda value: value if math.isfinite(value or 0.0) else None)]


class _Part(BaseModel):
    # Keys of later versions are ignored.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())


class Sample(_Part):
    """A greedy continuation.

    Attributes:
        prompt: text that the model was given.
        completion: text that the model wrote.
        tokens: ids of that text; None in older reports.
        repetition: share of the 4-grams of the completion that occurred in it before, in [0, 1].
    """

    prompt: str
    completion: str
    tokens: list[int] | None = None
    repetition: float


class LayerErrors(_Part):
    """Errors of a converted layer against the teacher's, on the teacher's hidden states.

    Attributes:
        layer: its number, from 0.
        output_error: `||y - t|| / ||t||` of the mixer's output.
        matrix_error: (H) the same for the mixing matrix of each head; empty if the mixer has none.
        half_life: (H) tokens in which a head's state halves, None if it does not decay; empty if there is no matrix.
    """

    layer: int
    output_error: Measured
    matrix_error: list[Measured]
    half_life: list[Measured]


class Evaluation(_Part):
    """Scores on the held-out text.

    Attributes:
        name: the stage's name after a stage.
        kind: "teacher"; "zeroed", the student with its new mixers silenced; "control", attention to a window and sinks
            of as many bytes in their place, untrained (older reports have none); "start", the student before training;
            or "stage", the student after a stage.
        loss: nats per token.
        perplexity: exponential of the loss.
        kl: mean of KL(teacher || student), nats per token.
        top1_agreement: share of tokens, in [0, 1], for which student and teacher have the same likeliest prediction.
        repeat_loss: nats per token on a passage that stood `evaluation.repeat_distance` tokens before.
        tokens: number of scored predictions.
        trained_tokens: training tokens read until then, over all stages.
        seconds: duration of the evaluation.
        samples: continuations of the recipe's prompts.
        layers: errors of the converted layers, if they were measured.
    """

    name: str
    kind: Literal["teacher", "zeroed", "control", "start", "stage"]
    loss: Measured
    perplexity: Measured
    kl: Measured
    top1_agreement: Share | None
    repeat_loss: Measured = None
    tokens: int
    trained_tokens: int
    seconds: float
    samples: list[Sample]
    layers: list[LayerErrors]


class PositionBin(_Part):
    """Scores of the tokens at positions from `start` to `end` (excluded) of long windows.

    Attributes:
        start: first position, from 0.
        end: position after the last one.
        tokens: number of scored predictions.
        loss: nats per token.
        kl: mean of KL(teacher || model), nats per token; None for the teacher.
        top1_agreement: share of tokens with the teacher's likeliest prediction; None for the teacher.
    """

    start: int
    end: int
    tokens: int
    loss: Measured
    kl: Measured
    top1_agreement: Share | None


class RepeatLoss(_Part):
    """Loss, in nats per token, on a passage that stood `distance` tokens before."""

    distance: int
    loss: Measured


class Recall(_Part):
    """Recall of values by their keys.

    Attributes:
        pairs: pairs of key and value in a list.
        distance: tokens between the list and the query.
        queries: number of queries.
        accuracy: share of queries with the right value, in [0, 1].
        chance: accuracy of a random one of the list's values.
    """

    pairs: int
    distance: int
    queries: int
    accuracy: float
    chance: float


class Choice(_Part):
    """Answers to multiple-choice questions, each asked in four orders of its options; chance is 1/4.

    Attributes:
        questions: number of questions.
        accuracy: share of right choices over all questions and orders, in [0, 1].
        accuracies: that share for each order.
        consistency: share of questions with the same choice in all orders.
        letters: share of each letter among the choices.
        agreement: share of choices that are the teacher's.
    """

    questions: int
    accuracy: Share
    accuracies: list[Share]
    consistency: Share
    letters: list[Share]
    agreement: Share


class Continuations(_Part):
    """Agreement of the greedy continuations of the recipe's prompts with the teacher's.

    Attributes:
        tokens: number of tokens compared.
        agreement: share of them that are equal at their place, in [0, 1].
        common_prefix: mean number of equal tokens at the beginning.
        repetition: mean share of repeated 4-grams, in [0, 1].
    """

    tokens: int
    agreement: float
    common_prefix: float
    repetition: float


class Decoding(_Part):
    """Speed and cache at a context.

    Attributes:
        context: tokens in the cache.
        prefilled: whether the context was read; otherwise the cache was filled with repetitions.
        decode_seconds: median wall time of a step of one token.
        decode_cpu_seconds: its CPU time, over all threads.
        prefill_seconds: wall time per token of reading the context in chunks; None if it was not read.
        prefill_cpu_seconds: its CPU time.
        cache_bytes: bytes that the cache holds.
    """

    context: int
    prefilled: bool
    decode_seconds: Annotated[float, Field(gt=0)]
    decode_cpu_seconds: float
    prefill_seconds: float | None
    prefill_cpu_seconds: float | None
    cache_bytes: int


class Compared(_Part):
    """One of the three models of a comparison: the teacher, the control, or the student after the last stage."""

    name: str
    kind: Literal["teacher", "control", "stage"]
    by_position: list[PositionBin]
    repeat: list[RepeatLoss]
    recall: list[Recall]
    choice: Choice | None = None  # reports of earlier versions have none
    continuations: Continuations | None
    decoding: list[Decoding]


class Comparison(_Part):
    """Teacher, control and trained student side by side, measured once at the end; `seconds` of each part."""

    models: list[Compared]
    seconds: dict[str, float]

    @model_validator(mode="after")
    def _refuse_what_is_not_side_by_side(self) -> Comparison:
        kinds = [model.kind for model in self.models]
        if kinds != ["teacher", "control", "stage"]:
            raise refused("models", f"must be of the kinds 'teacher', 'control' and 'stage', got {kinds}")
        teacher = _places(self.models[0])
        for index, model in enumerate(self.models):
            for part, places in _places(model).items():
                if places != teacher[part]:
                    raise refused(f"models.{index}.{part}", f"must be at the teacher's {teacher[part]}, got {places}")
        return self

    @property
    def teacher(self) -> Compared:
        """The teacher."""
        return self.models[0]


def _places(model: Compared) -> dict[str, list[Any]]:
    """Return where a model was measured, for each part."""
    return {
        "by_position": [(row.start, row.end) for row in model.by_position],
        "repeat": [row.distance for row in model.repeat],
        "recall": [(row.pairs, row.distance) for row in model.recall],
        "decoding": [row.context for row in model.decoding],
    }


class Point(_Part):
    """A point of a training curve: means over the steps since the previous point."""

    step: int
    loss: Measured
    learning_rate: float
    gradient_norm: Measured


class Stage(_Part):
    """A training stage with its objective, its size, its duration and its curve."""

    name: str
    objective: str
    tokens: int
    steps: int
    seconds: float
    loss_name: str
    history: list[Point]


class Teacher(_Part):
    """The model that was distilled: a Hub id or a name, and the identifier of its licence if it is known."""

    source: str
    model_type: str
    parameters: int
    licence: str | None


class Student(_Part):
    """The student: `layers` are the converted ones, `mixer_types` names the token mixer of every layer."""

    model_type: str
    parameters: int
    layers: list[int]
    num_layers: int
    mixer_types: list[str]


class Data(_Part):
    """Sizes of the texts in the teacher's tokens, and their sources. `heldout_in_training` are those of the held-out
    text that are training text, too; it is empty in older reports."""

    train_tokens: int
    heldout_tokens: int
    train_sources: list[str]
    heldout_sources: list[str]
    heldout_in_training: list[str] = []


class Hardware(_Part):
    """The machine of the main process. None means unknown or, for `gpu`, that none was used."""

    cpu: str | None
    cores: int | None
    memory_bytes: int | None
    gpu: str | None


class Report(_Part):
    """A whole run. `recipe` is the recipe as `ssm_zoo.distill.recipe.as_mapping` returns it; `comparison` is None in
    older reports and where the recipe asks for none; `preparation` holds the seconds of "slots", their division, and of
    "calibration", and is empty in older reports."""

    format: Literal[1]
    kind: Literal["distillation"]
    created: str
    command: str
    hardware: Hardware
    versions: dict[str, str]
    recipe: dict[str, Any]
    teacher: Teacher
    student: Student
    data: Data
    evaluations: list[Evaluation]
    stages: list[Stage]
    preparation: dict[str, float] = Field(default_factory=dict)
    comparison: Comparison | None = None
    processes: Annotated[int, Field(ge=1)]
    peak_memory_bytes: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> Report:
        for kind in ("teacher", "zeroed", "start"):
            found = sum(evaluation.kind == kind for evaluation in self.evaluations)
            if found != 1:
                raise refused("evaluations", f"must have one of kind {kind!r}, got {found}")
        evaluated = [evaluation.name for evaluation in self.evaluations if evaluation.kind == "stage"]
        trained = [stage.name for stage in self.stages]
        if evaluated != trained or len(set(trained)) != len(trained):
            raise refused("evaluations", f"of kind 'stage' must follow the stages {trained}, got {evaluated}")
        student = self.student
        if len(student.mixer_types) != student.num_layers:
            problem = f"must have num_layers = {student.num_layers} names, got {len(student.mixer_types)}"
            raise refused("student.mixer_types", problem)
        for layer in student.layers:
            if not 0 <= layer < student.num_layers:
                raise wrong("student.layers", layer, f"from 0 to {student.num_layers - 1}")
        return self

    def evaluation(self, kind: Literal["teacher", "zeroed", "start"]) -> Evaluation:
        """Return the only evaluation of a kind."""
        return next(evaluation for evaluation in self.evaluations if evaluation.kind == kind)

    @property
    def students(self) -> list[Evaluation]:
        """Evaluations of the student, before training and after each stage, in order."""
        return [self.evaluation("start"), *(part for part in self.evaluations if part.kind == "stage")]


def parse_report(report: Any) -> Report:
    """Return a report as an object, after checking it.

    Args:
        report: the content of `report.json`, or the dict from which it is written.

    Raises:
        ValueError: naming all keys that are missing or have a value that is not accepted.
    """
    return check(Report, report, "report")
