"""Bad arguments of every op raise one ValueError that names the argument, what was got and what is accepted.

One table of the ops' arguments, every one of which is spoiled in every way; nothing is written to a state.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels import checks, compat
from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from ssm_zoo.kernels.position_mix import (
    masked_mix,
    masked_mix_reference,
    masked_mix_step,
    toeplitz_mix,
    toeplitz_mix_reference,
    toeplitz_mix_step,
)
from ssm_zoo.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from ssm_zoo.kernels.ssd import (
    ssd,
    ssd_log_decay,
    ssd_log_decay_reference,
    ssd_log_decay_step,
    ssd_matrix,
    ssd_reference,
    ssd_step,
)
from ssm_zoo.kernels.window_attention import window_attention, window_attention_matrix, window_attention_reference

# Batch, length, heads or channels, head width, groups, states, taps, taps less one, a longer state's places and rows,
# selected tokens
SIZES = {"B": 2, "L": 5, "H": 4, "P": 3, "G": 2, "N": 6, "K": 4, "J": 3, "S": 5, "R": 7, "M": 3}
# Of the compatibility layer: projected inputs and convolved channels of Mamba-2, its H P; 2 H and M + 2 N of Mamba-1;
# outputs, one, all tokens, bounds of a sequence
SIZES |= {"Z": 52, "Y": 36, "X": 12, "W": 8, "V": 15, "O": 5, "I": 1, "T": 9, "Q": 2}
INDICES = ("cu_seqlens", "seq_idx", "cache_seqlens", "state_batch_indices", "conv_state_indices")
COUNTING = ("index", "positions")  # indices too, which have to increase
INTEGERS = (*INDICES, *COUNTING)


@dataclass(frozen=True)
class Op:
    """An op, and its tensors as `name:shape` with a letter for a dimension.

    Attributes:
        op: what is called.
        shapes: the tensors; the others have to be on the device of the first one.
        written: tensors that a successful call writes to.
        options: other arguments.
        sizing: tensors whose sizes are parts of the sizes of others.
    """

    op: Callable[..., Any]
    shapes: str
    written: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sizing: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, str]:
        return dict(entry.split(":") for entry in self.shapes.split())

    def arguments(self) -> dict[str, Any]:
        values = {}
        for name, letters in self.tensors.items():
            shape = [SIZES[letter] for letter in letters]
            if name in COUNTING:
                values[name] = torch.arange(shape[-1]).repeat(*shape[:-1], 1)
            else:
                values[name] = torch.zeros(shape, dtype=torch.long) if name in INDICES else torch.full(shape, -0.5)
        return values | self.options


SSD = "B:BLGN C:BLGN D:HP z:BLHP initial_state:BHPN seq_idx:BL"
SSD_STEP = "B:BGN C:BGN D:HP z:BHP"
SCAN = "x:BLH dt:BLH A:HN B:BLGN C:BLGN D:H z:BLH dt_bias:H initial_state:BHN seq_idx:BL"
CONVOLUTION = "x:BLH weight:HK bias:H initial_state:BHJ seq_idx:BL"
WINDOW = "index:M positions:BL seq_idx:BL"
MIX = "bias:HN residual:BLHP seq_idx:BL"
MIX_STEP = "bias:HN positions:B residual:BHP"
EPS = {"eps": 1e-5}

OPS: dict[str, Op] = {
    "ssd": Op(ssd, f"x:BLHP dt:BLH A:H {SSD} dt_bias:H"),
    "ssd_reference": Op(ssd_reference, f"x:BLHP dt:BLH A:H {SSD} dt_bias:H"),
    "ssd_log_decay": Op(ssd_log_decay, f"x:BLHP log_decay:BLH {SSD}"),
    "ssd_log_decay_reference": Op(ssd_log_decay_reference, f"x:BLHP log_decay:BLH {SSD}"),
    "ssd_step": Op(ssd_step, f"x:BHP state:BHPN dt:BH A:H {SSD_STEP} dt_bias:H", ("state",)),
    "ssd_log_decay_step": Op(ssd_log_decay_step, f"x:BHP state:BHPN log_decay:BH {SSD_STEP}", ("state",)),
    "ssd_matrix": Op(ssd_matrix, "log_decay:BLH B:BLGN C:BLGN seq_idx:BL"),
    "selective_scan": Op(selective_scan, SCAN),
    "selective_scan_reference": Op(selective_scan_reference, SCAN),
    "selective_scan_step": Op(
        selective_scan_step, "x:BH state:BHN dt:BH A:HN B:BGN C:BGN D:H z:BH dt_bias:H", ("state",)
    ),
    "causal_conv1d": Op(causal_conv1d, CONVOLUTION),
    "causal_conv1d_reference": Op(causal_conv1d_reference, CONVOLUTION),
    "causal_conv1d_step": Op(causal_conv1d_step, "x:BH weight:HK state:BHJ bias:H", ("state",)),
    "rms_norm": Op(rms_norm, "x:BH weight:H z:BH", options=EPS),
    "rms_norm_reference": Op(rms_norm_reference, "x:BH weight:H z:BH", options=EPS),
    "add_rms_norm": Op(add_rms_norm, "x:BH residual:BH weight:H", options=EPS),
    "add_rms_norm_reference": Op(add_rms_norm_reference, "x:BH residual:BH weight:H", options=EPS),
    "window_attention": Op(window_attention, f"q:MHP k:BLGP v:BLGP {WINDOW}", options={"window": 2}),
    "window_attention_reference": Op(
        window_attention_reference, f"q:MHP k:BLGP v:BLGP {WINDOW}", options={"window": 2}
    ),
    "window_attention_matrix": Op(window_attention_matrix, f"q:MHP k:BLGP {WINDOW}", options={"window": 2}),
    "masked_mix": Op(masked_mix, f"x:BLHP weight:HNN {MIX}"),
    "masked_mix_reference": Op(masked_mix_reference, f"x:BLHP weight:HNN {MIX}"),
    "masked_mix_step": Op(masked_mix_step, f"history:BLHP weight:HNN {MIX_STEP}"),
    "toeplitz_mix": Op(toeplitz_mix, f"x:BLHP weight:HN {MIX}"),
    "toeplitz_mix_reference": Op(toeplitz_mix_reference, f"x:BLHP weight:HN {MIX}"),
    "toeplitz_mix_step": Op(toeplitz_mix_step, f"history:BLHP weight:HN {MIX_STEP}"),
    "mamba_chunk_scan_combined": Op(
        compat.mamba_chunk_scan_combined,
        f"x:BLHP dt:BLH A:H {SSD} dt_bias:H".replace("initial_state", "initial_states"),
        options={"chunk_size": 4},
    ),
    "selective_scan_fn": Op(compat.selective_scan_fn, "u:BHL delta:BHL A:HN B:BGNL C:BGNL D:H z:BHL delta_bias:H"),
    "mamba_split_conv1d_scan_combined": Op(
        compat.mamba_split_conv1d_scan_combined,
        "zxbcdt:BLZ conv1d_weight:YK conv1d_bias:Y dt_bias:H A:H D:HP initial_states:BHPN seq_idx:BL rmsnorm_weight:X "
        "outproj_weight:OX outproj_bias:O",
        options={"chunk_size": 4, "ngroups": 2},
        sizing=("D",),
    ),
    "mamba_inner_fn": Op(
        compat.mamba_inner_fn,
        "xz:BWL conv1d_weight:HIK conv1d_bias:H x_proj_weight:VH delta_proj_weight:HM out_proj_weight:OH "
        "out_proj_bias:O A:HN D:H delta_bias:H B_proj_bias:N C_proj_bias:N b_rms_weight:N c_rms_weight:N "
        "dt_rms_weight:H",
        sizing=("A",),
    ),
    "layer_norm_fn": Op(compat.layer_norm_fn, "x:BH weight:H bias:H residual:BH x1:BH weight1:H bias1:H"),
    "rms_norm_fn": Op(compat.rms_norm_fn, "x:BH weight:H bias:H residual:BH rowscale:B"),
    "layer_norm_linear_fn": Op(
        compat.layer_norm_linear_fn, "x:BH norm_weight:H norm_bias:H linear_weight:OH linear_bias:O residual:BH"
    ),
    "layernorm_fn": Op(compat.layernorm_fn, "x:BH weight:H bias:H z:BH"),
    "rmsnorm_fn": Op(compat.rmsnorm_fn, "x:BH weight:H bias:H z:BH"),
    "causal_conv1d_varlen_states": Op(
        compat.causal_conv1d_varlen_states, "x:TH cu_seqlens:Q", options={"state_len": 3}
    ),
    "selective_state_update": Op(
        compat.selective_state_update,
        "x:BHP state:BHPN dt:BHP A:HPN B:BGN C:BGN D:HP z:BHP dt_bias:HP",
        ("state",),
    ),
    "selective_state_update of Mamba-1": Op(
        compat.selective_state_update,
        "x:BP state:RPN dt:BP A:PN B:BN C:BN D:P z:BP dt_bias:P state_batch_indices:B",
        ("state",),
    ),
    "causal_conv1d_fn": Op(
        compat.causal_conv1d_fn,
        "x:BHL weight:HK bias:H seq_idx:BL initial_states:BHJ final_states_out:BHJ",
        ("final_states_out",),
        {"return_final_states": True},
    ),
    "causal_conv1d_update": Op(
        compat.causal_conv1d_update, "x:BHL conv_state:BHS weight:HK bias:H cache_seqlens:B", ("conv_state",)
    ),
    "causal_conv1d_update of indexed rows": Op(
        compat.causal_conv1d_update, "x:BH conv_state:RHS weight:HK bias:H conv_state_indices:B", ("conv_state",)
    ),
}
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
    assert ops - {checks.choose_implementation} <= {op.op for op in OPS.values()}


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


@pytest.mark.parametrize("key", ATTENTION)
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
