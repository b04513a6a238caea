"""add_rms_norm against the formula in float64, against the two operations that it joins, and in the hybrid's block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from torch import Tensor

from ssm_zoo.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

REFERENCE = pytest.param(add_rms_norm_reference, id="reference")
TORCH = pytest.param(add_rms_norm, id="torch")
TRITON = pytest.param(with_triton(add_rms_norm), id="triton", marks=NEEDS_TRITON)
EPS = 1e-3  # seen in every dtype
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# dtypes of x, residual and weight, and of normed
DTYPES = [
    pytest.param((F32, F32, F32), F32, id="float32"),
    pytest.param((BF16, BF16, BF16), BF16, id="bfloat16"),
    pytest.param((F16, F16, F16), F16, id="float16"),
    pytest.param((BF16, F32, BF16), BF16, id="float32-stream"),
    pytest.param((BF16, F32, F32), F32, id="autocast"),
    pytest.param((BF16, BF16, F32), BF16, id="float32-weight"),
    pytest.param((F32, BF16, BF16), BF16, id="float32-x"),
]
SHAPES = [
    pytest.param((1,), id="one-number"),
    pytest.param((7,), id="one-row"),
    pytest.param((0, 7), id="no-row"),
    pytest.param((2, 3, 5), id="odd"),
    pytest.param((71, 6), id="more-rows-than-a-program-sums"),
    pytest.param((35, 150), id="tiles-of-some-rows"),
    pytest.param((2, 2, 2500), id="wider-than-a-tile-of-two-rows"),
]


def oracle(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """normed_i = w_i t_i sqrt(D / (|t|^2 + D eps)) with t = residual + x."""
    total, D = residual + x, x.shape[-1]
    return weight * total * (D / (total.square().sum(-1, keepdim=True) + D * EPS)).sqrt(), total


def draw(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)) -> dict[str, Tensor]:
    """Sixteenths of at most seven bits: the sum of two of them is exact in every dtype."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = {}
    for (name, size), dtype in zip({"x": shape, "residual": shape, "weight": shape[-1:]}.items(), dtypes, strict=True):
        sixteenths = (16 * torch.randn(size, generator=generator)).round().clamp(-127, 127)
        values[name] = (sixteenths / 16).to(dtype).requires_grad_()
    return values


