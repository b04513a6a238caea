"""Measure memory and time of logit distillation's loss with its gradients, chunked and with all logits at once.

Each measurement runs in a process of its own, whose peak of resident memory is read by the system. The memory of a row
is that peak less what the process held before the loss was computed; it contains the gradients of the head and of the
hidden states. The usual way computes the logits of both models, and lets autograd do the rest.

    python benchmarks/kernels/logit_memory.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
import torch.nn.functional as F
from circumstances import RESULTS, circumstances, positive, write_rows
from process_memory import ALONE, in_a_process, peak_bytes
from torch import Tensor, nn

from ssm_zoo.distill.logit_losses import chunked_logit_loss

WAYS = ("chunked", "usual")


def usual(mine: Tensor, head: nn.Module, theirs: Tensor, teacher_head: nn.Module) -> Tensor:
    """Compute the forward KL from the logits of all tokens."""
    with torch.no_grad():
        log_teacher = F.log_softmax(teacher_head(theirs), dim=-1).flatten(0, 1)
    log_student = F.log_softmax(head(mine), dim=-1).flatten(0, 1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def measure(way: str, vocabulary: int, width: int, tokens: int) -> dict[str, Any]:
    """Compute the loss and its gradients once, with a trained head."""
    torch.manual_seed(0)
    head, teacher_head = (nn.Linear(width, vocabulary, bias=False) for _ in range(2))
    teacher_head.requires_grad_(False)
    mine, theirs = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
    ids = torch.randint(vocabulary, (1, tokens))
    before, started = peak_bytes(), time.perf_counter()
    if way == "chunked":
        loss = chunked_logit_loss(mine, head, theirs, teacher_head, ids)
    else:
        loss = usual(mine, head, theirs, teacher_head)
    loss.backward()
    assert mine.grad is not None and head.weight.grad is not None
    norms = [float(mine.grad.norm()), float(head.weight.grad.norm())]
    seconds = time.perf_counter() - started
    return {"bytes": peak_bytes() - before, "seconds": seconds, "loss": float(loss.detach()), "gradient_norms": norms}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="logit_memory.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabularies", type=positive, nargs="+", default=[49152, 151936], help="words")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--width", type=positive, default=576, help="channels of the hidden states")
    parser.add_argument("--tokens", type=positive, default=2048, help="tokens of a batch")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(ALONE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.alone:
        (way,), (vocabulary,) = options.ways, options.vocabularies
        print(json.dumps(measure(way, vocabulary, options.width, options.tokens)))
        return
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/logit_memory.py", arguments)
    path = options.output / f"logit_memory-{now:%Y%m%dT%H%M%SZ}.jsonl"
    shared = ["--width", str(options.width), "--tokens", str(options.tokens)]
    shared += [] if options.threads is None else ["--threads", str(options.threads)]
    rows: list[dict[str, Any]] = []
    for vocabulary in options.vocabularies:
        for way in options.ways:
            measured = in_a_process(__file__, ["--ways", way, "--vocabularies", str(vocabulary), *shared])
            sizes = {"vocabulary": vocabulary, "width": options.width, "tokens": options.tokens}
            rows.append({"way": way, **sizes, **measured, **about})
            print(
                f"{way:8} V {vocabulary:6}   {measured['bytes'] / 2**20:8.1f} MiB   {measured['seconds']:6.2f} s",
                flush=True,
            )
            write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
