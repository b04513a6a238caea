"""Train a language model from scratch: from a configuration and text to a model's folder and a report.

    from ssm_zoo.training.from_scratch import train_from_scratch
    from ssm_zoo.training.from_scratch_settings import parse_from_scratch

    settings = parse_from_scratch({"config": "mamba-130m", "tokenizer": "bytes", "train": [...], "heldout": [...]})
    report = train_from_scratch(settings, "runs/mine")

The output folder contains `run.json` (the description of the run), `before.json` (the loss before training) and
`checkpoints/`; at the end also `model/`, `report.json` and `plots/loss.png`. A run with the same settings in the same
folder resumes from the last complete checkpoint.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from ..harness.fingerprint import claim_run, fingerprint, pinned_revision
from ..harness.published import decoration, public_argument
from ..harness.run_folder import check_output_folder, claimed_folders_end, recorded_recipe, write_json
from ..modeling.prefix import has_prefix
from ..reports.from_scratch_card import write_from_scratch_card
from ..reports.objectives_plot import write_objectives_plot
from .from_scratch_settings import FromScratchSettings
from .model_limits import check_prefixes, check_rows
from .new_model import (
    BYTES,
    changed_keys,
    configuration_commit,
    entries_of,
    learn_vocabulary,
    load_vocabulary,
    recorded_configuration,
    resolve_configuration,
)
from .objective_rows import ObjectiveStream
from .objective_trainer import ObjectiveTrainer
from .objectives import TARGET, ObjectiveTokens, add_tokens
from .report import common_report, measured_once, write_folder, write_plots
from .texts import make_rows, read_texts
from .trainer import TrainingRun, check_trackers, optimiser_steps, processes, train

KIND = "ssm-zoo training from scratch"
_MEASURED_ROWS = 16
"""Rows of the held-out text on which the loss of each objective is measured."""


@claimed_folders_end()
def train_from_scratch(
    settings: FromScratchSettings, output: str | Path, *, command: str | None = None
) -> dict[str, Any]:
    """Run or resume a training from scratch.

    Args:
        settings: settings of the run.
        output: a new or empty folder, or the folder of an unfinished run with the same settings.
        command: command line for the report; None: the Python command line of this process.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: if settings, configuration, tokenizer, texts and folder do not fit together (nothing is written in
            this case); if the tokenizer, or a configuration on the Hub, has changed since the run was started; or if
            the loss, the gradient or a weight is not finite.
    """
    run = _prepare(settings, Path(output))
    before = measured_once(run, "before", lambda: run.evaluate("before"))
    make_trainer = None
    if settings.objectives is not None:
        make_trainer = partial(ObjectiveTrainer, mix=settings.objectives, steps=run.steps)
    history, on_the_way = train(run, settings.evaluate_every, make_trainer)
    after = run.evaluate("after")
    evaluations = [{**before, "step": 0}, *on_the_way, {**after, "step": run.steps}]
    report = _report(run, command or _python_command(), evaluations, history)
    if run.state.is_main_process:
        write_plots(run.output, report)
        if settings.objectives is not None:
            with decoration("the plot of the objectives"):
                write_objectives_plot(report, run.output / "plots" / "objectives.png")
        save = run.model.save_pretrained
        write_folder(run.output, "model", save, write_from_scratch_card, report, run.tokenizer)
        write_json(run.output / "report.json", report)
    run.state.wait_for_everyone()
    return report


def _prepare(settings: FromScratchSettings, output: Path) -> TrainingRun[FromScratchSettings]:
    """Create and check everything, then claim the folder."""
    check_trackers(settings.report_to)
    state = processes()
    if state.is_main_process:
        check_output_folder(output)
    texts = read_texts(settings)
    source = settings.tokenizer if settings.tokenizer != BYTES else None
    commit = None if source is None else pinned_revision(source, None, output, "tokenizer")
    tokenizer = _tokenizer(settings, texts.get("train", []), commit, progress=state.is_main_process)
    settings = settings.model_copy(
        update={"revision": configuration_commit(settings.config, settings.revision, output)}
    )
    special = None if settings.objectives is None else add_tokens(tokenizer, settings.objectives)
    config = resolve_configuration(settings.config, settings.overrides, tokenizer, revision=settings.revision)
    kinds = set() if settings.objectives is None else {one.objective for one in settings.objectives.objectives}
    check_prefixes(config, there=bool(kinds - {"next_token"}))
    replace = None
    if special is not None:
        replace = partial(_objective_rows, settings, special, has_prefix(config), state.num_processes)
    rows = make_rows(texts, settings, tokenizer, config.vocab_size, progress=state.is_main_process, replace=replace)
    check_rows(config, rows.longest(settings.row_tokens), "Lower `row_tokens`.")
    # Raises an error now, rather than when the training begins, if the warm-up is too long.
    settings.warmup_steps(optimiser_steps(settings, rows.length, state.num_processes))
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.to(state.device)
    if state.is_main_process:
        given = {
            key: value for key, value in settings.identity.items() if key not in ("config", "revision", "overrides")
        }
        recipe = {**given, "data": rows.fingerprints}
        # The recipe has the whole configuration, so a local configuration needs no fingerprint.
        sources = {} if source is None else {"tokenizer": fingerprint(source, commit, ["tokenizer"])}
        if settings.revision is not None:
            assert isinstance(settings.config, str)
            sources["config"] = fingerprint(settings.config, settings.revision)
        recipe["config"] = _as_recorded(output, config, sources)
        claim_run(output, recipe, sources, KIND)
    state.wait_for_everyone()
    return TrainingRun(settings, output, tokenizer, model, rows, state)


def _objective_rows(
    settings: FromScratchSettings,
    tokens: ObjectiveTokens,
    prefixes: bool,
    processes: int,
    train: Sequence[Tensor],
    heldout: Sequence[Tensor],
) -> dict[str, Any]:
    """Return the rows of the objectives, to train on and to measure: the fields of `TextRows`.

    Raises:
        ValueError: if a text has tokens of the objectives, or no text is long enough for one of them.
    """
    mix = settings.objectives
    assert mix is not None
    ours = torch.tensor([*tokens.control.values(), tokens.context, tokens.target, tokens.end, *tokens.sentinels])
    for field, documents in (("train", train), ("heldout", heldout)):
        for number, document in enumerate(documents, start=1):
            if torch.isin(document, ours).any():
                raise ValueError(
                    f"{field}: document {number} has a special token of the objectives, such as {TARGET}. Remove it "
                    "from the text."
                )
    rows = settings.batch_size * settings.gradient_accumulation * processes

    def stream(field: str, documents: Sequence[Tensor]) -> ObjectiveStream:
        try:
            return ObjectiveStream(
                documents, mix, tokens, settings.row_tokens, step_rows=rows, seed=settings.seed, prefixes=prefixes
            )
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None

    judges = stream("heldout", heldout)
    measured = {name: judges.of_one(index, _MEASURED_ROWS) for index, name in enumerate(mix.names)}
    return {"train": stream("train", train), "objectives": measured}


def _as_recorded(output: Path, config: PreTrainedConfig, sources: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The configuration's keys, in the form in which a run of an earlier version recorded them if it is this one.

    Such a run did not record the commit of a configuration on the Hub, which is then left out of `sources`: what the
    commit decides, the whole configuration, is compared.

    Raises:
        ValueError: if a run of an earlier version recorded another configuration.
    """
    keys = changed_keys(config)
    earlier = recorded_recipe(output, KIND)
    if not earlier:
        return keys
    recorded: Any = earlier.get("config")
    there = recorded_configuration(recorded)
    if there is not None and changed_keys(there) == keys:
        if "config" not in earlier.get("sources", {}):
            sources.pop("config", None)
        return recorded
    if there is None or changed_keys(there) != recorded:
        raise ValueError(
            f"output folder: {output} holds a run of an earlier version with another configuration, or with one that "
            "this version cannot read. Finish the run with the version that began it, or give another folder."
        )
    return keys


