"""Products by oneDNN: torch's values and gradients for every layout, and torch's own kernels afterwards."""

import os
import subprocess
import sys
import tempfile
import threading

import pytest
import torch
import torch._inductor.config

from ssm_zoo.kernels import cpu_products
from ssm_zoo.kernels.cpu_products import fast_products, products_are_fast

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_LEAST", 1)
    monkeypatch.setattr(cpu_products, "_CHANNELS", 1)
    monkeypatch.setattr(cpu_products, "_LARGE_WEIGHT", 1)


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


@pytest.mark.parametrize("shape", [(8, 3, 5), (33, 16, 7), (9, 1, 1), (7, 4, 6), (1, 8, 8), (1, 1, 1)], ids=str)
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


@pytest.mark.parametrize("rows", [4, 33])
def test_products_into_a_tensor_equal_torch(rows: int) -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(rows, 16), torch.randn(16, 24), torch.randn(24)
    expected = left.double() @ right.double()
    outs = {
        "rows": torch.full((rows, 24), torch.nan),
        "columns": torch.full((24, rows), torch.nan).t(),
        "part": torch.full((2 * rows, 30), torch.nan)[::2, 3:27],
        "negative": torch.full((rows, 24), torch.nan, dtype=torch.complex64).conj().imag,
        "empty": torch.empty(0),
    }
    for name, out in outs.items():
        with fast_products(True):
            assert torch.mm(left, right, out=out) is out, name
            assert torch.allclose(out.double(), expected, atol=1e-4), name
            assert torch.addmm(bias, left, right, out=out) is out, name
            assert torch.allclose(out.double(), expected + bias, atol=1e-4), name
            torch.addmm(bias, left, right, beta=0.5, alpha=2, out=out)
            assert torch.allclose(out.double(), 2 * expected + 0.5 * bias, atol=1e-4), name
        assert out.shape == (rows, 24)
    with fast_products(True), pytest.raises(RuntimeError, match="dtype"):
        torch.mm(left, right, out=torch.empty(rows, 24, dtype=torch.float64))


def test_a_compiled_graph_multiplies_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.SiLU(), torch.nn.Linear(24, 16, bias=False))
    x = torch.randn(33, 16, requires_grad=True)
    leaves = [x, *layers.parameters()]
    compiled = torch.compile(layers, fullgraph=True)
    expected = torch.autograd.grad(layers(x).square().sum(), leaves)
    taken = cpu_products._by_onednn
    found: list[bool] = []
    monkeypatch.setattr(cpu_products, "_by_onednn", lambda *pair: found.append(taken(*pair)) or found[-1])
    with torch._inductor.config.patch(compile_threads=1), fast_products(True):  # no pool of processes
        got = torch.autograd.grad(compiled(x).square().sum(), leaves)
    assert len(found) == 6 and sum(found) >= 4  # two forward, four backward
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_only_what_onednn_computes_fast_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a part of a weight it has a slow reference only; small products are slower by the calls."""
    left, wide = torch.randn(64, 32), torch.randn(32, 80)
    weight, taken = wide[:, :48], cpu_products._by_onednn
    assert not taken(left, wide)
    with fast_products(True):
        assert taken(left, wide) and taken(left, torch.randn(48, 32).t()) and taken(left.t().contiguous().t(), wide)
        assert not taken(left, weight) and not taken(left, wide[:, ::2])
        # Of a few rows, only a large weight in the layout of a linear layer's.
        assert taken(left[:1], torch.randn(48, 32).t()) and taken(left[:7], torch.randn(48, 32).t())
        assert not taken(left[:1], wide) and not taken(left[:0], torch.randn(48, 32).t())
        monkeypatch.setattr(cpu_products, "_LARGE_WEIGHT", 32 * 48 + 1)
        assert not taken(left[:7], torch.randn(48, 32).t()) and taken(left[:8], torch.randn(48, 32).t())
        monkeypatch.setattr(cpu_products, "_CHANNELS", 33)
        assert not taken(left, wide) and not taken(wide.t(), left.t()) and taken(left.t(), wide.new_ones(64, 80))
        monkeypatch.setattr(cpu_products, "_CHANNELS", 1)
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
    assert not products_are_fast()
    with fast_products(True) as outer:
        assert outer and products_are_fast()
        with fast_products(True) as inner:
            assert inner
        with fast_products(False) as off:
            assert not off and not products_are_fast()
            with fast_products(True) as again:  # the nearest block that says False counts
                assert not again
        assert products_are_fast()
    assert not products_are_fast()
    with pytest.raises(KeyError), fast_products(True):
        raise KeyError
    assert not products_are_fast()


def test_blocks_that_overlap_last_as_long_as_the_longest() -> None:
    first, second = fast_products(True), fast_products(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert products_are_fast()
    second.__exit__(None, None, None)
    assert not products_are_fast()


def test_products_after_a_block_are_torch_own() -> None:
    left, right = torch.randn(64, 512), torch.randn(512, 64)
    code = (
        "import sys, torch\n"
        "left, right = torch.load(sys.argv[1], weights_only=True)\n"
        "torch.save((left @ right, torch.addmm(right[0], left, right)), sys.argv[1])\n"
    )
    with fast_products(True):
        _ = left @ right
    here = left @ right, torch.addmm(right[0], left, right)
    with tempfile.NamedTemporaryFile() as file:
        torch.save((left, right), file.name)
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run([sys.executable, "-c", code, file.name], check=True, env=environment)
        plain = torch.load(file.name, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(here, plain, strict=True))


def test_a_failed_replacement_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, *_arguments: object) -> None:
            self.destroyed = False

        def impl(self, name: str, *_arguments: object, **_options: object) -> None:
            if name == "addmm":
                raise RuntimeError("no")

        def _destroy(self) -> None:
            self.destroyed = True

    blocks = cpu_products._Blocks()
    monkeypatch.setattr(cpu_products, "_blocks", blocks)
    with monkeypatch.context() as patch:
        patch.setattr(torch.library, "Library", Failing)
        with pytest.raises(RuntimeError, match="no"), fast_products(True):
            pass
    assert (blocks.on, blocks.off, blocks.library) == (0, 0, None)


def test_threads_compute_while_blocks_open_and_close() -> None:
    left, right = torch.randn(16, 64), torch.randn(64, 32)
    expected, stop, wrong = left @ right, threading.Event(), []

    def compute() -> None:
        while not stop.is_set():
            if not torch.allclose(left @ right, expected, atol=1e-4):
                wrong.append(1)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        with fast_products(True):
            _ = left @ right
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bias_beside_what_is_no_matrix_raises_as_usual() -> None:
    with fast_products(True), pytest.raises(RuntimeError, match=r"matrix|dimension|2-D"):
        torch.addmm(torch.randn(3), torch.randn(8, 3), torch.tensor(1.0))


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
