"""masked_mix and toeplitz_mix against an oracle: a dense product of every pair of tokens, in float64."""

import pytest
import torch
from mixing import (
    EXACT_WAYS,
    FAMILIES,
    FAST_WAYS,
    MASKED,
    WAYS,
    Case,
    Family,
    called,
    check_against_the_oracle,
    close,
    differentiate,
    oracle,
    results,
)
from torch import Tensor

from ssm_zoo.kernels import position_mix, position_mix_torch, position_mix_triton
from with_triton import NEEDS_TRITON

# Tiles of the Triton kernels hold 64 positions in float32 and 128 in half precision; panels of the torch path hold 128.
CASES = [
    pytest.param(Case(1, 1, 1, P=1), id="smallest"),
    pytest.param(Case(1, 1, 9), id="one-token-of-many-positions"),
    pytest.param(Case(2, 13, 13, H=4, P=3), id="heads"),
    pytest.param(Case(3, 37, 50), id="fewer-tokens-than-positions"),
    pytest.param(Case(1, 63, 63, P=16), id="one-less-than-a-tile"),
    pytest.param(Case(1, 64, 64, P=16), id="a-tile"),
    pytest.param(Case(1, 65, 65, P=16), id="one-more-than-a-tile"),
    pytest.param(Case(1, 129, 140, P=16), id="one-more-than-a-panel"),
    pytest.param(Case(2, 40, 40, P=128), id="wide-heads"),
    pytest.param(Case(2, 70, 71, P=24), id="columns-of-several-rows"),
]
LAYOUTS = {
    "one-document": [[0] * 9, [3] * 9],
    "documents": [[3, 3, 3, 3, 7, 7, 7, 7, 8], [0, 0, 1, 1, 1, 2, 2, 2, 2]],
    "documents-of-one-token": [[0, 1, 2, 3, 4, 5, 6, 7, 8]],
    "padding-left": [[-1, -1, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "padding-right": [[0, 0, 0, 0, 0, 0, 0, -1, -1], [0, 0, 0, -1, -1, -1, -1, -1, -1]],
    "padding-inside": [[0, 0, -1, -1, 0, 0, 1, -3, 1]],
    "the-same-number-in-the-next-row": [[0, 0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 2, 2, 2]],
    "rows-of-padding": [[-1] * 9, [0] * 9, [-2, -1] * 4 + [-1]],
    "a-token-of-padding": [[-1] + [0] * 10, [0] * 11, [0] * 10 + [-1]],
    "nothing-but-padding": [[-1] * 9, [-4] * 9],
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes 50 milliseconds for a program, however little it does."""
    monkeypatch.setattr(position_mix_triton, "_ROWS", 128)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> None:
    """Several of everything at small sizes."""
    monkeypatch.setattr(position_mix_triton, "_ROWS", 8)
    monkeypatch.setattr(position_mix_triton, "_MIX_TILES", dict.fromkeys((2, 4), (32, 16, 16, 4, 2)))
    monkeypatch.setattr(position_mix_triton, "_WEIGHT_TILES", dict.fromkeys((2, 4), (16, 16, 4, 2)))
    monkeypatch.setattr(position_mix_triton, "_GROUP", 2)
    monkeypatch.setattr(position_mix_triton, "_PROGRAMS", 12)
    monkeypatch.setattr(position_mix_torch, "_PANEL", 16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(family: Family, way: str, dtype: torch.dtype, case: Case) -> None:
    check_against_the_oracle(family, way, case, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", EXACT_WAYS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle_in_float64(family: Family, way: str, case: Case) -> None:
    check_against_the_oracle(family, way, case, torch.float64)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 37, 40, P=20), Case(1, 37, 40, H=2, P=32)], ids=["packed", "whole"])
def test_many_tiles_match_the_oracle(family: Family, way: str, dtype: torch.dtype, case: Case) -> None:
    """Tiles that are cut at the end, columns of two rows in one, groups of tiles, shares of the columns."""
    check_against_the_oracle(family, way, case, dtype)


@NEEDS_TRITON
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 64, 70, P=32), Case(4, 32, 32, H=2, P=8)], ids=["whole", "packed"])
def test_full_tiles_without_masks_match_the_oracle(
    family: Family, dtype: torch.dtype, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of two bytes per element take wide tiles if these are full."""
    monkeypatch.setattr(position_mix_triton, "_WIDE", 32)
    x = case.draw(family, dtype)["x"]
    tile = position_mix_triton._mix_tile(x, x)
    assert tile[1] == (32 if dtype == torch.bfloat16 else 16)
    assert case.L % tile[0] == case.B * case.P % tile[1] == 0
    check_against_the_oracle(family, "triton", case, dtype)


@NEEDS_TRITON
def test_wide_tiles_are_full_and_of_narrow_factors() -> None:
    x, wide = torch.empty(2, 256, 1, 256, dtype=torch.bfloat16), torch.empty(1)
    assert position_mix_triton._mix_tile(x, x) == (128, 256, 64, 8, 3)
    assert position_mix_triton._mix_tile(x, x, wide)[1] == 128
    assert position_mix_triton._mix_tile(x[:, 1:], x)[1] == 128
    assert position_mix_triton._mix_tile(x[..., 1:], x)[1] == 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("without", [("bias",), ("residual",), ("bias", "residual")], ids="-and-".join)
def test_without_bias_or_residual(family: Family, way: str, without: tuple[str, ...]) -> None:
    check_against_the_oracle(family, way, Case(2, 9, 12, H=2), torch.float32, without=without)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_match_the_oracle(family: Family, way: str, name: str) -> None:
    """Positions of a document are its own, and so there may be fewer than a row has tokens."""
    seq_idx = torch.tensor(LAYOUTS[name])
    values = Case(*seq_idx.shape, N=11, H=2, P=3).draw(family, torch.float32)
    exact = {key: value.detach().double().requires_grad_() for key, value in values.items()}
    y = called(family, way)(**values, seq_idx=seq_idx)
    expected = oracle(family, **exact, seq_idx=seq_idx)
    close({"y": y}, {"y": expected}, torch.float32)
    if name == "nothing-but-padding":
        assert torch.equal(y, values["residual"])
        return
    gradients = differentiate(expected, exact)
    gradients["dweight"] = gradients["dweight"].nan_to_num(0)
    close(differentiate(y, values), gradients, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_longer_than_there_are_positions(family: Family, way: str) -> None:
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [2] * 5])
    values = Case(1, 14, 5).draw(family, torch.float32)
    exact = {name: value.detach().double() for name, value in values.items()}
    y = called(family, way)(**values, seq_idx=seq_idx)
    close({"y": y}, {"y": oracle(family, **exact, seq_idx=seq_idx)}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_nan_at_padding_stays_there(family: Family, way: str) -> None:
    seq_idx = torch.tensor([[-1, 0, 0, -1, 0, 1, -1], [0, 0, 0, 0, -1, -1, -1]])
    values = {name: value for name, value in Case(2, 7, 7).draw(family, torch.float32).items() if name != "residual"}
    clean = results(called(family, way), values, seq_idx=seq_idx)
    with torch.no_grad():
        values["x"][seq_idx < 0] = torch.nan
    for name, value in results(called(family, way), values, seq_idx=seq_idx).items():
        assert torch.equal(value, clean[name]), name
        assert value.isfinite().all(), name
    assert not clean["y"][seq_idx < 0].any()


@pytest.mark.parametrize("way", WAYS)
def test_above_the_diagonal_and_beyond_the_row_the_gradient_is_zero(way: str) -> None:
    values = Case(2, 20, 33, H=2).draw(MASKED, torch.float32)
    gradients = results(called(MASKED, way), values)
    used = torch.zeros(33, 33, dtype=torch.bool)
    used[:20, :20] = torch.ones(20, 20, dtype=torch.bool).tril()
    assert not gradients["dweight"][:, ~used].any()
    assert gradients["dweight"][:, used].all()
    assert not gradients["dbias"][:, 20:].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("token", [0, 15, 16, 40])
def test_no_token_reaches_an_earlier_one(family: Family, way: str, token: int) -> None:
    values = {name: value.detach() for name, value in Case(1, 41, 41).draw(family, torch.float32).items()}
    y = called(family, way)(**values)
    values["x"][:, token] += 1
    changed = called(family, way)(**values)
    assert torch.equal(changed[:, :token], y[:, :token])
    assert (changed[:, token] != y[:, token]).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("length", [1, 16, 17, 30])
def test_a_beginning_by_itself_equals_that_of_the_whole(family: Family, way: str, length: int) -> None:
    """The weights of the positions that are there are those of a longer row."""
    values = {name: value.detach() for name, value in Case(2, 33, 33).draw(family, torch.float32).items()}
    whole = called(family, way)(**values)
    short = values | {name: values[name][:, :length] for name in ("x", "residual")}
    close({"y": called(family, way)(**short)}, {"y": whole[:, :length]}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_rows_of_the_batch_are_independent(family: Family, way: str) -> None:
    values = Case(4, 20, 20, P=64).draw(family, torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    turned = {
        name: (value[order] if name in ("x", "residual") else value).detach().requires_grad_()
        for name, value in values.items()
    }
    y, other = (called(family, way)(**given) for given in (values, turned))
    assert torch.equal(other, y[order])
    (dx,) = torch.autograd.grad(y.square().sum(), values["x"])
    (other_dx,) = torch.autograd.grad(other.square().sum(), turned["x"])
    assert torch.equal(other_dx, dx[order])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", EXACT_WAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_gradcheck(family: Family, way: str, packed: bool) -> None:
    values = {name: value for name, value in Case(2, 5, 6, H=2, P=2).draw(family).items()}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [-1, 0, 0, -1, 2]]) if packed else None
    with torch.no_grad():
        values["weight"].nan_to_num_(0.5)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return called(family, way)(x, weight, bias, residual=residual, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_float32_stream_of_bfloat16_inputs(family: Family, way: str) -> None:
    """The result is the stream's, and the parameters may be float32: each gradient has the dtype of what it is of."""
    drawn = Case(2, 33, 40, P=16).draw(family, torch.float32)
    values = drawn | {"x": drawn["x"].detach().bfloat16().requires_grad_()}
    found = results(called(family, way), values)
    for name, dtype in {"y": torch.float32, "dx": torch.bfloat16, "dweight": torch.float32}.items():
        assert found[name].dtype == dtype, name
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y = oracle(family, **exact)
    expected = {"y": y, **differentiate(y, exact)}
    expected["dweight"] = expected["dweight"].nan_to_num(0)
    close({name: value.bfloat16() for name, value in found.items()}, expected, torch.bfloat16)
    close({"dresidual": found["dresidual"]}, {"dresidual": expected["dresidual"]}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_a_gradient_of_one_alone(family: Family, way: str, name: str) -> None:
    values = Case(2, 20, 20, P=8).draw(family, torch.float32)
    expected = results(called(family, way), values)[f"d{name}"]
    alone = {key: value.detach().requires_grad_(key == name) for key, value in values.items()}
    y = called(family, way)(**alone)
    close(differentiate(y, {name: alone[name]}), {f"d{name}": expected}, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_strided_inputs_and_gradients(family: Family, way: str) -> None:
    """In a model the inputs are a part of a projection, and the gradient may be expanded."""
    values = Case(2, 20, 20, H=2, P=4).draw(family, torch.float32)
    wide = torch.cat([values["x"], values["residual"]], dim=-1).detach().requires_grad_()
    x, residual = wide.split(4, dim=-1)
    weight = values["weight"].detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    bias = values["bias"].detach().T.contiguous().T.requires_grad_()
    op = called(family, way)
    strided = torch.autograd.grad(op(x, weight, bias, residual=residual).sum(), (x, weight, bias, residual))
    dense = torch.autograd.grad(op(**values).sum(), list(values.values()))
    close(dict(zip(values, strided, strict=True)), dict(zip(values, dense, strict=True)), torch.float32)


@pytest.mark.usefixtures("poisoned_empty", "small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_runs_are_complete_and_bit_identical(family: Family, way: str, packed: bool) -> None:
    seq_idx = torch.tensor([[0] * 20 + [1] * 3 + [-1] * 10]) if packed else None
    values = Case(1, 33, 35, P=24).draw(family, torch.float32)
    runs = [results(called(family, way), values, seq_idx=seq_idx) for _ in range(2)]
    for name, first in runs[0].items():
        assert first.isfinite().all() and torch.equal(first, runs[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_inputs_are_left_alone(family: Family, way: str) -> None:
    values = Case(2, 20, 25).draw(family, torch.float32)
    before = {name: value.detach().clone() for name, value in values.items()}
    results(called(family, way), values)
    for name, value in values.items():
        assert torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [1, 10**6], ids=["transforms", "panels"])
def test_autocast_leaves_the_sums_in_float32(family: Family, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_mix, "_TRANSFORM_FROM", threshold)
    values = Case(2, 20, 20).draw(family, torch.float32)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = family.op(**values)
            runs.append({"y": y, **differentiate(y, values)})
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_too_few_positions(family: Family, way: str) -> None:
    values = Case(2, 6, 5).draw(family)
    shape = tuple(values["weight"].shape)
    symbols = "(H, N, N)" if family is MASKED else "(H, N)"
    with pytest.raises(ValueError) as caught:
        called(family, way)(**values)
    assert str(caught.value) == f"weight must be {symbols} with N >= L = 6 positions, got shape {shape}"
    seq_idx = torch.tensor([[0] * 5 + [1], [2] * 6])
    with pytest.raises(ValueError) as caught:
        called(family, way)(**values, seq_idx=seq_idx)
    assert str(caught.value) == "seq_idx must hold no document of more than N = 5 tokens, got one of 6"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 0, 1, 5), (2, 6, 0, 5), (2, 6, 1, 0)], ids=str)
def test_nothing_to_mix(family: Family, shape: tuple[int, ...]) -> None:
    weight = torch.zeros((shape[2], *[6] * (family.weights - 1)))
    with pytest.raises(ValueError) as caught:
        family.op(torch.zeros(shape), weight)
    assert str(caught.value) == f"x must hold at least one token, one head and one feature, got shape {shape}"


@NEEDS_TRITON
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_batch(family: Family) -> None:
    for way in ("torch", "triton"):
        values = Case(0, 6, 6).draw(family, torch.float32)
        found = results(called(family, way), values)
        assert found["y"].shape == (0, 6, 1, 5)
        assert not found["dweight"].any() and not found["dbias"].any()
