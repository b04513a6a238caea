"""Attention through transformers' interface: every implementation computes the same, and none copies grouped keys."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import draw_ids, make_model
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_zoo.modeling import softmax_attention

LENGTHS = [7, 1, 4, 9]
ROWS = len(LENGTHS)
WITH_ATTENTION = ["full-discrete", "sliding-discrete", "convolved-attention", "half-blocks", "mixer-parallel"]


def attend_by_documents(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> tuple[Tensor, None]:
    """Return what transformers gives to a flash-attention kernel: documents, or the real columns of each row."""
    assert module.is_causal and dropout == 0
    batch, heads, length, _ = q.shape
    y = q.new_zeros(batch, length, heads, v.shape[-1])

    def attended(row: int, queries: Tensor, keys: Tensor) -> None:
        repeats = heads // k.shape[1]
        of_row = k[row][:, keys].repeat_interleave(repeats, 0), v[row][:, keys].repeat_interleave(repeats, 0)
        scores = q[row][:, queries] @ of_row[0].mT * scaling
        distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        seen = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        y[row, queries] = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ of_row[1]).transpose(0, 1)

    if cu_seq_lens_q is not None:
        assert batch == 1 and mask is None and cu_seq_lens_k is not None
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
        for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
            attended(0, torch.arange(start, end), torch.arange(start, end))
        return y, None
    assert mask is None or tuple(mask.shape) == (batch, k.shape[2])
    for row in range(batch):
        real = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[row]
        queries = real[-length:].nonzero()[:, 0]
        if len(queries):
            attended(row, queries, real.nonzero()[:, 0])
    return y, None


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Choose a model's implementation: flash attention by its contract, and flex attention without a compiler."""

    def choose(model: Any, implementation: str) -> None:
        if implementation == "flash_attention_2":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, implementation, attend_by_documents)
            model.config._attn_implementation_internal = implementation  # no kernel runs on a CPU
            return
        if implementation == "flex_attention":

            def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
                return flex_attention(query, key, value, **options)

            monkeypatch.setattr(flex, "compile_friendly_flex_attention", plain)
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation

    return choose


def logits_of(model: Any, way: str) -> Tensor:
    """Logits at the real tokens of a batch that is given in one of several ways."""
    total = sum(LENGTHS)
    ids, longest = draw_ids(1, total)[0].split(LENGTHS), max(LENGTHS)
    with torch.no_grad():
        if way == "packed":
            seq_idx = torch.arange(ROWS).repeat_interleave(torch.tensor(LENGTHS))[None]
            return model(torch.cat(ids)[None], seq_idx=seq_idx).logits[0]
        rows, mask = torch.zeros(ROWS, longest, dtype=torch.long), torch.zeros(ROWS, longest, dtype=torch.long)
        for row, tokens in enumerate(ids):
            place = slice(longest - len(tokens), None) if way != "right" else slice(len(tokens))
            if way == "scattered":
                place = torch.randperm(longest, generator=torch.Generator().manual_seed(row))[: len(tokens)].sort()[0]
            rows[row, place], mask[row, place] = tokens, 1
        if way != "chunks":
            return model(rows, attention_mask=mask).logits[mask == 1]
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 3), (3, 7), (7, 8), (8, longest)):
            options = {"attention_mask": mask[:, :end], "cache": cache}
            parts.append(model(rows[:, start:end], **options).logits)
        return torch.cat(parts, dim=1)[mask == 1]


@pytest.mark.parametrize("way", ["left", "right", "scattered", "packed", "chunks"])
@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_every_implementation_computes_what_sdpa_does(
    name: str, implementation: str, way: str, use: Callable[[Any, str], None]
) -> None:
    model = make_model(name)
    expected = logits_of(model, way)
    use(model, implementation)
    torch.testing.assert_close(logits_of(model, way), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
def test_every_implementation_computes_exact_heads(implementation: str, use: Callable[[Any, str], None]) -> None:
    model = make_model("exact-heads")
    expected = logits_of(model, "packed")
    use(model, implementation)
    torch.testing.assert_close(logits_of(model, "packed"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
def test_generate_gives_the_same_tokens_with_every_implementation(
    implementation: str, use: Callable[[Any, str], None]
) -> None:
    model = make_model("all-four")
    ids, mask = draw_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    use(model, implementation)
    for kind in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=kind, **settings), expected)


def test_a_registered_function_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def doubled(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        calls.append((module.num_key_value_groups, mask is None, options["scaling"]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=mask is None, attn_mask=mask, enable_gqa=True)
        return 2 * y.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "doubled", doubled)
    model, ids = make_model("half-blocks"), draw_ids(2, 8)
    with torch.no_grad():
        before = model(ids).logits
        model.set_attn_implementation("doubled")
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
        for block in model.backbone.layers[1:]:
            block.mixer.o_proj.weight.div_(2)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert {call[0] for call in calls} == {2} and {call[1] for call in calls} == {True, False}


class _Sizes(TorchFunctionMode):
    """Notes the shape of every result, and the heads of the keys that PyTorch's attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.heads: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.heads.append(args[1].shape[1])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_keys_and_values_are_not_copied_for_every_query_head(implementation: str, padded: bool) -> None:
    model = make_model("full-discrete", mixer_types=["full_attention", "sliding_attention"], sliding_window=6)
    model.set_attn_implementation(implementation)
    config = model.config
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0 if padded else 1
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :4], attention_mask=mask[:, :4], cache=cache)
        with _Sizes() as sizes:
            for start, end in ((4, 8), (8, 9)):  # so that there are more keys than queries
                model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
    columns = (6, 8, 9)
    keys = {shape for shape in sizes.shapes if shape[-1:] == (config.head_dim,) and {*shape[-2:-1]} & {*columns}}
    assert {(2, config.num_key_value_heads, count, config.head_dim) for count in columns} <= keys
    assert all(math.prod(shape[:-2]) <= 2 * config.num_key_value_heads for shape in keys)
    assert sizes.heads == ([config.num_key_value_heads] * 4 if implementation == "sdpa" else [])


def test_a_static_cache_shows_its_filled_columns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, seen = make_model("full-discrete"), draw_ids(2, 9), []
    plain = softmax_attention._sdpa

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        seen.append((k.shape[2], mask is None and causal))
        return plain(q, k, v, mask, scale, causal)

    monkeypatch.setattr(softmax_attention, "_sdpa", noting)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        for column in range(6, 9):
            model(ids[:, column : column + 1], cache=cache)
    assert seen == [(6, True), (7, True), (8, True), (9, True)]


def test_the_way_of_a_gpu_under_a_mask_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=generator) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 7, 7, generator=generator) > 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    found = softmax_attention._by_member(q, k, v, {"attn_mask": mask, "scale": 0.3})
    torch.testing.assert_close(found, softmax_attention._sdpa(q, k, v, mask, 0.3))
