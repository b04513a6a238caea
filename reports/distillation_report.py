"""What a distillation report holds (format 1), and the check that a report holds it.

The run writes it as a dict of the kinds that JSON knows; cards, tables and plots read it through these classes. A
measurement that is no finite number (a diverged loss, the divergence of the teacher from itself) is None.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

Measured = Annotated[float | None, AfterValidator(lambda value: value if math.isfinite(value or 0.0) else None)]


class _Part(BaseModel):
    # What a later version adds is no concern of this one.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())


class Sample(_Part):
    """A greedy continuation.

    Attributes:
        prompt: what was given.
        completion: what the model wrote.
        repetition: share of the 4-grams of the completion that occurred in it before, in [0, 1].
    """

    prompt: str
    completion: str
    repetition: float


class LayerErrors(_Part):
    """How far a converted layer is from the teacher's, on the teacher's hidden states.

    Attributes:
        layer: its number from 0.
        output_error: `||y - t|| / ||t||` of the mixer's output.
        matrix_error: (H) the same of each head's mixing matrix; empty where the mixer has none.
        half_life: (H) tokens in which a head's state halves, None where it does not decay; empty likewise.
    """

    layer: int
    output_error: Measured
    matrix_error: list[Measured]
    half_life: list[Measured]


class Evaluation(_Part):
    """Scores on the held-out text.

    Attributes:
        name: the stage's name after a stage.
        kind: the teacher, the student with its new mixers silenced, the student before training, or after a stage.
        loss: nats per token.
        perplexity: exponential of the loss.
        kl: mean of KL(teacher || student), nats per token.
        top1_agreement: share of tokens, in [0, 1], where the student's likeliest is the teacher's.
        tokens: predictions that were scored.
        trained_tokens: training tokens read by then.
        seconds: duration of the evaluation.
        samples: continuations of the recipe's prompts.
        layers: errors of the converted layers, if they were measured.
    """

    name: str
    kind: Literal["teacher", "zeroed", "start", "stage"]
    loss: Measured
    perplexity: Measured
    kl: Measured
    top1_agreement: Measured
    tokens: int
    trained_tokens: int
    seconds: float
    samples: list[Sample]
    layers: list[LayerErrors]


class Point(_Part):
    """A point of a training curve: means over the steps since the point before it."""

    step: int
    loss: Measured
    learning_rate: float
    gradient_norm: Measured


class Stage(_Part):
    """One training stage: what it did, on how many tokens, in how many seconds, and its curve."""

    name: str
    objective: str
    tokens: int
    steps: int
    seconds: float
    loss_name: str
    history: list[Point]


class Teacher(_Part):
    """The model that was distilled: a Hub id or a name, and the identifier of its licence where one is known."""

    source: str
    model_type: str
    parameters: int
    licence: str | None


class Student(_Part):
    """What came out: `layers` are the converted ones, `mixer_types` names the token mixer of every layer."""

    model_type: str
    parameters: int
    layers: list[int]
    num_layers: int
    mixer_types: list[str]


class Data(_Part):
    """Sizes of the texts in the teacher's tokens, and where they came from."""

    train_tokens: int
    heldout_tokens: int
    train_sources: list[str]
    heldout_sources: list[str]


class Hardware(_Part):
    """The machine of the main process; None is unknown, and for `gpu` that none was used."""

    cpu: str | None
    cores: int | None
    memory_bytes: int | None
    gpu: str | None


class Report(_Part):
    """A whole run. `recipe` is `ssm_zoo.distill.recipe.as_mapping` of what was run."""

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
    processes: Annotated[int, Field(ge=1)]
    peak_memory_bytes: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> Report:
        for kind in ("teacher", "zeroed", "start"):
            found = sum(evaluation.kind == kind for evaluation in self.evaluations)
            if found != 1:
                raise _wrong("evaluations", f"{found} of kind {kind!r}", "one")
        evaluated = [evaluation.name for evaluation in self.evaluations if evaluation.kind == "stage"]
        trained = [stage.name for stage in self.stages]
        if evaluated != trained or len(set(trained)) != len(trained):
            accepted = f"one after each stage, in their order: {trained}"
            raise _wrong("evaluations", f"of kind 'stage' {evaluated}", accepted)
        student = self.student
        if len(student.mixer_types) != student.num_layers:
            raise _wrong(
                "student.mixer_types",
                f"{len(student.mixer_types)} names",
                f"one for each of num_layers = {student.num_layers}",
            )
        for layer in student.layers:
            if not 0 <= layer < student.num_layers:
                raise _wrong("student.layers", str(layer), f"0 to {student.num_layers - 1}")
        return self

    def evaluation(self, kind: Literal["teacher", "zeroed", "start"]) -> Evaluation:
        """The evaluation of a kind of which there is one."""
        return next(evaluation for evaluation in self.evaluations if evaluation.kind == kind)

    @property
    def students(self) -> list[Evaluation]:
        """The evaluations of the student, before training and after each stage, in order."""
        return [self.evaluation("start"), *(part for part in self.evaluations if part.kind == "stage")]


def parse_report(report: Any) -> Report:
    """Check a report and give it types.

    Args:
        report: what `report.json` holds, or the dict that it is written from.

    Raises:
        ValueError: naming the first key that is missing or has a value that is not accepted.
    """
    try:
        return Report.model_validate(report)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"report: {_describe(problems[0])}{more}") from None


def _wrong(field: str, value: str, accepted: str) -> PydanticCustomError:
    message = "{field}: got {value}; accepted: {accepted}"
    return PydanticCustomError("wrong_field", message, {"field": field, "value": value, "accepted": accepted})


def _describe(problem: ErrorDetails) -> str:
    """One line on one problem: the dotted key, the value, what is accepted."""
    location = problem["loc"]
    key = ".".join(map(str, location))
    if problem["type"] == "wrong_field":
        return problem["msg"]
    if problem["type"] == "missing":
        return f"{key} is missing; required keys: {', '.join(_part_at(location[:-1]).model_fields)}"
    value = reprlib.repr(problem["input"])
    if problem["type"] == "model_type":
        accepted = f"a mapping with the keys {', '.join(_part_at(location).model_fields)}"
    else:
        accepted = problem["msg"].removeprefix("Input should be ")
    return f"{key}: got {value}; accepted: {accepted}" if key else f"got {value}; accepted: {accepted}"


def _part_at(location: Sequence[int | str]) -> type[BaseModel]:
    """The class of the mapping at a place: of () `Report`, of ("stages", 0) `Stage`."""
    part: type[BaseModel] = Report
    for key in location:
        if isinstance(key, str):
            annotation = part.model_fields[key].annotation
            options = (annotation, *get_args(annotation))
            part = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return part
