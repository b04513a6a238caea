"""Measure what other choices of slots, and a far state, would add to a bounded memory of equal rows, without training.

The recipe's student (all layers, 340 rows of 8 bits, slots and decays divided by `divide_slots`) is simulated with the
whole key-value matrix in memory, so that any rule can choose what stays visible:

    received     the recipe: attention received so far, with the head's decay, times the norm of the value
    peak         the largest attention received from one query, in place of the sum
    pooled       the sum, averaged over a position and its two neighbours on both sides
    gate         a learned gate: ridge regression from a token's hidden state to the logarithm of the attention that it
                 will receive after it has left the window, fitted on training text
    gate+received  the same with the logarithm of the attention received until it leaves the window among the inputs
    prior-K      attention received, plus K times the gate's guess of what a query to come will give
    oracle       the attention that the token will receive: what no causal rule can know, the bound of all gates
    far          the recipe and, under the same normaliser, a state of all evicted tokens with softplus features,
                 as linear attention sums them; a gain per query head, the best of a grid on training text
    far-mean     the same with the exact attention mass of the evicted tokens, but their mean value (an oracle)

    python benchmarks/claims/far_memory.py TEACHER --threads 2 --seeds 1 2 3

Scored as in bounded_memory.py: KL and agreement in held-out windows, loss on a passage repeated after 1,500 tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from bounded_memory import TOKENS, read, scores
from circumstances import RESULTS, positive
from result_file import open_results, option_values
from torch import Tensor
from torch.nn import functional as F

from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.slots import LENGTH, WINDOWS, divide_slots
from ssm_zoo.distill.student import build_student, set_slots
from ssm_zoo.distill.teacher import load_teacher
from ssm_zoo.kernels.cpu_products import fast_products
from ssm_zoo.modeling.bounded_memory import BoundedAttention

RULES = ("received", "peak", "pooled", "gate", "gate+received", "prior-64", "prior-256", "prior-1024", "oracle")
FAR = ("far", "far-mean")
FITTING = 4  # windows of LENGTH tokens on which gates and gains are fitted
GAINS = (0.0, *(math.exp(power) for power in range(-8, 5, 2)))
RIDGE = 1e-2  # of the mean square of the inputs
TINY = 1e-6


@dataclass
class Layer:
    """Fitted values of a layer: (KV, D + 1) or (KV, D + 2) gates by rule, and (H) gains of the far state."""

    gates: dict[str, Tensor] = field(default_factory=dict)
    gains: Tensor | None = None


class Simulation:
    """Attention over a bounded memory by a rule, with the whole past in memory.

    Args:
        rule: one of RULES.
        fitted: what was fitted, by layer.
        watch: called with (layer, simulation inputs, outputs) after each layer, for the fits.
    """

    def __init__(self, rule: str, fitted: dict[int, Layer], watch: Callable[..., None] | None = None) -> None:
        self.rule, self.fitted, self.watch = rule, fitted, watch

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let every bounded attention of this process run by the rule."""
        simulation = self
        original = BoundedAttention.forward

        def forward(mixer: Any, hidden_states: Tensor, sequence: Any, *_args: Any) -> tuple[Tensor, None]:
            q, k, v = mixer._projections(hidden_states, sequence)
            k, v = mixer._rounded(k, v)
            rows = [simulation.run(mixer, *(x[row].float() for x in (hidden_states, q, k, v))) for row in range(len(q))]
            return mixer.o_proj(torch.stack(rows).flatten(2)), None

        BoundedAttention.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            BoundedAttention.forward = original

    def run(self, mixer: Any, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(L, D) hidden states, (L, H, P) queries, (L, KV, P) keys and values to (L, H, P) outputs."""
        options = mixer._options(list(range(mixer.num_kv_heads)))
        L, KV, P = k.shape
        J, C, w = q.shape[1] // KV, options["chunk_size"], options["window"]
        queries = q.unflatten(1, (KV, J)).permute(1, 2, 0, 3) * options["scale"]  # (KV, J, L, P)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (KV, L, P)
        norms, decay = values.norm(dim=-1), torch.tensor(options["decay"])
        slots = torch.tensor(options["slots"])
        fitted = self.fitted.get(mixer.layer_idx, Layer())
        future = None
        if self.rule == "oracle" or self.watch is not None:
            future = attention_to_come(queries, keys, C)
        kind, _, strength = self.rule.partition("-")
        gates, static = fitted.gates.get("gate" if kind == "prior" else self.rule), None
        if gates is not None:
            static = (gate_inputs(hidden, None) @ gates[:, : hidden.shape[1] + 1].T).T  # (KV, L)
        alive = torch.zeros(KV, L, dtype=torch.bool)
        scores, peaks, exits = torch.zeros(KV, L), torch.zeros(KV, L), torch.zeros(KV, L)
        out = q.new_zeros(KV, J, L, P)
        position = torch.arange(L)
        for chunk in range(-(-L // C)):
            begin, end = chunk * C, min((chunk + 1) * C, L)
            oldest = max((chunk + 1) * C - w, 0)
            products = queries[:, :, begin:end].flatten(1, 2) @ keys[:, :end].mT  # (KV, J C, end)
            near = (position[:end] >= oldest) & (position[:end] <= position[begin:end, None])  # (C, end)
            seen = (alive[:, None, :end] | near).repeat(1, J, 1)  # (KV, J C, end)
            weights, states = self._weights(products, seen, queries[:, :, begin:end], keys[:, :end], begin, fitted)
            out[:, :, begin:end] = (weights @ values[:, :end]).view(KV, J, -1, P)
            if states is not None:
                out[:, :, begin:end] += states(values[:, :end]).view(KV, J, -1, P)
            ages = (begin + C - 1 - position[begin:end]).repeat(J)
            scores *= decay[:, None] ** C
            scores[:, :end] += ((decay[:, None] ** ages)[:, None] @ (weights * seen))[:, 0]
            peaks[:, :end] = torch.maximum(peaks[:, :end], (weights * seen).amax(1))
            leaving = (position >= oldest) & (position < min((chunk + 2) * C - w, L))
            exits = torch.where(leaving, (scores * norms + TINY).log(), exits)
            if self.rule == "oracle":
                priority = future[:, chunk] * norms
            elif kind == "prior":
                assert static is not None
                priority = scores * norms + float(strength) * static.exp()
            elif static is not None and gates is not None:
                weight = gates[:, hidden.shape[1] + 1 :]
                priority = static + (weight * exits if weight.shape[1] else 0.0)
            elif self.rule == "peak":
                priority = peaks * norms
            elif self.rule == "pooled":
                priority = F.avg_pool1d((scores * norms)[:, None], 5, 1, 2)[:, 0]
            else:
                priority = scores * norms
            there = (alive | leaving) & (position >= options["sinks"])
            order = priority.masked_fill(~there, -math.inf).argsort(dim=1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, position.expand(KV, -1))
            alive = there & (rank < slots[:, None])
            alive |= (position < options["sinks"]) & (position < min((chunk + 2) * C - w, L))
        if self.watch is not None:
            self.watch(mixer, hidden, queries, keys, values, future, norms, out)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _weights(
        self, products: Tensor, seen: Tensor, queries: Tensor, keys: Tensor, begin: int, fitted: Layer
    ) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """Return the (KV, J C, end) weights of what is seen, and a function of the values for the far part."""
        if not self.rule.startswith("far"):
            return products.masked_fill(~seen, -math.inf).softmax(-1), None
        KV, J, C, _ = queries.shape
        causal = torch.arange(keys.shape[1]) <= begin + torch.arange(C)[:, None]
        evicted = causal.repeat(J, 1) & ~seen
        top = products.masked_fill(~(seen | evicted), -math.inf).amax(-1, keepdim=True)
        near = (products - top).exp() * seen
        if self.rule == "far-mean":
            mass = ((products - top).exp() * evicted).sum(-1, keepdim=True)
            far = mass * evicted / evicted.sum(-1, keepdim=True).clamp(min=1)
        else:
            features = F.softplus(queries.flatten(1, 2)) @ F.softplus(keys).mT
            gains = torch.zeros(KV * J) if fitted.gains is None else fitted.gains
            far = gains.view(KV, J, 1).expand(-1, -1, C).reshape(KV, J * C, 1) * (-top).exp() * features * evicted
        total = (near + far).sum(-1, keepdim=True)
        return near / total, lambda values: (far / total) @ values


def attention_to_come(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """(KV, J, L, P), (KV, L, P) to (KV, n, L): what exact attention gives to each token after each chunk."""
    KV, J, L, _ = queries.shape
    count = -(-L // chunk)
    sums = keys.new_zeros(KV, count + 1, L)
    position = torch.arange(L)
    for number in range(count):
        part = slice(number * chunk, min((number + 1) * chunk, L))
        products = queries[:, :, part].flatten(1, 2) @ keys.mT
        causal = (position <= position[part, None]).repeat(J, 1)
        sums[:, number] = products.masked_fill(~causal, -math.inf).softmax(-1).sum(1)
    return sums.flip(1).cumsum(1).flip(1)[:, 1:]


def gate_inputs(hidden: Tensor, exits: Tensor | None) -> Tensor:
    """(L, D) hidden states, and (L) values, to the (L, D + 1 or D + 2) inputs of a gate."""
    parts = [hidden, torch.ones(len(hidden), 1)]
    return torch.cat(parts if exits is None else [*parts, exits[:, None]], dim=1)


class Fits:
    """Sums of the regressions of all gates over the windows of `watch`: squares of inputs, products and targets."""

    def __init__(self) -> None:
        self.gates: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self.targets: dict[tuple[str, int, int], Tensor] = {}

    def watch(
        self,
        mixer: Any,
        hidden: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        future: Tensor,
        norms: Tensor,
        _out: Tensor,
    ) -> None:
        """Add a window."""
        options = mixer._options(list(range(mixer.num_kv_heads)))
        C, w, L = options["chunk_size"], options["window"], len(hidden)
        # A token's attention until it leaves the window, and after it; the last tokens have too little future.
        position = torch.arange(L - 256)
        leaves = ((position + w) // C - 1).clamp(min=0)  # the chunk at whose end it leaves
        first = future[:, 0] + _first_chunk(queries, keys, C)
        for head in range(len(keys)):
            after = future[head, leaves, position] * norms[head, position]
            before = (first[head, position] - future[head, leaves, position]) * norms[head, position]
            remaining = (L - (leaves + 1) * C).float()
            target = (after / remaining + TINY).log()
            for rule, exits in (("gate", None), ("gate+received", (before.clamp(min=0) + TINY).log())):
                inputs = gate_inputs(hidden[: L - 256], exits).double()
                key, zero = (rule, mixer.layer_idx, head), torch.zeros((), dtype=torch.float64)
                square, right = self.gates.get(key, (zero, zero))
                self.gates[key] = square + inputs.T @ inputs, right + inputs.T @ target.double()
                self.targets[key] = self.targets.get(key, zero) + target.double().square().sum()

    def solve(self) -> dict[int, Layer]:
        """Return the gates of all layers."""
        fitted: dict[int, Layer] = {}
        for (rule, layer, head), (square, right) in self.gates.items():
            ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square))
            weight = torch.linalg.solve(square + ridge.double(), right).float()
            gates = fitted.setdefault(layer, Layer()).gates
            gates[rule] = torch.cat([gates[rule], weight[None]]) if head else weight[None]
        return fitted


def _first_chunk(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """(KV, L) attention that the first chunk's queries give."""
    part = queries[:, :, :chunk]
    products = part.flatten(1, 2) @ keys.mT
    causal = (torch.arange(keys.shape[1]) <= torch.arange(part.shape[2])[:, None]).repeat(queries.shape[1], 1)
    return products.masked_fill(~causal, -math.inf).softmax(-1).sum(1)


def fit_gains(student: Any, fitted: dict[int, Layer], windows: Tensor) -> None:
    """Give each query head the gain with which its output is nearest to exact attention, on the recipe's own stream."""
    errors: dict[int, Tensor] = {}

    def watch(mixer: Any, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *_rest: Any) -> None:
        KV, J, L, P = queries.shape
        position = torch.arange(L)
        exact = torch.empty(KV, J, L, P)
        for part in position.split(256):
            products = queries[:, :, part].flatten(1, 2) @ keys.mT
            causal = (position <= part[:, None]).repeat(J, 1)
            weights = products.masked_fill(~causal, -math.inf).softmax(-1)
            exact[:, :, part] = (weights @ values).view(KV, J, -1, P)
        row = errors.setdefault(mixer.layer_idx, torch.zeros(len(GAINS), KV * J))
        q, k, v = (x for x in (queries / mixer.scaling, keys, values))
        for number, gain in enumerate(GAINS):
            trial = Simulation("far", {mixer.layer_idx: Layer(gains=torch.full((KV * J,), gain))})
            found = trial.run(mixer, hidden, q.permute(2, 0, 1, 3).flatten(1, 2), k.transpose(0, 1), v.transpose(0, 1))
            difference = found - exact.permute(2, 0, 1, 3).flatten(1, 2)
            row[number] += difference.square().sum((0, 2))

    with Simulation("received", {}, watch).installed(), torch.no_grad():
        for window in windows:
            student(input_ids=window[None], use_cache=False)
    for layer, row in errors.items():
        fitted.setdefault(layer, Layer()).gains = torch.tensor(GAINS)[row.argmin(0)]
    used = torch.stack([fitted[layer].gains > 0 for layer in errors])
    least = torch.stack([row.amin(0) / row[0].clamp(min=TINY) for row in errors.values()])
    print(f"far state: {int(used.sum())} of {used.numel()} heads use it; median error left {float(least.median()):.4f}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("--rules", nargs="+", choices=[*RULES, *FAR], default=[*RULES, *FAR])
    parser.add_argument("--rows", type=positive, default=340)
    parser.add_argument("--kv-dtype", choices=["auto", "int8"], default="int8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the windows that all is fitted on")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[2048])
    parser.add_argument("--tokens", type=positive, default=TOKENS)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument("--resume", type=Path, help="a file of an earlier start")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = open_results(options, parser, "claims/far_memory.py", arguments, free=vars(options))
    common = option_values(options, ("rows", "kv_dtype", "teacher", "lengths", "tokens"))
    results.complete(common, parser)
    teacher = load_teacher(options.teacher)
    train, text = (read("builtin:wikitext2", split, teacher) for split in ("train", "heldout"))
    layers = list(range(teacher.num_layers))
    for seed in options.seeds:
        todo = [rule for rule in options.rules if not results.find({"rule": rule, "seed": seed, **common})]
        if not todo:
            continue
        student = build_student(
            teacher, StudentSpec(mixer="bounded_attention", rows=options.rows, kv_dtype=options.kv_dtype), layers
        )
        settings = student.config.settings_of("bounded_attention")
        windows = train.batch(0, WINDOWS, LENGTH, seed)
        set_slots(student, *divide_slots(teacher, layers, settings, options.rows, windows))
        fits, fitted = Fits(), {}
        if any(rule.startswith(("gate", "prior")) for rule in todo):
            with Simulation("received", {}, fits.watch).installed(), torch.no_grad():
                for window in train.batch(1, FITTING, LENGTH, seed):
                    student(input_ids=window[None], use_cache=False)
            fitted = fits.solve()
        if "far" in todo:
            fit_gains(student, fitted, train.batch(1, 1, LENGTH, seed))
        for rule in todo:
            started, row = time.monotonic(), {"rule": rule, "seed": seed, **common}
            with Simulation(rule, fitted).installed():
                row |= scores(student, teacher, text, options.lengths, options.tokens)
            print(results.add({**row, "seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    with fast_products():
        main(sys.argv[1:])
