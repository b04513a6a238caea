"""Predict the seconds of the fits in closed form: the division of slots, the calibration and the refits.

The first converted layer is fitted, and its time multiplied by the number of layers. Where the time grows with the
number of windows, few are used. The student's weights are restored afterwards.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from ..modeling import ZooHybridForCausalLM
from ..modeling.bounded_memory import BoundedAttentionSettings
from .calibrate import HALF_LIFE_WINDOWS, average_attention, calibrate_half_lives, fit_output_projections, with_ability
from .healing import heal_steps
from .measuring import seconds_of, synchronize
from .recipe import Recipe
from .slots import divide_slots
from .teacher import Teacher

_BATCH = 4  # windows in one forward pass of a calibration
_HEALED = _BATCH + 1  # a batch that is fitted, and a window that is held out


def slots_seconds(
    teacher: Teacher, layers: Sequence[int], settings: BoundedAttentionSettings, rows: int, windows: Tensor
) -> float:
    """Return the seconds of :func:`~ssm_zoo.distill.slots.divide_slots` with the same arguments."""
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    measured = [layer for layer in sorted(layers) if len(settings.exact_of(layer)) < heads]
    if not measured:
        return 0.0

    def divide() -> None:
        divide_slots(teacher, measured[:1], settings, rows, windows, progress=False)

    one = seconds_of(divide, teacher.model.device)
    # Ordinary text and as many windows with repeated passages.
    return _in_all_layers(one, 2 * _forward_seconds(teacher, measured[-1], windows), measured)


def calibration_seconds(
    student: ZooHybridForCausalLM, teacher: Teacher, recipe: Recipe, layers: Sequence[int], windows: Tensor
) -> float:
    """Return the seconds of :func:`~ssm_zoo.distill.calibrate.calibrate` with a recipe's student."""
    spec, device, seconds = recipe.student, teacher.model.device, 0.0
    masked = with_ability(student, layers, "set_average_attention")
    if masked:
        documents, positions = list(windows[:_BATCH]), student.config.max_position_embeddings

        def average() -> None:
            average_attention(teacher, masked, documents, positions, batch_size=_BATCH, progress=False)

        seconds += seconds_of(average, device) * len(windows) / len(documents)
    state_space = with_ability(student, layers, "set_half_lives")
    if state_space and spec.half_life == "calibrated":
        few = windows[:HALF_LIFE_WINDOWS]
        with _unchanged(student, state_space[:1]):
            one = seconds_of(lambda: calibrate_half_lives(student, teacher, state_space[:1], few), device)
        seconds += _in_all_layers(one, _forward_seconds(teacher, state_space[-1], few), state_space)
    return seconds + fit_seconds(student, teacher, layers, windows, spec.calibration, gates=True)


def fit_seconds(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    windows: Tensor,
    method: str,
    *,
    gates: bool = False,
) -> float:
    """Return the seconds of :func:`~ssm_zoo.distill.calibrate.fit_output_projections`; 0 for the method "none"."""
    if method == "none":
        return 0.0
    if method == "sequential":
        return _heal_seconds(student, teacher, layers, windows, gates)
    chosen = sorted(layers)

    def fit(count: int) -> tuple[float]:
        with _unchanged(student, chosen[:1]):
            part = (student, teacher, chosen[:1], windows[:count], method)
            return (seconds_of(lambda: fit_output_projections(*part, progress=False), teacher.model.device),)

    (one,) = _at_all_windows(fit, _BATCH, len(windows))
    few = windows[:_BATCH]
    forward = _forward_seconds(teacher, chosen[-1], few) * len(windows) / len(few)
    return _in_all_layers(one, forward, chosen)


def _heal_seconds(
    student: ZooHybridForCausalLM, teacher: Teacher, layers: Sequence[int], windows: Tensor, gates: bool
) -> float:
    """Return the seconds of a sequential fit, from those of its start, a converted block and one that is not."""
    chosen, blocks = sorted(layers), max(layers) + 1
    first = chosen[0]
    # Blocks up to the first converted one and the first other one, if there is any.
    needed = max([first, *[layer for layer in range(blocks) if layer not in chosen][:1]]) + 1

    def heal(count: int) -> tuple[float, float, float]:
        found: list[tuple[float, float, float]] = []
        while len(found) < 3 and sum(map(sum, found)) < 1:
            with _unchanged(student, [layer for layer in chosen if layer < needed]):
                steps = heal_steps(student, teacher, layers, windows[:count], gates=gates, batch_size=_BATCH)
                start, *each = (_seconds_of_next(steps, teacher.model.device) for _ in range(needed + 1))
                steps.close()
            others = [seconds for layer, seconds in enumerate(each) if layer not in chosen]
            found.append((start, each[first], median(others) if others else 0.0))
        start, converted, other = map(median, zip(*found, strict=True))
        return start, converted, other

    start, converted, other = _at_all_windows(heal, _HEALED, len(windows))
    return start + len(chosen) * converted + (blocks - len(chosen)) * other


def _seconds_of_next(steps: Iterator[None], device: torch.device) -> float:
    started = time.monotonic()
    next(steps)
    synchronize(device)
    return time.monotonic() - started


def _at_all_windows(measure: Callable[[int], tuple[float, ...]], few: int, windows: int) -> tuple[float, ...]:
    """Return the seconds for all windows: measured, or extrapolated linearly from `few` and twice as many."""
    if windows <= 2 * few:
        return measure(windows)
    small, large = measure(few), measure(2 * few)
    steps = (windows - 2 * few) / few
    return tuple(b + max(b - a, 0.0) * steps for a, b in zip(small, large, strict=True))


def _in_all_layers(one: float, forward: float, layers: Sequence[int]) -> float:
    """Return the seconds of something that is done in each of some layers while the teacher reads a text.

    Args:
        one: seconds if it is done in the first of the layers only, after which the teacher stops.
        forward: seconds in which the teacher alone reads as far as the last of the layers.
        layers: the layers, in ascending order.
    """
    before = forward * layers[0] / max(layers[-1], 1)
    return len(layers) * max(one - before, 0.0) + forward


def _forward_seconds(teacher: Teacher, last: int, windows: Tensor) -> float:
    """Return the seconds in which the teacher reads (N, L) windows as far as the input of a layer."""
    device = teacher.model.device
    ids = windows.to(device)

    def read() -> None:
        teacher.capture(ids, [last], ("block_input",), on_layer=lambda *_, **__: None)

    return seconds_of(read, device)


@contextmanager
def _unchanged(student: ZooHybridForCausalLM, layers: Sequence[int]) -> Iterator[None]:
    """Restore the weights of some blocks afterwards."""
    tensors = [tensor for layer in layers for tensor in student.backbone.layers[layer].parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
