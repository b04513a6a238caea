"""Layers, norms and states of the compatibility layer against definitions in float64, with every gradient."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels import compat
from tolerances import TOLERANCES

RTOL, ATOL = TOLERANCES[torch.float64]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def agree(got: Any, expected: Any, leaves: dict[str, Any]) -> None:
    """The results are equal, and so are all gradients of all of them, by name."""
    got, expected = ((value,) if isinstance(value, Tensor) else tuple(value) for value in (got, expected))
    named = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    weights = [torch.randn_like(value) for value in expected]
    assert [value.shape for value in got] == [value.shape for value in expected]
    gradients = []
    for values in (got, expected):
        total = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
        gradients.append(torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True))
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=ATOL)
    for name, mine, theirs in zip(named, *gradients, strict=True):
        assert mine is not None and theirs is not None, name
        torch.testing.assert_close(mine, theirs, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}")


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, size: int, rms: bool) -> Tensor:
    parts = []
    for part in x.split(size, dim=-1):
        centred = part if rms else part - part.mean(-1, keepdim=True)
        parts.append(centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt())
    y = torch.cat(parts, -1) * weight
    return y if bias is None else y + bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor) -> Tensor:
    """(B, L, D), token by token and tap by tap, within documents."""
    rows = []
    for b in range(len(x)):
        tokens = []
        for t in range(x.shape[1]):
            y = torch.zeros_like(x[b, 0]) if bias is None else bias
            for back in range(min(weight.shape[1], t + 1)):
                if idx[b, t - back] == idx[b, t]:
                    y = y + weight[:, -1 - back] * x[b, t - back]
            tokens.append(y)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def scan(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y_t = sum_n C h_t, h_t = decay_t h + u_t B_t, of (B, L, ...) values with N last; and every state."""
    outputs, states = [], []
    for t in range(u.shape[1]):
        if t:
            same = (idx[:, t] == idx[:, t - 1]).double()
            state = state * same.view(-1, *[1] * (state.dim() - 1))
        state = decay[:, t] * state + u[:, t, ..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1))
        states.append(state)
    return torch.stack(outputs, 1), states


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(x.exp())


