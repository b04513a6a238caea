"""Row distances of SSD and attention matrices, blockwise, against whole matrices and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peak_memory import PeakMemory
from ssm_zoo.kernels import matrix_distance_triton
from ssm_zoo.kernels.matrix_distance import (
    RowDistances,
    SSDFactors,
    row_distances,
    row_distances_reference,
)
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, moved

BATCH, LENGTH, HEADS, WIDTH, STATES = 2, 13, 6, 4, 5
CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"skip": True}, id="skip"),
    pytest.param({"scale": True, "skip": True, "groups": 2}, id="step sizes and groups"),
    pytest.param({"least_sum": 1e-6, "skip": True}, id="normalised"),
    pytest.param({"least_sum": 3.0, "scale": True, "groups": 3}, id="normalised, small row sums"),
    pytest.param({"strong": True, "skip": True}, id="strong decay"),
]


def make(
    dtype: torch.dtype,
    length: int = LENGTH,
    *,
    heads: int = HEADS,
    groups: int = HEADS,
    scale: bool = False,
    skip: bool = False,
    least_sum: float | None = None,
    strong: bool = False,
) -> tuple[dict[str, Tensor], float | None, Tensor, Tensor]:
    """The factors that receive gradients by name, the least row sum, queries and keys."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [draw(BATCH, length, groups, STATES) for _ in range(2)]
    if least_sum is not None:
        maps = [torch.nn.functional.softplus(part) for part in maps]
    given = {"log_decay": -0.3 * draw(BATCH, length, heads).abs(), "B": maps[0], "C": maps[1]}
    if strong:  # beyond the exponents that count, and a state that is set to zero
        given["log_decay"][:, 3::4] *= 1000.0
        given["log_decay"][:, 6] = -1e4
    if scale:
        given["scale"] = draw(BATCH, length, heads).abs()
    if skip:
        given["skip"] = draw(heads)
    queries, keys = (draw(BATCH, length, heads, WIDTH).to(dtype) for _ in range(2))
    return {name: part.to(dtype).requires_grad_() for name, part in given.items()}, least_sum, queries, keys


