"""causal_conv1d and its step against an oracle that looks every tap up by its position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, with_triton

TORCH = pytest.param(causal_conv1d, id="torch")
TRITON = pytest.param(with_triton(causal_conv1d), id="triton", marks=NEEDS_TRITON)
# The two that take float64 and any number of taps.
OPS = [pytest.param(causal_conv1d_reference, id="reference"), TORCH]
ALL_OPS = [*OPS, TRITON]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SHAPES = [
    pytest.param(1, 1, 1, 2, id="smallest"),
    pytest.param(2, 1, 3, 4, id="one-token"),
    pytest.param(2, 2, 3, 4, id="shorter-than-the-window"),
    pytest.param(1, 3, 5, 4, id="as-long-as-the-state"),
    pytest.param(2, 4, 3, 4, id="one-window"),
    pytest.param(2, 13, 3, 2, id="two-taps"),
    pytest.param(2, 13, 5, 4, id="prime-length"),
    pytest.param(2, 67, 70, 3, id="several-tiles"),
]
# Documents of a packed row; negative marks padding.
LAYOUTS = [
    pytest.param([[0, 0, 0, 0, 0, 0, 0]], id="one-document"),
    pytest.param([[0, 1, 1, 1, 1, 1, 1]], id="boundary-at-1"),
    pytest.param([[0, 0, 0, 0, 0, 0, 1]], id="last-token-alone"),
    pytest.param([[3, 3, 3, 3, 7, 7, 7], [0, 0, 1, 1, 1, 2, 2]], id="rows-of-different-documents"),
    pytest.param([[0, 1, 2, 3, 4, 5, 6]], id="documents-of-one-token"),
    pytest.param([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]], id="documents-shorter-than-the-window"),
    pytest.param([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], id="padding-left"),
    pytest.param([[0, 0, 0, 0, 0, -1, -1], [0, 0, -1, -1, -1, -1, -1]], id="padding-right"),
    pytest.param([[0, 0, -1, -1, -1, -1, 0, 0, 0]], id="padding-inside-a-document"),
    pytest.param([[-1, 0, 0, -5, 1, 1, 1, -1, 1, 2, -1]], id="padding-everywhere"),
    pytest.param([[-1, -1, -1, -1], [0, 0, 1, 1], [-2, -1, -2, -1]], id="rows-of-padding"),
    pytest.param([[-1, -1], [-1, -1]], id="nothing-but-padding"),
]


def oracle(
    values: dict[str, Tensor], activation: str | None = None, layout: list[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and final state in float64: for every token, where does each of its taps come from?"""
    x, weight, bias, initial = (values.get(name) for name in ("x", "weight", "bias", "initial_state"))
    assert x is not None and weight is not None
    B, L, D = x.shape
    K = weight.shape[1]

    def tap(b: int, real: list[int], rank: int, document: int) -> Tensor:
        """The input of the row's real token number `rank`, as a token of `document` sees it."""
        first = layout[b][real[0]] if layout and real else 0
        if rank < 0:
            return initial[b, :, rank + K - 1] if initial is not None and document == first else x.new_zeros(D)
        same = layout is None or layout[b][real[rank]] == document
        return x[b, real[rank]] if same else x.new_zeros(D)

    y, states = [], []
    for b in range(B):
        documents = layout[b] if layout else [0] * L
        real = [t for t in range(L) if documents[t] >= 0]
        for t in range(L):
            if t not in real:
                y.append(x.new_zeros(D))
                continue
            rank = real.index(t)
            total = bias if bias is not None else x.new_zeros(D)
            for k in range(K):
                total = total + weight[:, k] * tap(b, real, rank - (K - 1) + k, documents[t])
            y.append(total / (1 + torch.exp(-total)) if activation == "silu" else total)
        last = documents[real[-1]] if real else 0
        states.append(torch.stack([tap(b, real, len(real) - (K - 1) + k, last) for k in range(K - 1)], dim=-1))
    return torch.stack(y).view(B, L, D), torch.stack(states)


def draw(B: int, L: int, D: int, K: int, *, bias: bool = True, initial: bool = True) -> dict[str, Tensor]:
    """Inputs of order 1, float64, by name."""
    torch.manual_seed(B + 10 * L + 100 * D + 1000 * K)
    shapes: dict[str, tuple[int, ...]] = {"x": (B, L, D), "weight": (D, K)}
    if bias:
        shapes["bias"] = (D,)
    if initial:
        shapes["initial_state"] = (B, D, K - 1)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def leaves(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in values.items()}


