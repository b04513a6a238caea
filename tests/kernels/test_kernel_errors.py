"""Bad arguments of every op raise one ValueError that names the argument, its value and what is accepted.

The arguments are those of the table in `kernel_ops.py`. Each is spoiled in every way; nothing is written to a state.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_ops import INTEGERS, OPS, SIZES, Op
from torch import Tensor

from ssm_zoo.kernels import checks, compat

CASES = [pytest.param(op, name, id=f"{key}-{name}") for key, op in OPS.items() for name in op.tensors]
IMPLEMENTED = [key for key, op in OPS.items() if "implementation" in inspect.signature(op.op).parameters]
GROUPED = [key for key, op in OPS.items() if "G" in op.tensors.get("B", "")]
PACKED = [key for key, op in OPS.items() if "seq_idx" in op.tensors]


def message_of(op: Op, **changes: Any) -> str:
    """What the op says of the changed arguments; what it writes to must be as before."""
    values = op.arguments() | changes
    kept = {name: values[name].clone() for name in op.written if not values[name].is_meta}
    with pytest.raises(ValueError) as caught:
        op.op(**values)
    assert type(caught.value) is ValueError
    for name, before in kept.items():
        assert torch.equal(values[name], before), f"{name} was written to"
    return str(caught.value)


def resized(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The tensor with one more and one less at every dimension in turn."""
    for dim, size in enumerate(tensor.shape):
        yield dim, torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield dim, tensor.narrow(dim, 0, size - 1)


def test_every_op_is_in_the_table() -> None:
    """Ops are the functions with an `implementation`, and those of the compatibility layer."""
    ops = {function for _, function in inspect.getmembers(compat, inspect.isfunction)}
    for path in Path(checks.__file__).parent.glob("[!_]*.py"):
        module = importlib.import_module(f"ssm_zoo.kernels.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            public = function.__module__ == module.__name__ and not name.startswith("_")
            if public and "implementation" in inspect.signature(function).parameters:
                ops.add(function)
    listed = [op.op for op in OPS.values()]
    assert ops - {checks.choose_implementation} <= {*listed, *map(inspect.unwrap, listed)}


@pytest.mark.parametrize("key", OPS)
def test_the_table_is_accepted(key: str) -> None:
    OPS[key].op(**OPS[key].arguments())


@pytest.mark.parametrize("key", [key for key, op in OPS.items() if ":B" in op.shapes and "window" not in key])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "B", 0)
    op = OPS[key]
    values = op.arguments()
    inputs = {name: value for name, value in values.items() if name not in (*op.written, *INTEGERS)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items() if isinstance(value, Tensor)}
    results = op.op(**values)
    results = results if isinstance(results, tuple) else (results,)
    results = [part for result in results for part in (result if isinstance(result, tuple) else (result,))]
    results = [part for part in results if part is not None]  # a bounded memory without scales
    assert [result.shape[0] for result in results] == [0] * len(results)
    recorded = [result.sum() for result in results if result.requires_grad]
    if recorded:
        gradients = torch.autograd.grad(recorded, list(inputs.values()), allow_unused=True)
        assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_wrong_rank(op: Op, name: str) -> None:
    tensor = op.arguments()[name]
    scalar = torch.zeros((), dtype=tensor.dtype)
    # x of a norm has any number of dimensions but none.
    for wrong in (
        (scalar,) if "norm" in getattr(op.op, "__name__", "") and name == "x" else (scalar, tensor[None, None])
    ):
        message = message_of(op, **{name: wrong})
        assert re.match(rf"{name} must be .*, got shape {re.escape(str(tuple(wrong.shape)))}$", message), message


@pytest.mark.parametrize(("op", "name"), CASES)
def test_wrong_size(op: Op, name: str) -> None:
    """The first two tensors that share a size may be what the others are compared with; then another is named."""
    for dim, wrong in resized(op.arguments()[name]):
        letter = op.tensors[name][dim].replace("J", "K")
        sharing = [other for other, letters in op.tensors.items() if letter in letters.replace("J", "K")]
        if len(sharing) > 1:  # else it is for this argument to say
            named = "|".join(sharing) if name in sharing[:2] else name
            named = "|".join([*op.tensors, *op.options]) if name in op.sizing else named
            message = message_of(op, **{name: wrong})
            assert re.match(rf"({named})\b.* must .*, got ", message), f"{letter} of {name}: {message}"


@pytest.mark.parametrize(("op", "name"), CASES)
def test_wrong_dtype(op: Op, name: str) -> None:
    tensor = op.arguments()[name]
    accepted, wrong = (
        ("have an integer dtype", torch.float32) if name in INTEGERS else ("be floating point", torch.int64)
    )
    for dtype in (torch.bool, wrong):
        message = message_of(op, **{name: tensor.to(dtype)})
        assert message == f"{name} must {accepted}, got {dtype}"


@pytest.mark.parametrize(("op", "name"), CASES)
def test_wrong_device(op: Op, name: str) -> None:
    first = next(iter(op.tensors))
    message = message_of(op, **{name: op.arguments()[name].to("meta")})
    if name == first:
        assert re.match(rf"\w+ must be on the device of {first}, meta, got cpu$", message), message
    else:
        assert message == f"{name} must be on the device of {first}, cpu, got meta"


