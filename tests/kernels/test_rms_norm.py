"""rms_norm against an oracle in Python floats' precision, and against the norms of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm, MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from ssm_zoo.kernels.rms_norm import rms_norm, rms_norm_reference
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

TORCH = pytest.param(rms_norm, id="torch")
TRITON = pytest.param(with_triton(rms_norm), id="triton", marks=NEEDS_TRITON)
# The two that take float64, and whose sums are in the order of transformers'.
OPS = [pytest.param(rms_norm_reference, id="reference"), TORCH]
ALL_OPS = [*OPS, TRITON]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5

CASES = [
    pytest.param((1,), None, id="one-number"),
    pytest.param((7,), None, id="one-row"),
    pytest.param((2, 3, 6), None, id="one-group"),
    pytest.param((2, 3, 6), 6, id="one-explicit-group"),
    pytest.param((2, 3, 6), 3, id="two-groups"),
    pytest.param((2, 6), 1, id="groups-of-one"),
    pytest.param((1, 2, 2, 20), 5, id="four-groups"),
    pytest.param((13, 11), None, id="primes"),
]
GATES = [
    pytest.param(False, False, id="no-gate"),
    pytest.param(True, False, id="gate-before-norm"),
    pytest.param(True, True, id="norm-before-gate"),
]


def oracle(values: dict[str, Tensor], group_size: int | None, norm_before_gate: bool) -> Tensor:
    """The formula, one group and one channel at a time, in float64."""
    x, weight, z = values["x"], values["weight"], values.get("z")
    D = x.shape[-1]
    size = group_size or D
    rows = []
    for r, row in enumerate(x.reshape(-1, D)):
        gate = [1.0] * D if z is None else [g / (1 + torch.exp(-g)) for g in z.reshape(-1, D)[r]]
        u = list(row) if norm_before_gate else [v * g for v, g in zip(row, gate, strict=True)]
        for i in range(D):
            start = i // size * size
            mean_square = sum((v * v for v in u[start : start + size]), start=torch.zeros(())) / size
            value = weight[i] * u[i] / torch.sqrt(mean_square + EPS)
            rows.append(value * gate[i] if norm_before_gate else value)
    return torch.stack(rows).view(x.shape)


def draw(shape: tuple[int, ...], gated: bool) -> dict[str, Tensor]:
    torch.manual_seed(sum(shape))
    shapes = {"x": shape, "weight": shape[-1:]} | ({"z": shape} if gated else {})
    return {name: torch.randn(size, dtype=torch.float64) for name, size in shapes.items()}


def leaves(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in values.items()}


def differentiate(y: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of y, the same in every dtype: its coefficients are bfloat16's."""
    generator = torch.Generator().manual_seed(0)
    loss = (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.bfloat16).double()).sum()
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    assert actual.dtype == dtype, f"{name} is {actual.dtype}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gated", "norm_before_gate"), GATES)
@pytest.mark.parametrize(("shape", "group_size"), CASES)
def test_matches_the_oracle(
    op: Callable[..., Tensor],
    dtype: torch.dtype,
    gated: bool,
    norm_before_gate: bool,
    shape: tuple[int, ...],
    group_size: int | None,
) -> None:
    given = leaves(draw(shape, gated), dtype)
    exact = leaves(given, torch.float64)  # of the rounded inputs
    y = op(**given, eps=EPS, group_size=group_size, norm_before_gate=norm_before_gate)
    expected = oracle(exact, group_size, norm_before_gate)
    close(y, expected, dtype, "y")
    gradients = differentiate(expected, exact)
    for name, gradient in differentiate(y, given).items():
        close(gradient, gradients[name], dtype, f"d{name}")


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gated", "norm_before_gate"), GATES)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        pytest.param((71, 6), 2, id="more-rows-than-a-program-sums"),
        pytest.param((35, 300), 150, id="tiles-of-some-rows"),
        pytest.param((2, 2, 2500), None, id="wider-than-a-tile-of-two-rows"),
    ],
)
def test_many_numbers_match_the_reference(
    op: Callable[..., Tensor],
    dtype: torch.dtype,
    gated: bool,
    norm_before_gate: bool,
    shape: tuple[int, ...],
    group_size: int | None,
) -> None:
    """The oracle's loops are too slow for these."""
    given = leaves(draw(shape, gated), dtype)
    exact = leaves(given, torch.float64)
    options = {"eps": EPS, "group_size": group_size, "norm_before_gate": norm_before_gate}
    y = op(**given, **options)
    expected = rms_norm_reference(**exact, **options)
    close(y, expected, dtype, "y")
    gradients = differentiate(expected, exact)
    for name, gradient in differentiate(y, given).items():
        close(gradient, gradients[name], dtype, f"d{name}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("gated", "norm_before_gate"), GATES)
def test_gradcheck(op: Callable[..., Tensor], gated: bool, norm_before_gate: bool) -> None:
    values = leaves(draw((2, 6), gated), torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(values, tensors, strict=True))
        return op(**named, eps=EPS, group_size=3, norm_before_gate=norm_before_gate)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "gated", "options"),
    [
        pytest.param(lambda: LlamaRMSNorm(48, EPS), False, {}, id="llama"),
        pytest.param(lambda: Mamba2RMSNorm(48, EPS), False, {}, id="mamba2"),
        pytest.param(lambda: MambaRMSNormGated(48, 48, EPS), False, {}, id="mamba2-ungated"),
        pytest.param(lambda: MambaRMSNormGated(48, 48, EPS), True, {}, id="mamba2-gated"),
        pytest.param(lambda: MambaRMSNormGated(48, 16, EPS), True, {"group_size": 16}, id="mamba2-grouped"),
        pytest.param(lambda: Qwen3NextRMSNormGated(48, EPS), True, {"norm_before_gate": True}, id="qwen3-next"),
    ],
)
def test_bit_equal_to_transformers(
    op: Callable[..., Tensor],
    dtype: torch.dtype,
    make: Callable[[], torch.nn.Module],
    gated: bool,
    options: dict[str, Any],
) -> None:
    values = {name: (3 * value).to(dtype) for name, value in draw((4, 50, 48), gated).items()}
    module = make().to(dtype)
    module.load_state_dict({"weight": values["weight"]})
    arguments = [values["x"], values["z"]] if gated else [values["x"]]
    with torch.no_grad():
        assert torch.equal(op(**values, eps=EPS, **options), module(*arguments))


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_dtype_of_x_is_kept(op: Callable[..., Tensor], norm_before_gate: bool) -> None:
    """Trained in mixed precision, the weight is float32 and the activations are not."""
    values = draw((4, 6), True)
    given = leaves({"x": values["x"], "z": values["z"]}, torch.bfloat16) | leaves(
        {"weight": values["weight"]}, torch.float32
    )
    y = op(**given, eps=EPS, norm_before_gate=norm_before_gate)
    exact = leaves(given, torch.float64)
    expected = oracle(exact, None, norm_before_gate)
    close(y, expected, torch.bfloat16, "y")
    gradients = differentiate(expected, exact)
    for name, gradient in differentiate(y, given).items():
        assert gradient.dtype == given[name].dtype
        close(gradient.to(torch.bfloat16), gradients[name], torch.bfloat16, f"d{name}")


