"""Other people's implementations of our ops, found when the benchmark runs: none is a dependency.

A peer gets the same numbers as our op, laid out as it likes them best before anything is timed, and its results are
brought back to our layout before they are compared. Where a peer has a setting, every value is a peer of its own, and
the bars are about the fastest.

Names and signatures were read in state-spaces/mamba@e9594ce, Dao-AILab/causal-conv1d@0d2252d,
fla-org/flash-linear-attention@bc3b101 and transformers 5.17 to 5.24.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from dense_mixing import as_columns, as_rows, columns_product, toeplitz_matrix, transformed, unmasked
from kernel_cases import EPS, MIXERS, OPS, Results, Setup, runner, selected, split_maps, window_of
from kernel_sides import CUDA_SCAN, Builder, NotMeasuredError, Side, at_most, require, same, torch_body, transposed
from mixers import mamba1_parts, mamba2_parts
from torch import Tensor


def torch_path(op: str) -> Callable[..., Any]:
    """Return our op with its torch path."""
    return lambda **inputs: OPS[op].ours(**inputs, implementation="torch")


def compiled(op: str) -> Builder:
    """Return our torch path through torch.compile."""

    def build(setup: Setup) -> Side:
        if setup.inputs["x"].device.type != "cuda":
            raise NotMeasuredError("needs a CUDA device: for a CPU compiling takes longer than the rest of the run")
        torch.compiler.reset()
        return same(torch.compile(torch_path(op), dynamic=False))(setup)

    return build


def compiled_ssd(setup: Setup) -> Side:
    if setup.case.sizes["H"] != 128 or setup.case.tokens != 2048:
        raise NotMeasuredError("compiled at one size, B1 L2048 H128: compiling unrolls its loop and takes minutes")
    return compiled("ssd")(setup)


def mamba_ssm_ssd(chunk_size: int) -> Builder:
    def build(setup: Setup) -> Side:
        scan = require("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        return same(lambda **inputs: scan(**inputs, chunk_size=chunk_size, dt_softplus=True))(setup)

    return build


def transformers_ssd(chunk_size: int) -> Builder:
    def build(setup: Setup) -> Side:
        scan = torch_body("mamba2.modeling_mamba2", "mamba2_chunk_scan")

        def run(x: Tensor, dt: Tensor, **rest: Tensor) -> Tensor:
            return scan(x, dt.float(), **rest, chunk_size=chunk_size, dt_softplus=True).to(x.dtype)

        return same(run)(setup)

    return at_most(16384, "it holds (Q, Q) matrices of all chunks and heads at once, in float32")(build)


def fla_ssd(setup: Setup) -> Side:
    """Return the recurrence alone: step sizes, copies of B and C per head and the skip are computed before, untimed."""
    gla = require("fla.ops.simple_gla", "chunk_simple_gla")
    p = setup.inputs
    steps = F.softplus(p["dt"].float() + p["dt_bias"])
    repeats = p["x"].shape[2] // p["B"].shape[2]
    inputs = {
        "q": p["C"].repeat_interleave(repeats, dim=2),
        "k": p["B"].repeat_interleave(repeats, dim=2),
        "v": (p["x"] * steps[..., None]).to(p["x"].dtype),
        "g": steps * p["A"],
    }

    def ours(results: Results) -> Results:
        return {"y": results["y"] + p["x"] * p["D"][:, None]}

    return Side(runner(lambda **inputs: gla(**inputs, scale=1.0)[0], inputs, setup.cotangents), ours)


def attention(setup: Setup) -> Side:
    """Return causal softmax attention with equal heads and width: another function at the same place of a model."""
    limit = 32768 if setup.training else 131072
    if setup.case.tokens > limit:
        raise NotMeasuredError(f"quadratic in the length; measured up to {limit} tokens")
    x = setup.inputs["x"].transpose(1, 2).contiguous()  # (B, H, L, P)
    inputs = {"query": x, "key": torch.randn_like(x), "value": torch.randn_like(x)}
    cotangents = tuple(torch.randn_like(x) for _ in setup.cotangents)
    attend = F.scaled_dot_product_attention
    return Side(runner(lambda **inputs: attend(**inputs, is_causal=True), inputs, cotangents), lambda results: {})


def channel_first_scan(scan: Callable[..., Any]) -> Builder:
    """Return a scan over (B, D, L), and B and C as (B, N, L)."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        return scan(x, dt, A, B, C, D, z, dt_bias, True).to(x.dtype)

    turned = transposed(run, ("x", "dt", "B", "C", "z"))

    def build(setup: Setup) -> Side:
        flat = {name: t.squeeze(2) if name in "BC" else t for name, t in setup.inputs.items()}  # of one group
        side = turned(Setup(setup.case, flat, setup.cotangents))

        def ours(results: Results) -> Results:
            results = side.ours(results)
            return {name: t.unsqueeze(2) if name in ("dB", "dC") else t for name, t in results.items()}

        return Side(side.run, ours)

    return build


