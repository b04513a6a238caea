"""Time training on packed rows against training on padded batches, of the same documents, in one process.

The documents are the paragraphs of WikiText-2's validation part (distill/data/wikitext2), tokenised with a byte-level
BPE learnt from them, cut at the length of a row. A side goes over all of them, forward and backward; a batch is a
forward. The peer pads batches of documents to their longest: in random order, as is usual, and in order of length,
which is its best case and costs it the randomness of its batches. All sides hold the same targets, and it is checked:
the mean loss over all targets has to agree. They are timed in turn. A row is written per family and peer:

    {"case", "packed_s", "padded_s", "ratio", "packed_tokens_per_s", "padded_tokens_per_s", "filled", ...}

with the medians in seconds, ratio = padded_s / packed_s (above 1: packing is faster), real tokens (not padding) per
second, and the share of each side's room that real tokens fill.

    python benchmarks/kernels/packing.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from matplotlib.figure import Figure
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedModel

from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2ForCausalLM, ZooMambaConfig, ZooMambaForCausalLM
from ssm_zoo.training.packing import PackedDocuments, RowCollator

TEXT = Path(__file__).resolve().parents[2] / "distill" / "data" / "wikitext2" / "train.txt"
VOCABULARY = 2048
# Relative, of the mean loss. The sides add up in other orders.
AGREEMENT = 1e-4

Batch = dict[str, Tensor]


def documents(count: int) -> list[Tensor]:
    """Return ids of `count` paragraphs, drawn at random; headings are left out."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(TEXT)], vocab_size=VOCABULARY, show_progress=False)
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    paragraphs = [line for line in lines if line.strip() and not line.startswith("=")]
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(0))
    return [torch.tensor(tokenizer.encode(paragraphs[index]).ids) for index in order[:count].tolist()]


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4}
    if family == "mamba2":
        return ZooMamba2ForCausalLM(ZooMamba2Config(**common, state_size=64, head_dim=64))
    return ZooMambaForCausalLM(ZooMambaConfig(**common))


def batches(rows: PackedDocuments, size: int, *, by_length: bool = False) -> list[Batch]:
    """Return the rows in batches of `size`, in the order in which they are or in that of their length."""
    items = [rows[index] for index in range(len(rows))]
    if by_length:
        items.sort(key=lambda row: len(row["input_ids"]))
    return [RowCollator()(items[start : start + size]) for start in range(0, len(items), size)]


def sides(ids: list[Tensor], row: int, size: int) -> tuple[int, int, dict[str, list[Batch]]]:
    """Return numbers of real tokens and of targets, and the batches of each side.

    A padded batch gets as many documents as give it, on average, the room of a packed one.
    """
    packed, alone = PackedDocuments(ids, row), PackedDocuments(ids, row, packing=False)
    many = max(1, round(size * row / (alone.tokens / len(alone))))
    found = {"packed": batches(packed, size), "padded": batches(alone, many)}
    return packed.tokens, packed.targets, found | {"padded, by length": batches(alone, many, by_length=True)}


def train(model: PreTrainedModel, side: list[Batch], targets: int) -> tuple[float, float]:
    """Return the seconds of all forwards and backwards, and the mean loss."""
    total, start = 0.0, time.perf_counter()
    for batch in side:
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=targets).loss
        loss.backward()
        total += loss.item()
    return time.perf_counter() - start, total


def filled(side: list[Batch], tokens: int) -> float:
    return tokens / sum(batch["input_ids"].numel() for batch in side)


def measure(family: str, ids: list[Tensor], options: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row for each peer.

    Raises:
        RuntimeError: if the losses of the sides do not agree.
    """
    model = make(family).train()
    tokens, targets, found = sides(ids, options.row, options.batch)
    losses = {name: train(model, side, targets)[1] for name, side in found.items()}  # warms up, too
    if max(losses.values()) - min(losses.values()) > AGREEMENT * losses["packed"]:
        raise RuntimeError(f"{family}: the sides' losses differ: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats):
        for name, side in found.items():
            seconds[name].append(train(model, side, targets)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    packed = medians.pop("packed")
    return [
        {
            "case": f"{family} forward+backward, {len(ids)} paragraphs, rows of {options.row}, {name}",
            "family": family,
            "peer": name,
            "packed_s": packed,
            "padded_s": padded,
            "ratio": padded / packed,
            "packed_tokens_per_s": tokens / packed,
            "padded_tokens_per_s": tokens / padded,
            "filled": {"packed": filled(found["packed"], tokens), "padded": filled(found[name], tokens)},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens": tokens,
            "repeats": options.repeats,
        }
        for name, padded in medians.items()
    ]


def plot(rows: list[dict[str, Any]], lengths: list[int], path: Path) -> None:
    """Return real tokens per second of every side, and the lengths of the documents."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    bars, histogram = figure.subplots(1, 2)
    families = list(dict.fromkeys(row["family"] for row in rows))
    for index, family in enumerate(families):
        own = [row for row in rows if row["family"] == family]
        values = {"packed": own[0]["packed_tokens_per_s"]} | {row["peer"]: row["padded_tokens_per_s"] for row in own}
        for place, (name, value) in enumerate(values.items()):
            drawn = bars.bar(index + 0.27 * (place - 1), value, 0.25, color=f"C{place}", label=None if index else name)
            bars.bar_label(drawn, fmt="%.0f")
    bars.set_xticks(range(len(families)), labels=families)
    bars.set_ylabel("real tokens per second, forward and backward")
    bars.margins(y=0.25)
    bars.legend()
    histogram.hist(lengths, bins=40, color="C7")
    histogram.set(xlabel="tokens of a document", ylabel="documents")
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="packing.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--family", choices=["mamba", "mamba2"], nargs="+", default=["mamba", "mamba2"])
    parser.add_argument("--documents", type=positive, default=150)
    parser.add_argument("--row", type=positive, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=positive, default=4, help="packed rows in a batch")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/packing.py", arguments)
    ids = documents(options.documents)
    rows: list[dict[str, object]] = []
    for family in options.family:
        for row in measure(family, ids, options):
            rows.append({**row, **about})
            print(
                f"{row['case']:84} {row['packed_tokens_per_s']:8.0f} {row['padded_tokens_per_s']:8.0f} tokens/s", end=""
            )
            print(f"   ratio {row['ratio']:.2f}", flush=True)
    path = options.output / f"packing-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    plot(rows, [len(part) for part in ids], path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
