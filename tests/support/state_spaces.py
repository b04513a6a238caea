"""Checkpoints in the layout of state-spaces/mamba, made from the published names and shapes, and what they compute.

The forward is written from the papers' equations (arXiv 2312.00752, section 3; 2405.21060, sections 3 and 7), in
float64, token by token, and shares nothing with the package.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

MAMBA1 = {
    "d_model": 24,
    "n_layer": 2,
    "vocab_size": 59,  # 64 rows
    "ssm_cfg": {"d_state": 5},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MAMBA2 = {
    "d_model": 24,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 59,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
GROUPS = {**MAMBA2, "tie_embeddings": False}
GROUPS["ssm_cfg"] = {**MAMBA2["ssm_cfg"], "ngroups": 3, "d_conv": 3, "bias": True, "conv_bias": False}
GROUPS["ssm_cfg"]["dt_limit"] = [0.05, 0.9]
ATTENTION = {
    "causal": True,
    "head_dim": 10,
    "num_heads": 4,
    "num_heads_kv": 2,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "rotary_emb_dim": 6,
}
WITH_ATTENTION = {**MAMBA2, "n_layer": 3, "attn_layer_idx": [1], "attn_cfg": ATTENTION}
WITH_CONVOLUTION = {**WITH_ATTENTION, "attn_cfg": {**ATTENTION, "d_conv": 4}}  # as in mamba2attn-2.7b
WITH_MLP = {**MAMBA2, "d_intermediate": 100}
WITH_BOTH = {**WITH_ATTENTION, "d_intermediate": 128, "tie_embeddings": False}
WITH_BOTH["attn_cfg"] = {**ATTENTION, "qkv_proj_bias": True, "out_proj_bias": True, "rotary_emb_dim": 0}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape."""
    width, multiple = config["d_model"], config["pad_vocab_size_multiple"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    found: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (rows, width)}
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        found[prefix + "norm.weight"] = (width,)
        for name, shape in _mixer_shapes(config, layer).items():
            found[f"{prefix}mixer.{name}"] = shape
        if inner := config.get("d_intermediate"):
            inner = math.ceil(inner / 128) * 128
            found[prefix + "norm2.weight"] = (width,)
            found[prefix + "mlp.fc1.weight"], found[prefix + "mlp.fc2.weight"] = (2 * inner, width), (width, inner)
    return {**found, "backbone.norm_f.weight": (width,), "lm_head.weight": (rows, width)}


