"""window_attention against an oracle: dense attention of every column, masked, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.window_attention import window_attention, window_attention_matrix, window_attention_reference
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

TORCH = pytest.param(window_attention, id="torch")
TRITON = pytest.param(with_triton(window_attention), id="triton", marks=NEEDS_TRITON)
# The two that take float64.
OPS = [pytest.param(window_attention_reference, id="reference"), TORCH]
ALL_OPS = [*OPS, TRITON]
EVERY, NO = 1.0, 0.0


@dataclass(frozen=True)
class Case:
    """Sizes, and which tokens are selected: a share of them drawn at random, or flattened columns.

    Attributes:
        B: rows.
        K: columns.
        w: window.
        selected: share, or columns.
        H: query heads.
        G: key-value heads.
        P: head width.
    """

    B: int
    K: int
    w: int
    selected: float | tuple[int, ...]
    H: int = 2
    G: int = 2
    P: int = 5

    def index(self) -> Tensor:
        if isinstance(self.selected, tuple):
            return torch.tensor(self.selected, dtype=torch.long)
        generator = torch.Generator().manual_seed(self.K)
        return (torch.rand(self.B * self.K, generator=generator) < self.selected).nonzero().squeeze(1)

    def draw(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k and v of order 1, with gradients."""
        generator = torch.Generator().manual_seed(self.B + 10 * self.K + 100 * self.H)
        M = self.index().shape[0]
        shapes = {
            "q": (M, self.H, self.P),
            "k": (self.B, self.K, self.G, self.P),
            "v": (self.B, self.K, self.G, self.P),
        }
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }


# Tiles of the Triton kernels hold 32 tokens in float32 and 64 in half precision, and so do the torch path's blocks.
CASES = [
    pytest.param(Case(1, 1, 1, EVERY, H=1, G=1, P=1), id="smallest"),
    pytest.param(Case(2, 9, 1, EVERY), id="window-of-one"),
    pytest.param(Case(1, 8, 9, EVERY), id="one-column-less-than-the-window"),
    pytest.param(Case(1, 9, 9, EVERY), id="as-many-columns-as-the-window"),
    pytest.param(Case(1, 10, 9, EVERY), id="one-column-more-than-the-window"),
    pytest.param(Case(2, 20, 1000, 0.5), id="window-beyond-the-row"),
    pytest.param(Case(1, 67, 2**63 - 1, EVERY), id="no-window-to-speak-of"),
    pytest.param(Case(2, 131, 40, 0.4, H=4, G=2, P=24), id="some-in-groups"),
    pytest.param(Case(1, 97, 70, EVERY, H=3, G=1, P=16), id="all-of-one-key-head"),
    pytest.param(Case(2, 33, 5, NO), id="none"),
    pytest.param(Case(3, 40, 7, tuple(range(40, 80))), id="one-row-of-three"),
    pytest.param(Case(3, 40, 7, (*range(40), 90)), id="a-row-without-any"),
    pytest.param(Case(1, 600, 10, (0, 1, 2, 300, 599)), id="far-between"),
    pytest.param(Case(4, 6, 4, (5, 8, 12, 23)), id="one-of-every-row"),
]

# Places and documents of the columns; negative marks a column that holds no token.
LAYOUTS = {
    "one-document": (None, [[0] * 7]),
    "documents": (None, [[3, 3, 3, 3, 7, 7, 7], [0, 0, 1, 1, 1, 2, 2]]),
    "documents-of-one-token": (None, [[0, 1, 2, 3, 4, 5, 6]]),
    "padding-left": ([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]], None),
    "padding-right": ([[0, 1, 2, 3, 4, -1, -1], [0, 1, 2, -1, -1, -1, -1]], None),
    "padding-inside": ([[0, 1, -1, -1, 2, 3, 4]], None),
    "padding-of-documents": (None, [[-1, 0, 0, -5, 1, 1, 1, -1, 1, 2, -1]]),
    "gaps": ([[0, 2, 3, 7, 8, 9, 30], [4, 5, 6, 9, 10, 11, 12]], None),
    "gaps-and-documents": ([[0, 2, 3, -1, 8, 9, 30], [4, -1, 6, 9, -1, 11, 12]], [[0, 0, 0, 0, 1, -1, 1], [2] * 7]),
    "rows-of-padding": ([[-1] * 4, [0, 1, 2, 3], [-2, -1, -2, -1]], None),
    "nothing-but-padding": ([[-1, -1], [-1, -1]], None),
}