def differentiate(results: tuple[Tensor, ...], values: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Gradients, by name, of a random linear form of all results."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for result in results:
        loss = loss + (result.double() * torch.randn(result.shape, generator=generator, dtype=torch.float64)).sum()
    # Where all is padding no argument is used, and its gradient is zero.
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, gradients, strict=True))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    assert actual.dtype == dtype, f"{name} is {actual.dtype}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def check_against_oracle(
    op: Callable[..., Any],
    values: dict[str, Tensor],
    dtype: torch.dtype,
    activation: str | None = None,
    layout: list[list[int]] | None = None,
) -> None:
    given = leaves(values, dtype)
    exact = leaves(given, torch.float64)  # of the rounded inputs
    seq_idx = None if layout is None else torch.tensor(layout)
    y, state = op(**given, activation=activation, seq_idx=seq_idx, return_final_state=True)
    expected_y, expected_state = oracle(exact, activation, layout)
    close(y, expected_y, dtype, "y")
    assert torch.equal(state.double(), expected_state), "the final state holds inputs, unchanged"
    expected_gradients = differentiate((expected_y, expected_state), exact)
    for name, gradient in differentiate((y, state), given).items():
        close(gradient, expected_gradients[name], dtype, f"d{name}")


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "D", "K"), SHAPES)
def test_matches_the_oracle(op: Callable[..., Any], dtype: torch.dtype, B: int, L: int, D: int, K: int) -> None:
    check_against_oracle(op, draw(B, L, D, K), dtype, "silu")


@pytest.mark.parametrize("op", OPS)
def test_many_taps_match_the_oracle(op: Callable[..., Any]) -> None:
    check_against_oracle(op, draw(1, 29, 2, 7), torch.float32, "silu")


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "initial-state"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("L", [2, 9])
def test_options_match_the_oracle(
    op: Callable[..., Any], bias: bool, initial: bool, activation: str | None, L: int
) -> None:
    check_against_oracle(op, draw(2, L, 3, 4, bias=bias, initial=initial), torch.float32, activation)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "initial-state"])
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_match_the_oracle(op: Callable[..., Any], initial: bool, K: int, layout: list[list[int]]) -> None:
    values = draw(len(layout), len(layout[0]), 3, K, initial=initial)
    check_against_oracle(op, values, torch.float32, "silu", layout)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("layout", LAYOUTS[-3:])
def test_packed_rows_in_bfloat16_match_the_oracle(op: Callable[..., Any], layout: list[list[int]]) -> None:
    check_against_oracle(op, draw(len(layout), len(layout[0]), 3, 4), torch.bfloat16, "silu", layout)


@pytest.mark.parametrize("op", [TORCH, TRITON])
def test_documents_and_padding_across_spans_match_the_oracle(op: Callable[..., Any]) -> None:
    """Spans hold 16 tokens forward and 32 backward; documents, gaps and states reach over their edges."""
    documents = [0] * 30 + [-1] * 3 + [0] * 2 + [1] * 27 + [2, 3, -1, 3, 3, -1, 4] + [4] * 60 + [-1] * 2
    layout = [documents, [-1] * 65 + documents[:-65]]
    check_against_oracle(op, draw(2, len(documents), 3, 4), torch.float32, "silu", layout)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("large", [0, 7], ids=["oldest-large", "newest-large"])
