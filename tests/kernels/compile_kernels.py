"""Compile every Triton kernel for a compute capability, without a device: `python compile_kernels.py 90`.

Prints a JSON object: name of the kernel -> bytes of shared memory, the most of its variants. The interpreter, which the
other tests use, runs code that the compiler refuses (a variable whose type changes in a loop) or cannot place.
TRITON_INTERPRET must not be set.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "kernels"))

import torch
from offline_compile import OfflineCompiler
from torch import Tensor

from ssm_zoo.kernels.bounded_attention import BoundedMemory, bounded_attention, bounded_attention_step
from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.matrix_distance import SSDFactors, row_distances
from ssm_zoo.kernels.position_mix import masked_mix, masked_mix_step, toeplitz_mix, toeplitz_mix_step
from ssm_zoo.kernels.rms_norm import add_rms_norm, rms_norm
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_step
from ssm_zoo.kernels.ssd import ssd, ssd_log_decay, ssd_log_decay_step, ssd_step
from ssm_zoo.kernels.window_attention import window_attention

B, L, H, P, N, D, K = 1, 4096, 4, 64, 128, 128, 4
OPTIONS: dict[str, Any] = {"implementation": "triton"}


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(sizes, dtype=dtype).requires_grad_()


def run_the_ops(dtype: torch.dtype, everything: bool) -> None:
    """Forward, backward and step of every op, with all its optional arguments or with none."""

    def some(**optional: Any) -> dict[str, Any]:
        return OPTIONS | (optional if everything else {})

    def wide(*sizes: int) -> Tensor:
        return zeros(*sizes, dtype=dtype)

    seq_idx = torch.zeros(B, L, dtype=torch.long)
    x, state, maps = wide(B, L, H, P), zeros(B, H, P, N), wide(B, L, 1, N)
    extras = {"D": zeros(H), "z": wide(B, L, H, P), "initial_state": state, "seq_idx": seq_idx}
    ssd(x, wide(B, L, H), zeros(H), maps, maps, **some(**extras)).sum().backward()
    y, row_sums = ssd_log_decay(x, zeros(B, L, H), maps, maps, row_sums=True, **some(seq_idx=seq_idx))
    (y.sum() + row_sums.sum()).backward()
    x, maps = wide(B, L, D), wide(B, L, 1, 16)
    extras = {"D": zeros(D), "z": wide(B, L, D), "dt_bias": zeros(D), "seq_idx": seq_idx, "dt_softplus": True}
    selective_scan(x, wide(B, L, D), zeros(D, 16), maps, maps, **some(**extras)).sum().backward()
    extras = {"bias": zeros(D), "activation": "silu", "initial_state": wide(B, D, K - 1), "seq_idx": seq_idx}
    y, _ = causal_conv1d(x, zeros(D, K), return_final_state=True, **some(**extras))
    y.sum().backward()
    rms_norm(x, zeros(D), eps=1e-5, **some(z=wide(B, L, D), group_size=D // 2)).sum().backward()
    add_rms_norm(x, wide(B, L, D), zeros(D), eps=1e-5, **OPTIONS)[0].sum().backward()
    index = torch.arange(0, L, 7)
    keys, extras = wide(B, L, H // 2, P), {"seq_idx": seq_idx}
    queries = wide(len(index), H, P)
    window_attention(queries, keys, keys, window=512, index=index, **some(**extras)).sum().backward()
    factors = SSDFactors(wide(B, L, H), *(wide(B, L, H // 2, P) for _ in range(2)))
    if everything:
        factors = factors._replace(scale=zeros(B, L, H), skip=zeros(H), least_sum=1e-6)
    queries = wide(B, L, H, P)
    row_distances(factors, queries, queries, 0.1, **OPTIONS).errors.sum().backward()
    # Features of one row in a tile of columns, or of several.
    heads, width, positions = (1, 128, 512) if everything else (4, 24, 500)
    x = wide(2, positions, heads, width)
    extras = {"bias": zeros(heads, positions), "residual": zeros(2, positions, heads, width)}
    token = torch.zeros(2, dtype=torch.long)
    for mix, step, dimensions in ((masked_mix, masked_mix_step, 2), (toeplitz_mix, toeplitz_mix_step, 1)):
        weight = zeros(heads, *[positions] * dimensions, dtype=torch.float32 if everything else dtype)
        mix(x, weight, **some(**extras)).sum().backward()
        with torch.no_grad():
            step(x, weight, extras["bias"] if everything else None, token, **OPTIONS)
    with torch.no_grad():
        slots, places = [300, 0] if everything else [12, 20], {"window": 32, "sinks": 4}
        rows = sum(slots) + 2 * (32 + 4)
        past = wide(B, rows, P)
        numbers = torch.zeros(B, rows), torch.zeros(B, rows, dtype=torch.long)
        memory = BoundedMemory(past, past, *numbers)
        extras = {"decay": [0.9, 1.0], "softcap": 50.0}
        if everything:
            memory = memory.quantised()
        token = wide(B, 2, P)
        bounded_attention(wide(B, 64, 6, P), *[wide(B, 64, 2, P)] * 2, slots=slots, **places, **some(**extras))
        bounded_attention_step(wide(B, 6, P), token, token, memory, slots=slots, **places, **some(**extras))
        maps = wide(B, 1, N)
        extras = {"D": zeros(H), "z": wide(B, H, P), "dt_bias": zeros(H)}
        ssd_step(state, wide(B, H, P), wide(B, H), zeros(H), maps, maps, **some(**extras))
        rows = zeros(B, H, P + 1, N)
        ssd_log_decay_step(rows, wide(B, H, P), zeros(B, H), maps, maps, row_sums=True, **OPTIONS)
        channels, bias = H * P + 2 * N, zeros(H * P + 2 * N) if everything else None
        extras["dt_softplus"] = True
        token = wide(B, channels), wide(B, channels, K - 1), state, wide(B, H), zeros(channels, K), bias, zeros(H)
        mamba2_step(*token, **some(**extras))
        maps = wide(B, 1, 16)
        extras = {"D": zeros(D), "z": wide(B, D), "dt_bias": zeros(D), "dt_softplus": True}
        selective_scan_step(zeros(B, D, 16), wide(B, D), wide(B, D), zeros(D, 16), maps, maps, **some(**extras))
        causal_conv1d_step(wide(B, D), wide(B, D, K - 1), zeros(D, K), **some(bias=zeros(D), activation="silu"))


def main() -> None:
    compiler, shared = OfflineCompiler(int(sys.argv[1]), processors=132), {}
    for dtype, everything in ((torch.bfloat16, True), (torch.float32, False)):
        # The ops run on real tensors: some select by masks between launches.
        for launch in compiler.record(lambda dtype=dtype, full=everything: run_the_ops(dtype, full), fake=False):
            shared[launch.kernel] = max(shared.get(launch.kernel, 0), launch.binary.shared)
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
