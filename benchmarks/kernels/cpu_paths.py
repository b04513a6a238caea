"""Time the torch paths of our ops against the torch paths of transformers' Mamba-2, on the CPU, in one process.

Every case runs both sides on the same inputs, first checks that they agree, and then measures them in turn: what
slows the machine down slows both. The peer is tuned first: its scan runs with the fastest of several chunk
lengths, ours with its default. A row is written per case:

    {"case", "ours_s", "theirs_s", "ratio", "hardware", "versions", "date", "command", ...}

with the medians in seconds and ratio = theirs_s / ours_s (above 1: ours is faster).

    python benchmarks/kernels/cpu_paths.py --lengths 64 512 --repeats 20
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import torch.nn.functional as F
from circumstances import RESULTS, circumstances, positive, write_rows
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from ssm_zoo.kernels.rms_norm import rms_norm
from ssm_zoo.kernels.ssd import ssd, ssd_step

Run = Callable[[], tuple[Tensor, ...]]

PEER_CHUNKS = (32, 64, 128, 256)
# Relative to the largest entry of a result. Both sides work in float32, in different orders.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Shape:
    """Sizes of one mixer: H heads of width P, N states, G groups, K taps."""

    heads: int
    head_width: int
    state: int
    groups: int
    taps: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_width

    @property
    def channels(self) -> int:
        """Return width of the convolution: x, B and C side by side."""
        return self.inner + 2 * self.groups * self.state

    def __str__(self) -> str:
        return f"H{self.heads} P{self.head_width} N{self.state} G{self.groups}"


SHAPES = {
    "mamba2-130m": Shape(heads=24, head_width=64, state=128, groups=1),  # the published checkpoint's mixer
    "smollm2-135m": Shape(heads=9, head_width=64, state=64, groups=3),  # its attention, as a distilled mixer
}


@dataclass(frozen=True)
class Case:
    name: str
    ours: Run
    peers: dict[str, Run]  # settings of the peer -> the run; the fastest is the one that counts


def peer(name: str) -> Callable[..., Tensor]:
    """Return transformers' torch function, whatever faster package it would otherwise call."""
    if not hasattr(modeling_mamba2, name):
        raise SystemExit(
            f"cpu_paths: transformers {version('transformers')} has no {modeling_mamba2.__name__}.{name}; "
            "this benchmark was written against 5.23"
        )
    return inspect.unwrap(getattr(modeling_mamba2, name))


