"""What the tests of masked and of Toeplitz mixing share: the two ops, cases, inputs, and dense oracles in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.position_mix import (
    masked_mix,
    masked_mix_reference,
    masked_mix_step,
    toeplitz_mix,
    toeplitz_mix_reference,
    toeplitz_mix_step,
)
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton


def by_distance(weight: Tensor) -> Tensor:
    """(H, N, N) weights of positions of (H, N) weights by distance."""
    N = weight.shape[1]
    rows = [torch.cat([weight[:, : i + 1].flip(1), weight.new_zeros(len(weight), N - i - 1)], 1) for i in range(N)]
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class Family:
    """An op and its companions.

    Attributes:
        weights: dimensions of the weights.
    """

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    step: Callable[..., Tensor]
    weights: int

    def matrix(self, weight: Tensor) -> Tensor:
        """The weights as (H, N, N)."""
        return weight.tril() if self.weights == 3 else by_distance(weight)


MASKED = Family(masked_mix, masked_mix_reference, masked_mix_step, 3)
TOEPLITZ = Family(toeplitz_mix, toeplitz_mix_reference, toeplitz_mix_step, 2)
FAMILIES = [pytest.param(MASKED, id="masked"), pytest.param(TOEPLITZ, id="toeplitz")]
# How an op is called: "reference", "torch" or "triton".
EXACT_WAYS = ["reference", "torch"]
FAST_WAYS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)]
WAYS = [*EXACT_WAYS, FAST_WAYS[1]]


def called(family: Family, way: str) -> Callable[..., Tensor]:
    return {"reference": family.reference, "torch": family.op, "triton": with_triton(family.op)}[way]


@dataclass(frozen=True)
class Case:
    """Sizes: batch, length, positions, heads, head width."""

    B: int
    L: int
    N: int
    H: int = 1
    P: int = 5

    def draw(self, family: Family, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Inputs of order 1, with gradients; above the diagonal the weights are NaN."""
        generator = torch.Generator().manual_seed(self.B + 10 * self.L + 100 * self.H)
        x = (self.B, self.L, self.H, self.P)
        shapes = {"x": x, "weight": (self.H, *[self.N] * (family.weights - 1)), "bias": (self.H, self.N), "residual": x}
        values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        if family.weights == 3:
            above = torch.ones(self.N, self.N, dtype=torch.bool).triu(1)
            values["weight"].masked_fill_(above, torch.nan)
        return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def oracle(
    family: Family,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Every pair of tokens of a row by its weight, zero for tokens that do not see each other."""
    B, L = x.shape[:2]
    seq_idx = torch.zeros(B, L, dtype=torch.long) if seq_idx is None else seq_idx
    real = seq_idx >= 0
    same = (seq_idx[:, :, None] == seq_idx[:, None]) & real[:, None] & real[:, :, None]
    earlier = torch.ones(L, L, dtype=torch.bool).tril()
    place = (same & earlier).sum(-1).clamp(min=1) - 1  # (B, L) of each token in its document
    weights = family.matrix(weight)[:, place[:, :, None], place[:, None]]  # (H, B, L, L)
    y = torch.einsum("hbts,bshp->bthp", weights.where(same & earlier, 0), x.where(real[..., None, None], 0))
    if bias is not None:
        y = y + bias[:, place].permute(1, 2, 0)[..., None] * real[..., None, None]
    return y if residual is None else residual + y


def differentiate(y: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of y, the same in every dtype: its coefficients are bfloat16's."""
    generator = torch.Generator().manual_seed(0)
    loss = (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.bfloat16).double()).sum()
    gradients = torch.autograd.grad(loss, list(values.values()))
    return {f"d{name}": gradient for name, gradient in zip(values, gradients, strict=True)}


def results(op: Callable[..., Tensor], values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradients, by name."""
    y = op(**values, **options)
    return {"y": y, **differentiate(y, values)}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In half precision sums of hundreds of terms that were rounded are compared: by the norm of the error."""
    rtol, atol = TOLERANCES[dtype]
    for name, value in expected.items():
        assert actual[name].dtype == dtype, f"{name} is {actual[name].dtype}"
        assert actual[name].shape == value.shape, name
        found, value = actual[name].double(), value.double()
        if dtype.itemsize == 2:
            assert found.isfinite().all(), name
            assert (found - value).norm() <= rtol / 2 * value.norm(), name
        else:
            torch.testing.assert_close(
                found, value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def check_against_the_oracle(
    family: Family,
    way: str,
    case: Case,
    dtype: torch.dtype,
    seq_idx: Tensor | None = None,
    without: tuple[str, ...] = (),
) -> None:
    values = {name: value for name, value in case.draw(family, dtype).items() if name not in without}
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y = oracle(family, **exact)
    expected = {"y": y, **differentiate(y, exact)}
    # What was NaN has no gradient; the oracle's is one of zeros times NaN.
    expected["dweight"] = expected["dweight"].nan_to_num(0)
    close(results(called(family, way), values), expected, dtype)
