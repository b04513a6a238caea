"""The matrices that `ssm-zoo show` reads: of every family, of encoders, encoder-decoders and models of transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, draw_ids, make_encoder_decoder, make_head, make_model
from native_configurations import tiny_native
from scored_models import tiny_llama
from transformers import AutoModelForMaskedLM, PreTrainedModel

from ssm_zoo.evaluation.attention_matrices import MANY_HEADS, AttentionStack, read_attention
from ssm_zoo.evaluation.attention_report import check_same_layers, describe_stack, rollouts
from ssm_zoo.evaluation.attention_statistics import head_statistics, row_shares
from ssm_zoo.modeling import RetrievalMixer, RetrievalMixerConfig

IDS = draw_ids(1, 9)
TARGET = draw_ids(1, 6, seed=1)


def outputs(model: PreTrainedModel, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(IDS, output_attentions=True, **inputs)


def check_stack(stack: AttentionStack, matrices: Any) -> None:
    """A stack must hold the matrices of a forward, or the mean of their shares."""
    there = {layer: matrix[0] for layer, matrix in enumerate(matrices) if matrix is not None}
    assert [each.layer for each in stack.layers] == list(there)
    assert stack.num_layers == len(matrices)
    for each in stack.layers:
        matrix = there[each.layer]
        assert each.num_heads == len(matrix) and each.mixer
        mean = row_shares(matrix).mean(0)
        torch.testing.assert_close(each.shares, mean)
        if len(matrix) > MANY_HEADS:
            assert each.heads is None
            torch.testing.assert_close(each.matrices, mean[None].float())
        else:
            assert each.heads == tuple(range(len(matrix)))
            assert torch.equal(each.matrices, matrix)
        for key, values in head_statistics(row_shares(matrix), each.start).items():
            if key in each.statistics:
                torch.testing.assert_close(each.statistics[key], values, equal_nan=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_matrices_a_report_and_a_rollout(name: str) -> None:
    model = make_model(name)
    (stack,) = read_attention(model, IDS)
    check_stack(stack, outputs(model).attentions)
    assert all(each.start == 1 for each in stack.layers)
    flow = rollouts([stack], "model")
    torch.testing.assert_close(flow.sum(-1), torch.ones(9, dtype=torch.float64))
    assert (flow >= 0).all() and not flow.triu(1).any()
    for row in describe_stack(stack, stack)["layers"]:
        assert all(value in (0.0, None) for value in row["to_teacher"]["js"]["heads"])
        assert all(value in (1.0, None) for value in row["to_teacher"]["same_top"]["heads"])


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_looks_ahead(name: str) -> None:
    model = make_head(AutoModelForMaskedLM, name)
    (stack,) = read_attention(model, IDS)
    check_stack(stack, outputs(model).attentions)
    assert all(each.start == 0 for each in stack.layers)
    assert rollouts([stack], "model").triu(1).any()


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_have_three_stacks(name: str) -> None:
    model = make_encoder_decoder(name)
    stacks = read_attention(model, IDS, TARGET)
    assert [stack.name for stack in stacks] == ["encoder", "decoder", "cross"]
    found = outputs(model, decoder_input_ids=TARGET)
    for stack, attribute in zip(stacks, ("encoder_attentions", "decoder_attentions", "cross_attentions"), strict=True):
        check_stack(stack, found[attribute])
    assert all(each.matrices.shape[1:] == (6, 9) and "distance" not in each.statistics for each in stacks[2].layers)
    (alone,) = read_attention(model, IDS)
    check_stack(alone, found.encoder_attentions)
    assert rollouts(stacks, "model").shape == (9, 9)
    with pytest.raises(ValueError, match=r"as many layers as MODEL \(encoder: \d, decoder: .*\), got encoder"):
        check_same_layers(stacks, [alone])


def test_chosen_channels_of_mamba_applied_to_the_values_are_its_scan() -> None:
    """y = M x before the gate, for channels of a layer that has too many to be kept all."""
    model = make_model("mamba", hidden_size=24)
    channels, seen = [0, 7, 47], {}
    mixer = model.backbone.layers[1].mixer
    hooks = [
        mixer.in_proj.register_forward_hook(lambda *call: seen.update(projected=call[2])),
        mixer.out_proj.register_forward_pre_hook(lambda _, inputs: seen.update(gated=inputs[0])),
    ]
    (stack,) = read_attention(model, IDS, layers=[1], heads=channels)
    for hook in hooks:
        hook.remove()
    (layer,) = stack.layers
    assert layer.num_heads == 48 and layer.heads == tuple(channels) and layer.signed
    with torch.no_grad():
        x, z = seen["projected"].chunk(2, dim=-1)
        x = mixer.conv1d(x)[0]
        y = torch.einsum("hls,sh->lh", layer.matrices, x[0, :, channels])
        torch.testing.assert_close(y * F.silu(z[0, :, channels]), seen["gated"][0, :, channels], rtol=0, atol=1e-5)
    assert stack.shares is not None and all(shares is not None for shares in stack.shares)


def test_many_heads_become_their_mean_also_where_the_model_pads_the_text() -> None:
    sizes = {"hidden_size": 40, "num_heads": 8, "kernel_size": 5}
    for name, changes in (
        ("mamba", {"hidden_size": 24}),
        ("mixer", sizes),
        ("mixer", {**sizes, "pad_mode": "as_trained", "pad_token_id": 0}),
    ):
        model = make_model(name, **changes)
        (stack,) = read_attention(model, IDS)
        check_stack(stack, outputs(model).attentions)
        assert all(each.heads is None and not each.signed for each in stack.layers)
        entropy = describe_stack(stack)["layers"][0]["entropy"]
        assert 0 < entropy["min"] < entropy["median"] < entropy["max"] and "heads" not in entropy


def test_attention_of_transformers_models() -> None:
    model = tiny_llama(0, attn_implementation="eager")
    (stack,) = read_attention(model, IDS, layers=[1], heads=[1])
    assert torch.equal(stack.layers[0].matrices[0], outputs(model).attentions[1][0, 1])
    torch.testing.assert_close(stack.layers[0].matrices.sum(-1), torch.ones(1, 9))
    (hybrid,) = read_attention(tiny_native("jamba", attn_implementation="eager"), IDS)
    assert [each.layer for each in hybrid.layers] == [1] and hybrid.num_layers == 2
    beside = read_attention(tiny_native("falcon_h1", attn_implementation="eager"), IDS)
    for stack in (hybrid, *beside):  # Mamba layers, alone or beside attention, return no matrix
        with pytest.raises(ValueError, match="`rollout` must be False for MODEL, as some of its layers return no"):
            rollouts([stack], "MODEL")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: tiny_native("mamba2"), "MODEL: a model of type mamba2 returns no attention", id="native"),
        pytest.param(lambda: make_model("mixer", expanded=True), "MODEL: .*an expanded mixer, which is", id="expanded"),
        pytest.param(
            lambda: RetrievalMixer(RetrievalMixerConfig(hidden_size=8, num_hidden_layers=1, max_position_embeddings=6)),
            "MODEL: a model of type retrieval_mixer reads query_embeds and no text",
            id="embeddings",
        ),
    ],
)
def test_models_without_matrices_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_attention(make(), IDS, field="MODEL")


def test_bad_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mamba2")
    with pytest.raises(ValueError, match=r"input_ids must be of shape \(1, L\) with L >= 2, got \(1, 1\)"):
        read_attention(model, IDS[:, :1])
    with pytest.raises(ValueError, match="layers: MODEL has the layers 0 to 1, got 2"):
        read_attention(model, IDS, layers=[2], field="MODEL")
    with pytest.raises(ValueError, match="heads: layer 0 of MODEL has the heads 0 to 3, got 4"):
        read_attention(model, IDS, heads=[4], field="MODEL")
    with pytest.raises(ValueError, match="heads: at most 32 heads can be shown one by one, got 33"):
        read_attention(model, IDS, heads=range(33))
    with pytest.raises(ValueError, match="target text needs an encoder-decoder, got a model of type zoo_mamba2"):
        read_attention(model, IDS, TARGET)
    half = make_model("half-blocks", mixer_types=["none", "full_attention", "none"], mlp_types=["gated"] * 3)
    with pytest.raises(ValueError, match=r"none of the chosen layers of model has a matrix, got \[0, 2\]"):
        read_attention(half, IDS, layers=[0, 2])
    (stack,) = read_attention(half, IDS)
    assert stack.shares is not None and [shares is None for shares in stack.shares] == [True, False, True]
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.fill_(torch.inf)
    with pytest.raises(ValueError, match="model: the matrices of layer 1 are not finite"):
        read_attention(model, IDS)
    monkeypatch.setattr("ssm_zoo.evaluation.attention_matrices._MOST_BYTES", 4000)
    with pytest.raises(ValueError, match=r"matrices of 9 tokens take about 0\.0 GiB.* Give at most 6 tokens"):
        read_attention(model, IDS)
