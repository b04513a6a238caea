"""`generate` with every kind of cache against a loop without one, and the errors of a forward."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from accelerate.utils import send_to_device
from families import FAMILIES, draw_ids, make_model
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ssm_zoo.modeling.token_layout import make_sequence

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
NEW = 9  # tokens to generate: beyond the window
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def greedy(model: Any, ids: Tensor, new: int = NEW) -> Tensor:
    """(B, L + new) the definition: the most likely token of a whole forward, again and again."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.cat([torch.full((1, length - row.shape[1]), 7), row], dim=1) for row in rows])
    mask = torch.tensor([[0] * (length - row.shape[1]) + [1] * row.shape[1] for row in rows])
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"prefill_chunk_size": 4}, id="prefill-in-chunks"),
        pytest.param({"use_cache": False}, id="no-cache"),
    ],
)
@pytest.mark.parametrize("lengths", [(11, 11), (11, 3, 1)], ids=["unpadded", "left-padded"])
def test_greedy_is_the_loop_without_a_cache(model: Any, options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    rows = [draw_ids(1, length, seed=i) for i, length in enumerate(lengths)]
    ids, mask = left_padded(rows)
    reports = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=mask, **GREEDY, **options, **reports)
    for i, row in enumerate(rows):
        expected = greedy(model, row)
        assert torch.equal(found.sequences[i, ids.shape[1] - row.shape[1] :], expected[0])
        with torch.no_grad():
            logits = model(expected[:, :-1], use_cache=False).logits[0, -NEW:]
        torch.testing.assert_close(torch.stack([step[i] for step in found.logits]), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_generate_goes_on_from_a_cache(model: Any, kind: type) -> None:
    """A prompt read beforehand, and then a second turn on what the first one left."""
    first, second = draw_ids(2, 8, seed=1), draw_ids(2, 3, seed=2)
    size = {"max_cache_len": 40} if kind is StaticCache else {}
    cache = kind(config=model.config, **size)
    with torch.no_grad():
        model(first[:, :5], past_key_values=cache, use_cache=True)
    answered = model.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(answered, greedy(model, first))
    again = torch.cat([answered, second], dim=1)
    assert torch.equal(model.generate(again, past_key_values=cache, **GREEDY), greedy(model, again))


def test_generate_from_embeddings(model: Any) -> None:
    ids = draw_ids(2, 6)
    embeddings = model.get_input_embeddings()(ids).detach()
    generated = model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(generated, greedy(model, ids)[:, 6:])


def test_sampled_continuations_do_not_share_their_states(model: Any) -> None:
    """Several samples from one prompt: each token is likely after the tokens of its own row."""
    ids = draw_ids(2, 6)
    torch.manual_seed(0)
    found = model.generate(
        ids,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert len(found.sequences.unique(dim=0)) == 6
    with torch.no_grad():
        expected = model(found.sequences[:, :-1], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, rtol=0, atol=1e-5)


def test_rows_do_not_see_each_other(model: Any) -> None:
    ids, mask = left_padded([draw_ids(1, length, seed=length) for length in (9, 4, 7, 1)])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        shuffled = model(ids[order], attention_mask=mask[order]).logits
    torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=1e-6)


# Devices


class OffloadedCache(DynamicCache):
    """transformers' offloaded cache without CUDA: keys and values are out of reach until their layer is fetched.

    It never fetches a layer by itself. transformers' fetches the layer after the one in use, whatever its kind.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.offloading, self.away = True, {}
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.prefetch = partial(self.fetch, layer)

    def fetch(self, layer: Any) -> None:
        if layer in self.away:
            layer.keys, layer.values = self.away.pop(layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        self.away[layer] = layer.update(key_states, value_states)
        layer.keys = layer.values = torch.empty(*layer.keys.shape, device="meta")
        return self.away[layer]


def test_offloaded_cache(model: Any) -> None:
    ids = draw_ids(2, 11)
    cache = OffloadedCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), greedy(model, ids))
    assert len(cache.away) == model.config.layer_types.count("full_attention")


def test_weights_offloaded_to_the_disk(model: Any, tmp_path: Any, request: pytest.FixtureRequest) -> None:
    """accelerate loads weights when their module is called: no weight may be used behind its module's back."""
    ids = draw_ids(2, 6)
    expected = greedy(model, ids, 3)
    offloaded = make_model(request.node.callspec.params["model"])
    disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert torch.equal(offloaded.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0), expected)


def test_a_sequence_moves_to_another_device_whole() -> None:
    """accelerate moves what it hands to a block of a model that is spread over several devices."""
    mask = torch.tensor([[0, 1, 1, 1]])
    sequence = make_sequence(1, 4, torch.device("cpu"), attention_mask=mask)
    sequence.rotary = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    assert sequence.full_mask(4) is not None
    assert send_to_device(sequence, "cpu") is sequence
    moved = send_to_device(sequence, "meta")
    assert moved is sequence.to("meta", non_blocking=True)  # the masks are made once a device
    assert (moved.past, moved.packed) == (sequence.past, sequence.packed)
    tensors = [moved.position_ids, moved.seq_idx, moved.attention_mask, *moved.rotary, moved.real]
    assert all(tensor.is_meta for tensor in [*tensors, moved.full_mask(4), moved.window_mask(2, None, None)])


