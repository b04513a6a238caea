"""Checkpoints of Toeplitz mixers and structured recurrent mixers, from their published names, and what they compute.

Written from the papers' formulas (arXiv 2605.06683 and 2605.08696; names as in ethan-w-roland/ToeplitzMixers@6a67297
and blbadger/mrm@b06563e), in float64, recurrences token by token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from masked_mixers import (
    INNER,
    LAYERS,
    D,
    Kind,
    N,
    Shapes,
    V,
    Weights,
    apply_linear,
    blocks_of,
    every,
    layer_norm,
    linear,
    norm,
    rms_norm,
    within,
)
from torch import Tensor

# ToeplitzMixers from 003 on, and mrm


def taps(x: Tensor, matrices: Tensor, left: int) -> Tensor:
    """(B, N, C) of (B, N, C) and (K, N, N): y_i[c] = sum_t sum_j M_tij x_j[c + t - left]."""
    padded = F.pad(x, (left, len(matrices) - 1 - left))
    width = x.shape[-1]
    return torch.stack([matrix @ padded[..., t : t + width] for t, matrix in enumerate(matrices)]).sum(0)


def distances(weights: Tensor) -> Tensor:
    """(..., N, N) with the (..., N) weights by distance."""
    matrix = torch.zeros(*weights.shape, weights.shape[-1], dtype=weights.dtype)
    for target in range(weights.shape[-1]):
        for source in range(target + 1):
            matrix[..., target, source] = weights[..., target - source]
    return matrix


def recur(v: Tensor, decay: Tensor | float, x: Tensor, column: bool) -> Tensor:
    """A row or column repeat, token by token."""
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = decay * state + (x[:, t] if column else v[t] * x[:, t])
        rows.append(v[t] * state if column else state)
    return torch.stack(rows, 1)


def decay_of(weights: Weights, name: str, index: int, stretch: int) -> Tensor | float:
    value = weights.get(f"{name}decay_value")
    return 1.0 if value is None else value.flatten()[index].clip(0.9, 1.0) ** (1 / stretch)


def one_head(kind: str, stretch: int) -> Callable[[Weights, str, Tensor], Tensor]:
    """A head's or the headless mixing without projections. "combined/2": its rows, and not the exponent of their decay,
    are divided by 2."""
    kind, _, divided = kind.partition("/")

    def mix(weights: Weights, name: str, x: Tensor) -> Tensor:
        v, bias = weights[f"{name}weight"], weights[f"{name}bias"][:, None]
        if kind == "toeplitz":
            return taps(x, distances(v), len(v) - 1) + bias
        if kind == "combined":
            rows = recur(v[0], decay_of(weights, name, 0, 1), x, column=False) / int(divided or 1)
            return rows + recur(v[1], decay_of(weights, name, 1, stretch), x, column=True) + bias
        if kind == "kernel":
            decay, left = decay_of(weights, name, 1, stretch), len(v) - 1
            shifted = F.pad(x, (left, 0))
            parts = [recur(v[t], decay, shifted[..., t : t + x.shape[-1]], column=True) for t in range(len(v))]
            return torch.stack(parts).sum(0) + bias
        return recur(v[0], decay_of(weights, name, 0, stretch), x, kind == "column") + bias

    return mix


def separate_heads(kinds: list[str], stretch: int, projected: bool) -> Callable[[Weights, str, Tensor], Tensor]:
    def mix(weights: Weights, name: str, x: Tensor) -> Tensor:
        parts = []
        for head, kind in enumerate(kinds):
            width = D // len(kinds)
            inputs = x[..., head * width : (head + 1) * width]
            if projected:
                inputs = apply_linear(weights, f"{name}proj_head.{head}", x)
            parts.append(one_head(kind, stretch)(weights, f"{name}mixer_heads.{head}.", inputs))
        y = torch.cat(parts, -1)
        return apply_linear(weights, f"{name}out_proj", y) if projected else y

    return mix


def parallel_heads(kinds: list[str], projected: bool = True) -> Callable[[Weights, str, Tensor], Tensor]:
    def mix(weights: Weights, name: str, x: Tensor) -> Tensor:
        x = apply_linear(weights, f"{name}in_proj", x) if projected else x
        parts = []
        for head, (kind, inputs) in enumerate(zip(kinds, x.chunk(len(kinds), -1), strict=True)):
            own = {part: weights[f"{name}mixer_heads.{part}"][head : head + 1] for part in ("weight", "bias")}
            own["bias"] = own["bias"][0]
            if f"{name}mixer_heads.decay_value" in weights:  # of two, the second one, for all
                own["decay_value"] = weights[f"{name}mixer_heads.decay_value"][1]
            parts.append(one_head(kind, 1)(own, "", inputs))
        y = torch.cat(parts, -1)
        return apply_linear(weights, f"{name}out_proj", y) if projected else y

    return mix


def mlp_mixer(
    weights_of_mixing: Shapes,
    mix: Callable[[Weights, str, Tensor], Tensor],
    last: int,
    settings: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
    **config: Any,
) -> Kind:
    """`last` is the number of the MLP's second layer: 3 where a dropout stands before it."""
    layer = "channel_mixing_layer."

    def forward(weights: Weights, ids: Tensor) -> Tensor:
        x = weights["input_layer.weight"][ids]
        for block in blocks_of(weights, "mixer_blocks"):
            hidden = F.silu(apply_linear(block, f"{layer}0", layer_norm(block, "channel_norm", x)))
            x = x + apply_linear(block, f"{layer}{last}", hidden)
            x = x + mix(block, "token_mixing_layer.", layer_norm(block, "token_norm", x))
        return x @ weights["output_layer.weight"].T

    block = norm("channel_norm") | linear(f"{layer}0", INNER, D) | linear(f"{layer}{last}", D, INNER)
    block |= norm("token_norm") | {f"token_mixing_layer.{key}": shape for key, shape in weights_of_mixing.items()}
    shapes = linear("input_layer", V, D, bias=False) | every("mixer_blocks", block)
    return Kind(shapes | linear("output_layer", V, D, bias=False), forward, settings, config, unused)