@pytest.mark.parametrize("op", ALL_OPS)
def test_statistics_do_not_overflow_in_half_precision(op: Callable[..., Tensor]) -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # its square is no float16 number
    assert torch.equal(op(x, torch.ones(8, dtype=torch.float16), EPS), torch.ones_like(x))


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize(("gated", "norm_before_gate"), GATES)
def test_a_row_of_zeros_is_finite(op: Callable[..., Tensor], gated: bool, norm_before_gate: bool) -> None:
    values = leaves(draw((2, 6), gated), torch.float32)
    values["x"].data[1] = 0
    y = op(**values, eps=EPS, norm_before_gate=norm_before_gate)
    assert not y[1].any() and y[0].all()
    for name, gradient in differentiate(y, values).items():
        assert gradient.isfinite().all(), f"d{name}"


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("name", ["x", "weight", "z"])
def test_one_trainable_argument_gets_the_same_gradient(op: Callable[..., Tensor], name: str) -> None:
    values = leaves(draw((3, 6), True), torch.float32)
    expected = differentiate(op(**values, eps=EPS, group_size=2), values)[name]
    frozen = {other: value.detach() for other, value in values.items()}
    frozen[name].requires_grad_()
    gradient = differentiate(op(**frozen, eps=EPS, group_size=2), {name: frozen[name]})[name]
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_strided_inputs_and_gradients(op: Callable[..., Tensor]) -> None:
    """In a model, x and z are slices of one projection and the gradient may be expanded."""
    wide = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x, z = wide[..., :6], wide[..., 6:]
    weight = torch.ones(12)[::2]
    strided = torch.autograd.grad(op(x, weight, EPS, z=z, group_size=3).sum(), (x, z))
    x, z = (tensor.detach().contiguous().requires_grad_() for tensor in (x, z))
    dense = torch.autograd.grad(op(x, weight, EPS, z=z, group_size=3).sum(), (x, z))
    for name, one, other in zip(("dx", "dz"), strided, dense, strict=True):
        close(one, other, torch.float32, name)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_inputs_are_left_alone(op: Callable[..., Tensor], gated: bool) -> None:
    values = leaves(draw((3, 6), gated), torch.float32)
    before = {name: value.detach().clone() for name, value in values.items()}
    differentiate(op(**values, eps=EPS), values)
    for name, value in values.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize(("gated", "norm_before_gate"), GATES)
