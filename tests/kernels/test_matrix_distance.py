"""Row distances of SSD and attention matrices, blockwise, against whole matrices and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peak_memory import PeakMemory
from ssm_zoo.kernels.matrix_distance import (
    RowDistances,
    SSDFactors,
    row_distances,
    row_distances_reference,
)

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
    given = {"log_decay": -0.3 * draw(BATCH, length, HEADS).abs(), "B": maps[0], "C": maps[1]}
    if strong:  # beyond the exponents that count, and a state that is set to zero
        given["log_decay"][:, 3::4] *= 1000.0
        given["log_decay"][:, 6] = -1e4
    if scale:
        given["scale"] = draw(BATCH, length, HEADS).abs()
    if skip:
        given["skip"] = draw(HEADS)
    queries, keys = draw(BATCH, length, HEADS, WIDTH).to(dtype), draw(BATCH, length, HEADS, WIDTH).to(dtype)
    return {name: part.to(dtype).requires_grad_() for name, part in given.items()}, least_sum, queries, keys


def whole(factors: SSDFactors, queries: Tensor, keys: Tensor, scaling: float) -> RowDistances:
    """From materialised matrices."""
    scores = torch.einsum("bihp,bjhp->bhij", queries, keys) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return row_distances_reference(factors.matrix(), scores.masked_fill(later, -torch.inf).softmax(-1))


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
