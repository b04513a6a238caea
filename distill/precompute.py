"""Compute the teacher's most likely tokens for the logit distillation of a recipe, and store them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation.hidden_states import head_of
from ..harness.fingerprint import fingerprint
from ..harness.run_folder import check_output_folder, claimed_folders_end
from ..training.trainer import computing, processes
from .distiller import StageWindows
from .inputs import check_length, check_positions, load_inputs
from .recipe import Recipe
from .stored_logits import identity, likeliest, stages_of, write_logits


@claimed_folders_end()
def precompute_logits(
    recipe: Recipe, output: str | Path, *, top_k: int = 64, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a folder of stored logits, which a run of the recipe with `stored_logits` reads.

    Args:
        recipe: the recipe, without `stored_logits`.
        output: a new or empty folder, or one of an unfinished computation with the same settings.
        top_k: number of tokens that are stored of each prediction.
        trust_remote_code: run code that comes with the teacher, e.g. of its tokenizer.

    Returns:
        What the logits were computed from, as `run.json` records it.

    Raises:
        ValueError: if the recipe has no stage that reads logits, or the recipe, the teacher, the texts and the folder
            do not fit together. Nothing is written in these cases.
    """
    if recipe.stored_logits is not None:
        raise ValueError(f"`stored_logits` must be left out to compute logits, got {recipe.stored_logits!r}.")
    if not stages_of(recipe):
        raise ValueError("`stages` must have one with objective 'logit_distillation' to compute logits, got none.")
    for index, stage in enumerate(recipe.stages):
        if stage.text == "teacher":
            raise ValueError(f"`stages.{index}.text` must be 'train' to compute logits, got 'teacher'.")
    state = processes()
    if state.num_processes > 1:
        raise ValueError(f"--precompute-logits must run in one process, got {state.num_processes}.")
    check_output_folder(output)
    teacher, commit, windows = load_inputs(recipe, Path(output), state, trust_remote_code)
    head = head_of(teacher.model)
    words = next(head.parameters()).shape[0]
    if not 1 <= top_k < words:
        raise ValueError(f"--top-k must be from 1 to {words - 1}, below the teacher's {words} words, got {top_k}.")
    check_positions(recipe, teacher.positions)
    for index in stages_of(recipe):
        check_length(windows["train"], "data.train", recipe.stages[index].sequence_length)
    settings = identity(recipe, fingerprint(recipe.teacher, commit), windows["train"].fingerprint())
    settings["top_k"] = top_k

    def compute(stage: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        spec, device = recipe.stages[stage], state.device
        assert device is not None
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), computing(recipe.dtype, device):
            for batch in ids.to(device).split(spec.batch_size):
                hidden = teacher.model.base_model(batch, use_cache=False).last_hidden_state
                found.append(likeliest(hidden, head, spec.temperature, top_k))
        return torch.cat([ids for ids, _ in found]), torch.cat([log_probs for _, log_probs in found])

    rows = {index: StageWindows(windows["train"], recipe.stages, index, recipe.seed) for index in stages_of(recipe)}
    write_logits(Path(output), settings, rows, compute, words)
    return settings
