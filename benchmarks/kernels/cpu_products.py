"""Compare float32 matrix products of torch with those of oneDNN (`fast_products`), in one process, in turn.

Layers of three widths by number of rows: forward, gradient of the input and gradient of the weight. A product follows
those of as many other layers as fill 256 MiB, so that a processor's cache does not hold its weight. With `--teacher`
also forward and training step of a whole model, and decode steps.

    python benchmarks/kernels/cpu_products.py --threads 1 --teacher FOLDER

A row has the least CPU time of each side in seconds, and the largest difference relative to the largest value.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssm_zoo.kernels.cpu_products import fast_products, products_pay

WIDTHS = ((576, 1536), (768, 3072), (2048, 2048))
ROWS = (1, 4, 16, 128, 1024)
# Entries of all layers together.
ENTRIES = 2**26
LENGTHS = (256, 1024)


def compare(compute: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Return the least CPU time of both sides, which take turns, and their difference."""
    found: dict[bool, list[float]] = {False: [], True: []}
    results: dict[bool, Tensor] = {}
    for _ in range(repeats + 1):
        for fast in found:
            with fast_products(fast):
                started = time.process_time()
                results[fast] = compute()
                found[fast].append(time.process_time() - started)
    torch_own, fast = (min(found[side][1:]) for side in (False, True))
    difference = (results[True] - results[False]).abs().max() / results[False].abs().max()
    return {"torch": torch_own, "onednn": fast, "ratio": torch_own / fast, "difference": float(difference)}


def layers(repeats: int) -> list[dict[str, Any]]:
    """Return the comparison of single layers, each computed often enough to be timed."""
    rows = []
    for inputs, outputs in WIDTHS:
        weights = [torch.randn(outputs, inputs) for _ in range(ENTRIES // (inputs * outputs))]
        for count in ROWS:
            x, gradient = torch.randn(count, inputs), torch.randn(count, outputs)
            times = min(max(2**32 // (count * inputs * outputs), 2), len(weights))
            products: dict[str, Callable[[Tensor], Tensor]] = {
                "forward": lambda weight, x=x: x @ weight.t(),
                "gradient of the input": lambda weight, gradient=gradient: gradient @ weight,
                "gradient of the weight": lambda _, gradient=gradient, x=x: gradient.t() @ x,
            }
            for name, product in products.items():

                def often(
                    product: Callable[[Tensor], Tensor] = product, read: list[Tensor] = weights[:times]
                ) -> Tensor:
                    return [product(weight) for weight in read][-1]

                work = 2e-9 * count * inputs * outputs * times
                found = compare(often, repeats)
                rows.append(
                    {
                        "what": name,
                        "rows": count,
                        "width": [inputs, outputs],
                        **found,
                        **{f"{side}_gflops": work / found[side] for side in ("torch", "onednn")},
                    }
                )
    return rows


def model_steps(folder: str, repeats: int) -> list[dict[str, Any]]:
    """Return the comparison of a whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for length in LENGTHS:
        ids = torch.randint(model.config.vocab_size, (1, length))

        def forward(ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                return model(ids).logits

        def training(ids: Tensor = ids) -> Tensor:
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return next(model.parameters()).grad.clone()

        for name, step in (("forward", forward), ("training step", training)):
            rows.append({"what": name, "length": length, **compare(step, repeats)})
    with torch.no_grad():
        cache = model(ids[:, :64], use_cache=True).past_key_values

    def decode() -> Tensor:
        with torch.no_grad():
            for _ in range(10):
                logits = model(ids[:, 64:65], past_key_values=cache).logits
                cache.crop(-1)  # so that the next step is the same
        return logits

    rows.append({"what": "10 decode steps", "length": 64, **compare(decode, repeats)})
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a folder or Hub id of a causal language model")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    about = {"on_by_default": products_pay(), **circumstances(now, "kernels/cpu_products.py", arguments)}
    found = layers(options.repeats) + (model_steps(options.teacher, options.repeats) if options.teacher else [])
    write_rows([{**row, **about} for row in found], options.output / f"cpu_products-{now:%Y%m%dT%H%M%SZ}.jsonl")
    for row in found:
        print({name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
