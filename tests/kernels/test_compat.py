"""The compatibility layer gives what mamba_ssm and causal-conv1d define, in their layouts, on any device."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_zoo.kernels import compat
from ssm_zoo.kernels.ssd import ssd_reference
from tolerances import TOLERANCES

# The arguments of mamba_ssm 2.3.2 and causal-conv1d 1.7.0, which callers also pass by position. mamba_ssm got
# `state_dtype` later.
NORM = "residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, "
NORM += "residual_in_fp32=False, "
GATED = "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
SIGNATURES = {
    "mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False, state_dtype=None",
    "selective_scan_fn": "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False",
    "selective_state_update": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None",
    "mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
    "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
    "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True, state_dtype=None",
    "mamba_inner_fn": "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
    "b_c_dt_rms_eps=1e-06",
    "layer_norm_fn": f"x, weight, bias, {NORM}is_rms_norm=False, return_dropout_mask=False",
    "rms_norm_fn": f"x, weight, bias, {NORM}return_dropout_mask=False",
    "layer_norm_linear_fn": "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-06, "
    "prenorm=False, residual_in_fp32=False, is_rms_norm=False",
    "layernorm_fn": f"{GATED}, is_rms_norm=False",
    "rmsnorm_fn": GATED,
    "causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None",
    "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None",
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape)))


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_theirs(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    assert ", ".join(map(str, plain)) == SIGNATURES[name]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in plain)


def ssd_arguments() -> dict[str, Any]:
    return {
        "x": draw(2, 9, 4, 3),
        "dt": draw(2, 9, 4),
        "A": -draw(4).exp(),
        "B": draw(2, 9, 2, 5),
        "C": draw(2, 9, 2, 5, seed=1),
        "D": draw(4, 3),
        "z": draw(2, 9, 4, 3, seed=1),
        "dt_bias": draw(4, seed=1),
        "seq_idx": torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32),
        "dt_softplus": True,
        "dt_limit": (0.1, 2.0),
    }


def test_chunk_scan_is_the_definition() -> None:
    arguments, state = ssd_arguments(), draw(2, 4, 3, 5)
    expected = ssd_reference(**arguments, initial_state=state, return_final_state=True)
    got = compat.mamba_chunk_scan_combined(
        **arguments, chunk_size=4, initial_states=state, return_final_states=True, state_dtype=torch.float32
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    alone = compat.mamba_chunk_scan_combined(**arguments, chunk_size=4, initial_states=state)
    assert isinstance(alone, Tensor) and torch.equal(alone, got[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"return_varlen_states": True}, "cu_seqlens must be given with return_varlen", id="varlen"),
        pytest.param({"state_dtype": torch.bfloat16}, "state_dtype must be None or torch.float32", id="state-dtype"),
        pytest.param({"chunk_size": 0}, "chunk_size must be at least 1", id="chunk"),
    ],
)
def test_chunk_scan_refuses_what_it_does_not_offer(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compat.mamba_chunk_scan_combined(**{**ssd_arguments(), "chunk_size": 4, **change})


def scan_oracle(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence, channel first, in float64, one channel and token at a time; B and C are (B, G, N, L)."""
    u, delta, A, B, C, D, z, bias = (tensor.double() for tensor in (u, delta, A, B, C, D, z, bias))
    batch, channels, length = u.shape
    state = torch.zeros(batch, channels, A.shape[1], dtype=torch.float64)
    out = torch.zeros_like(u)
    for t in range(length):
        for channel in range(channels):
            group = channel * B.shape[1] // channels
            step = torch.log1p((delta[:, channel, t] + bias[channel]).exp())
            decay = (step[:, None] * A[channel]).exp()
            state[:, channel] = decay * state[:, channel] + (step * u[:, channel, t])[:, None] * B[:, group, :, t]
            y = (state[:, channel] * C[:, group, :, t]).sum(-1) + D[channel] * u[:, channel, t]
            gate = z[:, channel, t]
            out[:, channel, t] = y * gate / (1 + (-gate).exp())
    return out, state


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_selective_scan_is_the_recurrence(groups: int | None) -> None:
    u, delta, z = draw(2, 6, 7), draw(2, 6, 7, seed=1), draw(2, 6, 7, seed=2)
    A, D, bias = -draw(6, 4).exp(), draw(6), draw(6, seed=1)
    shape = (2, 4, 7) if groups is None else (2, groups, 4, 7)
    B, C = draw(*shape), draw(*shape, seed=1)
    grouped = [tensor[:, None] if groups is None else tensor for tensor in (B, C)]
    expected = scan_oracle(u, delta, A, grouped[0], grouped[1], D, z, bias)
    got = compat.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(compat.selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True), got[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"A": torch.zeros(6, 4, dtype=torch.complex64)}, "A must be real", id="complex"),
        pytest.param({"B": torch.zeros(6, 5)}, r"B must be \(D, N\), \(B, N, L\) or \(B, G, N, L\)", id="map"),
        pytest.param({"C": torch.zeros(2, 2, 4, 7)}, "C must have the 1 groups of B, got 2", id="groups"),
    ],
)
def test_selective_scan_refuses_what_it_does_not_offer(change: dict[str, Tensor], message: str) -> None:
    arguments = {"u": draw(2, 6, 7), "delta": draw(2, 6, 7), "A": -draw(6, 4).exp()}
    arguments |= {"B": draw(2, 4, 7), "C": draw(2, 4, 7)}
    with pytest.raises(ValueError, match=message):
        compat.selective_scan_fn(**{**arguments, **change})


