"""Text that the teacher writes, as training data: sequence-level knowledge distillation (arXiv 1606.07947).

Prompts are cut from the training text, and the teacher samples continuations. Logit distillation on them learns the
continuations only, as on the answers of conversations. MambaInLlama (arXiv 2408.15237) trains on such pseudo-labels.

They are written before the training, a batch to a file, each file with a seed of its own: an interrupted run goes on
with the files that are missing, to the same text. Several processes write a file each at a time, and never write a file
that might turn out not to be needed, so that their number changes neither the files nor the text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..evaluation.language_modeling import end_tokens, without_generation_config
from ..harness.whole_files import write_whole
from .data import TokenWindows, derived_seed
from .recipe import Recipe
from .teacher import Teacher

FOLDER = "pseudo_labels"
"""Name of the folder in the folder of a run."""


def check_prompts(recipe: Recipe, teacher: Teacher) -> None:
    """Check that the teacher has what its prompts need.

    Raises:
        ValueError: if prompts are to be the token at the beginning of a text, and the tokenizer has none.
    """
    spec = recipe.data.pseudo_labels
    if spec is not None and spec.prompt_length == 0 and not isinstance(teacher.tokenizer.bos_token_id, int):
        raise ValueError(
            "`data.pseudo_labels.prompt_length` must be at least 1, since the teacher's tokenizer has no token for the "
            "beginning of a text, got 0."
        )


def pseudo_labels(
    recipe: Recipe,
    teacher: Teacher,
    train: TokenWindows,
    output: Path,
    compute: Callable[[], AbstractContextManager[Any]],
    state: PartialState,
) -> TokenWindows:
    """Return the teacher's text of a run, after writing what is missing of it.

    Args:
        recipe: the recipe, with `data.pseudo_labels`.
        teacher: the teacher, in evaluation mode.
        train: the training text.
        output: folder of the run.
        compute: makes the context of a forward pass in the recipe's dtype.
        state: accelerate's view of the processes, which share the files to write; all read all of them.

    Returns:
        The text of `data.pseudo_labels.tokens` tokens, in which the continuations are to be learnt.

    Raises:
        ValueError: if a file cannot be read, or was written from another training text.
    """
    spec = recipe.data.pseudo_labels
    assert spec is not None
    parts: list[tuple[Tensor, Tensor]] = []
    known, source = 0, {"train": train.fingerprint()}
    in_a_file = spec.batch_size * recipe.data.sequence_length  # tokens, at most
    with tqdm(total=spec.tokens, desc="teacher's text", unit="token", disable=not state.is_main_process) as bar:
        while known < spec.tokens:
            # At least this many more files are needed.
            certain = -(-(spec.tokens - known) // in_a_file)
            numbers = range(len(parts), len(parts) + min(certain, state.num_processes))
            paths = [output / FOLDER / f"{number:06}.safetensors" for number in numbers]
            for number, path in list(zip(numbers, paths, strict=True))[state.process_index :: state.num_processes]:
                if not path.is_file():
                    path.parent.mkdir(exist_ok=True)
                    with compute():
                        content = save(write_batch(recipe, teacher, train, number), source)
                    # `save_file` replaces the file, and with it the lock that keeps other processes away from it.
                    write_whole(path, lambda temporary, content=content: temporary.write_bytes(content))
            state.wait_for_everyone()
            for path in paths:
                parts.append(_read(path, source))
                known += len(parts[-1][0])
            bar.update(min(known, spec.tokens) - bar.n)
    ids, learnt = (torch.cat(part)[: spec.tokens] for part in zip(*parts, strict=True))
    return TokenWindows(ids, learnt)


@torch.no_grad()
def write_batch(recipe: Recipe, teacher: Teacher, train: TokenWindows, number: int) -> dict[str, Tensor]:
    """Sample a batch of continuations, which depends only on the arguments.

    A text ends with the token that ends it, or with `data.sequence_length` tokens. Texts follow one another; the first
    tokens of a prompt, which do not follow from the text before it, are not learnt.

    Args:
        recipe: the recipe, with `data.pseudo_labels`.
        teacher: the teacher.
        train: the training text.
        number: number of the batch, from 0.

    Returns:
        "ids", (tokens) int32, and "learnt", (tokens) bool: the tokens that the teacher wrote.
    """
    spec, length = recipe.data.pseudo_labels, recipe.data.sequence_length
    assert spec is not None
    if spec.prompt_length:
        # With another seed than those of training and calibration.
        prompts = train.batch(number, spec.batch_size, spec.prompt_length, recipe.seed + 2)
    else:
        prompts = torch.full((spec.batch_size, 1), int(teacher.tokenizer.bos_token_id))  # pyright: ignore[reportArgumentType]
    model: Any = teacher.model
    ends = end_tokens(model, teacher.tokenizer)
    sampling = GenerationConfig(
        max_new_tokens=length - prompts.shape[1],
        do_sample=True,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    prompts = prompts.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), without_generation_config(model):
        torch.manual_seed(derived_seed(recipe.seed, 2, number))
        mask = torch.ones_like(prompts)
        written = model.generate(input_ids=prompts, attention_mask=mask, generation_config=sampling).cpu()
    rows, learnt = [], []
    for row in written:
        new = row[prompts.shape[1] :].tolist()
        kept = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        rows.append(row[: prompts.shape[1] + kept])
        learnt.append(torch.arange(len(rows[-1])) >= prompts.shape[1])
    return {"ids": torch.cat(rows).int(), "learnt": torch.cat(learnt)}


def _read(path: Path, source: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Return ids and learnt tokens of a file that was written from the training text of `source`."""
    try:
        with safe_open(path, "pt") as file:
            found, ids, learnt = file.metadata(), file.get_tensor("ids"), file.get_tensor("learnt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it: the run writes it again.") from None
    if found != source:
        raise ValueError(
            f"data.train: {path} was written from another training text. Give the same text, or remove the folder "
            f"{path.parent}, so that the teacher's text is written again."
        )
    return ids, learnt
