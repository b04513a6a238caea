"""What only the Triton kernels of SSD have: skip and gate within, two ways to share out a row, a bound on memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from peak_memory import IdleKernel, peak_of_gradients
from ssm_zoo.kernels import ssd_decays_triton, ssd_gradients_triton, ssd_triton
from ssm_zoo.kernels.ssd import ssd_log_decay, ssd_log_decay_reference
from ssm_zoo.kernels.ssd_triton import ssd_scan_triton
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, with_triton

pytestmark = NEEDS_TRITON

Q = 16  # tokens of a chunk, the fewest that tiles allow
SPAN = 4 * Q  # tokens between the states that a forward without a backward stores
OP = with_triton(partial(ssd_log_decay, chunk_size=Q))
# Processors of the device: few make several sections of the backward, many make several stretches of the walk.
FEW, MANY = 1, 1000


def draw(*shape: int, skip_width: bool = False) -> dict[str, Tensor]:
    """All inputs by name, float64, for shape B, L, H, P, G, N; decays mild enough to carry the state over chunks."""
    batch, length, heads, width, groups, size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, width),
        "log_decay": -0.02 * normal(batch, length, heads).square(),
        "B": normal(batch, length, groups, size) / size**0.5,
        "C": normal(batch, length, groups, size) / size**0.5,
        "D": normal(heads, width) if skip_width else normal(heads),
        "z": normal(batch, length, heads, width),
        "initial_state": normal(batch, heads, width, size),
    }


def results(op: Callable[..., Any], values: dict[str, Tensor], seq_idx: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of a random linear form of them, by name."""
    given = {name: value.detach().requires_grad_() for name, value in values.items()}
    y, state = op(**given, seq_idx=seq_idx, return_final_state=True)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for part in (y, state)]
    gradients = torch.autograd.grad([y, state], list(given.values()), weights)
    return {"y": y, "state": state} | {f"d{name}": part for name, part in zip(given, gradients, strict=True)}


def check_against_the_reference(
    values: dict[str, Tensor], dtype: torch.dtype, seq_idx: Tensor | None = None
) -> dict[str, Tensor]:
    """In half precision D and the state stay float32, as in a model, and errors are measured by norms."""
    kept = ("D", "initial_state")
    values = {name: value.to(torch.float32 if name in kept else dtype) for name, value in values.items()}
    actual = results(OP, values, seq_idx)
    expected = results(ssd_log_decay_reference, {name: value.double() for name, value in values.items()}, seq_idx)
    for name, value in expected.items():
        inputs_of = {"y": "x", "state": "initial_state"}
        like = inputs_of.get(name, name.removeprefix("d"))
        assert actual[name].dtype == (values[like].dtype if like in values else torch.float32), name
        rtol, atol = TOLERANCES[torch.float32 if name == "state" else dtype]
        if dtype == torch.float32 or name == "state":
            torch.testing.assert_close(
                actual[name].double(), value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            error = (actual[name] - value).norm() / value.norm()
            assert error < rtol / 2, f"{name}: relative error {error:.1e}"
    return actual


@pytest.fixture
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ssd_triton, "_device", lambda tensor: (request.param, 9))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("without", "skip_width"),
    [((), False), ((), True), (("z",), False), (("D",), False), (("initial_state",), True)],
    ids=["D-per-head", "D-per-channel", "no-gate", "no-skip", "no-state"],
)
def test_skip_and_gate_match_the_reference(without: tuple[str, ...], skip_width: bool, dtype: torch.dtype) -> None:
    """A chunk and a rest, two groups, documents and padding; P fills no tile."""
    values = draw(2, Q + 5, 4, 3, 2, 5, skip_width=skip_width)
    values = {name: value for name, value in values.items() if name not in without}
    seq_idx = torch.tensor([[0] * 7 + [1] * 14, [-1] * 3 + [0] * 9 + [-1] + [0] * 5 + [4] * 3])
    check_against_the_reference(values, dtype, seq_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, Q - 1, Q, Q + 1])
def test_short_rows_match_the_reference(length: int, dtype: torch.dtype) -> None:
    check_against_the_reference(draw(1, length, 2, 2, 1, 3), dtype)


