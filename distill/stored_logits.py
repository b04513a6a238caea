"""The teacher's most likely tokens, computed once and read by later runs, which need no forward pass of the teacher.

The folder holds `run.json`, which says what the numbers were computed from, and a file for every few windows of each
stage of logit distillation: the `ids` (windows, L, k) of the k most likely tokens of every position, and `log_probs`
(windows, L, k + 1) of these and of all others together, at the stage's temperature. With the others as one more token,
every divergence of the k + 1 probabilities is defined, and is at most that of the whole predictions.

Files appear whole, so an interrupted computation goes on with the first that is missing. What is read is checked: files
on a disk can be damaged, or come from another folder.

Symbols: B batch, L length, V vocabulary, k stored tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..harness.json_files import read_json_object, typed
from ..harness.run_folder import claim_output_folder
from ..harness.whole_files import write_whole
from .logit_losses import log_rest, tokens_at_once
from .recipe import Recipe
from .stages import StageSpec

KIND = "ssm-zoo stored logits"
_SETTINGS = "run.json"
_WINDOWS = 16  # in a file
_AGAIN = "Run the command with --precompute-logits again, which computes what is missing or damaged."
# Largest logarithm of a sum of probabilities. Rounding makes a thousandth of it.
_SUM = 1e-3


def identity(recipe: Recipe, teacher: Mapping[str, str], data: str) -> dict[str, Any]:
    """Return what stored logits depend on, apart from the number of stored tokens.

    Args:
        recipe: the recipe.
        teacher: the teacher's fingerprint, see `harness/fingerprint.py`.
        data: fingerprint of the training tokens.
    """
    # The place of a folder does not matter where its content is known.
    known = {part: value for part, value in teacher.items() if part != "source" or "commit" in teacher}
    return {
        "teacher": known,
        "data": data,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "stages": {str(index): _stage_identity(recipe.stages, index) for index in stages_of(recipe)},
    }


def stages_of(recipe: Recipe) -> list[int]:
    """Return the indices of the stages whose loss depends on the teacher's predictions."""
    return [index for index, stage in enumerate(recipe.stages) if stage.reads_predictions]


def _stage_identity(stages: Sequence[StageSpec], index: int) -> dict[str, Any]:
    stage = stages[index]
    fields = ("sequence_length", "batch_size", "steps", "repeats", "temperature")
    return {"read_before": tokens_before(stages, index), **{field: getattr(stage, field) for field in fields}}


def tokens_before(stages: Sequence[StageSpec], index: int) -> int:
    """Return the number of tokens that the stages before a stage read of its text."""
    before = [part for part in stages[:index] if part.text == stages[index].text]
    return sum(part.steps * part.batch_size * part.sequence_length for part in before)


