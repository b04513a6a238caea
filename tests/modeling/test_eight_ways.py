"""One sequence, eight ways, one answer: however the tokens reach a model, its logits are the same.

Every family of `families.FAMILIES` runs through every test: whole, token by token, in chunks, packed, left-padded,
right-padded and then decoded, by beam search, from a snapshot of the cache.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, draw_ids, make_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ssm_zoo.kernels.causal_conv1d import causal_conv1d_reference
from ssm_zoo.kernels.position_mix import masked_mix_reference, toeplitz_mix_reference
from ssm_zoo.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan_reference
from ssm_zoo.kernels.ssd import ssd_log_decay_reference, ssd_reference
from ssm_zoo.kernels.window_attention import window_attention_reference
from ssm_zoo.modeling import (
    discrete_mamba2,
    layers,
    modeling_mamba,
    modeling_mamba2,
    position_mixers,
    selective_attention,
)
from ssm_zoo.modeling.rollback import restore, snapshot

# Largest difference of two logits, float32. The logits are of order 1 and 1e-6 away from those in float64.
TOLERANCE = 1e-5
LENGTH = 13  # more than twice the window, no multiple of anything


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def whole(model: Any, ids: Tensor) -> Tensor:
    """(B, L, V) logits of unpadded rows in one forward, without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def chunks(model: Any, ids: Tensor, lengths: list[int], cache: Any = None) -> Tensor:
    """Logits of the rows, fed `lengths` tokens at a time."""
    assert sum(lengths) == ids.shape[1]
    logits = []
    for piece in ids.split(lengths, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded(rows: list[Tensor], side: str, length: int = 0) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask of (1, l) rows, filled up on one side with a token that is no stranger to the model."""
    length = length or max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], length)
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def documents(*lengths: int) -> list[Tensor]:
    return [draw_ids(1, length, seed=10 + i) for i, length in enumerate(lengths)]


# 1. Whole


def test_whole_is_the_definition(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same model with every op replaced by its loop over time, in float64."""
    ids = draw_ids(2, 70)  # more than a chunk of the scan
    actual = whole(model, ids)
    monkeypatch.setattr(modeling_mamba, "selective_scan", selective_scan_reference)
    monkeypatch.setattr(modeling_mamba2, "ssd", ssd_reference)
    for module in (discrete_mamba2, position_mixers):
        monkeypatch.setattr(module, "ssd_log_decay", ssd_log_decay_reference)
    monkeypatch.setattr(position_mixers, "masked_mix", masked_mix_reference)
    monkeypatch.setattr(position_mixers, "toeplitz_mix", toeplitz_mix_reference)
    monkeypatch.setattr(layers, "causal_conv1d", causal_conv1d_reference)
    monkeypatch.setattr(selective_attention, "window_attention", window_attention_reference)
    for module in (modeling_mamba2, layers):
        monkeypatch.setattr(module, "rms_norm", rms_norm_reference)
    monkeypatch.setattr(layers, "add_rms_norm", add_rms_norm_reference)
    close(actual, whole(copy.deepcopy(model).double(), ids).float())


def test_whole_is_every_prefix_by_itself(model: Any) -> None:
    ids = draw_ids(2, LENGTH)
    ends = [whole(model, ids[:, :length])[:, -1] for length in range(1, LENGTH + 1)]
    close(torch.stack(ends, dim=1), whole(model, ids))


# 2. Token by token


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_token_by_token(model: Any, grad: bool) -> None:
    """Without gradients the states are updated in place, with gradients they are not."""
    ids = draw_ids(2, LENGTH)
    with torch.set_grad_enabled(grad):
        close(chunks(model, ids, [1] * LENGTH).detach(), whole(model, ids))


def test_gradients_flow_through_the_cache(model: Any) -> None:
    """Of the loss on all tokens, fed one by one, to the embeddings of the tokens."""
    embeddings = model.get_input_embeddings()(draw_ids(1, LENGTH)).detach()
    weights = torch.randn(1, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    gradients = []
    for length in (LENGTH, 1):
        leaf = embeddings.clone().requires_grad_()
        cache, loss = DynamicCache(config=model.config), torch.zeros(())
        for start in range(0, LENGTH, length):
            part = slice(start, start + length)
            logits = model(inputs_embeds=leaf[:, part], past_key_values=cache, use_cache=True).logits
            loss = loss + (logits * weights[:, part]).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


# 3. Chunked


def test_chunked_in_two_at_every_split_point(model: Any) -> None:
    ids = draw_ids(2, LENGTH)
    expected = whole(model, ids)
    with torch.no_grad():
        for split in range(1, LENGTH):
            close(chunks(model, ids, [split, LENGTH - split]), expected)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1, 2, 3, 4, 3], id="growing"),
        pytest.param([5, 1, 1, 4, 2], id="uneven"),
        pytest.param([63, 1, 66, 11], id="around-a-chunk-of-the-scan"),
    ],
)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_chunked_in_several(model: Any, lengths: list[int], kind: type) -> None:
    ids = draw_ids(2, sum(lengths))
    size = {"max_cache_len": sum(lengths) + 3} if kind is StaticCache else {}
    with torch.no_grad():
        close(chunks(model, ids, lengths, kind(config=model.config, **size)), whole(model, ids))


