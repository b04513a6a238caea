"""The decode benchmark at a tiny size: bytes counted right, caches filled as stated, nothing that grows unseen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decode
import length_models
import pytest
import torch
from decode import DYNAMIC, EVERY, NONE, SIDES, STATIC, Point, Side, held_bytes, main
from families import FAMILIES, draw_ids, make_config, make_model
from from_scratch_training import VOCABULARY
from length_models import HYBRID, MAMBA2, TAIPAN, TRANSFORMER
from transformers import DynamicCache

from tolerances import TOLERANCES

TINY = {"WIDTH": 32, "HEADS": 2, "STATE": 4, "GROUP": 1, "INNER": 16, "ALONE": 1, "BLOCKS": 2, "BLOCK_INNER": 16}
ARGUMENTS = "--contexts 20 40 50 --steps 2 --window 8 --chunk 7 --prefill 30"
IDS = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
# Not the masked mixers, which read no more positions than they have weights for. Exact heads keep all tokens.
BOUNDED = [
    name
    for name in FAMILIES
    if not {"full_attention", "zoo_convolved_attention"} & {*(config := make_config(name)).layer_types}
    and config.model_type != "masked_mixer"
    and name not in ("exact-heads", "int8-memory")
]
# Of a Mamba-2 block: 3 inputs of the convolution for 64 + 2 x 4 channels, a state of 64 x 4, in four bytes.
MAMBA2_BYTES = 4 * (3 * 72 + 64 * 4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in TINY.items():
        monkeypatch.setattr(length_models, name, size)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def filled(arm: str, way: str, tokens: int, limit: int = 64) -> Side:
    side = Side(arm, way, window=8)
    side.fill(IDS[:, :tokens], chunk=7, limit=limit)
    return side


def test_a_storage_counts_once_and_whole():
    keys = torch.zeros(100)[:3]
    layer = SimpleNamespace(keys=keys, values=keys[1:], counts=torch.zeros(2, dtype=torch.long), columns=7)
    cache: Any = SimpleNamespace(layers=[layer, layer])
    assert held_bytes(cache) == 400 + 16


def test_bytes_are_those_counted_by_hand():
    assert held_bytes(filled(MAMBA2, DYNAMIC, 40).cache) == MAMBA2_BYTES
    # Two blocks: keys and values of 2 heads of 16 channels.
    assert held_bytes(filled(TRANSFORMER, DYNAMIC, 40).cache) == 2 * 2 * 40 * 32 * 4
    assert held_bytes(filled(HYBRID, DYNAMIC, 40).cache) == MAMBA2_BYTES + 2 * 40 * 32 * 4
    # A window of 8 holds 7 keys and values with their positions; after a step it is a view of 8 columns.
    side = filled(TAIPAN, EVERY, 40)
    with_position = 2 * 32 * 4 + 8
    counts = 8 + 4  # of the window's tokens, and of the arrivals in a step of Mamba-2
    side.step(IDS[:, 40:41], side.cache)
    assert held_bytes(side.cache) == MAMBA2_BYTES + 8 * with_position + counts


def test_a_static_cache_has_room_for_the_steps_and_no_more():
    side = filled(TRANSFORMER, STATIC, 40)
    cache = side.ready(5)
    assert held_bytes(cache) == 2 * (2 * 45 * 32 * 4 + 8)  # and how many tokens are in it


@pytest.mark.parametrize(("arm", "way"), SIDES)
def test_steps_after_filling_are_the_whole(arm: str, way: str):
    side = filled(arm, way, 40)
    cache = side.ready(3)
    rtol, atol = TOLERANCES[torch.float32]
    for place in (40, 41, 42):
        found = side.step(IDS[:, place : place + 1], cache).logits
        whole = side.step(IDS[:, : place + 1], DynamicCache(config=side.model.config)).logits
        torch.testing.assert_close(found, whole, rtol=rtol, atol=atol)
    assert side.read == 40


@pytest.mark.parametrize("arm", [TRANSFORMER, HYBRID])
def test_past_the_limit_a_full_cache_repeats_what_is_in_it(arm: str):
    side, short = filled(arm, DYNAMIC, 40, limit=16), filled(arm, DYNAMIC, 16)
    assert (side.read, side.tokens) == (16, 40)
    assert side.cache.get_seq_length() == 40
    layer, known = side.cache.layers[-1], short.cache.layers[-1]
    assert torch.equal(layer.keys, torch.cat([known.keys, known.keys, known.keys[:, :, :8]], dim=2))
    assert side.step(IDS[:, 40:41], side.cache).logits.isfinite().all()
    assert side.cache.get_seq_length() == 41


@pytest.mark.parametrize(("way", "rate"), [(EVERY, 1.0), (NONE, 0.0)])
def test_gates_are_set(way: str, rate: float):
    side = filled(TAIPAN, way, 20)
    assert side.step(IDS[:, 20:40], side.cache).selection_rate.tolist() == [rate]


@torch.no_grad()
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_cache_holds_no_more_after_a_longer_prompt(name: str):
    """Counted with the storages behind views: a window of a long prompt must not keep the prompt in memory."""
    model = make_model(name)

    def held(*lengths: int) -> int:
        cache = DynamicCache(config=model.config)
        for part in draw_ids(1, sum(lengths)).split(lengths, dim=1):
            model(part, past_key_values=cache, use_cache=True)
        return held_bytes(cache)

    assert held(50) == held(200) == held(90, 110)
    assert held(50, *[1] * 3) == held(200, *[1] * 30)


def test_gradients_reach_the_window_of_a_long_prompt():
    """What is copied out of a prompt is still a part of its graph."""
    model = make_model("taipan", sal_every=1, num_hidden_layers=2)
    embedded = model.get_input_embeddings()(draw_ids(1, 50)).detach().requires_grad_()
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    layer: Any = cache.layers[1]
    assert layer.keys.shape[2] == 4
    (gradient,) = torch.autograd.grad(layer.keys.sum(), embedded)
    assert gradient[0, 46].abs().max() > 0


def test_rows_are_written_and_going_on_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main([*ARGUMENTS.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.jsonl")
    rows = read(path)
    assert [(row["context"], row["arm"], row["way"]) for row in rows] == [
        (c, *side) for c in (20, 40, 50) for side in SIDES
    ]
    assert path.with_suffix(".png").exists()
    assert all(0 < row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"] for row in rows)
    for row in rows:
        full = row["arm"] in (HYBRID, TRANSFORMER)
        assert row["read"] <= (30 if full else row["context"])
        assert row["chosen"] == ({EVERY: 1.0, NONE: 0.0}[row["way"]] if row["arm"] == TAIPAN else None)
    held = {(row["context"], row["arm"], row["way"]): row["bytes"] for row in rows}
    for arm, way in SIDES:
        assert (held[50, arm, way] == held[20, arm, way]) == (arm in (TAIPAN, MAMBA2))
    done: list[list[Point]] = []
    measure = decode.measure
    monkeypatch.setattr(decode, "measure", lambda points, ids: done.append(list(points)) or measure(points, ids))
    main([*ARGUMENTS.split(), "--resume", str(path)])
    assert done == [] and read(path) == rows
    longer = ARGUMENTS.replace("20 40 50", "20 40 50 56")
    main([*longer.split(), "--resume", str(path)])
    assert [{point.context for point in points} for points in done] == [{56}]
    assert len(read(path)) == 4 * len(SIDES)
