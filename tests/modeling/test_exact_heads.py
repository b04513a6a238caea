"""Exact heads of a bounded memory: each head attends as a layer of its kind does, and only their cache grows."""

from typing import Any

import pytest
import torch
from families import draw_ids, make_config, make_model
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from ssm_zoo.evaluation.decoding import held_bytes

EXACT = {"window": 5, "sinks": 1, "slots": [[3, 0], [0, 0]], "chunk_size": 3, "exact": [[1], [0, 1]]}


@torch.no_grad()
def test_each_head_attends_as_in_a_layer_of_its_kind() -> None:
    ids = draw_ids(2, 30)
    model = make_model("exact-heads")
    bounded = make_model("exact-heads", bounded_attention={**EXACT, "exact": []})
    full = make_model("exact-heads", mixer_types=["full_attention"] * 2, bounded_attention=None)
    mixed, of_memory, of_all = (each(ids, output_attentions=True).attentions for each in (model, bounded, full))
    torch.testing.assert_close(mixed[0][:, :2], of_memory[0][:, :2])
    torch.testing.assert_close(mixed[0][:, 2:], of_all[0][:, 2:])
    assert not torch.allclose(of_memory[0], of_all[0], atol=1e-3)
    lower = make_model("exact-heads", bounded_attention={**EXACT, "slots": [[0, 3], [0, 0]], "exact": [[0], []]})
    mixed = lower(ids, output_attentions=True).attentions
    torch.testing.assert_close(mixed[0][:, :2], of_all[0][:, :2])
    assert not torch.allclose(mixed[0][:, 2:], of_all[0][:, 2:], atol=1e-3)


@torch.no_grad()
def test_the_cache_grows_by_the_keys_and_values_of_the_exact_heads() -> None:
    model = make_model("exact-heads")
    cache, width = DynamicCache(config=model.config), 6
    memory = (3 + 1 + 5) * ((2 * width + 1) * 4 + 8)  # key, value, score and position, of the head that is not exact
    for start, end in ((0, 20), (20, 21), (21, 50)):
        model(draw_ids(1, end)[:, start:end], cache=cache, use_cache=True)
        assert held_bytes(cache) == memory + 3 * end * 2 * width * 4
        assert cache.get_seq_length() == end
    cache.reset()
    assert held_bytes(cache) == cache.get_seq_length() == 0


def test_no_exact_heads_is_the_same_as_a_list_without_any() -> None:
    ids = draw_ids(1, 20)
    changes = [{"slots": 2, "exact": exact} for exact in ([], [[], []])]
    one, other = (make_model("exact-heads", bounded_attention={**EXACT, **change})(ids).logits for change in changes)
    assert torch.equal(one, other)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"exact": [[1]]}, r"exact must have a list for each of 2 blocks, got 1"),
    ({"exact": [[2], []]}, r"exact\[0\] must be different numbers from 0 to 1, ascending, got \[2\]"),
    ({"exact": [[], [-1]]}, r"exact\[1\] must be different numbers from 0 to 1, ascending, got \[-1\]"),
    ({"exact": [[1, 0], []], "slots": 0}, r"exact\[0\] must be different .*, ascending, got \[1, 0\]"),
    ({"exact": [[1, 1], []]}, r"exact\[0\] must be different numbers .*, got \[1, 1\]"),
    ({"exact": [[0], []]}, r"slots\[0\] must be 0 for the exact heads \[0\], which keep all tokens, got \[3, 0\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_heads_that_cannot_be_exact_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=f"bounded_attention: {message}"):
        make_config("exact-heads", bounded_attention={**EXACT, **change})


def test_a_block_with_another_mixer_has_no_exact_heads() -> None:
    settings = {**EXACT, "slots": 2}
    with pytest.raises(StrictDataclassError, match=r"bounded_attention: exact\[1\] must be empty, got \[0, 1\]"):
        make_config("exact-heads", mixer_types=["bounded_attention", "mamba2"], bounded_attention=settings)


@torch.no_grad()
def test_a_cache_in_half_precision_holds_nothing_else() -> None:
    model = make_model("exact-heads").to(torch.bfloat16)
    cache, width = DynamicCache(config=model.config), 6
    model(draw_ids(1, 20), cache=cache, use_cache=True)
    assert held_bytes(cache) == (3 + 1 + 5) * (2 * width * 2 + 4 + 8) + 3 * 20 * 2 * width * 2


@torch.no_grad()
def test_a_cache_of_8_bits_holds_nothing_else() -> None:
    model = make_model("int8-memory")
    cache, width = DynamicCache(config=model.config), 6
    vector = width + 2  # with its scale
    rows = (5 + 1) * 3 + 3 + 2 + 4  # windows, sinks and slots of the heads that are not exact
    memory = rows * (2 * vector + 4 + 8)  # with scores and positions
    for start, end in ((0, 20), (20, 21), (21, 50)):
        model(draw_ids(1, end)[:, start:end], cache=cache, use_cache=True)
        assert held_bytes(cache) == memory + end * 2 * vector
