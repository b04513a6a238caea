"""The parity report: the result of a conversion, and the comparison of both sides' logits."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .rules import LazyTensor

TOLERANCE = 1e-3
"""Largest difference of float32 logits, relative to the largest logit (or 1), that rounding may explain."""

_ROWS, _TOKENS = 2, 40


@dataclass(frozen=True)
class Difference:
    """The difference of two models' logits for the same random tokens, in float32.

    Attributes:
        between: names of the two models.
        difference: largest difference.
        largest: largest logit.
    """

    between: str
    difference: float
    largest: float


@dataclass(frozen=True)
class ParityReport:
    """The result of a conversion.

    Attributes:
        source: format that was read.
        target: format that was written.
        keys_read: number of tensors of the source.
        shapes: shapes of the written tensors, by key.
        dtypes: dtypes of the written tensors, by key.
        carried: other files that were copied or added.
        logits: comparison of both sides' logits, or the reason for which there is none.
        notes: further lines for the reader.
    """

    source: str
    target: str
    keys_read: int
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    carried: list[str]
    logits: Difference | str
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters that were written."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        dtypes = Counter(str(dtype).removeprefix("torch.") for dtype in self.dtypes.values())
        lines = [
            f"{self.source} -> {self.target}",
            f"keys: {self.keys_read} read, {len(self.shapes)} written; none missing, none left over",
            "shapes: all as both configurations promise",
            f"parameters: {self.parameters:,}",
            f"dtypes: {', '.join(f'{count} {name}' for name, count in sorted(dtypes.items()))}",
            f"other files: {', '.join(self.carried) or 'none'}",
            *self.notes,
        ]
        if isinstance(self.logits, str):
            return [*lines, f"logits: not compared: {self.logits}"]
        return [
            *lines,
            f"logits: {self.logits.difference:.2g} apart at most, of at most {self.logits.largest:.3g}; "
            f"{self.logits.between}, float32, {_ROWS} x {_TOKENS} random tokens",
        ]


def compare(ours: Tensor, theirs: Tensor, between: str) -> Difference:
    """Compare the logits of both sides.

    Raises:
        ValueError: if they are not finite, or differ by more than rounding explains.
    """
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ValueError(f"logits of random tokens are not finite ({between}).")
    result = Difference(between, (ours - theirs).abs().max().item(), theirs.abs().max().item())
    if result.difference > TOLERANCE * max(1.0, result.largest):
        raise ValueError(
            f"logits of random tokens are up to {result.difference:.3g} apart, of at most {result.largest:.3g} "
            f"({between}). Nothing is written. Pass --no-verify (verify=False) to write it all the same."
        )
    return result


def check_tensors(model_class: type[PreTrainedModel], folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Compare tensors that were read from a folder with those that transformers loads from it.

    Raises:
        ValueError: if a tensor is not loaded, or differs.
    """
    loaded: Any = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    model, found = loaded
    state = model.state_dict()
    missing = [key for key in tensors if key not in state or key in found["missing_keys"]]
    if missing:
        raise ValueError(
            f"{folder}: {model_class.__name__}.from_pretrained does not load {len(missing)} tensors: {missing[0]}."
        )
    for key, tensor in tensors.items():
        if not torch.allclose(state[key].float(), tensor.load().float(), rtol=0.0, atol=0.0, equal_nan=True):
            raise ValueError(
                f"{folder}: {model_class.__name__}.from_pretrained loads other values for {key} than were read here. "
                "Nothing is written."
            )


def logits_of_tensors(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, LazyTensor]
) -> Tensor:
    """Return the logits of a model with these weights for the random tokens, in float32."""
    state = {key: tensor.load().float() for key, tensor in tensors.items()}
    return _logits(
        model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, trust_remote_code=False)
    )


def logits_of_folder(model_class: type[PreTrainedModel], folder: Path) -> Tensor:
    """Return the logits of the model in a folder for the random tokens, in float32."""
    return _logits(model_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    ids = torch.randint(model.config.vocab_size, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids, use_cache=False).logits