def _mixer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    width, ssm = config["d_model"], config["ssm_cfg"]
    if layer in config.get("attn_layer_idx", []):
        attention = config["attn_cfg"]
        heads, kv, size = attention["num_heads"], attention["num_heads_kv"], attention["head_dim"]
        found = {"in_proj.weight": ((heads + 2 * kv) * size, width), "out_proj.weight": (width, heads * size)}
        if kernel := attention.get("d_conv"):
            channels = (heads + 2 * kv) * size
            found |= {"conv1d.weight": (channels, 1, kernel), "conv1d.bias": (channels,)}
        biases = {"in_proj.bias": ((heads + 2 * kv) * size,), "out_proj.bias": (width,)}
        return found | (biases if attention["qkv_proj_bias"] else {})
    inner, kernel = 2 * width, ssm.get("d_conv", 4)
    states = ssm["d_state"]
    if ssm.get("layer") == "Mamba2":
        heads, maps = inner // ssm["headdim"], ssm.get("ngroups", 1) * states
        channels, rows = inner + 2 * maps, 2 * inner + 2 * maps + heads
        found = {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (inner,)}
    else:
        rank = math.ceil(width / 16)
        channels, rows = inner, 2 * inner
        found = {"A_log": (inner, states), "D": (inner,), "x_proj.weight": (rank + 2 * states, inner)}
        found |= {"dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,)}
    found |= {
        "in_proj.weight": (rows, width),
        "out_proj.weight": (width, inner),
        "conv1d.weight": (channels, 1, kernel),
    }
    if ssm.get("bias"):
        found |= {"in_proj.bias": (rows,), "out_proj.bias": (width,)}
    return found | ({"conv1d.bias": (channels,)} if ssm.get("conv_bias", True) else {})


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a size at which every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes(config).items():
        scale = shape[1] ** -0.5 if len(shape) == 2 and "A_log" not in key else 0.3
        found[key] = torch.randn(shape, generator=generator) * scale
        if "norm" in key:
            found[key] += 1.0
    if config.get("tie_embeddings", True):
        found["lm_head.weight"] = found["backbone.embedding.weight"].clone()
    return found


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Path:
    """Write a checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, folder / "model.safetensors")
    return folder


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(B, L, V) of (B, L), in float64."""
    weights = {key: tensor.double() for key, tensor in weights.items()}
    hidden = weights["backbone.embedding.weight"][ids]
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        block = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        mixer = {key.removeprefix("mixer."): tensor for key, tensor in block.items() if key.startswith("mixer.")}
        normed = _norm(hidden, block["norm.weight"])
        if layer in config.get("attn_layer_idx", []):
            hidden = hidden + _attention(config["attn_cfg"], mixer, normed)
        elif config["ssm_cfg"].get("layer") == "Mamba2":
            hidden = hidden + _mamba2(config["ssm_cfg"], mixer, normed)
        else:
            hidden = hidden + _mamba1(config["ssm_cfg"], mixer, normed)
        if config.get("d_intermediate"):
            up, gate = (_norm(hidden, block["norm2.weight"]) @ block["mlp.fc1.weight"].T).chunk(2, dim=-1)
            hidden = hidden + (up * F.silu(gate)) @ block["mlp.fc2.weight"].T
    return _norm(hidden, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _project(mixer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, mixer[f"{name}.weight"], mixer.get(f"{name}.bias"))


def _convolve(mixer: dict[str, Tensor], x: Tensor, activation: Any = F.silu) -> Tensor:
    weight, bias = mixer["conv1d.weight"], mixer.get("conv1d.bias")
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return activation(F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2))


def _mamba1(ssm: dict[str, Any], mixer: dict[str, Tensor], u: Tensor) -> Tensor:
    states, rank = ssm["d_state"], mixer["dt_proj.weight"].shape[1]
    x, z = _project(mixer, "in_proj", u).chunk(2, dim=-1)
    x = _convolve(mixer, x)
    low, B, C = _project(mixer, "x_proj", x).split([rank, states, states], dim=-1)
    dt, A = F.softplus(_project(mixer, "dt_proj", low)), -mixer["A_log"].exp()
    state, outputs = torch.zeros(*x.shape[::2], states, dtype=torch.float64), []
    for t in range(u.shape[1]):
        state = (dt[:, t, :, None] * A).exp() * state + (dt * x)[:, t, :, None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(outputs, dim=1) + mixer["D"] * x) * F.silu(z)
    return _project(mixer, "out_proj", y)


def _mamba2(ssm: dict[str, Any], mixer: dict[str, Tensor], u: Tensor) -> Tensor:
    inner, heads = mixer["norm.weight"].shape[0], mixer["A_log"].shape[0]
    groups, states = ssm.get("ngroups", 1), ssm["d_state"]
    z, xBC, dt = _project(mixer, "in_proj", u).split([inner, inner + 2 * groups * states, heads], dim=-1)
    x, B, C = _convolve(mixer, xBC).split([inner, groups * states, groups * states], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (m.unflatten(-1, (groups, states)).repeat_interleave(heads // groups, dim=2) for m in (B, C))
    dt = F.softplus(dt + mixer["dt_bias"]).clamp(*ssm.get("dt_limit", (0.0, math.inf)))
    A = -mixer["A_log"].exp()
    state, outputs = torch.zeros(x.shape[0], heads, x.shape[-1], states, dtype=torch.float64), []
    for t in range(u.shape[1]):
        decay = (dt[:, t] * A).exp()[:, :, None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = (torch.stack(outputs, dim=1) + mixer["D"][:, None] * x).flatten(2) * F.silu(z)
    grouped = y.unflatten(-1, (groups, -1))
    y = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * mixer["norm.weight"]
    return _project(mixer, "out_proj", y)


def _attention(config: dict[str, Any], mixer: dict[str, Tensor], u: Tensor) -> Tensor:
    heads, kv, size = config["num_heads"], config["num_heads_kv"], config["head_dim"]
    qkv = _project(mixer, "in_proj", u)
    if config.get("d_conv"):
        qkv = _convolve(mixer, qkv, activation=lambda x: x)
    q, k, v = qkv.split([heads * size, kv * size, kv * size], dim=-1)
    q, k, v = (m.unflatten(-1, (-1, size)).transpose(1, 2) for m in (q, k, v))
    q, k = _turn(q, config["rotary_emb_dim"]), _turn(k, config["rotary_emb_dim"])
    k, v = (m.repeat_interleave(heads // kv, dim=1) for m in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(size)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    y = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
    return _project(mixer, "out_proj", y.transpose(1, 2).flatten(2))


def _turn(x: Tensor, turned: int) -> Tensor:
    """Rotary positions on the first R channels: i with i + R / 2, by position / 10000^(2i / R)."""
    x = x.clone()
    half = turned // 2
    for i in range(half):
        angle = torch.arange(x.shape[2], dtype=torch.float64) / 10000 ** (2 * i / turned)
        a, b = x[..., i].clone(), x[..., half + i].clone()
        x[..., i], x[..., half + i] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return x