def mamba_ssm_scan(setup: Setup) -> Side:
    require(CUDA_SCAN, "fwd")
    return channel_first_scan(require("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"))(setup)


def transformers_scan(setup: Setup) -> Side:
    limit = 512 if setup.training else 4096
    if setup.case.tokens > limit:
        raise NotMeasuredError(f"it holds (B, D, L, N) in float32 and loops over tokens; measured up to {limit} tokens")
    return channel_first_scan(torch_body("mamba.modeling_mamba", "mamba_selective_scan"))(setup)


def unfused_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Return the scan in plain torch, for one group: (B, L, D, N) decays and inflows, and a loop over tokens."""
    steps = F.softplus(dt.float() + dt_bias)
    decays = (steps[..., None] * A).exp()
    inflows = (steps * x)[..., None] * B.float()
    state, states = torch.zeros_like(inflows[:, 0]), []
    # Unbound, not indexed: the gradient of each indexed token would be as large as all.
    for decay, inflow in zip(decays.unbind(1), inflows.unbind(1), strict=True):
        state = decay * state + inflow
        states.append(state)
    y = (torch.stack(states, dim=1) * C.float()).sum(-1) + D * x
    return (y * F.silu(z.float())).to(x.dtype)


def compiled_scan(setup: Setup) -> Side:
    raise NotMeasuredError("compiling unrolls its loop over tokens")


def causal_conv1d_package(dense: bool) -> Builder:
    def build(setup: Setup) -> Side:
        convolve = require("causal_conv1d", "causal_conv1d_fn")
        return transposed(lambda **inputs: convolve(**inputs, activation="silu"), ("x",), dense)(setup)

    return build


def fla_convolution(setup: Setup) -> Side:
    convolve = require("fla.modules.conv.causal_conv1d", "causal_conv1d")
    return same(lambda **inputs: convolve(**inputs, activation="silu")[0])(setup)


def transformers_convolution(setup: Setup) -> Side:
    convolve = torch_body("mamba2.modeling_mamba2", "causal_conv1d_fn")
    return transposed(lambda x, weight, bias: convolve(x, weight, bias, activation="silu"), ("x",))(setup)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def fla_norm(setup: Setup) -> Side:
    norm = require("fla.modules.layernorm", "rms_norm")
    return same(lambda x, weight: norm(x, weight, None, eps=EPS))(setup)


def fla_add_norm(setup: Setup) -> Side:
    norm = require("fla.modules.layernorm", "rms_norm")
    return same(lambda x, residual, weight: norm(x, weight, None, residual=residual, eps=EPS, prenorm=True))(setup)


def mamba_ssm_norm(setup: Setup) -> Side:
    norm = require("mamba_ssm.ops.triton.layer_norm", "rms_norm_fn")
    return same(lambda x, weight: norm(x, weight, None, eps=EPS))(setup)


def mamba_ssm_add_norm(setup: Setup) -> Side:
    norm = require("mamba_ssm.ops.triton.layer_norm", "rms_norm_fn")
    return same(lambda x, residual, weight: norm(x, weight, None, residual=residual, eps=EPS, prenorm=True))(setup)


def mamba_ssm_gated_norm(setup: Setup) -> Side:
    norm = require("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    return same(lambda x, z, weight: norm(x, weight, None, z=z, eps=EPS, norm_before_gate=False))(setup)


def transformers_norm(setup: Setup) -> Side:
    norm = require("transformers.models.mamba.modeling_mamba", "MambaRMSNorm")(setup.case.sizes["D"], EPS)
    return same(lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)))(setup)


def transformers_gated_norm(setup: Setup) -> Side:
    width = setup.case.sizes["D"]
    make = require("transformers.models.mamba2.modeling_mamba2", "MambaRMSNormGated")
    # Transformers 5.17 knows no groups: one over the whole width is what it computes.
    groups = {"group_size": width} if "group_size" in inspect.signature(make).parameters else {}
    norm = make(width, eps=EPS, **groups)
    return same(lambda x, z, weight: torch.func.functional_call(norm, {"weight": weight}, (x, z)))(setup)


def torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return torch_norm(total, weight), total


def all_queries(attend: Callable[[int, torch.device], Callable[..., Tensor]]) -> Builder:
    """Return window attention of every token, from which the selected ones are taken untimed.

    The others have zeros as queries and as gradients, so that keys and values get the gradients that ours get.

    Args:
        attend: given the length and the device, makes attention of (B, H, L, P) queries to (B, G, L, P) keys, values.
    """

    def build(setup: Setup) -> Side:
        batch, length = setup.inputs["k"].shape[:2]
        device = setup.inputs["k"].device
        index = selected(setup.inputs["q"].shape[0], batch * length, device)

        def spread(t: Tensor) -> Tensor:
            wide = t.new_zeros(batch * length, *t.shape[1:]).index_copy(0, index, t)
            return turned(wide.unflatten(0, (batch, length)))

        def turned(t: Tensor) -> Tensor:
            return t.transpose(1, 2).contiguous()

        inputs = {name: spread(t) if name == "q" else turned(t) for name, t in setup.inputs.items()}

        def ours(results: Results) -> Results:
            rows = {name: t.transpose(1, 2) for name, t in results.items()}
            return {name: t.flatten(0, 1)[index] if name in ("y", "dq") else t for name, t in rows.items()}

        return Side(runner(attend(length, device), inputs, tuple(map(spread, setup.cotangents))), ours)

    return build


def flex_attention(length: int, device: torch.device) -> Callable[..., Tensor]:
    attend = require("torch.nn.attention.flex_attention", "flex_attention")
    mask_of = require("torch.nn.attention.flex_attention", "create_block_mask")
    window = window_of(length)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    mask = mask_of(seen, None, None, length, length, device=device)
    if device.type == "cuda":  # elsewhere compiling takes longer than the rest of the run
        torch.compiler.reset()
        attend = torch.compile(attend, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def masked_attention(length: int, device: torch.device) -> Callable[..., Tensor]:
    token = torch.arange(length, device=device)
    back = token[:, None] - token
    mask = (back >= 0) & (back < window_of(length))
    attend = F.scaled_dot_product_attention
    return lambda q, k, v: attend(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flash_attention(length: int, device: torch.device) -> Callable[..., Tensor]:
    attend = require("flash_attn", "flash_attn_func")
    window = (window_of(length) - 1, 0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        return attend(*rows, causal=True, window_size=window).transpose(1, 2)

    return run


def dense_mixing(matrix_of: Callable[[Tensor], Tensor]) -> Builder:
    """Return one cuBLAS product per head, with inputs already in its layout."""

    def build(setup: Setup) -> Side:
        inputs = {name: as_columns(t) if name == "x" else t for name, t in setup.inputs.items()}
        product = columns_product(matrix_of)
        run = runner(lambda **inputs: product(**inputs), inputs, tuple(map(as_columns, setup.cotangents)))
        batch = len(setup.inputs["x"])

        def ours(results: Results) -> Results:
            rows = {name: as_rows(t, batch) if name in ("y", "dx") else t for name, t in results.items()}
            if matrix_of is unmasked:
                rows.pop("dweight", None)  # of the whole matrix
            return rows

        return Side(run, ours)

    return build


def decoding(convolve: Callable[..., Tensor], update: Callable[..., Tensor]) -> Builder:
    """Return a step by two functions of mamba_ssm's signatures, which get values per head as broadcast views."""

    def run(
        A: Tensor,  # not timed
        state: Tensor,
        conv_state: Tensor,
        xBC: Tensor,
        dt: Tensor,
        weight: Tensor,
        bias: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        **ours: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = split_maps(convolve(xBC, conv_state, weight, bias, "silu"), state)
        wide = state.shape[1:3]
        y = update(
            state,
            x,
            dt[..., None].expand(-1, *wide),
            A[:, None, None].expand(state.shape[1:]),
            B,
            C,
            D=D[:, None].expand(wide),
            dt_bias=dt_bias[:, None].expand(wide),
            dt_softplus=True,
        )
        return y, state, conv_state

    return lambda setup: same(partial(run, -setup.inputs["A_log"].exp()))(setup)


def mamba_ssm_decode(setup: Setup) -> Side:
    convolve = require("causal_conv1d", "causal_conv1d_update")
    return decoding(convolve, require("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"))(setup)


def transformers_decode(setup: Setup) -> Side:
    convolve = torch_body("mamba2.modeling_mamba2", "causal_conv1d_update")
    update = torch_body("mamba2.modeling_mamba2", "mamba2_selective_state_update")

    def row(xBC: Tensor, *rest: Any) -> Tensor:
        return convolve(xBC[..., None], *rest)[..., 0]

    return decoding(row, update)(setup)


def transformers_mixer(setup: Setup) -> Side:
    """Return transformers' mixer, which uses mamba_ssm and causal-conv1d if they are installed."""
    if (
        setup.training
        and setup.case.op == "mamba1_mixer"
        and setup.case.tokens > 512
        and find_spec("mamba_ssm") is None
    ):
        raise NotMeasuredError(
            "without mamba_ssm its backward grows with the length squared; measured up to 512 tokens"
        )
    parts = (mamba2_parts if setup.case.op == "mamba2_mixer" else mamba1_parts)(setup.case.sizes["D"])
    return same(lambda x, **parameters: parts.theirs(x, parameters))(setup)


def mamba_ssm_mixer(setup: Setup) -> Side:
    x, width = setup.inputs["x"], setup.case.sizes["D"]
    if setup.case.op == "mamba2_mixer":
        head = 64 if width >= 128 else 16
        module = require("mamba_ssm.modules.mamba2", "Mamba2")(width, d_state=128, headdim=head, device=x.device)
    else:
        require(CUDA_SCAN, "fwd")
        module = require("mamba_ssm.modules.mamba_simple", "Mamba")(width, device=x.device)
    return same(lambda x, **parameters: torch.func.functional_call(module, parameters, (x,)))(setup)


PEERS: Mapping[str, Mapping[str, Builder]] = {
    "ssd": {
        **{f"mamba_ssm chunk_size={q}": mamba_ssm_ssd(q) for q in (128, 256)},
        "fla chunk_simple_gla": fla_ssd,
        "torch attention": attention,
        **{f"transformers chunk_size={q}": transformers_ssd(q) for q in (64, 128)},
        "our torch path": at_most(32768, "a loop over blocks of chunks, made for CPU caches")(same(torch_path("ssd"))),
        "our torch path, compiled": compiled_ssd,
    },
    "selective_scan": {
        "mamba_ssm selective_scan_cuda": mamba_ssm_scan,
        "unfused torch scan": at_most(4096, "a loop over tokens, with (B, L, D, N) in float32")(same(unfused_scan)),
        "transformers": transformers_scan,
        "our torch path": at_most(4096, "a loop over tokens, made for CPU caches")(same(torch_path("selective_scan"))),
        "our torch path, compiled": compiled_scan,
    },
    "causal_conv1d": {
        "causal_conv1d channel last": causal_conv1d_package(dense=False),
        "causal_conv1d channel first": causal_conv1d_package(dense=True),
        "fla causal_conv1d": fla_convolution,
        "transformers (torch conv1d)": transformers_convolution,
        "our torch path": same(torch_path("causal_conv1d")),
        "our torch path, compiled": compiled("causal_conv1d"),
    },
    "rms_norm": {
        "torch rms_norm": same(torch_norm),
        "fla rms_norm": fla_norm,
        "mamba_ssm rms_norm_fn": mamba_ssm_norm,
        "transformers": transformers_norm,
        "our torch path": same(torch_path("rms_norm")),
        "our torch path, compiled": compiled("rms_norm"),
    },
    "rms_norm_gated": {
        "mamba_ssm rmsnorm_fn": mamba_ssm_gated_norm,
        "transformers": transformers_gated_norm,
        "our torch path": same(torch_path("rms_norm_gated")),
        "our torch path, compiled": compiled("rms_norm_gated"),
    },
    "add_rms_norm": {
        "torch add and rms_norm": same(torch_add_norm),
        "fla rms_norm with residual": fla_add_norm,
        "mamba_ssm rms_norm_fn with residual": mamba_ssm_add_norm,
        "our torch path": same(torch_path("add_rms_norm")),
        "our torch path, compiled": compiled("add_rms_norm"),
    },
    "window_attention": {
        "FlexAttention of all tokens": all_queries(flex_attention),
        "flash_attn of all tokens": all_queries(flash_attention),
        "torch attention of all tokens": at_most(32768, "it reads an (L, L) mask")(all_queries(masked_attention)),
        "our torch path": same(torch_path("window_attention")),
    },
    "masked_mix": {
        "cuBLAS of tril(W)": dense_mixing(torch.tril),
        "the floor: cuBLAS of W unmasked": dense_mixing(unmasked),
        "our torch path": same(torch_path("masked_mix")),
    },
    "toeplitz_mix": {
        "cuBLAS of the matrix": dense_mixing(toeplitz_matrix),
        "torch rfft": same(transformed),
        "our torch path": same(torch_path("toeplitz_mix")),
    },
    "decode": {
        "mamba_ssm and causal_conv1d": mamba_ssm_decode,
        "transformers": transformers_decode,
    },
    **{kind: {"mamba_ssm": mamba_ssm_mixer, "transformers": transformers_mixer} for kind in MIXERS},
}