@pytest.mark.parametrize("form", ["token", "grouped", "B constant", "C constant", "both constant"])
@pytest.mark.parametrize("length", [1, 5])
def test_selective_scan_takes_maps_of_every_form(length: int, form: str) -> None:
    torch.manual_seed(0)
    constant, token = draw(4, 3), draw(2, 2 if form == "grouped" else 1, 3, length)
    other = draw(*token.shape)
    B = constant if form in ("B constant", "both constant") else token
    C = draw(4, 3) if form in ("C constant", "both constant") else other
    if form == "token":
        B, C = draw(2, 3, length), draw(2, 3, length)
    a: dict[str, Any] = {"u": draw(2, 4, length), "delta": draw(2, 4, length), "A": draw(4, 3), "B": B, "C": C}
    a |= {"D": draw(4), "z": draw(2, 4, length), "delta_bias": draw(4)}

    def by_channel(maps: Tensor) -> Tensor:  # (B, L, D, N)
        if maps.dim() == 2:
            return maps.expand(2, length, 4, 3)
        maps = maps if maps.dim() == 4 else maps[:, None]
        return torch.stack([maps[:, d * maps.shape[1] // 4] for d in range(4)], 1).permute(0, 3, 1, 2)

    steps = softplus(a["delta"] + a["delta_bias"][:, None]).transpose(1, 2)
    u = a["u"].transpose(1, 2)
    start = torch.zeros(2, 4, 3, dtype=torch.float64)
    idx = torch.zeros(2, length)
    y, states = scan(steps * u, (steps[..., None] * a["A"]).exp(), by_channel(B), by_channel(C), start, idx)
    y = ((y + a["D"] * u) * silu(a["z"].transpose(1, 2))).transpose(1, 2)
    agree(compat.selective_scan_fn(**a, delta_softplus=True, return_last_state=True), (y, states[-1]), a)


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("given", ["", "B", "C", "BC"])
@pytest.mark.parametrize("length", [1, 5])
def test_mamba_inner_is_the_layer(length: int, given: str, norms: bool) -> None:
    torch.manual_seed(0)
    rank, size = 2, 3
    a: dict[str, Any] = {"xz": draw(2, 8, length), "conv1d_weight": draw(4, 1, 3), "conv1d_bias": draw(4)}
    a |= {"x_proj_weight": draw(rank + size * (2 - len(given)), 4), "delta_proj_weight": draw(4, rank)}
    a |= {"out_proj_weight": draw(6, 4), "out_proj_bias": draw(6), "A": -draw(4, size).detach().exp()}
    a["A"].requires_grad_()
    a |= {"D": draw(4), "delta_bias": draw(4)}
    a |= {letter: draw(4, size) for letter in given}
    for letter in "BC":
        if letter not in given:
            a[f"{letter}_proj_bias"] = draw(size)
            if norms:
                a[f"{letter.lower()}_rms_weight"] = draw(size)
    if norms:
        a["dt_rms_weight"] = draw(4)
    x, z = a["xz"].transpose(1, 2).split(4, -1)
    idx = torch.zeros(2, length)
    x = silu(convolve(x, a["conv1d_weight"][:, 0], a["conv1d_bias"], idx))
    rows = x @ a["x_proj_weight"].T
    steps = rows[..., :rank] @ a["delta_proj_weight"].T
    if norms:
        steps = norm(steps, a["dt_rms_weight"], None, 1e-3, 4, True)
    steps = softplus(steps + a["delta_bias"])
    maps, place = {}, rank
    for letter in "BC":
        if letter in given:
            maps[letter] = a[letter].expand(2, length, 4, size)
            continue
        value, place = rows[..., place : place + size] + a[f"{letter}_proj_bias"], place + size
        if norms:
            value = norm(value, a[f"{letter.lower()}_rms_weight"], None, 1e-3, size, True)
        maps[letter] = value[:, :, None].expand(2, length, 4, size)
    start = torch.zeros(2, 4, size, dtype=torch.float64)
    y, _ = scan(steps * x, (steps[..., None] * a["A"]).exp(), maps["B"], maps["C"], start, idx)
    y = (y + a["D"] * x) * silu(z)
    expected = y @ a["out_proj_weight"].T + a["out_proj_bias"]
    agree(compat.mamba_inner_fn(**a, b_c_dt_rms_eps=1e-3), expected, a)


@pytest.mark.parametrize("before", [False, True], ids=["gate-norm", "norm-gate"])
@pytest.mark.parametrize("normed", [False, True], ids=["no-norm", "norm"])
@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize(("length", "skip"), [(1, "H"), (7, "H"), (7, "HP")])
def test_split_scan_is_the_layer(length: int, skip: str, mlp: int, normed: bool, before: bool) -> None:
    torch.manual_seed(0)
    H, P, G, N = 4, 2, 2, 3
    inner, channels = H * P, H * P + 2 * G * N
    idx = torch.tensor([[0] * (length // 2) + [1] * (length - length // 2), [0] * length])
    a: dict[str, Any] = {"zxbcdt": draw(2, length, 2 * mlp + inner + channels + H), "conv1d_weight": draw(channels, 3)}
    a |= {"conv1d_bias": draw(channels), "dt_bias": draw(H), "A": draw(H), "D": draw(*((H, P)[: len(skip)]))}
    a |= {"initial_states": draw(2, H, P, N), "outproj_weight": draw(5, mlp + inner), "outproj_bias": draw(5)}
    if normed:
        a["rmsnorm_weight"] = draw(inner)
    gate, value, z, xbc, dt = a["zxbcdt"].split([mlp, mlp, inner, channels, H], -1)
    x, B, C = silu(convolve(xbc, a["conv1d_weight"], a["conv1d_bias"], idx)).split([inner, G * N, G * N], -1)
    x = x.unflatten(-1, (H, P))
    maps = [m.unflatten(-1, (G, N))[:, :, [h * G // H for h in range(H)], None] for m in (B, C)]
    steps = softplus(dt + a["dt_bias"]).clamp(0.2, 1.5)
    decay = (steps * a["A"]).exp()[..., None, None]
    y, states = scan(steps[..., None] * x, decay, maps[0], maps[1], a["initial_states"], idx)
    y = (y + (a["D"] if skip == "HP" else a["D"][:, None]) * x).flatten(2)
    if not normed:
        y = y * silu(z)
    elif before:
        y = norm(y, a["rmsnorm_weight"], None, 1e-3, inner // G, True) * silu(z)
    else:
        y = norm(y * silu(z), a["rmsnorm_weight"], None, 1e-3, inner // G, True)
    expected = torch.cat([silu(gate) * value, y], -1) @ a["outproj_weight"].T + a["outproj_bias"]
    options = {"headdim": P, "ngroups": G, "norm_before_gate": before, "rmsnorm_eps": 1e-3, "dt_limit": (0.2, 1.5)}
    got = compat.mamba_split_conv1d_scan_combined(**a, chunk_size=4, seq_idx=idx, return_final_states=True, **options)
    agree(got, (expected, states[-1]), a)


@pytest.mark.parametrize("normed", [False, True], ids=["no-norm", "norm"])
def test_split_scan_skips_what_is_not_a_number_at_padding(normed: bool) -> None:
    torch.manual_seed(0)
    H, P, N, mlp = 4, 2, 3, 3
    idx = torch.tensor([[-1, 0, 0, 1, -1, 1], [0, 0, 0, 0, -1, -1]])
    channels = H * P + 2 * N
    a: dict[str, Any] = {"zxbcdt": draw(2, 6, 2 * mlp + H * P + channels + H), "conv1d_weight": draw(channels, 3)}
    a |= {"conv1d_bias": draw(channels), "dt_bias": draw(H), "A": draw(H), "D": draw(H)}
    a |= {"outproj_weight": draw(5, mlp + H * P)} | ({"rmsnorm_weight": draw(H * P)} if normed else {})
    results = []
    for filled in (0.0, torch.nan):
        a["zxbcdt"].data[idx < 0] = filled
        y, states = compat.mamba_split_conv1d_scan_combined(
            **a, chunk_size=4, seq_idx=idx, return_final_states=True, headdim=P
        )
        results.append((y, states, *torch.autograd.grad(y.square().sum() + states.square().sum(), list(a.values()))))
    assert not results[1][0][idx < 0].any()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("bounds", [(0, 7), (0, 1, 5, 7), (0, 3, 3, 7), (0, 2, 5)], ids=str)
def test_states_of_sequences_are_those_of_the_recurrence(bounds: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    H, P, G, N = 4, 2, 2, 3
    idx = torch.full((1, 7), -1)
    for index, (start, end) in enumerate(pairwise(bounds)):
        idx[0, start:end] = index
    a: dict[str, Any] = {"x": draw(1, 7, H, P), "dt": draw(1, 7, H), "A": draw(H), "B": draw(1, 7, G, N)}
    a |= {"dt_bias": draw(H), "initial_states": draw(1, H, P, N)}
    steps = softplus(a["dt"] + a["dt_bias"])
    B = a["B"][:, :, [h * G // H for h in range(H)], None]
    decay = (steps * a["A"]).exp()[..., None, None]
    _, states = scan(steps[..., None] * a["x"], decay, B, B, a["initial_states"], idx)
    pairs = pairwise(bounds)
    expected = torch.cat([states[end - 1] if end > start else torch.zeros_like(states[0]) for start, end in pairs])
    _, got = compat.mamba_chunk_scan_combined(
        **a,
        C=a["B"].detach(),
        chunk_size=4,
        seq_idx=idx,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        dt_softplus=True,
        return_varlen_states=True,
    )
    agree(got, expected, a)


@pytest.mark.parametrize("idx", [None, [0] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, -1]], ids=str)
def test_bounds_that_seq_idx_does_not_hold_are_refused(idx: list[int] | None) -> None:
    x, dt, maps = torch.zeros(1, 7, 2, 2), torch.zeros(1, 7, 2), torch.zeros(1, 7, 1, 3)
    bounds = torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match=r"^seq_idx must (hold one index|be given with the 2 sequences)"):
        compat.mamba_chunk_scan_combined(
            x, dt, dt[0, 0], maps, maps, 4, seq_idx=None if idx is None else torch.tensor([idx]), cu_seqlens=bounds
        )


@pytest.mark.parametrize("size", [1, 3, 6])
def test_last_inputs_of_sequences(size: int) -> None:
    torch.manual_seed(0)
    x, bounds = draw(9, 4), (0, 4, 4, 6)
    expected = torch.zeros(3, 4, size, dtype=torch.float64)
    for s, (start, end) in enumerate(pairwise(bounds)):
        for back in range(1, min(size, end - start) + 1):
            expected[s, :, size - back] = x[end - back]
    agree(compat.causal_conv1d_varlen_states(x, torch.tensor(bounds), size), expected, {"x": x})


@pytest.mark.parametrize("bounds", [[1, 4], [0, 5, 4], [0, 10]], ids=str)
def test_bounds_out_of_place_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens must start at 0, not decrease and not exceed"):
        compat.causal_conv1d_varlen_states(torch.zeros(9, 4), torch.tensor(bounds), 3)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gated", [None, "before", "after"])
@pytest.mark.parametrize("size", [None, 3])
def test_gated_norm(size: int | None, gated: str | None, biased: bool, rms: bool) -> None:
    torch.manual_seed(0)
    a = {"x": draw(2, 3, 6), "weight": draw(6), "bias": draw(6) if biased else None, "z": draw(2, 3, 6)}
    if gated is None:
        a["z"] = None
    u = a["x"] * silu(a["z"]) if gated == "before" else a["x"]
    expected = norm(u, a["weight"], a["bias"], 1e-3, size or 6, rms)
    if gated == "after":
        expected = expected * silu(a["z"])
    options = {"eps": 1e-3, "group_size": size, "norm_before_gate": gated != "before"}
    agree(compat.layernorm_fn(**a, **options, is_rms_norm=rms), expected, a)
    module = (compat.RMSNormGated if rms else compat.LayerNormGated)(6, **options, dtype=torch.float64)
    plain = compat.layernorm_fn(a["x"], module.weight, module.bias, a["z"], **options, is_rms_norm=rms)
    assert torch.equal(module(a["x"], a["z"]), plain)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("extra", ["none", "bias", "second", "rowscale"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_norm_of_a_sum(residual: bool, extra: str, rms: bool) -> None:
    torch.manual_seed(0)
    a: dict[str, Any] = {"x": draw(2, 3, 6), "weight": draw(6), "bias": draw(6) if extra == "bias" else None}
    a |= {"residual": draw(2, 3, 6)} if residual else {}
    a |= {"x1": draw(2, 3, 6), "weight1": draw(6), "bias1": draw(6)} if extra == "second" else {}
    a |= {"rowscale": draw(2, 3)} if extra == "rowscale" else {}
    total = a["x"] * a["rowscale"][..., None] if extra == "rowscale" else a["x"]
    total = sum((a[name] for name in ("x1", "residual") if name in a), total)
    expected = [norm(total, a["weight"], a["bias"], 1e-3, 6, rms)]
    if extra == "second":
        expected.append(norm(total, a["weight1"], a["bias1"], 1e-3, 6, rms))
    expected.append(total)
    agree(compat.layer_norm_fn(**a, eps=1e-3, prenorm=True, is_rms_norm=rms), expected, a)
    if extra in ("none", "bias"):
        weights = {"linear_weight": draw(4, 6), "linear_bias": draw(4)}
        got = compat.layer_norm_linear_fn(
            a["x"], a["weight"], a["bias"], *weights.values(), a.get("residual"), 1e-3, True, is_rms_norm=rms
        )
        agree(got, (expected[0] @ weights["linear_weight"].T + weights["linear_bias"], total), a | weights)


def test_a_narrow_weight_does_not_round_the_norm_of_a_sum() -> None:
    torch.manual_seed(0)
    x, residual = (draw(4, 64).detach().float() for _ in range(2))
    weight = torch.rand(64).bfloat16()
    expected = norm((x + residual).double(), weight.double(), None, 1e-3, 64, True)
    found = compat.rms_norm_fn(x, weight, None, residual, eps=1e-3)
    assert found.dtype == torch.float32
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    for narrow, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        once = norm((x.to(narrow) + residual).double(), weight.to(other).double(), None, 1e-3, 64, True).to(narrow)
        found = compat.rms_norm_fn(x.to(narrow), weight.to(other), None, residual, eps=1e-3)
        assert (found == once).double().mean() > 0.99  # double rounding would change several in a hundred


def test_dropout_of_a_norm_keeps_what_its_masks_say() -> None:
    torch.manual_seed(0)
    x, x1, weight = draw(4, 50), draw(4, 50), draw(50)
    y, total, kept, kept1 = compat.rms_norm_fn(
        x, weight, None, x1=x1, eps=1e-3, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    expected = (x * kept + x1 * kept1) / 0.75
    agree((y, total), (norm(expected, weight, None, 1e-3, 50, True), expected), {"x": x, "x1": x1, "weight": weight})
    assert 0.6 < kept.double().mean() < 0.9 and not torch.equal(kept, kept1)
    module = compat.RMSNorm(50, dropout_p=0.25, dtype=torch.float64).eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias1": torch.zeros(6)}, "bias1 must be None if weight1 is None"),
        ({"x1": torch.zeros(2, 6), "rowscale": torch.zeros(2)}, "rowscale must be None if x1 is given"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
    ],
)
def test_norms_refuse_arguments_without_effect(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        compat.layer_norm_fn(torch.ones(2, 6), torch.ones(6), None, **change)


def test_the_sum_is_kept_in_float32_on_request() -> None:
    x, weight = torch.ones(2, 6, dtype=torch.bfloat16), torch.ones(6)
    y, total = compat.rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    y, total = compat.rms_norm_fn(x, weight, None, residual=x, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16)


def test_final_states_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^final_states_out must be None unless return_final_states=True"):
        compat.causal_conv1d_fn(torch.ones(1, 2, 5), torch.ones(2, 3), final_states_out=torch.ones(1, 2, 2))
