"""The SSD recurrences and their steps against an oracle that loops over batch, head and time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.ssd import (
    ssd,
    ssd_log_decay,
    ssd_log_decay_reference,
    ssd_log_decay_step,
    ssd_reference,
    ssd_step,
)
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

Q = 8  # tokens of a chunk, here
FORMS = ["dt", "log_decay"]
OPS: dict[str, dict[str, Callable[..., Any]]] = {
    form: {
        "reference": reference,
        "torch": partial(op, chunk_size=Q),
        "torch-default-chunk": op,
        "triton": with_triton(partial(op, chunk_size=2 * Q)),  # the shortest that its tiles allow
        "triton-default-chunk": with_triton(op),
    }
    for form, op, reference in (("dt", ssd, ssd_reference), ("log_decay", ssd_log_decay, ssd_log_decay_reference))
}
TRITON = pytest.param("triton", marks=NEEDS_TRITON)
TRITON_DEFAULT_CHUNK = pytest.param("triton-default-chunk", marks=NEEDS_TRITON)
SOFTPLUS = {"dt": {"dt_softplus": True, "dt_limit": (0.05, 1.5)}, "log_decay": {}}

SHAPES = [  # B, L, H, P, G, N
    pytest.param((1, 1, 1, 1, 1, 1), id="smallest"),
    pytest.param((2, 1, 4, 3, 2, 5), id="one-token"),
    pytest.param((1, 2, 4, 3, 4, 2), id="two-tokens"),
    pytest.param((1, Q - 1, 4, 2, 1, 3), id="chunk-minus-1"),
    pytest.param((2, Q, 2, 3, 2, 2), id="one-chunk"),
    pytest.param((1, Q + 1, 4, 2, 2, 3), id="chunk-plus-1"),
    pytest.param((1, 13, 4, 1, 1, 3), id="prime"),
    pytest.param((2, 2 * Q, 2, 2, 1, 1), id="two-chunks"),
    pytest.param((1, 2 * Q + 1, 8, 2, 1, 3), id="two-chunks-plus-1"),
    pytest.param((1, 4 * Q + 5, 4, 3, 4, 2), id="ragged-chunks"),
]
# Documents of a packed row; negative marks padding.
LAYOUTS = [
    pytest.param([[0] * 11], id="one-document"),
    pytest.param([[0] + [1] * 12], id="boundary-at-1"),
    pytest.param([[0] * 5 + [1] * 15], id="boundary-inside-a-chunk"),
    pytest.param([[0] * 8 + [1] * 10, [4] * 16 + [9] * 2], id="boundary-on-a-chunk-edge"),
    pytest.param([[0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4]], id="several-in-one-chunk"),
    pytest.param([list(range(10))], id="documents-of-one-token"),
    pytest.param([[-1] * 3 + [0] * 7, [0] * 10], id="padding-left"),
    pytest.param([[-1] * 9 + [0] * 4], id="padding-of-a-whole-chunk"),
    pytest.param([[0] * 7 + [-1] * 3, [0] * 2 + [-1] * 8], id="padding-right"),
    pytest.param([[0] * 3 + [-1] * 4 + [0] * 4], id="padding-inside-a-document"),
    pytest.param([[-1, 0, 0, -5, 1, 1, 1, -1, -1, 1, 2, -1]], id="padding-everywhere"),
    pytest.param([[-1] * 6, [0, 0, 0, 1, 1, 1], [-2, -1] * 3], id="rows-of-padding"),
]


def oracle(
    values: dict[str, Tensor],
    layout: list[list[int]] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Outputs (zero at padding) and final state, one token of one head at a time."""
    x, B, C = values["x"], values["B"], values["C"]
    batch, length, heads, width = x.shape
    per_group, size = heads // B.shape[2], B.shape[3]
    rows, states = [], []
    for b in range(batch):
        columns = []
        for h in range(heads):
            g = h // per_group
            state = x.new_zeros(width, size)
            if "initial_state" in values:
                state = values["initial_state"][b, h]
            outputs, document = [], None
            for t in range(length):
                current = layout[b][t] if layout else 0
                if current < 0:
                    outputs.append(x.new_zeros(width))
                    continue
                if "log_decay" in values:
                    a, u = values["log_decay"][b, t, h], x[b, t, h]
                else:
                    step = values["dt"][b, t, h]
                    if "dt_bias" in values:
                        step = step + values["dt_bias"][h]
                    if dt_softplus:
                        step = torch.log(1 + torch.exp(step))
                    step = torch.clamp(step, *dt_limit)
                    a, u = step * values["A"][h], step * x[b, t, h]
                inflow = torch.outer(u, B[b, t, g])
                state = inflow if document not in (None, current) else torch.exp(a) * state + inflow
                document = current
                y = state @ C[b, t, g]
                if "D" in values:
                    y = y + values["D"][h] * x[b, t, h]
                if "z" in values:
                    z = values["z"][b, t, h]
                    y = y * z / (1 + torch.exp(-z))
                outputs.append(y)
            columns.append(torch.stack(outputs))
            states.append(state)
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows), torch.stack(states).view(batch, heads, width, size)