# Bad input

IDS = draw_ids(2, 6)
ERRORS = [
    pytest.param({"input_ids": None}, "exactly one of input_ids and inputs_embeds", id="no-input"),
    pytest.param({"inputs_embeds": torch.zeros(2, 6, 16)}, "exactly one of input_ids and", id="two-inputs"),
    pytest.param({"attention_mask": torch.ones(2, 5)}, "0 cached and the 6 new tokens, got length 5", id="mask-short"),
    pytest.param({"attention_mask": torch.ones(1, 6)}, r"= \(2, 6\), got \(1, 6\)", id="mask-rows"),
    pytest.param({"attention_mask": torch.ones(2, 1, 6, 6)}, r"got \(2, 1, 6, 6\)", id="mask-4d"),
    pytest.param({"position_ids": torch.zeros(2, 5).long()}, r"position_ids must be .*got \(2, 5\)", id="positions"),
    pytest.param({"seq_idx": torch.zeros(1, 6).long()}, r"seq_idx must be .*got \(1, 6\)", id="seq_idx-shape"),
    pytest.param({"seq_idx": torch.zeros(2, 6)}, "seq_idx must have an integer dtype", id="seq_idx-float"),
    pytest.param(
        {"seq_idx": torch.tensor([[0, 1, 0, 1, 1, 1]] * 2)}, "seq_idx must be non-decreasing", id="seq_idx-falls"
    ),
    pytest.param({"cu_seqlens": torch.tensor([0, 6])}, "over a single row, got .* 2 rows", id="cu_seqlens-rows"),
    pytest.param(
        {"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 5])}, "from 0 to L = 6 .*got .0, 5.", id="cu-end"
    ),
    pytest.param(
        {"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 4, 2, 6])}, "must rise from 0", id="cu_seqlens-falls"
    ),
    pytest.param(
        {"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 6]), "seq_idx": torch.zeros(1, 6).long()},
        "pass either seq_idx or cu_seqlens, got both",
        id="seq_idx-and-cu_seqlens",
    ),
    pytest.param(
        {"seq_idx": torch.zeros(2, 6).long(), "use_cache": True},
        "packed .* use_cache must be False",
        id="packed-cache",
    ),
    pytest.param(
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True},
        "packed .* use_cache must be False",
        id="restarting-positions-cache",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_input_raises(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | arguments))


def filled_cache(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    return cache


CACHE_ERRORS = [
    pytest.param({"seq_idx": torch.zeros(2, 6).long()}, "packed documents .* a cache that holds 6 tokens", id="packed"),
    pytest.param({"attention_mask": torch.ones(2, 6)}, "the 6 cached and the 6 new tokens, got length 6", id="mask"),
]


@pytest.mark.parametrize(("arguments", "message"), CACHE_ERRORS)
def test_bad_input_with_a_cache_raises_and_leaves_it_alone(model: Any, arguments: dict[str, Any], message: str) -> None:
    cache = filled_cache(model)
    with pytest.raises(ValueError, match=message):
        model(IDS, past_key_values=cache, **arguments)
    assert int(cache.get_seq_length()) == 6
    with torch.no_grad():
        logits = model(IDS, past_key_values=cache).logits
        assert torch.equal(logits, model(IDS, past_key_values=filled_cache(model)).logits)


def test_a_packed_row_does_not_fill_a_cache(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="use_cache must be False and past_key_values None"):
        model(IDS, seq_idx=torch.zeros(2, 6).long(), past_key_values=cache)
    assert int(cache.get_seq_length()) == 0


def test_a_cache_made_without_the_configuration_raises(model: Any) -> None:
    kind = next(kind for kind in model.config.layer_types if kind.startswith("zoo_"))
    index = model.config.layer_types.index(kind)
    message = f"layer {index} must be a {kind!r} layer, got None. Make the cache with DynamicCache(config=model.config)"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(IDS, past_key_values=DynamicCache())


def test_checkpointing_does_not_drop_a_cache_silently(request: pytest.FixtureRequest, model: Any) -> None:
    cache = filled_cache(model)
    trained = make_model(request.node.callspec.params["model"]).train()
    trained.gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match=r"past_key_values must be empty or None with gradient checkpointing, .* 6 tokens"
    ):
        trained(IDS, past_key_values=cache)


def test_the_cache_goes_by_either_name(model: Any) -> None:
    """transformers 5.24 calls `cache` what was `past_key_values`; a model takes both, and not both at once."""
    ids = draw_ids(2, 7)
    expected = model(ids).logits[:, 4:]
    for keyword in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], use_cache=True, **{keyword: cache})
        torch.testing.assert_close(model(ids[:, 4:], **{keyword: cache}).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got both"):
        model(ids, cache=DynamicCache(config=model.config), past_key_values=DynamicCache(config=model.config))
