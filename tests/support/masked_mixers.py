"""Checkpoints of masked mixers, made from the published names and shapes, and what they compute.

The forwards are written from the paper's formulas (arXiv 2409.01482; names as in blbadger/maskedmixers@8f9515d,
blbadger/memorymodels@b5bbc77 and the transfixer branch of blbadger/transformers@009b486), in float64, and share nothing
with the package. Matrices are drawn whole: their upper triangles, which a forward does not read, are not zero, as in
files that the author's trainer writes. Those with structured matrices stand in `structured_mixers.py`.

Symbols: V vocabulary, D width, N positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

V, D, N, INNER, LAYERS = 37, 12, 10, 20, 2
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One of the authors' classes in one size.

    Attributes:
        shapes: keys and shapes of its checkpoint.
        forward: logits or hidden states of its weights, in float64, and (B, N) tokens or (B, N, D) rows.
        settings: what a reader has to be told.
        config: the fields of our configuration that must follow.
        unused: beginnings of the keys that the forward, or ours, does not need.
    """

    shapes: Shapes
    forward: Callable[[Weights, Tensor], Tensor]
    settings: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def tensors(kind: Kind, seed: int = 0) -> Weights:
    """Random weights of a size at which every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in kind.shapes.items():
        scale = shape[1] ** -0.5 if len(shape) > 1 and shape[0] > 1 else 0.3
        found[key] = torch.randn(shape, generator=generator) * scale
        if "norm" in key and key.endswith("weight"):
            found[key] += 1.0
        if "decay_value" in key:  # also on both sides of where it is clipped
            found[key] = 0.86 + 0.18 * torch.rand(shape, generator=generator)
    return found


def save(folder: Path, weights: Weights) -> Path:
    """Write a checkpoint: the weights and nothing else."""
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def outputs(kind: Kind, weights: Weights, inputs: Tensor) -> Tensor:
    """The forward in float64."""
    return kind.forward({key: tensor.double() for key, tensor in weights.items()}, inputs)


# Parts


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str) -> Shapes:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def every(prefix: str, block: Shapes, layers: int = LAYERS) -> Shapes:
    return {f"{prefix}.{layer}.{key}": shape for layer in range(layers) for key, shape in block.items()}


def within(weights: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def blocks_of(weights: Weights, prefix: str) -> list[Weights]:
    return [within(weights, f"{prefix}.{layer}.") for layer in range(LAYERS)]


def apply_linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weight: Tensor, x: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


# blbadger/maskedmixers


def feed_forward() -> Shapes:
    return norm("patch_layernorm") | linear("patch_ff.0", INNER, D) | linear("patch_ff.2", D, INNER)


def patch(block: Weights, x: Tensor) -> Tensor:
    hidden = F.gelu(apply_linear(block, "patch_ff.0", layer_norm(block, "patch_layernorm", x)))
    return x + apply_linear(block, "patch_ff.2", hidden)


def convolution(weights: Weights, name: str, x: Tensor, mask: Callable[[Tensor], Tensor] = torch.tril) -> Tensor:
    """Positions are the channels of a convolution that runs over the features."""
    weight = weights[f"{name}.weight"]
    weight = mask(weight if weight.dim() == 2 else weight.permute(2, 0, 1))
    weight = weight[..., None] if weight.dim() == 2 else weight.permute(1, 2, 0)
    return F.conv1d(x, weight, weights.get(f"{name}.bias"), padding="same")


def expanded_convolution(block: Weights, x: Tensor) -> Tensor:
    first, last = block["conv.0.weight"][..., 0].tril(), block["conv.2.weight"][..., 0].tril()
    hidden = F.conv1d(x, first[..., None], block.get("conv.0.bias"))
    return F.conv1d(F.gelu(hidden), last[..., None], block.get("conv.2.bias"))


def heads(name: str, count: int, kernel: int, legacy: bool) -> Shapes:
    found = linear(f"{name}.out_proj", D, D * count if legacy else D)
    for head in range(count):
        found |= linear(f"{name}.proj_head.{head}", D if legacy else D // count, D)
        found |= {f"{name}.convs.{head}.weight": (N, N, kernel), f"{name}.convs.{head}.bias": (N,)}
    return found


def multi_head(name: str, count: int, legacy: bool) -> Callable[[Weights, Tensor], Tensor]:
    def mix(block: Weights, x: Tensor) -> Tensor:
        parts = []
        for head in range(count):
            if legacy:  # a stale index: of every head the last convolution, and no projection
                parts.append(convolution(block, f"{name}.convs.{count - 1}", x))
            else:
                projected = apply_linear(block, f"{name}.proj_head.{head}", x)
                parts.append(convolution(block, f"{name}.convs.{head}", projected))
        return apply_linear(block, f"{name}.out_proj", torch.cat(parts, -1))

    return mix


def run_blocks(weights: Weights, prefix: str, x: Tensor, mix: Callable[[Weights, Tensor], Tensor]) -> Tensor:
    for block in blocks_of(weights, prefix):
        x = patch(block, x + mix(block, layer_norm(block, "seq_layernorm", x)))
    return x


def flat(block: Weights, x: Tensor) -> Tensor:
    return convolution(block, "conv", x)


def language_mixer(
    mixing: Shapes,
    mix: Callable[[Weights, Tensor], Tensor],
    more: Shapes | None = None,
    tied: bool = False,
    **rest: Any,
) -> Kind:
    def forward(weights: Weights, ids: Tensor) -> Tensor:
        x = run_blocks(weights, "mixerblocks", weights["wte.weight"][ids], mix)
        return x @ weights.get("lm_head.weight", weights["wte.weight"]).T

    shapes = linear("wte", V, D, bias=False) | every("mixerblocks", norm("seq_layernorm") | mixing | feed_forward())
    head = {} if tied else linear("lm_head", V, D, bias=False)
    return Kind(shapes | head | (more or {}), forward, **rest)


def conv(kernel: int = 1) -> Shapes:
    return {"conv.weight": (N, N, kernel), "conv.bias": (N,)}


def expanded(factor: float, bias: bool) -> Kind:
    wide = int(N * factor)
    shapes: Shapes = {"conv.0.weight": (wide, N, 1), "conv.2.weight": (N, wide, 1)}
    shapes |= {"conv.0.bias": (wide,), "conv.2.bias": (N,)} if bias else {}
    return language_mixer(shapes, expanded_convolution, config={"expanded": True})


def autoencoder(mixing: Shapes, mix: Callable[[Weights, Tensor], Tensor], **rest: Any) -> Kind:
    """Hidden states of the encoder; the decoder's are of another width, to show that nothing is read there."""
    block = norm("seq_layernorm") | mixing | feed_forward()
    more = linear("down", D // 4, D) | linear("up", D, D // 4) | linear("projection", D, D // 2)
    more |= every("decoderblocks", block, LAYERS + 1) | linear("lm_head", V, D, bias=False)
    return Kind(
        linear("wte", V, D, bias=False) | every("encoderblocks", block) | more,
        lambda weights, ids: run_blocks(weights, "encoderblocks", weights["wte.weight"][ids], mix),
        unused=("decoderblocks.", "down.", "up.", "projection.", "lm_head."),
        **rest,
    )


def bidirectional() -> Kind:
    def forward(weights: Weights, ids: Tensor) -> Tensor:
        back = ahead = weights["wte.weight"][ids]
        for block in blocks_of(weights, "mixerblocks"):
            back = back + convolution(block, "convf", layer_norm(block, "seq_layernormf", back))
            later = layer_norm(block, "seq_layernormr", ahead)
            ahead = ahead + convolution(block, "convr", later, lambda weight: weight.triu(2))
            back, ahead = patch(block, back), patch(block, ahead)
        return (back + ahead) @ weights["lm_head.weight"].T

    block = norm("seq_layernormf") | norm("seq_layernormr") | feed_forward()
    block |= {"convf.weight": (N, N, 1), "convf.bias": (N,), "convr.weight": (N, N, 1), "convr.bias": (N,)}
    shapes = linear("wte", V, D, bias=False) | every("mixerblocks", block) | linear("lm_head", V, D, bias=False)
    return Kind(shapes, forward, config={"bidirectional": True, "lookahead": 2})


def retrieval() -> Kind:
    """Scores of N - 1 candidates for the query in the first row; nothing is masked."""

    def forward(weights: Weights, x: Tensor) -> Tensor:
        x = run_blocks(
            weights, "mixerblocks", x.double(), lambda block, x: convolution(block, "conv", x, lambda weight: weight)
        )
        return apply_linear(weights, "retrieval_head", x)[:, 1:, 0]

    shapes = every("mixerblocks", norm("seq_layernorm") | conv() | feed_forward()) | linear("retrieval_head", 1, D)
    return Kind(shapes, forward)


HEADS, KEY_VALUES, EPSILON = 3, 1, 1e-6
LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUES,
    "max_position_embeddings": 4 * N,
    "rms_norm_eps": EPSILON,
    "rope_theta": 100.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transfixer() -> Kind:
    """Llama with a convolution beside attention: both read what the first norm gives."""

    def forward(weights: Weights, ids: Tensor) -> Tensor:
        x = weights["model.embed_tokens.weight"][ids]
        for block in blocks_of(weights, "model.layers"):
            normed = rms_norm(block["input_layernorm.weight"], x, EPSILON)
            x = x + attention(within(block, "self_attn."), normed) + convolution(block, "mixer_layer.conv", normed)
            normed = rms_norm(block["post_attention_layernorm.weight"], x, EPSILON)
            hidden = F.silu(apply_linear(block, "mlp.gate_proj", normed)) * apply_linear(block, "mlp.up_proj", normed)
            x = x + apply_linear(block, "mlp.down_proj", hidden)
        return rms_norm(weights["model.norm.weight"], x, EPSILON) @ weights["lm_head.weight"].T

    width = D // HEADS
    block = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mixer_layer.conv.bias": (N,)}
    block |= linear("self_attn.q_proj", D, D, bias=False) | linear("self_attn.o_proj", D, D, bias=False)
    block |= linear("self_attn.k_proj", KEY_VALUES * width, D, bias=False)
    block |= linear("self_attn.v_proj", KEY_VALUES * width, D, bias=False)
    block |= linear("mlp.gate_proj", INNER, D, bias=False) | linear("mlp.up_proj", INNER, D, bias=False)
    block |= linear("mlp.down_proj", D, INNER, bias=False) | {"mixer_layer.conv.weight": (N, N, 1)}
    shapes = linear("model.embed_tokens", V, D, bias=False) | every("model.layers", block)
    shapes |= {"model.norm.weight": (D,)} | linear("lm_head", V, D, bias=False)
    return Kind(
        shapes,
        forward,
        settings=("num_attention_heads=3", "rope_theta=100"),
        config={"attention": "parallel", "num_attention_heads": 3, "num_key_value_heads": 1, "norm_eps": EPSILON},
    )


def attention(block: Weights, x: Tensor) -> Tensor:
    """Causal attention with grouped keys and values, turned in halves."""
    count, width = x.shape[1], D // HEADS
    angles = torch.arange(count)[:, None] * 100.0 ** (-torch.arange(width // 2) * 2.0 / width).double()
    turn = torch.polar(torch.ones_like(angles), angles)

    def heads_of(name: str) -> Tensor:
        return apply_linear(block, name, x).unflatten(-1, (-1, width)).transpose(1, 2)

    def turned(states: Tensor) -> Tensor:
        result = torch.complex(*states.chunk(2, -1)) * turn
        return torch.cat([result.real, result.imag], -1)

    scores = turned(heads_of("q_proj")) @ turned(heads_of("k_proj")).transpose(-1, -2) / width**0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
    return apply_linear(block, "o_proj", (scores.softmax(-1) @ heads_of("v_proj")).transpose(1, 2).flatten(2))


MASKED = {
    "flat": language_mixer(conv(), flat),
    "kernel-3": language_mixer(conv(3), flat, config={"kernel_size": 3}),
    "kernel-4": language_mixer(conv(4), flat, config={"kernel_size": 4}),
    "tied": language_mixer(conv(), flat, tied=True, config={"tie_word_embeddings": True}),
    "linear": language_mixer({"conv.weight": (N, N), "conv.bias": (N,)}, flat),
    "heads": language_mixer(
        heads("mixerhead", 3, 1, False),
        multi_head("mixerhead", 3, False),
        linear("wte_second", D, D),
        config={"num_heads": 3, "use_projections": True},
        unused=("wte_second.",),
    ),
    "heads-in-conv": language_mixer(
        heads("conv", 2, 3, False), multi_head("conv", 2, False), config={"num_heads": 2, "kernel_size": 3}
    ),
    "legacy": language_mixer(
        heads("mixerhead", 3, 1, True),
        multi_head("mixerhead", 3, True),
        config={"num_heads": 1, "use_projections": True},
        unused=tuple(
            f"mixerblocks.{layer}.mixerhead.{part}"
            for layer in range(LAYERS)
            for part in ("proj_head.", "convs.0.", "convs.1.")
        ),
    ),
    "expanded": expanded(1, bias=False),
    "expanded-2": expanded(2, bias=True),
    "expanded-half": expanded(0.5, bias=True),
    "autoencoder": autoencoder(conv(), flat, config={"kernel_size": 1}),
    "autoencoder-heads": autoencoder(heads("conv", 2, 1, False), multi_head("conv", 2, False), config={"num_heads": 2}),
    "bidirectional": bidirectional(),
    "transfixer": transfixer(),
}
