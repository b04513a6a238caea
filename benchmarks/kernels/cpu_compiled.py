"""Time every token mixer on the CPU: eager and compiled, in float32 and in bfloat16, in one process.

A row is a mixer of `zoo_hybrid`, a block without an MLP, forward or training step (forward and all gradients). Every
variant has the same weights and input. Before it is timed, its results are compared with eager float32, and one graph
without a break must hold the whole block (`torch.compile(fullgraph=True)`). Then the variants take turns.

* "eager float32" and "compiled float32" multiply matrices as torch does, the variants with "oneDNN" by `fast_products`.
* bfloat16: weights, inputs and gradients; what the models keep in float32 stays so. Processors with AMX or AVX-512 BF16
  multiply them directly, others convert them to float32.

    python benchmarks/kernels/cpu_compiled.py --threads 1

The first call of a compiled variant is its compilation, `compile_seconds`, shorter where the compiler's cache
(`TORCHINDUCTOR_CACHE_DIR`) has the code already.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, quartiles, write_rows
from cpu_paths import Run
from torch import Tensor
from transformers import AutoModel

from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.modeling import ZooHybridConfig, ZooHybridModel
from ssm_zoo.modeling.token_mixers import TOKEN_MIXERS

WARM_UP = 2


@dataclass
class Variant:
    """A way to run a mixer.

    Attributes:
        run: its forward or training step; the results are outputs and gradients, at least those of a first call.
        onednn: whether float32 matrices are multiplied by oneDNN.
        compile_seconds: time of its first call beyond the next one.
        difference: largest difference from eager float32, of each result relative to its largest entry.
        seconds: of the runs.
    """

    run: Run
    onednn: bool = False
    compile_seconds: float = 0.0
    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def timed(self) -> tuple[float, tuple[Tensor, ...]]:
        """Return seconds of CPU time of a run, and its results."""
        with fast_products(self.onednn):
            start = time.process_time()
            results = self.run()
            return time.process_time() - start, results


def block(kind: str, width: int, length: int, dtype: torch.dtype) -> ZooHybridModel:
    """Return a model of one block without an MLP, the same for every dtype but for rounding."""
    config = ZooHybridConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=0,
        num_hidden_layers=1,
        mixer_types=[kind],
        mlp_types=["none"],
        num_attention_heads=width // 64,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    made = AutoModel.from_config(config).eval()
    model = AutoModel.from_config(config, dtype=dtype).eval()  # which keeps some parameters in float32
    model.load_state_dict(made.state_dict())
    return model


def forward(model: ZooHybridModel, call: Callable[..., object], x: Tensor) -> Run:
    """Return a run of the forward."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call(inputs_embeds=x, use_cache=False).last_hidden_state,)  # type: ignore[attr-defined]

    return run


def training(model: ZooHybridModel, call: Callable[..., object], x: Tensor) -> Run:
    """Return a run of the forward and of the gradients of its input and of all parameters."""
    x = x.detach().requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    parameters = [each for name, each in model.named_parameters() if "embed" not in name]

    def run() -> tuple[Tensor, ...]:
        y = call(inputs_embeds=x, use_cache=False).last_hidden_state  # type: ignore[attr-defined]
        gradients = torch.autograd.grad(y, [x, *parameters], cotangent, allow_unused=True)
        return (y.detach(), *(each for each in gradients if each is not None))

    return run


def variants(kind: str, width: int, length: int, way: Callable[..., Run]) -> dict[str, Variant]:
    """Return the variants of a mixer, over equal weights."""
    torch._dynamo.reset()
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    found: dict[str, Variant] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, words = block(kind, width, length, dtype), str(dtype).removeprefix("torch.")
        calls = {"eager": model, "compiled": torch.compile(model, fullgraph=True, dynamic=False)}
        for name, call in calls.items():
            found[f"{name} {words}"] = Variant(way(model, call, x.to(dtype)))
            if dtype == torch.float32:
                found[f"{name} {words}, oneDNN"] = Variant(way(model, call, x), onednn=True)
    return found


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference of the results, each relative to its largest entry."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def measure(sides: dict[str, Variant], repeats: int) -> None:
    """Compile, compare and time the variants of a mixer.

    Raises:
        RuntimeError: if float32 results differ by more than 1e-3, or those of bfloat16 by more than one half.
    """
    expected = None
    for name, side in sides.items():
        first, results = side.timed()
        expected = results if expected is None else expected
        side.difference = difference(results, expected)
        limit = 0.5 if "bfloat16" in name else 1e-3
        if not side.difference <= limit:
            raise RuntimeError(f"{name}: results must agree with eager float32 to {limit}, got {side.difference:.1e}")
        again = min(side.timed()[0] for _ in range(WARM_UP))
        side.compile_seconds = max(first - again, 0.0) if name.startswith("compiled") else 0.0
    for _ in range(repeats):
        for side in sides.values():
            side.seconds.append(side.timed()[0])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="cpu_compiled.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixers", nargs="+", choices=list(TOKEN_MIXERS), default=list(TOKEN_MIXERS), metavar="KIND")
    parser.add_argument("--width", type=positive, default=768, help="of the model, a multiple of 64")
    parser.add_argument("--forward", type=positive, default=1024, help="tokens of the forward")
    parser.add_argument("--training", type=positive, default=512, help="tokens of the training step")
    parser.add_argument("--repeats", type=positive, default=7, help="measurements of each variant")
    parser.add_argument("--threads", type=positive, default=1, help="threads, of which the times are added up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.width % 64:
        parser.error(f"--width must be a multiple of 64, got {options.width}")
    torch.set_num_threads(options.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/cpu_compiled.py", arguments)
    rows: list[dict[str, object]] = []
    for kind in options.mixers:
        for step, way, length in (("forward", forward, options.forward), ("training", training, options.training)):
            sides = variants(kind, options.width, length, way)
            measure(sides, options.repeats)
            base = quartiles(sides["eager float32"].seconds)["median"]
            for name, side in sides.items():
                seconds = quartiles(side.seconds)
                rows.append(
                    {
                        "mixer": kind,
                        "step": step,
                        "length": length,
                        "width": options.width,
                        "variant": name,
                        "seconds": seconds,
                        "ratio": base / seconds["median"],
                        "compile_seconds": round(side.compile_seconds, 1),
                        "difference": side.difference,
                        "repeats": options.repeats,
                        **about,
                    }
                )
                print(
                    f"{kind:20} {step:9} {name:24} {1e3 * seconds['median']:8.2f} ms   ratio {rows[-1]['ratio']:.2f}   "
                    f"difference {side.difference:.0e}   compiled in {side.compile_seconds:.0f} s",
                    flush=True,
                )
    path = options.output / f"cpu_compiled-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
