"""How much tensor memory a computation holds at its worst moment."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, for as long as they live.

    Attributes:
        peak: most bytes alive at once, those of `held` included.
    """

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._note(held)

    def _note(self, tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(tree_leaves(result))
        return result


class IdleKernel:
    """Stands for a Triton kernel where sizes matter and values do not: on tensors without storage."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def peak_of_gradients(op: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> tuple[int, int]:
    """Bytes at the worst moment of a forward and its backward, and those of inputs, outputs and all their gradients.

    Args:
        op: takes the inputs, returns the outputs.
        inputs: leaves that require gradients.
    """
    with PeakMemory(*inputs) as memory:
        outputs = op(*inputs)
        cotangents = [torch.ones_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, inputs, cotangents)
    return memory.peak, nbytes(*inputs, *outputs, *cotangents, *gradients)