def with_backward(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...], cotangent: Tensor) -> Run:
    """Return a run of `forward(*leaves)` and of its gradients with respect to all `leaves`."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def run() -> tuple[Tensor, ...]:
        y = forward(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    return run


def without_gradient(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Run:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(*leaves),)

    return run


def both_ways(
    name: str,
    ours: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
    leaves: tuple[Tensor, ...],
    cotangent: Tensor,
) -> Iterator[Case]:
    """Yield the case without gradients and the case with them."""
    yield Case(
        f"{name} forward",
        without_gradient(ours, leaves),
        {setting: without_gradient(forward, leaves) for setting, forward in peers.items()},
    )
    yield Case(
        f"{name} forward+backward",
        with_backward(ours, leaves, cotangent),
        {setting: with_backward(forward, leaves, cotangent) for setting, forward in peers.items()},
    )


def scan_cases(shape: Shape, length: int) -> Iterator[Case]:
    x = torch.randn(1, length, shape.heads, shape.head_width)
    dt = torch.randn(1, length, shape.heads)
    A = -torch.linspace(1, 16, shape.heads)
    B = torch.randn(1, length, shape.groups, shape.state)
    C = torch.randn(1, length, shape.groups, shape.state)
    D = torch.ones(shape.heads)
    # The step sizes a fresh Mamba-2 starts with: 0.001 to 0.1 over the heads.
    dt_bias = torch.expm1(torch.logspace(-3, -1, shape.heads)).log()
    chunk_scan = peer("mamba2_chunk_scan")

    def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        y = ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)
        assert isinstance(y, Tensor)
        return y

    def theirs(chunk_size: int) -> Callable[..., Tensor]:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
            return chunk_scan(x, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)

        return run

    # A chunk beyond the length only adds padding; keep the shortest that holds the row.
    chunks = [q for q in PEER_CHUNKS if q <= length] or [PEER_CHUNKS[0]]
    yield from both_ways(
        "ssd",
        ours,
        {f"chunk_size={q}": theirs(q) for q in chunks},
        (x, dt, A, B, C, D, dt_bias),
        torch.randn_like(x),
    )


def convolution_cases(shape: Shape, length: int) -> Iterator[Case]:
    x = torch.randn(1, length, shape.channels)
    weight = torch.randn(shape.channels, shape.taps)
    bias = torch.randn(shape.channels)
    convolve = peer("causal_conv1d_fn")

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = causal_conv1d(x, weight, bias, activation="silu")
        assert isinstance(y, Tensor)
        return y

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Its mixer transposes to channels first and back around the convolution, as views.
        return convolve(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    yield from both_ways("causal_conv1d", ours, {"": theirs}, (x, weight, bias), torch.randn_like(x))


def norm_cases(shape: Shape, length: int) -> Iterator[Case]:
    x, z = torch.randn(2, 1, length, shape.inner).unbind(0)
    norm = modeling_mamba2.MambaRMSNormGated(shape.inner, group_size=shape.inner, eps=1e-5)
    weight = torch.randn(shape.inner)

    def ours(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5, z=z)

    def theirs(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x, z))

    yield from both_ways("rms_norm gated", ours, {"": theirs}, (x, z, weight), torch.randn_like(x))


def step_cases(shape: Shape) -> Iterator[Case]:
    """Yield one token of generation, which updates the recurrent state in place, on both sides from the same start."""
    x = torch.randn(1, shape.heads, shape.head_width)
    dt = F.softplus(torch.randn(1, shape.heads) - 4)
    A = -torch.linspace(1, 16, shape.heads)
    B, C = torch.randn(2, 1, shape.groups, shape.state).unbind(0)
    D = torch.ones(shape.heads)
    state = torch.randn(1, shape.heads, shape.head_width, shape.state)
    our_state, their_state = state.clone(), state.clone()
    update = peer("mamba2_selective_state_update")

    def ours() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (ssd_step(our_state, x, dt, A, B, C, D=D),)

    def theirs() -> tuple[Tensor, ...]:
        # The broadcast views that its mixer passes.
        wide_dt = dt[..., None].expand(-1, -1, shape.head_width)
        wide_A = A[:, None, None].expand(-1, shape.head_width, shape.state)
        with torch.no_grad():
            return (update(their_state, x, wide_dt, wide_A, B, C, D[:, None].expand(-1, shape.head_width)),)

    yield Case("ssd_step", ours, {"": theirs})


def cases(shape: Shape, lengths: list[int]) -> Iterator[tuple[int, Case]]:
    """Yield (length, case); the inputs of a case exist while it is the current one."""
    for case in step_cases(shape):
        yield 1, case
    for length in lengths:
        for case in itertools.chain(
            scan_cases(shape, length), convolution_cases(shape, length), norm_cases(shape, length)
        ):
            yield length, case


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def disagreement(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest error of the results, each relative to its largest entry."""
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True))


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Check that both sides agree, choose the peer's fastest setting, and time both in turn.

    Raises:
        RuntimeError: if the results differ by more than `AGREEMENT`.
    """
    result = case.ours()
    for setting, theirs in case.peers.items():
        # The first call of either side, so a step starts from the same state here; later calls only warm up.
        error = disagreement(result, theirs())
        if not error <= AGREEMENT:
            raise RuntimeError(f"{case.name}: ours and theirs {setting} differ by {error:.1e}, at most {AGREEMENT}")
    for _ in range(3):
        case.ours()  # warmed up as often as each setting of the peer
    trials = {name: min(seconds(run) for _ in range(3)) for name, run in case.peers.items()}
    setting = min(trials, key=trials.__getitem__)
    theirs = case.peers[setting]
    ours_s, theirs_s = [], []
    for _ in range(repeats):
        ours_s.append(seconds(case.ours))
        theirs_s.append(seconds(theirs))
    ours_median, theirs_median = statistics.median(ours_s), statistics.median(theirs_s)
    return {
        "ours_s": ours_median,
        "theirs_s": theirs_median,
        "ratio": theirs_median / ours_median,
        "theirs_setting": setting,
        "repeats": repeats,
    }


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cpu_paths.py",
        description="Time the torch paths of the ops against transformers' Mamba-2 on the CPU.",
    )
    parser.add_argument("--lengths", type=positive, nargs="+", default=[64, 512], help="tokens of the row")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mamba2-130m", help="sizes of the mixer")
    parser.add_argument("--repeats", type=positive, default=20, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/cpu_paths.py", arguments)
    rows: list[dict[str, object]] = []
    for length, case in cases(shape, options.lengths):
        name = f"{case.name} {options.shape} ({shape}) B1 L{length} float32"
        row = {"case": name, **measure(case, options.repeats), **about}
        rows.append(row)
        print(
            f"{case.name + f' L{length}':36} ours {row['ours_s']:.2e} s   theirs {row['theirs_s']:.2e} s   "
            f"ratio {row['ratio']:.2f}   {row['theirs_setting']}".rstrip(),
            flush=True,
        )
    path = options.output / f"cpu_paths-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
