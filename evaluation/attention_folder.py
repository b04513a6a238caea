"""The folder of `ssm-zoo show`: numbers as JSON, matrices as safetensors, and pictures, written whole."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor

from ..harness.machine import describe_machine
from ..harness.processes import command_line
from ..harness.run_folder import read_json_or_none, write_json
from ..harness.whole_files import check_writable, new_folder
from ..reports.attention_plot import MatrixRow, draw_distances, draw_matrices
from .attention_matrices import AttentionStack
from .attention_statistics import row_shares

__all__ = ["check_attention_folder", "write_attention"]

_KIND = "ssm-zoo attention of a text"
_NUMBERS, _MATRICES, _ROLLOUT, _DISTANCE = "attention.json", "attention.safetensors", "rollout.png", "distance.png"
_TITLES = {"layers": "Mixing matrices", "encoder": "Encoder", "decoder": "Decoder", "cross": "Cross-attention"}
_NAMES = {_NUMBERS, _MATRICES, _ROLLOUT, _DISTANCE, *(f"{stack}.png" for stack in _TITLES)}
_PREFIXES = ("", "teacher.")


def check_attention_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check, before anything is computed, that a folder is new, empty, or holds the result of the same settings.

    Raises:
        ValueError: if it is a file or link, cannot be written to, or holds anything else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--output: {folder} must be a new or empty folder, got a file or link.")
    check_writable(folder, folder.absolute().parents, "--output")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not present:
        return
    found = read_json_or_none(folder / _NUMBERS) if _NUMBERS in present else None
    if not isinstance(found, dict) or found.get("kind") != _KIND or not present <= _NAMES:
        raise ValueError(f"--output: {folder} is not empty and holds something other than an earlier result.")
    earlier: Any = found.get("settings")
    differing = [key for key in settings if not isinstance(earlier, dict) or earlier.get(key) != settings[key]]
    if differing:
        raise ValueError(
            f"--output: {folder} holds the result of other settings ({', '.join(differing)}). Give another folder."
        )


def write_attention(
    output: Path,
    report: Mapping[str, Any],
    names: Sequence[str],
    stacks: Sequence[Sequence[AttentionStack]],
    flows: Sequence[Tensor],
) -> None:
    """Write a result into its folder, which appears whole; an earlier one is replaced.

    attention.safetensors has the matrices (K, L, M) of each layer as "layers.0" ("encoder.0", "decoder.0" and "cross.0"
    of an encoder-decoder) and the (L, L) "rollout"; those of the teacher begin with "teacher.".

    Args:
        output: the folder, after `check_attention_folder`.
        report: "settings", "tokens" ("source" and "target", see `token_texts`), "stacks" (see `describe_stack`) and
            further values, which become attention.json.
        names: of the model and, if there is one, of the teacher.
        stacks: of the model and of the teacher.
        flows: their (L, L) rollouts, or empty.
    """
    tensors = {
        f"{prefix}{stack.name}.{each.layer}": each.matrices.contiguous()
        for prefix, model in zip(_PREFIXES, stacks, strict=False)
        for stack in model
        for each in stack.layers
    }
    tensors |= {f"{prefix}rollout": flow.float() for prefix, flow in zip(_PREFIXES, flows, strict=False)}
    labels = {side: [token["text"] for token in tokens] for side, tokens in report["tokens"].items()}
    with new_folder(output, overwrite=True) as folder:
        check_attention_folder(output, report["settings"])  # again, as reading the models took its time
        (folder / _MATRICES).write_bytes(save(tensors, metadata={"format": "pt"}))
        for pair in zip(*stacks, strict=True):
            draw_stack(pair, names, labels).savefig(folder / f"{pair[0].name}.png", format="png")
        compared = [row for stack in report["stacks"] for row in stack["layers"] if "to_teacher" in row]
        if compared and len(report["stacks"]) == 1:
            draw_distances(compared).savefig(folder / _DISTANCE, format="png")
        if flows:
            draw_rollouts(flows, names, labels["source"]).savefig(folder / _ROLLOUT, format="png")
        head = {"format": 1, "kind": _KIND, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(folder / _NUMBERS, {**head, "command": command_line(sys.argv[1:]), **describe_machine(), **report})


def draw_rollouts(flows: Sequence[Tensor], names: Sequence[str], tokens: Sequence[str]) -> Figure:
    """Draw the (L, L) rollouts of models.

    Through the layers of a causal model nearly all flows come to the first token. Its column is then left out, and the
    other shares of each row are scaled to sum to 1.
    """
    causal = all(not bool(flow.triu(1).any()) for flow in flows)
    shown = [row_shares(F.pad(flow[:, 1:], (1, 0))) if causal else flow for flow in flows]
    row = MatrixRow(
        "all layers", ("",) * len(flows), tuple(flow.numpy()[None] for flow in shown), (("",),) * len(flows)
    )
    title = "Attention rollout" + (", without the first token: shares of the rest" if causal else "")
    return draw_matrices([row], names, tokens, tokens, title)


def draw_stack(models: Sequence[AttentionStack], names: Sequence[str], labels: Mapping[str, Sequence[str]]) -> Figure:
    """Draw the layers of a stack, of one model or beside its teacher's.

    Args:
        models: the stack of each model.
        names: of the models.
        labels: texts of the tokens, "source" and, for a decoder, "target".
    """
    rows = []
    for layer in sorted({each.layer for stack in models for each in stack.layers}):
        found = [next((each for each in stack.layers if each.layer == layer), None) for stack in models]
        mixers = tuple("" if each is None else each.mixer for each in found)
        matrices = tuple(np.zeros((0, 1, 1)) if each is None else each.matrices.numpy() for each in found)
        shown = [
            () if each is None else (f"mean of {each.num_heads:,}",) if each.heads is None else each.heads
            for each in found
        ]
        rows.append(MatrixRow(str(layer), mixers, matrices, tuple(tuple(map(str, each)) for each in shown)))
    stack = models[0].name
    queries = labels["target" if stack in ("decoder", "cross") else "source"]
    keys = labels["target" if stack == "decoder" else "source"]
    return draw_matrices(rows, names, queries, keys, f"{_TITLES[stack]}: queries down, keys across")
