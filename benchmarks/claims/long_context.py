"""Read a million tokens in chunks: time and memory by position, and the logits of a part against an unchunked forward.

Tiny models with random weights, of which none has a cache that grows: Mamba, Mamba-2, RetNet, Taipan, and a hybrid of a
bounded memory and discrete Mamba-2. `generate` reads random tokens with `prefill_chunk_size`. For `--unchunked` tokens
one forward without a cache gives the logits to compare with: of the last token, in float32. A row for each model:

    {"model", "tokens", "chunk", "memory_bytes_before", "rows": [{"start", "end", "read", "seconds", "cache_bytes",
     "memory_bytes"}], "unchunked": {"tokens", "largest_logit", "largest_difference",
     "largest_difference_without_the_past"}, ...}

"memory_bytes" is the most resident memory of the process after a forward, libraries included. "without the past" is the
difference where the last chunk is read alone: how much the state matters.

    python benchmarks/claims/long_context.py
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from result_file import open_results
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssm_zoo.evaluation.by_position import position_bins
from ssm_zoo.evaluation.decoding import held_bytes
from ssm_zoo.harness.machine import resident_memory
from ssm_zoo.modeling import TaipanConfig, ZooHybridConfig, ZooMamba2Config, ZooMambaConfig, ZooRetNetConfig
from ssm_zoo.modeling.cache import CACHE_FIELD
from ssm_zoo.reports.length_plot import draw_length

VOCABULARY, WIDTH = 64, 32
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
MODELS: dict[str, Any] = {
    "mamba": lambda **base: ZooMambaConfig(**base, state_size=8),
    "mamba2": lambda **base: ZooMamba2Config(**base, state_size=16, head_dim=16),
    "retnet": lambda **base: ZooRetNetConfig(
        **base, num_attention_heads=2, head_dim=16, v_head_dim=16, intermediate_size=64
    ),
    "taipan": lambda **base: TaipanConfig(
        **base, **HEADS, sal_layer_idx=[1], sliding_window=64, mamba_head_dim=16, state_size=16
    ),
    "bounded": lambda **base: ZooHybridConfig(**base, **HEADS, mixer_types=["bounded_attention", "discrete_mamba2"]),
}


@dataclass(frozen=True)
class Run:
    """A measurement; its fields identify it in a file."""

    model: str
    tokens: int
    chunk: int


def make(name: str) -> PreTrainedModel:
    """Return a tiny model with seeded random weights."""
    torch.manual_seed(0)
    config = MODELS[name](vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():
        if hasattr(module, "A_log"):  # states that hold thousands of tokens, where they are initialised to hold tens
            module.A_log.data -= 4.0
    return model


class Watched:
    """Counts seconds, memory and bytes of the cache after each forward of a model, in bins that double in size.

    Args:
        model: the model; `close` ends the watch.
        first: end of the first bin.
        tokens: end of the last one.
    """

    def __init__(self, model: PreTrainedModel, first: int, tokens: int) -> None:
        self.rows: list[dict[str, Any]] = [
            {"start": start, "end": end, "read": 0, "seconds": 0.0, "loss": None, "cache_bytes": 0, "memory_bytes": 0}
            for start, end in position_bins(tokens, first)
        ]
        self.before, self.memory_before = time.perf_counter(), resident_memory()
        self.handle = model.register_forward_hook(self.note)

    def note(self, _: Any, __: Any, output: Any) -> None:
        """Note a forward, which belongs to the bin in which it ends."""
        cache, now = getattr(output, CACHE_FIELD), time.perf_counter()
        seen = cache.get_seq_length()
        row = next(row for row in self.rows if seen <= row["end"])
        row["read"] += seen - sum(row["read"] for row in self.rows)
        row["seconds"] += now - self.before
        row["cache_bytes"] = max(row["cache_bytes"], held_bytes(cache))
        row["memory_bytes"] = max(row["memory_bytes"], resident_memory())
        self.before = now

    def close(self) -> None:
        """Stop watching."""
        self.handle.remove()


@torch.no_grad()
def measure(name: str, tokens: int, chunk: int, unchunked: int) -> dict[str, Any]:
    """Read random tokens; return what a row says."""
    model: Any = make(name)
    ids = torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": chunk, "pad_token_id": 0}
    watched = Watched(model, 8 * chunk, tokens)
    model.generate(ids, **options)
    watched.close()
    part = ids[:, : min(unchunked, tokens)]
    whole = model(part, use_cache=False, logits_to_keep=1).logits[0, -1]
    read = model.generate(part, **options, return_dict_in_generate=True, output_logits=True).logits[0][0]
    alone = model(part[:, -chunk:], use_cache=False, logits_to_keep=1).logits[0, -1]
    compared = {
        "tokens": part.shape[1],
        "largest_logit": float(whole.abs().max()),
        "largest_difference": float((read - whole).abs().max()),
        "largest_difference_without_the_past": float((alone - whole).abs().max()),
    }
    return {"memory_bytes_before": watched.memory_before, "rows": watched.rows, "unchunked": compared}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="long_context.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=positive, default=2**20, help="tokens to read")
    parser.add_argument("--chunk", type=positive, default=1024, help="tokens of a forward")
    parser.add_argument("--unchunked", type=positive, default=2**16, help="tokens of the forward without chunks")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = open_results(options, parser, "claims/long_context.py", arguments, free={"models"})
    found = {}
    for name in options.models:
        run = Run(name, options.tokens, options.chunk)
        row = file.run(run, lambda run: measure(run.model, run.tokens, run.chunk, options.unchunked))
        found[name] = row["rows"]
        last, other = row["rows"][-1], row["unchunked"]
        print(
            f"{name:8} {last['read'] / last['seconds']:8.0f} tokens/s, {last['memory_bytes'] / 2**20:6.0f} MiB, "
            f"largest difference of logits {other['largest_difference']:.1e} after {other['tokens']} tokens, "
            f"{other['largest_difference_without_the_past']:.1e} without the past",
            flush=True,
        )
    draw_length(found).savefig(file.path.with_suffix(".png"), dpi=120)
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
