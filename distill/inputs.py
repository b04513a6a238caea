"""Load what a recipe reads, its teacher and its texts, and check that they are enough for it."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..modeling.token_mixers import TOKEN_MIXERS
from ..training.sharding import sharded_by
from ..training.sources import heldout_in_training, note_heldout_in_training, public_sources
from .data import TokenWindows, check_vocabulary, read_conversations, read_texts, token_windows
from .fetch import teacher_commit
from .pseudo_labels import check_prompts
from .recipe import DataSpec, Recipe
from .teacher import Teacher, load_teacher


def check_stages(recipe: Recipe, processes: int) -> None:
    """Check that the stages fit the mixer and the processes, before anything is loaded.

    Args:
        recipe: the recipe.
        processes: number of processes that `accelerate launch` started.

    Raises:
        ValueError: naming the field that does not.
    """
    start, sharded = TOKEN_MIXERS[recipe.student.mixer].student, sharded_by()
    for index, stage in enumerate(recipe.stages):
        if (
            stage.objective == "matrix_orientation"
            and start is not None
            and start.is_attention
            and not start.learned_features
        ):
            raise ValueError(
                f"`stages.{index}.objective` must be 'hidden_state_alignment', 'last_state_alignment' or "
                f"'logit_distillation' for the mixer {recipe.student.mixer!r}, which is attention already, got "
                "'matrix_orientation'."
            )
        if sharded == "DeepSpeed" and stage.layerwise:
            raise ValueError(
                f"`stages.{index}.objective` must be 'logit_distillation' or 'last_state_alignment' under DeepSpeed, "
                f"which cannot clip each layer's gradient separately, got {stage.objective!r}. FSDP2 supports all "
                "objectives."
            )
        if stage.batch_size % processes:
            raise ValueError(
                f"`stages.{index}.batch_size` must be a multiple of the {processes} processes, got {stage.batch_size}."
            )


def load_inputs(
    recipe: Recipe, output: Path, state: PartialState, trust_remote_code: bool
) -> tuple[Teacher, str | None, dict[str, TokenWindows]]:
    """Load the teacher and the texts of a recipe.

    Args:
        recipe: the recipe.
        output: folder of the run, whose commit of a teacher on the Hub is kept.
        state: accelerate's view of the processes.
        trust_remote_code: run code that comes with the teacher, e.g. of its tokenizer.

    Returns:
        The teacher, its commit on the Hub, and the token windows by split.
    """
    texts: dict[str, Any] = {}
    for split in ("train", "heldout"):
        sources, kind = getattr(recipe.data, split), recipe.data.examples
        texts[split] = read_texts(sources, split) if kind == "text" else read_conversations(sources, split, kind)
    commit = teacher_commit(recipe.teacher, recipe.teacher_revision, output)
    teacher = load_teacher(recipe.teacher, revision=commit, trust_remote_code=trust_remote_code)
    teacher.model.to(state.device)  # pyright: ignore[reportArgumentType]
    check_vocabulary(teacher.tokenizer, teacher.model.config)
    progress = state.is_main_process
    if progress:
        note_heldout_in_training(_names(recipe.data.train), _names(recipe.data.heldout), "data.heldout")
    windows = {split: token_windows(rows, teacher.tokenizer, progress=progress) for split, rows in texts.items()}
    return teacher, commit, windows


def describe_texts(data: DataSpec, train: TokenWindows, heldout: TokenWindows) -> dict[str, Any]:
    """Return the part of the report on the texts: their sizes and sources, without the folders of the machine."""
    sources = _names(data.train), _names(data.heldout)
    return {
        "train_tokens": len(train),
        "heldout_tokens": len(heldout),
        "train_sources": public_sources(sources[0]),
        "heldout_sources": public_sources(sources[1]),
        "heldout_in_training": public_sources(heldout_in_training(*sources)),
    }


def _names(sources: str | list[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)


def check_inputs(
    recipe: Recipe, teacher: Teacher, windows: dict[str, TokenWindows], positions: int | None = None
) -> None:
    """Check that texts and prompts are long enough, and short enough for the student.

    Args:
        recipe: the recipe.
        teacher: the teacher.
        windows: the token windows by split.
        positions: number of positions that the student or its teacher has weights for; None: any.

    Raises:
        ValueError: naming the field that is not.
    """
    tokenizer = teacher.tokenizer
    check_length(windows["heldout"], "data.heldout", recipe.evaluation.sequence_length)
    check_prompts(recipe, teacher)
    lengths = {recipe.calibration_length, *(stage.sequence_length for stage in recipe.stages)}
    for length in sorted(lengths):
        check_length(windows["train"], "data.train", length)
    check_positions(recipe, positions)
    length = recipe.calibration_length
    if recipe.is_healed and windows["train"].count(length) < 2:
        raise ValueError(
            f"data.train: must have two windows of {length} tokens for a sequential calibration or refit, one of which "
            f"is held out, got {len(windows['train'])} tokens."
        )
    for index, prompt in enumerate(recipe.evaluation.prompts):
        tokens, most = len(tokenizer(prompt)["input_ids"]), (positions or 0) - recipe.evaluation.max_new_tokens
        if not tokens:
            raise ValueError(f"`evaluation.prompts.{index}` must be a text of at least one token, got {prompt!r}.")
        if positions is not None and tokens > most:
            raise ValueError(
                f"`evaluation.prompts.{index}` must have at most {most} tokens (the student's {positions} positions "
                f"minus evaluation.max_new_tokens), got {tokens}."
            )


def check_positions(recipe: Recipe, positions: int | None) -> None:
    """Check that no text is longer than the number of positions that the models have weights for.

    Raises:
        ValueError: naming the field that is too large.
    """
    lengths = {f"stages.{index}.sequence_length": stage.sequence_length for index, stage in enumerate(recipe.stages)}
    lengths |= {f"{part}.sequence_length": getattr(recipe, part).sequence_length for part in ("data", "evaluation")}
    for field_name, length in lengths.items():
        if positions is not None and length > positions:
            limit = f"{positions}, the number of positions that have weights"
            raise ValueError(f"`{field_name}` must be at most {limit}, got {length}.")


def check_length(windows: TokenWindows, field: str, sequence_length: int) -> None:
    """Check that a text has a whole window of a length.

    Raises:
        ValueError: naming the field if it has none.
    """
    try:
        windows.count(sequence_length)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
