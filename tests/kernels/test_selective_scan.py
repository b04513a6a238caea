"""The selective scan and its step against an oracle that loops over batch, channel and time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels import selective_scan as torch_path
from ssm_zoo.kernels import selective_scan_triton as triton_path
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, with_triton

Q = 8  # tokens of a chunk, here: of the torch path, and between the states that the Triton kernels save
REFERENCE = pytest.param(selective_scan_reference, id="reference")
TORCH = pytest.param(partial(selective_scan, implementation="torch"), id="torch")
TRITON = pytest.param(with_triton(selective_scan), id="triton", marks=NEEDS_TRITON)
ALL_OPS = [REFERENCE, TORCH, TRITON]
TIMED = ("x", "dt", "B", "C", "z")

SHAPES = [  # B, L, D, G, N
    pytest.param((1, 1, 1, 1, 1), id="smallest"),
    pytest.param((2, 1, 4, 2, 5), id="one-token"),
    pytest.param((1, 2, 4, 4, 2), id="two-tokens"),
    pytest.param((1, Q - 1, 4, 1, 3), id="chunk-minus-1"),
    pytest.param((2, Q, 2, 2, 2), id="one-chunk"),
    pytest.param((1, Q + 1, 6, 2, 3), id="chunk-plus-1"),
    pytest.param((1, 13, 5, 1, 3), id="prime"),
    pytest.param((3, 2 * Q, 2, 1, 1), id="two-chunks"),
    pytest.param((1, 4 * Q + 5, 4, 2, 2), id="ragged-chunks"),
    pytest.param((1, 3, 70, 1, 17), id="several-tiles"),
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


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, and few states at a time: small shapes then meet every edge that large ones have."""
    monkeypatch.setattr(torch_path, "_CHUNK", Q)
    monkeypatch.setattr(torch_path, "_STATES", 12)
    monkeypatch.setattr(triton_path, "_SPAN", Q)
    monkeypatch.setattr(triton_path, "_SHORTEST_SEGMENT", Q)
    monkeypatch.setattr(triton_path, "_FEWEST_SEGMENTS", 2)


pytestmark = pytest.mark.usefixtures("small_chunks")


def oracle(
    values: dict[str, Tensor], layout: list[list[int]] | None = None, dt_softplus: bool = True
) -> tuple[Tensor, Tensor]:
    """Outputs (zero at padding) and final state, one token of one channel at a time."""
    x, A, B, C = (values[name] for name in ("x", "A", "B", "C"))
    batch, length, channels = x.shape
    per_group, size = channels // B.shape[2], B.shape[3]
    rows, states = [], []
    for b in range(batch):
        columns = []
        for d in range(channels):
            g = d // per_group
            state = values["initial_state"][b, d] if "initial_state" in values else x.new_zeros(size)
            outputs, document = [], None
            for t in range(length):
                current = layout[b][t] if layout else 0
                if current < 0:
                    outputs.append(x.new_zeros(()))
                    continue
                step = values["dt"][b, t, d]
                if "dt_bias" in values:
                    step = step + values["dt_bias"][d]
                if dt_softplus:
                    step = torch.log(1 + torch.exp(step))
                kept = torch.exp(step * A[d]) * state if document in (None, current) else x.new_zeros(size)
                state = kept + step * x[b, t, d] * B[b, t, g]
                document = current
                y = torch.dot(state, C[b, t, g])
                if "D" in values:
                    y = y + values["D"][d] * x[b, t, d]
                if "z" in values:
                    z = values["z"][b, t, d]
                    y = y * z / (1 + torch.exp(-z))
                outputs.append(y)
            columns.append(torch.stack(outputs))
            states.append(state)
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows), torch.stack(states).view(batch, channels, size)


