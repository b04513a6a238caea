"""Start, or go on with, a run of every training command whose model is on the Hub.

`python tests/resume_from_the_hub.py start|resume` is run by test_pinned_revisions.py, in a folder with the texts, under
the environment of a Hub stand-in, which huggingface_hub reads when it is imported. "start" carries every command out
into NAME-whole, and interrupts it in its last step in NAME. "resume" asks for the branch, which is to be refused, and
goes on. It prints, as JSON, what the refusals said, and the commits and licences that the reports name.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.training.checkpoints import CheckedTrainer

STEPS = 6
HOW = f"--steps {STEPS} --checkpoint-every 2 --batch-size 2"
TEXTS = f"--train text.txt --heldout text.txt --row-tokens 32 {HOW}"
PAIRS = f"--train pairs.jsonl --heldout pairs.jsonl {HOW}"
# Name to the command line and the option that asks for the branch.
COMMANDS = {
    "distill": ("distill recipe.yaml {}", "--set teacher_revision=main"),
    "train": (f"train tester/zoo {{}} --tokenizer tester/zoo {TEXTS}", "--revision main"),
    "train-bytes": (f"train tester/zoo {{}} --tokenizer bytes --set vocab_size=256 {TEXTS}", "--revision main"),
    "lm": (f"finetune lm tester/zoo {{}} {TEXTS} --rank 2", "--revision main"),
    "lm-full": (f"finetune lm tester/zoo {{}} {TEXTS} --method full", "--revision main"),
    "embed": (f"finetune embed tester/zoo {{}} {PAIRS} --rank 2", "--revision main"),
}


def call(line: str, code: int) -> str:
    """Run a command, and return what it printed."""
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == code, f"{line}: {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


def stop_in_the_last_step(patch: pytest.MonkeyPatch) -> None:
    """Interrupt every training there."""
    trainer = CheckedTrainer.training_step

    def of_trainer(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == STEPS:
            raise KeyboardInterrupt
        return trainer(self, *arguments, **options)

    patch.setattr(CheckedTrainer, "training_step", of_trainer)


def start() -> dict[str, Any]:
    for name, (line, _) in COMMANDS.items():
        call(line.format(f"{name}-whole"), 0)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_the_last_step(patch)
        for name, (line, _) in COMMANDS.items():
            call(line.format(name), 130)
    return {}


def resume() -> dict[str, Any]:
    found = {}
    for name, (line, branch) in COMMANDS.items():
        refused = call(f"{line.format(name)} {branch}", 2)
        said = call(line.format(name), 0)
        report = json.loads(Path(name, "report.json").read_text())
        found[name] = {"refused": refused, "said": said, "report": report}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    stages: dict[str, Callable[[], dict[str, Any]]] = {"start": start, "resume": resume}
    print(json.dumps(stages[sys.argv[1]]()))
