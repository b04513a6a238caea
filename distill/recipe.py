"""Distillation recipes: the description of a run as data, checked before anything is loaded.

A recipe is a YAML file, or a preset that comes with the package. It names a teacher, a student, texts and a list of
stages. It determines everything that a run computes, so its fingerprint identifies the run. Unknown keys are refused
at every level, since a misspelt key would otherwise be silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator

from ..harness.settings import SettingsBase, check, wrong
from ..harness.yaml_values import write_yaml
from ..modeling.token_mixers import TOKEN_MIXERS
from .recipe_values import (
    LAYERS_ACCEPTED,
    Context,
    Contexts,
    ConvKernel,
    Count,
    Distances,
    ExactHeads,
    HalfLife,
    Layers,
    Length,
    Pairs,
    Positive,
    Seed,
    Sources,
    Text,
    UpToOne,
    Whole,
    layers,
    whole_number,
)
from .stages import LATER_FIELDS, StageSpec, misplaced

# The mixers that can replace attention, and the fields of a student that have an effect only with some of them.
_STARTS = {kind: row.student for kind, row in TOKEN_MIXERS.items() if row.student is not None}
MIXERS_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    option: ("mixer", tuple(kind for kind, start in _STARTS.items() if option in start.options))
    for option in dict.fromkeys(option for start in _STARTS.values() for option in start.options)
}


class StudentSpec(SettingsBase):
    """The token mixer that replaces the teacher's attention, the layers that it replaces, and its initialisation.

    Attributes:
        layers: layers to convert; see `resolve_layers`.
        mixer: the new token mixer.
        conv_kernel: K, width of the short convolution, which starts as the identity.
        feature_map: function applied to B and C before the state update, "hedgehog" is learned; only for
            `discrete_mamba2`.
        normalize: divide by the row sums of the mixing matrix, as linear attention does; only for `discrete_mamba2`.
        rotary: keep the teacher's rotary embedding on B and C; only for `discrete_mamba2`.
        sliding_window: tokens that a query sees by softmax, its own included; `sliding_attention`, `linear_attention`.
        feature_size: half the number of learned features; None: the width of a head. Only for `linear_attention`.
        window: number of tokens in the window of a bounded memory; this and the next six only for `bounded_attention`.
        sinks: number of first tokens that are always kept.
        rows: keys and values that a key-value head keeps on average: window, sinks and slots. Exact heads do not count.
        slots: "equal" for all heads, or "calibrated" by what each head loses without them on training text.
        chunk_size: number of tokens between two choices of what the slots hold.
        exact_heads: pairs of a converted layer and one of its key-value heads, counted from 0, which keeps full
            attention: it sees and keeps all tokens.
        kv_dtype: "auto" holds keys and values in the model's dtype, "int8" in 8-bit integers, a quarter of the bytes of
            float32.
        positions: N, number of positions that have weights, which no text may exceed. The weights start as the
            teacher's attention averaged over `calibration_tokens`. Only for `masked_mixing`.
        half_life: "calibrated" (fitted to the teacher's attention), or the shortest and longest half-life in tokens,
            spread geometrically over the heads.
        calibration: closed-form fit before training: "none"; to the teacher's mixer outputs "head_scale", one factor
            per head, or "ridge", a regression of the output projection; "sequential", layer by layer on the activations
            of the partly converted student, the output projection and the MLP's down projection.
        calibration_tokens: number of training tokens for "calibrated" half-lives, averages and the calibration.
        untie: give the student a head of its own, which starts as the teacher's embedding and is trained apart from it.
        copy_projections: start from the teacher's projections (q to C, k to B, v to x or in_proj, o to out_proj)
            instead of random ones.
    """

    layers: Layers = "all"
    mixer: Literal[tuple(_STARTS)] = "discrete_mamba2"  # pyright: ignore[reportInvalidTypeForm]
    conv_kernel: ConvKernel = 4
    feature_map: Literal["identity", "softplus", "hedgehog"] = "identity"
    normalize: bool = False
    rotary: bool = False
    sliding_window: Count = 256
    feature_size: Count | None = None
    window: Count = 32
    sinks: Whole = 4
    rows: Count = 96
    slots: Literal["equal", "calibrated"] = "calibrated"
    chunk_size: Count = 16
    exact_heads: ExactHeads = []
    kv_dtype: Literal["auto", "int8"] = "auto"
    positions: Count = 256
    half_life: HalfLife = "calibrated"
    calibration: Literal["none", "head_scale", "ridge", "sequential"] = "none"
    calibration_tokens: Count = 8192
    copy_projections: bool = True
    untie: bool = False

    @model_validator(mode="after")
    def _refuse_what_the_mixer_lacks(self) -> StudentSpec:
        for field, (key, mixers) in MIXERS_WITH.items():
            default = type(self).model_fields[field].default
            if self.mixer not in mixers and getattr(self, field) != default:
                raise misplaced(field, getattr(self, field), key, mixers, self.mixer)
        return self


class PseudoLabelsSpec(SettingsBase):
    """The text that the teacher writes before the training, for stages with `text: teacher`.

    Each prompt is continued until the teacher ends the text, or up to `data.sequence_length` tokens.

    Attributes:
        tokens: length of the whole text, prompts included. Stages that read more read it again, in another order.
        prompt_length: tokens of a prompt, cut from the training text; 0: only the token at the beginning of a text.
        temperature: divisor of the logits.
        top_p: least sum of the probabilities of the likeliest tokens out of which a token is drawn.
        batch_size: prompts that are continued at the same time.
    """

    tokens: Count
    prompt_length: Whole = 32
    temperature: Positive = 1.0
    top_p: UpToOne = 1.0
    batch_size: Count = 16


class DataSpec(SettingsBase):
    """The texts.

    A source is a UTF-8 text file; a `.jsonl` or `.parquet` file or a data set ("datasets:PATH,SPLIT") with a field
    "text"; or a text that ships with the package ("builtin:wikitext2").

    Attributes:
        train: sources of the training tokens, in order.
        heldout: sources of the evaluation tokens.
        sequence_length: default of the stages' and the evaluation's `sequence_length`.
        examples: content of the rows of files and data sets: "text"; "messages", a conversation for the tokenizer's
            chat template; or "prompt_completion", a prompt and its completion. With the last two, logit distillation
            learns the answers only, and the evaluations are of all tokens.
        pseudo_labels: the text that the teacher writes; None: it writes none.
    """

    train: Sources
    heldout: Sources
    sequence_length: Length = 256
    examples: Literal["text", "messages", "prompt_completion"] = "text"
    pseudo_labels: PseudoLabelsSpec | None = None

    @model_validator(mode="after")
    def _refuse_prompts_that_leave_no_room(self) -> DataSpec:
        spec = self.pseudo_labels
        if spec is None:
            return self
        if self.examples != "text":
            accepted = f"left out with examples {self.examples!r}: prompts are cut from running text"
            raise wrong("pseudo_labels", spec.model_dump(), accepted)
        if spec.prompt_length >= self.sequence_length:
            accepted = f"below data.sequence_length = {self.sequence_length}"
            raise wrong("pseudo_labels.prompt_length", spec.prompt_length, accepted)
        return self


# Fields of the comparison at the end, which have no effect without it. `as_mapping` leaves them out at their defaults.
_OF_THE_COMPARISON = (
    "long_length",
    "repeat_distances",
    "recall_pairs",
    "choice_questions",
    "context_lengths",
    "prefill_limit",
)


class EvaluationSpec(SettingsBase):
    """The measurements on the held-out text before the first stage and after every stage, and those at the end.

    Attributes:
        tokens: number of held-out tokens, in whole windows.
        sequence_length: length of these windows, L.
        batch_size: sequences per forward pass.
        repeat_distance: tokens between a passage of 96 tokens and its repetition; the loss there measures recall.
        prompts: texts that the student continues greedily, for the report.
        max_new_tokens: maximum length of these continuations.
        final: compare teacher, control and student once more after the last stage: loss by position, repeat loss,
            key-value recall, multiple choice, continuations, speed and cache. The next six fields have an effect
            only with it.
        long_length: tokens of a window for the loss by position; None: eight times `data.sequence_length`. A shorter
            held-out text is one window. There are up to four, of `tokens` tokens together, and at least one.
        repeat_distances: distances of the repeat loss, in tokens.
        recall_pairs: numbers of pairs of a list in the key-value recall.
        choice_questions: number of multiple-choice questions, each in four orders of its options; 0: none.
        context_lengths: contexts at which decoding is timed and the cache is counted, in tokens.
        prefill_limit: longest of these contexts that is read; for longer ones the cache is filled, see
            `measure_decoding`.
    """

    tokens: Count = 16384
    sequence_length: Length = 256
    batch_size: Count = 4
    repeat_distance: Count = 416
    prompts: list[str] = []
    max_new_tokens: Count = 32
    final: bool = True
    long_length: Length | None = None
    repeat_distances: Distances = [416, 1500]
    recall_pairs: Pairs = [4, 16, 64]
    choice_questions: Whole = 16
    context_lengths: Contexts = [512, 2048]
    prefill_limit: Context = 2048

    @model_validator(mode="after")
    def _refuse_less_than_a_window(self) -> EvaluationSpec:
        if self.tokens < self.sequence_length:
            raise wrong("tokens", self.tokens, f"at least sequence_length = {self.sequence_length}")
        return self

    @model_validator(mode="after")
    def _refuse_settings_of_a_comparison_that_is_not_made(self) -> EvaluationSpec:
        for field in _OF_THE_COMPARISON:
            if not self.final and self.differs(field):
                raise misplaced(field, getattr(self, field), "final", (True,), False)
        return self

    def differs(self, field: str) -> bool:
        """Return whether a field has another value than its default."""
        return getattr(self, field) != type(self).model_fields[field].default


class Recipe(SettingsBase):
    """A whole distillation run. The output folder is not part of it, so that a run can be repeated elsewhere.

    Attributes:
        teacher: a folder, a Hub repository, or a .gguf file.
        student: the student.
        data: the texts.
        stages: stages of the training, in order.
        evaluation: the evaluation.
        seed: seed of new weights and of the order of the windows.
        dtype: data type of the forward passes; the trained weights are always float32.
        checkpoint_every: steps between two checkpoints; there is also one at the end of every stage.
        teacher_revision: branch, tag or commit of a Hub repository. A run always resumes with the same commit.
        gradient_checkpointing: recompute the blocks in the backward pass of objectives that are not layer-wise: less
            memory, more time.
        stored_logits: folder that `--precompute-logits` wrote, from which logit distillation reads the teacher's most
            likely tokens instead of running it; None: the teacher runs.
        report_to: trackers that receive the curves, by transformers' names: "tensorboard", "trackio", "wandb", ….
    """

    teacher: Text
    student: StudentSpec
    data: DataSpec
    stages: list[StageSpec] = Field(min_length=1)
    evaluation: EvaluationSpec = EvaluationSpec()
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Count = 100
    teacher_revision: Text | None = None
    gradient_checkpointing: bool = False
    stored_logits: Text | None = None
    report_to: list[Text] = []

    @property
    def calibration_length(self) -> int:
        """Tokens of a calibration window: all positions of a mixer that has a maximum, or the usual length."""
        return self.student.positions if TOKEN_MIXERS[self.student.mixer].bounded else self.data.sequence_length

    @property
    def is_healed(self) -> bool:
        """Whether a calibration or refit is sequential, which also changes MLPs."""
        return "sequential" in (self.student.calibration, *(stage.refit for stage in self.stages))

    @model_validator(mode="before")
    @classmethod
    def _pass_on_sequence_length(cls, values: Any) -> Any:
        """Give `data.sequence_length` to the stages and the evaluation that do not name their own."""
        if not isinstance(values, Mapping):
            return values
        data = values.get("data")
        length = data.get("sequence_length") if isinstance(data, Mapping) else None
        if isinstance(data, DataSpec):
            length = data.sequence_length
        if whole_number(2)(length) is None:
            return values

        def complete(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {"sequence_length": length, **part}
            if isinstance(part, StageSpec | EvaluationSpec) and "sequence_length" not in part.model_fields_set:
                return type(part)(**{"sequence_length": length, **part.model_dump(exclude_unset=True)})
            return part

        stages = values.get("stages")
        completed = {**values, "evaluation": complete(values.get("evaluation", {}))}
        if isinstance(stages, list):
            completed["stages"] = [complete(stage) for stage in stages]
        return completed

    @model_validator(mode="after")
    def _refuse_texts_without_weights(self) -> Recipe:
        if TOKEN_MIXERS[self.student.mixer].bounded:
            lengths = {f"stages.{index}.": stage.sequence_length for index, stage in enumerate(self.stages)}
            lengths |= {"data.": self.data.sequence_length, "evaluation.": self.evaluation.sequence_length}
            lengths = {f"{place}sequence_length": length for place, length in lengths.items()}
            # Defaults are measured as far as there are positions.
            for field in filter(self.evaluation.differs, ("long_length", "context_lengths")):
                value = getattr(self.evaluation, field)
                lengths[f"evaluation.{field}"] = value if isinstance(value, int) else max(value, default=0)
            for place, length in lengths.items():
                if length > self.student.positions:
                    raise wrong(place, length, f"at most student.positions = {self.student.positions}")
        return self

    @model_validator(mode="after")
    def _refuse_healing_without_held_out_windows(self) -> Recipe:
        least = 2 * self.calibration_length
        if self.is_healed and self.student.calibration_tokens < least:
            accepted = f"at least {least}, two windows of which one is held out, for a sequential calibration or refit"
            raise wrong("student.calibration_tokens", self.student.calibration_tokens, accepted)
        return self

    @model_validator(mode="after")
    def _refuse_feature_maps_that_are_not_learned(self) -> Recipe:
        learned = _STARTS[self.student.mixer].learned_features or self.student.feature_map == "hedgehog"
        for index, stage in enumerate(self.stages):
            if stage.train == "feature_maps" and not learned:
                accepted = f"'mixers' or another value with student.feature_map {self.student.feature_map!r}"
                raise wrong(f"stages.{index}.train", stage.train, f"{accepted}, which has no weights")
        return self

    @model_validator(mode="after")
    def _refuse_a_text_of_the_teacher_without_effect(self) -> Recipe:
        readers = [index for index, stage in enumerate(self.stages) if stage.text == "teacher"]
        spec = self.data.pseudo_labels
        if spec is not None and not readers:
            raise wrong("data.pseudo_labels", spec.model_dump(), "left out, since no stage has text 'teacher'")
        for index in readers:
            if spec is None:
                raise wrong(f"stages.{index}.text", "teacher", "'train', or data.pseudo_labels given")
            if self.stages[index].sequence_length > spec.tokens:
                accepted = f"at least stages.{index}.sequence_length = {self.stages[index].sequence_length}"
                raise wrong("data.pseudo_labels.tokens", spec.tokens, accepted)
            if self.stored_logits is not None:
                accepted = f"left out, since logits are not stored for the text that stages.{index} reads"
                raise wrong("stored_logits", self.stored_logits, accepted)
        return self

    @model_validator(mode="after")
    def _refuse_steps_of_what_is_fitted_as_a_whole(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            if stage.layers is not None and (self.is_healed or self.student.mixer in MIXERS_WITH["slots"][1]):
                whole = "a sequential calibration or refit" if self.is_healed else f"the mixer {self.student.mixer!r}"
                accepted = f"left out with {whole}, which fits all converted layers of the student together"
                raise wrong(f"stages.{index}.layers", stage.layers, accepted)
        return self

    @model_validator(mode="after")
    def _refuse_checkpointing_without_effect(self) -> Recipe:
        if self.gradient_checkpointing and all(stage.layerwise for stage in self.stages):
            accepted = (
                "false, since it has no effect without a stage with objective 'logit_distillation' or "
                "'last_state_alignment'"
            )
            raise wrong("gradient_checkpointing", True, accepted)
        return self

    @model_validator(mode="after")
    def _refuse_stored_logits_without_effect(self) -> Recipe:
        if self.stored_logits is not None and not any(stage.reads_predictions for stage in self.stages):
            needed = "a stage with objective 'logit_distillation' and a ce_weight below 1"
            raise wrong("stored_logits", self.stored_logits, f"left out, since it has no effect without {needed}")
        return self

    @model_validator(mode="after")
    def _refuse_an_untied_head_that_is_not_trained(self) -> Recipe:
        trained = [stage.train == "all" and stage.objective == "logit_distillation" for stage in self.stages]
        if self.student.untie and not any(trained):
            accepted = (
                "false, since it has no effect without a stage with objective 'logit_distillation' and train 'all'"
            )
            raise wrong("student.untie", True, accepted)
        return self

    @model_validator(mode="after")
    def _refuse_stages_of_one_name(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise wrong(f"stages.{index}.name", name, "a name that no earlier stage has")
        return self


def resolve_layers(spec: list[int] | str, num_layers: int) -> list[int]:
    """Return the layer numbers of a recipe's `student.layers` for a teacher of `num_layers` layers.

    "odd" and "even" go by the number counted from 0. "every:N" takes the N-th layer of each run of N (N - 1,
    2N - 1, ...), "except:N" all but the first of each run of N (0, N, ...); so each of every:4, odd, except:4, except:8
    and all contains those before it. "interleave:F" takes the share F of the layers (a decimal or a ratio such as 3/4,
    rounded to the nearest count, halves up) at even distances.

    Args:
        spec: see `LAYERS_ACCEPTED`.
        num_layers: layers of the teacher.

    Returns:
        Ascending layer numbers from 0, at least one.

    Raises:
        ValueError: if `spec` is malformed, names a layer that is not there, or selects none.
    """
    if layers(spec) is None:
        raise ValueError(f"`layers` must be {LAYERS_ACCEPTED}, got {spec!r}")
    kind, _, argument = spec.partition(":") if isinstance(spec, str) else ("list", "", "")
    if kind == "list":
        numbers = sorted(int(layer) for layer in spec)
    elif kind == "every":
        numbers = list(range(int(argument) - 1, num_layers, int(argument)))
    elif kind == "except":
        numbers = [layer for layer in range(num_layers) if layer % int(argument)]
    elif kind == "interleave":
        count = int(Fraction(argument) * num_layers + Fraction(1, 2))
        # The middles of `count` equal parts of [0, num_layers), in integers so that no rounding differs.
        numbers = [(2 * part + 1) * num_layers // (2 * count) for part in range(count)]
    else:
        numbers = list(range(1 if kind == "odd" else 0, num_layers, 1 if kind == "all" else 2))
    if not numbers:
        raise ValueError(f"`layers` must select at least one of {num_layers} layers, got {spec!r}.")
    if numbers[-1] >= num_layers:
        raise ValueError(f"`layers` must be from 0 to {num_layers - 1}, got {spec!r}.")
    return numbers


def as_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON-compatible values: every key that affects the result, including defaults.

    Keys that earlier versions did not have are left out at their defaults, so that the runs of these versions resume.
    """
    values = recipe.model_dump(mode="json", exclude={"report_to"})
    if recipe.stored_logits is None:
        del values["stored_logits"]
    if recipe.data.examples == "text":
        del values["data"]["examples"]
    if recipe.data.pseudo_labels is None:
        del values["data"]["pseudo_labels"]
    for field in ("untie", "feature_size"):
        if not getattr(recipe.student, field):
            del values["student"][field]
    if not recipe.gradient_checkpointing:
        del values["gradient_checkpointing"]
    if recipe.teacher_revision is None:
        del values["teacher_revision"]
    for field in ("final", *_OF_THE_COMPARISON):
        if not recipe.evaluation.differs(field):
            del values["evaluation"][field]
    for stage, mapping in zip(recipe.stages, values["stages"], strict=True):
        unused = {field for field in LATER_FIELDS if mapping[field] == StageSpec.model_fields[field].default}
        for field in stage.meaningless | unused:
            del mapping[field]
    return values


def as_recorded(recipe: Recipe, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe as a run recorded it if it is the same, otherwise as :func:`as_mapping` does.

    Args:
        recipe: the recipe.
        recorded: the run's recipe in `run.json`, empty for a new run. An earlier version recorded fewer keys.
    """
    found, here = {key: value for key, value in recorded.items() if key != "sources"}, as_mapping(recipe)
    try:
        return found if as_mapping(parse_recipe(found)) == here else here
    except ValueError:  # no recipe of this version
        return here


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML text, which `load_recipe` reads back as an equal recipe."""
    return write_yaml(as_mapping(recipe))


def parse_recipe(values: Any, source: str = "recipe") -> Recipe:
    """Check a recipe given as nested dicts and lists.

    Args:
        values: content of a recipe file, merged with its preset.
        source: name of the recipe, for errors.

    Raises:
        ValueError: naming each key that is unknown, missing or has a value that is not accepted.
    """
    return check(Recipe, values, source)