# 4. Packed

PACKS = [
    pytest.param((5, 8), id="two"),
    pytest.param((1, 1, 2, 7, 1, 3), id="shorter-than-the-convolution"),
    pytest.param((6,), id="one"),
    pytest.param((40, 60, 9, 30), id="longer-than-a-chunk-of-the-scan"),
]


@pytest.mark.parametrize("lengths", PACKS)
@pytest.mark.parametrize("how", ["seq_idx", "cu_seqlens", "position_ids", "cu_seq_lens_q"])
def test_packed(model: Any, lengths: tuple[int, ...], how: str) -> None:
    rows = documents(*lengths)
    ends = list(itertools.accumulate(lengths, initial=0))
    arguments = {
        "seq_idx": {"seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]},
        "cu_seqlens": {"cu_seqlens": torch.tensor(ends)},
        "position_ids": {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]},
        # what transformers' padding-free collators give
        "cu_seq_lens_q": {
            "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor(ends, dtype=torch.int32),
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    }[how]
    with torch.no_grad():
        packed = model(torch.cat(rows, dim=1), **arguments).logits
    close(packed, torch.cat([whole(model, row) for row in rows], dim=1))


@pytest.mark.parametrize("how", ["seq_idx", "attention_mask"])
def test_packed_rows_with_padding_before_within_and_after_documents(model: Any, how: str) -> None:
    """Two rows of different documents; padding is a negative `seq_idx`, or a zero of the mask."""
    first, second, third = documents(4, 6, 7)
    seq_idx = torch.tensor(
        [[-1, 0, 0, -1, 0, 0, -1, -1, 1, 1, 1, -1, 1, 1, 1, -1], [-1, -1, -1, 2, 2, 2, -1, 2, 2, 2, 2] + [-1] * 5]
    )
    real = seq_idx >= 0
    ids = torch.full_like(seq_idx, 7)
    ids[0, real[0]], ids[1, real[1]] = torch.cat([first, second], dim=1)[0], third[0]
    arguments = {"seq_idx": seq_idx}
    if how == "attention_mask":
        arguments = {"seq_idx": seq_idx.cummax(dim=1).values.clamp(min=0), "attention_mask": real.long()}
    with torch.no_grad():
        logits = model(ids, **arguments).logits
    assert logits.isfinite().all()
    close(logits[0, real[0]], torch.cat([whole(model, first), whole(model, second)], dim=1)[0])
    close(logits[1, real[1]], whole(model, third)[0])


# 5. Left-padded


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(model: Any, side: str, use_cache: bool) -> None:
    """Rows of different lengths, one unpadded, one of a single token, and one of padding alone."""
    rows = [*documents(LENGTH, 9, 1, 3), draw_ids(1, 0)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows[:-1]):
        close(logits[i, mask[i] == 1], whole(model, row)[0])


def test_padding_in_the_middle(model: Any) -> None:
    row = draw_ids(1, LENGTH)
    mask = torch.ones(1, LENGTH + 4, dtype=torch.long)
    mask[0, [2, 6, 7, 10]] = 0
    ids = torch.full((1, LENGTH + 4), 7).masked_scatter(mask == 1, row)
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits[mask == 1], whole(model, row)[0])


