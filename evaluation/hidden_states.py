"""Hidden states of a model, after a block or before its head, without computing what comes after.

Symbols: B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..modeling.cache import CACHE_FIELD
from ..modeling.layers import soft_capped


class _ReachedError(Exception):
    """Raised inside a model's forward to leave it early."""


class _CappedHead(nn.Module):
    """An output head with the soft cap that the model's forward applies to its logits."""

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden_states: Tensor) -> Tensor:
        return soft_capped(self.head(hidden_states), self.cap)


def head_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that maps hidden states (..., D) to logits (..., V), with their soft cap if they have one."""
    head, cap = _layer_of(model), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head if cap is None else _CappedHead(head, cap)


def _layer_of(model: PreTrainedModel) -> nn.Module:
    """Return the output layer that a model's forward calls."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head. Give a causal language model.")
    return head


def head_input(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Compute the (B, L, D) input of the output head, after the final norm if there is one. Logits are not computed.

    Args:
        model: a causal language model.
        **inputs: arguments of its forward.
    """
    states: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])
        raise _ReachedError

    return _run(model, _layer_of(model).register_forward_pre_hook(hook), states, "its output head", inputs)


class KeptStates:
    """Inputs of output heads, kept for measurements that read the same windows again.

    Those of named models are kept, as long as all together take at most `limit` bytes; of other models they are
    computed each time. A name stands for one set of weights and one dtype of computation: `forget` it when they change.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self.limit = limit
        self._names: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
        self._states: dict[tuple[str, torch.Size, bytes], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Size of all states."""
        return sum(states.nbytes for states in self._states.values())

    def name(self, model: PreTrainedModel, name: str) -> None:
        """Keep the states of a model under a name; another object with the same weights may share it."""
        self._names[model] = name

    def forget(self, name: str) -> None:
        """Drop the states of a name; its models have none from then on."""
        for model in [model for model, held in self._names.items() if held == name]:
            del self._names[model]
        self._states = {key: states for key, states in self._states.items() if key[0] != name}

    def head_input(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return :func:`head_input` of (B, L) token ids."""
        name = self._names.get(model)
        if name is None:
            return head_input(model, input_ids=ids)
        key = name, ids.shape, ids.cpu().numpy().tobytes()
        found = self._states.get(key)
        if found is None:
            found = head_input(model, input_ids=ids)
            if self.nbytes + found.nbytes <= self.limit:
                self._states[key] = found
        return found


def last_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Return the (B, V) logits in float32 after (B, L) tokens, which are added to the cache."""
    fields: dict[str, Any] = {CACHE_FIELD: cache}
    return model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1, **fields).logits[:, -1].float()


def block_output(model: PreTrainedModel, number: int, **inputs: Any) -> Tensor:
    """Compute the (B, L, D) output of a block, before the final norm. Nothing after it is computed.

    Args:
        model: a model with a list of blocks as long as its `num_hidden_layers`.
        number: number of the block, from 1.
        **inputs: arguments of its forward.
    """
    states: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])
        raise _ReachedError

    block = blocks_of(model)[number - 1]
    return _run(model, block.register_forward_hook(hook), states, f"its block {number}", inputs)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a model, in order.

    Raises:
        ValueError: if there is not exactly one list of modules with `num_hidden_layers` entries.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # A block may itself have a list of the same length, e.g. of heads.
        within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not within:
            lists[name] = module
    if len(lists) != 1:
        raise ValueError(
            f"`model` must have one list of {count} modules, its blocks, but {type(model).__name__} has {len(lists)}"
        )
    return next(iter(lists.values()))


def _run(model: PreTrainedModel, handle: Any, states: list[Tensor], place: str, inputs: dict[str, Any]) -> Tensor:
    """Run a model until its hook has added to `states`, and remove the hook."""
    call: Callable[..., Any] = model
    try:
        call(**{"use_cache": False, **inputs})
    except _ReachedError:
        return states[0]
    finally:
        handle.remove()
    raise ValueError(f"`model` must call {place} as a module, which {type(model).__name__} does not")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode; afterwards every module is in its previous mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
