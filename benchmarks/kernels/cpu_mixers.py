"""Time a whole mixer of Mamba-1 and of Mamba-2 against transformers' own: eager torch, on the CPU, in one process.

Both sides hold the same weights, agree on the same inputs before they are timed, and are measured in turn. Rows are
those of `cpu_paths.py`; the peer runs as transformers runs it where no other package is installed. Its Mamba-1 backward
takes tens of seconds at L512: give few repeats.

Both sides compute the same projections. `projections_s` is the time of these alone, and `ratio_without` the ratio of
what is left of both sides' times. `--onednn` lets both sides multiply by oneDNN (`fast_products`).

    python benchmarks/kernels/cpu_mixers.py --repeats 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import torch.nn.functional as F
from circumstances import RESULTS, circumstances, positive, write_rows
from cpu_paths import Case, Run, measure, seconds, with_backward, without_gradient
from mixers import mamba1_parts, mamba2_parts
from torch import Tensor

from ssm_zoo.kernels.cpu_products import fast_products

# Of the published 130M checkpoints.
WIDTH = 768


Side = Callable[[Tensor, dict[str, Tensor]], Tensor]


def run_of(side: Side, x: Tensor, parameters: dict[str, Tensor]) -> Run:
    """Return a run of the mixer."""
    return without_gradient(lambda x: side(x, parameters), (x,))


def training(side: Side, x: Tensor, parameters: dict[str, Tensor], cotangent: Tensor) -> Run:
    """Return a run of the mixer and of its gradients with respect to its input and every parameter."""

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return side(x, dict(zip(parameters, values, strict=True)))

    return with_backward(forward, (x, *parameters.values()), cotangent)


def projections(parameters: dict[str, Tensor], length: int, backward: bool) -> Run:
    """Return a run of the mixer's linear layers alone, with the gradients of their inputs and weights if `backward`."""
    weights = [value.detach() for name, value in parameters.items() if name.endswith("proj.weight")]
    inputs = [torch.randn(1, length, weight.shape[1]) for weight in weights]
    cotangents = [torch.randn(1, length, weight.shape[0]) for weight in weights]
    leaves = [leaf.requires_grad_(backward) for leaf in (*inputs, *weights)]

    def run() -> tuple[Tensor, ...]:
        outputs = [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
        return torch.autograd.grad(outputs, leaves, cotangents) if backward else tuple(outputs)

    return run


def cases(forward: list[int], backward: list[int]) -> Iterator[tuple[Case, Run]]:
    """Yield each case with the run of its projections."""
    for name, parts in (("mamba2 mixer", mamba2_parts(WIDTH)), ("mamba1 mixer", mamba1_parts(WIDTH))):
        parameters = parts.parameters(torch.float32, torch.device("cpu"))
        for length in forward:
            x = torch.randn(1, length, WIDTH)
            mine, peer = (run_of(side, x, parameters) for side in (parts.ours, parts.theirs))
            yield Case(f"{name} forward L{length}", mine, {"": peer}), projections(parameters, length, False)
        for length in backward:
            x, cotangent = torch.randn(1, length, WIDTH), torch.randn(1, length, WIDTH)
            mine, peer = (training(side, x, parameters, cotangent) for side in (parts.ours, parts.theirs))
            yield Case(f"{name} forward+backward L{length}", mine, {"": peer}), projections(parameters, length, True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="cpu_mixers.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--forward", type=positive, nargs="+", default=[1024], help="lengths of the forward")
    parser.add_argument("--backward", type=positive, nargs="+", default=[512], help="lengths of forward and backward")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--onednn", action="store_true", help="float32 matrix products of both sides by oneDNN")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    rows = []
    with fast_products(options.onednn):
        about = circumstances(now, "kernels/cpu_mixers.py", arguments)
        for case, linear in cases(options.forward, options.backward):
            row = {"case": f"{case.name} d{WIDTH} B1 float32", **measure(case, options.repeats)}
            alone = min(seconds(linear) for _ in range(options.repeats + 1))
            without = (row["theirs_s"] - alone) / (row["ours_s"] - alone)
            rows.append({**row, "projections_s": alone, "ratio_without": without, **about})
            print(
                f"{case.name:36} ours {row['ours_s']:.2e} s   theirs {row['theirs_s']:.2e} s   "
                f"ratio {row['ratio']:.2f}   projections {alone:.2e} s, ratio without them {without:.2f}",
                flush=True,
            )
    path = options.output / f"cpu_mixers-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