def whole(
    factors: SSDFactors,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> RowDistances:
    """From materialised matrices."""
    scores = torch.einsum("bihp,bjhp->bhij", queries, keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(scores.shape[-1])
    back = place[:, None] - place
    unseen = (back < 0) | (back >= (window or len(place)))
    return row_distances_reference(factors.matrix(), scores.masked_fill(unseen, -torch.inf).softmax(-1))


def compared(
    compute: Any, dtype: torch.dtype, options: dict[str, Any], **more: Any
) -> tuple[RowDistances, list[Tensor]]:
    """The distances, and the gradients of a sum of them in which every row has its own weight."""
    given, least_sum, queries, keys = make(dtype, **options)
    distances = compute(SSDFactors(**given, least_sum=least_sum), queries, keys, 0.7, **more)
    weights = torch.linspace(0.1, 2.0, distances.errors.numel(), dtype=torch.float64).view(distances.errors.shape)
    loss = (distances.errors * weights.to(dtype)).sum()
    return distances, list(torch.autograd.grad(loss, list(given.values())))


@pytest.mark.parametrize("rows", [1, 4, LENGTH], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_blocks_are_the_whole_matrices(dtype: torch.dtype, options: dict[str, Any], rows: int) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    size = rows * HEADS * LENGTH * dtype.itemsize
    distances, gradients = compared(row_distances, dtype, options, block_bytes=size)
    expected, wanted = compared(whole, torch.float64, options)
    for part, exact in zip(distances, expected, strict=True):
        assert part.dtype == dtype and part.shape == (BATCH, HEADS, LENGTH)
        torch.testing.assert_close(part.double(), exact, rtol=tolerance, atol=tolerance * float(exact.detach().max()))
    assert len(gradients) == len(wanted) >= 3
    for part, exact in zip(gradients, wanted, strict=True):
        assert part.dtype == dtype and exact.abs().max() > 0
        torch.testing.assert_close(part.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("rows", [1, 4, LENGTH], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize(
    "limits",
    [{"window": 1}, {"window": 3}, {"window": 2 * LENGTH}, {"softcap": 0.4}, {"window": 4, "softcap": 1.5}],
    ids=str,
)
def test_the_attention_has_a_window_and_a_soft_cap(limits: dict[str, Any], rows: int) -> None:
    options = {"skip": True, "least_sum": 3.0}
    found = compared(row_distances, torch.float64, options, block_bytes=rows * HEADS * LENGTH * 8, **limits)
    expected = compared(whole, torch.float64, options, **limits)
    plain, _ = compared(whole, torch.float64, options)
    assert (limits == {"window": 2 * LENGTH}) == torch.equal(plain.targets, expected[0].targets)
    for part, exact in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(part, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"skip": True, "scale": True, "groups": 2}, {"least_sum": 3.0, "skip": True}])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    given, least_sum, queries, keys = make(torch.float64, 5, **options)
    size = 2 * HEADS * 5 * 8

    def errors(*parts: Tensor) -> Tensor:
        factors = SSDFactors(**dict(zip(given, parts, strict=True)), least_sum=least_sum)
        return row_distances(factors, queries, keys, 0.7, block_bytes=size).errors

    assert torch.autograd.gradcheck(errors, list(given.values()))


def test_the_teachers_side_has_no_gradient() -> None:
    given, _, queries, keys = make(torch.float32)
    distances = row_distances(SSDFactors(**given), queries.requires_grad_(), keys, 1.0)
    assert distances.errors.requires_grad and not distances.targets.requires_grad
    distances.errors.sum().backward()
    assert queries.grad is None


def test_autocast_does_not_round_the_products() -> None:
    given, _, queries, keys = make(torch.float32)
    plain = row_distances(SSDFactors(**given), queries, keys, 1.0).errors
    (gradient,) = torch.autograd.grad(plain.sum(), given["C"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = row_distances(SSDFactors(**given), queries, keys, 1.0).errors
        (again,) = torch.autograd.grad(cast.sum(), given["C"])
    assert torch.equal(plain, cast) and torch.equal(gradient, again)


TRITON_CASES = [
    pytest.param({"length": 1, "skip": True}, id="1"),
    pytest.param({"length": 31, "groups": 1, "scale": True, "skip": True}, id="31, step sizes and one group"),
    pytest.param({"length": 32, "groups": 2, "strong": True}, id="32, strong decay"),
    pytest.param({"length": 33, "groups": 1, "scale": True, "skip": True, "least_sum": 3.0}, id="33, normalised"),
    pytest.param({"length": 47, "groups": 2, "least_sum": 1e-6}, id="47, normalised"),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 rows or columns and 16 of the others: a length of 33 has tiles of all kinds, and one of one token."""
    monkeypatch.setitem(matrix_distance_triton._TILES, (4, 64), ((16, 32, 4), (32, 16, 4), (16, 32, 4)))
    monkeypatch.setitem(matrix_distance_triton._TILES, (2, 64), ((32, 16, 4), (16, 32, 4), (32, 16, 4)))


def in_triton(factors: SSDFactors, queries: Tensor, keys: Tensor, scaling: float) -> RowDistances:
    factors, there = SSDFactors(*(moved(part, DEVICE) for part in factors)), (moved(x, DEVICE) for x in (queries, keys))
    found = row_distances(factors, *there, scaling, implementation="triton")
    return RowDistances(*(moved(part, "cpu") for part in found))


@NEEDS_TRITON
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", TRITON_CASES)
def test_triton_is_the_whole_matrices_and_the_torch_path(options: dict[str, Any]) -> None:
    options = {"heads": 2, "groups": 2} | options
    (errors, targets), gradients = compared(in_triton, torch.float32, options)
    rtol, atol = TOLERANCES[torch.float32]
    for compute, dtype in ((whole, torch.float64), (row_distances, torch.float32)):
        expected, wanted = compared(compute, dtype, options)
        assert len(gradients) == len(wanted) >= 3
        for part, exact in zip((errors, targets, *gradients), (*expected, *wanted), strict=True):
            most = max(1.0, float(exact.detach().abs().max()))
            assert part.dtype == torch.float32
            torch.testing.assert_close(part.double(), exact.double(), rtol=rtol, atol=atol * most)


@NEEDS_TRITON
@pytest.mark.usefixtures("small_tiles")
def test_triton_in_half_precision_rounds_gradients_only() -> None:
    """Products of bfloat16 numbers are exact in float32."""
    options: dict[str, Any] = {"length": 33, "heads": 2, "groups": 1, "least_sum": 1e-6, "skip": True}
    given, least_sum, queries, keys = make(torch.bfloat16, **options)
    results = []
    for compute, dtype in ((in_triton, torch.bfloat16), (whole, torch.float64)):
        parts = {name: part.detach().to(dtype).requires_grad_() for name, part in given.items()}
        factors = SSDFactors(**parts, least_sum=least_sum)
        distances = compute(factors, queries.to(dtype), keys.to(dtype), 0.7)
        results.append((*distances, *torch.autograd.grad(distances.errors.sum(), list(parts.values()))))
    for number, (part, exact) in enumerate(zip(*results, strict=True)):
        dtype = torch.float32 if number < 2 else torch.bfloat16
        rtol, atol = TOLERANCES[dtype]
        assert part.dtype == dtype
        most = max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(part.double(), exact, rtol=rtol, atol=atol * most)


@NEEDS_TRITON
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
def test_triton_runs_are_complete_and_bit_identical_for_strided_inputs_and_under_autocast() -> None:
    given, least_sum, queries, keys = make(torch.float32, 33, heads=2, groups=1, scale=True, skip=True, least_sum=1e-6)
    runs = []
    for strided in (False, True):
        maps = {name: given[name].mT.contiguous().mT if strided else given[name] for name in ("B", "C")}
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for x in (queries, keys))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=strided):
            distances = in_triton(SSDFactors(**given | maps, least_sum=least_sum), q, k, 0.7)
            gradients = torch.autograd.grad(distances.errors.sum(), list(given.values()))
        runs.append((*distances, *gradients))
    for part, again in zip(*runs, strict=True):
        assert part.isfinite().all() and torch.equal(part, again)


@NEEDS_TRITON
@pytest.mark.usefixtures("small_tiles")
def test_triton_does_not_hide_nan() -> None:
    for name in ("log_decay", "B", "C", "queries", "keys"):
        given, _, queries, keys = make(torch.float32, 20, heads=1, groups=1)
        inputs = {"queries": queries, "keys": keys} | given
        clean = in_triton(SSDFactors(**given), queries, keys, 0.7).errors
        inputs[name].data[0, 9] = torch.nan
        found = in_triton(SSDFactors(**given), queries, keys, 0.7).errors
        spoiled = found.isnan()[0, 0]
        assert spoiled[9] and not spoiled[:9].any() and torch.equal(found[0, 0, :9], clean[0, 0, :9]), name
        assert bool(spoiled[10:].all()) == (name in ("log_decay", "B", "keys")), name


@pytest.mark.parametrize(
    ("width", "limits"), [(WIDTH, {"block_bytes": 2**20}), (257, {}), (WIDTH, {"window": 3}), (WIDTH, {"softcap": 2.0})]
)
def test_what_triton_does_not_support_is_refused(width: int, limits: dict[str, Any]) -> None:
    given = make(torch.float32)[0]
    queries = torch.zeros(BATCH, LENGTH, HEADS, width)
    with pytest.raises(ValueError, match="implementation='triton' of row_distances is not available for these arg"):
        row_distances(SSDFactors(**given), queries, queries, 1.0, implementation="triton", **limits)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"block_bytes": 0}, "block_bytes must be at least 1 or None, got 0"),
        ({"window": 0}, "window must be at least 1 or None, got 0"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be positive or None, got nan"),
    ],
)
def test_limits_out_of_range_are_refused(limit: dict[str, Any], message: str) -> None:
    given, _, queries, keys = make(torch.float32)
    with pytest.raises(ValueError, match=message):
        row_distances(SSDFactors(**given), queries, keys, 1.0, **limit)


def test_memory_is_linear_in_the_length() -> None:
    peaks = {}
    for length in (256, 1024):
        given, _, queries, keys = make(torch.float32, length, skip=True)
        with PeakMemory(*given.values(), queries, keys) as memory:
            distances = row_distances(SSDFactors(**given), queries, keys, 1.0, block_bytes=2**16)
            distances.errors.sum().backward()
        peaks[length] = memory.peak
    assert peaks[1024] < 4.2 * peaks[256]
    assert peaks[1024] < HEADS * BATCH * 1024**2 * 4 / 2  # half a matrix of the student


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"B": torch.zeros(BATCH, LENGTH, 4, STATES)}, "B must have a number of groups", id="groups"),
        pytest.param({"C": torch.zeros(BATCH, LENGTH, 1, STATES)}, r"C must be \(B, L, G, N\)", id="maps"),
        pytest.param({"skip": torch.zeros(2)}, r"skip must be \(H\)", id="skip"),
        pytest.param({"scale": torch.zeros(BATCH, LENGTH)}, r"scale must be \(B, L, H\)", id="scale"),
        pytest.param({"log_decay": torch.zeros(BATCH, LENGTH)}, r"log_decay must be \(B, L, H\)", id="decay"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str) -> None:
    given, _, queries, keys = make(torch.float32)
    with pytest.raises(ValueError, match=message):
        row_distances(SSDFactors(**given | changes), queries, keys, 1.0)


def test_queries_of_other_heads_are_refused() -> None:
    given, _, queries, keys = make(torch.float32)
    with pytest.raises(ValueError, match=r"queries must be \(B, L, H, P\)"):
        row_distances(SSDFactors(**given), queries[:, :, :3], keys[:, :, :3], 1.0)
