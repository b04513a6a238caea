"""Time a token of generation on the CPU against the time that the model's weights take to be read.

A step of one row reads every weight once and multiplies it once: on a CPU it is bound by memory, if nothing else takes
time. Models of the size of SmolLM2-135M, untrained, after a short prompt:

* "llama": transformers' Llama, the yardstick;
* "zoo_mamba2", "zoo_mamba": the sizes of the published 130M checkpoints;
* the other names: `zoo_hybrid` with SmolLM2's blocks, all of whose token mixers are of this kind.

Every model takes its steps in float32, with torch's matrix products and with oneDNN's (`fast_products`), and in
bfloat16; those of `--compiled`, which takes a minute or two for each, are also compiled (`torch.compile`). In turn with
a step, two measurements of the same weights are made: the layers' matrix products on one row, without anything between
them, and the reading of the bytes, whose rate is that of a product of a matrix of 256 MiB with a vector. `of_limit` is
the time of the reading divided by the step's. `operations` lists what a step spends its time on, by the profiler, as
shares of all operations' own time; what is missing to the step's time is Python's.

    python benchmarks/kernels/cpu_decode.py --threads 1
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, quartiles, write_rows
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssm_zoo.evaluation.decoding import held_bytes
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.modeling import ZooHybridConfig, ZooMamba2Config, ZooMambaConfig
from ssm_zoo.modeling.token_mixers import TOKEN_MIXERS

PROMPT, WARM_UP, PROFILED = 64, 4, 5  # the second step compiles a graph for all lengths
# Dtype of the weights; whether float32 matrices are multiplied by oneDNN, as those of bfloat16 are; whether compiled.
WAYS = {
    "float32": (torch.float32, False, False),
    "float32, oneDNN": (torch.float32, True, False),
    "float32, oneDNN, compiled": (torch.float32, True, True),
    "bfloat16": (torch.bfloat16, False, False),
}
COMPILED = ["llama", "zoo_mamba2", "zoo_mamba", "discrete_mamba2"]
# SmolLM2-135M's.
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MATRIX = 8192  # rows and columns of the matrix whose reading is timed


def configurations() -> dict[str, PreTrainedConfig]:
    """Return the models' configurations by name."""
    found: dict[str, PreTrainedConfig] = {
        "llama": AutoConfig.for_model("llama", **SIZES),
        "zoo_mamba2": ZooMamba2Config(**ZooMamba2Config.presets["mamba2-130m"]),
        "zoo_mamba": ZooMambaConfig(**ZooMambaConfig.presets["mamba-130m"]),
    }
    for kind in TOKEN_MIXERS:
        found[kind] = ZooHybridConfig(**SIZES, mixer_types=[kind] * SIZES["num_hidden_layers"])  # type: ignore[arg-type]
    return found


def read_weights(model: PreTrainedModel) -> int:
    """Return the bytes of the weights of matrix products, all of which a step reads once."""
    weights = {id(each.weight): each.weight for each in model.modules() if isinstance(each, nn.Linear)}
    return sum(each.numel() * each.element_size() for each in weights.values())


class Generation:
    """A model that has read a prompt, and what is timed.

    Args:
        config: of the model, whose weights are drawn.
        dtype: of the weights; what models keep in float32 stays so.
        onednn: whether float32 matrices are multiplied by oneDNN.
        compiled: whether the model is compiled for its steps.

    Attributes:
        seconds: by what is timed, "step" or "products".
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, onednn: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        self.onednn = onednn
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.token = torch.randint(100, (1, 1))
        self.linear = [each for each in self.model.modules() if isinstance(each, nn.Linear)]
        self.rows = [torch.randn(1, each.in_features).to(each.weight.dtype) for each in self.linear]
        with torch.no_grad():
            prompt = torch.randint(100, (1, PROMPT))
            output = self.model(prompt, use_cache=True, logits_to_keep=1)
        # Before 5.24, transformers' models know the older name only.
        known = "cache" in inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if known else "past_key_values"
        self.cache = output[self.cache_name]
        self._call = torch.compile(self.model) if compiled else self.model
        self.seconds: dict[str, list[float]] = {"step": [], "products": []}

    @torch.no_grad()
    def step(self) -> Tensor:
        return self._call(self.token, use_cache=True, **{self.cache_name: self.cache}).logits

    @torch.no_grad()
    def products(self) -> None:
        for layer, row in zip(self.linear, self.rows, strict=True):
            layer(row)

    def operations(self) -> list[dict[str, Any]]:
        """Return the operations that take most of a step: name, calls, and share of all operations' own time."""
        with fast_products(self.onednn), profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(PROFILED):
                self.step()
        events = sorted(found.key_averages(), key=lambda one: one.self_cpu_time_total, reverse=True)
        total = sum(one.self_cpu_time_total for one in events)
        return [
            {
                "name": one.key,
                "calls": round(one.count / PROFILED, 1),
                "share": round(one.self_cpu_time_total / total, 4),
            }
            for one in events[:8]
        ]


