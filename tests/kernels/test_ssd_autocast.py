"""SSD under autocast: the dtypes of its sums are its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.ssd import ssd, ssd_log_decay, ssd_matrix


@pytest.mark.parametrize("op", [ssd, ssd_log_decay])
def test_autocast_leaves_the_sums_in_float32(op: Any) -> None:
    """Outputs, state and every gradient, to the bit; two chunks, so that a state is read."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = {"x": draw(1, 70, 4, 3), "B": draw(1, 70, 2, 5), "C": draw(1, 70, 2, 5)}
    if op is ssd:
        values |= {"dt": draw(1, 70, 4).exp(), "A": -draw(4).exp()}
    else:
        values["log_decay"] = -draw(1, 70, 4).exp()
    values |= {"D": draw(4), "z": draw(1, 70, 4, 3), "initial_state": draw(1, 4, 3, 5)}
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, state = op(**leaves, return_final_state=True, implementation="torch")
            with torch.no_grad():
                inference = op(**leaves, implementation="torch")
        gradients = torch.autograd.grad(y.sin().sum() + state.cos().sum(), list(leaves.values()))
        results.append([y, state, inference, *gradients])
    for name, plain, cast in zip(["y", "state", "y without gradients", *leaves], *results, strict=True):
        assert torch.equal(plain, cast), name


def test_autocast_does_not_round_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.randn(1, 9, 4, generator=generator).exp()
    inputs = [log_decay, *(torch.randn(1, 9, 2, 5, generator=generator) for _ in range(2))]
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            matrix = ssd_matrix(*inputs)
        results.append((matrix, *torch.autograd.grad(matrix.square().sum(), inputs)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
