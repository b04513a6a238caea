"""What a stage trains, and how fast: parameter groups, learning-rate schedules, gradients over processes."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ..modeling import ZooHybridForCausalLM
from .recipe import StageSpec


def trained_parameters(
    student: ZooHybridForCausalLM, train: str, layers: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that a stage trains, by name: those of the new mixers, and the others.

    Args:
        student: the student.
        train: "mixers", "mixers+norms" or "all".
        layers: converted layers.
    """
    prefixes = tuple(f"backbone.layers.{layer}.mixer." for layer in layers)
    mixers: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if name.startswith(prefixes):
            mixers[name] = parameter
        elif train == "all" or (train == "mixers+norms" and ("norm" in name.rsplit(".", 2)[-2])):
            others[name] = parameter
    return mixers, others


def make_optimizer(
    stage: StageSpec, mixers: dict[str, Tensor], others: dict[str, Tensor]
) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW over a stage's parameters: decays, biases, norms and skips without weight decay.

    Returns:
        The optimiser, each of whose groups holds its peak learning rate under "peak", and the parameters' names in
        the optimiser's order.
    """
    groups, names = [], []
    for parameters, rate in ((mixers, stage.learning_rate), (others, stage.other_learning_rate or stage.learning_rate)):
        for decayed in (True, False):
            chosen = [name for name, tensor in parameters.items() if (tensor.dim() > 1) == decayed]
            if chosen:
                groups.append(
                    {
                        "params": [parameters[name] for name in chosen],
                        "lr": rate,
                        "peak": rate,
                        "weight_decay": stage.weight_decay if decayed else 0.0,
                    }
                )
                names += chosen
    return torch.optim.AdamW(groups, betas=stage.betas), names


def schedule_factor(stage: StageSpec, step: int) -> float:
    """Learning rate of a step (from 0) over its peak: linear warm-up, then constant, cosine or WSD."""
    steps, warm = stage.steps, _whole_steps(stage.warmup, stage.steps)
    if step < warm:
        return (step + 1) / warm
    last = stage.final_learning_rate_ratio
    if stage.schedule == "cosine":
        progress = (step - warm) / max(steps - warm - 1, 1)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))
    if stage.schedule == "wsd":
        falling = _whole_steps(stage.decay, steps)
        progress = (step + 1 - (steps - falling)) / max(falling, 1)
        return 1.0 if progress <= 0 else last + (1 - last) * (1 - progress)
    return 1.0


def _whole_steps(share: float, steps: int) -> int:
    """A share of the steps, rounded up; 0.07 of 100 steps is 7, although the product is 7.000000000000001."""
    return math.ceil(share * steps - 1e-6)


def average_gradients(accelerator: Accelerator, parameters: Sequence[Tensor], loss: float) -> float:
    """Average the gradients over the processes, in place; every process has as many sequences as the others.

    Layer-wise objectives run one backward per layer outside any wrapper's forward, so that the gradients are averaged
    here, once a step, by accelerate's own collective.

    Returns:
        The loss, averaged too.
    """
    if accelerator.num_processes == 1:
        return loss
    present = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad.flatten().float() for parameter in present if parameter.grad is not None]
    flat = torch.cat([*gradients, torch.tensor([loss], device=accelerator.device)])
    reduced = accelerator.reduce(flat, reduction="mean")
    assert isinstance(reduced, Tensor)
    start = 0
    for parameter in present:
        assert parameter.grad is not None
        parameter.grad.copy_(reduced[start : start + parameter.numel()].view_as(parameter.grad))
        start += parameter.numel()
    return float(reduced[-1])


def clip_gradients(
    student: ZooHybridForCausalLM, stage: StageSpec, layers: Sequence[int], parameters: Sequence[Tensor]
) -> float:
    """Scale the gradients down to the stage's `max_grad_norm`, in place.

    The layers of a layer-wise objective are problems of their own: each one's gradient is clipped by itself, so that an
    outlier in one does not take the step from the others.

    Returns:
        The norm of all gradients before.
    """
    if stage.objective == "logit_distillation":
        return float(torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm))
    norms = []
    for layer in layers:
        block = student.backbone.layers[layer]
        trained = [parameter for parameter in block.parameters() if parameter.grad is not None]
        norms.append(torch.nn.utils.clip_grad_norm_(trained, stage.max_grad_norm))
    return float(torch.stack(norms).square().sum().sqrt())
