"""Speed of decoding of several models: bytes counted by hand, lengthened caches, and the fields of the rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from scored_models import tiny_llama
from teachers import make_any_teacher
from torch import Tensor
from transformers import DynamicCache

from ssm_zoo.evaluation import decoding
from ssm_zoo.evaluation.decoding import extend_cache, held_bytes, measure_decoding
from ssm_zoo.modeling.cache import CACHE_FIELD

# Mixers of every kind of cache that a student may have, and rows of keys and values that a block holds at most.
STUDENTS = ["full-discrete", "mamba2-full", "bounded-attention", "exact-heads", "all-four", "convolved-attention"]

# Teachers with a window in every block, and in every second one. At 24 it is full only after the cache is lengthened.
WINDOWED = ["mistral", "gemma2"]


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: DynamicCache) -> Any:
    return model(input_ids=ids, use_cache=True, **{CACHE_FIELD: cache})


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]


def test_the_bytes_are_those_of_the_tensors_at_the_context() -> None:
    llama, hybrid = tiny_llama(0), make_model("full-discrete")
    rows = measure_decoding({"llama": llama, "hybrid": hybrid}, [48, 40], prefill_limit=40)
    assert list(rows) == ["llama", "hybrid"]
    for name, found in rows.items():
        assert [(row["context"], row["prefilled"]) for row in found] == [(40, True), (48, False)], name
        assert all(row["decode_seconds"] > 0 and row["decode_cpu_seconds"] > 0 for row in found)
        assert found[0]["prefill_seconds"] > 0 and found[0]["prefill_cpu_seconds"] > 0
        assert found[1]["prefill_seconds"] is found[1]["prefill_cpu_seconds"] is None
    # Two layers, keys and values of 2 heads of 8 channels in four bytes.
    assert [row["cache_bytes"] for row in rows["llama"]] == [2 * 2 * context * 16 * 4 for context in (40, 48)]
    cache = DynamicCache(config=hybrid.config)
    for token in draw_ids(1, 40).split(1, dim=1):
        read(hybrid, token, cache)
    assert rows["hybrid"][0]["cache_bytes"] == sum(each.numel() * each.element_size() for each in tensors_of(cache))


@pytest.mark.parametrize("name", [*STUDENTS, *WINDOWED])
def test_a_lengthened_cache_steps_on_and_holds_what_a_read_one_does(name: str) -> None:
    model = make_any_teacher(name, sliding_window=24) if name in WINDOWED else make_model(name)
    ids = draw_ids(1, 90)
    lengthened, whole = DynamicCache(config=model.config), DynamicCache(config=model.config)
    read(model, ids[:, :20], lengthened)
    extend_cache(lengthened, 60)
    read(model, ids[:, :80], whole)
    for index in range(80, 90):
        assert lengthened.get_seq_length() == whole.get_seq_length() == index
        for cache in (lengthened, whole):
            assert read(model, ids[:, index : index + 1], cache).logits.isfinite().all()
    assert [tuple(each.shape) for each in tensors_of(lengthened)] == [tuple(each.shape) for each in tensors_of(whole)]
    assert held_bytes(lengthened) == held_bytes(whole)


def test_a_full_cache_repeats_what_is_in_it() -> None:
    model = tiny_llama(0)
    cache = DynamicCache(config=model.config)
    read(model, draw_ids(1, 5), cache)
    before = [layer.keys for layer in cache.layers]
    extend_cache(cache, 7)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, torch.cat([keys, keys, keys[:, :, :2]], dim=2))
        assert layer.values.shape == layer.keys.shape


def test_caches_that_cannot_be_lengthened_are_refused() -> None:
    model = make_model("mixer")
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"`cache` must hold keys and values or states in layer 0, got"):
        extend_cache(cache, 3)
    read(model, draw_ids(1, 5), cache)
    with pytest.raises(ValueError, match=r"`cache` must hold keys and values or states in layer 0, got"):
        extend_cache(cache, 3)


class Recorder(torch.nn.Module):
    """Writes its name and the tokens of each call into a list, and keeps nothing."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.config = tiny_llama(0).config
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, **fields: Any) -> Any:
        self.calls.append((self.name, input_ids.shape[1]))
        keys = input_ids[:, None, :, None].float()
        for layer in range(2):
            fields[CACHE_FIELD].update(keys, keys, layer)
        return SimpleNamespace(logits=None)


def test_models_take_turns_and_the_last_steps_end_at_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_CHUNK", 20)
    monkeypatch.setattr(decoding, "_PASSES", 1)
    calls: list[tuple[str, int]] = []
    models: Any = {name: Recorder(name, calls) for name in ("a", "b")}
    rows = measure_decoding(models, [64, 200], prefill_limit=64)
    # 64 - 19 steps = 45 tokens of prompt, in chunks; the order is reversed from one turn to the next.
    assert calls[:6] == [("a", 20), ("b", 20), ("b", 20), ("a", 20), ("a", 5), ("b", 5)]
    steps = calls[6 : 6 + 2 * 19]
    assert steps[:16] == [("a", 1)] * 4 + [("b", 1)] * 8 + [("a", 1)] * 4
    assert len([call for call in steps if call == ("a", 1)]) == 19
    assert len(calls) == 6 + 2 * 2 * 19  # nothing more is read for the longer context
    assert [row["cache_bytes"] for row in rows["a"]] == [2 * 2 * context * 4 for context in (64, 200)]


def test_bad_input_is_refused() -> None:
    models = {"llama": tiny_llama(0)}
    for contexts in ([], [64, 31]):
        with pytest.raises(ValueError, match=r"`contexts` must be numbers of at least 32, got"):
            measure_decoding(models, contexts)
    with pytest.raises(ValueError, match=r"`prefill_limit` must be at least 32, got 5"):
        measure_decoding(models, [64], prefill_limit=5)
