"""Losses of one layer at a time, and losses whose gradients are computed together with their values.

Targets are streamed: during one forward pass of the teacher, the student's layer runs forward and backward on each
layer's activations as soon as they are computed. The activations of one layer are in memory at a time, and none are
stored (the hidden states of an epoch would be terabytes; arXiv 2408.10189 does not store them either).

The gradients are therefore computed together with the loss. The loss returns them in its backward pass (`_Computed`),
where wrappers that average or shard gradients over processes expect them. For the same reason the student's weights are
only used by calling a block, or the wrapped module that contains the whole student.

Symbols: B batch, L length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import ZooHybridForCausalLM
from .teacher import Teacher


def mean_over_layers(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    ids: Tensor,
    what: Sequence[str],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Return the mean of the layers' losses on activations captured in one forward pass of the teacher."""
    losses: list[Tensor] = []

    def on_layer(layer: int, **captured: Tensor) -> None:
        block = student.backbone.layers[layer]

        def computed(*tensors: Tensor) -> Tensor:
            value = loss(layer, *tensors)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            return attach_gradients(value, trained, torch.autograd.grad(value, trained, allow_unused=True))

        with _called_instead(block, computed):
            losses.append(block(*(captured[name] for name in what)))

    teacher.capture(ids, layers, what, on_layer=on_layer)
    return torch.stack(losses).mean()


def mean_over_own_stream(
    student: ZooHybridForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    ids: Tensor,
    what: Sequence[str],
    loss: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the mean of the layers' losses on the student's own hidden states, side by side with the teacher's.

    The student's blocks run between those of the teacher's forward pass. The gradient of a layer's loss ends at the
    layer's input, so that the activations of one layer are in memory at a time here, too.

    Args:
        student: the student.
        teacher: the teacher.
        layers: converted layers.
        ids: (B, L) token ids.
        what: what is captured of the teacher.
        loss: called as `loss(layer, hidden, *captured)` with the student's (B, L, D) residual stream; returns the
            loss and the stream after the block.
    """
    losses: list[Tensor] = []
    blocks = student.backbone.layers
    with torch.no_grad():
        embeddings: Tensor = student.backbone.embeddings(ids)
        sequence = student.backbone.sequence_of(embeddings)
        hidden = student.backbone.add_positions(embeddings, sequence)
    reached = 0

    def on_layer(layer: int, **captured: Tensor) -> None:
        nonlocal hidden, reached
        with torch.no_grad():
            for block in blocks[reached:layer]:
                hidden = block(hidden, sequence)[0]
        block = blocks[layer]

        def computed(stream: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            value, after = loss(layer, stream, *tensors)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            return attach_gradients(value, trained, gradients), after.detach()

        with _called_instead(block, computed):
            value, hidden = block(hidden, *(captured[name] for name in what))
        losses.append(value)
        reached = layer + 1

    teacher.capture(ids, layers, what, on_layer=on_layer)
    return torch.stack(losses).mean()


@contextmanager
def _called_instead(block: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a block's forward by a function; sharded weights are gathered when the block is called."""
    before = block.__dict__.get("forward")
    block.forward = function
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


class _Computed(torch.autograd.Function):
    """A loss with precomputed gradients, which its backward pass returns once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *_tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(gradient * outer[0].to(gradient.dtype) for gradient in gradients)


def attach_gradients(loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Attach gradients with respect to some tensors to a loss; None means that it does not depend on a tensor."""
    known = [(tensor, part) for tensor, part in zip(tensors, gradients, strict=True) if part is not None]
    return _Computed.apply(  # pyright: ignore[reportReturnType]
        loss.detach(), [part for _, part in known], *(tensor for tensor, _ in known)
    )