@torch.no_grad()
def likeliest(hidden: Tensor, head: nn.Module, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """Return the k most likely tokens of a model's predictions, for a few positions at a time.

    Args:
        hidden: (B, L, D) input of the head.
        head: the head.
        temperature: divides the logits.
        k: number of tokens, below V.

    Returns:
        (B, L, k) int32 ids and (B, L, k + 1) float32 log-probabilities, the last of them that of all other tokens.
    """
    chunk = tokens_at_once(next(head.parameters()).shape[0])
    ids, log_probs = [], []
    for rows in hidden.flatten(0, 1).split(chunk):
        log_all = torch.log_softmax(head(rows).float() / temperature, dim=-1)
        top, places = log_all.topk(k, dim=-1)
        ids.append(places.int())
        log_probs.append(torch.cat([top, log_rest(log_all, places)], dim=-1))
    shape = hidden.shape[:2]
    return torch.cat(ids).view(*shape, k), torch.cat(log_probs).view(*shape, k + 1)


def write_logits(
    folder: Path,
    settings: dict[str, Any],
    windows: Mapping[int, Any],
    compute: Any,
    words: int,
    *,
    progress: bool = True,
) -> None:
    """Write a folder of stored logits, or what is missing or damaged of it.

    Args:
        folder: a new or empty folder, or one of an unfinished computation with the same settings.
        settings: result of :func:`identity`, and "top_k".
        windows: the windows of each stage, by its index.
        compute: computes ids and log-probabilities from a stage's index and (B, L) token ids.
        words: V.
        progress: show a progress bar.

    Raises:
        ValueError: if the folder holds something else, or the teacher's predictions are not finite.
    """
    claim_output_folder(folder, settings, KIND)
    total = sum(len(rows) for rows in windows.values())
    with tqdm(total=total, desc="teacher's logits", unit="window", disable=not progress) as bar:
        for stage, rows in windows.items():
            for path, items in _files(folder, stage, len(rows)):
                length = len(rows[items[0]]["input_ids"])
                if not path.is_file() or _damage(path, (len(items), length, settings["top_k"]), words) is not None:
                    batch = torch.stack([rows[item]["input_ids"] for item in items])
                    ids, log_probs = compute(stage, batch)
                    if not bool(log_probs.isfinite().all()):
                        raise ValueError(
                            f"teacher: its predictions for windows {items[0]} to {items[-1]} of stage {stage} are not "
                            "finite. Choose dtype float32, or another teacher if it already is."
                        )
                    tensors = {"ids": ids.cpu().contiguous(), "log_probs": log_probs.cpu().contiguous()}
                    write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
                bar.update(len(items))


def _files(folder: Path, stage: int, windows: int) -> Iterator[tuple[Path, range]]:
    """Yield the files of a stage with the items in each."""
    for first in range(0, windows, _WINDOWS):
        items = range(first, min(first + _WINDOWS, windows))
        yield folder / f"stage-{stage}-{first // _WINDOWS:06}.safetensors", items


def _open(path: Path, shape: tuple[int, int, int]) -> Any:
    """Open a file after a look at its header.

    Args:
        path: the file.
        shape: (windows, L, k) of its ids.

    Raises:
        ValueError: if it cannot be read or has other tensors.
    """
    try:
        file = safe_open(path, "pt")
        parts = {name: file.get_slice(name) for name in ("ids", "log_probs")}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    wanted = {"ids": ("I32", shape), "log_probs": ("F32", (*shape[:2], shape[2] + 1))}
    if found != wanted:
        raise ValueError(f"must have {wanted}, got {found}")
    return file


def _check(ids: Tensor, log_probs: Tensor, words: int) -> None:
    """Raise a ValueError unless (..., k) ids and (..., k + 1) log-probabilities are a prediction over `words` words."""
    if not bool(log_probs.isfinite().all()):
        raise ValueError("has log-probabilities that are not finite")
    if float(log_probs.logsumexp(-1).abs().max()) > _SUM:
        raise ValueError("has probabilities that do not sum to 1")
    ordered = ids.sort(dim=-1).values
    if int(ordered[..., 0].min()) < 0 or int(ordered[..., -1].max()) >= words or bool((ordered.diff() == 0).any()):
        raise ValueError(f"has ids that are repeated, or not from 0 to {words - 1}")


def _damage(path: Path, shape: tuple[int, int, int], words: int) -> str | None:
    """Return what is wrong with a file, all of which is read; None: nothing."""
    try:
        with _open(path, shape) as file:
            _check(file.get_tensor("ids"), file.get_tensor("log_probs"), words)
    except ValueError as error:
        return str(error)
    return None


class StoredLogits:
    """Reader of a folder of stored logits.

    Args:
        folder: the folder.
        expected: :func:`identity` of the run that reads it.
        words: V.

    Raises:
        ValueError: if the folder is none, is not complete, or was computed from something else.
    """

    def __init__(self, folder: str | Path, expected: Mapping[str, Any], words: int) -> None:
        self.folder, self._words = Path(folder), words
        path = self.folder / _SETTINGS
        if not path.is_file() or (settings := read_json_object(path)).get("kind") != KIND:
            raise ValueError(
                f"`stored_logits` must be a folder that `ssm-zoo distill RECIPE FOLDER --precompute-logits` wrote, got "
                f"{str(folder)!r}."
            )
        self.settings: dict[str, Any] = typed(settings.get("recipe"), dict, str(path), "recipe")
        for key, here in json.loads(json.dumps(expected)).items():
            there = self.settings.get(key)
            if there != here:
                raise ValueError(f"`stored_logits`: {folder} was computed with {_difference(key, there, here)}.")
        k = typed(self.settings.get("top_k"), int, str(path), "recipe.top_k")
        self._shapes: dict[Path, tuple[int, int, int]] = {}
        for stage, values in expected["stages"].items():
            for file, items in _files(self.folder, int(stage), values["steps"] * values["batch_size"]):
                if not file.is_file():
                    raise ValueError(f"`stored_logits`: {file} is missing. {_AGAIN}")
                self._shapes[file] = (len(items), values["sequence_length"], k)
                with self._of_file(file):
                    _open(file, self._shapes[file])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the numbers were computed from, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def row(self, stage: int, item: int) -> dict[str, Tensor]:
        """Return "top_ids" (L, k) and "top_log_probs" (L, k + 1) of a window."""
        path = self.folder / f"stage-{stage}-{item // _WINDOWS:06}.safetensors"
        with self._of_file(path), _open(path, self._shapes[path]) as file:
            ids, log_probs = (file.get_slice(name)[item % _WINDOWS] for name in ("ids", "log_probs"))
            _check(ids, log_probs, self._words)
        return {"top_ids": ids.long(), "top_log_probs": log_probs}

    @staticmethod
    @contextmanager
    def _of_file(path: Path) -> Iterator[None]:
        """Name the file in an error about it."""
        try:
            yield
        except (ValueError, SafetensorError, OSError) as error:
            raise ValueError(f"`stored_logits`: {path} {error}. {_AGAIN}") from None


def _difference(key: str, there: Any, here: Any) -> str:
    """Describe what two runs do not have in common."""
    if key == "data":
        return "other training tokens"
    if isinstance(here, dict) and isinstance(there, dict):
        for name in (*here, *there):
            if here.get(name) != there.get(name):
                if key == "teacher":
                    return f"another teacher: its {name} differ"
                return _difference(
                    f"stages.{name}" if key == "stages" else f"{key}.{name}", there.get(name), here.get(name)
                )
    return f"`{key}` = {there!r}, got {here!r}"