def _tokenizer(
    settings: FromScratchSettings, documents: list[str], commit: str | None, *, progress: bool
) -> PreTrainedTokenizerBase:
    if settings.train_tokenizer is not None:
        return learn_vocabulary(documents, settings.train_tokenizer, progress=progress)
    assert settings.tokenizer is not None
    return load_vocabulary(settings.tokenizer, revision=commit, trust_remote_code=settings.trust_remote_code)


def _report(
    run: TrainingRun[FromScratchSettings],
    command: str,
    evaluations: list[dict[str, Any]],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    settings, config = run.settings, run.model.config
    report = common_report(run, KIND, command, evaluations, history)
    public = {
        "config": _public(settings.config) if isinstance(settings.config, str) else settings.config,
        "overrides": settings.overrides,
        "tokenizer": settings.tokenizer and _public(settings.tokenizer),
    }
    return {
        **report,
        # The public names come first, and replace the paths on this machine.
        "settings": public | report["settings"] | public,
        "model": {"model_type": config.model_type, "config": changed_keys(config)},
        "tokenizer": {"source": public["tokenizer"], "entries": entries_of(run.tokenizer)},
        "tokens": history[-1]["tokens"],
    }


def _public(source: str) -> str:
    """Return the last name of a file or folder, or a Hub id unchanged."""
    return Path(source).resolve().name if Path(source).exists() else source


def _python_command() -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *map(public_argument, sys.argv[1:])])