def draw(shape: tuple[int, ...], without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All inputs of the op by name, of order 1, float64."""
    batch, length, channels, groups, size = shape
    generator = torch.Generator().manual_seed(sum(10**i * n for i, n in enumerate(shape)) % 2**31)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": -normal(channels, size).exp(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": normal(channels),
        "initial_state": normal(batch, channels, size),
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
            weights = weights * real[:, :, None]
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
    dt_softplus: bool = True,
) -> None:
    given = leaves(values, dtype)
    exact = leaves(given, torch.float64)  # of the rounded inputs
    seq_idx = None if layout is None else torch.tensor(layout)
    real = torch.ones(given["x"].shape[:2], dtype=torch.bool) if seq_idx is None else seq_idx >= 0
    y, state = op(**given, seq_idx=seq_idx, return_final_state=True, dt_softplus=dt_softplus)
    expected_y, expected_state = oracle(exact, layout, dt_softplus)
    assert y.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(y, expected_y, dtype, "y")
    close(state, expected_state, state.dtype, "the final state")
    gradients = differentiate(expected_y, expected_state, exact, real)
    for name, gradient in differentiate(y, state, given, real).items():
        assert gradient.dtype == given[name].dtype
        close(gradient, gradients[name], dtype, f"d{name}")
        if name in TIMED and not real.all():
            assert not gradient[~real].any(), f"d{name} at padding"


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(*op.values, dtype, id=f"{op.id}-{dtype}", marks=op.marks)
        for op in ALL_OPS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if op is not TRITON or dtype != torch.float64
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(op: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_oracle(op, draw(shape), dtype)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_match_the_oracle(op: Callable[..., Any], layout: list[list[int]]) -> None:
    check_against_oracle(op, draw((len(layout), len(layout[0]), 2, 1, 3)), torch.float32, layout)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize(
    "without",
    [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "initial_state", "dt_bias")],
    ids="-".join,
)
def test_optional_inputs_match_the_oracle(op: Callable[..., Any], without: tuple[str, ...]) -> None:
    values = draw((2, Q + 1, 3, 1, 2), without)
    check_against_oracle(op, values, torch.float32, [[0] * Q + [1], [-1] * 4 + [0] * 4 + [1]])


@pytest.mark.parametrize("op", ALL_OPS)
def test_positive_step_sizes_without_softplus(op: Callable[..., Any]) -> None:
    values = draw((1, 11, 4, 2, 2))
    values["dt"], values["dt_bias"] = values["dt"].abs(), values["dt_bias"].abs()
    check_against_oracle(op, values, torch.float32, [[0] * 5 + [-1] * 2 + [1] * 4], dt_softplus=False)


@pytest.mark.parametrize("op", ALL_OPS)
def test_softplus_is_exact_far_from_zero(op: Callable[..., Any]) -> None:
    """Step sizes of 1e-13 to 60: y = C B dt x keeps their relative precision."""
    ones = torch.ones(1, 1, 8, dtype=torch.float64)
    raw = torch.tensor([-30.0, -16.0, -9.0, -1.0, 1.0, 19.0, 21.0, 60.0], dtype=torch.float64)
    values = {
        "x": ones,
        "dt": raw.view(1, 1, 8),
        "A": -ones[0].t(),
        "B": ones[:, None, :, :1],
        "C": ones[:, None, :, :1],
    }
    given = leaves(values, torch.float32)
    y = op(**given, dt_softplus=True)
    torch.testing.assert_close(y.double(), torch.log1p(raw.exp()).view(1, 1, 8), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), [given["dt"]])
    torch.testing.assert_close(gradient.double(), raw.sigmoid().view(1, 1, 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", [REFERENCE, TORCH])
@pytest.mark.parametrize("layout", [None, [[0, 0, 1, -1, 1]]], ids=["plain", "packed"])
def test_gradcheck(op: Callable[..., Any], layout: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "_CHUNK", 2)
    values = leaves(draw((1, 5, 2, 1, 2)), torch.float64)
    seq_idx = None if layout is None else torch.tensor(layout)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(values, tensors, strict=True))
        return op(**named, seq_idx=seq_idx, return_final_state=True, dt_softplus=True)

    assert torch.autograd.gradcheck(run, tuple(values.values()))


def sliced(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The tokens of `part`: what has a time axis is cut, the rest is shared."""
    return {name: value[:, part] if name in TIMED else value for name, value in values.items()}


@pytest.mark.parametrize(
    ("op", "split"),
    [
        pytest.param(*op.values, split, id=f"{op.id}-{split}", marks=op.marks)
        for op, splits in ((TORCH, [1, 3, Q - 1, Q, Q + 1, 2 * Q, 18]), (TRITON, [1, Q, 11]))
        for split in splits
    ],
)
def test_continuing_from_the_state_equals_the_whole(op: Callable[..., Any], split: int) -> None:
    values = draw((1, 19, 2, 1, 3))
    whole, parts = leaves(values, torch.float32), leaves(values, torch.float32)
    options = {"return_final_state": True, "dt_softplus": True}
    expected = op(**whole, **options)
    head, state = op(**sliced(parts, slice(split)), **options)
    tail, state = op(**sliced(parts, slice(split, None)) | {"initial_state": state}, **options)
    y = torch.cat([head, tail], dim=1)
    close(y, expected[0], torch.float32, "y")
    close(state, expected[1], torch.float32, "the final state")
    gradients = differentiate(*expected, whole)
    for name, gradient in differentiate(y, state, parts).items():
        close(gradient, gradients[name], torch.float32, f"d{name}")


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [pytest.param("triton", dtype, marks=NEEDS_TRITON) for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("without", [(), ("D",), ("z", "dt_bias")], ids=["all", "no-skip", "no-gate"])
def test_step_by_step_equals_the_whole(implementation: str, dtype: torch.dtype, without: tuple[str, ...]) -> None:
    values = {name: value.detach() for name, value in leaves(draw((2, 11, 6, 2, 3), without), dtype).items()}
    expected, expected_state = selective_scan_reference(**values, dt_softplus=True, return_final_state=True)
    device = DEVICE if implementation == "triton" else "cpu"
    values = {name: value.to(device) for name, value in values.items()}
    cache = torch.zeros(2, 6, 5, dtype=expected_state.dtype, device=device)
    state = cache[..., 1:4]  # inside a larger cache
    state.copy_(values.pop("initial_state"))
    for t in range(11):
        token = {name: value[:, t] if name in TIMED else value for name, value in values.items()}
        y = selective_scan_step(state, **token, dt_softplus=True, implementation=implementation)
        assert y.dtype == dtype
        close(y.cpu(), expected[:, t], dtype, f"y at {t}")
    close(state.cpu(), expected_state, state.dtype, "the state, updated in place")
    assert not cache[..., [0, 4]].any(), "and nothing beside it"


@pytest.mark.parametrize("op", ALL_OPS)
def test_nan_in_padding_stays_there(op: Callable[..., Any]) -> None:
    """NaN in inputs, and in the gradient of the outputs."""
    layout = torch.tensor([[-1, 0, 0, -1, 0, 0, 0, 0, 1, 1, -1]])
    real = layout >= 0
    drawn = draw((1, 11, 2, 1, 3))
    results = []
    for padding in (0.0, torch.nan):
        values = leaves(drawn, torch.float32)
        for name in TIMED:
            values[name].data[~real] = padding
        y, state = op(**values, seq_idx=layout, return_final_state=True, dt_softplus=True)
        arriving = torch.ones_like(y)
        arriving[~real] = padding
        gradients = torch.autograd.grad([y, state], list(values.values()), [arriving, torch.ones_like(state)])
        results.append([y, state, *gradients])
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("op", "length"),
    [pytest.param(*TORCH.values, 300, id="torch"), pytest.param(*TRITON.values, 45, id="triton", marks=NEEDS_TRITON)],
)
def test_default_chunks_equal_the_reference(
    op: Callable[..., Any], length: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State carried over many chunks of the size that users get."""
    monkeypatch.undo()
    assert torch_path._CHUNK > Q and triton_path._SPAN > Q and triton_path._FEWEST_SEGMENTS == 3
    values = leaves(draw((1, length, 2, 1, 2)), torch.float32)
    values["A"].data.mul_(0.01)
    seq_idx = torch.arange(length)[None] // 37 if packed else None
    results = []
    for function in (selective_scan_reference, op):
        y, state = function(**values, seq_idx=seq_idx, return_final_state=True, dt_softplus=True)
        results.append({"y": y, "state": state} | differentiate(y, state, values))
    for name, expected in results[0].items():
        close(results[1][name], expected, torch.float32, name)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("forget", [-200.0, -1e30])
def test_strong_decays_are_exact(op: Callable[..., Any], forget: float) -> None:
    """Decays of e^-200 and of zero among mild ones: what a cumulative product loses, and a quotient overflows on."""
    values = draw((1, 25, 2, 1, 3), without=("D", "z", "dt_bias"))
    values = {name: value if name == "A" else value.abs() for name, value in values.items()}  # nothing cancels
    values["A"][:, 0] = forget
    values["dt"][:, ::3] = 50
    given = leaves(values, torch.float32)
    exact = leaves(given, torch.float64)
    y, state = op(**given, return_final_state=True)
    expected_y, expected_state = oracle(exact, dt_softplus=False)
    for name, actual, expected in (("y", y, expected_y), ("state", state, expected_state)):
        assert actual.isfinite().all(), name
        # Below e^-80, float32 has no full precision; it is nothing beside the inflow, which is of order 1.
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-4, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    gradients = torch.autograd.grad(expected_y.sum() + expected_state.sum(), list(exact.values()))
    actual_gradients = torch.autograd.grad(y.sum() + state.sum(), list(given.values()))
    for name, actual, expected in zip(values, actual_gradients, gradients, strict=True):
        assert actual.isfinite().all(), f"d{name}"
        close(actual, expected, torch.float32, f"d{name}")


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_strided_inputs_and_gradients(op: Callable[..., Any]) -> None:
    """In a model the inputs are slices of projections, channels first elsewhere; a sum's gradient is expanded."""
    drawn = draw((2, 5, 4, 2, 3))
    results = []
    for strided in (False, True):
        given = {name: value.detach() for name, value in leaves(drawn, torch.float32).items()}
        if strided:
            given["x"] = torch.cat([given["x"]] * 3, dim=-1)[..., 4:8]
            given["dt"] = given["dt"].transpose(1, 2).contiguous().transpose(1, 2)
            given["B"] = torch.stack([given["B"]] * 2, dim=-1)[..., 0]
            for name in ("A", "initial_state"):
                given[name] = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
            given["D"] = given["D"].repeat_interleave(2)[::2]
            assert not any(given[name].is_contiguous() for name in ("x", "dt", "B", "A", "D", "initial_state"))
        for tensor in given.values():
            tensor.requires_grad_()
        y, state = op(**given, return_final_state=True, dt_softplus=True)
        results.append([y, state, *torch.autograd.grad(y.sum() + state.sum(), list(given.values()))])
    for dense, strided_result in zip(*results, strict=True):
        close(strided_result, dense, torch.float32, "strided")


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("name", ["x", "A", "D", "initial_state"])
def test_one_trainable_argument_gets_the_same_gradient(op: Callable[..., Any], name: str) -> None:
    values = leaves(draw((1, 5, 2, 1, 2)), torch.float32)
    (expected,) = torch.autograd.grad(op(**values, dt_softplus=True).square().sum(), [values[name]])
    frozen = {other: value.detach().requires_grad_(other == name) for other, value in values.items()}
    (gradient,) = torch.autograd.grad(op(**frozen, dt_softplus=True).square().sum(), [frozen[name]])
    assert torch.equal(gradient, expected)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", [None, [[-1] * 2 + [0] * 7 + [1] * 4]], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_runs_are_complete_and_bit_identical(
    op: Callable[..., Any], dtype: torch.dtype, layout: list[list[int]] | None
) -> None:
    values = leaves(draw((1, 13, 6, 2, 3)), dtype)
    seq_idx = None if layout is None else torch.tensor(layout)
    runs = []
    for _ in range(2):
        y, state = op(**values, seq_idx=seq_idx, return_final_state=True, dt_softplus=True)
        runs.append([y, state, *differentiate(y, state, values).values()])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("spans", "together"), [(1, 2), (2, 1)])
