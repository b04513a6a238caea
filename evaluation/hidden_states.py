"""What a model holds between its blocks and before its head, without computing what comes after.

Symbols: B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class _ReachedError(Exception):
    """Leaves a model's forward where its rest is not needed."""


def head_of(model: PreTrainedModel) -> nn.Module:
    """The module that makes logits (..., V) from hidden states (..., D)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no output head; accepted: causal language models")
    return head


def head_input(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the output head reads, (B, L, D): after the final norm, if there is one. No logits are computed.

    Args:
        model: a causal language model.
        **inputs: of its forward.
    """
    states: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])
        raise _ReachedError

    return _run(model, head_of(model).register_forward_pre_hook(hook), states, "its output head", inputs)


def block_output(model: PreTrainedModel, number: int, **inputs: Any) -> Tensor:
    """What a block puts out, (B, L, D); of the last one before the final norm. Nothing after it is computed.

    Args:
        model: a model with a list of blocks as long as its `num_hidden_layers`.
        number: of the block, from 1.
        **inputs: of its forward.
    """
    states: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])
        raise _ReachedError

    block = blocks_of(model)[number - 1]
    return _run(model, block.register_forward_hook(hook), states, f"its block {number}", inputs)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model, in order.

    Raises:
        ValueError: if no list of modules, or more than one, is as long as the configuration says there are blocks.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # A block may hold a list of the same length, of heads say.
        within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not within:
            lists[name] = module
    if len(lists) != 1:
        raise ValueError(
            f"model: {type(model).__name__} has {len(lists)} lists of {count} modules; accepted: one, of its blocks"
        )
    return next(iter(lists.values()))


def _run(model: PreTrainedModel, handle: Any, states: list[Tensor], place: str, inputs: dict[str, Any]) -> Tensor:
    call: Callable[..., Any] = model
    try:
        call(**inputs, use_cache=False)
    except _ReachedError:
        return states[0]
    finally:
        handle.remove()
    raise ValueError(f"model: {type(model).__name__} does not call {place}; accepted: models that do")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