def test_left_padded_then_decoded(model: Any) -> None:
    """Prefill of a part, the rest token by token: what `generate` does with a batch of prompts."""
    rows = documents(LENGTH, 9, 6)
    ids, mask = padded(rows, "left")
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in [(0, 9), *((t, t + 1) for t in range(9, LENGTH))]:
            part = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            logits.append(model(ids[:, start:end], **part).logits)
    for i, row in enumerate(rows):
        close(torch.cat(logits, dim=1)[i, mask[i] == 1], whole(model, row)[0])


# 6. Right-padded, then decoded


def turns(model: Any, parts: list[tuple[list[Tensor], str]], cache: Any = None) -> None:
    """Feed batches of rows, padded on their side, to one cache; compare each row with all its tokens at once."""
    logits: list[list[Tensor]] = [[] for _ in parts[0][0]]
    history = torch.zeros(len(parts[0][0]), 0, dtype=torch.long)
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        for rows, side in parts:
            ids, mask = padded(rows, side)
            history = torch.cat([history, mask], dim=1)
            output = model(ids, attention_mask=history, past_key_values=cache, use_cache=True).logits
            for i in range(len(rows)):
                logits[i].append(output[i, mask[i] == 1])
    for i, pieces in enumerate(logits):
        tokens = torch.cat([rows[i] for rows, _ in parts], dim=1)
        close(torch.cat(pieces), whole(model, tokens)[0])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_right_padded_then_decoded(model: Any, kind: type) -> None:
    size = {"max_cache_len": LENGTH + 9} if kind is StaticCache else {}
    decoded = [([draw_ids(1, 1, seed=10 * i + t) for i in range(4)], "right") for t in range(7)]
    turns(model, [(documents(LENGTH, 4, 1, 2), "right"), *decoded], kind(config=model.config, **size))


@pytest.mark.parametrize("sides", [("right", "right", "left"), ("left", "right", "right"), ("right", "left", "left")])
def test_chat_turns_with_padding_everywhere(model: Any, sides: tuple[str, ...]) -> None:
    """Later chunks are padded too, one row of a chunk entirely; single tokens in between."""
    one = ([draw_ids(1, 1, seed=i) for i in range(3)], "right")
    lengths = [(7, 2, 4), (0, 6, 3), (5, 3, 1)]
    parts = [(documents(*lengths[i]), side) for i, side in enumerate(sides)]
    turns(model, [parts[0], one, parts[1], one, parts[2]])


def test_some_rows_decode_and_others_wait(model: Any) -> None:
    """A token of padding leaves a finished row as it is."""
    some = [([draw_ids(1, 1 if (t + i) % 3 else 0, seed=9 * i + t) for i in range(3)], "right") for t in range(8)]
    turns(model, [(documents(6, 3, 4), "left"), *some])


# 7. Beam search