@pytest.mark.parametrize("key", GROUPED)
@pytest.mark.parametrize("groups", [0, 3, 8])
def test_wrong_group_count(key: str, groups: int) -> None:
    op = OPS[key]
    shape = [groups if letter == "G" else SIZES[letter] for letter in op.tensors["B"]]
    message = message_of(op, B=torch.zeros(shape), C=torch.zeros(shape))
    assert re.match(rf"B must have a number of groups that divides the 4 (heads|channels), got {groups}$", message), (
        message
    )


@pytest.mark.parametrize("key", PACKED)
def test_documents_that_decrease(key: str) -> None:
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, 2, -1, 1, 2]])
    message = "seq_idx must not decrease along a row (negative entries are padding), got 1 after 2 in row 1"
    assert message_of(OPS[key], seq_idx=seq_idx) == message


@pytest.mark.parametrize("key", IMPLEMENTED)
def test_unknown_implementation(key: str) -> None:
    message = f"implementation of {key} must be 'auto', 'torch' or 'triton', got 'cuda'"
    assert message_of(OPS[key], implementation="cuda") == message


@pytest.mark.parametrize("key", IMPLEMENTED)
def test_triton_on_the_cpu(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    obstacle = "needs CUDA tensors, got one on cpu"
    message = f"implementation='triton' of {key} {obstacle}. Pass 'auto' or 'torch'."
    assert message_of(OPS[key], implementation="triton") == message


@pytest.mark.parametrize("key", IMPLEMENTED)
def test_triton_in_float64(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    double = {name: value.double() for name, value in OPS[key].arguments().items() if isinstance(value, Tensor)}
    double = {name: value for name, value in double.items() if name not in INTEGERS}
    obstacle = "computes in float32 and does not support torch.float64"
    message = f"implementation='triton' of {key} {obstacle}. Pass 'auto' or 'torch'."
    assert message_of(OPS[key], **double, implementation="triton") == message


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("ssd", {"x": torch.zeros(2, 0, 4, 3)}, "x must hold at least one token, got shape (2, 0, 4, 3)"),
        ("selective_scan", {"x": torch.zeros(2, 0, 4)}, "x must hold at least one token, got shape (2, 0, 4)"),
        ("selective_scan_fn", {"u": torch.zeros(2, 4, 0)}, "u must hold at least one token, got shape (2, 4, 0)"),
        ("causal_conv1d", {"x": torch.zeros(2, 0, 4)}, "x must hold at least one token, got shape (2, 0, 4)"),
        ("causal_conv1d", {"weight": torch.zeros(4, 1)}, "weight must be (D, K) with K >= 2 taps, got shape (4, 1)"),
        ("ssd", {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ("ssd_log_decay", {"chunk_size": -1}, "chunk_size must be at least 1, got -1"),
        ("causal_conv1d", {"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
        ("causal_conv1d_step", {"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
        ("window_attention", {"window": 0}, "window must be at least 1, got 0"),
        ("window_attention", {"q": torch.zeros(3, 4, 0)}, "q must be (M, H, P) with H and P >= 1, got shape (3, 4, 0)"),
        (
            "window_attention",
            {"k": torch.zeros(2, 0, 2, 3)},
            "k must hold at least one column, got shape (2, 0, 2, 3)",
        ),
    ],
)
def test_other_arguments(key: str, change: dict[str, Any], expected: str) -> None:
    assert message_of(OPS[key], **change) == expected


ATTENTION = [key for key in OPS if key.startswith("window_attention")]


@pytest.mark.parametrize("key", [key for key in OPS if "attention" in key and "k:BLGP" in OPS[key].shapes])
@pytest.mark.parametrize("groups", [0, 3, 8])
def test_wrong_number_of_key_heads(key: str, groups: int) -> None:
    keys = torch.zeros(2, 5, groups, 3)
    values = {"v": keys} if "v" in OPS[key].tensors else {}
    message = f"k must have a number of groups that divides the 4 heads, got {groups}"
    assert message_of(OPS[key], k=keys, **values) == message


@pytest.mark.parametrize("key", ATTENTION)
@pytest.mark.parametrize("index", [[0, 2, 2], [3, 1, 4], [-1, 0, 1], [7, 8, 10]])
def test_an_index_that_does_not_increase_within_the_rows(key: str, index: list[int]) -> None:
    message = f"index must increase strictly from 0 or more to at most B K - 1 = 9, got {index}"
    assert message_of(OPS[key], index=torch.tensor(index)) == message


@pytest.mark.parametrize("key", ATTENTION)
@pytest.mark.parametrize("wrong", [[0, 3, -1, 3, 4], [0, 3, -1, 1, 4]], ids=["repeated", "lower"])
def test_positions_that_do_not_increase(key: str, wrong: list[int]) -> None:
    message = "positions must increase along a row (negative entries hold no token), got {} after 3 in row 1"
    positions = torch.tensor([[0, 1, 2, 3, 4], wrong])
    assert message_of(OPS[key], positions=positions) == message.format(wrong[3])


@pytest.mark.parametrize("key", ["ssd_step", "ssd_log_decay_step", "selective_scan_step"])
def test_states_of_half_precision(key: str) -> None:
    """A state that is updated in place a thousand times would lose what it sums."""
    state = OPS[key].arguments()["state"].bfloat16()
    assert message_of(OPS[key], state=state) == "state must be float32 or float64, got torch.bfloat16"
