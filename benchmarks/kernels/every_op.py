"""Run every op once in Triton, forward and backward, at odd sizes, and compare it with torch: what a sanitizer watches.

    compute-sanitizer --tool memcheck --error-exitcode 3 python benchmarks/kernels/every_op.py

Where ssm-zoo is not installed, `gpu_session.py` runs it.
`PYTORCH_NO_CUDA_MEMORY_CACHING=1` gives each tensor an allocation of its own, so that a load beside a tensor is seen.
Without a CUDA device, `TRITON_INTERPRET=1` runs the kernels on the CPU (minutes). The exit status is 1 if a result is
not finite or differs from torch's by more than 2 % of its largest entry.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssm_zoo.kernels.bounded_attention import bounded_attention, bounded_attention_step
from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.matrix_distance import SSDFactors, row_distances
from ssm_zoo.kernels.position_mix import masked_mix, masked_mix_step, toeplitz_mix, toeplitz_mix_step
from ssm_zoo.kernels.rms_norm import add_rms_norm, rms_norm
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_step
from ssm_zoo.kernels.ssd import ssd, ssd_log_decay, ssd_step
from ssm_zoo.kernels.window_attention import window_attention

ALLOWED = 2e-2  # of the largest entry: bfloat16 has 8 bits
MEMORY: dict[str, Any] = {"window": 16, "slots": [20, 5], "sinks": 4, "chunk_size": 8, "decay": [0.9, 1.0]}
Case = tuple[str, Callable[..., Any], dict[str, Any]]


class Inputs:
    """Random tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device

    def half(self, *sizes: int) -> Tensor:
        return self.full(*sizes, dtype=torch.bfloat16)

    def full(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = torch.randn(sizes, generator=self.generator)
        return numbers.to(self.device, dtype).requires_grad_()

    def decays(self, *sizes: int) -> Tensor:
        return (-torch.rand(sizes, generator=self.generator) - 0.1).to(self.device).requires_grad_()


def cases(device: torch.device, length: int) -> Iterator[Case]:
    """Yield the name, the op and the arguments of each case; `length` is that of most."""
    made = Inputs(device)
    half, full, decays, L = made.half, made.full, made.decays, length
    first = L // 2
    seq_idx = torch.tensor([[0] * first + [1] * (L - first - 3) + [-1] * 3, [-1] * 2 + [2] * (L - 2)], device=device)
    for width, states, groups in ((64, 128, 1), (40, 24, 2)):
        maps = {"B": half(2, L, groups, states), "C": half(2, L, groups, states)}
        gates = {"D": full(4), "z": half(2, L, 4, width), "dt_bias": full(4), "dt_softplus": True}
        start = {"initial_state": full(2, 4, width, states), "return_final_state": True}
        core = {"x": half(2, L, 4, width), "dt": half(2, L, 4), "A": decays(4)}
        yield f"ssd, width {width}", ssd, {**core, **maps, **gates, **start, "seq_idx": seq_idx}
        core = {"x": half(2, L, 4, width), "log_decay": decays(2, L, 4)}
        yield f"ssd_log_decay, width {width}", ssd_log_decay, {**core, **maps}
    maps = {"B": half(2, L, 1, 16), "C": half(2, L, 1, 16)}
    gates = {"D": full(72), "z": half(2, L, 72), "dt_bias": full(72), "dt_softplus": True, "return_final_state": True}
    scan = {"x": half(2, L, 72), "dt": half(2, L, 72), "A": decays(72, 16)}
    yield "selective_scan", selective_scan, {**scan, **maps, **gates, "seq_idx": seq_idx}
    taps = {"weight": full(72, 4), "bias": full(72), "activation": "silu"}
    conv = {"x": half(2, L, 72), **taps, "initial_state": half(2, 72, 3), "return_final_state": True}
    yield "causal_conv1d", causal_conv1d, {**conv, "seq_idx": seq_idx}
    yield (
        "rms_norm",
        rms_norm,
        {"x": half(33, 384), "weight": full(384), "eps": 1e-5, "z": half(33, 384), "group_size": 192},
    )
    yield (
        "add_rms_norm",
        add_rms_norm,
        {"x": half(33, 1000), "residual": full(33, 1000), "weight": full(1000), "eps": 1e-5},
    )
    mix = {"x": half(3, L, 2, 24), "weight": full(2, L + 3, L + 3), "bias": full(2, L + 3)}
    yield "masked_mix", masked_mix, {**mix, "residual": full(3, L, 2, 24)}
    yield "masked_mix, wide", masked_mix, {"x": half(2, L, 1, 256), "weight": half(1, L, L)}
    yield "toeplitz_mix", toeplitz_mix, {"x": half(2, L, 1, 256), "weight": full(1, L)}
    index = torch.arange(0, 2 * L, 5, device=device)
    kept = {"q": half(len(index), 4, 64), "k": half(2, L, 2, 64), "v": half(2, L, 2, 64)}
    yield "window_attention", window_attention, {**kept, "window": 40, "index": index, "seq_idx": seq_idx}
    heads = {"q": half(2, L, 6, 64), "k": half(2, L, 2, 64), "v": half(2, L, 2, 64)}
    yield "bounded_attention", _bounded, {**heads, **MEMORY, "seq_idx": seq_idx}
    for width, chunk_size in ((128, 16), (256, 5)):
        heads = {"q": half(1, L, 2, width), "k": half(1, L, 2, width), "v": half(1, L, 2, width)}
        options = {"window": 20, "slots": [7, 40], "chunk_size": chunk_size, "softcap": 5.0}
        yield f"bounded_attention, width {width}, in two parts", _bounded_in_parts, {**heads, "options": options}
    student = {"log_decay": decays(2, L, 4), "B": full(2, L, 4, 24), "C": full(2, L, 4, 24), "scale": full(2, L, 4)}
    teacher = {"queries": full(2, L, 4, 64), "keys": full(2, L, 4, 64)}
    yield "row_distances", _row_distances, {**student, **teacher}


def _row_distances(queries: Tensor, keys: Tensor, implementation: str, **factors: Tensor) -> Any:
    found = row_distances(SSDFactors(**factors), queries.detach(), keys.detach(), 0.125, implementation=implementation)
    return tuple(found)


def _bounded(implementation: str, **arguments: Any) -> Any:
    """Return the outputs, and sums over the rows of the memory, whose order may differ."""
    output, memory = bounded_attention(**arguments, implementation=implementation)
    return output, memory.keys.sum(1), memory.values.sum(1)


def _bounded_in_parts(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], implementation: str) -> Any:
    """Return the outputs of the second half, which goes on from the memory of the first, and sums over its rows."""
    first = q.shape[1] // 2
    options = options | {"implementation": implementation}
    memory = bounded_attention(q[:, :first], k[:, :first], v[:, :first], **options)[1]
    output, memory = bounded_attention(q[:, first:], k[:, first:], v[:, first:], initial_state=memory, **options)
    return output, memory.keys.sum(1), memory.values.sum(1)


