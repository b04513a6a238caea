"""Decoding: one-token steps against the recurrences' references, and all ops' steps in a CUDA graph."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nothing_waits import NothingWaits
from torch import Tensor

from ssm_zoo.kernels import ssd_triton
from ssm_zoo.kernels.causal_conv1d import causal_conv1d_step
from ssm_zoo.kernels.selective_scan import selective_scan_step
from ssm_zoo.kernels.ssd import ssd_log_decay_reference, ssd_log_decay_step, ssd_reference, ssd_step
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, moved

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)]
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dt": (ssd_step, ssd_reference),
    "log_decay": (ssd_log_decay_step, ssd_log_decay_reference),
}
TIMED = ("x", "dt", "log_decay", "B", "C", "z")
L = 4

SIZES = [  # B, H, P, G, N
    pytest.param((1, 1, 1, 1, 1), id="smallest"),
    pytest.param((1, 4, 5, 2, 7), id="odd"),
    pytest.param((5, 2, 5, 2, 7), id="group-per-head"),
    pytest.param((2, 3, 8, 1, 16), id="powers-of-2"),
]
EXTRAS = [  # what there is of the optional arguments
    pytest.param({"D", "z", "dt_bias"}, {"dt_softplus": True}, id="all"),
    pytest.param({"wide D"}, {"dt_softplus": True, "dt_limit": (0.3, 0.8)}, id="limits"),
    pytest.param({"z"}, {}, id="raw"),
    pytest.param({"dt_bias"}, {"dt_limit": (-0.4, 0.4)}, id="negative"),
]


def draw(form: str, sizes: tuple[int, ...], extras: set[str]) -> dict[str, Tensor]:
    """A row of L tokens in float32, with the state before it."""
    batch, H, P, G, N = sizes
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, L, H, P),
        "B": (batch, L, G, N),
        "C": (batch, L, G, N),
        "state": (batch, H, P, N),
    }
    shapes["dt" if form == "dt" else "log_decay"] = (batch, L, H)
    if form == "dt":
        shapes["A"] = (H,)
    optional = {"D": (H,), "wide D": (H, P), "z": (batch, L, H, P), "dt_bias": (H,)}
    for extra in sorted(extras if form == "dt" else extras - {"dt_bias"}):
        shapes[extra.removeprefix("wide ")] = optional[extra]
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: -value.exp() if name in ("A", "log_decay") else value for name, value in values.items()}


def at(values: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """What a step takes of token t, as views; without the state."""
    return {n: v[:, t] if n in TIMED else v for n, v in values.items() if n != "state"}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected.double(), rtol=rtol, atol=atol, msg=lambda message: f"{name}: {message}"
    )


def check_steps(form: str, values: dict[str, Tensor], options: dict[str, Any], implementation: str) -> None:
    """Every step's output, and the state after them, are those of the reference in float64."""
    step, reference = FORMS[form]
    double = {name: value.double() for name, value in values.items() if name != "state"}
    expected, expected_state = reference(
        **double, **options, initial_state=values["state"].double(), return_final_state=True
    )
    device = DEVICE if implementation == "triton" else "cpu"
    there = {name: moved(value, device) for name, value in values.items()}
    state, dtype = there["state"].clone(), values["x"].dtype
    address = state.data_ptr()
    for t in range(L):
        y = step(state, **at(there, t), **options, implementation=implementation)
        assert y.dtype == dtype and y.is_contiguous()
        close(y, expected[:, t], dtype, f"y at {t}")
    assert state.data_ptr() == address
    close(state, expected_state, state.dtype, "the state")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("extras", "options"), EXTRAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned_empty")
