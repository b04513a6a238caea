"""Cases of the kernel benchmark: our ops, their inputs and the sizes.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, K convolution width, D channels of a
convolution, a norm or Mamba-1's scan, and width of a mixer, M selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.position_mix import masked_mix, masked_mix_reference, toeplitz_mix, toeplitz_mix_reference
from ssm_zoo.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_reference
from ssm_zoo.kernels.ssd import ssd, ssd_reference
from ssm_zoo.kernels.window_attention import window_attention, window_attention_reference

Sizes = Mapping[str, int]
Inputs = dict[str, Tensor]
Results = dict[str, Tensor]
Run = Callable[[], Results]

EPS = 1e-5
TAPS = 4
FORWARD, TRAINING, EAGER, GRAPH = "forward", "forward+backward", "eager", "graph"
MIXERS = ("mamba2_mixer", "mamba1_mixer")


@dataclass(frozen=True)
class Case:
    """One op at one size: a group of rows of the result file."""

    op: str
    mode: str
    sizes: Sizes
    dtype: torch.dtype

    @property
    def name(self) -> str:
        sizes = " ".join(f"{symbol}{size}" for symbol, size in self.sizes.items())
        return f"{self.op} {self.mode} {sizes} {str(self.dtype).removeprefix('torch.')}"

    @property
    def tokens(self) -> int:
        return self.sizes["B"] * self.sizes.get("L", 1)

    @property
    def reduced(self) -> Case:
        """Return the case at the size that results are checked at."""
        return replace(self, sizes=OPS[self.op].reduced(self.sizes))


@dataclass(frozen=True)
class Op:
    """An op as the benchmark sees it.

    Attributes:
        inputs: makes the arguments, by name; outputs that have a gradient are as large as the first.
        ours: takes them and returns a tensor or several; changes those named in `changed` in place.
        reference: the same in float64, by other means where there are any.
        reduced: sizes to check at.
        changed: arguments that are changed in place; of an op that decodes.
    """

    inputs: Callable[[Sizes, torch.dtype, torch.device], Inputs]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    reduced: Callable[[Sizes], Sizes]
    changed: tuple[str, ...] = ()


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def first_steps(number: int, device: torch.device) -> Tensor:
    """Return (number) biases whose softplus gives the initial step sizes of Mamba, 0.001 to 0.1."""
    return torch.expm1(torch.logspace(-3, -1, number, device=device)).log()


def ssd_inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "x": normal(s["B"], s["L"], s["H"], s["P"], dtype=dtype, device=device),
        "dt": normal(s["B"], s["L"], s["H"], dtype=dtype, device=device),
        "A": -torch.linspace(1, 16, s["H"], device=device),
        "B": normal(s["B"], s["L"], s["G"], s["N"], dtype=dtype, device=device),
        "C": normal(s["B"], s["L"], s["G"], s["N"], dtype=dtype, device=device),
        "D": torch.ones(s["H"], device=device),
        "dt_bias": first_steps(s["H"], device),
    }


def selective_scan_inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "x": normal(s["B"], s["L"], s["D"], dtype=dtype, device=device),
        "dt": normal(s["B"], s["L"], s["D"], dtype=dtype, device=device),
        "A": -torch.arange(1.0, s["N"] + 1, device=device).repeat(s["D"], 1),
        "B": normal(s["B"], s["L"], 1, s["N"], dtype=dtype, device=device),
        "C": normal(s["B"], s["L"], 1, s["N"], dtype=dtype, device=device),
        "D": torch.ones(s["D"], device=device),
        "z": normal(s["B"], s["L"], s["D"], dtype=dtype, device=device),
        "dt_bias": first_steps(s["D"], device),
    }


def convolution_inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "x": normal(s["B"], s["L"], s["D"], dtype=dtype, device=device),
        "weight": normal(s["D"], s["K"], dtype=dtype, device=device),
        "bias": normal(s["D"], dtype=dtype, device=device),
    }


def norm_inputs(*names: str) -> Callable[[Sizes, torch.dtype, torch.device], Inputs]:
    """Return inputs of the given names in the shape of x, and the weight."""

    def make(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        wide = {name: normal(s["B"], s["L"], s["D"], dtype=dtype, device=device) for name in names}
        return {**wide, "weight": 1 + 0.1 * normal(s["D"], dtype=dtype, device=device)}

    return make


def decode_inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    channels = s["H"] * s["P"] + 2 * s["G"] * s["N"]
    return {
        "state": normal(s["B"], s["H"], s["P"], s["N"], dtype=torch.float32, device=device),
        "conv_state": normal(s["B"], channels, TAPS - 1, dtype=dtype, device=device),
        "xBC": normal(s["B"], channels, dtype=dtype, device=device),
        "dt": normal(s["B"], s["H"], dtype=dtype, device=device),
        "weight": normal(channels, TAPS, dtype=dtype, device=device),
        "bias": normal(channels, dtype=dtype, device=device),
        "A_log": torch.linspace(1, 16, s["H"], device=device).log(),
        "D": torch.ones(s["H"], device=device),
        "dt_bias": first_steps(s["H"], device),
        "arrivals": torch.zeros(s["B"], s["G"], dtype=torch.int32, device=device),
    }


def attention_inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    keys = (s["B"], s["L"], s["G"], s["P"])
    return {
        "q": normal(s["M"], s["H"], s["P"], dtype=dtype, device=device),
        "k": normal(*keys, dtype=dtype, device=device),
        "v": normal(*keys, dtype=dtype, device=device),
    }


def mixing_inputs(dimensions: int) -> Callable[[Sizes, torch.dtype, torch.device], Inputs]:
    """Return inputs with lower triangular weights of pairs of positions (2) or weights of distances (1)."""

    def make(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        weight = normal(s["H"], *[s["L"]] * dimensions, dtype=dtype, device=device) / s["L"] ** 0.5
        return {
            "x": normal(s["B"], s["L"], s["H"], s["P"], dtype=dtype, device=device),
            "weight": weight.tril() if dimensions == 2 else weight,
            "bias": normal(s["H"], s["L"], dtype=dtype, device=device),
        }

    return make


def window_of(length: int) -> int:
    """Return the tokens that a query sees: of rows of 16384 as many as in Taipan, 2048."""
    return max(length // 8, 1)


@cache
def selected(number: int, columns: int, device: torch.device) -> Tensor:
    """Return randomly drawn columns of all rows in order, as a gate would select them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(columns, generator=generator)[:number].sort().values.to(device)


