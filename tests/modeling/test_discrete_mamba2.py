"""Discrete Mamba-2 against its definition, written out token by token from the formulas alone."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import draw_ids, make_model
from torch import Tensor

LENGTH = 11
VARIANTS = [
    pytest.param({}, id="phi-mamba"),
    pytest.param({"state_size": 9}, id="wide-state"),
    pytest.param({"ssm_rotary": True}, id="rotary"),
    pytest.param({"feature_map": "softplus"}, id="softplus"),
    pytest.param({"feature_map": "softplus", "normalize": True}, id="normalized"),
    pytest.param({"feature_map": "softplus", "normalize": True, "ssm_rotary": True}, id="everything"),
    pytest.param({"feature_map": "hedgehog"}, id="learned-features"),
    pytest.param({"feature_map": "hedgehog", "normalize": True, "ssm_rotary": True}, id="learned-features-normalized"),
    pytest.param({"attention_bias": True, "conv_kernel": 3}, id="biases"),
]


def make_mixer(changes: dict[str, Any]) -> tuple[Any, Any]:
    """The backbone of a model, and its first mixer."""
    options = {"feature_map": "identity", "conv_kernel": 4, "rope_parameters": None}
    model = make_model("discrete", **(options | changes))
    return model.backbone, model.backbone.layers[0].mixer


def rotate(vector: Tensor, position: int) -> Tensor:
    """(N) rotary embedding: entry i and entry i + N/2 turn by position / 10000^(2 i / N)."""
    half = vector.shape[0] // 2
    turned = vector.clone()
    for i in range(half):
        angle = position / 10000 ** (2 * i / vector.shape[0])
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def definition(mixer: Any, hidden_states: Tensor) -> Tensor:
    """(L, D) outputs for the (L, D) inputs of one row, in float64."""
    mixer = copy.deepcopy(mixer).double()
    H, P, N = mixer.num_heads, mixer.head_dim, mixer.state_size
    projected = hidden_states.double() @ mixer.in_proj.weight.T
    if mixer.in_proj.bias is not None:
        projected = projected + mixer.in_proj.bias
    taps, width = mixer.conv1d.weight[:, 0], mixer.conv1d.weight.shape[-1]
    features = 2 * N if mixer.feature_map == "hedgehog" else N
    outputs, state, row_sum = [], torch.zeros(H, P, features).double(), torch.zeros(H, features).double()
    for t, token in enumerate(projected):
        xBC = mixer.conv1d.bias.clone()
        for k in range(width):
            if t - k >= 0:
                xBC = xBC + taps[:, width - 1 - k] * projected[t - k, : xBC.shape[0]]
        x, B, C = xBC[: H * P], xBC[H * P : H * (P + N)], xBC[H * (P + N) :]
        z, a = token[xBC.shape[0] : -H], token[-H:]
        heads = []
        for h in range(H):
            x_h, B_h, C_h = x[h * P : (h + 1) * P], B[h * N : (h + 1) * N], C[h * N : (h + 1) * N]
            if mixer.rotary:
                B_h, C_h = rotate(B_h, t), rotate(C_h, t)
            if mixer.feature_map == "softplus":
                B_h, C_h = F.softplus(B_h), F.softplus(C_h)
            elif mixer.feature_map == "hedgehog":
                B_h, C_h = (
                    torch.cat([mapped.exp() / mapped.exp().sum(), (-mapped).exp() / (-mapped).exp().sum()])
                    for mapped in (B_h @ mixer.B_features[h], C_h @ mixer.C_features[h])
                )
            decay = torch.sigmoid(-(a[h] + mixer.dt_bias[h]))
            state[h] = decay * state[h] + x_h[:, None] * B_h[None, :]
            row_sum[h] = decay * row_sum[h] + B_h
            y = state[h] @ C_h
            if mixer.normalize:
                y = y / (row_sum[h] @ C_h)
            heads.append(y + mixer.D[h] * x_h)
        outputs.append(torch.cat(heads) * F.silu(z + mixer.z_bias))
    y = torch.stack(outputs) @ mixer.out_proj.weight.T
    return y if mixer.out_proj.bias is None else y + mixer.out_proj.bias


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_mixer_is_the_definition(changes: dict[str, Any]) -> None:
    backbone, mixer = make_mixer(changes)
    hidden_states = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, matrix = mixer(hidden_states, backbone.sequence_of(hidden_states))
        expected = torch.stack([definition(mixer, row) for row in hidden_states])
    assert matrix is None and expected.std() > 0.1
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)


def test_every_option_changes_the_answer() -> None:
    """Or the variants would test the same thing."""
    logits = []
    for variant in VARIANTS:
        model = make_model("discrete", **({"feature_map": "identity", "conv_kernel": 4} | variant.values[0]))
        logits.append(model(draw_ids(1, LENGTH)).logits)
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-3 for other in logits[:i])


@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=["weak-features", "strong-features"])
def test_normalized_rows_are_finite_whatever_the_features(scale: float) -> None:
    """Row sums that underflow, and features of very different sizes."""
    backbone, mixer = make_mixer({"feature_map": "softplus", "normalize": True})
    x = mixer.num_heads * mixer.head_dim
    with torch.no_grad():
        mixer.conv1d.bias[x:] = -40.0 if scale < 1 else 0.0
        hidden_states = scale * torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(0))
        hidden_states.requires_grad_()
    output, _ = mixer(hidden_states, backbone.sequence_of(hidden_states))
    assert output.isfinite().all()
    output.sum().backward()
    assert hidden_states.grad.isfinite().all()
