"""Choose the layers to convert, and the heads to keep exact, by measurements of the teacher.

Four rankings of layers: even distances; the harm when the attention of one layer of the teacher is set to zero; the
gain when one layer gets its attention back in a student that has an untrained window and sinks in all layers; and
the attention that a layer's heads pay to a passage when it is repeated. The layers with the smallest scores are
converted. Heads are ranked by the last two.

Harm and gain are changes of the divergence from the teacher on ordinary text, plus a weight times the changes of the
loss on a repeated passage: ordinary text hardly shows recall.

Symbols: N windows, L length, D width, H query heads, KV key-value heads.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..evaluation.hidden_states import evaluating, head_input
from ..evaluation.language_modeling import CUE, PASSAGE, logits_of, predictions_at_once, repeat_loss, repeated_texts
from ..harness.json_files import read_json_object
from ..harness.run_folder import write_json
from ..modeling import ZooHybridForCausalLM
from ..modeling.attention import Attention
from ..modeling.bounded_memory import BoundedAttentionSettings
from .recipe import StudentSpec, resolve_layers
from .selection_settings import SelectionSettings
from .student import build_student, student_mixer
from .teacher import Teacher

_CHUNK = 4  # tokens by which the window of the untrained student moves
_TEXTS = 3  # with a repeated passage


class Measurements:
    """Measured values by name, which are kept in a file, so that an interrupted selection goes on where it stopped.

    Args:
        path: the file; None keeps them in memory only.

    Raises:
        ValueError: if the file is damaged or was edited.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is not None and path.is_file():
            found = read_json_object(path)
            if found.get("sha256") != _digest(found.get("values")):
                raise ValueError(f"{path} is damaged or was edited. Remove it, so that its values are measured again.")
            self._values = found["values"]

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a value, which is measured if it is not there yet.

        Raises:
            ValueError: if it is not finite.
        """
        if name not in self._values:
            value = measure()
            if not torch.tensor(list(value.values()) if isinstance(value, dict) else value).isfinite().all():
                raise ValueError(f"teacher: the measurement {name!r} is not finite. Choose another teacher.")
            self._values[name] = value
            if self._path is not None:
                write_json(self._path, {"sha256": _digest(self._values), "values": self._values})
        return self._values[name]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass
class Selector:
    """Measures layers and heads of a teacher.

    Args:
        teacher: in evaluation mode.
        ids: (tokens) int64 token ids of ordinary text.
        settings: the settings.
        measurements: values that are known already.
        progress: show progress bars.
    """

    teacher: Teacher
    ids: Tensor
    settings: SelectionSettings
    measurements: Measurements = field(default_factory=Measurements)
    progress: bool = True

    def __post_init__(self) -> None:
        settings, least = self.settings, PASSAGE + self.settings.distance
        if self.count > self.teacher.num_layers:
            raise ValueError(f"`layers` must be at most the teacher's {self.teacher.num_layers}, got {self.count}.")
        if settings.heads > self.count * self.heads_per_layer:
            most = f"{self.count * self.heads_per_layer}, the key-value heads of {self.count} converted layers"
            raise ValueError(f"`heads` must be at most {most}, got {settings.heads}.")
        if len(self.ids) < max(settings.tokens, least):
            raise ValueError(
                f"`data` must have at least {max(settings.tokens, least):,} tokens (--tokens, and {PASSAGE} more than "
                f"--distance), got {len(self.ids):,}."
            )
        for name, length in (("sequence_length", settings.sequence_length), ("distance", PASSAGE + least)):
            if length > (self.teacher.positions or length):
                raise ValueError(
                    f"`{name}` must be smaller: the teacher has {self.teacher.positions} positions, and texts of "
                    f"{length} tokens would be read."
                )

    @property
    def count(self) -> int:
        """Number of layers to convert."""
        return self.settings.layers or max(self.teacher.num_layers // 2, 1)

    @property
    def heads_per_layer(self) -> int:
        """KV."""
        return int(self.teacher.zoo_config.num_key_value_heads or 0)

    def select(self) -> dict[str, Any]:
        """Measure everything that the settings ask for, and choose.

        Returns:
            "layers" and "exact_heads" as a recipe has them; "methods": for each method the layers that it would convert
            and a row per layer; "heads": a row per measured key-value head; "baselines": loss of teacher and untrained
            student on repeated passages, and divergence of the student, as far as they were measured; "seconds".
        """
        started, settings = time.monotonic(), self.settings
        methods = {method: self.rank_layers(method) for method in settings.methods}
        layers = methods[settings.methods[0]]["layers"]
        heads = self.rank_heads(layers) if settings.heads else []
        chosen = sorted(heads, key=lambda row: -row["score"])[: settings.heads]
        return {
            "layers": layers,
            "exact_heads": sorted([row["layer"], row["head"]] for row in chosen),
            "methods": methods,
            "heads": heads,
            "baselines": self._baselines(),
            "seconds": time.monotonic() - started,
        }

    def rank_layers(self, method: str) -> dict[str, Any]:
        """Score all layers by a method.

        Returns:
            "layers", the ascending numbers of those with the smallest scores, and "rows" with "layer", "score" and what
            it is made of; no rows for "uniform".
        """
        every = range(self.teacher.num_layers)
        if method == "uniform":
            return {"layers": resolve_layers(f"interleave:{self.count}/{len(every)}", len(every)), "rows": []}
        if method == "retrieval":
            found = self._attention_to_copies()
            rows = [{"layer": layer, "score": max(found[layer]), "heads": found[layer]} for layer in every]
        else:
            measure = self._ablated if method == "ablation" else self._restored
            rows = []
            for layer in tqdm(every, desc=method, unit="layer", disable=not self.progress, leave=False):
                rows.append(
                    {"layer": layer, **self.measurements.get(f"{method} {layer}", lambda at=layer: measure(at))}
                )
        least = sorted(rows, key=lambda row: row["score"])[: self.count]
        return {"layers": sorted(row["layer"] for row in least), "rows": rows}

    def rank_heads(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """Score the key-value heads of some layers; see `SelectionSettings.head_method`.

        Returns:
            Rows with "layer", "head", "score" and what it is made of.
        """
        places = [(layer, head) for layer in layers for head in range(self.heads_per_layer)]
        if self.settings.head_method == "retrieval":
            found = self._attention_to_copies()
            return [{"layer": layer, "head": head, "score": found[layer][head]} for layer, head in places]
        rows = []
        for layer, head in tqdm(places, desc="restore", unit="head", disable=not self.progress, leave=False):
            measured = self.measurements.get(
                f"restore {layer} {head}", lambda at=layer, which=head: self._restored(at, [which])
            )
            rows.append({"layer": layer, "head": head, **measured})
        return rows

    def _baselines(self) -> dict[str, Any]:
        found: dict[str, Any] = {"teacher": {"repeat_loss": self._teacher_repeat()}}
        if "restore" in self.settings.methods or (self.settings.heads and self.settings.head_method == "restore"):
            found["student"] = self._untrained()
        return found

    def _ablated(self, layer: int) -> dict[str, float]:
        """Return the harm when the attention of a layer of the teacher is set to zero."""
        before = self._teacher_repeat()
        assert self._teacher_states  # computed before the attention is changed
        with zeroed(self.teacher.attention_module(layer)):
            found = self._measure(self.teacher.model)
        return self._scored(found["kl"], found["repeat_loss"] - before)

    def _restored(self, layer: int, heads: Sequence[int] | None = None) -> dict[str, float]:
        """Return the gain when a layer of the untrained student gets the teacher's attention back, or some of its heads
        full attention."""
        before = self._untrained()
        with restored(self.student, self.teacher, layer) if heads is None else exact(self.student, layer, heads):
            found = self._measure(self.student)
        return self._scored(before["kl"] - found["kl"], before["repeat_loss"] - found["repeat_loss"])

    def _scored(self, kl: float, repeat: float) -> dict[str, float]:
        return {"score": kl + self.settings.recall * repeat, "kl": kl, "repeat_loss": repeat}

    @cached_property
    def student(self) -> ZooHybridForCausalLM:
        """The teacher with an untrained window and sinks in all layers."""
        window, sinks = self.settings.window, self.settings.sinks
        spec = StudentSpec(
            mixer="bounded_attention",
            window=window,
            sinks=sinks,
            rows=window + sinks,
            slots="equal",
            chunk_size=min(_CHUNK, window),
        )
        return build_student(self.teacher, spec, range(self.teacher.num_layers))

    def _untrained(self) -> dict[str, float]:
        return self.measurements.get("student", lambda: self._measure(self.student))

    def _teacher_repeat(self) -> float:
        return self.measurements.get("teacher", lambda: self._repeat(self.teacher.model))

    def _measure(self, model: PreTrainedModel) -> dict[str, float]:
        return {"kl": self._divergence(model), "repeat_loss": self._repeat(model)}

    def _repeat(self, model: PreTrainedModel) -> float:
        found = repeat_loss(model, self.ids, self.settings.distance, texts=_TEXTS)
        assert found is not None  # the text is long enough
        return found

    @cached_property
    def _windows(self) -> Tensor:
        """(N, L) tokens on which the divergence is measured."""
        length = self.settings.sequence_length
        return self.ids[: self.settings.tokens // length * length].view(-1, length).to(self.teacher.model.device)

    @cached_property
    def _teacher_states(self) -> list[Tensor]:
        """(L, D) inputs of the teacher's head, for each window."""
        with evaluating(self.teacher.model), torch.no_grad():
            return [head_input(self.teacher.model, input_ids=window)[0] for window in self._windows.split(1)]

    def _divergence(self, model: PreTrainedModel) -> float:
        """Return the mean KL(teacher || model) over the windows, in nats per token."""
        teacher, total = self.teacher.model, 0.0
        with evaluating(model), torch.no_grad():
            for window, theirs in zip(self._windows.split(1), self._teacher_states, strict=True):
                ours = head_input(model, input_ids=window)[0]
                at_once = predictions_at_once(ours, teacher.config.get_text_config().vocab_size)
                for pair in zip(ours.split(at_once), theirs.split(at_once), strict=True):
                    ours_log, theirs_log = (
                        logits_of(*each).log_softmax(-1) for each in zip((model, teacher), pair, strict=True)
                    )
                    total += float(F.kl_div(ours_log, theirs_log, reduction="sum", log_target=True))
        return total / self._windows.numel()

    def _attention_to_copies(self) -> list[list[float]]:
        """Return for each layer the attention of each of its key-value heads to the token that is to be copied."""
        return self.measurements.get(
            "retrieval", lambda: attention_to_copies(self.teacher, self._copies, self.progress)
        )

    @property
    def _copies(self) -> Tensor:
        return repeated_texts(self.ids, self.settings.distance, texts=_TEXTS)


