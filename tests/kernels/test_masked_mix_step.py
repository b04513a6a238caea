"""One token of masked and of Toeplitz mixing, from the inputs so far: what a cache and a generation need of it."""

from collections.abc import Callable

import pytest
import torch
from mixing import FAMILIES, FAST_WAYS, MASKED, Case, Family, close, oracle
from torch import Tensor

from ssm_zoo.kernels import position_mix, position_mix_triton
from with_triton import with_triton


def step_of(family: Family, way: str) -> Callable[..., Tensor]:
    return with_triton(family.step) if way == "triton" else family.step


def drawn(family: Family, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in case.draw(family, dtype).items()}


def room(x: Tensor, positions: Tensor, places: int) -> Tensor:
    """A cache of so many places that holds each row's inputs up to its position, and NaN behind it."""
    history = x.new_full((x.shape[0], places, *x.shape[2:]), torch.nan)
    for row, position in enumerate(positions.tolist()):
        history[row, : position + 1] = x[row, : position + 1]
    return history


def rows_of(x: Tensor, positions: Tensor) -> Tensor:
    return x[torch.arange(len(x)), positions]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_token_by_token_equals_the_whole(family: Family, way: str) -> None:
    """The rows are at different positions; the room of the cache is that of all positions, and more."""
    values = drawn(family, Case(2, 9, 9, H=2, P=3))
    whole = oracle(family, **{name: value.double() for name, value in values.items()})
    for t in range(9):
        positions = torch.tensor([t, (t * 5 + 3) % 9])
        history = room(values["x"], positions, 12)
        y = step_of(family, way)(
            history, values["weight"], values["bias"], positions, residual=rows_of(values["residual"], positions)
        )
        close({"y": y}, {"y": rows_of(whole, positions)}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("places", [30, 40, 50])
def test_shares_of_the_places(
    family: Family, way: str, dtype: torch.dtype, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One less than fills a share, as many, one more; tiles of features that are cut at the end."""
    monkeypatch.setattr(position_mix_triton, "_TILES", (16, 8, 16))
    values = drawn(family, Case(4, 30, 40, P=20), dtype)
    whole = oracle(family, **{name: value.double() for name, value in values.items()})
    positions = torch.tensor([0, 14, 15, 16])
    history = room(values["x"], positions, places)
    y = step_of(family, way)(
        history, values["weight"], values["bias"], positions, residual=rows_of(values["residual"], positions)
    )
    close({"y": y}, {"y": rows_of(whole, positions)}, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_row_without_a_token(family: Family, way: str, dtype: torch.dtype) -> None:
    values = drawn(family, Case(2, 6, 6))
    positions = torch.tensor([-1, 4], dtype=dtype)
    history = room(values["x"], positions, 6)
    step, parameters = step_of(family, way), (values["weight"], values["bias"])
    alone = step(history, *parameters, positions)
    assert not alone[0].any()
    close({"y": alone[1:]}, {"y": step(history[1:], *parameters, positions[1:])}, torch.float32)
    stream = values["residual"][:, 0]
    assert torch.equal(step(history, *parameters, positions, residual=stream)[0], stream[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_views_of_larger_tensors(family: Family, way: str) -> None:
    """Nothing need be contiguous, not even features."""
    values = drawn(family, Case(2, 6, 6, H=2, P=4))
    positions = torch.tensor([5, 2])
    history = room(values["x"], positions, 6)
    stream = values["residual"][:, 0]
    view = history.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    weight, bias = (values[name].transpose(0, -1).contiguous().transpose(0, -1) for name in ("weight", "bias"))
    options = {"residual": stream.transpose(1, 2).contiguous().transpose(1, 2)}
    y = step_of(family, way)(view, weight, bias, positions.repeat_interleave(2)[::2], **options)
    expected = family.step(history, values["weight"], values["bias"], positions, residual=stream)
    close({"y": y}, {"y": expected}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_the_result_has_the_dtype_of_the_stream(family: Family, way: str) -> None:
    values = drawn(family, Case(2, 6, 6))
    history, positions = values["x"].bfloat16(), torch.tensor([5, 5])
    parameters = (values["weight"], values["bias"])
    assert step_of(family, way)(history, *parameters, positions).dtype == torch.bfloat16
    stream = values["residual"][:, 5]
    y = step_of(family, way)(history, *parameters, positions, residual=stream)
    exact = {name: value.double() for name, value in values.items()} | {"x": history.double()}
    close({"y": y}, {"y": oracle(family, **exact)[:, 5]}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_step(family: Family) -> None:
    values = drawn(family, Case(2, 4, 5, P=2), torch.float64)
    positions = torch.tensor([3, 1])
    inputs = [values[name].nan_to_num(0.5).requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, weight, bias: family.step(x, weight, bias, positions), inputs)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    with pytest.raises(ValueError, match=r"implementation='triton' of \w+ is not available for these arguments"):
        family.step(*single, positions, implementation="triton")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_positions_of_a_device_are_not_looked_at(family: Family, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: a position that is too large shows in the result, and nothing is written or read beyond."""
    monkeypatch.setattr(position_mix, "host_reads", lambda positions: False)
    values = drawn(family, Case(4, 9, 6))
    positions = torch.tensor([5, 6, 8, -1])
    y = step_of(family, way)(values["x"], values["weight"], values["bias"], positions)
    assert y.isnan().all(2).squeeze(1).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("places", "position"), [(4, 4), (9, 6)], ids=["places", "weights"])
def test_a_position_that_is_too_large(family: Family, places: int, position: int) -> None:
    values = drawn(family, Case(2, places, 6))
    with pytest.raises(ValueError) as caught:
        family.step(values["x"], values["weight"], values["bias"], torch.tensor([0, position]))
    assert str(caught.value) == (
        f"positions must be below the sizes of history, K = {places}, and weight, N = 6, got [0, {position}]"
    )


def test_a_history_without_places() -> None:
    with pytest.raises(ValueError) as caught:
        MASKED.step(torch.zeros(2, 0, 1, 5), torch.zeros(1, 6, 6), None, torch.zeros(2, dtype=torch.long))
    assert str(caught.value) == (
        "history must hold at least one place, one head and one feature, got shape (2, 0, 1, 5)"
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_steps_are_complete_and_bit_identical(family: Family, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is in the batch, and however much room the cache has."""
    monkeypatch.setattr(position_mix_triton, "_TILES", (16, 8, 16))
    values = drawn(family, Case(3, 33, 64, P=20))
    positions = torch.tensor([31, 32, 3])
    step, parameters = step_of(family, way), (values["weight"], values["bias"])
    y = step(room(values["x"], positions, 33), *parameters, positions)
    assert y.isfinite().all()
    assert torch.equal(y, step(room(values["x"], positions, 33), *parameters, positions))
    if way == "triton":
        assert torch.equal(y, step(room(values["x"], positions, 64), *parameters, positions))
        assert torch.equal(y[2:], step(room(values["x"], positions, 40)[2:], *parameters, positions[2:]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_an_empty_batch(family: Family, way: str) -> None:
    values = drawn(family, Case(0, 6, 6))
    y = step_of(family, way)(values["x"], values["weight"], values["bias"], torch.zeros(0, dtype=torch.long))
    assert y.shape == (0, 1, 5)
