"""Time transformers' own Mamba models with and without `accelerate_transformers()`: on the CPU, in one process.

Both sides are the same model object with the same weights: a block of the published width between embedding and head,
as small as the mixer's share of the time allows. Before they are timed, their logits, losses and gradients are
compared. They are measured in turn, in seconds and in seconds of CPU time, which other work on the machine disturbs
less. transformers' Mamba-2 is measured with the chunk length of the published checkpoints and with its fastest one;
ours chooses its own. A training step is forward, loss, backward and a step of AdamW. transformers' own training step of
Mamba-1 takes tens of seconds at L512: give few repeats. At the end both sides train from the same weights on the same
short rows, and the largest difference of their losses is written.

    python benchmarks/kernels/native_models.py --repeats 3
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ssm_zoo.modeling.native_models import accelerate_transformers

MODEL_TYPES = ("mamba2", "mamba")
VOCABULARY = 512
PEER_CHUNKS = (32, 64, 128, 256)
# Of losses, and of gradients relative to their largest entry; both sides work in float32, in different orders.
AGREEMENT = 1e-4


def model_of(model_type: str, width: int) -> PreTrainedModel:
    """Return a model of one block, with heads of 64 channels in Mamba-2, otherwise of default proportions."""
    sizes = {"num_heads": 2 * width // 64, "head_dim": 64, "n_groups": 1} if model_type == "mamba2" else {}
    configuration = AutoConfig.for_model(
        model_type, hidden_size=width, num_hidden_layers=1, vocab_size=VOCABULARY, **sizes
    )
    return AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)


def forward(model: PreTrainedModel, row: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a run of the forward."""

    def run() -> tuple[Tensor, ...]:
        model.eval()
        with torch.no_grad():
            return (model(row, use_cache=False).logits,)

    return run


def training(model: PreTrainedModel, row: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a run of a training step, whose results are the loss and all gradients before the step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> tuple[Tensor, ...]:
        model.train()
        optimiser.zero_grad()
        loss = model(row, labels=row).loss
        loss.backward()
        optimiser.step()
        return (loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None))

    return run


def timed(model_type: str, ours: bool, run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds and the seconds of CPU time of a run."""
    with accelerate_transformers([model_type] if ours else []):
        start, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, time.process_time() - cpu


def set_chunk(model: PreTrainedModel, size: int) -> None:
    """Set the chunk length of transformers' scan of Mamba-2."""
    for module in model.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = size  # type: ignore[assignment]


def fastest_chunk(model_type: str, model: PreTrainedModel, run: Callable[[], object]) -> int:
    """Return the chunk length with which transformers' run takes least CPU time."""
    trials = {}
    for size in PEER_CHUNKS:
        set_chunk(model, size)
        trials[size] = min(timed(model_type, False, run)[1] for _ in range(3))
    return min(trials, key=trials.__getitem__)


def agreement(model_type: str, model: PreTrainedModel, kind: Callable[..., Callable], row: Tensor) -> float:
    """Return the largest difference of the two sides' results from the same weights, relative to the largest entry.

    Raises:
        RuntimeError: if it is more than `AGREEMENT`.
    """
    found = []
    for ours in (True, False):
        with accelerate_transformers([model_type] if ours else []):
            found.append([each.clone() for each in kind(copy.deepcopy(model), row)()])
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    if not error <= AGREEMENT:
        raise RuntimeError(f"{model_type}: both sides must agree to {AGREEMENT}, differ by {error:.1e}")
    return error


def measure(model_type: str, model: PreTrainedModel, kind: Callable[..., Callable], row: Tensor, repeats: int) -> dict:
    """Return medians of both sides and their ratios, above 1 where ours is faster."""
    error = agreement(model_type, model, kind, row)  # also the first call of each side
    run = kind(model, row)
    sides = {"ours": 0, "theirs": getattr(model.config, "chunk_size", 0)}
    if model_type == "mamba2":
        sides["tuned"] = fastest_chunk(model_type, model, run)
    timed(model_type, True, run)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, chunk in sides.items():
            set_chunk(model, chunk)
            times[side].append(timed(model_type, side == "ours", run))
    wall, cpu = ({side: statistics.median(each[n] for each in times[side]) for side in sides} for n in (0, 1))
    result: dict[str, object] = {"ours_s": wall["ours"], "ours_cpu_s": cpu["ours"]}
    for side in list(sides)[1:]:
        prefix = "" if side == "theirs" else f"{side}_"
        result |= {f"{side}_s": wall[side], f"{prefix}ratio": wall[side] / wall["ours"]}
        result |= {f"{side}_cpu_s": cpu[side], f"{prefix}cpu_ratio": cpu[side] / cpu["ours"]}
        result |= {f"{side}_chunk_size": sides[side]} if sides[side] else {}
    return {**result, "difference": error, "repeats": repeats}


def losses(model_type: str, model: PreTrainedModel, row: Tensor, steps: int) -> dict[str, object]:
    """Return how much the losses of training steps from the same weights differ."""
    found = []
    for ours in (True, False):
        run = training(copy.deepcopy(model), row)
        with accelerate_transformers([model_type] if ours else []):
            found.append([float(run()[0]) for _ in range(steps)])
    return {
        "first_loss": found[1][0],
        "last_loss": found[1][-1],
        "largest_difference": max(abs(a - b) for a, b in zip(*found, strict=True)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="native_models.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", choices=MODEL_TYPES, nargs="+", default=MODEL_TYPES, help="model types")
    parser.add_argument("--width", type=positive, default=768, help="width of the model, a multiple of 64")
    parser.add_argument("--forward", type=positive, default=1024, help="tokens of the forward")
    parser.add_argument("--training", type=positive, default=512, help="tokens of the training step")
    parser.add_argument("--losses", type=positive, default=64, help="tokens of the rows whose losses are compared")
    parser.add_argument("--steps", type=positive, default=20, help="training steps whose losses are compared")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/native_models.py", arguments)
    rows = []
    for model_type in options.models:
        model = model_of(model_type, options.width)
        short, long, text = (
            torch.randint(VOCABULARY, (1, length)) for length in (options.training, options.forward, options.losses)
        )
        for name, kind, row in (("forward", forward, long), ("training step", training, short)):
            case = f"{model_type} {name} L{row.shape[1]}"
            found = measure(model_type, model, kind, row, options.repeats)
            rows.append({"case": f"{case} d{options.width} B1 float32", **found, **about})
            print(
                f"{case:28} ours {found['ours_s']:.3f} s   theirs {found['theirs_s']:.3f} s   ratio "
                f"{found['ratio']:.1f}   of CPU time {found['cpu_ratio']:.1f}"
                + (f"   tuned {found['tuned_cpu_ratio']:.1f}" if "tuned_cpu_ratio" in found else ""),
                flush=True,
            )
        found = losses(model_type, model, text, options.steps)
        case = f"{model_type} losses of {options.steps} steps L{options.losses}"
        rows.append({"case": f"{case} d{options.width} B1 float32", **found, **about})
        print(f"{case:28} largest difference {found['largest_difference']:.1e}", flush=True)
    path = options.output / f"native_models-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