def test_runs_are_complete_and_bit_identical(op: Callable[..., Tensor], gated: bool, norm_before_gate: bool) -> None:
    values = leaves(draw((45, 12), gated), torch.float32)
    runs = []
    for _ in range(2):
        y = op(**values, eps=EPS, group_size=4, norm_before_gate=norm_before_gate)
        runs.append([y, *differentiate(y, values).values()])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.zeros(())}, r"x must be \(\.\.\., D\)", id="x-scalar"),
        pytest.param({"x": torch.zeros(2, 0), "weight": torch.zeros(0)}, "D >= 1", id="x-empty"),
        pytest.param({"group_size": 4}, "group_size must be a positive divisor of D = 6", id="not-a-divisor"),
        pytest.param({"group_size": 0}, "group_size must be .*got 0", id="group-0"),
        pytest.param({"group_size": -3}, "group_size must be .*got -3", id="group-negative"),
        pytest.param({"group_size": 12}, "group_size must be .*got 12", id="group-too-large"),
    ],
)
def test_bad_input_raises(op: Callable[..., Tensor], change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(6), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        op(**(arguments | change))


@pytest.mark.parametrize(
    ("implementation", "x", "message"),
    [
        pytest.param("cuda", torch.zeros(2, 6), " of rms_norm must be 'auto', 'torch' or 'triton', got", id="unknown"),
        pytest.param("triton", torch.zeros(2, 6).double(), "support torch.float64", id="float64", marks=NEEDS_TRITON),
        pytest.param("triton", torch.zeros(1, 16385), "is not available for these arguments", id="wide-group"),
    ],
)
def test_missing_implementation_raises(implementation: str, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"implementation.*{message}"):
        rms_norm(x, torch.zeros(x.shape[-1]), EPS, implementation=implementation)


@NEEDS_TRITON
def test_a_row_too_wide_for_triton_has_groups_that_are_not() -> None:
    x = torch.ones(1, 32768)
    y = with_triton(rms_norm)(x, torch.ones(32768), 0.0, group_size=8192)
    close(y, x, torch.float32, "y")
