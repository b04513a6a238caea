"""Encoder-decoders: against PyTorch's Transformer, and one pair of texts in every layout with the same result."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import ENCODER_DECODERS, draw_ids, make_encoder_decoder
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache, EncoderDecoderCache
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_zoo.modeling.cache import CACHE_FIELD
from ssm_zoo.modeling.cross_attention import SourceLayout
from ssm_zoo.modeling.rollback import restore, snapshot

PAD, EOS, BOS = 0, 1, 2
SOURCES = [7, 1, 9, 4]
TARGETS = [3, 6, 1, 9]


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def model(request: pytest.FixtureRequest) -> Any:
    return make_encoder_decoder(request.param)


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Sources (1, M) and what the decoder reads (1, L), of different lengths."""
    sources = [draw_ids(1, length, seed=i).clamp(min=3) for i, length in enumerate(SOURCES)]
    targets = [draw_ids(1, length, seed=9 + i).clamp(min=3) for i, length in enumerate(TARGETS)]
    for target in targets:
        target[:, 0] = BOS
    return list(zip(sources, targets, strict=True))


def padded(rows: list[Tensor], side: str, value: int = PAD) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask."""
    longest = max(row.shape[1] for row in rows)
    spare = [longest - row.shape[1] for row in rows]
    sides = [(count, 0) if side == "left" else (0, count) for count in spare]
    ids = torch.cat([F.pad(row, place, value=value) for row, place in zip(rows, sides, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(row), place) for row, place in zip(rows, sides, strict=True)])
    return ids, mask


def alone(model: Any) -> list[Tensor]:
    """(L, V) logits of each pair by itself."""
    with torch.no_grad():
        return [model(source, decoder_input_ids=target, use_cache=False).logits[0] for source, target in pairs()]


# The definition


def copied(ours: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    ours.weight.copy_(weight)
    ours.bias.copy_(bias)


def copied_attention(ours: Any, theirs: nn.MultiheadAttention) -> None:
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    for part, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
        copied(getattr(ours, part), weight, bias)
    copied(ours.o_proj, theirs.out_proj.weight, theirs.out_proj.bias)


@torch.no_grad()
def test_the_transformer_is_pytorchs() -> None:
    """With norms before the halves; PyTorch's layers, in float64, get the same weights and masks."""
    torch.manual_seed(0)
    model = make_encoder_decoder("transformer", head=False, head_dim=4).double()
    options = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "activation": "gelu", "dtype": torch.float64}
    layer = {"norm_first": True, "batch_first": True, "layer_norm_eps": 1e-5}
    norm = {"normalized_shape": 16, "eps": 1e-5, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options, **layer), 2, nn.LayerNorm(**norm))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options, **layer), 2, nn.LayerNorm(**norm))
    for stack, ours in ((encoder.eval(), model.encoder), (decoder.eval(), model.decoder)):
        for parameter in stack.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for theirs, block in zip(stack.layers, ours.layers, strict=True):
            norms = [block.input_layernorm, block.post_attention_layernorm]
            copied_attention(block.mixer, theirs.self_attn)
            if stack is decoder:
                copied_attention(block.cross_attention, theirs.multihead_attn)
                norms.insert(1, block.cross_attention_layernorm)
            copied(block.mlp.up_proj, theirs.linear1.weight, theirs.linear1.bias)
            copied(block.mlp.down_proj, theirs.linear2.weight, theirs.linear2.bias)
            for number, norm_of_ours in enumerate(norms, 1):
                norm_of_ours.load_state_dict(getattr(theirs, f"norm{number}").state_dict())
        ours.norm_f.load_state_dict(stack.norm.state_dict())
    (sources, source_mask), (targets, mask) = (padded([*part], "right") for part in zip(*pairs(), strict=True))
    places = torch.arange(9)
    given = model.encoder.embeddings(sources) + model.encoder.position_embeddings(places)
    memory = encoder(given, src_key_padding_mask=source_mask == 0)
    given = model.encoder.embeddings(targets) + model.decoder.position_embeddings(places)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = decoder(given, memory, tgt_mask=causal, memory_key_padding_mask=source_mask == 0)
    found = model(sources, source_mask, targets, mask)
    torch.testing.assert_close(found.encoder_last_hidden_state[source_mask == 1], memory[source_mask == 1])
    torch.testing.assert_close(found.last_hidden_state[mask == 1], expected[mask == 1])


