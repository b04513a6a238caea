"""Stepwise replacement: layers of a student that are converted only from a later stage on.

Until its stage a layer computes the teacher's own attention, frozen, and its new mixer waits outside of the model,
calibrated but untrained. So the student of every stage is a whole `zoo_hybrid` with the cache that its layers need.
That of the last stage is the recipe's. Source: MambaInLlama (arXiv 2408.15237), section 5, and jxiw/MambaInLlama,
`train_mamba2/train_hybrid_step.py`, where everything but the new mixers is frozen, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import ZooHybridConfig, ZooHybridForCausalLM
from ..modeling.modeling_hybrid import make_mixer
from .recipe import Recipe, resolve_layers
from .student import student_config, student_mixer
from .teacher import Teacher


def layers_of_stages(recipe: Recipe, num_layers: int) -> list[list[int]]:
    """Return the converted layers of each stage.

    Args:
        recipe: the recipe.
        num_layers: layers of the teacher.

    Raises:
        ValueError: if a stage converts a layer that the student does not, or leaves out one that an earlier stage has
            converted, or the last stage does not have all layers of the student.
    """
    every = resolve_layers(recipe.student.layers, num_layers)
    found: list[list[int]] = []
    for index, stage in enumerate(recipe.stages):
        field = f"`stages.{index}.layers`"
        try:
            chosen = every if stage.layers is None else resolve_layers(stage.layers, num_layers)
        except ValueError as error:
            raise ValueError(str(error).replace("`layers`", field, 1)) from None
        unknown = sorted(set(chosen) - set(every))
        if unknown:
            raise ValueError(f"{field} must only name layers of `student.layers`, {every}, got also {unknown}.")
        lost = sorted(set(found[-1]) - set(chosen)) if found else []
        if lost:
            raise ValueError(
                f"{field} must have the layers {lost}, which an earlier stage has converted, got {chosen}. A stage "
                "keeps what those before it converted."
            )
        found.append(chosen)
    if found[-1] != every:
        raise ValueError(
            f"`stages.{len(found) - 1}.layers` must be left out in the last stage, which trains all layers of "
            f"`student.layers`, {every}, got {found[-1]}."
        )
    return found


class Conversion:
    """The converted layers of a student, of which some may wait for their stage.

    Args:
        teacher: the teacher.
        recipe: the recipe.
        layers: all layers that the student converts.

    Raises:
        ValueError: if the layers of the stages do not fit together.
    """

    def __init__(self, teacher: Teacher, recipe: Recipe, layers: Sequence[int]) -> None:
        self._teacher, self._spec = teacher, recipe.student
        self.every = list(layers)
        self.stages = layers_of_stages(recipe, teacher.num_layers)
        for chosen in self.stages:
            student_config(teacher, recipe.student, chosen)  # raises where kinds of attention contradict each other
        self._waiting: dict[int, nn.Module] = {}

    @property
    def layers(self) -> list[int]:
        """Layers that are converted now."""
        return [layer for layer in self.every if layer not in self._waiting]

    @property
    def waiting(self) -> dict[str, Tensor]:
        """Parameters of the mixers that wait, by their names in the whole student."""
        return {
            f"backbone.layers.{layer}.mixer.{name}": parameter
            for layer, mixer in self._waiting.items()
            for name, parameter in mixer.named_parameters()
        }

    def convert(self, student: ZooHybridForCausalLM, layers: Sequence[int]) -> None:
        """Convert exactly these layers of the student, in place; the others of the student's compute the attention.

        Args:
            student: the student as it is now; a copy of the one of the last call will do.
            layers: the layers, out of `every`.
        """
        if list(layers) == self.layers:
            return
        config = self._config(student, layers)
        for layer in self.every:
            block, device = student.backbone.layers[layer], student.device
            if layer in layers and layer in self._waiting:
                block.mixer = self._waiting.pop(layer).to(device)
            elif layer not in layers and layer not in self._waiting:
                self._waiting[layer] = student_mixer(student, layer)
                block.mixer = self._attention(config, layer).to(device)
        for module in student.modules():
            holder: Any = module
            if isinstance(getattr(holder, "config", None), ZooHybridConfig):
                holder.config = config
        student.eval()

    @contextmanager
    def converted(self, student: ZooHybridForCausalLM, layers: Sequence[int]) -> Iterator[None]:
        """Convert exactly these layers for a while."""
        before = self.layers
        self.convert(student, layers)
        try:
            yield
        finally:
            self.convert(student, before)

    def _config(self, student: ZooHybridForCausalLM, layers: Sequence[int]) -> ZooHybridConfig:
        """Return the student's configuration with the teacher's attention in the layers that are not converted."""
        config, theirs = copy.deepcopy(student.config), self._teacher.zoo_config
        config.mixer_types = [
            self._spec.mixer if layer in layers else kind for layer, kind in enumerate(theirs.mixer_types)
        ]
        for kind in set(theirs.mixer_types) - {self._spec.mixer}:
            if kind not in config.mixer_types:
                vars(config).pop(kind, None)
            elif kind not in vars(config):
                setattr(config, kind, copy.deepcopy(getattr(theirs, kind)))
        return config

    def _attention(self, config: ZooHybridConfig, layer: int) -> nn.Module:
        """Return the teacher's attention as a mixer whose weights are buffers, which no stage trains or shards."""
        prefix = f"backbone.layers.{layer}.mixer."
        tensors = {name: each for name, each in self._teacher.zoo_tensors.items() if name.startswith(prefix)}
        with torch.random.fork_rng(devices=[]):
            attention = make_mixer(config, layer)
        attention.load_state_dict({name[len(prefix) :]: each.load() for name, each in tensors.items()})
        for module in attention.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        return attention.to(torch.float32)
