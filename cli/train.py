"""`ssm-zoo train`: train a model of the zoo from scratch."""

import sys
from pathlib import Path
from typing import Any

import typer

from ..harness.processes import command_line, process_number
from ..training.from_scratch_settings import FromScratchSettings, parse_from_scratch
from .options import Output, Private, PushToHub, with_settings
from .push import announce, check_push_options, push_folder
from .sources import model_folder, model_source


@with_settings(FromScratchSettings)
def train(values: dict[str, Any], output: Output, repo: PushToHub = None, private: Private = False) -> None:
    """Train a language model from scratch on text. Measures the held-out loss before and after.

    The tokenizer decides the size of the vocabulary and the special ids. Weights are float32. The same command resumes
    an unfinished run at its last checkpoint.

    Several processes: accelerate launch -m ssm_zoo.cli.main train CONFIG OUTPUT ...
    """
    if Path(values["config"]).is_dir():
        values["config"] = str(model_folder(Path(values["config"])))
    if "tokenizer" in values:
        values["tokenizer"] = model_source(values["tokenizer"])
    settings = parse_from_scratch(values)
    check_push_options(repo, private=private)
    from ..training.from_scratch import train_from_scratch

    report = train_from_scratch(settings, output, command=command_line(sys.argv[1:]))
    if process_number():  # of several processes the first one speaks
        return
    folder = output / "model"
    print_losses(report, output, folder)
    if repo is not None:
        from ..reports.from_scratch_card import write_from_scratch_card

        write_from_scratch_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


def print_losses(report: dict[str, Any], output: Path, folder: Path) -> None:
    """Print the losses of a language model's training, and the paths of the results."""
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    typer.echo(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    typer.echo(f"report: {output / 'report.json'}   {folder.name}: {folder}")
