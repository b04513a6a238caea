"""Time `zoo_hybrid` with full attention in every block against the Llama that it was converted from, on the CPU.

Both have the shapes of SmolLM2-135M (30 layers of width 576, 9 query heads, 3 key-value heads, 49,152 tokens) with the
same random weights: time depends on the shapes alone. Their logits are compared first. Then both run in turn in one
process, so that what slows the machine down slows both, and after each round the other one begins:

* decode: one step on a cache of each context, filled with random keys and values, with transformers' dynamic cache and
  with its static one;
* prefill: a row of that length in one call. It grows with the square of the length, so that the longest rows are read
  by the first few layers alone (`--few-layers` and `--whole-prefill`); "layers" in the row says how many.

A row is written per measurement, with the least of all rounds in seconds of CPU and of wall time and
ratio = ours / theirs (below 1: ours is faster):

    {"what", "context", "layers", "rounds", "ours": {"cpu_s", "wall_s"}, "theirs", "ratio_cpu", "ratio_wall", ...}

    python benchmarks/kernels/attention_decode.py
    python benchmarks/kernels/attention_decode.py --contexts 512 --rounds 10
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.load_model import load_model
from ssm_zoo.modeling import ZooHybridForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
LAYERS = 30
# Relative to the largest logit: the same operations in float32, in another order.
AGREEMENT = 1e-4


def pair(layers: int) -> tuple[Any, Any]:
    """A Llama with random weights, and what the project's conversion makes of it."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "llama")
        convert(Path(folder) / "llama", Path(folder) / "zoo", verify=False)
        ours: Any = load_model(Path(folder) / "zoo", ZooHybridForCausalLM)
    return ours, theirs


def check_agreement(ours: Any, theirs: Any) -> None:
    """Exit unless both compute the same logits."""
    ids = torch.randint(SHAPE["vocab_size"], (2, 100))
    found, expected = ours(ids).logits, theirs(ids).logits
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= AGREEMENT:
        raise SystemExit(f"the logits differ by {difference:.1e} of the largest one, accepted: {AGREEMENT:.0e}")


def filled(model: Any, kind: Any, context: int, steps: int) -> Cache:
    """A cache that holds random keys and values of `context` tokens, with room for the steps to come."""
    room: dict[str, Any] = {"max_cache_len": context + steps} if kind is StaticCache else {}
    cache = kind(config=model.config, **room)
    width = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    for layer in range(model.config.num_hidden_layers):
        keys, values = torch.randn(2, 1, SHAPE["num_key_value_heads"], context, width)
        cache.update(keys, values, layer)
    return cache


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], rounds: int, warm_up: int) -> dict[str, Any]:
    """The least times of both sides, and their ratios."""
    sides = {"ours": ours, "theirs": theirs}
    least = {name: {"cpu_s": float("inf"), "wall_s": float("inf")} for name in sides}
    for turn in range(warm_up + rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            cpu, wall = time.process_time(), time.perf_counter()
            sides[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= warm_up:
                least[name]["cpu_s"] = min(least[name]["cpu_s"], cpu)
                least[name]["wall_s"] = min(least[name]["wall_s"], wall)
    ratios = {f"ratio_{kind}": least["ours"][f"{kind}_s"] / least["theirs"][f"{kind}_s"] for kind in ("cpu", "wall")}
    return {"rounds": rounds, **least, **ratios}


def decode(models: tuple[Any, Any], kind: Any, context: int, rounds: int) -> dict[str, Any]:
    """Single steps, each on the tokens of those before."""
    token = torch.tensor([[5]])
    ours, theirs = models
    our_cache, their_cache = (filled(model, kind, context, rounds + 3) for model in models)
    return in_turn(
        lambda: ours(token, cache=our_cache, use_cache=True),
        lambda: theirs(token, cache=their_cache, use_cache=True),
        rounds,
        warm_up=3,
    )


def prefill(models: tuple[Any, Any], context: int, rounds: int) -> dict[str, Any]:
    """Whole rows, without a past."""
    ids = torch.randint(SHAPE["vocab_size"], (1, context))
    ours, theirs = models
    return in_turn(
        lambda: ours(ids, use_cache=True, logits_to_keep=1),
        lambda: theirs(ids, use_cache=True, logits_to_keep=1),
        rounds,
        warm_up=1 if context <= 4096 else 0,
    )


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--rounds", type=positive, default=24, help="rounds of decode steps; a third of them at 32k")
    parser.add_argument("--prefill-rounds", type=positive, default=4, help="rounds of prefill; 2 beyond 4,096 tokens")
    parser.add_argument("--whole-prefill", type=positive, default=2048, help="tokens that all layers read at most")
    parser.add_argument("--few-layers", type=positive, default=2, help="layers that read more than those")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, help="file for the rows; a new one in results/ if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/attention_decode.py", sys.argv[1:])
    output = arguments.output or RESULTS / f"attention_decode-{now:%Y%m%dT%H%M%SZ}.jsonl"
    rows: list[dict[str, object]] = []

    def add(what: str, context: int, layers: int, measured: dict[str, Any]) -> None:
        rows.append({"what": what, "context": context, "layers": layers, **measured, **about})
        ratios = f"{measured['ratio_cpu']:.3f} in CPU time, {measured['ratio_wall']:.3f} in wall time"
        print(f"{what:16} {context:6} tokens, {layers:2} layers: ours / theirs {ratios}", flush=True)
        write_rows(rows, output)

    whole = pair(LAYERS)
    check_agreement(*whole)
    for context in arguments.contexts:
        rounds = arguments.rounds if context < 32768 else max(arguments.rounds // 3, 1)
        for kind, name in ((DynamicCache, "decode, dynamic"), (StaticCache, "decode, static")):
            add(name, context, LAYERS, decode(whole, kind, context, rounds))
    few = pair(arguments.few_layers)
    for context in arguments.contexts:
        models, layers = (whole, LAYERS) if context <= arguments.whole_prefill else (few, arguments.few_layers)
        rounds = arguments.prefill_rounds if context <= 4096 else min(arguments.prefill_rounds, 2)
        add("prefill", context, layers, prefill(models, context, rounds))
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