@torch.no_grad()
def test_cross_attention_by_its_definition(model: Any) -> None:
    """Each query head against the keys of its group, in float64, and the matrix that is returned."""
    layer = model.backbone.decoder.layers[0].cross_attention.double()
    sequence = model.backbone.decoder.sequence_of(torch.zeros(2, 5, 16))
    states, source = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    seen = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    layout = SourceLayout(seen - 1, None)
    y, matrix = layer(states, source, layout, sequence, None, True)
    members = layer.num_heads // layer.num_kv_heads
    heads = []
    for head in range(layer.num_heads):
        rows, group = slice(6 * head, 6 * head + 6), slice(6 * (head // members), 6 * (head // members) + 6)
        q, k, v = (
            layer.q_proj(states)[0, :, rows],
            layer.k_proj(source)[0, :4, group],
            layer.v_proj(source)[0, :4, group],
        )
        q, k = (part if norm is None else norm(part) for part, norm in ((q, layer.q_norm), (k, layer.k_norm)))
        scores = q @ k.T * 6**-0.5
        if layer.softcap is not None:
            scores = layer.softcap * (scores / layer.softcap).tanh()
        weights = scores.softmax(-1)
        torch.testing.assert_close(matrix[0, head, :, :4].double(), weights, rtol=1e-6, atol=1e-6)
        heads.append(weights @ v)
    torch.testing.assert_close(y[0], layer.o_proj(torch.cat(heads, dim=-1)), rtol=1e-6, atol=1e-6)
    assert matrix[0, :, :, 4:].eq(0).all() and matrix[1].eq(0).all()
    assert y.shape == (2, 5, 16)
    assert torch.equal(y[1], layer.o_proj(torch.zeros(5, layer.num_heads * 6, dtype=torch.float64)))
    layer.float()


# One pair, one answer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source_side", ["left", "right"])
def test_padding_on_either_side_of_both_changes_nothing(model: Any, source_side: str, side: str) -> None:
    sources, targets = zip(*pairs(), strict=True)
    ids, mask = padded([*sources], source_side)
    decoder_ids, decoder_mask = padded([*targets], side)
    with torch.no_grad():
        logits = model(ids, mask, decoder_ids, decoder_mask).logits
        if side == "right":  # nothing looks ahead
            unmasked = model(ids, mask, decoder_ids).logits
            torch.testing.assert_close(unmasked[decoder_mask == 1], logits[decoder_mask == 1], rtol=0, atol=1e-6)
    for row, expected in enumerate(alone(model)):
        torch.testing.assert_close(logits[row, decoder_mask[row] == 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [[1] * 9, [2, 3, 1, 3], [9]], ids=["tokens", "chunks", "whole"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_cache_goes_on(model: Any, side: str, splits: list[int]) -> None:
    sources, targets = zip(*pairs(), strict=True)
    ids, mask = padded([*sources], side)
    decoder_ids, decoder_mask = padded([*targets], side)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    parts, start = [], 0
    with torch.no_grad():
        whole = model(ids, mask, decoder_ids, decoder_mask, use_cache=False, output_attentions=True)
        encoded = model.get_encoder()(ids, mask)
        for count in splits:
            end = start + count
            given = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": decoder_ids[:, start:end]}
            given |= {"decoder_attention_mask": decoder_mask[:, :end], CACHE_FIELD: cache, "output_attentions": True}
            parts.append(model(**given))
            start = end
    real = decoder_mask == 1
    logits = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(logits[real], whole.logits[real], rtol=0, atol=1e-5)
    for layer, expected in enumerate(whole.cross_attentions):
        found = torch.cat([part.cross_attentions[layer] for part in parts], dim=2).transpose(1, 2)
        torch.testing.assert_close(found[real], expected.transpose(1, 2)[real], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 9 and cache.cross_attention_cache.get_seq_length() == 9
    keys = cache.cross_attention_cache.layers[0].keys
    assert keys.shape[1] == model.config.num_key_value_heads  # not a copy for every query head


def packed() -> dict[str, Tensor]:
    """The pairs in one row, in another order of source numbers than 0, 1, ..., with padding between the targets."""
    sources, targets = zip(*pairs(), strict=True)
    numbers = torch.tensor([3, 4, 8, 9])
    spaces = [F.pad(target, (0, 2)) for target in targets]
    marks = [
        F.pad(torch.full_like(target, int(n)), (0, 2), value=-1) for target, n in zip(targets, numbers, strict=True)
    ]
    return {
        "input_ids": torch.cat(sources, dim=1),
        "seq_idx": numbers.repeat_interleave(torch.tensor(SOURCES))[None],
        "decoder_input_ids": torch.cat(spaces, dim=1),
        "decoder_seq_idx": torch.cat(marks, dim=1),
    }


def test_packed_pairs_train_as_separate_ones(model: Any) -> None:
    given = packed()
    labels = draw_ids(1, given["decoder_input_ids"].shape[1], seed=5).masked_fill(given["decoder_seq_idx"] < 0, -100)
    model.zero_grad()
    loss = model(**given, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    real, total, start = int((labels != -100).sum()), 0.0, 0
    for source, target in pairs():
        own = labels[:, start : start + target.shape[1]]
        part = model(source, decoder_input_ids=target, labels=own, num_items_in_batch=real).loss
        part.backward()
        total, start = total + part.item(), start + target.shape[1] + 2
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert gradients[name].any() or "position_embeddings" in name, name
    model.zero_grad()


def test_documents_do_not_read_each_other(model: Any) -> None:
    given = packed()
    with torch.no_grad():
        logits = model(**given).logits
        for number, (expected, count) in enumerate(zip(alone(model), TARGETS, strict=True)):
            start = sum(TARGETS[:number]) + 2 * number
            torch.testing.assert_close(logits[0, start : start + count], expected, rtol=0, atol=1e-5)


def attend_by_documents(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """What transformers hands to a flash-attention kernel: documents, or the real columns of each row."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    bounds = [options.get(f"cu_seq_lens_{side}") for side in "qk"]
    if bounds[0] is None:
        assert mask is None or module.is_causal
        bias = torch.zeros(q.shape[2], k.shape[2]).masked_fill(
            torch.ones(q.shape[2], k.shape[2]).triu(1 + k.shape[2] - q.shape[2]).bool() & module.is_causal, -torch.inf
        )
        bias = bias if mask is None else bias.masked_fill(~mask[:, None, None, : k.shape[2]].bool(), -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options["scaling"])
        return y.nan_to_num().transpose(1, 2), None
    assert mask is None and q.shape[0] == 1 and len(bounds[0]) == len(bounds[1])
    assert [options["max_length_q"], options["max_length_k"]] == [int(bound.diff().max()) for bound in bounds]
    y = torch.zeros_like(q)
    for (a, b), (c, d) in zip(*(pairwise(bound) for bound in bounds), strict=True):
        if b > a and d > c:
            parts = q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]
            y[:, :, a:b] = F.scaled_dot_product_attention(*parts, is_causal=module.is_causal, scale=options["scaling"])
    return y.transpose(1, 2), None


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
def test_every_implementation_computes_what_sdpa_does(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_encoder_decoder(
        "mixed", attn_logit_softcapping=None, mixer_types=["retention", "full_attention", "none"]
    )

    def results() -> list[Tensor]:
        sources, targets = zip(*pairs(), strict=True)
        ids, mask = padded([*sources], "right")
        decoder_ids, decoder_mask = padded([*targets], "left")
        with torch.no_grad():
            rows = model(ids, mask, decoder_ids, decoder_mask).logits[decoder_mask == 1]
            columns = packed()["decoder_seq_idx"][0] >= 0
            new = 2 if implementation == "flex_attention" else 4  # slow where it is not compiled
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            return [rows, model(**packed()).logits[0, columns], tokens]

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    expected = results()
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", plain)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", attend_by_documents)
    if implementation == "flash_attention_2":  # no kernel runs on a CPU
        for part in (model.config, model.get_encoder().config):
            part._attn_implementation_internal = implementation
    else:
        model.set_attn_implementation(implementation)
    assert model.get_encoder().config._attn_implementation == implementation
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Generation


def re_scored(model: Any, source: Tensor, sequence: Tensor) -> Tensor:
    """(L - 1) log-probabilities of a hypothesis, without a cache and without padding."""
    with torch.no_grad():
        logits = model(source, decoder_input_ids=sequence[None, :-1], use_cache=False).logits[0]
    return logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_score_what_they_would_without_a_cache(model: Any, side: str) -> None:
    sources = [source for source, _ in pairs()]
    ids, mask = padded(sources, side)
    options = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 8}
    found = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, length_penalty=0.7, **options
    )
    assert len(found.sequences_scores.unique()) > len(sources)
    for index, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        ended = (sequence[1:] == EOS).nonzero()
        length = int(ended[0]) + 1 if len(ended) else len(sequence) - 1
        total = re_scored(model, sources[index // 2], sequence[: length + 1]).sum()
        torch.testing.assert_close(total / length**0.7, score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_is_the_loop_without_a_cache(model: Any, options: dict[str, Any]) -> None:
    """Over a padded batch, and with targets that have begun, padded on the left."""
    sources, targets = zip(*pairs(), strict=True)
    ids, mask = padded([*sources], "left")
    decoder_ids, decoder_mask = padded([*targets], "left")
    given = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask, "attention_mask": mask}
    found = model.generate(ids, **given, do_sample=False, max_new_tokens=6, eos_token_id=None, **options)
    for row, (source, target) in enumerate(pairs()):
        for _ in range(6):
            with torch.no_grad():
                last = model(source, decoder_input_ids=target, use_cache=False).logits[:, -1:]
            target = torch.cat([target, last.argmax(-1)], dim=1)
        assert torch.equal(found[row, 9 - TARGETS[row] :], target[0])


def test_generate_from_encoder_outputs_and_embeddings(model: Any) -> None:
    source = draw_ids(2, 6)
    expected = model.generate(source, do_sample=False, max_new_tokens=5)
    encoded = model.get_encoder()(source)
    assert torch.equal(model.generate(encoder_outputs=encoded, do_sample=False, max_new_tokens=5), expected)
    embeddings = model.get_input_embeddings()(source).detach()
    assert torch.equal(model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=5), expected)
    with torch.no_grad():
        target = torch.tensor([[2, 7, 9]] * 2)
        logits = model(source, decoder_input_ids=target).logits
        states = model.get_input_embeddings()(target)
        for outputs in (encoded, tuple(encoded.values())[:1]):
            again = model(encoder_outputs=outputs, decoder_inputs_embeds=states).logits
            torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)


def test_generate_goes_on_from_a_cache(model: Any) -> None:
    source = draw_ids(2, 6)
    encoded = model.get_encoder()(source)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    options = {"do_sample": False, "eos_token_id": None}
    first = model.generate(encoder_outputs=encoded, max_new_tokens=4, **{CACHE_FIELD: cache}, **options)
    given = {"decoder_input_ids": first, "decoder_attention_mask": torch.ones_like(first), CACHE_FIELD: cache}
    found = model.generate(encoder_outputs=encoded, max_new_tokens=4, **given, **options)
    assert torch.equal(found, model.generate(source, max_new_tokens=8, **options))


def step(model: Any, encoded: Any, ids: Tensor, cache: EncoderDecoderCache) -> Tensor:
    with torch.no_grad():
        return model(encoder_outputs=encoded, decoder_input_ids=ids, **{CACHE_FIELD: cache}).logits


def test_a_cache_is_restored_and_reordered(model: Any) -> None:
    source, target = draw_ids(3, 6), draw_ids(3, 7, seed=1).clamp(min=3)
    encoded = model.get_encoder()(source)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    empty = snapshot(cache)
    step(model, model.get_encoder()(source[:, :3]), target[:, :2], cache)
    restore(cache, empty)  # for another source
    first = step(model, encoded, target[:, :4], cache)
    with torch.no_grad():
        assert torch.equal(first, model(source, decoder_input_ids=target[:, :4]).logits)
    kept = snapshot(cache)
    expected = step(model, encoded, target[:, 4:], cache)
    step(model, encoded, target[:, :2], cache)
    restore(cache, kept)
    assert torch.equal(step(model, encoded, target[:, 4:], cache), expected)
    restore(cache, kept)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    encoded.last_hidden_state = encoded.last_hidden_state[order]
    torch.testing.assert_close(step(model, encoded, target[order][:, 4:], cache), expected[order], rtol=0, atol=1e-6)
