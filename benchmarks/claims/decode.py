"""Time decode steps and count what the cache holds, from 1 to 64 thousand tokens of context.

The models of `length_models.py`, untrained, of equal size, batch 1. Each reads a row of random tokens in chunks and
keeps a copy of its cache at every context. From these all sides take single steps, at all contexts, in turn: what slows
the machine down for a while slows all. A turn is some steps, of which the first ones find the weights driven out of the
processor's cache by the keys of the others. A time is the median over the steps, the whole model with its head and its
Python. It is CPU time, which other programs do not lengthen much: on one thread of an idle machine it is the wall's.

* Taipan is timed twice, with every token attending and with none: its gate is set. A trained gate lies between, near
  the second. The window is full from the first context on.
* Full attention is timed with both of transformers' caches: `DynamicCache`, which copies all keys and values to add
  one, and `StaticCache`, made for the context and the steps after it, which does not.
* Reading 64 thousand tokens by full attention would take minutes: past `--prefill` tokens its cache is filled with
  repetitions of the keys and values that are in it, and the states of the other layers stay as they are. Time and
  memory depend on neither. Models without full attention read everything.

The bytes are those of the storages behind all tensors of all layers of the cache: a small view of a large tensor counts
as the large one. A row is written per context and side:

    {"context", "arm", "way", "seconds": {"q1", "median", "q3"}, "bytes", "bytes_after_prefill", "read", "chosen", ...}

`bytes` is counted after the steps, `bytes_after_prefill` before them; `read` tokens went through the model, the others
of the context are repetitions.

    python benchmarks/claims/decode.py
    python benchmarks/claims/decode.py --resume benchmarks/results/decode-20261127T120000Z.jsonl

`--resume` measures no context that the file holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive, quartiles
from from_scratch_training import VOCABULARY
from length_models import ARMS, HYBRID, MAMBA2, TAIPAN, TRANSFORMER, make, parameters
from matplotlib.figure import Figure
from result_file import open_results
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from ssm_zoo.evaluation.decoding import extend_cache, held_bytes
from ssm_zoo.modeling.rollback import restore, snapshot

# Steps of each side before those that are timed, and steps of a turn.
WARM_UP, TURN = 3, 7
EVERY, NONE, DYNAMIC, STATIC = "every token attends", "no token attends", "dynamic cache", "static cache"
# Model and way of each side, and how its line is drawn.
SIDES = {
    (TAIPAN, EVERY): "-",
    (TAIPAN, NONE): "--",
    (MAMBA2, DYNAMIC): "-",
    (HYBRID, STATIC): "-",
    (HYBRID, DYNAMIC): "--",
    (TRANSFORMER, STATIC): "-",
    (TRANSFORMER, DYNAMIC): "--",
}


@dataclass(frozen=True)
class Point:
    """A measurement; its fields identify it in a file."""

    context: int
    arm: str
    way: str
    window: int
    chunk: int
    prefill: int
    steps: int


def full_layers(model: PreTrainedModel) -> list[int]:
    """Return the blocks of a model whose cache grows with every token."""
    return [index for index, kind in enumerate(model.config.layer_types) if kind == "full_attention"]


class Side:
    """A model and the cache that it reads into, from context to context.

    Args:
        arm: a key of `ARMS`.
        way: how the model is run, as in `SIDES`.
        window: what a query of Taipan sees.

    Attributes:
        tokens: how many the cache holds.
        read: how many of these went through the model.
    """

    def __init__(self, arm: str, way: str, window: int) -> None:
        self.arm, self.way = arm, way
        self.model = make(arm, VOCABULARY, window, seed=0).eval()
        if arm == TAIPAN:
            self.set_gates(attend=way == EVERY)
        self.cache: Cache = DynamicCache(config=self.model.config)
        self.tokens = self.read = 0

    @torch.no_grad()
    def set_gates(self, *, attend: bool) -> None:
        """Let every token attend, or none."""
        for index, kind in enumerate(self.model.config.layer_types):
            if kind == "zoo_window":
                gate = self.model.backbone.layers[index].mixer.gate
                gate.weight.zero_()
                gate.bias.copy_(torch.tensor([-1.0, 1.0] if attend else [1.0, -1.0]))

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Cache) -> Any:
        """Run a forward over (1, L) tokens, with logits for the last one."""
        return self.model(ids, cache=cache, use_cache=True, logits_to_keep=1)

    def fill(self, ids: Tensor, chunk: int, limit: int) -> None:
        """Read (1, T) tokens on from those in the cache, `chunk` at a time; full attention up to `limit` of them."""
        full = full_layers(self.model)
        end = min(ids.shape[1], max(limit, self.tokens)) if full else ids.shape[1]
        for begin in range(self.tokens, end, chunk):
            self.step(ids[:, begin : min(begin + chunk, end)], self.cache)
        self.read += end - self.tokens
        if end < ids.shape[1]:
            extend_cache(self.cache, ids.shape[1] - end)
        self.tokens = ids.shape[1]

    def ready(self, steps: int) -> Cache:
        """Return a copy of the cache for `steps` steps, a static one if the way says so."""
        saved = snapshot(self.cache)
        if self.way != STATIC:
            cache = DynamicCache(config=self.model.config)
            restore(cache, saved)
            return cache
        cache = StaticCache(config=self.model.config, max_cache_len=self.tokens + steps)
        for index, (state, layer) in enumerate(zip(saved, cache.layers, strict=True)):
            if index in full_layers(self.model):
                layer.update(state["keys"], state["values"])
            else:
                vars(layer).update(state)
        return cache


def measure(points: dict[Point, Side], ids: Tensor) -> dict[Point, dict[str, Any]]:
    """Fill the caches of all contexts, which rise for every side, take the steps in turn, and say what the rows say."""
    (steps,) = {point.steps for point in points}
    rows: dict[Point, dict[str, Any]] = {}
    caches: dict[Point, Cache] = {}
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for point, side in tqdm(points.items(), desc="reading"):
        side.fill(ids[:, : point.context], point.chunk, point.prefill)
        rows[point] = {"read": side.read, "bytes_after_prefill": held_bytes(side.cache)}
        caches[point] = side.ready(WARM_UP + steps)
    for first in tqdm(range(0, WARM_UP + steps, TURN), desc="turns"):
        for point, side in points.items():
            for index in range(first, min(first + TURN, WARM_UP + steps)):
                token = ids[:, point.context + index : point.context + index + 1]
                begin = time.process_time()
                output = side.step(token, caches[point])
                seconds[point].append(time.process_time() - begin)
            rates = getattr(output, "selection_rate", None)
            rows[point]["chosen"] = None if rates is None else float(rates.mean())
    for point, side in points.items():
        rows[point] |= {"seconds": quartiles(seconds[point][WARM_UP:]), "bytes": held_bytes(caches[point])}
        rows[point]["parameters"] = parameters(side.model)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over context, a line for each side."""
    figure = Figure(figsize=(13.0, 5.0), layout="constrained")
    time_of, memory = figure.subplots(1, 2)
    contexts = sorted({row["context"] for row in rows})
    for (arm, way), style in SIDES.items():
        own = sorted((row for row in rows if (row["arm"], row["way"]) == (arm, way)), key=lambda row: row["context"])
        if not own:
            continue
        words, color = ARMS[arm]
        look = {"color": color, "linestyle": style, "marker": "o" if style == "-" else "."}
        label = words if arm == MAMBA2 else f"{words}, {way}"
        x = [row["context"] for row in own]
        middle, low, high = ([1e3 * row["seconds"][name] for row in own] for name in ("median", "q1", "q3"))
        time_of.plot(x, middle, label=label, **look)
        time_of.fill_between(x, low, high, color=color, alpha=0.2)
        memory.plot(x, [row["bytes"] / 2**20 for row in own], label=label, **look)
    for axis in (time_of, memory):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, labels=[f"{context // 1024}k" for context in contexts])
        axis.set_xlabel("tokens of context")
    steps = rows[0]["steps"]
    time_of.set(ylabel="milliseconds of CPU time per token", title=f"a decode step: median and quartiles of {steps}")
    memory.set(ylabel="MiB held by the cache", title="the cache")
    time_of.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decode.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--contexts", type=positive, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens before the steps"
    )
    parser.add_argument("--steps", type=positive, default=32, help="timed steps of each side at a context")
    parser.add_argument("--window", type=positive, default=512, help="tokens that a query of Taipan sees")
    parser.add_argument("--chunk", type=positive, default=512, help="tokens read at once")
    parser.add_argument("--prefill", type=positive, default=16384, help="tokens that full attention reads")
    parser.add_argument("--threads", type=positive, default=1, help="of which the times are added up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    free = ("contexts", "steps", "window", "chunk", "prefill")
    file = open_results(options, parser, "claims/decode.py", arguments, free=free)
    contexts = sorted(set(options.contexts))
    length = contexts[-1] + WARM_UP + options.steps
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    sizes = {name: getattr(options, name) for name in ("window", "chunk", "prefill", "steps")}
    points = [Point(context, arm, way, **sizes) for context in contexts for arm, way in SIDES]
    missing = [point for point in points if file.find(dataclasses.asdict(point)) is None]
    if missing:
        sides = {(arm, way): Side(arm, way, options.window) for arm, way in SIDES}
        found = measure({point: sides[point.arm, point.way] for point in missing}, ids)
        for point, row in found.items():
            file.add({**dataclasses.asdict(point), **row})
            milliseconds, held = 1e3 * row["seconds"]["median"], row["bytes"] / 2**20
            print(f"{point.context:7} {point.arm:12} {point.way:20} {milliseconds:8.2f} ms {held:8.2f} MiB")
    wanted = [file.find(dataclasses.asdict(point)) for point in points]
    draw([row for row in wanted if row is not None], file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