@pytest.mark.parametrize("indexed", [False, True], ids=["rows", "indexed"])
@pytest.mark.parametrize("heads", [None, 4], ids=["mamba1", "mamba2"])
def test_state_update_is_one_step(heads: int | None, indexed: bool) -> None:
    middle = () if heads is None else (heads,)
    groups = () if heads is None else (2,)
    arguments = {
        "x": draw(3, *middle, 5),
        "dt": draw(3, *middle, 5, seed=1),
        "A": -draw(*middle, 5, 6).exp(),
        "B": draw(3, *groups, 6),
        "C": draw(3, *groups, 6, seed=1),
        "D": draw(*middle, 5),
        "z": draw(3, *middle, 5, seed=2),
        "dt_bias": draw(*middle, 5, seed=1),
    }
    state = draw(7 if indexed else 3, *middle, 5, 6)
    before = state.clone()
    rows = torch.tensor([5, 0, 2], dtype=torch.int32) if indexed else torch.arange(3)
    got = compat.selective_state_update(
        state, **arguments, dt_softplus=True, state_batch_indices=rows if indexed else None
    )
    expected, new = torch.empty_like(got), before.clone()
    for row, place in enumerate(rows.tolist()):
        for head in range(heads or 1):
            at = () if heads is None else (head,)
            group = () if heads is None else (head // 2,)
            step = torch.log1p((arguments["dt"][row][at] + arguments["dt_bias"][at]).exp())  # (P)
            value = arguments["x"][row][at]
            h = before[place][at] * (step[:, None] * arguments["A"][at]).exp()
            h = h + torch.outer(step * value, arguments["B"][row][group])
            new[place][at] = h
            gate = arguments["z"][row][at]
            y = h @ arguments["C"][row][group] + arguments["D"][at] * value
            expected[row][at] = y * gate / (1 + (-gate).exp())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, new, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "turned", "indexed"])