def layout(name: str) -> dict[str, Tensor | None]:
    positions, seq_idx = LAYOUTS[name]
    return {
        "positions": None if positions is None else torch.tensor(positions),
        "seq_idx": None if seq_idx is None else torch.tensor(seq_idx),
    }


def seen_by(case: Case, positions: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
    """(M, K) what each query sees, pair by pair."""
    place = torch.arange(case.K).expand(case.B, case.K) if positions is None else positions
    document = torch.zeros(case.B, case.K, dtype=torch.long) if seq_idx is None else seq_idx
    index = case.index()
    row, column = index // case.K, index % case.K
    own, here = place[row, column, None], document[row, column, None]
    place, document = place[row], document[row]
    real = (place >= 0) & (document >= 0) & (own >= 0) & (here >= 0)
    return real & (document == here) & (place <= own) & (own - place < case.w)


def oracle(case: Case, values: dict[str, Tensor], scale: float | None = None, **places: Tensor | None) -> Tensor:
    q, k, v = values["q"], values["k"], values["v"]
    row = case.index() // case.K
    keys, values_of = (tensor[row].repeat_interleave(case.H // case.G, dim=2) for tensor in (k, v))
    scores = torch.einsum("mhp,mkhp->mhk", q, keys) * (case.P**-0.5 if scale is None else scale)
    seen = seen_by(case, **places)[:, None]
    weights = torch.where(seen, scores.exp(), 0)
    sums = weights.sum(-1, keepdim=True)
    return torch.einsum("mhk,mkhp->mhp", weights / torch.where(sums == 0, 1, sums), values_of)


def differentiate(o: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of o, the same in every dtype: its coefficients are bfloat16's."""
    generator = torch.Generator().manual_seed(0)
    loss = (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.bfloat16).double()).sum()
    # The reference does not use keys that nobody sees.
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return {f"d{name}": gradient for name, gradient in zip(values, gradients, strict=True)}


def results(op: Callable[..., Tensor], case: Case, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradients, by name."""
    o = op(**values, window=case.w, index=case.index(), **options)
    return {"o": o, **differentiate(o, values)}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    for name, value in expected.items():
        assert actual[name].dtype == dtype, f"{name} is {actual[name].dtype}"
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_against_the_oracle(
    op: Callable[..., Tensor], case: Case, dtype: torch.dtype, scale: float | None = None, **places: Tensor | None
) -> None:
    values = case.draw(dtype)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    o = oracle(case, exact, scale, **places)
    close(results(op, case, values, scale=scale, **places), {"o": o, **differentiate(o, exact)}, dtype)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(op: Callable[..., Tensor], dtype: torch.dtype, case: Case) -> None:
    check_against_the_oracle(op, case, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle_in_float64(op: Callable[..., Tensor], case: Case) -> None:
    check_against_the_oracle(op, case, torch.float64, scale=0.7)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("w", [1, 3, 50])
@pytest.mark.parametrize("name", LAYOUTS)
def test_places_and_documents_match_the_oracle(op: Callable[..., Tensor], name: str, w: int) -> None:
    """All columns are selected, those that hold no token too."""
    places = layout(name)
    rows, columns = next(part for part in places.values() if part is not None).shape
    check_against_the_oracle(op, Case(rows, columns, w, EVERY), torch.float32, scale=1.5, **places)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_places_across_tiles_match_the_oracle(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Documents, gaps and padding reach over the edges of tiles."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(1, 4, (2, 150), generator=generator).cumsum(1)
    places[torch.rand(2, 150, generator=generator) < 0.3] = -1
    documents = torch.tensor([0] * 30 + [-1] * 5 + [1] * 60 + [2, 3] + [5] * 53).expand(2, -1)
    check_against_the_oracle(op, Case(2, 150, 45, 0.5, H=4), dtype, positions=places, seq_idx=documents)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_selected_keys_alone_equal_a_row_without_the_others(op: Callable[..., Tensor]) -> None:
    """Keys that nobody may see may as well not be there, as long as the places stay."""
    case = Case(1, 90, 30, 0.4)
    index, values = case.index(), case.draw(torch.float32)
    hidden = torch.full((1, 90), -1)
    hidden[0, index] = index
    whole = results(op, case, values, positions=hidden)
    fewer = {"q": values["q"], **{name: values[name].detach()[:, index].requires_grad_() for name in ("k", "v")}}
    short = Case(1, len(index), 30, EVERY)
    alone = results(op, short, fewer, positions=index[None])
    for name in ("dk", "dv"):
        spread = torch.zeros_like(whole[name])
        spread[:, index] = alone[name]
        alone[name] = spread
    close(whole, alone, torch.float32)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_packed_documents_equal_separate_ones(op: Callable[..., Tensor]) -> None:
    case, cut = Case(1, 60, 20, 0.5), 25
    index, values = case.index(), case.draw(torch.float32)
    seq_idx = (torch.arange(60) >= cut).int()[None]
    packed = op(**values, window=20, index=index, seq_idx=seq_idx)
    k, v = values["k"], values["v"]
    first, second = index[index < cut], index[index >= cut] - cut
    one = op(values["q"][: len(first)], k[:, :cut], v[:, :cut], window=20, index=first)
    other = op(values["q"][len(first) :], k[:, cut:], v[:, cut:], window=20, index=second)
    close({"o": packed}, {"o": torch.cat([one, other])}, torch.float32)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("G", [1, 4])
def test_decoding_with_a_cache_equals_the_whole(op: Callable[..., Tensor], G: int) -> None:
    """One query per row and the last w keys, oldest first: while the cache fills up, and then while it moves on."""
    w, length = 5, 12
    whole = Case(2, length, w, EVERY, H=4, G=G)
    values = {name: value.detach() for name, value in whole.draw(torch.float32).items()}
    expected = window_attention_reference(**values, window=w, index=whole.index()).unflatten(0, (2, length))
    last = torch.tensor([w - 1, 2 * w - 1])
    for t in range(length):
        place = torch.arange(t - w + 1, t + 1).expand(2, w)  # negative: still empty
        held = place.clamp(min=0)[0]
        keys, values_of = (values[name][:, held].clone() for name in ("k", "v"))
        for cache in (keys, values_of):
            cache[place < 0] = torch.nan
        q = values["q"].unflatten(0, (2, length))[:, t]
        o = op(q, keys, values_of, window=w, index=last, positions=place)
        close({"o": o}, {"o": expected[:, t]}, torch.float32)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("selected", [EVERY, (3, 6 + 4)], ids=["all", "one-of-every-row"])
def test_nan_where_no_token_is_stays_there(op: Callable[..., Tensor], selected: Any) -> None:
    case = Case(2, 6, 3, selected)
    places = torch.tensor([[-1, 0, -1, 2, 3, -1], [0, 1, 2, -1, 3, 4]])
    values = case.draw(torch.float32)
    clean = results(op, case, values, positions=places)
    with torch.no_grad():
        values["q"][places.flatten()[case.index()] < 0] = torch.nan
        values["k"][places < 0] = torch.nan
        values["v"][places < 0] = torch.nan
    for name, value in results(op, case, values, positions=places).items():
        assert torch.equal(value, clean[name]), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("op", ALL_OPS)
def test_what_nobody_sees_has_no_gradient(op: Callable[..., Tensor]) -> None:
    case = Case(1, 80, 4, (10, 11, 50))
    gradients = results(op, case, case.draw(torch.float32))
    seen = torch.zeros(80, dtype=torch.bool)
    for own in (10, 11, 50):
        seen[own - 3 : own + 1] = True
    for name in ("dk", "dv"):
        assert not gradients[name][:, ~seen].any(), name
        assert gradients[name][:, seen].all(), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("selected", [0.6, (2, 6)], ids=["blocks", "one-of-every-row"])
@pytest.mark.parametrize("placed", [False, True], ids=["columns", "places"])
def test_gradcheck(op: Callable[..., Tensor], selected: Any, placed: bool) -> None:
    case = Case(2, 5, 3, selected, H=2, G=1, P=2)
    values = case.draw()
    positions = torch.tensor([[0, -1, 1, 2, 4], [0, 1, 2, -1, 3]]) if placed else None

    def function(*tensors: Tensor) -> Tensor:
        return op(*tensors, window=case.w, index=case.index(), positions=positions)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_strided_inputs_and_gradients(op: Callable[..., Tensor]) -> None:
    """In a model, keys and values are slices of one projection and the gradient may be expanded."""
    case = Case(2, 40, 9, 0.5, P=4)
    values = case.draw(torch.float32)
    wide = torch.cat([values["k"], values["v"]], dim=-1).detach().requires_grad_()
    q = values["q"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    k, v = wide.split(4, dim=-1)
    strided = torch.autograd.grad(op(q, k, v, window=9, index=case.index()).sum(), (q, k, v))
    dense = torch.autograd.grad(op(**values, window=9, index=case.index()).sum(), list(values.values()))
    actual, expected = (dict(zip(("dq", "dk", "dv"), gradients, strict=True)) for gradients in (strided, dense))
    close(actual, expected, torch.float32)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("selected", [0.5, (19,)], ids=["blocks", "one-of-every-row"])
def test_keys_of_another_dtype(op: Callable[..., Tensor], selected: Any) -> None:
    """A cache may be kept in another dtype than the queries."""
    case = Case(1, 20, 6, selected)
    values = case.draw(torch.float32)
    half = {"q": values["q"].detach().bfloat16().requires_grad_(), "k": values["k"], "v": values["v"]}
    found = results(op, case, half)
    assert [found[name].dtype for name in ("o", "dq", "dk", "dv")] == [torch.bfloat16] * 2 + [torch.float32] * 2
    exact = {name: value.detach().double().requires_grad_() for name, value in half.items()}
    o = oracle(case, exact)
    close(
        {name: value.bfloat16() for name, value in found.items()}, {"o": o, **differentiate(o, exact)}, torch.bfloat16
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("placed", [False, True], ids=["columns", "places"])
def test_runs_are_complete_and_bit_identical(op: Callable[..., Tensor], placed: bool) -> None:
    case = Case(2, 75, 20, 0.5, H=4)
    values = case.draw(torch.float32)
    positions = (torch.arange(150).view(2, 75) % 75).masked_fill(torch.arange(150).view(2, 75) % 4 == 0, -1)
    runs = [results(op, case, values, positions=positions if placed else None) for _ in range(2)]
    for name, first in runs[0].items():
        assert first.isfinite().all() and torch.equal(first, runs[1][name]), name


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_inputs_are_left_alone(op: Callable[..., Tensor]) -> None:
    case = Case(2, 40, 9, 0.5)
    values = case.draw(torch.float32)
    before = {name: value.detach().clone() for name, value in values.items()}
    results(op, case, values)
    for name, value in values.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("selected", [0.5, (3, 20)], ids=["blocks", "one-of-every-row"])
def test_autocast_leaves_the_sums_in_float32(selected: Any) -> None:
    case = Case(2, 20, 7, selected)
    values = case.draw(torch.float32)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o = window_attention(**values, window=case.w, index=case.index())
            matrix = probabilities(case, values["q"], values["k"])
        runs.append({"o": o, "matrix": matrix, **differentiate(o, values)})
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def probabilities(case: Case, q: Tensor, k: Tensor, **places: Tensor | None) -> Tensor:
    return window_attention_matrix(q, k, window=case.w, index=case.index(), **places)


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_is_what_the_values_are_weighed_with(case: Case) -> None:
    values = case.draw()
    matrix = probabilities(case, values["q"], values["k"])
    seen = seen_by(case)[:, None]
    assert matrix.shape == (len(case.index()), case.H, case.K)
    assert torch.equal(matrix != 0, seen.expand_as(matrix))
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    repeated = values["v"][case.index() // case.K].repeat_interleave(case.H // case.G, dim=2)
    o = torch.einsum("mhk,mkhp->mhp", matrix, repeated)
    expected = oracle(case, values)
    close({"o": o, **differentiate(o, values)}, {"o": expected, **differentiate(expected, values)}, torch.float64)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_matrix_of_places_and_documents(name: str) -> None:
    places = layout(name)
    rows, columns = next(part for part in places.values() if part is not None).shape
    case = Case(rows, columns, 3, EVERY)
    values = case.draw(torch.float32)
    with torch.no_grad():
        hidden = ~seen_by(case, **places).any(1)
        values["q"][hidden] = torch.nan
        values["k"].view(-1, case.G, case.P)[hidden] = torch.nan
    matrix = probabilities(case, values["q"], values["k"], **places)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix != 0, seen_by(case, **places)[:, None].expand_as(matrix))
    torch.testing.assert_close(matrix.sum(-1), (~hidden)[:, None].expand(-1, case.H).float())
    (dq,) = torch.autograd.grad(matrix[:, 0].square().sum(), values["q"])
    assert dq.isfinite().all()


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("P", [64, 130])
def test_wide_heads_match_the_oracle(P: int, dtype: torch.dtype) -> None:
    """Tiles of other sizes; a width that fills no tile."""
    check_against_the_oracle(with_triton(window_attention), Case(1, 70, 30, 0.5, H=2, G=1, P=P), dtype)


def test_a_head_too_wide_for_triton() -> None:
    case = Case(1, 6, 3, EVERY, P=257)
    check_against_the_oracle(window_attention, case, torch.float32)
    message = "implementation='triton' of window_attention is not available for these arguments"
    with pytest.raises(ValueError, match=message):
        window_attention(**case.draw(), window=3, index=case.index(), implementation="triton")