def attention_to_copies(teacher: Teacher, texts: Tensor, progress: bool = True) -> list[list[float]]:
    """Return for each layer the attention of each key-value head to the token that a repetition copies.

    Where the last 96 tokens of a text are read again, the token at each place is followed by the one that followed it
    the first time. A head that recalls the passage attends to that one. A key-value head has the largest mean weight of
    its query heads.

    Args:
        teacher: in evaluation mode.
        texts: (N, L) from :func:`repeated_texts`.
        progress: show a progress bar.
    """
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    found = torch.zeros(teacher.num_layers, heads, teacher.zoo_config.num_attention_heads // heads, dtype=torch.float64)
    length = texts.shape[1]
    rows = torch.arange(length - PASSAGE + CUE - 1, length - 1)
    copied = rows + 1 - (length - PASSAGE)

    @torch.no_grad()
    def on_layer(layer: int, normed_input: Tensor) -> None:
        for hidden in normed_input.split(1):
            weights = teacher.attention_matrix(layer, hidden)[0]
            found[layer] += weights[:, rows, copied].mean(-1).view_as(found[layer]).double().cpu() / len(texts)
        bar.update()

    with tqdm(total=teacher.num_layers, desc="retrieval", unit="layer", disable=not progress, leave=False) as bar:
        ids = texts.to(teacher.model.device)
        teacher.capture(ids, range(teacher.num_layers), ("normed_input",), on_layer=on_layer)
    return found.amax(-1).tolist()


@contextmanager
def zeroed(module: nn.Module) -> Iterator[None]:
    """Set the output of a layer's attention to zero."""

    def zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
        # Zeros in place of the first of several outputs: the others are attention weights or None.
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handle = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def restored(student: ZooHybridForCausalLM, teacher: Teacher, layer: int) -> Iterator[None]:
    """Give a layer with bounded attention the teacher's attention, over its window if it has one."""
    config, block = teacher.zoo_config, student.backbone.layers[layer]
    if config.mixer_types[layer] != "sliding_attention":
        with exact(student, layer, range(config.num_key_value_heads)):
            yield
        return
    mixer = student_mixer(student, layer)
    with torch.device("meta"):
        attention = Attention(student.config, layer, config.settings_of("sliding_attention").sliding_window)
    attention.load_state_dict(mixer.state_dict(), assign=True)
    block.mixer = attention.eval()
    try:
        yield
    finally:
        block.mixer = mixer


@contextmanager
def exact(student: ZooHybridForCausalLM, layer: int, heads: Sequence[int]) -> Iterator[None]:
    """Give some key-value heads of a layer with bounded attention full attention."""
    mixer: Any = student_mixer(student, layer)
    settings: BoundedAttentionSettings = mixer.settings
    blocks: list[list[int]] = [[] for _ in range(student.config.num_hidden_layers)]
    blocks[layer] = sorted(heads)
    mixer.settings = replace(settings, exact=blocks)
    try:
        yield
    finally:
        mixer.settings = settings
