"""Masked mixers in use: the end of the context, padding as it was trained, adapters on mixing weights, the hybrid."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, draw_ids, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

from ssm_zoo.kernels.ssd import ssd_matrix
from ssm_zoo.modeling import MaskedMixerConfig, MaskedMixerForCausalLM, ZooHybridConfig, ZooHybridForCausalLM
from ssm_zoo.modeling.modeling_masked_mixer import tokens_to_drop
from ssm_zoo.modeling.token_layout import make_sequence

N = 12
MIXINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "toeplitz": {"mixing": "toeplitz", "num_heads": 2, "kernel_size": 2},
    "mixed": {"mixing": "mixed_repeat", "num_heads": 2},
}
GREEDY = {"do_sample": False, "pad_token_id": 0}


def make(kind: Any = MaskedMixerForCausalLM, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny model in evaluation mode with weights of which none is trivial."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": N}
    config = MaskedMixerConfig(**(sizes | {"intermediate_size": 20, "initializer_range": 0.02} | changes))
    torch.manual_seed(seed)
    model = kind(config) if kind is MaskedMixerForCausalLM else kind.from_config(config)
    perturb(model, seed)
    return model.eval()


@pytest.fixture(params=MIXINGS)
def mixing(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MIXINGS[request.param]


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - row.shape[1] :], mask[i, length - row.shape[1] :] = row[0], 1
    return ids, mask


# The end of the context

LONG = rf"at most {N} tokens, as there are weights for {N} positions \(max_position_embeddings\), got {N + 1} tokens"
TOO_LONG: dict[str, dict[str, Any]] = {
    "one-document": {"input_ids": draw_ids(1, N + 1)},
    "packed": {"input_ids": draw_ids(1, 20), "seq_idx": torch.tensor([[0] * 3 + [1] * (N + 1) + [2] * 4])},
    "padded": {
        "input_ids": draw_ids(2, 20),
        "attention_mask": torch.tensor([[0] * 7 + [1] * (N + 1), [1] * 5 + [0] * 15]),
    },
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_a_document_that_is_too_long_raises(mixing: dict[str, Any], case: str) -> None:
    with pytest.raises(ValueError, match=LONG):
        make(**mixing)(**TOO_LONG[case], use_cache=False)


@torch.no_grad()
def test_a_row_may_be_longer_than_its_documents(mixing: dict[str, Any]) -> None:
    model, rows = make(**mixing), [draw_ids(1, length, seed=length) for length in (N, 3, 8)]
    alone = [model(row, use_cache=False).logits for row in rows]
    seq_idx = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([N, 3, 8]))[None]
    packed = model(torch.cat(rows, dim=1), seq_idx=seq_idx).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    ids, mask = torch.full((1, 20), 7), torch.zeros(1, 20, dtype=torch.long)
    ids[0, 1:9], mask[0, 1:9] = rows[2][0], 1
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, 1:9], alone[2][0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 4])
def test_going_on_beyond_the_context_raises_and_leaves_the_cache_alone(mixing: dict[str, Any], new: int) -> None:
    model, ids = make(**mixing), draw_ids(2, N)
    cache = DynamicCache(config=model.config)
    model(ids[:, : N - 1], past_key_values=cache, use_cache=True)
    model(ids[:, N - 1 :], past_key_values=cache, use_cache=True)
    expected = [value.clone() for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    with pytest.raises(
        ValueError, match=rf"{N} positions \(max_position_embeddings\), got {N + new} tokens, {N} columns of the cache"
    ):
        model(draw_ids(2, new), past_key_values=cache, use_cache=True)
    found = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    assert int(cache.get_seq_length()) == N
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_padding_takes_no_position_while_decoding(mixing: dict[str, Any]) -> None:
    """Columns beyond the context, and rows that still fit."""
    model, row = make(**mixing), draw_ids(1, N)
    ids, mask = left_padded([row[:, :5], draw_ids(1, 9)])
    cache = DynamicCache(config=model.config)
    model(ids[:1], attention_mask=mask[:1], past_key_values=cache, use_cache=True)
    mask, logits = mask[:1], []
    for t in range(5, N):
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
        logits.append(model(row[:, t : t + 1], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    assert mask.shape[1] == N + 4
    torch.testing.assert_close(torch.cat(logits, dim=1), model(row).logits[:, 5:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=LONG):
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
        model(row[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)


def test_generate_raises_where_the_context_ends(mixing: dict[str, Any]) -> None:
    model, ids = make(**mixing), draw_ids(1, 5)
    assert model.generate(ids, max_new_tokens=N - 5, **GREEDY).shape == (1, N)
    with pytest.raises(ValueError, match=LONG):
        model.generate(ids, max_new_tokens=N, **GREEDY)


def test_the_hybrid_raises_too() -> None:
    model = hybrid()
    with pytest.raises(ValueError, match=LONG):
        model(draw_ids(1, N + 1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(draw_ids(1, N), past_key_values=cache)
    with pytest.raises(ValueError, match=LONG):
        model(draw_ids(1, 1), past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == N  # the attention before was not reached


# Generation in windows


def in_windows(model: Any, row: Tensor, new: int) -> Tensor:
    """The definition, without a cache: at most N - 1 tokens are read, (N - 1) // 2 at a time are dropped."""
    dropped = 0
    with torch.no_grad():
        for _ in range(new):
            while row.shape[1] - dropped > N - 1:
                dropped += (N - 1) // 2
            logits = model(row[:, dropped:], use_cache=False).logits
            row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    return row


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generation_in_windows_is_its_definition(mixing: dict[str, Any], use_cache: bool) -> None:
    """Rows that fit, rows that will not and one that does not from the start, in one batch."""
    model = make(**mixing, context_overflow="window")
    rows = [draw_ids(1, length, seed=length) for length in (7, 3, 25, N - 1)]
    ids, mask = left_padded(rows)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=30, use_cache=use_cache, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(found[i, 25 - row.shape[1] :], in_windows(model, row, 30)[0])
    plain = model.generate(rows[0], max_new_tokens=20, use_cache=use_cache, **GREEDY)
    assert torch.equal(plain, in_windows(model, rows[0], 20))