def _bounded_step(q: Tensor, k: Tensor, v: Tensor, past: Tensor, int8: bool, implementation: str) -> Any:
    """Run a step after the tokens of `past`; return its output and the scores of the memory after it."""
    q, k, v, past = (x.detach() for x in (q, k, v, past))
    heads = past.repeat_interleave(q.shape[1] // k.shape[1], dim=2)
    memory = bounded_attention(heads, past, past, **MEMORY, implementation="torch")[1]
    memory = memory.quantised() if int8 else memory
    output = bounded_attention_step(q, k, v, memory, **MEMORY, implementation=implementation)
    return output, memory.scores


def steps(device: torch.device) -> Iterator[Case]:
    """Yield the name, the op and the arguments of each decode step; what it writes to is among them."""
    made = Inputs(device)
    half, full, decays = made.half, made.full, made.decays
    maps = {"B": half(3, 1, 128), "C": half(3, 1, 128), "dt_softplus": True}
    state = full(3, 4, 64, 128)
    yield "ssd_step", ssd_step, {"state": state, "x": half(3, 4, 64), "dt": half(3, 4), "A": decays(4), **maps}
    channels = 4 * 64 + 2 * 128
    token = {"xBC": half(3, channels), "conv_state": half(3, channels, 3), "state": full(3, 4, 64, 128)}
    token |= {"dt": half(3, 4), "weight": full(channels, 4), "bias": full(channels), "A_log": full(4)}
    yield "mamba2_step", mamba2_step, {**token, "z": half(3, 4, 64), "dt_softplus": True}
    maps = {"B": half(3, 1, 16), "C": half(3, 1, 16), "dt_softplus": True}
    scan = {"x": half(3, 72), "dt": half(3, 72), "A": decays(72, 16)}
    yield "selective_scan_step", selective_scan_step, {"state": full(3, 72, 16), **scan, **maps}
    taps = {"weight": full(72, 4), "bias": full(72), "activation": "silu"}
    yield "causal_conv1d_step", causal_conv1d_step, {"x": half(3, 72), "state": half(3, 72, 3), **taps}
    positions = torch.tensor([0, 150, 299], device=device)
    mix = {"history": half(3, 300, 2, 24), "positions": positions, "bias": None}
    yield "masked_mix_step", masked_mix_step, {**mix, "weight": full(2, 300, 300)}
    yield "toeplitz_mix_step", toeplitz_mix_step, {**mix, "weight": full(2, 300)}
    for int8 in (False, True):
        token = {"q": half(3, 6, 64), "k": half(3, 2, 64), "v": half(3, 2, 64), "past": half(3, 40, 2, 64)}
        yield f"bounded_attention_step, int8={int8}", _bounded_step, {**token, "int8": int8}


def results(op: Callable[..., Any], arguments: dict[str, Any], implementation: str, backward: bool) -> list[Tensor]:
    """Return the outputs of an op, what it has written into its state, and the gradients of its inputs."""
    given = {
        name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if not backward:
        with torch.no_grad():
            found = op(**given, implementation=implementation)
        return [*_tensors(found), *(given[name] for name in ("state", "conv_state") if name in given)]
    outputs = _tensors(op(**given, implementation=implementation))
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    total = torch.stack([output.float().square().mean() for output in outputs if output.requires_grad]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def _tensors(found: Any) -> list[Tensor]:
    """Return the floating-point tensors of a result."""
    parts = [part for item in found for part in _tensors(item)] if isinstance(found, tuple) else [found]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to the largest entry of its tensor; infinity for what is not finite."""
    errors = [
        float((mine - other).abs().max() / other.abs().max().clamp(min=1e-6))
        for mine, other in zip(*([x.detach().double() for x in each] for each in (actual, expected)), strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run every op once in Triton, forward and backward.")
    parser.add_argument("--length", type=int, default=157, help="tokens of most cases, at least 40")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args(arguments)
    if options.length < 40:
        parser.error(f"--length must be at least 40, got {options.length}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("no CUDA device: set TRITON_INTERPRET=1 to run the kernels on the CPU")
    wrong = 0
    for case, backward in [
        *((case, True) for case in cases(device, options.length)),
        *((case, False) for case in steps(device)),
    ]:
        name, op, given = case
        if options.only not in name:
            continue
        mine = results(op, given, "triton", backward)
        error = difference(mine, results(op, given, "torch", backward))
        wrong += not error <= ALLOWED
        print(
            f"{name}: {'differs' if not error <= ALLOWED else 'agrees'}, {error:.1e} of the largest entry", flush=True
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
