"""Taipan: what its equations say, against a loop over tokens, and what its configuration refuses."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import draw_ids, make_config, make_head
from huggingface_hub.errors import StrictDataclassError
from selective_models import WINDOW, block_of, make_model, sequence_of, states
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from ssm_zoo.kernels.window_attention import window_attention
from ssm_zoo.modeling import TaipanConfig, TaipanForCausalLM, preset, selective_attention
from ssm_zoo.modeling.modeling_taipan import SelectiveAttentionBlock
from ssm_zoo.modeling.outputs import routing_outputs
from with_triton import NEEDS_TRITON, with_triton


def margins(block: SelectiveAttentionBlock, h: Tensor) -> Tensor:
    """The margins of (..., D) states."""
    x = F.rms_norm(h, h.shape[-1:], block.input_layernorm.weight, block.input_layernorm.eps)
    scores = block.mixer.gate(x)
    return scores[..., 1] - scores[..., 0]


def with_slope(threshold: float, margin: Tensor, tau: float) -> Tensor:
    """The threshold, with the derivative of t in sum sigmoid((margin - t) / tau) = constant."""
    slope = torch.tensor([math.cosh((z - threshold) / (2 * tau)) ** -2 for z in margin.flatten().tolist()]).to(margin)
    return threshold + ((slope / slope.sum()) * (margin - margin.detach()).flatten()).sum()


def by_the_equations(
    block: SelectiveAttentionBlock, h: Tensor, noise: Tensor, threshold: Tensor | float, *, dense: bool, source: str
) -> Tensor:
    """Equations 1 to 6 for (L, D) states, token by token; `noise` (L) is added to the margin, none in evaluation."""
    mixer = block.mixer
    x = F.rms_norm(h, h.shape[-1:], block.input_layernorm.weight, block.input_layernorm.eps)
    raw = margins(block, h)
    margin = raw - threshold
    soft = ((margin + noise) / mixer.tau).sigmoid()
    hard = (margin + noise > 0).double()
    m = hard + soft - soft.detach() if block.training else hard
    a = 1 / (1 + (-raw).exp())
    groups = mixer.num_heads // mixer.num_kv_heads
    rows = []
    for t in range(len(h)):
        if not (dense or hard[t]):
            rows.append(h[t])
            continue
        seen = [s for s in range(max(0, t - mixer.window + 1), t + 1) if source == "all" or hard[s]]
        q = mixer.q_proj(x[t]).view(mixer.num_heads, mixer.head_dim)
        k = mixer.k_proj(x[seen]).view(len(seen), mixer.num_kv_heads, mixer.head_dim).repeat_interleave(groups, 1)
        v = mixer.v_proj(x[seen]).view(len(seen), mixer.num_kv_heads, mixer.head_dim).repeat_interleave(groups, 1)
        weights = (torch.einsum("hp,shp->hs", q, k) / math.sqrt(mixer.head_dim)).softmax(-1)
        o = mixer.o_proj(torch.einsum("hs,shp->hp", weights, v).flatten())
        rows.append(h[t] + m[t] * a[t] * ((o - h[t]) if block.convex else o))
    h = torch.stack(rows)
    x = F.rms_norm(h, h.shape[-1:], block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
    mlp = block.mlp
    return h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def noise_of(seed: int, *shape: int) -> Tensor:
    """What the gate draws after `torch.manual_seed(seed)`, for float64 scores."""
    torch.manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64).clamp(1e-7, 1 - 1e-7).logit()


def gradients(block: SelectiveAttentionBlock, output: Tensor, h: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    named = dict(block.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), [h, *named.values()])
    return dict(zip(["h", *named], found, strict=True))


# The seven tests that pin the architecture


@pytest.mark.parametrize(
    ("source", "dense"),
    [("all", False), ("all", True), ("selected", False)],
    ids=["gathered", "dense", "selected-keys"],
)
@pytest.mark.parametrize("fusion", ["convex", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("selection", ["capacity", "gumbel"])
def test_the_block_is_its_equations_in_value_and_every_gradient(
    selection: str, source: str, fusion: str, dense: bool, training: bool
) -> None:
    block = block_of(
        sal_selection=selection,
        sal_key_source=source,
        sal_fusion=fusion,
        sal_dense_training=dense,
        gumbel_tau=0.7,
        attention_capacity=0.4,
    )
    block.train(training)
    with torch.no_grad():
        block.mixer.gate.weight.mul_(4)
        block.mixer.gate.bias.zero_()
        if selection == "capacity":
            block.mixer.threshold.fill_(0.3)
    h = states(2, 17, 16).requires_grad_()
    torch.manual_seed(5)
    output, _, _, decision = block(h, sequence_of(17))
    noise = torch.zeros(2, 17, dtype=torch.float64)
    threshold = 0.3 if selection == "capacity" else 0.0
    if training and selection == "capacity":
        threshold = with_slope(0.3, margins(block, h), 0.7)
    elif training:
        noise = noise_of(5, 2, 17)
    expected = torch.stack(
        [
            by_the_equations(block, row, drawn, threshold, dense=dense and training, source=source)
            for row, drawn in zip(h, noise, strict=True)
        ]
    )
    assert 0.2 < decision.mean() < 0.8  # some attend, some do not
    torch.testing.assert_close(output, expected)
    actual, wanted = gradients(block, output, h), gradients(block, expected, h)
    for name, gradient in wanted.items():
        if training:
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_dense_training_changes_gradients_and_no_value() -> None:
    blocks = [block_of(sal_dense_training=dense) for dense in (False, True)]
    results = []
    for block in blocks:
        with torch.no_grad():
            block.mixer.gate.bias.zero_()
        h = states(2, 11, 16).requires_grad_()
        torch.manual_seed(1)
        output = block(h, sequence_of(11))[0]
        results.append((output, gradients(block, output, h)["mixer.gate.weight"]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["taipan", "taipan-options"])
def test_decoding_far_beyond_the_window_is_the_whole(name: str) -> None:
    """Forty tokens and a window of five: whatever is kept has been replaced eight times."""
    model, ids = make_model(name, seed=2), draw_ids(2, 40)
    with torch.no_grad():
        whole = model(ids)
        cache, logits = None, []
        for token in ids.split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-5)
    rates = whole.selection_rate
    assert len(rates) == len(model.config.sal_layer_idx) and ((rates > 0.1) & (rates < 0.9)).all()
    for index in model.config.sal_layer_idx:
        assert cache.layers[index].keys.shape[2] == WINDOW - 1


@pytest.mark.parametrize("fusion", ["convex", "residual"])
def test_where_no_token_attends_only_the_mlp_is_left(fusion: str) -> None:
    block = block_of(sal_fusion=fusion).eval()
    with torch.no_grad():
        block.mixer.gate.bias.copy_(torch.tensor([50.0, -50.0]))
        h = states(2, 9, 16)
        output, _, _, decision = block(h, sequence_of(9))
        x = F.rms_norm(h, (16,), block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
        assert not decision.any()
        torch.testing.assert_close(output, h + block.mlp(x))


def test_where_the_gate_is_sure_the_output_of_attention_replaces_the_stream() -> None:
    block = block_of().eval()
    with torch.no_grad():
        block.mixer.gate.bias.copy_(torch.tensor([-50.0, 50.0]))
        h = states(1, 9, 16)
        x = block.input_layernorm(h)
        update, _, _, decision = block.mixer(x, sequence_of(9, 1), stream=h)
        q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in proj(block))
        row = torch.arange(9)
        mask = (row[:, None] >= row) & (row[:, None] - row < WINDOW)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        assert decision.all()
        torch.testing.assert_close(h + update, block.mixer.o_proj(o))


def proj(block: SelectiveAttentionBlock) -> Iterator[torch.nn.Module]:
    yield from (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj)


def test_capacity_loss_of_known_choices() -> None:
    """Two layers, three rows, the last of padding alone."""
    first = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    second = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]) == 1
    scores = torch.zeros(3, 5, 2)
    found = routing_outputs([(scores, first), (scores, second)], real, [0.25, 0.25])
    rows = [(0.25 - 2 / 5) ** 2 + (0.25 - 1) ** 2, (0.25 - 1 / 2) ** 2 + 0.25**2]
    assert found["aux_loss"].item() == pytest.approx(sum(rows) / 2)
    assert found["selection_rate"].tolist() == pytest.approx([3 / 7, 5 / 7])
    assert len(found["router_logits"]) == 2
    unpadded = routing_outputs([(scores[:2], second[:2])], None, [0.25])
    assert unpadded["aux_loss"].item() == pytest.approx(((0.25 - 1) ** 2 + 0.25**2) / 2)


def test_padding_is_no_token_of_the_capacity_loss() -> None:
    model = make_model("taipan", sal_selection="gumbel")
    rows = [draw_ids(1, length, seed=length) for length in (9, 4)]
    ids, mask = torch.full((2, 12), 7), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask)
        alone = [model(row) for row in rows]
    assert padded.aux_loss.item() == pytest.approx(sum(o.aux_loss.item() for o in alone) / 2, abs=1e-6)
    chosen = sum(o.selection_rate * row.shape[1] for o, row in zip(alone, rows, strict=True))
    torch.testing.assert_close(padded.selection_rate, chosen / 13)


def test_layers_on_different_devices_have_one_output() -> None:
    """Two devices, as `device_map` gives them; the second one has shapes and no values."""
    choices = [(torch.zeros(2, 3, 2, device=device), torch.ones(2, 3, device=device)) for device in ("cpu", "meta")]
    for real in (None, torch.ones(2, 3, dtype=torch.bool)):
        found = routing_outputs(choices, real, [0.5, None])
        assert found["selection_rate"].device.type == found["aux_loss"].device.type == "meta"
        assert found["selection_rate"].shape == (2,) and len(found["router_logits"]) == 2


def test_evaluation_is_deterministic_and_training_with_noise_is_not() -> None:
    model, ids = make_model("taipan", sal_selection="gumbel"), draw_ids(2, 30)
    with torch.no_grad():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first, second = model(ids), model(ids)
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(torch.get_rng_state(), before)  # no noise is drawn
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
    for scores in first.router_logits:  # at inference every selected token is more than half sure
        chosen = scores[..., 1] > scores[..., 0]
        assert 0 < chosen.float().mean() < 1
        assert (scores.softmax(-1)[..., 1][chosen] > 0.5).all()


def test_the_capacity_loss_reaches_the_gate_from_tokens_that_pass_by() -> None:
    model = make_model("taipan", sal_selection="gumbel").train()
    torch.manual_seed(0)
    output = model(draw_ids(2, 12))
    (gradient,) = torch.autograd.grad(output.aux_loss, output.router_logits[0])
    torch.manual_seed(0)
    chosen = model(draw_ids(2, 12)).selection_rate
    assert 0 < chosen < 1
    assert (gradient.abs() > 0).all()
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1])
    assert (gradient[..., 1].sum() > 0) == (chosen.item() > model.config.attention_capacity)


# Losses


def test_labels_add_the_weighted_capacity_loss_while_training_alone() -> None:
    model, ids = make_model("taipan", sal_selection="gumbel", router_aux_loss_coef=0.7), draw_ids(2, 12)
    language = model(ids, labels=ids).loss
    assert language.item() == pytest.approx(
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )
    model.train()
    torch.manual_seed(0)
    output = model(ids, labels=ids)
    language = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, language + 0.7 * output.aux_loss)
    assert model(ids).loss is None and model(ids).aux_loss > 0


def test_a_step_of_several_calls_adds_the_capacity_loss_once() -> None:
    """With `num_items_in_batch` the parts of a step are summed: here equal halves of the same rows."""
    model = make_model("taipan", sal_selection="gumbel", gumbel_tau=1.0).train()
    ids = draw_ids(1, 12)
    torch.manual_seed(0)
    whole = model(ids, labels=ids)
    torch.manual_seed(0)
    half = model(ids, labels=ids, num_items_in_batch=2 * 11)
    torch.testing.assert_close(2 * half.loss, whole.loss)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads_add_the_capacity_loss(auto: Any) -> None:
    model, ids = make_head(auto, "taipan", num_labels=3, sal_selection="gumbel"), draw_ids(2, 7)
    model.train()
    labels = torch.tensor([1, 2]) if auto is AutoModelForSequenceClassification else ids % 3
    losses = []
    for coefficient in (0.0, 2.0):
        model.config.router_aux_loss_coef = coefficient
        torch.manual_seed(4)
        losses.append(model(ids, labels=labels).loss)
    torch.manual_seed(4)
    aux = model.backbone(ids).aux_loss
    torch.testing.assert_close(losses[1] - losses[0], 2 * aux)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found: list[Any] = []
    thresholds: list[Any] = []
    for checkpointing in (False, True):
        model, ids = make_model("taipan").train(), draw_ids(2, 12)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients)
        thresholds.append(model.backbone.layers[2].mixer.threshold)
    assert thresholds[0] == thresholds[1] != 0
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# The kernel inside the model


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["taipan", "taipan-options"])
def test_triton_gives_the_logits_and_every_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for op in (window_attention, with_triton(window_attention)):
        monkeypatch.setattr(selective_attention, "window_attention", op)
        model, ids = make_model(name).train(), draw_ids(2, 19)
        torch.manual_seed(0)
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    for key, gradient in found[0][1].items():
        assert gradient is not None and gradient.abs().max() > 0, key
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("chosen", ["none", "all", "one-row"])
def test_rows_with_none_and_rows_with_all_tokens_selected(chosen: str) -> None:
    model, ids = make_model("taipan"), draw_ids(2, 13)
    gate = model.backbone.layers[2].mixer.gate
    with torch.no_grad():
        if chosen == "one-row":  # decided by a token that stands in one row alone
            direction = torch.zeros(16)
            direction[0] = 100.0
            gate.weight.zero_()
            gate.weight[1], gate.bias[1] = direction, 0.0
        else:
            gate.bias.copy_(torch.tensor([0.0, 60.0 if chosen == "all" else -60.0]))
        output = model(ids)
        parts = [model(row[None]) for row in ids]
    rate = {"none": 0.0, "all": 1.0}.get(chosen)
    assert rate is None or output.selection_rate.item() == rate
    torch.testing.assert_close(output.logits, torch.cat([part.logits for part in parts]), rtol=0, atol=1e-5)


# Configuration


def test_blocks_of_selective_attention_follow_complete_groups() -> None:
    assert make_config("taipan", num_hidden_layers=9, sal_every=2).sal_layer_idx == [2, 5, 8]
    assert make_config("taipan", num_hidden_layers=8, sal_every=2).sal_layer_idx == [2, 5]
    config = TaipanConfig()
    assert config.sal_layer_idx == [6, 13, 20]
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (12, 64, 2048)
    assert config.layer_types.count("zoo_window") == 3


@pytest.mark.parametrize(
    ("name", "mamba", "selective", "published"),
    [("taipan-190m", 18, 3, 190e6), ("taipan-450m", 36, 6, 450e6), ("taipan-1.3b", 30, 5, 1.3e9)],
)
def test_presets_have_the_parameters_of_their_names(name: str, mamba: int, selective: int, published: float) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = TaipanForCausalLM(config)  # pyright: ignore[reportArgumentType]
    d, inner = config.hidden_size, 2 * config.hidden_size
    heads, maps = inner // 64, 2 * 128
    one = d * (2 * inner + maps + heads) + 5 * (inner + maps) + 3 * heads + inner + inner * d + d
    other = 4 * d * d + 2 * d + 2 + 3 * d * config.intermediate_size + 2 * d
    expected = config.vocab_size * d + mamba * one + selective * other + d
    assert model.num_parameters() == expected
    assert abs(expected / published - 1) < 0.02


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "window 0": ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
    "window negative": ({"sliding_window": -4}, "sliding_window must be at least 1, got -4"),
    "capacity 0": ({"attention_capacity": 0.0}, "attention_capacity must be above 0 and at most 1, got 0.0"),
    "capacity above 1": ({"attention_capacity": 1.5}, "attention_capacity must be above 0 and at most 1, got 1.5"),
    "capacity no number": (
        {"attention_capacity": math.nan},
        "attention_capacity must be above 0 and at most 1, got nan",
    ),
    "no attention layer": (
        {"sal_every": 3},
        r"sal_layer_idx must name a block of selective attention, got \[\].*sal_every = 3 ",
    ),
    "empty list": ({"sal_layer_idx": []}, r"sal_layer_idx must name a block of selective attention, got \[\]"),
    "layer outside": (
        {"sal_layer_idx": [1, 3]},
        r"sal_layer_idx must be increasing, from .* num_hidden_layers - 1 \(2\), got \[1, 3\]",
    ),
    "layer negative": ({"sal_layer_idx": [-1]}, r"sal_layer_idx must be increasing, from at least 0 .*got \[-1\]"),
    "layers out of order": ({"sal_layer_idx": [2, 1]}, r"sal_layer_idx must be increasing.*got \[2, 1\]"),
    "every 0": ({"sal_every": 0}, "sal_every must be at least 1, got 0"),
    "heads do not divide the width": (
        {"num_attention_heads": 3, "num_key_value_heads": None, "head_dim": None},
        r"num_attention_heads must divide hidden_size \(16\) if head_dim is not given, got 3",
    ),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    "groups of heads": (
        {"num_key_value_heads": 3},
        r"num_key_value_heads must divide num_attention_heads \(4\), got 3",
    ),
    "head width": ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    "temperature": ({"gumbel_tau": 0.0}, "gumbel_tau must be positive, got 0.0"),
    "coefficient": ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must not be negative, got -1.0"),
    "key source": ({"sal_key_source": "some"}, "sal_key_source must be one of all, selected, got 'some'"),
    "dense training without keys": (
        {"sal_dense_training": True, "sal_key_source": "selected"},
        "sal_key_source must be 'all' with sal_dense_training=True, got 'selected'",
    ),
    "fusion": ({"sal_fusion": "gated"}, "sal_fusion must be one of convex, residual, got 'gated'"),
    "mlp": ({"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
    "mamba heads": ({"mamba_head_dim": 5}, r"mamba_head_dim must divide expand \* hidden_size \(32\), got 5"),
    "convolution": ({"conv_kernel": 1}, "conv_kernel must be at least 2, got 1"),
    "groups": ({"n_groups": 3}, r"n_groups must divide num_heads \(4\), got 3"),
    "epsilon": ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_configuration_is_refused_by_name(case: str) -> None:
    changes, message = MALFORMED[case]
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        make_config("taipan", **changes)


def test_the_hybrid_refuses_the_same() -> None:
    for name in ("window 0", "capacity 0", "temperature", "coefficient", "key source"):
        changes, message = MALFORMED[name]
        with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
            make_config("selective-mamba2", **changes)
    make_config("mamba2-full", attention_capacity=0.0)  # nothing there reads it