def test_beams_in_windows_have_the_scores_of_their_sequences() -> None:
    model, ids, new = make(context_overflow="window"), draw_ids(1, N - 3), 8
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 1.0, "max_new_tokens": new}
    reports = {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(ids, **settings, **reports, **GREEDY)
    scores = []
    for row in found.sequences:
        total = 0.0
        for t in range(N - 3, N - 3 + new):
            start = int(tokens_to_drop(torch.tensor([t]), N))
            with torch.no_grad():
                logits = model(row[None, start:t], use_cache=False).logits[0, -1]
            total += logits.log_softmax(-1)[row[t]].item()
        scores.append(total / new)
    torch.testing.assert_close(found.sequences_scores, torch.tensor(scores), rtol=0, atol=1e-5)


def test_tokens_to_drop_leaves_about_half() -> None:
    kept = {n: n - int(tokens_to_drop(torch.tensor([n]), 8)) for n in range(1, 20)}
    assert list(kept.values()) == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7]


def test_windows_need_the_ids_of_all_tokens() -> None:
    model = make(context_overflow="window")
    embeddings = model.get_input_embeddings()(draw_ids(1, N - 2)).detach()
    with pytest.raises(
        ValueError, match=r"input_ids must hold all .* context_overflow='window' reads the last ones again"
    ):
        model.generate(inputs_embeds=embeddings, max_new_tokens=6, **GREEDY)


@pytest.mark.parametrize("changes", [{}, {"expanded": True}, {"attention": "series"}], ids=str)
def test_a_history_serves_assisted_generation(changes: dict[str, Any]) -> None:
    """Drafts from the prompt are checked several at a time and taken back."""
    model, ids = make(max_position_embeddings=60, **changes), draw_ids(1, 4).repeat(1, 5)
    plain = model.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=20, prompt_lookup_num_tokens=3, **GREEDY), plain)


@torch.no_grad()
def test_a_history_with_padding_is_cropped_behind_it_only() -> None:
    model, row = make(), draw_ids(1, 9)
    ids, mask = left_padded([row[:, :4], draw_ids(1, 7)])
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    wrong = draw_ids(2, 2, seed=3)
    model(wrong, attention_mask=torch.cat([mask, torch.ones(2, 2)], 1), past_key_values=cache, use_cache=True)
    for too_many in (-7, 1):
        with pytest.raises(ValueError, match=rf"from -6 to 0 \(columns after the last padding\), got {too_many}"):
            cache.crop(too_many)
    cache.crop(-2)
    mask = torch.cat([mask, torch.ones(2, 5)], dim=1)
    logits = model(row[:, 4:].expand(2, -1), attention_mask=mask, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits[0], model(row).logits[0, 4:], rtol=0, atol=1e-5)


# Padding as it was trained


def filled(ids: Tensor, pad: int, length: int) -> Tensor:
    return torch.cat([torch.full((ids.shape[0], length - ids.shape[1]), pad), ids], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6, N - 1, N])
def test_rows_are_filled_up_with_padding_that_is_mixed(length: int) -> None:
    plain, trained, ids = make(), make(pad_mode="as_trained", pad_token_id=3), draw_ids(2, length)
    most = max(length, N - 1)
    output = trained(ids, output_hidden_states=True, output_attentions=True)
    expected = plain(filled(ids, 3, most), output_hidden_states=True, output_attentions=True)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, expected.logits[:, -length:])
    for state, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other[:, -length:])
    for matrix, other in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(matrix, other[:, :, -length:, -length:])
    embedded = trained(inputs_embeds=trained.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, output.logits)
    as_tuple = trained(ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_a_mask_at_the_left_changes_nothing_there() -> None:
    trained, ids = make(pad_mode="as_trained", pad_token_id=3), filled(draw_ids(2, 5), 3, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5] * 2)
    assert torch.equal(trained(ids, attention_mask=mask).logits, trained(ids).logits)
    torch.testing.assert_close(trained(ids).logits[:, 4:], trained(ids[:, 4:]).logits, rtol=0, atol=1e-6)


