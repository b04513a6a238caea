"""ssd_matrix, the hidden attention of a state-space layer, against its formula entry by entry."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.matrix_distance import SSDFactors
from ssm_zoo.kernels.ssd import ssd, ssd_log_decay, ssd_matrix
from tolerances import TOLERANCES

LAYOUTS = [  # documents of a packed row; negative marks padding
    pytest.param(None, id="no-documents"),
    pytest.param([[0] * 5 + [1] * 8], id="two-documents"),
    pytest.param([[0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 3, 9]], id="rows-of-different-documents"),
    pytest.param([[-1, 0, 0, -5, 1, 1, 1, -1, -1, 1, 2, -1]], id="padding-everywhere"),
    pytest.param([[-1] * 6, [0, 0, 0, 1, 1, 1], [-2, -1] * 3], id="rows-of-padding"),
]


def draw(batch: int, length: int, heads: int, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_decay, B and C, in float64."""
    generator = torch.Generator().manual_seed(length)
    log_decay = -torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
    B, C = torch.randn(2, batch, length, groups, size, generator=generator, dtype=torch.float64)
    return log_decay, B, C


def oracle(log_decay: Tensor, B: Tensor, C: Tensor, layout: list[list[int]] | None = None) -> Tensor:
    batch, length, heads = log_decay.shape
    matrix = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for b in range(batch):
        documents = layout[b] if layout else [0] * length
        for h in range(heads):
            g = h // (heads // B.shape[2])
            for i in range(length):
                for j in range(i + 1):
                    if documents[i] < 0 or documents[i] != documents[j]:
                        continue
                    between = [log_decay[b, k, h] for k in range(j + 1, i + 1) if documents[k] >= 0]
                    decay = math.exp(math.fsum(float(a) for a in between))
                    matrix[b, h, i, j] = torch.dot(C[b, i, g], B[b, j, g]) * decay
    return matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_state_that_grows_is_no_error_and_no_other_number(dtype: torch.dtype) -> None:
    log_decay, B, C = draw(2, 13, 4, 2, 3)
    log_decay[..., ::2] *= -0.3
    inputs = [tensor.to(dtype) for tensor in (log_decay, B, C)]
    rtol, atol = TOLERANCES[dtype]
    expected = oracle(*(tensor.double() for tensor in inputs))
    matrix = ssd_matrix(*inputs)
    torch.testing.assert_close(matrix.double(), expected, rtol=rtol, atol=atol)
    x = torch.randn(2, 13, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    y = ssd_log_decay(x.to(dtype), *inputs)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y.double(), torch.einsum("bhij,bjhp->bihp", expected, x), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_matches_the_oracle(dtype: torch.dtype, layout: list[list[int]] | None) -> None:
    length = 13 if layout is None else len(layout[0])
    batch = 2 if layout is None else len(layout)
    inputs = [tensor.to(dtype) for tensor in draw(batch, length, heads=4, groups=2, size=3)]
    seq_idx = None if layout is None else torch.tensor(layout)
    matrix = ssd_matrix(*inputs, seq_idx=seq_idx)
    assert matrix.dtype == dtype and not matrix.triu(1).any()
    rtol, atol = TOLERANCES[dtype]
    expected = oracle(*(tensor.double() for tensor in inputs), layout)
    torch.testing.assert_close(matrix.double(), expected, rtol=rtol, atol=atol)


def test_matrix_is_the_map_of_the_op() -> None:
    decay, B, C = draw(2, 13, heads=4, groups=2, size=3)
    x = torch.randn(2, 13, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dt, A = -decay, -torch.arange(1.0, 5.0, dtype=torch.float64)
    y = torch.einsum("bhij,bjhp->bihp", ssd_matrix(dt * A, B, C), x * dt[..., None])
    rtol, atol = TOLERANCES[torch.float64]
    torch.testing.assert_close(y, ssd(x, dt, A, B, C), rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", [None, [[-1, 0, 0, 1, 1]]], ids=["plain", "packed"])
def test_matrix_gradcheck(layout: list[list[int]] | None) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in draw(1, 5, heads=2, groups=1, size=2))
    seq_idx = None if layout is None else torch.tensor(layout)
    assert torch.autograd.gradcheck(partial(ssd_matrix, seq_idx=seq_idx), inputs)


@pytest.mark.parametrize("forget", [-200.0, -math.inf], ids=str)
def test_matrix_of_strong_decays_is_exact(forget: float) -> None:
    """Sums of the decays reach -2800, where float32 numbers are 2.4e-4 apart: their differences would not do."""
    log_decay, B, C = draw(1, 42, heads=2, groups=1, size=3)
    log_decay[:, ::3] = forget
    inputs = [tensor.float().requires_grad_() for tensor in (log_decay, B.abs(), C.abs())]
    matrix = ssd_matrix(*inputs)
    expected = oracle(*(tensor.detach().double() for tensor in inputs))
    assert matrix.isfinite().all()
    # Below 1e-30 float32 loses digits to underflow, exp(-200) is zero in it.
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-30)
    for name, gradient in zip(("log_decay", "B", "C"), torch.autograd.grad(matrix.sum(), inputs), strict=True):
        assert gradient.isfinite().all(), f"d{name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"B": torch.zeros(2, 4, 2, 6)}, r"B must be \(B, L, G, N\)", id="length"),
        pytest.param({"C": torch.zeros(2, 5, 2, 7)}, "C must be .*got shape", id="state-size"),
        pytest.param(
            {"B": torch.zeros(2, 5, 3, 6)},
            "B must have a number of groups that divides the 4 heads, got 3",
            id="groups",
        ),
        pytest.param({"seq_idx": torch.zeros(2, 4).long()}, r"seq_idx must be \(B, L\)", id="seq-shape"),
        pytest.param({"seq_idx": torch.tensor([[1, 1, 0, 0, 0]] * 2)}, "seq_idx .*decreas", id="seq-decreasing"),
    ],
)
def test_bad_input_raises(change: dict[str, Tensor], message: str) -> None:
    arguments = {"log_decay": torch.zeros(2, 5, 4), "B": torch.zeros(2, 5, 2, 6), "C": torch.zeros(2, 5, 2, 6)}
    with pytest.raises(ValueError, match=message):
        ssd_matrix(**(arguments | change))


def test_what_is_not_a_number_at_padding_stays_there() -> None:
    seq_idx = torch.tensor([[-1, 0, 0, -5, 1, 1, 1, -1, -1, 1, 2, -1]])
    log_decay, B, C = draw(1, 12, 4, 2, 3)
    scale = torch.rand(1, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for filled in (0.0, torch.nan):
        inputs = [x.clone() for x in (log_decay, B, C, scale)]
        for x in inputs:
            x[seq_idx < 0] = filled
            x.requires_grad_()
        matrix = SSDFactors(*inputs).matrix(seq_idx)
        results.append((matrix, *torch.autograd.grad(matrix.square().sum(), inputs)))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