def timed(run: Callable[[], object], onednn: bool = False) -> float:
    """Return the seconds of CPU time of a run."""
    with fast_products(onednn):
        start = time.process_time()
        run()
        return time.process_time() - start


def measure(config: PreTrainedConfig, steps: int, compiled: bool) -> dict[str, dict[str, Any]]:
    """Return what is measured of a model, by the name of the way; they take turns."""
    torch._dynamo.reset()
    sides = {name: Generation(config, *way) for name, way in WAYS.items() if compiled or not way[2]}
    matrix, vector = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX)
    rates = []
    for index in range(WARM_UP + steps):
        reading = timed(lambda: matrix @ vector)
        times = {
            name: (timed(side.step, side.onednn), timed(side.products, side.onednn)) for name, side in sides.items()
        }
        if index >= WARM_UP:
            rates.append(matrix.numel() * matrix.element_size() / reading)
            for name, (step, products) in times.items():
                sides[name].seconds["step"].append(step)
                sides[name].seconds["products"].append(products)
    rate = quartiles(rates)
    rows = {}
    for name, side in sides.items():
        seconds = {what: quartiles(values) for what, values in side.seconds.items()}
        size = read_weights(side.model)
        rows[name] = {
            "parameters": sum(each.numel() for each in side.model.parameters()),
            "weight_bytes": size,
            "cache_bytes": held_bytes(side.cache),
            "bytes_per_second": rate,
            "limit_seconds": size / rate["median"],
            "seconds": seconds,
            "tokens_per_second": 1 / seconds["step"]["median"],
            "of_limit": size / rate["median"] / seconds["step"]["median"],
            "products_of_step": seconds["products"]["median"] / seconds["step"]["median"],
            "operations": side.operations(),
        }
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the milliseconds of a step and, within it, of its products and of the reading of its weights."""
    figure = Figure(figsize=(11.0, 0.34 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    names = [f"{row['model']}, {row['way']}" for row in rows]
    for label, color, height, value in (
        ("step", "C0", 0.8, lambda row: row["seconds"]["step"]["median"]),
        ("matrix products alone", "C1", 0.5, lambda row: row["seconds"]["products"]["median"]),
        ("reading of the weights", "0.3", 0.2, lambda row: row["limit_seconds"]),
    ):
        axis.barh(names, [1e3 * value(row) for row in rows], height, label=label, color=color)
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds of CPU time", title=f"a token of generation, {rows[0]['hardware']}")
    axis.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    names = list(configurations())
    parser = argparse.ArgumentParser(prog="cpu_decode.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--compiled", nargs="*", choices=names, default=COMPILED, metavar="NAME", help="models that are also compiled"
    )
    parser.add_argument("--steps", type=positive, default=15, help="timed steps of each model and way")
    parser.add_argument("--threads", type=positive, default=1, help="threads, of which the times are added up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/cpu_decode.py", arguments)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for way, row in measure(configurations()[name], options.steps, name in options.compiled).items():
            rows.append({"model": name, "way": way, **row, "prompt": PROMPT, "steps": options.steps, **about})
            print(
                f"{name:20} {way:25} {row['tokens_per_second']:6.1f} tokens/s   step "
                f"{1e3 * row['seconds']['step']['median']:6.1f} ms, products "
                f"{1e3 * row['seconds']['products']['median']:6.1f} ms, reading {1e3 * row['limit_seconds']:6.1f} ms "
                f"({row['of_limit']:.0%} of the limit)",
                flush=True,
            )
    path = options.output / f"cpu_decode-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    draw(rows, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main(sys.argv[1:])