@pytest.mark.parametrize("lengths", [(6, 6), (8, 3), (1, 5)], ids=["unpadded", "left-padded", "from-one-token"])
def test_beam_search_scores_are_those_of_the_sequences(model: Any, lengths: tuple[int, ...]) -> None:
    """The cache follows its beam: the returned scores are those of the returned tokens, re-computed without it."""
    rows, new = documents(*lengths), 6
    ids, mask = padded(rows, "left")
    settings = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 1.0}
    settings |= {"max_new_tokens": new, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    settings |= {"no_repeat_ngram_size": 2}  # forbids tokens without changing the others' scores: more variety
    found = model.generate(ids, attention_mask=mask, **settings)
    tokens = found.sequences[:, ids.shape[1] :]
    assert tokens.shape == (3 * len(rows), new)
    scores, beams = [], set()
    for beam, continuation in enumerate(tokens):
        row = torch.cat([rows[beam // 3], continuation[None]], dim=1)
        logp = whole(model, row)[0, -new - 1 : -1].log_softmax(-1)
        scores.append(logp.gather(1, continuation[:, None]).sum() / new)
        beams.add((beam // 3, *continuation.tolist()))
    assert len(beams) == 3 * len(rows)
    close(found.sequences_scores, torch.stack(scores))
    # A sequence did change its place in the batch and went on, or a cache left unsorted would not show.
    assert (found.beam_indices[:, 1:new] != found.beam_indices[:, : new - 1]).any()
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(uncached.sequences, found.sequences)


def test_rows_of_a_cache_are_repeated_selected_and_reordered(model: Any) -> None:
    """What searches over the tokens do with a cache between two forwards."""
    ids, cache = draw_ids(2, 7), DynamicCache(config=model.config)
    rest = [draw_ids(6, 2, seed=seed) for seed in (1, 2, 3)]
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        chunks(model, ids, [7], cache)
        cache.batch_repeat_interleave(3)
        close(chunks(model, rest[0], [1, 1], cache), whole(model, torch.cat([ids[rows], rest[0]], dim=1))[:, 7:])
        history = torch.cat([ids[rows], rest[0]], dim=1)
        for change, order, new in (
            (cache.reorder_cache, torch.tensor([3, 3, 0, 5, 1, 1]), rest[1]),
            (cache.batch_select_indices, torch.tensor([4, 2]), rest[2][:2]),
        ):
            change(order)
            history = torch.cat([history[order], new], dim=1)
            close(chunks(model, new, [1, 1], cache), whole(model, history)[:, -2:])


# 8. Snapshot restored


@pytest.mark.parametrize(
    ("kind", "grad"),
    [
        pytest.param(DynamicCache, False, id="dynamic"),
        pytest.param(DynamicCache, True, id="dynamic-grad"),
        pytest.param(StaticCache, False, id="static"),  # written in place, which autograd does not follow
    ],
)
def test_snapshot_is_restored_twice(model: Any, kind: type, grad: bool) -> None:
    ids = draw_ids(2, LENGTH)
    cache = kind(config=model.config, **({"max_cache_len": LENGTH} if kind is StaticCache else {}))
    rest = [1, 1, 2, 1, 2]
    with torch.set_grad_enabled(grad):
        chunks(model, ids[:, :6], [5, 1], cache)
        saved = snapshot(cache)
        runs = []
        for _ in range(3):
            runs.append(chunks(model, ids[:, 6:], rest, cache).detach())
            restore(cache, saved)
            assert int(cache.get_seq_length()) == 6
    assert torch.equal(runs[1], runs[0]) and torch.equal(runs[2], runs[0])
    close(runs[0], whole(model, ids)[:, 6:])


def test_snapshot_goes_into_another_cache(model: Any) -> None:
    """A prompt read once starts two conversations."""
    ids = draw_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        chunks(model, ids, [8], cache)
        saved = snapshot(cache)
        for seed in (1, 2):
            other = DynamicCache(config=model.config)
            restore(other, saved)
            rest = draw_ids(1, 4, seed=seed)
            expected = whole(model, torch.cat([ids, rest], dim=1))[:, 8:]
            close(chunks(model, rest, [1, 2, 1], other), expected)


def test_snapshot_of_another_model_raises(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"snapshot must have the . layers of the cache, got 1"):
        restore(cache, snapshot(cache)[:1])


def test_a_history_can_be_cropped_and_a_state_while_it_records(model: Any) -> None:
    ids, cache = draw_ids(2, LENGTH), DynamicCache(config=model.config)
    with torch.no_grad():
        chunks(model, ids[:, :4], [4], cache)
        if not set(model.config.layer_types) <= {"zoo_history", "zoo_attention_history", "full_attention"}:
            saved = snapshot(cache)
            with pytest.raises(ValueError, match=r"from 0 to 0, got -1: .* keeps a state, not a history"):
                cache.crop(-1)
            restore(cache, saved)  # a layer before that one may be a history
        cache.activate_past_recording()
        chunks(model, draw_ids(2, 3, seed=5), [2, 1], cache)
        cache.crop(-3)
        wrong = torch.cat([ids[:, 4:6], draw_ids(2, 2, seed=6)], dim=1)
        close(chunks(model, wrong, [1, 3], cache)[:, :2], whole(model, ids)[:, 4:6])
        cache.crop(-2)
        close(chunks(model, ids[:, 6:], [1, LENGTH - 7], cache), whole(model, ids)[:, 6:])


def test_reset_forgets_everything(model: Any) -> None:
    ids = draw_ids(2, LENGTH)
    caches = [StaticCache(config=model.config, max_cache_len=LENGTH)]
    if "full_attention" not in model.config.layer_types:  # transformers 5.17 leaves its own layer full of zeros
        caches.append(DynamicCache(config=model.config))
    for cache in caches:
        with torch.no_grad():
            chunks(model, draw_ids(2, 9, seed=5), [8, 1], cache)
            cache.reset()
            assert int(cache.get_seq_length()) == 0
            close(chunks(model, ids, [6, 7], cache), whole(model, ids))