@pytest.mark.parametrize("softplus", [False, True], ids=["raw", "softplus"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_state_update_of_expanded_steps_is_that_of_copies(
    bias: bool, softplus: bool, layout: str, dtype: torch.dtype
) -> None:
    """Mamba-2's callers expand step sizes and rates; copies of them go another way to the same result."""
    arguments = {"x": draw(3, 4, 5), "B": draw(3, 2, 6), "C": draw(3, 2, 6, seed=1), "D": draw(4)[:, None]}
    arguments |= {"dt": draw(3, 4, 1), "A": -draw(4, 1, 1).exp(), "z": draw(3, 4, 5, seed=2)}
    sizes = {"D": (4, 5), "dt": (3, 4, 5), "A": (4, 5, 6)}
    if bias:
        arguments["dt_bias"], sizes["dt_bias"] = draw(4, 1, seed=1), (4, 5)
    expanded = arguments | {name: arguments[name].expand(size) for name, size in sizes.items()}
    copies = {name: value.contiguous() for name, value in expanded.items()}
    rows = torch.tensor([5, 0, 2]) if layout == "indexed" else None
    results = []
    for values in (expanded, copies):
        state = draw(7 if layout == "indexed" else 3, 4, 6, 5).to(dtype).transpose(2, 3)
        state = state if layout == "turned" else state.contiguous()
        address = state.data_ptr()
        before = state.clone()
        y = compat.selective_state_update(state, **values, dt_softplus=softplus, state_batch_indices=rows)
        assert not torch.equal(state, before)
        assert state.data_ptr() == address and state.dtype == dtype and y.dtype == torch.float32
        results.append((y, state.float()))
    for got, expected in zip(*results, strict=True):
        rtol, atol = TOLERANCES[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("varied", ["dt", "A over P", "A over N", "dt_bias"])
def test_state_update_with_one_argument_that_is_not_expanded(varied: str) -> None:
    name, _, axis = varied.partition(" over ")
    arguments = {"x": draw(3, 4, 5), "B": draw(3, 2, 6), "C": draw(3, 2, 6, seed=1)}
    steps, rates, bias = draw(3, 4, 5, seed=2), -draw(4, 5, 6).exp(), draw(4, 5)
    rates = rates[:, :1] if axis == "N" else rates[..., :1] if axis == "P" else rates[:, :1, :1]
    arguments |= {"dt": steps if name == "dt" else steps[..., :1].expand(3, 4, 5), "A": rates.expand(4, 5, 6)}
    arguments |= {"dt_bias": bias if name == "dt_bias" else bias[:, :1].expand(4, 5)}
    copies = {name: value.contiguous() for name, value in arguments.items()}
    states = [draw(3, 4, 5, 6) for _ in range(2)]
    got, expected = (
        compat.selective_state_update(state, **values, dt_softplus=True)
        for state, values in zip(states, (arguments, copies), strict=True)
    )
    assert torch.equal(got, expected) and torch.equal(*states)


def test_state_update_records_no_gradient() -> None:
    for rates in (-draw(2, 3, 4).exp(), (-draw(2, 1, 1).exp()).expand(2, 3, 4)):
        state, x = torch.zeros(2, 2, 3, 4), draw(2, 2, 3).requires_grad_()
        dt = draw(2, 2, 1).expand(2, 2, 3)
        y = compat.selective_state_update(state, x, dt, rates, draw(2, 1, 4), draw(2, 1, 4))
        assert not y.requires_grad and not state.requires_grad


def test_state_update_refuses_shapes_that_do_not_fit() -> None:
    state = torch.zeros(2, 3, 4)
    fitting = {"x": draw(2, 3), "dt": draw(2, 3), "A": draw(3, 4), "B": draw(2, 4), "C": draw(2, 4)}
    compat.selective_state_update(state.clone(), **fitting)
    for name, wrong in (("x", draw(2, 4)), ("dt", draw(2, 1)), ("A", draw(3, 5)), ("B", draw(2, 5)), ("C", draw(1, 4))):
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            compat.selective_state_update(state, **{**fitting, name: wrong})
    assert not state.any()


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_is_a_convolution(activation: str | None) -> None:
    x, weight, bias, before = draw(2, 5, 9), draw(5, 4), draw(5), draw(2, 5, 3)
    expected = F.conv1d(torch.cat([before, x], -1), weight[:, None], bias, groups=5)
    expected = expected if activation is None else F.silu(expected)
    y, final = compat.causal_conv1d_fn(x, weight, bias, None, before, True, None, activation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(final, x[..., -3:])
    kept = torch.empty(2, 5, 3)
    _, returned = compat.causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, final_states_out=kept
    )
    assert returned is kept and torch.equal(kept, final)
    assert isinstance(compat.causal_conv1d_fn(x, weight), Tensor)


def test_every_step_of_a_training_may_write_its_final_states_to_the_same_memory() -> None:
    weight, kept, found = draw(5, 4).requires_grad_(), torch.empty(2, 5, 3), []
    for out in (None, kept, kept):
        x = draw(2, 5, 9).requires_grad_()
        y, final = compat.causal_conv1d_fn(2 * x, weight, return_final_states=True, final_states_out=out)
        found.append(torch.autograd.grad(y.sum() + final.square().sum(), (x, weight)))
        assert torch.equal(final, 2 * x[..., -3:]) and not kept.requires_grad
        assert out is None or final.data_ptr() == kept.data_ptr()
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


def test_convolution_of_packed_rows_keeps_states() -> None:
    x, weight, before = draw(1, 5, 9), draw(5, 4), draw(1, 5, 3)
    idx = torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    y, final = compat.causal_conv1d_fn(x, weight, seq_idx=idx, initial_states=before, return_final_states=True)
    first = compat.causal_conv1d_fn(x[..., :4], weight, initial_states=before)
    second, last = compat.causal_conv1d_fn(x[..., 4:], weight, return_final_states=True)
    torch.testing.assert_close(y, torch.cat([first, second], -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(final, last)


@pytest.mark.parametrize("indexed", [False, True], ids=["rows", "indexed"])
@pytest.mark.parametrize("ring", [False, True], ids=["shifted", "ring"])
@pytest.mark.parametrize("size", [3, 6], ids=["exact", "longer"])
@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1, 1, 1, 1), (4, 2, 3), (9,)], ids=str)
def test_updates_go_on_from_a_convolution(steps: tuple[int, ...], size: int, ring: bool, indexed: bool) -> None:
    x, weight, bias = draw(2, 5, 9), draw(5, 4), draw(5)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=5))
    state = torch.zeros(4 if indexed else 2, 5, size)
    rows = torch.tensor([3, 1], dtype=torch.int32) if indexed else None
    outputs, start = [], 0
    for tokens in steps:
        part = x[..., start : start + tokens]
        seen = torch.full((2,), start, dtype=torch.int32) if ring else None
        single = tokens == 1
        y = compat.causal_conv1d_update(part[..., 0] if single else part, state, weight, bias, "silu", seen, rows)
        outputs.append(y[..., None] if single else y)
        start += tokens
    torch.testing.assert_close(torch.cat(outputs, -1), expected, rtol=1e-5, atol=1e-6)
    kept = state if rows is None else state[rows.long()]
    last = x[..., -size:]
    assert torch.equal(kept, last.roll(9 % size, dims=-1) if ring else last)
    if indexed:
        assert not state[[0, 2]].any()