def test_generation_moves_the_text_through_the_context() -> None:
    plain, trained = make(), make(pad_mode="as_trained", pad_token_id=3)
    assert trained.config.use_cache is False
    ids = draw_ids(2, 4)
    found = trained.generate(ids, max_new_tokens=N - 4, do_sample=False)
    with torch.no_grad():
        for _ in range(N - 4):
            logits = plain(filled(ids, 3, N - 1)).logits[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_what_filled_rows_cannot_have_raises() -> None:
    model, ids = make(pad_mode="as_trained", pad_token_id=3), draw_ids(1, 6)
    for arguments, message in (
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "attention_mask must have padding on the left only"),
        (
            {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
            "seq_idx must be None with pad_mode='as_trained', which takes one document a row",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3, 6])},
            "cu_seqlens must be None with pad_mode='as_trained', which takes one document a row",
        ),
        ({"use_cache": True}, "use_cache must be False .* pad_mode='as_trained', which has no cache"),
        ({"past_key_values": DynamicCache(config=model.config)}, "past_key_values None with pad_mode='as_trained'"),
        ({"inputs_embeds": torch.zeros(1, 6, 16)}, "pass exactly one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads_over_filled_rows(auto: Any) -> None:
    plain, trained = (make(auto, num_labels=3, pad_token_id=3, **mode) for mode in ({}, {"pad_mode": "as_trained"}))
    ids = draw_ids(2, 5)
    logits = trained(ids, attention_mask=torch.ones(2, 5)).logits
    whole = plain(filled(ids, 3, N - 1), attention_mask=torch.ones(2, N - 1)).logits
    torch.testing.assert_close(logits, whole if auto is AutoModelForSequenceClassification else whole[:, -5:])


def test_the_mode_is_saved(tmp_path: Path) -> None:
    model, ids = make(pad_mode="as_trained", pad_token_id=3), draw_ids(1, 5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.pad_mode, loaded.config.use_cache) == ("as_trained", False)
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=3, do_sample=False), model.generate(ids, max_new_tokens=3, do_sample=False)
    )
    assert AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state.shape == (1, 5, 16)


# Adapters on the mixing weights


@pytest.mark.parametrize("where", [None, "all-linear"], ids=["mixing-alone", "with-all-linear"])
def test_adapters_on_the_mixing_weights_are_trained_saved_and_merged(
    mixing: dict[str, Any], where: str | None, tmp_path: Path
) -> None:
    """peft's `target_parameters`: low-rank changes of each tap's and head's matrix, or of all the others' vectors."""
    ids = draw_ids(3, N)
    torch.manual_seed(0)
    targets = {"target_modules": where or [], "target_parameters": ["mixer.weight"]}
    model = get_peft_model(make(**mixing), LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mixing_parts = [name for name in trained if ".mixer." in name and "_proj" not in name]
    assert len(mixing_parts) == 2 * 2
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.03), []
    model.train()
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    for name in mixing_parts:
        assert trained[name].grad.any(), name
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(**mixing), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        tokens = model.generate(input_ids=ids[:, :5], max_new_tokens=5, **GREEDY)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-5)
        assert torch.equal(merged.generate(ids[:, :5], max_new_tokens=5, **GREEDY), tokens)


# The hybrid


def hybrid(**changes: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
    kinds = {"mixer_types": ["masked_mixing", "full_attention", "masked_mixing"], "num_attention_heads": 4}
    torch.manual_seed(0)
    model = ZooHybridForCausalLM(ZooHybridConfig(**(sizes | kinds | {"max_position_embeddings": N} | changes)))
    perturb(model)
    return model.eval()


HYBRIDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "toeplitz": {"mixing": "toeplitz", "mixing_heads": 2, "mixing_projections": False},
    "combined": {"mixing": "combined_repeat", "mixing_kernel": 2, "mixing_projections": True, "mixing_decay": False},
}


@torch.no_grad()
@pytest.mark.parametrize("case", HYBRIDS)
def test_the_hybrid_decodes_what_it_reads(case: str) -> None:
    model, ids = hybrid(**HYBRIDS[case]), draw_ids(2, N)
    kind = "zoo_state" if case == "combined" else "zoo_history"
    assert model.config.layer_types == [kind, "full_attention", kind]
    mixer = model.backbone.layers[0].mixer
    assert (mixer.in_proj is None) == (case != "combined")
    assert "decay_value" not in dict(mixer.named_parameters())
    whole, cache, logits = model(ids, use_cache=False).logits, DynamicCache(config=model.config), []
    for piece in ids.split([5, 1, 1, 4, 1], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_repeat_is_state_space_duality() -> None:
    """Its matrix is that of a scan with a state of one number."""
    mixer = hybrid(mixing="column_repeat").backbone.layers[0].mixer
    matrix = mixer.hidden_attention(torch.zeros(1, 9, 16), make_sequence(1, 9, torch.device("cpu")))
    decay = mixer.decay_value.log().expand(1, 9, 1)
    weight = mixer.weight[0, :9].view(1, 9, 1, 1)
    torch.testing.assert_close(matrix, ssd_matrix(decay, torch.ones_like(weight), weight))
