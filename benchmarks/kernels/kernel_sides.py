"""Peers of the benchmark: found when it runs, with inputs and results in their own layout."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from kernel_cases import Results, Run, Setup, runner
from torch import Tensor


class NotMeasuredError(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class Side:
    """A peer of one case, ready to be timed.

    Attributes:
        run: what is timed.
        ours: brings its results to our layout and names. Results that we do not have, and ours that it does not have,
            are not compared; without any it computes another function.
    """

    run: Run
    ours: Callable[[Results], Results] = dict


Builder = Callable[[Setup], Side]

CUDA_SCAN = "selective_scan_cuda"


def forget_tuning() -> None:
    """Clear what Triton's autotuners have chosen so far.

    The keys of mamba_ssm's and fla's kernels hold neither length nor batch: the tiles that are best for the small case
    that is checked would be used for the large one that is timed.
    """
    if find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner

    for tuner in [thing for thing in gc.get_objects() if issubclass(type(thing), Autotuner)]:
        tuner.cache.clear()


def require(name: str, attribute: str) -> Any:
    """Return an attribute of a module that may not be installed.

    Raises:
        NotMeasuredError: if it is not there.
    """
    top = name.partition(".")[0]
    if find_spec(top) is None:
        raise NotMeasuredError(f"{top} is not installed")
    # mamba_ssm 2.3.2 imports this extension first of all, also where nothing but its Triton parts was installed.
    without = top == "mamba_ssm" and CUDA_SCAN not in sys.modules and find_spec(CUDA_SCAN) is None
    if without:
        sys.modules[CUDA_SCAN] = ModuleType(CUDA_SCAN)
    try:
        return getattr(import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise NotMeasuredError(f"{name}.{attribute} cannot be imported: {error}") from error
    finally:
        if without:
            del sys.modules[CUDA_SCAN]


def torch_body(name: str, function: str) -> Any:
    """Return transformers' torch code of a function, even if it would call a faster package."""
    return inspect.unwrap(require(f"transformers.models.{name}", function))


def at_most(tokens: int, why: str) -> Callable[[Builder], Builder]:
    """Leave out larger cases, for which a peer would take minutes or too much memory."""

    def decorate(build: Builder) -> Builder:
        def limited(setup: Setup) -> Side:
            if setup.case.tokens > tokens:
                raise NotMeasuredError(f"{why}; measured up to {tokens} tokens")
            return build(setup)

        return limited

    return decorate


def same(function: Callable[..., Any]) -> Builder:
    """Return a peer with our argument names and layout."""
    return lambda setup: Side(runner(function, setup.own_inputs(), setup.cotangents))


def transposed(function: Callable[..., Any], names: tuple[str, ...], dense: bool = True) -> Builder:
    """Return a peer that has the arguments `names`, and its result, channel first: (B, D, L).

    Args:
        function: takes our argument names.
        names: what to transpose.
        dense: copy them to be contiguous that way; otherwise they are views, channel last in memory.
    """

    def turn(tensor: Tensor) -> Tensor:
        tensor = tensor.transpose(1, -1)
        return tensor.contiguous() if dense else tensor

    def build(setup: Setup) -> Side:
        inputs = {name: turn(t) if name in names else t for name, t in setup.own_inputs().items()}
        run = runner(function, inputs, tuple(turn(c) for c in setup.cotangents))
        turned = {"y", *(f"d{name}" for name in names)}
        return Side(run, lambda results: {n: t.transpose(1, -1) if n in turned else t for n, t in results.items()})

    return build
