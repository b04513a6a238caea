"""Time the decode step of a bounded memory on the CPU against softmax attention over all tokens of a context.

The sizes are those of a layer of SmolLM2-135M (width 576, 9 query heads, 3 key-value heads of 64 channels) with 340
rows for each key-value head, unevenly divided:

* step: `bounded_attention_step` with a memory of 8-bit integers and of float32, beside torch's
  `scaled_dot_product_attention` of one query over float32 keys and values of the context;
* layer: a one-layer `zoo_hybrid` without its LM head, beside the same with full attention and a dynamic cache.

A measurement is a round of 16 steps, a chunk of the memory with one eviction. Both sides run in turn in one process;
a row has the least of all rounds in seconds per step, and ratio = ours / theirs (below 1: ours is faster):

    {"what", "kv_dtype", "context", "rounds", "ours": {"cpu_s", "wall_s"}, "theirs", "ratio_cpu", "ratio_wall", ...}

    python benchmarks/kernels/bounded_step.py
    python benchmarks/kernels/bounded_step.py --contexts 2048 --rounds 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from attention_decode import SHAPE, filled, in_turn
from circumstances import RESULTS, circumstances, positive, write_rows
from torch import Tensor
from transformers import DynamicCache

from ssm_zoo.kernels.bounded_attention import bounded_attention, bounded_attention_step
from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM

HEADS, GROUPS, WIDTH, CHUNK = 9, 3, 64, 16
MEMORY: dict[str, Any] = {"window": 32, "sinks": 4, "chunk_size": CHUNK}
SLOTS, DECAYS = [200, 304, 408], [1.0, 0.998, 0.99]
KV_DTYPES = {"int8": "int8", "float32": "auto"}
PROMPT = 1024  # fills the memory


def step(kv_dtype: str, context: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A round of steps of the op, and of attention over a context."""
    options = MEMORY | {"slots": SLOTS, "decay": DECAYS}
    _, memory = bounded_attention(
        *(torch.randn(1, PROMPT, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)), **options
    )
    if kv_dtype == "int8":
        memory = memory.quantised()
    tokens = [tuple(torch.randn(1, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)) for _ in range(CHUNK)]
    keys, values = torch.randn(2, 1, GROUPS, context, WIDTH)

    def attend(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    return (
        lambda: [bounded_attention_step(*token, memory, **options) for token in tokens],
        lambda: [attend(q) for q, _, _ in tokens],
    )


def layer(kv_dtype: str, context: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A round of steps of one layer, with a memory and with full attention."""
    settings = MEMORY | {"slots": [SLOTS], "score_decay": [DECAYS], "kv_dtype": KV_DTYPES[kv_dtype]}
    shape = SHAPE | {"num_hidden_layers": 1}
    bounded: Any = ZooHybridForCausalLM(
        ZooHybridConfig(**shape, mixer_types=["bounded_attention"], bounded_attention=settings)
    ).eval()
    full: Any = ZooHybridForCausalLM(ZooHybridConfig(**shape, mixer_types=["full_attention"])).eval()
    ids = torch.randint(SHAPE["vocab_size"], (1, PROMPT))
    cache = bounded.backbone(ids, use_cache=True).past_key_values
    past = filled(full, DynamicCache, context, 0)
    token = torch.tensor([[5]])

    def whole() -> None:
        for _ in range(CHUNK):
            full.backbone(token, cache=past, use_cache=True)
        past.crop(-CHUNK)

    return lambda: [bounded.backbone(token, cache=cache, use_cache=True) for _ in range(CHUNK)], whole


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, help="file for the rows; a new one in results/ if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/bounded_step.py", sys.argv[1:])
    output = arguments.output or RESULTS / f"bounded_step-{now:%Y%m%dT%H%M%SZ}.jsonl"
    rows: list[dict[str, object]] = []
    for what, make in (("step", step), ("layer", layer)):
        for kv_dtype in KV_DTYPES:
            for context in arguments.contexts:
                measured = in_turn(*make(kv_dtype, context), arguments.rounds, warm_up=3)
                for side in ("ours", "theirs"):
                    measured[side] = {name: seconds / CHUNK for name, seconds in measured[side].items()}
                rows.append({"what": what, "kv_dtype": kv_dtype, "context": context, **measured, **about})
                ours, theirs = (1e6 * measured[side]["cpu_s"] for side in ("ours", "theirs"))
                print(
                    f"{what:5} {kv_dtype:8} {context:6} tokens: {ours:6.0f} us, attention {theirs:6.0f} us", flush=True
                )
                write_rows(rows, output)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
