"""Products by oneDNN: torch's values and gradients for every layout, and torch's own kernels afterwards."""

import os
import subprocess
import sys

import pytest
import torch

from ssm_zoo.kernels import cpu_products
from ssm_zoo.kernels.cpu_products import fast_products, products_pay

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_LEAST", 1)


def _layouts(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Return matrices of one shape in every layout."""
    wide = torch.randn(2 * rows, 3 * columns)
    return {
        "rows": torch.randn(rows, columns),
        "columns": torch.randn(columns, rows).t(),
        "part": wide[1 : rows + 1, 2 : columns + 2],
        "every second row": wide[::2, :columns],
        "every third column": wide[:rows, ::3],
        "expanded row": torch.randn(1, columns).expand(rows, columns),
        "expanded column": torch.randn(rows, 1).expand(rows, columns),
        "overlapping": torch.randn(rows + columns).as_strided((rows, columns), (1, 1)),
        "negative": torch.randn(rows, columns, dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize("shape", [(8, 3, 5), (33, 16, 7), (9, 1, 1), (7, 4, 4), (1, 8, 8)], ids=str)
def test_products_of_every_layout_equal_torch(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    torch.manual_seed(0)
    for left_name, left in _layouts(rows, inner).items():
        for right_name, right in _layouts(inner, columns).items():
            for bias in (torch.randn(columns), torch.randn(rows, columns), torch.randn(2 * columns)[::2]):
                expected = left.double() @ right.double()
                with fast_products(True):
                    product = left @ right
                    sums = torch.addmm(bias, left, right)
                    scaled = torch.addmm(bias, left, right, beta=2, alpha=-3)
                context = f"{left_name} x {right_name}"
                assert torch.allclose(product.double(), expected, atol=1e-4), context
                assert torch.allclose(sums.double(), expected + bias, atol=1e-4), context
                assert torch.allclose(scaled.double(), 2 * bias - 3 * expected, atol=1e-4), context


def test_only_what_onednn_computes_fast_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a part of a weight it has a slow reference only; small products are slower by the calls."""
    left, wide = torch.randn(64, 32), torch.randn(32, 80)
    weight = wide[:, :48]
    taken = cpu_products._taken
    assert taken(left, wide) and taken(left, torch.randn(48, 32).t()) and taken(left.t().contiguous().t(), wide)
    assert not taken(left, weight) and not taken(left, wide[:, ::2]) and not taken(left[:1], wide)
    monkeypatch.setattr(cpu_products, "_LEAST", 64 * 32 * 80 + 1)
    assert not taken(left, wide)


@pytest.mark.parametrize("shape", [(0, 4, 4), (8, 0, 4), (8, 4, 0), (0, 0, 0)], ids=str)
def test_empty_matrices(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    with fast_products(True):
        product, sums = left @ right, torch.addmm(bias, left, right)
    assert torch.equal(product, torch.zeros(rows, columns))
    assert torch.equal(sums, bias.expand(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64], ids=str)
def test_other_dtypes_are_torch_own(dtype: torch.dtype) -> None:
    left, right = (torch.randn(16, 16).mul(4).to(dtype) for _ in range(2))
    expected = left @ right, torch.addmm(right[0], left, right)
    with fast_products(True):
        got = left @ right, torch.addmm(right[0], left, right)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_wrong_shapes_and_dtypes_raise_as_usual() -> None:
    with fast_products(True):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.mm(torch.randn(8, 3), torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(torch.randn(8, 3), torch.randn(3, 8).double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 12])
def test_gradients_of_a_linear_layer(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(2, rows, 24, requires_grad=True)
    leaves = [inputs, *layer.parameters()]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(inputs).square().sum(), leaves)

    expected = gradients()
    with fast_products(True):
        got = gradients()
        twice = torch.autograd.gradgradcheck(
            lambda x, w: torch.nn.functional.linear(x, w), [leaf.double() for leaf in leaves[:2]], atol=1e-4
        )
    assert twice
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_special_values_spread_as_usual() -> None:
    left, right = torch.ones(8, 4), torch.ones(4, 6)
    left[1, 2], left[3, 0], right[1, 5] = torch.nan, torch.inf, -torch.inf
    expected = left @ right
    with fast_products(True):
        got = left @ right
    assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


def test_a_product_does_not_change_its_operands_or_share_their_memory() -> None:
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    copies = left.clone(), right.clone()
    with fast_products(True):
        product = left @ right
    product.zero_()
    assert torch.equal(left, copies[0]) and torch.equal(right, copies[1])


def test_blocks_can_be_nested_and_an_error_ends_them() -> None:
    left, right = torch.randn(64, 512), torch.randn(512, 64)
    plain = left @ right
    with fast_products(True) as outer:
        with fast_products(True) as inner:
            assert outer and inner
        fast = left @ right  # still replaced: the same sums in the same order
        with fast_products(False) as off:
            assert not off
        assert torch.equal(left @ right, fast)
    assert torch.equal(left @ right, plain)
    with pytest.raises(KeyError), fast_products(True):
        raise KeyError
    assert torch.equal(left @ right, plain)


def test_the_environment_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_ZOO_FAST_PRODUCTS", "0")
    assert not products_pay()
    with fast_products() as enabled:
        assert not enabled


def test_nothing_is_printed() -> None:
    """The replacement of a kernel makes torch warn, which would show in every command."""
    code = (
        "import torch\nfrom ssm_zoo.kernels.cpu_products import fast_products\n"
        "with fast_products(True):\n    torch.randn(8, 8) @ torch.randn(8, 8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == done.stderr == ""
