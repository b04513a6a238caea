"""Pairs per second and peak memory of rerankers by length, scoring and training, beside a Transformer of equal size.

A pair is a row of L random tokens, document and query together, without padding; the models are untrained, and neither
time nor memory depends on that. The arms have as many parameters without the embedding as the Transformer, `zoo_hybrid`
with full attention in every block through SDPA, to 5 %: those with an MLP by its width, the Mambas by the number of
blocks. A reranker reads a pair once and writes nothing, so a state of constant size is no advantage here; expect one
only where attention's squares of L dominate.

* "scoring": a forward pass without gradients.
* "training": forward, localised contrastive loss of groups of 8, backward and a step of AdamW, which keeps two moments.

Every measurement has a process of its own, for its peak memory: on a CUDA device the most bytes that torch allocated,
weights, gradients and moments included; elsewhere the process's peak of resident memory, from which "bytes_before" (the
process with the model, before the first pass) may be subtracted. Times are of whole passes, after one that does not
count: with one thread on a CPU the CPU's, which other programs on the machine change less than the wall's, otherwise
the wall's ("clock").

    {"arm", "mode", "length", "pairs", "parameters", "seconds": {"q1", "median", "q3"}, "pairs_per_second",
     "bytes", "bytes_before", ...}

At the end a table is printed, with the verdicts on the papers' claims (arXiv 2403.18276, arXiv 2412.14354: state-space
models train and score more slowly than Transformers), and a picture is drawn beside the file.

    python benchmarks/kernels/reranking_speed.py --threads 1
    python benchmarks/kernels/reranking_speed.py --lengths 512 2048 8192 --width 1024 --layers 12 --dtype bfloat16
    python benchmarks/kernels/reranking_speed.py --resume benchmarks/results/reranking_speed-20261130T120000Z.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is
sys.path.append(str(Path(__file__).resolve().parents[1] / "claims"))  # where result_file.py is

import torch
from circumstances import RESULTS, positive, quartiles
from process_memory import ALONE, in_a_process, peak_bytes
from reranking_speed_plot import draw_rows
from result_file import open_results
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.modeling import ZooHybridConfig, ZooMamba2Config, ZooMambaConfig, ZooRetNetConfig
from ssm_zoo.training.ranking_losses import LOSSES

TRANSFORMER, MAMBA, MAMBA2, RETNET, HYBRID = "transformer", "mamba", "mamba2", "retnet", "hybrid"
ARMS = (TRANSFORMER, MAMBA, MAMBA2, RETNET, HYBRID)
MODES = ("scoring", "training")
GROUP = 8
_HEAD = 64
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Point:
    """A measurement; its fields identify it in a file."""

    arm: str
    mode: str
    length: int
    pairs: int
    width: int
    layers: int
    vocabulary: int
    dtype: str
    repeats: int
    threads: int = 1


def keys_of(arm: str, point: Point, size: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """Return class and keys of an arm; `size` is the width of its MLP, or the number of blocks of the Mambas."""
    common: dict[str, Any] = {
        "vocab_size": point.vocabulary,
        "hidden_size": point.width,
        "num_hidden_layers": point.layers,
    }
    head = min(_HEAD, point.width // 2)
    heads = {"num_attention_heads": point.width // head}
    if arm == MAMBA:
        return ZooMambaConfig, common | {"num_hidden_layers": size}
    if arm == MAMBA2:
        return ZooMamba2Config, common | {"num_hidden_layers": size, "head_dim": head, "state_size": 64}
    if arm == RETNET:
        heads = {"num_attention_heads": max(1, point.width // (2 * head))}
        return ZooRetNetConfig, common | heads | {"intermediate_size": size}
    mixers = ["full_attention"] * point.layers
    if arm == HYBRID:  # attention in every fourth block, as in published hybrids
        mixers = ["full_attention" if index % 4 == 2 else "mamba2" for index in range(point.layers)]
    longest = max(point.length, 8192)
    own = {"intermediate_size": size, "mixer_types": mixers, "max_position_embeddings": longest}
    return ZooHybridConfig, common | heads | own


def config_of(arm: str, point: Point, size: int) -> PreTrainedConfig:
    """Return the configuration of an arm with one score."""
    kind, keys = keys_of(arm, point, size)
    return kind(**keys, num_labels=1, pad_token_id=None)


def parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters without the embedding."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def equal_size(arm: str, point: Point) -> int:
    """Return the `size` of :func:`keys_of` with which an arm has as many parameters as the Transformer.

    Raises:
        ValueError: if no size comes as near as 5 %.
    """
    usual = 8 * point.width // 3
    if arm == TRANSFORMER:
        return usual
    target = parameters(config_of(TRANSFORMER, point, usual))
    low, high = 1, 4 * usual if arm not in (MAMBA, MAMBA2) else 8 * point.layers
    while low < high:  # the smallest size with the target or more
        middle = (low + high) // 2
        low, high = (low, middle) if parameters(config_of(arm, point, middle)) >= target else (middle + 1, high)
    counts = {size: parameters(config_of(arm, point, size)) for size in (low - 1, low) if size > 0}
    best = min(counts, key=lambda size: abs(counts[size] - target))
    if abs(counts[best] / target - 1) > _TOLERANCE:
        raise ValueError(f"`layers` must allow {arm} to have {target:,} parameters, got {counts[best]:,}.")
    return best


def sized(arm: str, point: Point) -> PreTrainedConfig:
    """Return the configuration of an arm with as many parameters as the Transformer."""
    return config_of(arm, point, equal_size(arm, point))


def contrastive(scores: Tensor) -> Tensor:
    """Return the loss of (pairs, 1) scores, in groups of `GROUP` whose first is the positive."""
    matrix = scores.view(-1, min(GROUP, scores.shape[0]))
    return LOSSES["lce"].mean(matrix, matrix.detach(), torch.ones_like(matrix, dtype=torch.bool), None)


def make_pass(point: Point, model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """Return what is timed."""
    if point.mode == "scoring":
        model.eval()

        @torch.no_grad()
        def score() -> Tensor:
            return model(ids).logits

        return score
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def learn() -> None:
        contrastive(model(ids).logits).backward()
        optimiser.step()
        optimiser.zero_grad()

    return learn


def measure(point: Point) -> dict[str, Any]:
    """Measure in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(point.threads)
    clock = time.process_time if device.type == "cpu" and point.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(sized(point.arm, point), dtype=getattr(torch, point.dtype))
    model.to(device)
    ids = torch.randint(1, point.vocabulary, (point.pairs, point.length), device=device)
    run = make_pass(point, model, ids)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_bytes()
    seconds = []
    for _ in range(1 + point.repeats):
        wait()
        begin = clock()
        run()
        wait()
        seconds.append(clock() - begin)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    spread = quartiles(seconds[1:])
    return {
        "parameters": parameters(model.config),
        "attention": getattr(model.config, "_attn_implementation", None),
        "clock": clock.__name__,
        "seconds": spread,
        "pairs_per_second": point.pairs / spread["median"],
        "bytes": peak,
        "bytes_before": before,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for each row, and its speed relative to the Transformer's."""
    for row in sorted(rows, key=lambda row: (row["mode"], row["length"], ARMS.index(row["arm"]))):
        same = {key: row[key] for key in ("mode", "length", "pairs", "width", "layers", "dtype")}
        peer = next((one for one in rows if (same | {"arm": TRANSFORMER}).items() <= one.items()), None)
        relative = "" if peer is None else f"{row['pairs_per_second'] / peer['pairs_per_second']:8.2f} x"
        print(
            f"{row['mode']:9} {row['length']:6} {row['arm']:12} {row['pairs_per_second']:10.2f} pairs/s {relative} "
            f"{row['bytes'] / 2**20:10,.0f} MiB"
        )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each mode, length and arm: whether it is slower than the Transformer, as the papers claim.

    It is if the quartiles of its times lie above the Transformer's.
    """
    lines = []
    for mode in MODES:
        for length in sorted({row["length"] for row in rows}):
            times = {row["arm"]: row["seconds"] for row in rows if (row["mode"], row["length"]) == (mode, length)}
            peer = times.pop(TRANSFORMER, None)
            if peer is None:
                continue
            for arm, own in times.items():
                slower, faster = own["q1"] > peer["q3"], own["q3"] < peer["q1"]
                verdict = "confirmed" if slower else "refuted" if faster else "undecided"
                lines.append(f"{mode}, {length} tokens: {arm} is slower than the Transformer: {verdict}")
    return lines


def main(arguments: list[str]) -> None:
    """Measure what the file does not hold, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--lengths", nargs="+", type=positive, default=[256, 512, 1024, 2048])
    parser.add_argument("--pairs", type=positive, default=8, help="pairs in a pass; a multiple of 8, or fewer than 8")
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--vocabulary", type=positive, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, help="begin no measurement after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--resume", type=Path, help="result file to continue")
    parser.add_argument(ALONE, dest="alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measure(Point(**json.loads(options.alone)))))
        return
    if options.pairs > GROUP and options.pairs % GROUP:
        parser.error(f"--pairs must be a multiple of {GROUP}, or less, got {options.pairs}")
    free = {"arms", "modes", "lengths", "threads", "alone"}
    results = open_results(options, parser, "kernels/reranking_speed.py", arguments, free=free)
    shared = (options.pairs, options.width, options.layers, options.vocabulary, options.dtype, options.repeats)
    shared = (*shared, options.threads)
    points = [
        Point(arm, mode, length, *shared)
        for length in options.lengths
        for mode in options.modes
        for arm in options.arms
    ]
    rows = [
        results.run(point, lambda point: in_a_process(__file__, [json.dumps(dataclasses.asdict(point))]))
        for point in tqdm(points, desc="points")
    ]
    print_table(rows)
    print("\n".join(verdicts(rows)))
    draw_rows(rows, results.path.with_suffix(".png"))


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
