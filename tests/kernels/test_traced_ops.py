"""Every op in a traced graph: one graph, the results and gradients of eager calls, and nothing that waits for a device.

The ops are those of the table in `kernel_ops.py`, with all tensors or with the required ones only. Triton kernels run
interpreted on the CPU where there is no CUDA device, so that a launch on a tensor without memory fails.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from as_on_a_gpu import WAITS, as_on_a_gpu, replace
from kernel_ops import OPS, SIZES, Op
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ssm_zoo.kernels import tracing
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON

REFERENCES = {key for key in OPS if key.endswith("_reference")}  # loops over values, never part of a graph
# The number of columns is the largest number of real tokens of a row.
WITHOUT_A_STATIC_SHAPE = {"bounded_attention_matrix"}
TRACED = [key for key in OPS if key not in REFERENCES | WITHOUT_A_STATIC_SHAPE]
IMPLEMENTED = [key for key in TRACED if "implementation" in inspect.signature(OPS[key].op).parameters]
STEPS = {key for key in OPS if key.endswith("_step")}
PACKED_MIXING = ("masked_mix", "toeplitz_mix")
# A compiler fuses norms with their neighbours, so `implementation="auto"` leaves them to it.
FUSED = {"rms_norm", "add_rms_norm"}


def drawn(op: Op, everything: bool = True, device: str = "cpu", gradients: bool = False) -> dict[str, Any]:
    """Arguments of an op, random where they are numbers; without optional tensors unless `everything`."""
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(op.op).parameters
    given: dict[str, Any] = {}
    for name, value in op.arguments().items():
        optional = name in parameters and parameters[name].default is not inspect.Parameter.empty
        if isinstance(value, Tensor) and optional and not everything:
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            value = torch.randn(value.shape, generator=generator) / 2
            if name in ("A", "log_decay"):
                value = -value.abs() - 0.1
            value = value.to(device).requires_grad_(gradients and not op.written)
        given[name] = value.to(device) if isinstance(value, Tensor) else value
    return given


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in tensors(part)] if isinstance(found, (tuple, list)) else []


def everything_of(op: Op, call: Callable[..., Any], given: dict[str, Any]) -> list[Tensor | None]:
    """Results of a call, what it has written to, and the gradients of a sum over its results."""
    results = tensors(call(**given))
    found: list[Tensor | None] = [*results, *(given[name] for name in op.written)]
    outputs = [each for each in results if each.requires_grad]
    if outputs:
        leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
        weights = [torch.linspace(-1, 1, each.numel(), device=each.device).view_as(each) for each in outputs]
        found += torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return found


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.requires_grad == other.requires_grad
            rtol, atol = TOLERANCES[torch.float32]
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


def check_compiled(key: str, given: Callable[[], dict[str, Any]], **options: Any) -> None:
    """Compare a compiled call with an eager one; both draw their arguments."""
    op = OPS[key]

    def call(**values: Any) -> Any:
        return op.op(**values, **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(everything_of(op, compiled, given()), everything_of(op, call, given()))


def cases(keys: list[str]) -> list[Any]:
    """Each op with all tensors; those with an `implementation` also with the required ones."""
    return [
        pytest.param(key, everything, id=f"{key}-{'all' if everything else 'required'}")
        for key in keys
        for everything in (True, False)
        if everything or key in IMPLEMENTED
    ]


@pytest.mark.parametrize(("key", "everything"), cases(TRACED))
def test_an_op_is_one_graph(key: str, everything: bool) -> None:
    check_compiled(key, lambda: drawn(OPS[key], everything, gradients=True))


@NEEDS_TRITON
@pytest.mark.parametrize("key", IMPLEMENTED)
def test_the_triton_path_of_an_op_is_one_graph(key: str) -> None:
    def given() -> dict[str, Any]:
        values = drawn(OPS[key], device=DEVICE, gradients=key not in STEPS)
        if key in PACKED_MIXING:
            values.pop("seq_idx", None)
        return values

    check_compiled(key, given, implementation="triton")


@pytest.mark.parametrize("key", [key for key in IMPLEMENTED if "L" in "".join(OPS[key].tensors.values())])
def test_one_graph_serves_several_lengths(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, counter = OPS[key], CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(op.op, fullgraph=True, dynamic=True, backend=counter)
    monkeypatch.setitem(SIZES, "N", 11)
    graphs = []
    for length in (5, 9):  # no other size: a graph may depend on whether two are equal
        monkeypatch.setitem(SIZES, "L", length)
        given = [drawn(op, gradients=key not in STEPS) for _ in range(2)]
        assert_same(everything_of(op, compiled, given[0]), everything_of(op, op.op, given[1]))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ops run as if a graph were traced: they call their operators."""
    replace(monkeypatch, tracing.tracing, lambda: True)


class _Operators(TorchDispatchMode):
    """Keeps the operators of the package that are called, with the arguments of the first call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("ssm_zoo") and func not in self.calls:
            self.calls[func] = tree_map_only(Tensor, lambda each: each.detach().clone(), args)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("key", IMPLEMENTED)
def test_operators_keep_torchs_rules(key: str, implementation: str) -> None:
    """Shapes, dtypes and strides without memory are the real ones; what is written to is declared; nothing aliases."""
    op = OPS[key]
    device = DEVICE if implementation == "triton" else "cpu"
    given = drawn(op, device=device, gradients=key not in STEPS)
    if key in PACKED_MIXING:
        del given["seq_idx"]
    with _Operators() as operators:
        everything_of(op, lambda **values: op.op(**values, implementation=implementation), given)
    assert operators.calls or implementation == "torch"
    for operator, arguments in operators.calls.items():
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


@NEEDS_TRITON
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("key", PACKED_MIXING)
def test_triton_refuses_packed_mixing_in_a_graph(key: str) -> None:
    given = drawn(OPS[key], device=DEVICE)
    with pytest.raises(ValueError, match=f"='triton' of {key} is not available for these arguments"):
        OPS[key].op(**given, implementation="triton")
    given.pop("seq_idx")
    assert OPS[key].op(**given, implementation="triton").shape == given["x"].shape


@NEEDS_TRITON
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("key", "everything"), cases(IMPLEMENTED))
def test_a_graph_on_a_gpu_holds_the_kernels_of_an_op_and_runs_none(
    key: str, everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, given = OPS[key], drawn(OPS[key], everything)
    expected = tensors(op.op(**given))

    def launch(*args: Any, **options: Any) -> None:
        raise AssertionError("launches a kernel")

    with as_on_a_gpu(monkeypatch, given, launch) as values, _Operators() as operators:
        found = tensors(op.op(**values))
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in expected]
    in_torch = key in FUSED or (key in PACKED_MIXING and everything)
    assert bool(operators.calls) != in_torch


# Ops that read from the device between launches, and why: where there are documents, or always.
READING = {
    "masked_mix": "documents are laid out by their lengths",
    "toeplitz_mix": "as in masked_mix",
    "bounded_attention": "documents are cut into chunks",
}


@NEEDS_TRITON
@pytest.mark.parametrize(("key", "everything"), cases(IMPLEMENTED))
def test_a_call_on_a_gpu_does_not_wait(key: str, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = key in READING and (everything or key == "bounded_attention")
    given, launched = drawn(OPS[key], everything), []
    OPS[key].op(**given)  # keeps the constants of a bounded memory

    def launch(*args: Any, **options: Any) -> None:
        launched.append(args)

    waits = pytest.raises(WAITS) if reads else contextlib.nullcontext()
    with as_on_a_gpu(monkeypatch, given, launch) as values, waits:
        OPS[key].op(**values)
    assert launched or reads
