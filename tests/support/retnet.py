"""RetNet by its published equations, for one document in float64; shares nothing with the package.

Parallel form (arXiv 2307.08621, equations 5, 7 and 8, and section 2.2 for the normalisation of scores): a materialised
decay matrix. Layouts of parameters are those of the zoo, torchscale and flash-linear-attention.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes and options of a RetNet; `interleaved` says which channels of a head are rotated together."""

    heads: int
    kv_heads: int
    eps: float
    angles: Tensor
    interleaved: bool = False
    normalize: bool = True
    bidirectional: bool = False
    act: str = "silu"
    embed_scale: float = 1.0


def torchscale_angles(width: int) -> Tensor:
    """(P / 2) radians a token."""
    return 10000.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64)


def llama_angles(width: int, theta: float = 10000.0) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotated(x: Tensor, sizes: Sizes, first: int) -> Tensor:
    """(L, heads, P) times exp(i n theta), as complex numbers of pairs of channels."""
    if sizes.interleaved:
        real, imaginary = x[..., ::2], x[..., 1::2]
    else:
        real, imaginary = x.chunk(2, dim=-1)
    turn = torch.arange(first, first + len(x), dtype=torch.float64)[:, None] * sizes.angles
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(turn), turn)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def retention_matrix(q: Tensor, k: Tensor, sizes: Sizes, first: int = 0) -> Tensor:
    """(L, heads P) queries and (L, kv_heads P) keys to the (H, L, L) matrix R."""
    q, k = (rotated(x.unflatten(-1, (heads, -1)), sizes, first) for x, heads in ((q, sizes.heads), (k, sizes.kv_heads)))
    k = k[:, [h * sizes.kv_heads // sizes.heads for h in range(sizes.heads)]] * q.shape[-1] ** -0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(sizes.heads)], dtype=torch.float64)[:, None, None]
    decay = gamma ** distance.abs() * (sizes.bidirectional | (distance >= 0))
    if sizes.normalize:
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
    matrix = torch.einsum("nhp,mhp->hnm", q, k) * decay
    if sizes.normalize:
        matrix = matrix / matrix.sum(-1, keepdim=True).detach().abs().clamp(min=1)
    return matrix


def normed(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def retention(
    x: Tensor,
    weights: dict[str, Tensor],
    sizes: Sizes,
    *,
    norm: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """(L, D) of one document to (L, D), with weights "q", "k", "v", "o" and, unless there is no gate, "g"."""
    q, k, v = (x @ weights[name].T for name in "qkv")
    v = v.unflatten(-1, (sizes.kv_heads, -1))[:, [h * sizes.kv_heads // sizes.heads for h in range(sizes.heads)]]
    heads = torch.einsum("hnm,mhv->nhv", retention_matrix(q, k, sizes, first), v)
    y = normed(heads, sizes.eps, norm).flatten(1)
    if "g" in weights:
        y = y * F.silu(x @ weights["g"].T)
    return y @ weights["o"].T


ZOO = {
    "embedding": "backbone.embeddings.weight",
    "norm": "backbone.norm_f.weight",
    "head": "lm_head.weight",
    "block": "backbone.layers.{}.",
    "first_norm": "input_layernorm.weight",
    "second_norm": "post_attention_layernorm.weight",
    "mixer": "mixer.{}_proj.weight",
    "o": "mixer.o_proj.weight",
    "head_norm": "mixer.group_norm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
TORCHSCALE = {
    "embedding": "embed_tokens.weight",
    "norm": "layer_norm.weight",
    "head": "output_projection.weight",
    "block": "layers.{}.",
    "first_norm": "retention_layer_norm.weight",
    "second_norm": "final_layer_norm.weight",
    "mixer": "retention.{}_proj.weight",
    "o": "retention.out_proj.weight",
    "head_norm": "",
    "gate": "ffn.fc1.weight",
    "up": "ffn.gate.weight",
    "down": "ffn.fc2.weight",
}
FLA = {
    "embedding": "model.embeddings.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "block": "model.layers.{}.",
    "first_norm": "attn_norm.weight",
    "second_norm": "mlp_norm.weight",
    "mixer": "attn.{}_proj.weight",
    "o": "attn.o_proj.weight",
    "head_norm": "attn.g_norm_swish_gate.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def decoder(state: dict[str, Tensor], names: dict[str, str], ids: Tensor, sizes: Sizes) -> Tensor:
    """(L) ids of one document to (L, V) logits, by a state dict in one of the layouts."""
    state = {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}
    x = state[names["embedding"]][ids] * sizes.embed_scale
    layer = 0
    while names["block"].format(layer) + names["first_norm"] in state:
        block = names["block"].format(layer)
        found = {name: block + names["mixer"].format(name) for name in "qkvg"} | {"o": block + names["o"]}
        weights = {name: state[key] for name, key in found.items() if key in state}
        read = normed(x, sizes.eps, state[block + names["first_norm"]])
        x = x + retention(read, weights, sizes, norm=state.get(block + names["head_norm"]))
        read = normed(x, sizes.eps, state[block + names["second_norm"]])
        act = {"silu": F.silu, "gelu": F.gelu}[sizes.act]
        if block + names["gate"] in state:
            inner = act(read @ state[block + names["gate"]].T) * (read @ state[block + names["up"]].T)
        else:
            inner = act(read @ state[block + names["up"]].T)
        x = x + inner @ state[block + names["down"]].T
        layer += 1
    assert layer > 0, "no block has the layout's names"
    head = state.get(names["head"], state[names["embedding"]])
    return normed(x, sizes.eps, state[names["norm"]]) @ head.T


def torchscale_scale(length: int, heads: int) -> Tensor:
    """(L, H) the running `scale` of torchscale's recurrent form: scale <- scale * gamma + 1, from 1."""
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=torch.float64)
    rows = [torch.ones(heads, dtype=torch.float64)]
    for _ in range(length - 1):
        rows.append(rows[-1] * gamma + 1)
    assert math.isfinite(float(rows[-1].sum()))
    return torch.stack(rows)