def vectors(rows: int, decays: tuple[int, ...] | None = None) -> Shapes:
    return {"weight": (rows, N), "bias": (N,)} | ({} if decays is None else {"decay_value": decays})


def several(count: int, rows: int, decays: tuple[int, ...] | None, projected: bool = True) -> Shapes:
    found = linear("out_proj", D, D) if projected else {}
    for head in range(count):
        found |= linear(f"proj_head.{head}", D // count, D) if projected else {}
        found |= {f"mixer_heads.{head}.{key}": shape for key, shape in vectors(rows, decays).items()}
    return found


def parallel(count: int, decays: tuple[int, ...] | None) -> Shapes:
    found = linear("in_proj", D, D) | linear("out_proj", D, D)
    found |= {"mixer_heads.weight": (count, N), "mixer_heads.bias": (count, N)}
    return found | ({} if decays is None else {"mixer_heads.decay_value": decays})


MIXED = ["column", "column", "row", "row"]
COLUMN_ROWS = {"mixing": "mixed_repeat", "num_heads": 4}
STRUCTURED = {
    "toeplitz": mlp_mixer(vectors(1), one_head("toeplitz", 1), 3, mixing="toeplitz", mlp_first=True, hidden_act="silu"),
    "toeplitz-kernel": mlp_mixer(vectors(3), one_head("toeplitz", 1), 3, mixing="toeplitz", kernel_size=3),
    "toeplitz-heads": mlp_mixer(
        several(3, 1, None), separate_heads(["toeplitz"] * 3, 1, True), 3, mixing="toeplitz", num_heads=3
    ),
    "toeplitz-parallel": mlp_mixer(
        parallel(2, None), parallel_heads(["toeplitz"] * 2), 3, mixing="toeplitz", num_heads=2, use_projections=True
    ),
    "toeplitz-said": mlp_mixer(vectors(1), one_head("toeplitz", 1), 2, ("mixing=toeplitz",), mixing="toeplitz"),
    "row": mlp_mixer(vectors(1), one_head("row", 1), 2, mixing="row_repeat", use_decay=False),
    "row-decay": mlp_mixer(vectors(1, (1,)), one_head("row", 1), 2, mixing="row_repeat", use_decay=True),
    "row-decay-stretched": mlp_mixer(
        vectors(1, (1,)), one_head("row", 3), 2, ("decay_constant=3",), mixing="row_repeat", use_decay=True
    ),
    "column": mlp_mixer(vectors(1), one_head("column", 1), 2, ("mixing=column_repeat",), mixing="column_repeat"),
    "kernel": mlp_mixer(vectors(3, (2, 1)), one_head("kernel", 1), 2, mixing="column_repeat", kernel_size=3),
    "kernel-stretched": mlp_mixer(
        vectors(2, (2, 1)), one_head("kernel", 2), 2, ("decay_constant=2",), mixing="column_repeat", kernel_size=2
    ),
    "column-heads": mlp_mixer(
        several(3, 1, None),
        separate_heads(["column"] * 3, 1, True),
        2,
        ("mixing=column_repeat",),
        mixing="column_repeat",
        num_heads=3,
        use_projections=True,
        use_decay=False,
    ),
    "mixed": mlp_mixer(several(4, 1, (1,)), separate_heads(MIXED, 1, True), 2, **COLUMN_ROWS, use_decay=True),
    "mixed-stretched": mlp_mixer(
        several(4, 1, (1,)), separate_heads(MIXED, 2, True), 2, ("decay_constant=2",), **COLUMN_ROWS
    ),
    "mixed-without-projections": mlp_mixer(
        several(4, 1, (1,), False), separate_heads(MIXED, 1, False), 2, **COLUMN_ROWS, use_projections=False
    ),
    "parallel": mlp_mixer(parallel(4, (2, 1)), parallel_heads(MIXED), 2, **COLUMN_ROWS, use_projections=True),
    "parallel-without-projections": mlp_mixer(
        parallel(4, (2, 1)),
        parallel_heads(MIXED, projected=False),
        2,
        ("use_projections=false",),
        tuple(
            f"mixer_blocks.{layer}.token_mixing_layer.{name}."
            for layer in range(LAYERS)
            for name in ("in_proj", "out_proj")
        ),
        **COLUMN_ROWS,
        use_projections=False,
    ),
    "combined": mlp_mixer(
        several(2, 2, (2, 1)), separate_heads(["combined"] * 2, 1, True), 2, mixing="combined_repeat", num_heads=2
    ),
    "combined-without-decay": mlp_mixer(
        several(2, 2, None),
        separate_heads(["combined"] * 2, 1, True),
        2,
        mixing="combined_repeat",
        num_heads=2,
        use_decay=False,
    ),
}


# ToeplitzMixers 001, 002 and 010

SMALLEST = torch.finfo(torch.float32).eps  # epsilon of a norm that is given none


def rms_mixer(
    names: dict[str, str], mixing: Shapes, mix: Callable[[Weights, Tensor], Tensor], act: Any, **rest: Any
) -> Kind:
    def forward(weights: Weights, ids: Tensor) -> Tensor:
        x = weights[f"{names['embedding']}.weight"][ids]
        for block in blocks_of(weights, "blocks"):
            x = x + mix(within(block, "mixer."), rms_norm(block[f"{names['mixer_norm']}.weight"], x, SMALLEST))
            normed = rms_norm(block[f"{names['mlp_norm']}.weight"], x, SMALLEST)
            x = x + apply_linear(block, "mlp.fc2", act(apply_linear(block, "mlp.fc1", normed)))
        x = rms_norm(weights[f"{names['norm']}.weight"], x, SMALLEST)
        return x @ weights[f"{names['head']}.weight"].T

    block: Shapes = {f"{names[name]}.weight": (D,) for name in ("mixer_norm", "mlp_norm")}
    block |= linear("mlp.fc1", INNER, D) | linear("mlp.fc2", D, INNER)
    block |= {f"mixer.{key}": shape for key, shape in mixing.items()}
    shapes = linear(names["embedding"], V, D, bias=False) | every("blocks", block) | {f"{names['norm']}.weight": (D,)}
    return Kind(shapes | linear(names["head"], V, D, bias=False), forward, **rest)


def fast_toeplitz(mixer: Weights, x: Tensor) -> Tensor:
    return distances(mixer["weight"]) @ x + mixer["bias"][:, None]


def optimised(mean: bool, positive: bool, projected: bool) -> Callable[[Weights, Tensor], Tensor]:
    def mix(mixer: Weights, x: Tensor) -> Tensor:
        v = mixer["weight_raw"].exp().add(1).log() if positive else mixer["weight"]
        x = apply_linear(mixer, "inp_proj", x) if projected else x
        parts = []
        for head, inputs in enumerate(x.chunk(len(v), -1)):
            y = distances(v[head]) @ inputs
            y = y / v[head].cumsum(0)[:, None] if mean else y
            parts.append(y + mixer["bias"][head][:, None])
        y = torch.cat(parts, -1)
        return apply_linear(mixer, "out_proj", y) if projected else y

    return mix


NAMES_002 = {"embedding": "inp_emb", "head": "out_emb", "norm": "norm", "mixer_norm": "norm1", "mlp_norm": "norm2"}
NAMES_010 = {"embedding": "inp_embed", "head": "out_embed", "norm": "out_norm"}
NAMES_010 |= {"mixer_norm": "mixer_norm", "mlp_norm": "mlp_norm"}
PROJECTIONS = linear("inp_proj", D, D) | linear("out_proj", D, D, bias=False)
RMS_NORMED: dict[str, Any] = {"norm_type": "rms_norm", "final_norm": True, "mlp_first": False}
VECTORS: Shapes = {"weight_raw": (3, N), "bias": (3, N)}


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


RMS = {
    "002": rms_mixer(
        NAMES_002,
        {"weight": (N,), "bias": (N,)},
        fast_toeplitz,
        F.silu,
        config={**RMS_NORMED, "mixing": "toeplitz", "hidden_act": "silu"},
    ),
    "010": rms_mixer(
        NAMES_010,
        VECTORS | PROJECTIONS,
        optimised(False, True, True),
        tanh_gelu,
        settings=("mean=false",),
        config={**RMS_NORMED, "mixing": "toeplitz", "num_heads": 3, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "010-mean": rms_mixer(
        NAMES_010,
        VECTORS | PROJECTIONS,
        optimised(True, True, True),
        tanh_gelu,
        settings=("mean=true",),
        config={**RMS_NORMED, "mixing": "dense", "num_heads": 3},
    ),
    "010-without-projections": rms_mixer(
        NAMES_010,
        {"weight": (3, N), "bias": (3, N)},
        optimised(False, False, False),
        tanh_gelu,
        settings=("mean=false",),
        config={**RMS_NORMED, "mixing": "toeplitz", "use_projections": False},
    ),
}