def draw(
    form: str, shape: tuple[int, ...], without: tuple[str, ...] = (), skip_width: bool = False
) -> dict[str, Tensor]:
    """All inputs of the op by name, of order 1, float64; `skip_width` makes D (H, P)."""
    batch, length, heads, width, groups, size = shape
    generator = torch.Generator().manual_seed(sum(10**i * n for i, n in enumerate(shape)) % 2**31)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    values = {"x": normal(batch, length, heads, width)}
    if form == "dt":
        values |= {"dt": normal(batch, length, heads), "A": -normal(heads).exp(), "dt_bias": normal(heads)}
    else:
        values |= {"log_decay": -normal(batch, length, heads).square()}
    values |= {
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(heads, width) if skip_width else normal(heads),
        "z": normal(batch, length, heads, width),
        "initial_state": normal(batch, heads, width, size),
    }
    return {name: value for name, value in values.items() if name not in without}


def leaves(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Trainable copies; in half precision, parameters and states stay float32, as in a model."""
    half = dtype in (torch.bfloat16, torch.float16)
    kept = ("A", "D", "dt_bias", "initial_state") if half else ()
    return {
        name: value.detach().to(torch.float32 if name in kept else dtype).requires_grad_()
        for name, value in values.items()
    }


def differentiate(y: Tensor, state: Tensor, values: dict[str, Tensor], real: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of the real tokens' outputs and the final state."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for result in (y, state):
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        if result is y and real is not None:
            weights = weights * real[:, :, None, None]
        loss = loss + (result.double() * weights).sum()
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, gradients, strict=True))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def check_against_oracle(
    op: Callable[..., Any],
    values: dict[str, Tensor],
    dtype: torch.dtype,
    layout: list[list[int]] | None = None,
    **options: Any,
) -> None:
    given = leaves(values, dtype)
    exact = leaves(given, torch.float64)  # of the rounded inputs
    seq_idx = None if layout is None else torch.tensor(layout)
    real = torch.ones(given["x"].shape[:2], dtype=torch.bool) if seq_idx is None else seq_idx >= 0
    y, state = op(**given, seq_idx=seq_idx, return_final_state=True, **options)
    expected_y, expected_state = oracle(exact, layout, **options)
    assert y.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(y[real], expected_y[real], dtype, "y")
    close(state, expected_state, state.dtype, "the final state")
    gradients = differentiate(expected_y, expected_state, exact, real)
    for name, gradient in differentiate(y, state, given, real).items():
        assert gradient.dtype == given[name].dtype
        close(gradient, gradients[name], dtype, f"d{name}")
        if gradient.shape[:2] == real.shape and not real.all():
            assert not gradient[~real].any(), f"d{name} at padding"


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in ("reference", "torch") for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [pytest.param("triton", torch.float32, marks=NEEDS_TRITON)],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(form: str, op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_oracle(OPS[form][op], draw(form, shape), dtype, **SOFTPLUS[form])


@NEEDS_TRITON
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[-3:])
def test_kernels_in_bfloat16_match_the_oracle(form: str, shape: tuple[int, ...]) -> None:
    check_against_oracle(OPS[form]["triton"], draw(form, shape), torch.bfloat16, **SOFTPLUS[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["torch-default-chunk", TRITON_DEFAULT_CHUNK])
@pytest.mark.parametrize("form", FORMS)
def test_wide_heads_match_the_reference(form: str, op: str, dtype: torch.dtype) -> None:
    """Several tiles of a head, none of them full, and a document that begins inside the second chunk."""
    values = draw(form, (1, 67, 2, 65, 2, 80))
    values["B"], values["C"] = values["B"] / 80**0.5, values["C"] / 80**0.5  # as the tolerances assume
    values["A" if form == "dt" else "log_decay"] *= 0.01  # the state entering a chunk matters to its end
    seq_idx = torch.tensor([[0] * 65 + [1] * 2])
    given = leaves(values, dtype)
    results = []
    for function, inputs in ((OPS[form][op], given), (OPS[form]["reference"], leaves(given, torch.float64))):
        y, state = function(**inputs, seq_idx=seq_idx, return_final_state=True, **SOFTPLUS[form])
        results.append({"y": y, "state": state} | differentiate(y, state, inputs))
    for name, expected in results[1].items():
        if dtype == torch.float32 or name == "state":
            close(results[0][name], expected, torch.float32, name)
        else:  # a few u of the terms of a long sum: one wrong row or column is an eighth of the norm
            error = (results[0][name] - expected).norm() / expected.norm()
            assert error < TOLERANCES[dtype][0] / 2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("op", ["reference", "torch", TRITON])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_match_the_oracle(form: str, op: str, layout: list[list[int]]) -> None:
    values = draw(form, (len(layout), len(layout[0]), 2, 2, 1, 3))
    check_against_oracle(OPS[form][op], values, torch.float32, layout, **SOFTPLUS[form])


@pytest.mark.parametrize("op", ["reference", "torch", TRITON])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "without",
    [("D",), ("z",), ("initial_state",), ("D", "z", "initial_state", "dt_bias")],
    ids="-".join,
)
def test_optional_inputs_match_the_oracle(form: str, op: str, without: tuple[str, ...]) -> None:
    values = draw(form, (2, Q + 3, 2, 3, 1, 2), without, skip_width="D" not in without)
    layout = [[0] * Q + [1] * 3, [-1] * 4 + [0] * 5 + [1] * 2]
    check_against_oracle(OPS[form][op], values, torch.float32, **SOFTPLUS[form])
    check_against_oracle(OPS[form][op], values, torch.float32, layout, **SOFTPLUS[form])


@pytest.mark.parametrize("op", ["reference", "torch"])
@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.5, 1.0), (0.0, 0.7)], ids=str)
def test_step_sizes_match_the_oracle(op: str, dt_softplus: bool, dt_limit: tuple[float, float]) -> None:
    values = draw("dt", (1, 11, 2, 2, 1, 2))
    if not dt_softplus:  # step sizes are positive then
        values["dt"], values["dt_bias"] = values["dt"].abs(), values["dt_bias"].abs()
    check_against_oracle(OPS["dt"][op], values, torch.float32, dt_softplus=dt_softplus, dt_limit=dt_limit)


@pytest.mark.parametrize("op", ["reference", "torch"])
@pytest.mark.parametrize("layout", [None, [[0, 0, 1, -1, 1]]], ids=["plain", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, op: str, layout: list[list[int]] | None) -> None:
    values = leaves(draw(form, (1, 5, 2, 2, 1, 2)), torch.float64)
    seq_idx = None if layout is None else torch.tensor(layout)
    function = OPS[form][op] if op == "reference" else partial(OPS[form][op], chunk_size=2)
    options = {"dt_softplus": True} if form == "dt" else {}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(values, tensors, strict=True))
        return function(**named, seq_idx=seq_idx, return_final_state=True, **options)

    assert torch.autograd.gradcheck(run, tuple(values.values()))


def sliced(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The tokens of `part`: what has a time axis is cut, the rest is shared."""
    timed = ("x", "dt", "log_decay", "B", "C", "z")
    return {name: value[:, part] if name in timed else value for name, value in values.items()}


@pytest.mark.parametrize(
    ("op", "split"),
    [("torch", split) for split in (1, 3, Q - 1, Q, Q + 1, 2 * Q, 18)]
    + [pytest.param("triton", split, marks=NEEDS_TRITON) for split in (1, Q + 1, 2 * Q)],
)
@pytest.mark.parametrize("form", FORMS)
def test_continuing_from_the_state_equals_the_whole(form: str, op: str, split: int) -> None:
    values = draw(form, (1, 19, 2, 2, 1, 3))
    whole, parts = leaves(values, torch.float32), leaves(values, torch.float32)
    function, options = OPS[form][op], SOFTPLUS[form] | {"return_final_state": True}
    expected = function(**whole, **options)
    head, state = function(**sliced(parts, slice(split)), **options)
    tail, state = function(**sliced(parts, slice(split, None)) | {"initial_state": state}, **options)
    y = torch.cat([head, tail], dim=1)
    close(y, expected[0], torch.float32, "y")
    close(state, expected[1], torch.float32, "the final state")
    gradients = differentiate(*expected, whole)
    for name, gradient in differentiate(y, state, parts).items():
        close(gradient, gradients[name], torch.float32, f"d{name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("without", "skip_width"),
    [((), False), (("D",), False), (("z", "dt_bias"), True)],
    ids=["all", "no-skip", "no-gate"],
)
def test_step_by_step_equals_the_whole(
    form: str, dtype: torch.dtype, without: tuple[str, ...], skip_width: bool
) -> None:
    drawn = draw(form, (2, 11, 4, 3, 2, 2), without, skip_width)
    values = {name: value.detach() for name, value in leaves(drawn, dtype).items()}
    expected, expected_state = OPS[form]["torch"](**values, **SOFTPLUS[form], return_final_state=True)
    state = values.pop("initial_state").clone()
    address = state.data_ptr()
    step = ssd_step if form == "dt" else ssd_log_decay_step
    for t in range(11):
        token = {
            n: v[:, 0] if n in ("x", "dt", "log_decay", "B", "C", "z") else v
            for n, v in sliced(values, slice(t, t + 1)).items()
        }
        y = step(state, **token, **SOFTPLUS[form])
        assert y.dtype == dtype
        close(y, expected[:, t], dtype, f"y at {t}")
    assert state.data_ptr() == address
    close(state, expected_state, state.dtype, "the state, updated in place")


@pytest.mark.parametrize("op", ["reference", "torch", TRITON])
@pytest.mark.parametrize("form", FORMS)
def test_nan_in_padding_stays_there(form: str, op: str) -> None:
    """NaN in inputs, and in the gradient of the outputs."""
    layout = torch.tensor([[-1, 0, 0, -1, 0, 0, 0, 0, 1, 1, -1]])
    real = layout >= 0
    drawn = draw(form, (1, 11, 2, 2, 1, 3))
    results = []
    for padding in (0.0, torch.nan):
        values = leaves(drawn, torch.float32)
        for name, value in values.items():
            if name in ("x", "dt", "log_decay", "B", "C", "z"):
                value.data[~real] = padding
        y, state = OPS[form][op](**values, seq_idx=layout, return_final_state=True, **SOFTPLUS[form])
        arriving = torch.ones_like(y)
        arriving[~real] = padding
        gradients = torch.autograd.grad([y, state], list(values.values()), [arriving, torch.ones_like(state)])
        results.append([y, state, *gradients])
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


@pytest.mark.parametrize(
    ("implementation", "chunk_size"),
    [("torch", size) for size in (1, 3, 16, 100, None)]
    + [pytest.param("triton", size, marks=NEEDS_TRITON) for size in (1, 17, None)],
)
@pytest.mark.parametrize("form", FORMS)
def test_chunk_size_does_not_matter(form: str, implementation: str, chunk_size: int | None) -> None:
    """70 tokens: more than one of the default chunks."""
    values = leaves(draw(form, (1, 70, 2, 3, 1, 4)), torch.float32)
    results = []
    for op, size in (("torch", Q), (implementation, chunk_size)):
        y, state = OPS[form][f"{op}-default-chunk"](
            **values, return_final_state=True, chunk_size=size, **SOFTPLUS[form]
        )
        results.append({"y": y, "state": state} | differentiate(y, state, values))
    for name, expected in results[0].items():
        close(results[1][name], expected, torch.float32, name)


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_equal_the_reference(packed: bool) -> None:
    """A thousand tokens: state carried over many chunks, and whatever blocks the op works in above them."""
    values = leaves(draw("log_decay", (1, 1100, 1, 2, 1, 2)), torch.float64)
    values["log_decay"].data.mul_(0.01)
    seq_idx = torch.arange(1100)[None] // 470 if packed else None
    results = []
    for op in (ssd_log_decay_reference, ssd_log_decay):
        y, state = op(**values, seq_idx=seq_idx, return_final_state=True)
        results.append({"y": y, "state": state} | differentiate(y, state, values))
    for name, expected in results[0].items():
        close(results[1][name], expected, torch.float64, name)


def strong_decays(forget: float) -> Tensor:
    """(1, 130, 2) mild decays, in between one of -200 or -inf every few tokens.

    Sums over a chunk reach -4000, where float32 numbers are 2.4e-4 apart: a difference of two of them has lost
    what a mild decay between neighbours adds.
    """
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(1, 130, 2, generator=generator, dtype=torch.float64)
    log_decay[:, ::3] = forget
    return log_decay


@pytest.mark.parametrize("op", ["reference", "torch", "torch-default-chunk", TRITON, TRITON_DEFAULT_CHUNK])
@pytest.mark.parametrize(
    ("form", "forget"),  # a step size is finite, and so is dt A
    [("dt", -200.0), ("log_decay", -200.0), ("log_decay", -math.inf)],
)
def test_strong_decays_are_exact(form: str, forget: float, op: str) -> None:
    values = draw(form, (1, 130, 2, 2, 1, 3), without=("D", "z", "dt_bias"))
    values = {name: value if name == "A" else value.abs() for name, value in values.items()}  # nothing cancels
    values[form] = strong_decays(forget)
    if form == "dt":
        values["A"] = torch.tensor([-1.0, -4.0], dtype=torch.float64)
        values["dt"] = values["dt"] / values["A"]
    function = OPS[form][op]
    given = leaves(values, torch.float32)
    exact = leaves(given, torch.float64)
    y, state = function(**given, return_final_state=True)
    expected_y, expected_state = oracle(exact)
    for name, actual, expected in (("y", y, expected_y), ("state", state, expected_state)):
        assert actual.isfinite().all(), name
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-4, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    gradients = torch.autograd.grad(expected_y.sum() + expected_state.sum(), list(exact.values()))
    actual_gradients = torch.autograd.grad(y.sum() + state.sum(), list(given.values()))
    for name, actual, expected in zip(values, actual_gradients, gradients, strict=True):
        assert actual.isfinite().all(), f"d{name}"
        close(actual, expected, torch.float32, f"d{name}")


@pytest.mark.parametrize("op", ["torch", TRITON])
@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_equal_contiguous_ones(form: str, op: str) -> None:
    """In a model, x, B and C are slices of one projection."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 11, 4 * 3 + 2 * 2 * 5, generator=generator)
    drawn = draw(form, (2, 11, 4, 3, 2, 5), without=("D", "z", "initial_state"))
    results = []
    for contiguous in (False, True):
        values = leaves(drawn, torch.float32)
        x, B, C = wide.split([12, 10, 10], dim=-1)
        x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
        assert not x.is_contiguous()
        if contiguous:
            x, B, C = x.contiguous(), B.contiguous(), C.contiguous()
        values |= {name: value.requires_grad_() for name, value in (("x", x), ("B", B), ("C", C))}
        y, state = OPS[form][op](**values, return_final_state=True, **SOFTPLUS[form])
        gradients = torch.autograd.grad(y.sum() + state.sum(), list(values.values()))
        results.append({"y": y, "state": state} | dict(zip(values, gradients, strict=True)))
    for name, expected in results[1].items():
        close(results[0][name], expected, torch.float32, name)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", [None, [[-1] * 2 + [0] * 7 + [1] * 4]], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["torch", TRITON])
@pytest.mark.parametrize("form", FORMS)
def test_runs_are_complete_and_bit_identical(
    form: str, op: str, dtype: torch.dtype, layout: list[list[int]] | None
) -> None:
    values = leaves(draw(form, (1, 13, 4, 3, 2, 2)), dtype)
    seq_idx = None if layout is None else torch.tensor(layout)
    runs = []
    for _ in range(2):
        y, state = OPS[form][op](**values, seq_idx=seq_idx, return_final_state=True, **SOFTPLUS[form])
        runs.append([y, state, *differentiate(y, state, values).values()])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@NEEDS_TRITON
@pytest.mark.parametrize("used", ["outputs", "state"])
@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes_and_gradients_of_one_result_equal_the_torch_path(form: str, used: str) -> None:
    values = leaves(draw(form, (1, 19, 2, 3, 1, 4)), torch.float32)
    values["x"] = values["x"].detach().bfloat16().requires_grad_()  # and float32 maps
    results = []
    for op in ("torch", "triton"):
        y, state = OPS[form][op](**values, return_final_state=True, **SOFTPLUS[form])
        unused = torch.zeros(())
        gradients = differentiate(y, unused, values) if used == "outputs" else differentiate(unused, state, values)
        results.append({"y": y, "state": state} | gradients)
    for name, expected in results[0].items():
        assert results[1][name].dtype == expected.dtype
        close(results[1][name], expected, expected.dtype, name)