def differentiate(outputs: tuple[Tensor, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of the outputs, the same in every dtype."""
    generator = torch.Generator().manual_seed(0)
    loss = sum((y.double() * torch.randn(y.shape, generator=generator).bfloat16().double()).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtypes", "normed_dtype"), DTYPES)
def test_matches_the_oracle(
    op: Callable[..., Any], shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], normed_dtype: torch.dtype
) -> None:
    values = draw(shape, dtypes)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    outputs, expected = op(**values, eps=EPS), oracle(**exact)
    assert [output.dtype for output in outputs] == [normed_dtype, dtypes[1]]
    assert torch.equal(outputs[1].double(), expected[1])
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    close(outputs[0], expected[0], coarsest, "normed")
    gradients = differentiate(expected, exact)
    for name, gradient in differentiate(outputs, values).items():
        assert gradient.dtype == values[name].dtype, name
        close(gradient, gradients[name], coarsest, f"d{name}")


@pytest.mark.parametrize("op", [REFERENCE, TORCH])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle_in_float64(op: Callable[..., Any], shape: tuple[int, ...]) -> None:
    test_matches_the_oracle(op, shape, (F64, F64, F64), F64)


@pytest.mark.parametrize("op", [REFERENCE, TORCH])
def test_gradcheck(op: Callable[..., Any]) -> None:
    values = draw((2, 5), (F64, F64, F64))
    assert torch.autograd.gradcheck(lambda x, residual, weight: op(x, residual, weight, EPS), tuple(values.values()))


@pytest.mark.parametrize(("dtypes", "normed_dtype"), DTYPES)
def test_torch_is_the_two_operations(dtypes: tuple[torch.dtype, ...], normed_dtype: torch.dtype) -> None:
    """Bit by bit, so that a model that joins them computes what it did."""
    values = draw((3, 4, 48), dtypes)
    total = (values["residual"] + values["x"]).to(dtypes[1])
    expected = rms_norm(total, values["weight"], EPS).to(normed_dtype), total
    outputs = add_rms_norm(**values, eps=EPS)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)
    gradients = differentiate(expected, values)
    for name, gradient in differentiate(outputs, values).items():
        assert torch.equal(gradient, gradients[name]), name


@NEEDS_TRITON
@pytest.mark.parametrize("dtypes", [(F16, F16, F16), (F16, F32, F16), (F16, F16, F32), (F32, F16, F16)], ids=str)
def test_triton_rounds_where_torch_does(dtypes: tuple[torch.dtype, ...]) -> None:
    """Not bfloat16: Triton's interpreter cuts it off. A sum in another order may turn one rounding in a hundred."""
    values = {name: (value / 3).detach().to(value.dtype) for name, value in draw((64, 48), dtypes).items()}
    normed, total = with_triton(add_rms_norm)(**values, eps=EPS)
    expected, expected_total = add_rms_norm(**values, eps=EPS)
    assert torch.equal(total, expected_total)
    assert (normed != expected).float().mean() < 1e-2


@pytest.mark.parametrize("op", [REFERENCE, TORCH, TRITON])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16)], ids=["same", "mixed"])
@pytest.mark.parametrize("used", [0, 1], ids=["normed", "total"])
def test_one_of_the_outputs_is_unused(op: Callable[..., Any], dtypes: tuple[torch.dtype, ...], used: int) -> None:
    values = draw((3, 5), dtypes)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    results = []
    for outputs, leaves in ((op(**values, eps=EPS), values), (oracle(**exact), exact)):
        weights = torch.linspace(-1, 1, 15, dtype=F64).view(3, 5)
        loss = (outputs[used].double() * weights).sum()
        results.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    for name, gradient, expected in zip(values, *results, strict=True):
        if expected is None:
            assert gradient is None and name == "weight" and used == 1
        else:
            assert gradient.dtype == values[name].dtype
            close(gradient, expected, min(dtypes, key=lambda dtype: dtype.itemsize), f"d{name}")


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16)], ids=["same", "mixed"])
@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_one_trainable_argument_gets_the_same_gradient(
    op: Callable[..., Any], dtypes: tuple[torch.dtype, ...], name: str
) -> None:
    values = draw((3, 6), dtypes)
    expected = differentiate(op(**values, eps=EPS), values)[name]
    frozen = {other: value.detach() for other, value in values.items()}
    frozen[name].requires_grad_()
    assert torch.equal(differentiate(op(**frozen, eps=EPS), {name: frozen[name]})[name], expected)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_gradients_of_x_and_residual_share_no_memory(op: Callable[..., Any]) -> None:
    """The kernel writes them once where the dtypes agree; who scales one in place must not scale the other."""
    values = draw((3, 6))
    normed, total = op(**values, eps=EPS)
    (normed.sum() + total.sum()).backward()
    x, residual = values["x"].grad, values["residual"].grad
    assert x is not None and residual is not None and torch.equal(x, residual)
    x.mul_(2)
    assert torch.equal(x, 2 * residual)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_strided_inputs_and_gradients(op: Callable[..., Any]) -> None:
    """Slices and transposes come in, of other strides than each other's; the gradient of a sum is expanded."""
    wide = torch.randn(13, 10, generator=torch.Generator().manual_seed(0))
    results = []
    for dense in (False, True):
        tensors = [wide[:6].t(), wide.view(10, 13)[:, 1::2], wide[0, :6], torch.ones(()).expand(10, 6), wide[6:12].t()]
        x, residual, weight, *weights = [t.contiguous() if dense else t for t in tensors]
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight)]
        outputs = op(*leaves, EPS)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for index, (strided, dense) in enumerate(zip(*results, strict=True)):
        close(strided, dense, F32, str(index))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16)], ids=["same", "mixed"])
def test_runs_are_complete_bit_identical_and_leave_inputs_alone(
    op: Callable[..., Any], dtypes: tuple[torch.dtype, ...]
) -> None:
    values = draw((45, 11), dtypes)
    before = {name: value.detach().clone() for name, value in values.items()}
    runs = []
    for _ in range(2):
        outputs = op(**values, eps=EPS)
        runs.append([*outputs, *differentiate(outputs, values).values()])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)
    for name, value in values.items():
        assert torch.equal(value, before[name]), name


def test_rows_too_wide_for_triton() -> None:
    values = {name: value.detach() for name, value in draw((1, 16385)).items()}
    with pytest.raises(ValueError, match="implementation='triton' of add_rms_norm is not available for these arg"):
        add_rms_norm(**values, eps=EPS, implementation="triton")
    close(add_rms_norm(**values, eps=EPS)[0], add_rms_norm_reference(**values, eps=EPS)[0], F32, "normed")


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "autocast"])
def test_the_hybrid_block_is_add_then_norm_and_calls_the_norm(setting: str) -> None:
    model = make_model("all-four").backbone.to(BF16 if setting == "bfloat16" else F32)
    hidden = model.embeddings(draw_ids(2, 9)).detach()
    for block in model.layers:
        calls: list[int] = []
        handle = block.post_attention_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results = []
        for fused in (True, False):
            leaf = hidden.clone().requires_grad_()
            with torch.autocast("cpu", BF16, enabled=setting == "autocast"):
                sequence = model.sequence_of(leaf)
                if fused:
                    y = block(leaf, sequence)[0]
                else:
                    h = leaf + block.mixer(block.input_layernorm(leaf), sequence)[0]
                    y = h + block.mlp(block.post_attention_layernorm(h))
            parameters = dict(block.named_parameters())
            gradients = torch.autograd.grad(y.sum(), [leaf, *parameters.values()])
            results.append(dict(zip(["y", "leaf", *parameters], [y, *gradients], strict=True)))
        handle.remove()
        assert len(calls) == 2
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
