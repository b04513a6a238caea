"""Speed of reading and of decoding, and bytes of the cache, of models side by side.

All models take turns in one process, so that what slows the machine down for a while slows all of them: their ratio is
reliable where a single time is not. CPU time stands beside wall time, since other programs hardly lengthen it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..modeling.cache import CACHE_FIELD
from .hidden_states import evaluating

__all__ = ["LEAST_CONTEXT", "extend_cache", "held_bytes", "measure_decoding"]

# Steps of each model before those that are timed, timed steps, and steps of a turn.
_WARM_UP, _STEPS, _TURN = 3, 16, 4
LEAST_CONTEXT = 32
"""Smallest context that can be measured: its last tokens are the steps."""
# Contexts are read again, until so many times or for so many seconds, whatever comes first.
_PASSES, _PASS_SECONDS = 3, 10.0
_CHUNK = 512


def held_bytes(cache: Cache) -> int:
    """Return the bytes of the storages behind every tensor of every layer of a cache, each storage once.

    A small view of a large tensor counts as the large one, which it keeps in memory.
    """
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@torch.no_grad()
def extend_cache(cache: Cache, tokens: int) -> None:
    """Lengthen the context of a dynamic cache without reading it, to time the steps of a long context.

    Layers with keys and values of single tokens get repetitions of those they hold, of which a window keeps the last.
    The states of other layers remain as they are. Time and memory of a step depend on neither.

    Args:
        cache: a cache that holds some tokens.
        tokens: number of tokens by which it is lengthened.

    Raises:
        ValueError: if a layer is empty, or keeps the inputs of a mixer (masked mixing).
    """
    for index, layer in enumerate(cache.layers):
        state = vars(layer)
        if state.get("history") is not None or not state["is_initialized"]:
            raise ValueError(f"`cache` must hold keys and values or states in layer {index}, got {layer}")
        for kind in ("", "exact_"):
            keys = state.get(f"{kind}keys")
            # Those of single tokens are (B, H, tokens, P); a bounded memory has (B, N, P).
            if keys is None or keys.ndim != 4 or not keys.shape[2]:
                continue
            every = torch.arange(keys.shape[2] + tokens, device=keys.device) % keys.shape[2]
            if "sliding_window" in state:  # of transformers, whose mask counts what such a layer holds after a step
                every = every[-(state["sliding_window"] - 1) :]
                state["keys"], state["values"] = keys[:, :, every], state["values"][:, :, every]
                continue
            for name in (f"{kind}keys", f"{kind}values", f"{kind}keys_scales", f"{kind}values_scales"):
                if state.get(name) is not None:
                    state[name] = state[name][:, :, every]
            if not kind and state.get("positions") is not None:  # of a window
                new = state["counts"][:, None] + torch.arange(tokens, device=keys.device)
                state["positions"] = torch.cat([state["positions"], new], dim=1)
        if state.get("counts") is not None:
            state["counts"] = state["counts"] + tokens
        for name in ("columns", "cumulative_length"):
            if name in state:
                state[name] += tokens


def measure_decoding(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    prefill_limit: int = 2048,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Time single-token steps and the reading of a prompt, and count the bytes of the cache, at several contexts.

    A prompt of random tokens is read in chunks of 512, and the last steps up to the context are timed. Contexts beyond
    the limit are not read: the caches of the longest context that was are lengthened by `extend_cache`. Models compute
    in the dtype of their weights with transformers' `DynamicCache`, one text at a time; a step is the whole model with
    its head and its Python.

    Args:
        models: causal language models on one device, by name.
        contexts: tokens that the cache holds at the end of the steps, each at least `LEAST_CONTEXT`.
        prefill_limit: largest context whose prompt is read.
        seed: seed of the tokens.

    Returns:
        For every model, by name, a dictionary for each context in ascending order: "context"; "prefilled" (whether its
        prompt was read); "decode_seconds" and "decode_cpu_seconds", medians over the steps; "prefill_seconds" and
        "prefill_cpu_seconds", per token of the prompt, medians over up to three readings, None if it was not read; and
        "cache_bytes", what the cache holds at the end (:func:`held_bytes`).

    Raises:
        ValueError: if an argument is not as described.
    """
    short = [context for context in contexts if context < LEAST_CONTEXT]
    if short or not contexts:
        raise ValueError(f"`contexts` must be numbers of at least {LEAST_CONTEXT}, got {list(contexts)}")
    if prefill_limit < LEAST_CONTEXT:
        raise ValueError(f"`prefill_limit` must be at least {LEAST_CONTEXT}, got {prefill_limit}")
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    longest = max(contexts)
    ids = torch.randint(vocabulary, (1, longest), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(next(iter(models.values())).device)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    caches: dict[str, Cache] = {}
    held = 0
    with evaluating(*models.values()), torch.no_grad():
        for context in sorted(set(contexts)):
            start, prefilled = context - _WARM_UP - _STEPS, context <= prefill_limit
            reading: dict[str, dict[str, Any]] = {}
            if prefilled:
                reading, caches = _read_repeatedly(models, ids[:, :start])
            else:
                if not 0 < held <= start:
                    held = min(start, prefill_limit)
                    caches = _read(models, ids[:, :held])[1]
                for cache in caches.values():
                    extend_cache(cache, start - held)
            steps = _steps(models, caches, ids[:, start:context])
            held = context
            for name in models:
                read = reading.get(name, {"prefill_seconds": None, "prefill_cpu_seconds": None})
                row = {"context": context, "prefilled": prefilled, **steps[name], **read}
                rows[name].append({**row, "cache_bytes": held_bytes(caches[name])})
    return rows


def _read_repeatedly(
    models: Mapping[str, PreTrainedModel], ids: Tensor
) -> tuple[dict[str, dict[str, Any]], dict[str, Cache]]:
    """Read a (1, T) prompt several times; return the medians of seconds per token, and the caches of the last time."""
    times: list[dict[str, tuple[float, float]]] = []
    caches: dict[str, Cache] = {}
    began = time.perf_counter()
    while not times or (len(times) < _PASSES and time.perf_counter() - began < _PASS_SECONDS):
        caches.clear()
        found, caches = _read(models, ids)
        times.append(found)
    tokens = ids.shape[1]
    medians = {
        name: {
            "prefill_seconds": median(found[name][0] for found in times) / tokens,
            "prefill_cpu_seconds": median(found[name][1] for found in times) / tokens,
        }
        for name in models
    }
    return medians, caches


def _read(
    models: Mapping[str, PreTrainedModel], ids: Tensor
) -> tuple[dict[str, tuple[float, float]], dict[str, Cache]]:
    """Read a (1, T) prompt into new caches, chunk by chunk in turn; return wall and CPU seconds, and the caches."""
    caches: dict[str, Cache] = {name: DynamicCache(config=model.config) for name, model in models.items()}
    seconds = dict.fromkeys(models, (0.0, 0.0))
    for number, chunk in enumerate(ids.split(_CHUNK, dim=1)):
        for name in _in_turn(models, number):
            wall, cpu = _timed(lambda name=name, chunk=chunk: _forward(models[name], chunk, caches[name]), ids.device)
            seconds[name] = (seconds[name][0] + wall, seconds[name][1] + cpu)
    return seconds, caches


def _steps(
    models: Mapping[str, PreTrainedModel], caches: Mapping[str, Cache], ids: Tensor
) -> dict[str, dict[str, float]]:
    """Take single steps, some of each model in turn; return the medians of their seconds after the first ones."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number, turn in enumerate(ids.split(_TURN, dim=1)):
        for name in _in_turn(models, number):
            for token in turn.split(1, dim=1):
                step = _timed(lambda name=name, token=token: _forward(models[name], token, caches[name]), ids.device)
                times[name].append(step)
    timed = {name: found[_WARM_UP:] for name, found in times.items()}
    return {
        name: {
            "decode_seconds": median(wall for wall, _ in found),
            "decode_cpu_seconds": median(cpu for _, cpu in found),
        }
        for name, found in timed.items()
    }


def _in_turn(models: Mapping[str, PreTrainedModel], number: int) -> list[str]:
    """Return the names in the order of a turn: every other one begins with the last."""
    return list(models) if number % 2 == 0 else list(models)[::-1]


def _forward(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    """Read (1, L) tokens into a cache, with logits for the last one."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_FIELD: cache})


def _timed(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the wall and CPU seconds of a call, with the work that it leaves to an accelerator."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu
