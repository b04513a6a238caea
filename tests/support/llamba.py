"""Checkpoints in the layout of Cartesia's Llamba, made from the published names and shapes, and what they compute.

The forward is written from the recurrence of discrete Mamba-2 (arXiv 2408.10189, section 4; the mixer as in
cartesia-ai/edge@95d8276), in float64, token by token, and shares nothing with the package.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

LLAMBA = {
    "model_type": "llamba",
    "architectures": ["LlambaLMHeadModel"],
    "vocab_size": 59,  # 64 rows
    "d_model": 24,
    "tie_embeddings": False,
    "pad_vocab_size_multiple": 8,
    "lm_head_bias": False,
    "n_layer": 2,
    "lm_head_prenorm": "rms",
    "resid_dropout": 0.0,
    "norm_epsilon": 1e-5,
    "mlp_cfg": {"intermediate_size": 40, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": 5,
        "n_v_heads": 4,
        "n_qk_heads": 4,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    },
}
TIED = {**LLAMBA, "tie_embeddings": True, "ssm_cfg": {**LLAMBA["ssm_cfg"], "expand": 2, "d_conv": 3}}
BIASES = {**LLAMBA, "mlp_cfg": {"intermediate_size": 40, "bias": True, "act_fn": "gelu"}}
BIASES["ssm_cfg"] = {**LLAMBA["ssm_cfg"], "bias": True}
# What the code takes where config.json says nothing else; d_model as its docstring has it.
LLAMBA_8B = {"model_type": "llamba", "vocab_size": 128256, "d_model": 4096, "n_layer": 32}
LLAMBA_8B["mlp_cfg"] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
LLAMBA_8B["ssm_cfg"] = {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "expand": 1, "activation": "identity"}
PHI_MAMBA = {
    "LanguageModel": {"input": {"vocab_size": 51200, "pad_vocab_size_multiple": 8}},
    "MixerModel": {"input": {"d_model": 2048, "n_layer": 24, "lm_head_prenorm": "layer"}},
    "Block1": {
        "n_layers": 24,
        "BlockType": "modules.phi_block",
        "block_input": {"resid_dropout": 0.0},
        "CoreType": "modules.mixers.discrete_mamba2",
        "core_input": {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "activation": "identity"},
    },
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape."""
    width, multiple, mlp, ssm = config["d_model"], 8, config["mlp_cfg"], config["ssm_cfg"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    inner, heads, wide = ssm["expand"] * width, ssm["n_v_heads"], mlp["intermediate_size"]
    channels = inner + 2 * heads * ssm["d_state"]
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "mixer.in_proj.weight": (channels + inner + heads, width),
        "mixer.conv1d.weight": (channels, 1, ssm.get("d_conv", 4)),
        "mixer.conv1d.bias": (channels,),
        "mixer.D": (heads,),
        "mixer.out_proj.weight": (width, inner),
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    if ssm.get("bias"):
        block |= {"mixer.in_proj.bias": (channels + inner + heads,), "mixer.out_proj.bias": (width,)}
    else:
        block["mixer.z_bias"] = (inner,)
    if mlp["bias"]:
        block |= {"mlp.gate_proj.bias": (wide,), "mlp.up_proj.bias": (wide,), "mlp.down_proj.bias": (width,)}
    found: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (rows, width)}
    for layer in range(config["n_layer"]):
        found |= {f"backbone.layers.{layer}.{key}": shape for key, shape in block.items()}
    found["backbone.final_layernorm.weight"] = (width,)
    return found | ({} if config.get("tie_embeddings") else {"lm_head.weight": (rows, width)})


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a size at which every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes(config).items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.3
        found[key] = torch.randn(shape, generator=generator) * scale
        if "norm" in key or key.endswith("z_bias"):
            found[key] += 1.0
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
    activation = getattr(F, config["mlp_cfg"]["act_fn"])
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        block = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        hidden = hidden + _mixer(config["ssm_cfg"], block, _norm(hidden, block["input_layernorm.weight"]))
        normed = _norm(hidden, block["post_attention_layernorm.weight"])
        gate, up = (_project(block, f"mlp.{name}_proj", normed) for name in ("gate", "up"))
        hidden = hidden + _project(block, "mlp.down_proj", activation(gate) * up)
    head = weights.get("lm_head.weight", weights["backbone.embedding.weight"])
    return _norm(hidden, weights["backbone.final_layernorm.weight"]) @ head.T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _project(block: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, block[f"{name}.weight"], block.get(f"{name}.bias"))


def _mixer(ssm: dict[str, Any], block: dict[str, Tensor], u: Tensor) -> Tensor:
    """The state decays by `exp(-s)` and takes `s (x / s) B^T` in, with s the softplus of the last rows of in_proj."""
    heads, states = ssm["n_v_heads"], ssm["d_state"]
    inner = block["mixer.out_proj.weight"].shape[1]
    channels = inner + 2 * heads * states
    mixed, z, a = _project(block, "mixer.in_proj", u).split([channels, inner, heads], dim=-1)
    taps, steps, outputs = block["mixer.conv1d.weight"][:, 0], F.softplus(a)[..., None], []
    mixed = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    state = torch.zeros(u.shape[0], heads, inner // heads, states, dtype=torch.float64)
    for t in range(u.shape[1]):
        window = mixed[:, t : t + taps.shape[1]].transpose(1, 2)
        token = (window * taps).sum(-1) + block["mixer.conv1d.bias"]
        x, B, C = token.split([inner, heads * states, heads * states], dim=-1)
        x, B, C = (part.unflatten(-1, (heads, -1)) for part in (x, B, C))
        step = steps[:, t]
        state = torch.exp(-step)[..., None] * state + (step * (x / step))[..., None] * B[:, :, None]
        y = (state * C[:, :, None]).sum(-1) + block["mixer.D"][:, None] * x
        outputs.append(y.flatten(1))
    gate = F.silu(z + block.get("mixer.z_bias", 0))
    return _project(block, "mixer.out_proj", torch.stack(outputs, dim=1) * gate)
