"""Tokens per second of greedy decoding with drafts, against one token at a time, on a prompt that asks for a copy.

The students are the teacher with other mixers in some layers, not trained: a bounded memory in all layers, whose rows
hold the whole prompt, so that the student copies as the teacher does; and discrete Mamba-2 in every second layer, which
writes nothing sensible, but repeats itself. Each decodes the same number of tokens in four ways, in turn:

* `plain`: one token at a time;
* `lookup`: `generate(prompt_lookup_num_tokens=...)`;
* `right`: drafts that are always right, the most that any draft can give;
* `wrong`: drafts of which no token is right: the price of verifying a draft and taking it back.

All ways must give the same tokens. Times are of `generate` as a whole, less that of the prompt: a `generate` of one
token, measured in the same turn. A row is written for each student and way:

    {"student", "way", "tokens", "draft", "prompt_tokens", "forwards", "seconds": {"q1", "median", "q3"}, "cpu_seconds":
     {...}, "speedup", "cpu_speedup", "same", ...}

`seconds` are those of a new token, and a speed-up is the median over turns of the ratio to `plain` in the same turn.

    python benchmarks/claims/assisted.py TEACHER

The speed-ups are drawn beside the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import matplotlib
import torch
from circumstances import RESULTS, positive, quartiles
from result_file import open_results
from torch import Tensor
from transformers import PreTrainedModel

from ssm_zoo.distill.recipe import StudentSpec, resolve_layers
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher, load_teacher

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STUDENTS: dict[str, dict[str, Any]] = {
    "bounded": {"layers": "all", "mixer": "bounded_attention", "rows": 512, "slots": "equal"},
    "hybrid": {"layers": "odd"},
}
WAYS = ("plain", "lookup", "right", "wrong")
PASSAGE = """The harbour of Vellin has three piers. The northern pier belongs to the fishermen, who leave at four in the
morning and return before noon. The middle pier is for the ferries to Orsay, Tamble and Quint; the fare is nine crowns,
or five for children under twelve. The southern pier, built in 1871 by the engineer Maud Teller, has been closed since
the storm of 1998, and only gulls and a watchman named Ruben live there. Every spring the council votes on repairing it,
and every spring the vote fails by two hands."""


@dataclass(frozen=True)
class Run:
    """A measurement; its fields identify it in a file."""

    student: str
    way: str
    tokens: int
    draft: int
    turns: int


class Drafts:
    """A candidate generator of transformers that knows the (1, T) text to come, and drafts it or other tokens."""

    requires_model_outputs = False

    def __init__(self, text: Tensor, length: int, *, right: bool) -> None:
        self.text = text if right else (text + 1) % int(text.max() + 1)
        self.length = length

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        start = input_ids.shape[1]
        # The last token is the model's own: a draft of it would be one too many.
        draft = self.text[:, start : min(start + self.length, self.text.shape[1] - 1)]
        return torch.cat([input_ids, draft], dim=1), None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Do nothing: the length of a draft is fixed."""


def decode(model: PreTrainedModel, ids: Tensor, tokens: int, way: str, draft: int, text: Tensor | None) -> Tensor:
    """Return the (1, T) prompt and its greedy continuation of `tokens` tokens, in one of the ways."""
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    generator: Any = model
    if way == "plain":
        return generator.generate(ids, **options)
    if text is not None and way in ("right", "wrong"):
        generator._get_candidate_generator = lambda **_: Drafts(text, draft, right=way == "right")
    try:
        return generator.generate(ids, prompt_lookup_num_tokens=draft, **options)
    finally:
        vars(model).pop("_get_candidate_generator", None)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what a call returns, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def measure(model: PreTrainedModel, ids: Tensor, tokens: int, draft: int, turns: int) -> dict[str, dict[str, Any]]:
    """Time all ways of decoding in turn, and return the measurements of each by its name."""
    text = decode(model, ids, tokens, "plain", draft, None)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    rows: dict[str, dict[str, Any]] = {}
    forwards = [0]
    handle = model.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    for _ in range(turns):
        _, *prompt = timed(lambda: decode(model, ids, 1, "plain", draft, None))
        for way in WAYS:
            forwards[0] = 0
            found, *spent = timed(lambda way=way: decode(model, ids, tokens, way, draft, text))
            rows[way] = {"forwards": forwards[0], "same": bool(torch.equal(found, text))}
            new = tokens - 1  # the first one comes with the prompt
            seconds[way].append(((spent[0] - prompt[0]) / new, (spent[1] - prompt[1]) / new))
    handle.remove()
    for way, row in rows.items():
        row |= {"prompt_tokens": ids.shape[1]}
        for index, name in enumerate(("seconds", "cpu_seconds")):
            row[name] = quartiles([times[index] for times in seconds[way]])
            ratios = [plain[index] / own[index] for plain, own in zip(seconds["plain"], seconds[way], strict=True)]
            row[name.replace("seconds", "speedup")] = median(ratios)
    return rows


def prompt_of(teacher: Teacher) -> Tensor:
    """Return the (1, L) tokens of a prompt that asks for a copy of the passage, in the teacher's chat format if any."""
    tokenizer: Any = teacher.tokenizer
    request = f"Repeat the following text exactly, word by word:\n\n{PASSAGE}"
    if tokenizer.chat_template is None:
        return tokenizer(f"{PASSAGE}\n\n{PASSAGE[:40]}", return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": request}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the tokens per second of each student and way, with the speed-up as a label."""
    students = list(dict.fromkeys(row["student"] for row in rows))
    figure, axes = plt.subplots(1, len(students), figsize=(5 * len(students), 4), squeeze=False)
    for axis, student in zip(axes[0], students, strict=True):
        own = [row for row in rows if row["student"] == student]
        bars = axis.bar([row["way"] for row in own], [1 / row["seconds"]["median"] for row in own], color="C0")
        axis.bar_label(bars, labels=[f"{row['speedup']:.2f} x" for row in own])
        axis.set(title=student, ylabel="tokens per second")
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="assisted.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("teacher", type=Path, help="folder of a small language model")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--tokens", type=positive, default=96, help="tokens to decode")
    parser.add_argument("--draft", type=positive, default=10, help="tokens of a draft at most")
    parser.add_argument("--turns", type=positive, default=3, help="repetitions of all ways")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {options.tokens}")
    torch.set_num_threads(options.threads)
    file = open_results(options, parser, "claims/assisted.py", arguments, free={"students"})
    teacher = load_teacher(options.teacher)
    ids = prompt_of(teacher)
    for name in options.students:
        runs = {way: Run(name, way, options.tokens, options.draft, options.turns) for way in WAYS}
        if all(file.find(dataclasses.asdict(run)) for run in runs.values()):
            continue
        spec = StudentSpec(**STUDENTS[name])
        student = build_student(teacher, spec, resolve_layers(spec.layers, teacher.num_layers))
        for way, row in measure(student, ids, options.tokens, options.draft, options.turns).items():
            file.add({**dataclasses.asdict(runs[way]), "teacher": options.teacher.resolve().name, **row})
            speed = 1 / row["seconds"]["median"]
            print(f"{name:8} {way:7} {speed:7.2f} tokens/s, {row['speedup']:.2f} x, {row['forwards']} forwards")
    draw(file.rows, file.path.with_suffix(".png"))
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