def test_divisions_do_not_matter(spans: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four segments or two, and programs of one tile of channels or of several: the values of the reference."""
    values = leaves(draw((1, 3 * Q + 5, 24, 1, 2)), torch.float32)
    monkeypatch.setattr(triton_path, "_MOST_CHANNELS", 8)  # three tiles
    monkeypatch.setattr(triton_path._Call, "segment", lambda *_: spans * Q)
    monkeypatch.setattr(triton_path._Call, "backward_division", lambda _: (spans * Q, together))
    seq_idx = torch.tensor([[-1] * 4 + [0] * (Q - 1) + [1] * (2 * Q) + [-1] * 2])
    results = []
    for op in (selective_scan_reference, with_triton(selective_scan)):
        y, state = op(**values, seq_idx=seq_idx, return_final_state=True, dt_softplus=True)
        results.append({"y": y, "state": state} | differentiate(y, state, values))
    for name, expected in results[0].items():
        close(results[1][name], expected, torch.float32, name)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("batch", "length", "size", "segments"),
    [(1, 2048, 16, 32), (8, 2048, 16, 4), (16, 2048, 16, 1), (1, 1 << 20, 16, 32), (1, 80, 16, 1), (2, 1 << 14, 64, 4)],
)
def test_rows_are_divided_while_there_are_too_few_programs(
    batch: int, length: int, size: int, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    wide, maps = torch.empty(batch, length, 1024, device="meta"), torch.empty(batch, length, 1, size, device="meta")
    call = triton_path._Call(wide, wide, maps.new_empty(1024, size), maps, maps, *[None] * 4, True)
    segment = call.segment(call.tiles()[0] * batch, triton_path._SHORTEST_SEGMENT)
    assert -(-length // segment) == segments
    assert segment == length or segment % triton_path._SPAN == 0
    segment, together = call.backward_division()
    assert segment == length or segment % triton_path._SPAN == 0
    tiles, _ = call.tiles()
    assert -(-length // segment) * -(-tiles // together) * batch <= triton_path._PROGRAMS


def test_autocast_leaves_the_sums_in_float32() -> None:
    values = leaves(draw((1, 11, 4, 2, 3)), torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, state = selective_scan(**values, return_final_state=True, dt_softplus=True)
            results.append([y, state, *differentiate(y, state, values).values()])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_inference_equals_training(op: Callable[..., Any]) -> None:
    values = leaves(draw((1, 17, 2, 1, 3)), torch.float32)
    with torch.no_grad():
        y = op(**values, dt_softplus=True)
    assert y.grad_fn is None
    assert torch.equal(y, op(**values, dt_softplus=True))


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_one_state_per_chunk_is_kept_for_the_backward(op: Callable[..., Any]) -> None:
    values = leaves(draw((1, 4 * Q, 64, 1, 4)), torch.float32)
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        op(**values, dt_softplus=True)
    assert max(sizes) <= values["x"].numel(), "a state per token would be 4 times that"