def test_steps_equal_the_reference(
    form: str, extras: set[str], options: dict[str, Any], dtype: torch.dtype, implementation: str
) -> None:
    values = draw(form, (2, 4, 5, 2, 7), extras)
    # The state is in float32, and so is what it is compared with, whatever the inputs are rounded to.
    values = {name: value.to(dtype) if name in TIMED else value for name, value in values.items()}
    check_steps(form, values, options if form == "dt" else {}, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_steps_of_any_size(form: str, sizes: tuple[int, ...], implementation: str) -> None:
    check_steps(form, draw(form, sizes, {"D", "z"}), {}, implementation)


def test_steps_in_float64() -> None:
    values = {name: value.double() for name, value in draw("dt", (2, 4, 3, 2, 5), {"D", "z", "dt_bias"}).items()}
    check_steps("dt", values, {"dt_softplus": True}, "torch")


@NEEDS_TRITON
@pytest.mark.parametrize("tiles", [((16, 0),), ((32, 5), (8, 0)), ((4, 0),)], ids=str)
def test_tiles_of_the_width(tiles: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_triton, "_TILES", tiles)
    check_steps("dt", draw("dt", (2, 2, 5, 1, 7), {"wide D", "z"}), {"dt_softplus": True}, "triton")


@NEEDS_TRITON
def test_small_batches_get_small_tiles() -> None:
    assert ssd_triton._tile(24, 64, 128) == (4, 128, 1)  # of mamba2-130m, batch 1
    assert ssd_triton._tile(128 * 24, 64, 128) == (16, 128, 4)
    assert ssd_triton._tile(24, 3, 5) == (4, 8, 1)
    assert ssd_triton._tile(1, 64, 4096) == (1, 4096, 8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["cut", "turned", "every-second-row"])
def test_views_are_read_and_written_where_they_are(layout: str, implementation: str) -> None:
    """All inputs are parts of one projection, and the state is part of a cache of another layout."""
    H, P, G, N = 4, 5, 2, 7
    device = DEVICE if implementation == "triton" else "cpu"
    projection = torch.randn(2, L, 2 + 2 * H + 4 * (H * P + G * N), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    _, dt, x, B, z, C = projection[..., ::2].split([1, H, H * P, G * N, H * P, G * N], dim=-1)
    vectors = torch.linspace(-1, 1, 4 * H, device=device)[: 3 * H].view(H, 3)
    values = {"dt": dt, "x": x.unflatten(-1, (H, P)), "z": z.unflatten(-1, (H, P)), "A": -vectors[:, 0].exp()}
    values |= {"B": B.unflatten(-1, (G, N)), "C": C.unflatten(-1, (G, N)), "dt_bias": vectors[:, 1]}
    values["D"] = vectors[:, 2, None].expand(H, P)
    if layout == "cut":
        cache = torch.full((2, H, P, N + 3), 9.0, device=device)
        state, rest = cache[..., 1:-2], cache[..., [0, -2, -1]]
    elif layout == "turned":
        cache = torch.full((N, P, 2, H), 9.0, device=device)
        state, rest = cache.permute(2, 3, 1, 0), cache[:0]
    else:
        cache = torch.full((4, H, P, N), 9.0, device=device)
        state, rest = cache[1::2], cache[::2]
    before = torch.randn(2, H, P, N, generator=torch.Generator().manual_seed(1)).to(device)
    state.copy_(before)
    kept = projection.clone()
    dense = {name: value.contiguous() for name, value in values.items()}
    for t in range(L):
        y = ssd_step(state, **at(values, t), dt_softplus=True, implementation=implementation)
        expected = ssd_step(before, **at(dense, t), dt_softplus=True, implementation=implementation)
        close(y, expected.cpu(), torch.float32, f"y at {t}")
    close(state, before.cpu(), torch.float32, "the state")
    assert (rest == 9).all(), "nothing beside the state is written"
    assert torch.equal(projection, kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decay_of_minus_infinity_forgets(implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    values = {name: value.to(device) for name, value in draw("log_decay", (2, 4, 5, 2, 7), set()).items()}
    token, state = at(values, 0), values["state"].clone()
    token["log_decay"][:, ::2] = -math.inf
    y = ssd_log_decay_step(state, **token, implementation=implementation)
    maps = {name: token[name].repeat_interleave(2, dim=1) for name in ("B", "C")}
    inflow = token["x"][..., None] * maps["B"][:, :, None]
    assert torch.equal(state[:, ::2], inflow[:, ::2])
    expected = token["log_decay"].exp()[..., None, None] * values["state"] + inflow
    close(state, expected.cpu(), torch.float32, "the state")
    close(y, (expected * maps["C"][:, :, None]).sum(-1).cpu(), torch.float32, "y")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_stays_in_its_head(implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    values = {name: value.to(device) for name, value in draw("dt", (2, 4, 5, 2, 7), {"D", "z"}).items()}
    token = at(values, 0)
    clean_state, state = values["state"].clone(), values["state"].clone()
    clean = ssd_step(clean_state, **token, dt_limit=(0.0, 9.0), implementation=implementation)
    token["dt"] = token["dt"].clone()
    token["dt"][1, 2] = math.nan
    y = ssd_step(state, **token, dt_limit=(0.0, 9.0), implementation=implementation)
    for got, expected in ((y, clean), (state, clean_state)):
        assert got[1, 2].isnan().all()
        got[1, 2] = expected[1, 2]
        assert torch.equal(got, expected)


def test_a_gradient_is_recorded_by_torch_alone() -> None:
    values = draw("dt", (1, 2, 3, 1, 5), {"D"})
    token = at(values, 0)
    token["x"] = token["x"].clone().requires_grad_()
    y = ssd_step(values["state"].clone(), **token)
    (gradient,) = torch.autograd.grad(y.sum(), token["x"])
    # y is linear in x: its part that is, at x.
    zero = ssd_step(values["state"].clone(), **(token | {"x": torch.zeros_like(token["x"])})).sum()
    torch.testing.assert_close((gradient * token["x"]).sum(), y.sum() - zero, rtol=1e-5, atol=1e-5)
    before = values["state"].clone()
    with pytest.raises(ValueError, match="implementation='triton' of ssd_step is not available for these arguments"):
        ssd_step(values["state"], **token, implementation="triton")
    assert torch.equal(values["state"], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_states_of_low_precision_are_refused(form: str, dtype: torch.dtype) -> None:
    values = draw(form, (1, 2, 3, 1, 5), set())
    state = values["state"].to(dtype)
    before = state.clone()
    with pytest.raises(ValueError, match=f"^state must be float32 or float64, got {dtype}$"):
        FORMS[form][0](state, **at(values, 0))
    assert torch.equal(state, before)


# Every op's step as `step(state, *token, implementation=...)`, with its sizes: state, then what a token brings.
# Parameters are drawn with the tokens: a graph reads them at their addresses too.
STEPS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "ssd_step": (
        ssd_step,
        {"state": (2, 4, 5, 7), "x": (2, 4, 5), "dt": (2, 4), "A": (4,), "B": (2, 2, 7), "C": (2, 2, 7), "D": (4,)}
        | {"z": (2, 4, 5), "dt_bias": (4,)},
        {"dt_softplus": True, "dt_limit": (0.1, 2.0)},
    ),
    "ssd_log_decay_step": (
        ssd_log_decay_step,
        {"state": (2, 4, 5, 7), "x": (2, 4, 5), "log_decay": (2, 4), "B": (2, 2, 7), "C": (2, 2, 7), "D": (4, 5)}
        | {"z": (2, 4, 5)},
        {},
    ),
    "selective_scan_step": (
        selective_scan_step,
        {"state": (2, 6, 5), "x": (2, 6), "dt": (2, 6), "A": (6, 5), "B": (2, 2, 5), "C": (2, 2, 5), "D": (6,)}
        | {"z": (2, 6), "dt_bias": (6,)},
        {"dt_softplus": True},
    ),
    "causal_conv1d_step": (
        causal_conv1d_step,
        {"state": (2, 6, 3), "x": (2, 6), "weight": (6, 4), "bias": (6,)},
        {"activation": "silu"},
    ),
}


def tokens_of(name: str, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [{n: torch.randn(s, generator=generator) for n, s in STEPS[name][1].items()} for _ in range(count)]
    return [{n: -v.exp() if n in ("A", "log_decay") else v for n, v in token.items()} for token in drawn]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_needs_no_value(name: str) -> None:
    """On tensors without values: one that is asked for, or a copy of one elsewhere, does not exist."""
    step, sizes, options = STEPS[name]
    values = {n: torch.empty(s, device="meta") for n, s in sizes.items()}
    with torch.no_grad(), NothingWaits():
        y = step(**values, **options, implementation="torch")
    assert y.is_meta and y.shape == values["x"].shape


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_two_steps_are_complete_and_bit_identical(name: str, implementation: str, dtype: torch.dtype) -> None:
    step, _, options = STEPS[name]
    kept = ("state", "A", "D", "dt_bias") if name != "causal_conv1d_step" else ()
    (drawn,) = tokens_of(name, 1)
    values = {n: v.to(DEVICE if implementation == "triton" else "cpu") for n, v in drawn.items()}
    values = {n: v if n in kept else v.to(dtype) for n, v in values.items()}
    states = [values["state"].clone() for _ in range(2)]
    outputs = [step(**(values | {"state": state}), **options, implementation=implementation) for state in states]
    assert outputs[0].isfinite().all() and torch.equal(*outputs)
    assert states[0].isfinite().all() and torch.equal(*states)


@pytest.mark.parametrize("name", STEPS)
def test_autocast_rounds_nothing(name: str) -> None:
    step, _, options = STEPS[name]
    (values,) = tokens_of(name, 1)
    results = []
    for enabled in (False, True):
        state = values["state"].clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            results.append((step(**(values | {"state": state}), **options), state))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_and_its_state_stays(name: str, implementation: str) -> None:
    step, _, options = STEPS[name]
    first, *rest = tokens_of(name, 3)
    device = DEVICE if implementation == "triton" else "cpu"
    state = first["state"].to(device)
    address = state.data_ptr()
    for token in (first, *rest):
        values = {n: v.to(device) for n, v in token.items()} | {"state": state}
        before = state.clone()
        with NothingWaits():
            y = step(**values, **options, implementation=implementation)
        assert state.data_ptr() == address and not torch.equal(state, before)
        assert y.data_ptr() not in {value.data_ptr() for value in values.values()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.nonzero, lambda t: t.to("meta" if t.is_cpu else "cpu"), lambda t: bool(t.any())],
    ids=["item", "nonzero", "copy", "bool"],
)
def test_what_waits_is_found(wait: Callable[[Tensor], Any], device: str) -> None:
    with pytest.raises(AssertionError, match=r"waits for the device|copies between"), NothingWaits():
        wait(torch.ones(1, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_replays_steps(name: str, implementation: str) -> None:
    step, _, options = STEPS[name]
    tokens = [{n: v.cuda() for n, v in token.items()} for token in tokens_of(name, 5)]
    held = {n: v.clone() for n, v in tokens[0].items()}
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step(**held, **options, implementation=implementation)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(**held, **options, implementation=implementation)
    state = tokens[0]["state"].clone()
    held["state"].copy_(state)
    for t, token in enumerate(tokens):
        for n, value in token.items():
            if n != "state":
                held[n].copy_(value)
        graph.replay()
        expected = step(**(token | {"state": state}), **options, implementation=implementation)
        assert torch.equal(y, expected), f"y at {t}"
        assert torch.equal(held["state"], state), f"the state after {t}"