def test_half_precision_accumulates_in_float32(op: Callable[..., Any], large: int) -> None:
    """256 + 1 is 256 in bfloat16: summed there, the ones that come after the large term would vanish."""
    x = torch.ones(1, 8, 1, dtype=torch.bfloat16)
    x[0, large] = 256
    weight = torch.ones(1, 8, dtype=torch.bfloat16)
    assert float(op(x, weight)[0, -1, 0]) == 264  # 263, rounded once
    state = x[:, :-1].transpose(1, 2).clone()
    assert float(causal_conv1d_step(x[:, -1], state, weight)[0, 0]) == 264


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", [None, [[0, 0, 1, -1, 1, 1]]], ids=["plain", "packed"])
def test_gradcheck(op: Callable[..., Any], layout: list[list[int]] | None) -> None:
    values = leaves(draw(1, 6, 2, 3), torch.float64)
    seq_idx = None if layout is None else torch.tensor(layout)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(values, tensors, strict=True))
        return op(**named, activation="silu", seq_idx=seq_idx, return_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("split", range(1, 9))
def test_continuing_from_the_state_equals_the_whole(op: Callable[..., Any], split: int) -> None:
    values = draw(2, 9, 3, 4)
    whole, parts = leaves(values, torch.float32), leaves(values, torch.float32)
    expected = op(**whole, activation="silu", return_final_state=True)
    x, state = parts["x"], parts["initial_state"]
    shared = {"weight": parts["weight"], "bias": parts["bias"], "activation": "silu", "return_final_state": True}
    head, state = op(x[:, :split], initial_state=state, **shared)
    tail, state = op(x[:, split:], initial_state=state, **shared)
    y = torch.cat([head, tail], dim=1)
    close(y, expected[0], torch.float32, "y")
    assert torch.equal(state, expected[1])
    gradients = differentiate(expected, whole)
    for name, gradient in differentiate((y, state), parts).items():
        close(gradient, gradients[name], torch.float32, f"d{name}")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("torch", dtype) for dtype in [torch.float64, *DTYPES]]
    + [pytest.param("triton", dtype, marks=NEEDS_TRITON) for dtype in DTYPES],
)
def test_step_by_step_equals_the_whole(implementation: str, dtype: torch.dtype, K: int, bias: bool) -> None:
    values = {name: value.to(dtype) for name, value in draw(2, 9, 3, K, bias=bias).items()}
    expected, expected_state = causal_conv1d(**values, activation="silu", return_final_state=True)
    device = DEVICE if implementation == "triton" else "cpu"
    values = {name: value.to(device) for name, value in values.items()}
    whole = torch.zeros(2, K - 1, 5, dtype=dtype, device=device)
    state = whole.transpose(1, 2)[:, 1:4]  # inside a larger cache of another layout
    state.copy_(values["initial_state"])
    for t in range(9):
        y = causal_conv1d_step(
            values["x"][:, t],
            state,
            values["weight"],
            values.get("bias"),
            activation="silu",
            implementation=implementation,
        )
        close(y.cpu(), expected[:, t], dtype, f"y at {t}")
    assert torch.equal(state.cpu(), expected_state), "the step updates the state in place"
    assert not whole[..., [0, 4]].any(), "and nothing beside it"


@NEEDS_TRITON
def test_step_with_more_channels_than_a_tile() -> None:
    values = {name: value.float() for name, value in draw(2, 1, 131, 4).items()}
    expected, expected_state = causal_conv1d(**values, return_final_state=True)
    state = values["initial_state"].clone().to(DEVICE)
    x, weight, bias = (values[name].to(DEVICE) for name in ("x", "weight", "bias"))
    y = causal_conv1d_step(x[:, 0], state, weight, bias, implementation="triton")
    close(y.cpu(), expected[:, 0], torch.float32, "y")
    assert torch.equal(state.cpu(), expected_state)


def test_step_without_activation_is_linear() -> None:
    values = draw(2, 1, 3, 4, bias=False)
    y = causal_conv1d_step(values["x"][:, 0], values["initial_state"].clone(), values["weight"])
    close(y, oracle(values)[0][:, 0], torch.float64, "y")


@pytest.mark.parametrize("op", ALL_OPS)
def test_nan_in_padding_or_another_document_stays_there(op: Callable[..., Any]) -> None:
    values = {name: value.float() for name, value in draw(1, 8, 3, 4).items()}
    seq_idx = torch.tensor([[0, 0, 1, 1, -1, 1, 1, -1]])
    clean = op(**values, seq_idx=seq_idx, return_final_state=True)
    values["x"][:, [4, 7]] = torch.nan
    values["x"].requires_grad_()
    y, state = op(**values, seq_idx=seq_idx, return_final_state=True)
    assert torch.equal(y, clean[0]) and torch.equal(state, clean[1])
    assert not y[:, [4, 7]].any(), "a padding token's output is 0"
    arriving = torch.ones_like(y)
    arriving[:, [4, 7]] = torch.nan
    (dx,) = torch.autograd.grad([y, state], values["x"], [arriving, torch.ones_like(state)])
    assert dx.isfinite().all() and not dx[:, [4, 7]].any()
    poisoned = values["x"].detach().clone()
    poisoned[:, 1] = torch.nan
    later = op(**(values | {"x": poisoned}), seq_idx=seq_idx, return_final_state=True)
    assert torch.equal(later[0][:, 2:], clean[0][:, 2:]) and torch.equal(later[1], clean[1])


