"""Train `zoo_mamba` and `zoo_mamba2` from scratch beside transformers' own classes of equal size, on real text.

Both sides have the same sizes, data, order, optimiser, schedule and number of steps, and each takes its best learning
rate of the same grid. They compute the same function (the parity tests show it), so what differs is how they start:
ours from the papers' initialisation, theirs from transformers' own. Because of that the grid of the peer runs with its
initial weights in our class, which is several times as fast; its best rate is then run again with transformers' class
itself (`--confirm`), and that curve is the one reported.

    python benchmarks/from_scratch.py --family mamba2 --confirm

Text: WikiText-2's validation part for training, a part of its test text held out (distill/data/wikitext2).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from circumstances import RESULTS, circumstances, positive, write_rows
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssm_zoo.modeling import ZooMamba2Config, ZooMambaConfig, ZooS6ForCausalLM, ZooSSDForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TEXT = Path(__file__).resolve().parents[1] / "distill" / "data" / "wikitext2"
VOCABULARY = 2048
LENGTH = 128
EVALUATE_EVERY = 25


def make(family: str, arm: str, seed: int) -> nn.Module:
    """A freshly initialised model.

    Args:
        family: "mamba" or "mamba2".
        arm: "ours"; "theirs", transformers' class; or "theirs in our class", the same initial weights.
        seed: of the initialisation.
    """
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 6}
    if family == "mamba2":
        common |= {"state_size": 64, "head_dim": 64, "num_heads": 8, "n_groups": 1, "tie_word_embeddings": True}
        ours, theirs = (ZooSSDForCausalLM, ZooMamba2Config), (Mamba2ForCausalLM, Mamba2Config)
    else:
        ours, theirs = (ZooS6ForCausalLM, ZooMambaConfig), (MambaForCausalLM, MambaConfig)
    torch.manual_seed(seed)
    if arm == "ours":
        return ours[0](ours[1](**common))
    peer = theirs[0](theirs[1](**common))
    if arm == "theirs":
        return peer
    model = ours[0](ours[1](**common))
    model.load_state_dict(peer.state_dict())
    return model


def tokens() -> tuple[Tensor, Tensor]:
    """Ids of the training and of the held-out text, by a byte-level BPE learnt from the training text."""
    train, held_out = (
        (TEXT / name).read_text(encoding="utf-8").replace("\r", "") for name in ("train.txt", "heldout.txt")
    )
    tokenizer = ByteLevelBPETokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_text(train, encoding="utf-8")
        tokenizer.train([str(path)], vocab_size=VOCABULARY, show_progress=False)
    return torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)


def batches(ids: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """(batch, LENGTH + 1) windows: epochs of all windows, each in an order of its own."""
    windows = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        yield windows[order[:batch]]
        order = order[batch:]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, batch: int) -> float:
    model.eval()
    windows = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    total = sum(float(loss_of(model, part)) * len(part) for part in windows.split(batch))
    model.train()
    return total / len(windows)


def train(model: nn.Module, data: tuple[Tensor, Tensor], rate: float, options: argparse.Namespace, name: str) -> dict:
    """Train and return the curve: AdamW, decay 0.1 of matrices, clip 1, warm-up of 10 %, cosine to a tenth."""
    decayed = [p for key, p in model.named_parameters() if p.dim() > 1 and not key.endswith("A_log")]
    kept = [p for key, p in model.named_parameters() if p.dim() <= 1 or key.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(options.steps // 10, 1)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(options.steps - warmup, 1))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    curve, begin = [], time.perf_counter()
    held_out = data[1][: options.held_out + 1]
    model.train()
    stream = batches(data[0], options.batch, options.steps, options.seed)
    bar = tqdm(stream, total=options.steps, desc=name, mininterval=2)
    for step, windows in enumerate(bar):
        loss = loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == options.steps:
            curve.append({"step": step + 1, "train": float(loss), "held_out": held_out_loss(model, held_out, 32)})
            bar.set_postfix(held_out=f"{curve[-1]['held_out']:.3f}")
    return {"rate": rate, "curve": curve, "held_out": curve[-1]["held_out"], "seconds": time.perf_counter() - begin}


def compare(family: str, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> list[dict]:
    """All runs of a family; the last one of each side, of its best learning rate, is marked `"best"`."""
    runs = []
    for arm in ("ours", "theirs in our class"):
        side = []
        for rate in options.rates:
            model = make(family, arm, options.seed)
            result = train(model, data, rate, options, f"{family}, {arm}, {rate:g}")
            side.append({"family": family, "arm": arm, "parameters": count(model), **result, "best": False})
        best = min(side, key=lambda run: run["held_out"])
        best["best"] = arm == "ours" or not options.confirm
        runs += side
        if arm != "ours" and options.confirm:
            model = make(family, "theirs", options.seed)
            result = train(model, data, best["rate"], options, f"{family}, theirs, {best['rate']:g}")
            runs.append({"family": family, "arm": "theirs", "parameters": count(model), **result, "best": True})
    return runs


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def plot(runs: list[dict], path: Path) -> None:
    families = sorted({run["family"] for run in runs})
    figure, axes = plt.subplots(1, len(families), figsize=(6 * len(families), 4), squeeze=False)
    for family, axis in zip(families, axes[0], strict=True):
        for run in (run for run in runs if run["family"] == family):
            ours = run["arm"] == "ours"
            steps, losses = zip(*[(point["step"], point["held_out"]) for point in run["curve"]], strict=True)
            label = f"{run['arm']}, rate {run['rate']:g}: {run['held_out']:.3f}" if run["best"] else None
            axis.plot(steps, losses, color="C0" if ours else "C1", alpha=1 if run["best"] else 0.25, label=label)
        axis.set(title=f"{family}: {runs[0]['parameters'] / 1e6:.1f} M parameters", xlabel="step")
        axis.set_ylabel("held-out loss, nats per token")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="from_scratch.py", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--family", choices=["mamba", "mamba2"], nargs="+", default=["mamba", "mamba2"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="grid of learning rates")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=8, help=f"windows of {LENGTH} tokens a step")
    parser.add_argument("--held-out", type=positive, default=16 * 1024, help="tokens to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--confirm", action="store_true", help="run the peer's best rate with transformers' own class")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "from_scratch.py", arguments)
    data = tokens()
    rows: list[dict] = []
    path = options.output / f"from_scratch-{now:%Y%m%dT%H%M%SZ}.jsonl"
    for family in options.family:
        rows += [{**run, **about} for run in compare(family, data, options)]
        write_rows(rows, path)
        plot(rows, path.with_suffix(".png"))
    best = [{key: run[key] for key in ("family", "arm", "rate", "held_out", "seconds")} for run in rows if run["best"]]
    print(json.dumps(best, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