def split_maps(xBC: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the outputs of the convolution into x (..., H, P), B and C (..., G, N); `state` is (B, H, P, N)."""
    heads, width, size = state.shape[1:]
    maps = (xBC.shape[-1] - heads * width) // 2
    x, B, C = xBC.split([heads * width, maps, maps], dim=-1)
    return x.unflatten(-1, (heads, width)), B.unflatten(-1, (-1, size)), C.unflatten(-1, (-1, size))


def decode(
    state: Tensor,
    conv_state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    arrivals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one token through Mamba-2's convolution and recurrence; returns y (B, H, P) and both states."""
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "arrivals": arrivals}
    return mamba2_step(xBC, conv_state, state, dt, weight, bias, A_log, **options), state, conv_state


def decode_reference(
    state: Tensor,
    conv_state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    arrivals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the step as rows of one token, which does not change the states; it needs no `arrivals`."""
    convolved, conv_state = causal_conv1d_reference(
        xBC[:, None], weight, bias, activation="silu", initial_state=conv_state, return_final_state=True
    )
    x, B, C = split_maps(convolved, state)
    y, state = ssd_reference(
        x,
        dt[:, None],
        -A_log.exp(),
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_state=state,
        return_final_state=True,
    )
    return y[:, 0], state, conv_state


def reduced(**largest: int) -> Callable[[Sizes], Sizes]:
    """Return the sizes, limited to the given ones; lengths are odd, so that the last chunk is cut."""
    return lambda s: {symbol: min(size, largest.get(symbol, size)) for symbol, size in s.items()}


def mixer(kind: str) -> Op:
    """Return a whole mixer as a function of x and its parameters.

    The reference is our mixer in float64, where the ops take their torch path. That they agree with the definitions
    and with transformers at all is what the tests show.
    """

    def parts(width: int) -> Any:
        from mixers import mamba1_parts, mamba2_parts  # imports transformers, which the other ops do not need

        return (mamba2_parts if kind == "mamba2_mixer" else mamba1_parts)(width)

    def inputs(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        parameters = parts(s["D"]).parameters(dtype, device)
        return {"x": normal(s["B"], s["L"], s["D"], dtype=dtype, device=device), **parameters}

    def ours(x: Tensor, **parameters: Tensor) -> Tensor:
        return parts(x.shape[-1]).ours(x, parameters)

    return Op(inputs, ours, ours, reduced(B=1, L=193))


def _ssd(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: op(**inputs, dt_softplus=True)


def _convolution(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: op(**inputs, activation="silu")


def _norm(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: op(**inputs, eps=EPS)


def _selected_attention(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        batch, length = k.shape[:2]
        index = selected(q.shape[0], batch * length, q.device)
        return op(q, k, v, window=window_of(length), index=index, **options)

    return run


OPS: dict[str, Op] = {
    "ssd": Op(ssd_inputs, _ssd(ssd), _ssd(ssd_reference), reduced(B=1, L=193, H=8)),
    "selective_scan": Op(
        selective_scan_inputs, _ssd(selective_scan), _ssd(selective_scan_reference), reduced(B=1, L=193, D=96)
    ),
    "causal_conv1d": Op(
        convolution_inputs, _convolution(causal_conv1d), _convolution(causal_conv1d_reference), reduced(B=1, L=193)
    ),
    "rms_norm": Op(norm_inputs("x"), _norm(rms_norm), _norm(rms_norm_reference), reduced(B=1, L=193)),
    "rms_norm_gated": Op(norm_inputs("x", "z"), _norm(rms_norm), _norm(rms_norm_reference), reduced(B=1, L=193)),
    "add_rms_norm": Op(
        norm_inputs("x", "residual"), _norm(add_rms_norm), _norm(add_rms_norm_reference), reduced(B=1, L=193)
    ),
    "window_attention": Op(
        attention_inputs,
        _selected_attention(window_attention),
        _selected_attention(window_attention_reference),
        reduced(B=1, L=193, H=8, G=8, M=53),
    ),
    "masked_mix": Op(mixing_inputs(2), masked_mix, masked_mix_reference, reduced(B=2, L=193, P=96)),
    "toeplitz_mix": Op(mixing_inputs(1), toeplitz_mix, toeplitz_mix_reference, reduced(B=2, L=193, P=96)),
    "decode": Op(decode_inputs, decode, decode_reference, reduced(B=3, H=8), changed=("state", "conv_state")),
    **{kind: mixer(kind) for kind in MIXERS},
}

HEADLINE = {"B": 1, "L": 8192, "H": 128, "P": 64, "N": 128, "G": 1}
# Taipan's selective attention (arXiv 2410.18572) at a width of 2048: 15 % of the tokens are selected.
SELECTIVE = {"B": 1, "L": 16384, "M": 2458, "H": 32, "G": 32, "P": 64}
# A mixing layer at a width of 1024 (arXiv 2409.01482), of so many tokens.
MIXED_TOKENS = 65536
LENGTHS = tuple(4**k for k in range(4, 11))  # 256 to 1048576
SCAN_LENGTHS = (512, 2048, 8192, 32768, 131072, 524288)


def full_cases() -> Iterator[Case]:
    """Return the cases for a GPU, those with bars first, because a run may be cut off."""
    bf16 = torch.bfloat16
    for mode in (FORWARD, TRAINING):
        yield Case("ssd", mode, HEADLINE, bf16)
    for mode in (TRAINING, FORWARD):
        yield Case("selective_scan", mode, {"B": 1, "L": 2048, "D": 1024, "N": 16}, bf16)
    wide = {"B": 8, "L": 2048}
    for mode in (FORWARD, TRAINING):
        yield Case("causal_conv1d", mode, {**wide, "D": 4352, "K": TAPS}, bf16)
        for op in ("rms_norm_gated", "rms_norm", "add_rms_norm"):
            yield Case(op, mode, {**wide, "D": 4096}, bf16)
    for batch in (1, 128, 2, 4, 8, 16, 32, 64):
        for mode in (GRAPH, EAGER):
            yield Case("decode", mode, {"B": batch, "H": 64, "P": 64, "N": 128, "G": 1}, bf16)
    for mode in (FORWARD, TRAINING):
        yield Case("window_attention", mode, SELECTIVE, bf16)
    for mode in (TRAINING, FORWARD):
        for op in ("masked_mix", "toeplitz_mix"):
            for length in (1024, 2048, 4096, 512):
                yield Case(op, mode, {"B": MIXED_TOKENS // length, "L": length, "H": 1, "P": 1024}, bf16)
            yield Case(op, mode, {"B": MIXED_TOKENS // 1024, "L": 1024, "H": 16, "P": 64}, bf16)
    for mode in (FORWARD, TRAINING):
        for length in (512, 256, 2048, 32768, 131072):
            yield Case("ssd", mode, {**HEADLINE, "L": length}, bf16)
        yield Case("ssd", mode, {**HEADLINE, "B": 8, "L": 2048}, bf16)
        yield Case("ssd", mode, {**HEADLINE, "L": 2048}, torch.float32)
    for mode in (TRAINING, FORWARD):
        for length in SCAN_LENGTHS:
            if length != 2048:
                yield Case("selective_scan", mode, {"B": 1, "L": length, "D": 1024, "N": 16}, bf16)
    for kind in MIXERS:
        for mode in (FORWARD, TRAINING):
            yield Case(kind, mode, {"B": 1, "L": 2048, "D": 2048}, bf16)
    # The published 130M checkpoint's mixer, whose heads leave room for a million tokens.
    for mode in (FORWARD, TRAINING):
        for length in LENGTHS:
            yield Case("ssd", mode, {**HEADLINE, "L": length, "H": 24}, bf16)


def small_cases() -> Iterator[Case]:
    """Return the same kinds of cases at sizes that a CPU runs in seconds. They test the suite, not a kernel."""
    fp32 = torch.float32
    for mode in (FORWARD, TRAINING):
        for length in (64, 256):
            yield Case("ssd", mode, {"B": 1, "L": length, "H": 4, "P": 16, "N": 16, "G": 1}, fp32)
            yield Case("selective_scan", mode, {"B": 1, "L": length, "D": 64, "N": 16}, fp32)
        yield Case("causal_conv1d", mode, {"B": 2, "L": 64, "D": 96, "K": TAPS}, fp32)
        for op in ("rms_norm_gated", "rms_norm", "add_rms_norm"):
            yield Case(op, mode, {"B": 2, "L": 64, "D": 96}, fp32)
        yield Case("window_attention", mode, {"B": 2, "L": 128, "M": 38, "H": 4, "G": 2, "P": 16}, fp32)
        for op in ("masked_mix", "toeplitz_mix"):
            yield Case(op, mode, {"B": 2, "L": 64, "H": 2, "P": 24}, fp32)
        for kind in MIXERS:
            yield Case(kind, mode, {"B": 1, "L": 32, "D": 64}, fp32)
    for batch in (1, 2):
        for mode in (EAGER, GRAPH):
            yield Case("decode", mode, {"B": batch, "H": 4, "P": 16, "N": 16, "G": 1}, fp32)


@dataclass(frozen=True)
class Setup:
    """A case's tensors: the same for our side and for every peer."""

    case: Case
    inputs: Inputs
    cotangents: tuple[Tensor, ...]  # of the outputs; empty unless there is a backward

    @property
    def op(self) -> Op:
        return OPS[self.case.op]

    @property
    def training(self) -> bool:
        return self.case.mode == TRAINING

    def own_inputs(self) -> Inputs:
        """Return the inputs, with copies of those that an op changes in place."""
        return {name: t.clone() if name in self.op.changed else t for name, t in self.inputs.items()}


def prepare(case: Case, device: torch.device) -> Setup:
    """Draw a case's tensors."""
    torch.manual_seed(0)
    op = OPS[case.op]
    inputs = op.inputs(case.sizes, case.dtype, device)
    cotangents: tuple[Tensor, ...] = ()
    if case.mode == TRAINING:
        outputs = 2 if case.op == "add_rms_norm" else 1
        like = next(iter(inputs.values()))
        cotangents = tuple(torch.randn_like(like) for _ in range(outputs))
    return Setup(case, inputs, cotangents)


def named(outputs: Any) -> Results:
    """Return outputs under the names y, y1, y2."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"y{i or ''}": output.detach() for i, output in enumerate(outputs)}


def runner(function: Callable[..., Any], inputs: Inputs, cotangents: tuple[Tensor, ...]) -> Run:
    """Return a run of `function(**inputs)`, and of the gradients "d<name>" of all inputs if there are cotangents."""
    if not cotangents:

        def forward() -> Results:
            with torch.no_grad():
                return named(function(**inputs))

        return forward
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}

    def training() -> Results:
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return named(outputs) | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    return training


def our_run(setup: Setup) -> Run:
    return runner(setup.op.ours, setup.own_inputs(), setup.cotangents)


def reference_results(setup: Setup) -> Results:
    """Return results of the definition on the same numbers, computed in float64."""
    inputs = {name: tensor.double() for name, tensor in setup.own_inputs().items()}
    return runner(setup.op.reference, inputs, tuple(c.double() for c in setup.cotangents))()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return number of bytes that tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