def test_weights_and_outputs_are_those_of_conv1d() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(2, 11, 6)
    expected = torch.nn.functional.silu(module(x.transpose(1, 2))[..., :11].transpose(1, 2))
    close(causal_conv1d(x, module.weight[:, 0], module.bias, activation="silu"), expected, torch.float32, "y")


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_one_trainable_argument_gets_the_same_gradient(op: Callable[..., Any], name: str) -> None:
    values = leaves(draw(2, 7, 3, 4), torch.float32)
    expected = differentiate((op(**values),), values)[name]
    frozen = {other: value.detach() for other, value in values.items()}
    frozen[name].requires_grad_()
    gradient = differentiate((op(**frozen),), {name: frozen[name]})[name]
    assert torch.equal(gradient, expected)


def sliced(x: Tensor) -> Tensor:
    """As a model has it: a slice of a projection."""
    return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


def channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("lay_out", [sliced, channels_first])
@pytest.mark.parametrize("layout", [None, [[0] * 4 + [1] * 5]], ids=["plain", "packed"])
def test_strided_inputs_and_gradients(
    op: Callable[..., Any], lay_out: Callable[[Tensor], Tensor], layout: list[list[int]] | None
) -> None:
    """No tensor need be contiguous, and the gradient of a sum is an expanded number."""
    values = {name: value.float() for name, value in draw(1, 9, 3, 4).items()}
    seq_idx = None if layout is None else torch.tensor(layout)
    results = []
    for strided in (False, True):
        given = dict(values)
        if strided:
            given["x"] = lay_out(given["x"])
            given["weight"] = given["weight"].t().contiguous().t()
            given["initial_state"] = given["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
            given["bias"] = given["bias"].repeat_interleave(2)[::2]
            assert not any(tensor.is_contiguous() for tensor in given.values())
        for tensor in given.values():
            tensor.requires_grad_()
        y, state = op(**given, seq_idx=seq_idx, return_final_state=True)
        results.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), list(given.values()))))
    for dense, strided in zip(*results, strict=True):
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("layout", [None, [[0] * 5]], ids=["plain", "packed"])
def test_the_final_state_has_memory_of_its_own(op: Callable[..., Any], layout: list[list[int]] | None) -> None:
    values = {name: value.float() for name, value in draw(1, 5, 2, 4).items()}
    seq_idx = None if layout is None else torch.tensor(layout)
    _, state = op(**values, seq_idx=seq_idx, return_final_state=True)
    before = state.clone()
    values["x"].zero_()
    values["initial_state"].zero_()
    assert state.is_contiguous() and torch.equal(state, before)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [TORCH, TRITON])
@pytest.mark.parametrize("layout", [None, [[-1, 0, 0, 1, 1, 1, -1]] * 2], ids=["plain", "packed"])
def test_runs_are_complete_and_bit_identical(
    op: Callable[..., Any], layout: list[list[int]] | None, dtype: torch.dtype
) -> None:
    values = leaves(draw(2, 7, 3, 4), dtype)
    seq_idx = None if layout is None else torch.tensor(layout)
    runs = []
    for _ in range(2):
        results = op(**values, activation="silu", seq_idx=seq_idx, return_final_state=True)
        runs.append([*results, *differentiate(results, values).values()])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