def test_a_wide_head_with_a_gate_matches_the_reference() -> None:
    """Several tiles of the head's width in every kernel; gates that saturate."""
    values = draw(1, Q + 3, 1, 70, 1, 20)
    values["z"][:, ::4] *= 25
    check_against_the_reference(values, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processors", [MANY], indirect=True)
def test_stretches_match_the_reference(processors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four stretches of five, five, five and two chunks, both ways; one row forgets inside the second stretch."""
    grids = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    kernel = ssd_triton.walk_kernel
    monkeypatch.setattr(ssd_triton, "walk_kernel", Recorded())
    values = draw(2, 16 * Q + 3, 1, 2, 1, 3)
    values["log_decay"][1, 7 * Q + 3] = -math.inf
    check_against_the_reference(values, dtype)
    assert grids == [(1, 1, 2 * 3), (1, 1, 2 * 4)] * 2  # three of four, then all; forward and backward


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "processors"),
    [(SPAN - 1, FEW), (SPAN, FEW), (SPAN + 1, FEW), (2 * SPAN + Q + 3, FEW), (4 * SPAN + 3, MANY)],
    indirect=["processors"],
)
def test_without_a_backward_the_results_are_those_of_the_reference(
    length: int, processors: int, dtype: torch.dtype
) -> None:
    """Then only the states that enter spans are stored; in one row a document begins inside the second span."""
    values = draw(2, length, 2, 3, 1, 5)
    kept = ("D", "initial_state")
    values = {name: value.to(torch.float32 if name in kept else dtype) for name, value in values.items()}
    seq_idx = torch.zeros(2, length, dtype=torch.long)
    seq_idx[1, SPAN + Q // 2 :] = 1
    with torch.no_grad():
        y, state = OP(**values, seq_idx=seq_idx, return_final_state=True)
        rough = OP(**values, seq_idx=seq_idx)
    exact = {name: value.double() for name, value in values.items()}
    expected, expected_state = ssd_log_decay_reference(**exact, seq_idx=seq_idx, return_final_state=True)
    rtol, _ = TOLERANCES[dtype]
    for found in (y, rough):
        assert (found - expected).norm() / expected.norm() < rtol / 2
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(state.double(), expected_state, rtol=rtol, atol=atol)


def test_only_a_backward_makes_the_forward_store_all_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that need gradients do not matter where none are recorded."""
    intervals = []
    walk = ssd_triton._walk

    def recorded(*args: Any, **options: Any) -> Tensor:
        intervals.append(options["interval"])
        return walk(*args, **options)

    monkeypatch.setattr(ssd_triton, "_walk", recorded)
    values = {name: value.float().requires_grad_() for name, value in draw(1, Q, 1, 2, 1, 3).items()}
    with torch.no_grad():
        OP(**values)
    OP(**{name: value.detach() for name, value in values.items()})
    OP(**values)
    assert intervals == [4, 4, 1]


def test_sections_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward in sections of two chunks and one, and in one piece: the same bits."""
    values = {name: value.float() for name, value in draw(2, 2 * Q + 3, 2, 2, 1, 3).items()}
    runs = []
    for sections in (2, 1):
        monkeypatch.setattr(ssd_triton, "_sections", lambda *_, sections=sections: sections)
        runs.append(results(OP, values))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("length", "processors"), [(1, FEW), (Q + 1, FEW), (5 * Q, FEW), (16 * Q + 3, MANY)], indirect=["processors"]
)
def test_runs_are_complete_and_bit_identical(length: int, processors: int) -> None:
    values = {name: value.float() for name, value in draw(1, length, 1, 3, 1, 2).items()}
    first, second = results(OP, values), results(OP, values)
    for name, value in first.items():
        assert value.isfinite().all() and torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("programs", "chunks", "expected"),
    [(256, 128, 1), (128, 128, 1), (66, 128, 4), (24, 128, 11), (24, 15, 1), (24, 16, 4), (1, 1000, 250)],
)
def test_stretches_pay(programs: int, chunks: int, expected: int) -> None:
    assert ssd_triton._stretches(programs, chunks, processors=132) == expected


@pytest.mark.parametrize(
    ("programs", "chunks", "expected"),
    [
        (1, 1, 1),
        (132 * 3, 9, 1),
        (132 * 3 + 1, 9, 2),
        (132 * 6, 9, 3),
        (132 * 12, 9, 3),
        (132 * 13, 9, 4),
        (9999, 2, 2),
    ],
)
def test_sections_keep_two_to_four_rounds(programs: int, chunks: int, expected: int) -> None:
    assert ssd_triton._sections(programs, chunks, processors=132) == expected


def scan_inputs(device: str, *shape: int) -> list[Tensor]:
    """x, step sizes, A, B, C, D, z of `ssd_scan_triton` in bfloat16, as leaves."""
    batch, length, heads, width, groups, size = shape

    def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device).requires_grad_()

    half = partial(zeros, dtype=torch.bfloat16)
    maps = batch, length, groups, size
    wide, narrow = (batch, length, heads, width), (batch, length, heads)
    return [half(*wide), half(*narrow), zeros(heads), half(*maps), half(*maps), zeros(heads), half(*wide)]


def peak_ratio(inputs: list[Tensor], chunk: int) -> float:
    """Peak of forward and backward over inputs, outputs, all their gradients, and what the forward saves besides.

    Saved are the states that enter the chunks, and three numbers in float32 for each token and head.
    """

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, D, *rest = tensors
        return ssd_scan_triton(x, dt, A, B, C, D, rest[0] if rest else None, None, chunk_size=chunk)

    peak, needed = peak_of_gradients(op, inputs)
    x, B = inputs[0], inputs[3]
    chunks = -(-x.shape[1] // chunk)
    states = x[:, 0].numel() * B.shape[3] * x.element_size() * chunks
    sums = 3 * 4 * inputs[1].numel()
    return peak / (needed + states + sums)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("processors", [FEW], indirect=True)
def test_peak_memory(gated: bool, processors: int) -> None:
    inputs = scan_inputs(DEVICE, 1, 8 * 32, 4, 64, 1, 16)
    assert peak_ratio(inputs if gated else inputs[:-1], 32) <= 1.2


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("length", "bound"), [(2048, 1.3), (3072, 1.2), (8192, 1.15)])
@pytest.mark.parametrize("processors", [132], indirect=True)
def test_peak_memory_at_full_size(
    gated: bool, length: int, bound: float, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without storage and without kernels: 128 heads on a device of 132 processors, in 4, 6 and 16 rounds of it."""
    for name in ("walk_kernel", "output_kernel"):
        monkeypatch.setattr(ssd_triton, name, IdleKernel())
    for name in ("target_gradients_kernel", "source_gradients_kernel"):
        monkeypatch.setattr(ssd_gradients_triton, name, IdleKernel())
    for name in ("sums_kernel", "gradients_kernel"):
        monkeypatch.setattr(ssd_decays_triton, name, IdleKernel())
    inputs = scan_inputs("meta", 1, length, 128, 64, 1, 128)
    assert peak_ratio(inputs if gated else inputs[:-1], 64) <= bound
