"""Memory and time of a function: the largest sum of its tensors, and the seconds that it takes."""

import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Sum of the bytes of all storages that were made in the mode and are alive, and its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in known and id(storage) not in self._alive:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._alive[key] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Return the largest sum of the tensors that a function has in memory at one time, in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        run()
    return storages.peak


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a function: the median of three calls, or of fewer that take a second."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 1:
        started = time.monotonic()
        run()
        synchronize(device)
        found.append(time.monotonic() - started)
    return median(found)


def synchronize(device: torch.device) -> None:
    """Wait until the work that was queued on a GPU is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
