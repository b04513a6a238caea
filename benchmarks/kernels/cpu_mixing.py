"""Time masked and Toeplitz mixing against dense products of torch, on the CPU, in one process.

The peer of masked mixing multiplies by tril(W), made inside the graph as a model that trains must; a second row has the
floor, a product with W as it is, whose gradient would fill the triangle that is to stay empty. The peer of Toeplitz
mixing multiplies by the matrix made of the weights, or transforms in plain torch. Dense products get the inputs as they
are, or laid out as one matrix before anything is timed; the faster way counts. Rows are those of `cpu_paths.py`, with
"op", "mode", "length", "batch" and "peer" for the plot that is drawn beside them.

    python benchmarks/kernels/cpu_mixing.py --lengths 512 1024 2048 4096 --repeats 5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import matplotlib

matplotlib.use("Agg")
import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from cpu_paths import Case, Run, measure, with_backward, without_gradient
from dense_mixing import (
    Mix,
    as_columns,
    as_rows,
    columns_product,
    rows_product,
    toeplitz_matrix,
    transformed,
    unmasked,
)
from matplotlib import pyplot as plt
from torch import Tensor

from ssm_zoo.kernels.position_mix import masked_mix, toeplitz_mix

WIDTH = 1024
COLUMNS = "inputs as one matrix"
OURS = {"masked_mix": masked_mix, "toeplitz_mix": toeplitz_mix}


def dense(matrix_of: Callable[[Tensor], Tensor]) -> dict[str, Mix]:
    return {"inputs as they are": rows_product(matrix_of), COLUMNS: columns_product(matrix_of)}


FLOOR = "W unmasked"
PEERS: dict[str, dict[str, dict[str, Mix]]] = {
    "masked_mix": {"tril(W)": dense(torch.tril), FLOOR: dense(unmasked)},
    "toeplitz_mix": {"dense": dense(toeplitz_matrix), "rfft": {"": transformed}},
}


@dataclass(frozen=True)
class Comparison:
    """An op at a length in one direction, against a peer."""

    op: str
    mode: str
    length: int
    batch: int
    peer: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode} B{self.batch} L{self.length} H1 d{WIDTH} float32 / {self.peer}"


def run_of(mix: Mix, leaves: tuple[Tensor, Tensor, Tensor], cotangent: Tensor | None, way: str = "") -> Run:
    """Return a run of `mix`, and of its gradients if there is a cotangent; the results are as (B, L, 1, d)."""
    x, weight, bias = leaves
    if way == COLUMNS:
        x, cotangent = as_columns(x), None if cotangent is None else as_columns(cotangent)
    given = (x, weight, bias)
    run = without_gradient(mix, given) if cotangent is None else with_backward(mix, given, cotangent)
    if way != COLUMNS:
        return run

    def as_ours() -> tuple[Tensor, ...]:
        return tuple(as_rows(part, len(leaves[0])) if index < 2 else part for index, part in enumerate(run()))

    return as_ours


def without_weights(run: Run) -> Run:
    """Return y, dx and dbias of a run; the gradient of unmasked weights differs but takes as long."""
    return lambda: tuple(part for index, part in enumerate(run()) if index != 2)


def comparisons(op: str, length: int, tokens: int) -> Iterator[Comparison]:
    """Yield forward, and forward and backward, against each peer."""
    batch = max(tokens // length, 1)
    x, cotangent = torch.randn(2, batch, length, 1, WIDTH).unbind(0)
    shape = (1, length, length) if op == "masked_mix" else (1, length)
    weight = torch.randn(shape) / length**0.5  # so small that outputs are of order 1
    # Lower triangular, so that the floor gives the same outputs.
    leaves = (x, weight.tril() if op == "masked_mix" else weight, torch.randn(1, length))
    for peer, ways in PEERS[op].items():
        for mode, given in (("forward", None), ("forward+backward", cotangent)):
            ours = run_of(OURS[op], leaves, given)
            theirs = {way: run_of(mix, leaves, given, way) for way, mix in ways.items()}
            if peer == FLOOR:
                ours, theirs = without_weights(ours), {way: without_weights(run) for way, run in theirs.items()}
            yield Comparison(op, mode, length, batch, peer, Case(op, ours, theirs))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds over the length, a panel per op and mode."""
    panels = sorted({(row["op"], row["mode"]) for row in rows})
    columns = len({mode for _, mode in panels})
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(6.5 * columns, 8), squeeze=False, layout="constrained"
    )
    for axis, (op, mode) in zip(axes.flat, panels, strict=True):
        here = [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
        peers = list(dict.fromkeys(row["peer"] for row in here))
        first = [row for row in here if row["peer"] == peers[0]]
        lengths = [row["length"] for row in first]
        axis.plot(lengths, [1000 * row["ours_s"] for row in first], "ko-", label="ours")
        for index, peer in enumerate(peers):
            points = [(row["length"], 1000 * row["theirs_s"]) for row in here if row["peer"] == peer]
            axis.plot(*zip(*points, strict=True), f"C{index}.-", label=peer)
        axis.set(title=f"{op}, {mode}", xlabel="L", ylabel="ms, median", xscale="log", yscale="log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.legend(fontsize="small")
    figure.suptitle(f"{rows[0]['hardware']}\nd {WIDTH}, float32, equal tokens at each length", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="cpu_mixing.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--ops", choices=list(PEERS), nargs="+", default=list(PEERS), help="what is timed")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[512, 1024, 2048, 4096], help="tokens of a row")
    parser.add_argument("--tokens", type=positive, default=4096, help="of a batch, which has one row at least")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file and the plot")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/cpu_mixing.py", arguments)
    rows: list[dict[str, Any]] = []
    path = options.output / f"cpu_mixing-{now:%Y%m%dT%H%M%SZ}.jsonl"
    for op in options.ops:
        for length in options.lengths:
            for each in comparisons(op, length, options.tokens):
                kind = {"op": op, "mode": each.mode, "length": length, "batch": each.batch, "peer": each.peer}
                row = {"case": each.name, **kind, **measure(each.case, options.repeats), **about}
                rows.append(row)
                print(
                    f"{op + ' ' + each.mode + f' L{length}':38} ours {row['ours_s']:.2e} s   {each.peer:10} "
                    f"{row['theirs_s']:.2e} s   ratio {row['ratio']:.2f}   {row['theirs_setting']}".rstrip(),
                    flush=True,
                )
                write_rows(rows, path)  # a run that is cut off keeps what it has
    draw(rows, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main(sys.argv[1:])