BAD = [
    pytest.param({"x": torch.zeros(4, 3)}, r"x must be \(B, L, D\) .*got shape \(4, 3\)", id="x-2d"),
    pytest.param({"x": torch.zeros(2, 5, 4)}, r"x must be .*\(any, any, 3\).*\(2, 5, 4\)", id="channels"),
    pytest.param({"x": torch.zeros(2, 0, 3)}, "x must hold at least one token", id="no-token"),
    pytest.param({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x must be floating point", id="x-integer"),
    pytest.param({"weight": torch.zeros(3, 1, 4)}, r"weight must be \(D, K\)", id="weight-of-a-module"),
    pytest.param({"weight": torch.zeros(3, 1)}, "K >= 2", id="one-tap"),
    pytest.param({"bias": torch.zeros(4)}, r"bias must be \(D\) = \(3\)", id="bias"),
    pytest.param({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state .* \(2, 3, 3\)", id="state"),
    pytest.param({"initial_state": torch.zeros(2, 3, 3).long()}, "initial_state must be floating", id="state-dtype"),
    pytest.param({"activation": "relu"}, "activation must be None or 'silu', got 'relu'", id="activation"),
    pytest.param({"seq_idx": torch.zeros(2, 4).long()}, r"seq_idx must be \(B, L\) = \(2, 5\)", id="seq-shape"),
    pytest.param({"seq_idx": torch.zeros(2, 5)}, "seq_idx must have an integer dtype", id="seq-float"),
    pytest.param({"seq_idx": torch.zeros(2, 5).bool()}, "seq_idx must have an integer dtype", id="seq-bool"),
    pytest.param(
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1], [0, 2, -1, 1, 2]])},
        "seq_idx must not decrease along a row .* got 1 after 2 in row 1",
        id="seq-decreasing",
    ),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_raises(op: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        op(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.zeros(2, 1, 3)}, r"x must be \(B, D\)", id="x"),
        pytest.param({"state": torch.zeros(1, 3, 3)}, r"state must be .* \(2, 3, 3\)", id="batch"),
        pytest.param({"state": torch.zeros(2, 3, 4)}, r"state must be .* \(2, 3, 3\)", id="width"),
        pytest.param({"activation": "gelu"}, "activation", id="activation"),
    ],
)
def test_bad_step_input_raises_and_leaves_the_state(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "state": torch.ones(2, 3, 3), "weight": torch.zeros(3, 4)} | change
    before = arguments["state"].clone()
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(**arguments)
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize(
    ("implementation", "dtype", "taps", "message"),
    [
        pytest.param("cuda", torch.float32, 4, "must be 'auto', 'torch' or 'triton'", id="unknown"),
        pytest.param("triton", torch.float64, 4, "does not support torch.float64", id="float64", marks=NEEDS_TRITON),
        pytest.param("triton", torch.float32, 5, "is not available for these arguments", id="five-taps"),
    ],
)
def test_missing_implementation_raises(implementation: str, dtype: torch.dtype, taps: int, message: str) -> None:
    x, weight = torch.zeros(1, 4, 2, dtype=dtype), torch.zeros(2, taps, dtype=dtype)
    message = f"implementation.*{message}"
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, weight, implementation=implementation)
    state = torch.ones(1, 2, taps - 1, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(x[:, 0], state, weight, implementation=implementation)
    assert (state == 1).all()


def test_a_step_that_records_a_gradient_is_not_given_to_triton() -> None:
    """Its kernel has no backward; without this the gradient would be lost in silence."""
    x, state = torch.ones(1, 2), torch.zeros(1, 2, 3)
    weight = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="implementation='triton' of causal_conv1d_step is not available for these"):
        causal_conv1d_step(x, state, weight, implementation="triton")
    assert not state.any()
    assert causal_conv1d_step(x, state, weight).requires_grad


@pytest.mark.parametrize("elements", [1, 17, 40], ids=lambda elements: f"panels-of-{elements}")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("history", [False, True], ids=["from-zero", "from-a-state"])
def test_panels(monkeypatch: pytest.MonkeyPatch, elements: int, activation: str | None, history: bool) -> None:
    """Outputs, state and every gradient do not depend on how many tokens the torch path takes at a time."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 11, 3), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
        if history or name != "initial_state"
    }
    results = []
    for panel in (10**6, elements):
        monkeypatch.setattr("ssm_zoo.kernels.causal_conv1d._PANEL_ELEMENTS", panel)
        y, state = causal_conv1d(**tensors, activation=activation, return_final_state=True)
        gradients = torch.autograd.grad((y.sin().sum() + state.cos().sum()), list(tensors.values()))
        results.append([y, state, *gradients])
    for name, whole, parts in zip(["y", "state", *tensors], *results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
