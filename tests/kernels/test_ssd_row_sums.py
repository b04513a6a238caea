"""Row sums of the SSD recurrence: beside the outputs, with gradients, states, documents, and in the one-token step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels import ssd_triton
from ssm_zoo.kernels.ssd import ssd_log_decay, ssd_log_decay_reference, ssd_log_decay_step, ssd_matrix
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, moved, with_triton

Q = 16  # tokens of a chunk, the fewest that Triton's tiles allow
TORCH = partial(ssd_log_decay, chunk_size=Q, implementation="torch")
TRITON = with_triton(partial(ssd_log_decay, chunk_size=Q))
OPS = [pytest.param(TORCH, id="torch"), pytest.param(TRITON, id="triton", marks=NEEDS_TRITON)]
DTYPES = [torch.float32, torch.bfloat16]
RESULTS: tuple[str, ...] = ("y", "row_sums", "state")

SHAPES = [  # B, L, H, P, G, N
    pytest.param((1, 1, 1, 1, 1, 1), id="smallest"),
    pytest.param((2, 1, 4, 3, 2, 5), id="one-token"),
    pytest.param((1, Q, 2, 3, 1, 4), id="one-chunk"),
    pytest.param((2, Q + 1, 4, 2, 2, 3), id="chunk-plus-1"),
    pytest.param((1, 4 * Q + 5, 2, 3, 2, 5), id="span-and-rest"),
    pytest.param((1, Q + 3, 1, 70, 1, 20), id="tiles-of-a-head"),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, skip_and_gate: bool = True) -> dict[str, Tensor]:
    """All inputs by name; decays mild enough to carry the state over chunks. D and the state stay float32."""
    batch, length, heads, width, groups, size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(batch, length, heads, width),
        "log_decay": -0.02 * normal(batch, length, heads).square(),
        "B": normal(batch, length, groups, size) / size**0.5,
        "C": normal(batch, length, groups, size) / size**0.5,
        "initial_state": normal(batch, heads, width + 1, size),
    }
    if skip_and_gate:
        values |= {"D": normal(heads), "z": normal(batch, length, heads, width)}
    if dtype == torch.float64:
        return values
    kept = ("D", "initial_state")
    return {name: value.to(torch.float32 if name in kept else dtype) for name, value in values.items()}


def results(
    op: Callable[..., Any],
    values: dict[str, Tensor],
    seq_idx: Tensor | None = None,
    used: tuple[str, ...] = RESULTS,
    arriving: float | None = None,
) -> dict[str, Tensor]:
    """Results by name, and the gradients of a random linear form of those that are `used`.

    `arriving` is the gradient of the outputs and row sums of padding, if given.
    """
    given = {name: value.detach().requires_grad_() for name, value in values.items()}
    found = dict(zip(RESULTS, op(**given, seq_idx=seq_idx, return_final_state=True, row_sums=True), strict=True))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for n, v in found.items()}
    if arriving is not None:
        for name in ("y", "row_sums"):
            weights[name][seq_idx < 0] = arriving
    gradients = torch.autograd.grad(
        *([found[name] for name in used], list(given.values()), [weights[name] for name in used]),
        allow_unused=True,
        materialize_grads=True,
    )
    return found | {f"d{name}": part for name, part in zip(given, gradients, strict=True)}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In half precision, errors of all but the final state are measured by norms."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rtol, atol = TOLERANCES[torch.float32 if name == "state" else dtype]
        if dtype != torch.bfloat16 or name == "state":
            torch.testing.assert_close(
                actual[name].double(), value.double(), rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            error = (actual[name] - value).norm() / value.norm()
            assert error < rtol / 2, f"{name}: relative error {error:.1e}"


def exact(
    values: dict[str, Tensor], seq_idx: Tensor | None = None, used: tuple[str, ...] = RESULTS
) -> dict[str, Tensor]:
    return results(ssd_log_decay_reference, {n: v.double() for n, v in values.items()}, seq_idx, used)


@pytest.mark.parametrize(
    "layout", [None, [[0] * 5 + [1] * 6, [-1] * 2 + [0] * 4 + [-1] + [3] * 4]], ids=["one", "packed"]
)
def test_the_reference_sums_rows_of_the_matrix(layout: list[list[int]] | None) -> None:
    values = draw((2, 11, 4, 3, 2, 5), skip_and_gate=False)
    seq_idx = None if layout is None else torch.tensor(layout)
    if seq_idx is not None:  # padding contributes nothing
        for name in ("x", "B", "C", "log_decay"):
            values[name][seq_idx < 0] = 0
    state = values.pop("initial_state")
    options: dict[str, Any] = {"seq_idx": seq_idx, "row_sums": True}
    y, row_sums = ssd_log_decay_reference(**values, **options)
    matrix = ssd_matrix(*(values[name] for name in ("log_decay", "B", "C")), seq_idx=seq_idx)
    torch.testing.assert_close(row_sums, matrix.sum(-1).transpose(1, 2))
    torch.testing.assert_close(y, torch.einsum("bhls,bshp->blhp", matrix, values["x"]))
    # The state's last row is read until the first document ends.
    _, with_state = ssd_log_decay_reference(**values, **options, initial_state=state)
    C = values["C"].repeat_interleave(2, dim=2)
    reads = values["log_decay"].cumsum(1).exp() * (C * state[:, None, :, -1]).sum(-1)
    if seq_idx is not None:
        reads = reads * (seq_idx == 0)[..., None]
    torch.testing.assert_close(with_state - row_sums, reads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_match_the_reference(
    shape: tuple[int, ...], op: Callable[..., Any], dtype: torch.dtype
) -> None:
    values = draw(shape, dtype)
    actual = results(op, values)
    assert actual["y"].dtype == dtype and actual["row_sums"].dtype == actual["state"].dtype == torch.float32
    check(actual, exact(values), dtype)


@pytest.mark.parametrize("op", OPS)
def test_documents_and_padding_match_the_reference(op: Callable[..., Any]) -> None:
    values = draw((2, Q + 5, 4, 3, 2, 5), torch.float32)
    seq_idx = torch.tensor([[0] * 7 + [1] * 14, [-1] * 3 + [0] * 9 + [-1] + [0] * 5 + [4] * 3])
    check(results(op, values, seq_idx), exact(values, seq_idx), torch.float32)


@pytest.mark.parametrize(
    "op", [ssd_log_decay_reference, partial(ssd_log_decay, chunk_size=2)], ids=["reference", "torch"]
)
def test_gradcheck(op: Callable[..., Any]) -> None:
    values = {name: value.requires_grad_() for name, value in draw((1, 5, 2, 2, 1, 2)).items()}

    def run(*tensors: Tensor) -> Any:
        return op(**dict(zip(values, tensors, strict=True)), return_final_state=True, row_sums=True)

    assert torch.autograd.gradcheck(run, tuple(values.values()))


@pytest.mark.parametrize("used", [("y",), ("row_sums",), ("state",)], ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_one_result_match_the_reference(op: Callable[..., Any], used: tuple[str, ...]) -> None:
    values = draw((1, Q + 3, 2, 3, 1, 4), torch.float32, skip_and_gate=False)
    check(results(op, values, used=used), exact(values, used=used), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_continuing_from_the_state_equals_the_whole(op: Callable[..., Any]) -> None:
    values = draw((1, 2 * Q + 5, 2, 3, 1, 4), torch.float32)
    whole = op(**values, return_final_state=True, row_sums=True)
    parts = []
    for part in (slice(Q + 3), slice(Q + 3, None)):
        timed = {n: v[:, part] if n in ("x", "log_decay", "B", "C", "z") else v for n, v in values.items()}
        *found, values["initial_state"] = op(**timed, return_final_state=True, row_sums=True)
        parts.append(found)
    joined = [torch.cat(pair, 1) for pair in zip(*parts, strict=True)]
    check(
        dict(zip(RESULTS, (*joined, values["initial_state"]), strict=True)),
        dict(zip(RESULTS, whole, strict=True)),
        torch.float32,
    )


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_without_a_backward_match_the_reference(dtype: torch.dtype) -> None:
    """Then states are stored for spans only, and the rows between come from the kernel of the outputs."""
    values = draw((2, 8 * Q + 3, 2, 3, 1, 5), dtype)
    seq_idx = torch.zeros(2, 8 * Q + 3, dtype=torch.long)
    seq_idx[1, 5 * Q + 4 :] = 1
    with torch.no_grad():
        found = TRITON(**values, seq_idx=seq_idx, return_final_state=True, row_sums=True)
    expected = exact(values, seq_idx)
    check(dict(zip(RESULTS, found, strict=True)), {name: expected[name] for name in RESULTS}, dtype)


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("processors", [1, 1000], ids=["sections", "stretches"])
def test_sections_and_stretches_match_the_reference(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_triton, "_device", lambda tensor: (processors, 9))
    values = draw((2, 16 * Q + 3, 1, 2, 1, 3), torch.float32)
    values["log_decay"][1, 7 * Q + 3] = -math.inf
    check(results(TRITON, values), exact(values), torch.float32)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_runs_are_complete_and_bit_identical(op: Callable[..., Any], dtype: torch.dtype) -> None:
    values = draw((1, 2 * Q + 3, 2, 3, 1, 2), dtype)
    first, second = results(op, values), results(op, values)
    for name, value in first.items():
        assert value.isfinite().all() and torch.equal(value, second[name]), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4, 5, 2, 7), (2, 64, 1, 16)], ids=str)
def test_steps_match_the_reference(sizes: tuple[int, ...], implementation: str, dtype: torch.dtype) -> None:
    """Of a state whose rows are not contiguous, in several tiles of its rows."""
    values = draw((2, 3, *sizes), dtype)
    device = DEVICE if implementation == "triton" else "cpu"
    there = {name: moved(value, device) for name, value in values.items()}
    state = there.pop("initial_state").transpose(-1, -2).clone().transpose(-1, -2)
    expected = exact(values)
    for t in range(3):
        token = {n: v[:, t] if n in ("x", "log_decay", "B", "C", "z") else v for n, v in there.items()}
        y, row_sums = ssd_log_decay_step(state, **token, row_sums=True, implementation=implementation)
        assert y.dtype == dtype and row_sums.dtype == torch.float32 and row_sums.is_contiguous()
        for found, name, kind in ((y, "y", dtype), (row_sums, "row_sums", torch.float32)):
            rtol, atol = TOLERANCES[kind]
            torch.testing.assert_close(found.double().cpu(), expected[name][:, t], rtol=rtol, atol=atol)
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(state.double().cpu(), expected["state"], rtol=rtol, atol=atol)


def test_a_traced_scan_has_row_sums() -> None:
    """The operator of a graph has the results and gradients of the op."""
    values = draw((1, Q + 3, 2, 3, 1, 4), torch.float32)
    compiled = torch.compile(partial(ssd_log_decay, chunk_size=Q), backend="aot_eager", fullgraph=True)
    check(results(compiled, values), results(TORCH, values), torch.float32)


@pytest.mark.parametrize("row_sums", [False, True])
def test_a_state_of_other_rows_is_refused(row_sums: bool) -> None:
    values = draw((1, 3, 2, 4, 1, 5))
    values["initial_state"] = values["initial_state"][:, :, : 5 - row_sums]
    rows, symbols = (5, r"P \+ 1") if row_sums else (4, "P")
    message = rf"state must be \(B, H, {symbols}, N\) = \(1, 2, {rows}, 5\), got shape \(1, 2, {9 - rows}, 5\)"
    with pytest.raises(ValueError, match=f"^initial_{message}"):
        ssd_log_decay(**values, row_sums=row_sums)
    state = values.pop("initial_state")
    token = {n: v[:, 0] if n in ("x", "log_decay", "B", "C", "z") else v for n, v in values.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        ssd_log_decay_step(state, **token, row_sums=row_sums)


@pytest.mark.parametrize("op", OPS)
def test_nan_in_padding_stays_there(op: Callable[..., Any]) -> None:
    values = draw((2, 4 * Q + 5, 4, 3, 2, 5), torch.float32)
    layout = torch.zeros(2, 4 * Q + 5, dtype=torch.long)
    layout[0, :3], layout[0, 20:25], layout[0, 25:], layout[1, -9:] = -1, -1, 1, -1
    tokens = ("x", "log_decay", "B", "C", "z")
    found = []
    for padding in (0.0, math.nan):
        filled = {name: value.clone() for name, value in values.items()}
        for name in tokens:
            filled[name][layout < 0] = padding
        found.append(results(op, filled, layout, arriving=padding))
    for name, clean in found[0].items():
        assert clean.isfinite().all() and torch.equal(clean, found[1][name]), name
        if name in ("y", "row_sums") or name.removeprefix("d") in tokens:
            assert not clean[layout < 0].any(), name
