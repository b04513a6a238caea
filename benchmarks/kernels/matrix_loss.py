"""Measure memory and time of matrix orientation's loss with its gradients, blockwise and from whole matrices.

Each measurement runs in a process of its own, whose peak of resident memory is read by the system. The memory of a row
is that peak less what the process held before the loss was computed. The sizes are those of one layer of
SmolLM2-135M: 9 heads of 64 channels and a state of 64.

    python benchmarks/kernels/matrix_loss.py --threads 1
    python benchmarks/kernels/matrix_loss.py --threads 1 --lengths 8192 --ways stage --teacher FOLDER --layers 14

With "stage" among the ways, a step of a stage with this objective is measured: teacher, student and AdamW are in
memory, and the peak is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import matplotlib

matplotlib.use("Agg")
import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from matplotlib import pyplot as plt
from process_memory import ALONE, in_a_process, peak_bytes

from ssm_zoo.kernels.matrix_distance import SSDFactors, row_distances, row_distances_reference

HEADS, WIDTH, STATES = 9, 64, 64
WAYS = ("blockwise", "whole", "stage")


def measure_loss(way: str, length: int) -> dict[str, Any]:
    """Compute the loss of one layer and its gradients once."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = [draw(1, length, HEADS, STATES).requires_grad_() for _ in range(2)]
    log_decay = (-0.05 * draw(1, length, HEADS).abs()).requires_grad_()
    skip = draw(HEADS).requires_grad_()
    queries, keys = draw(2, 1, length, HEADS, WIDTH).unbind(0)
    factors, scaling = SSDFactors(log_decay, *maps, skip=skip), WIDTH**-0.5
    before, started = peak_bytes(), time.perf_counter()
    if way == "blockwise":
        distances = row_distances(factors, queries, keys, scaling)
    else:
        scores = torch.einsum("bihp,bjhp->bhij", queries, keys) * scaling
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention = scores.masked_fill(later, -torch.inf).softmax(-1)
        distances = row_distances_reference(factors.matrix(), attention)
    loss = distances.errors.sum(-1).sqrt().mean()
    loss.backward()
    norms = [float(part.grad.norm()) for part in (log_decay, *maps, skip) if part.grad is not None]
    seconds = time.perf_counter() - started
    return {"bytes": peak_bytes() - before, "seconds": seconds, "loss": float(loss.detach()), "gradient_norms": norms}


def measure_stage(length: int, folder: str, layers: list[int]) -> dict[str, Any]:
    """Take one step of a stage of matrix orientation on random tokens."""
    from ssm_zoo.distill.distiller import make_optimizer, trained_parameters
    from ssm_zoo.distill.objectives import objective
    from ssm_zoo.distill.recipe import StageSpec, StudentSpec
    from ssm_zoo.distill.student import build_student
    from ssm_zoo.distill.teacher import load_teacher

    teacher = load_teacher(folder)
    options = {"feature_map": "softplus", "normalize": True, "rotary": True}
    student = build_student(teacher, StudentSpec(**options), layers)
    values = {"tokens": length, "sequence_length": length, "batch_size": 1, "learning_rate": 1e-3}
    stage = StageSpec(name="a", objective="matrix_orientation", **values)
    mixers, others = trained_parameters(student, "mixers", layers)
    student.requires_grad_(False)
    for parameter in mixers.values():
        parameter.requires_grad_(True)
    optimizer, _ = make_optimizer(stage, mixers, others)
    vocabulary = int(teacher.zoo_config.vocab_size)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    loss = objective(stage, student, teacher, layers)(ids)
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - started
    return {"bytes": peak_bytes(), "seconds": seconds, "loss": float(loss.detach()), "layers": layers}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory and time over the length."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    for axis, (key, unit, label) in zip(
        axes, (("bytes", 2**20, "MiB beyond the inputs"), ("seconds", 1, "s")), strict=True
    ):
        for index, way in enumerate(WAYS):
            here = [row for row in rows if row["way"] == way]
            if here:
                points = [row["length"] for row in here], [row[key] / unit for row in here]
                axis.plot(*points, f"C{index}o-", label={"whole": "whole matrices"}.get(way, way))
        axis.set(xlabel="L", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"Matrix orientation, loss and gradients of one layer: {HEADS} heads, float32\n{rows[0]['hardware']}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="matrix_loss.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["blockwise", "whole"])
    parser.add_argument("--whole-up-to", type=positive, default=4096, help="longest sequence with whole matrices")
    parser.add_argument("--teacher", help="folder of a teacher, for stage")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="converted layers, for stage")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(ALONE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if "stage" in options.ways and options.teacher is None:
        parser.error("--teacher must be given with --ways stage")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.alone:
        (way,), (length,) = options.ways, options.lengths
        stage = way == "stage"
        row = measure_stage(length, options.teacher, options.layers) if stage else measure_loss(way, length)
        print(json.dumps(row))
        return
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/matrix_loss.py", arguments)
    path = options.output / f"matrix_loss-{now:%Y%m%dT%H%M%SZ}.jsonl"
    shared = [] if options.threads is None else ["--threads", str(options.threads)]
    if options.teacher is not None:
        shared += ["--teacher", options.teacher, "--layers", *map(str, options.layers)]
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        for length in sorted(options.lengths):
            if way == "whole" and length > options.whole_up_to:
                continue
            measured = in_a_process(__file__, ["--ways", way, "--lengths", str(length), *shared])
            rows.append({"way": way, "length": length, "heads": HEADS, "state_size": STATES, **measured, **about})
            print(
                f"{way:10} L {length:5}   {measured['bytes'] / 2**20:8.1f} MiB   {measured['seconds']:7.2f} s",
                flush=True,
            )
            write_rows(rows, path)
    print(f"wrote {path}")
    if drawn := [row for row in rows if row["way"] != "stage"]:
        draw(drawn, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
