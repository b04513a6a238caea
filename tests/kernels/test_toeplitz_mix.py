"""What toeplitz_mix has beyond the tests it shares with masked_mix: weights by distance, and Fourier transforms."""

import pytest
import torch
from mixing import (
    MASKED,
    TOEPLITZ,
    WAYS,
    Case,
    by_distance,
    called,
    check_against_the_oracle,
    close,
    differentiate,
    results,
)

from ssm_zoo.kernels import position_mix, position_mix_torch


@pytest.fixture
def transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows of any length; of a few features at once."""
    monkeypatch.setattr(position_mix, "_TRANSFORM_FROM", 1)
    monkeypatch.setattr(position_mix_torch, "_FEATURES", 4)


@pytest.mark.parametrize("way", WAYS)
def test_equals_masked_mix_of_the_matrix(way: str) -> None:
    """The gradient of a weight is the sum of those of its diagonal."""
    values = Case(2, 21, 30, H=2, P=3).draw(TOEPLITZ, torch.float32)
    matrix = by_distance(values["weight"].detach()).requires_grad_()
    expected = results(called(MASKED, way), values | {"weight": matrix})
    diagonals = [expected["dweight"].diagonal(-distance, 1, 2).sum(-1) for distance in range(30)]
    expected["dweight"] = torch.stack(diagonals, dim=1)
    close(results(called(TOEPLITZ, way), values), expected, torch.float32)


@pytest.mark.parametrize("way", WAYS)
def test_distances_that_do_not_occur_have_no_gradient(way: str) -> None:
    gradients = results(called(TOEPLITZ, way), Case(2, 20, 33, H=2).draw(TOEPLITZ, torch.float32))
    assert not gradients["dweight"][:, 20:].any()
    assert gradients["dweight"][:, :20].all()


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_distances_that_do_not_occur_are_not_read(way: str) -> None:
    values = Case(2, 20, 33, H=2).draw(TOEPLITZ, torch.float32)
    blank = values["weight"].detach().clone()
    blank[:, 20:] = torch.nan
    poisoned = values | {"weight": blank.requires_grad_()}
    close(results(called(TOEPLITZ, way), poisoned), results(called(TOEPLITZ, way), values), torch.float32)


@pytest.mark.usefixtures("transforms")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 100])
def test_transforms_match_the_oracle(length: int, dtype: torch.dtype) -> None:
    check_against_the_oracle(TOEPLITZ, "torch", Case(2, length, length + 3, H=2, P=6), dtype)


@pytest.mark.usefixtures("transforms", "poisoned_empty")
def test_transforms_are_complete_and_bit_identical() -> None:
    values = Case(2, 20, 22, P=6).draw(TOEPLITZ, torch.float32)
    runs = [results(called(TOEPLITZ, "torch"), values) for _ in range(2)]
    for name, first in runs[0].items():
        assert first.isfinite().all() and torch.equal(first, runs[1][name]), name


@pytest.mark.usefixtures("transforms")
@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_a_gradient_of_one_alone_by_transforms(name: str) -> None:
    values = Case(2, 20, 20, P=6).draw(TOEPLITZ)
    expected = results(called(TOEPLITZ, "torch"), values)[f"d{name}"]
    alone = {key: value.detach().requires_grad_(key == name) for key, value in values.items()}
    y = called(TOEPLITZ, "torch")(**alone)
    close(differentiate(y, {name: alone[name]}), {f"d{name}": expected}, torch.float64)


@pytest.mark.usefixtures("transforms")
def test_gradcheck_of_transforms() -> None:
    values = Case(2, 5, 6, H=2, P=2).draw(TOEPLITZ)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, residual = tensors
        return position_mix.toeplitz_mix(x, weight, bias, residual=residual)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


def test_the_transforms_begin_where_the_panels_end() -> None:
    """On either side of the length from which on the torch path transforms."""
    length = position_mix._TRANSFORM_FROM
    for tokens in (length - 1, length):
        values = Case(1, tokens, length, P=2).draw(TOEPLITZ, torch.float32)
        exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
        # Sums of a thousand terms of order 1: to the tolerance of their size.
        found, expected = (results(position_mix.toeplitz_mix, given) for given in (values, exact))
        for name, value in expected.items():
            assert (found[name] - value).norm() < 1e-6 * value.norm(), name