@pytest.mark.parametrize("places", [(6, -1, 0, -1), (-1, -1, -1, -1)], ids=["some", "all"])
@pytest.mark.parametrize("op", ["scan of Mamba-1", "scan of Mamba-2", "convolution"])
def test_padding_of_an_indexed_batch_gives_zeros_and_leaves_the_states(op: str, places: tuple[int, ...]) -> None:
    """Negative indices: a batch of fixed size has them for the requests that are not there."""
    indices = torch.tensor(places, dtype=torch.int32)
    real = indices >= 0
    if op == "convolution":
        before, weight, by_row = draw(7, 5, 3), draw(5, 4), {"x": draw(4, 5)}

        def step(state: Tensor, indices: Tensor, x: Tensor) -> Tensor:
            return compat.causal_conv1d_update(x, state, weight, conv_state_indices=indices)
    else:
        heads = (3,) if op == "scan of Mamba-2" else ()
        before, A = draw(7, *heads, 5, 6), -draw(*heads, 5, 6).exp()
        by_row = {"x": draw(4, *heads, 5), "dt": draw(4, *heads, 5, seed=1), "B": draw(4, 6), "C": draw(4, 6, seed=1)}

        def step(state: Tensor, indices: Tensor, **by_row: Tensor) -> Tensor:
            return compat.selective_state_update(state, **by_row, A=A, dt_softplus=True, state_batch_indices=indices)

    state, expected = before.clone(), before.clone()
    y = step(state, indices, **by_row)
    assert not y[~real].any()
    others = [place for place in range(7) if place not in places]
    assert torch.equal(state[others], before[others])
    if bool(real.any()):
        outputs = step(expected, indices[real], **{name: value[real] for name, value in by_row.items()})
        torch.testing.assert_close((y[real], state), (outputs, expected), rtol=1e-5, atol=1e-6)


def test_convolution_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
        compat.causal_conv1d_fn(draw(1, 5, 9), draw(5, 4), activation="gelu")
    with pytest.raises(ValueError, match="conv_state must hold at least K - 1 = 3 inputs"):
        compat.causal_conv1d_update(draw(1, 5), torch.zeros(1, 5, 2), draw(5, 4))
    y = compat.causal_conv1d_update(draw(1, 5), torch.zeros(1, 5, 3), torch.zeros(5, 4))
    assert torch.equal(y, torch.zeros(1, 5))
