"""Low-rank adapters on the new mixers for a stage, by peft: put on before it, merged into the weights after it.

A stage with `train: lora` trains the adapters alone, which are float32. The student that follows contains no adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..modeling import ZooHybridForCausalLM
from .data import derived_seed
from .stages import StageSpec
from .student import student_mixer

TARGETS = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")
"""Names of the projections of mixers that get adapters."""
PART = ".lora_"
"""Part of the names of an adapter's weights."""
_WRAPPED = ".base_layer"


def targets(student: ZooHybridForCausalLM, layers: Sequence[int]) -> list[str]:
    """Return the names of the linear layers of the converted layers' mixers that get adapters.

    Raises:
        ValueError: if a mixer has none.
    """
    found = []
    for layer in layers:
        mixer = student_mixer(student, layer)
        names = [name for name in TARGETS if isinstance(getattr(mixer, name, None), nn.Linear | LoraLayer)]
        if not names:
            raise ValueError(
                f"`train` must be 'mixers' or 'all' for layer {layer}, whose mixer, a {type(mixer).__name__}, has no "
                "linear projections for adapters, got 'lora'."
            )
        found += [f"backbone.layers.{layer}.mixer.{name}" for name in names]
    return found


def add_adapters(student: ZooHybridForCausalLM, stage: StageSpec, layers: Sequence[int], *seed: int) -> None:
    """Put adapters on the mixers of layers, in place; at first they change nothing.

    Args:
        student: the student.
        stage: the stage, with `lora_rank` and `lora_alpha`.
        layers: converted layers.
        *seed: what the first values depend on.
    """
    config = LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets(student, layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(*seed))
        inject_adapter_in_model(config, student)
    if hasattr(student, "peft_config"):
        del student.peft_config
    student.eval()


def load_adapters(student: ZooHybridForCausalLM, weights: Mapping[str, Tensor]) -> None:
    """Give the student's adapters the weights of a checkpoint."""
    for name, parameter in student.named_parameters():
        if PART in name:
            parameter.data.copy_(weights[name])


def remove_adapters(student: ZooHybridForCausalLM, *, merge: bool) -> None:
    """Remove all adapters, in place, after adding what they have learnt to the weights if asked for."""
    for name, module in list(student.named_modules()):
        if isinstance(module, LoraLayer):
            if merge:
                module.merge()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, module.get_base_layer())


@contextmanager
def adapted(student: ZooHybridForCausalLM, stage: StageSpec, layers: Sequence[int]) -> Iterator[None]:
    """Put adapters on the student for a while, if the stage trains them."""
    if stage.train != "lora":
        yield
        return
    add_adapters(student, stage, layers, 0)
    try:
        yield
    finally:
        remove_adapters(student, merge=False)


def plain_name(name: str) -> str:
    """Return the name that a weight has without adapters; an adapter's own name is unchanged."""
    return name.replace(_WRAPPED, "")
