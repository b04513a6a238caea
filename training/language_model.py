"""Finetune a language model: from settings to a folder with an adapter or a model, and a report.

The output folder contains `run.json` (the description of the run), `coverage.json` (gradients of the adapters),
`before.json` (the loss before training) and `checkpoints/`; at the end also `adapter/`, `model/` if all weights were
trained or the adapter was merged, `report.json` and `plots/loss.png`. A run with the same settings in the same folder
resumes from the last complete checkpoint.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from ..conversion.load_model import check_finite
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, write_json
from ..reports.training_card import write_card
from .adapters import adapter_coverage, add_adapters, check_same_base, load_base, load_tokenizer, merged, pinned
from .model_limits import check_rows
from .report import base_report, common_report, measured_coverage, measured_once, write_folder, write_plots
from .settings import LanguageModelSettings
from .texts import make_rows, read_texts_or_examples
from .trainer import TrainingRun, check_trackers, processes, train

KIND = "ssm-zoo finetuning of a language model"


@claimed_folders_end()
def finetune_language_model(
    settings: LanguageModelSettings, output: str | Path, *, merge: bool = False
) -> dict[str, Any]:
    """Run or resume the finetuning of a language model.

    Args:
        settings: settings of the run.
        output: a new or empty folder, or the folder of an unfinished run with the same settings.
        merge: also write the model with the adapter merged into its weights, as a self-contained folder.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: if settings, model, texts and folder do not fit together (nothing is written in this case); if the
            base model has changed since the run was started; or if the loss, the gradient or a weight is not finite.
    """
    if merge and settings.method == "full":
        raise ValueError("`merge` must be False with method 'full', which trains no adapter, got True.")
    run = _prepare(pinned(settings, Path(output)), Path(output))
    # Read now: the source may be gone when the training ends.
    origin = provenance(settings.model, run.settings.revision)
    coverage = measured_coverage(run, lambda: _coverage(run))
    before = measured_once(run, "before", lambda: run.evaluate("before"))
    history, _ = train(run)
    after = run.evaluate("after")
    report = _report(run, origin, [{**before, "step": 0}, {**after, "step": run.steps}], coverage, history)
    if run.state.is_main_process:
        _write_results(run, report, merge)
    run.state.wait_for_everyone()
    return report


def _prepare(settings: LanguageModelSettings, output: Path) -> TrainingRun[LanguageModelSettings]:
    """Load and check everything, then claim the folder."""
    check_trackers(settings.report_to)
    state = processes()
    if state.is_main_process:
        check_output_folder(output)
    texts = read_texts_or_examples(settings)
    model, tokenizer = load_base(settings), load_tokenizer(settings)
    rows = make_rows(texts, settings, tokenizer, model.config.vocab_size, progress=state.is_main_process)
    check_rows(model.config, rows.longest(settings.row_tokens), "Lower `row_tokens`.")
    set_seed(settings.seed)
    trained = add_adapters(model, settings) if settings.method == "lora" else model
    if not settings.load_in_4bit:
        trained.to(state.device)  # pyright: ignore[reportArgumentType]
    if state.is_main_process:
        sources = {"model": fingerprint(settings.model, settings.revision)}
        claim_run(output, {**settings.identity, "data": rows.fingerprints}, sources, KIND)
    state.wait_for_everyone()
    return TrainingRun(settings, output, tokenizer, trained, rows, state)


def _coverage(run: TrainingRun[LanguageModelSettings]) -> dict[str, Any]:
    """Compute the coverage of the adapters on the first rows."""
    assert isinstance(run.model, PeftModel)
    rows = run.rows.first(run.settings.batch_size)
    batch = {key: tensor.to(run.device) for key, tensor in run.collator(rows).items()}
    with run.compute():
        return adapter_coverage(run.model, batch)


def _report(
    run: TrainingRun[LanguageModelSettings],
    origin: tuple[str, str | None],
    evaluations: list[dict[str, Any]],
    coverage: Mapping[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    base: Any = run.model.get_base_model() if isinstance(run.model, PeftModel) else run.model
    report = common_report(run, KIND, command_line(sys.argv[1:]), evaluations, history, "peft")
    return {**report, **base_report(run.settings, report, base.config.model_type, origin), "coverage": coverage}


def _write_results(run: TrainingRun[LanguageModelSettings], report: dict[str, Any], merge: bool) -> None:
    """Write the plots, the folders of the adapter and the model, and the report."""

    def write(name: str, save: Callable[[str], object]) -> None:
        write_folder(run.output, name, save, write_card, report, run.tokenizer)

    write_plots(run.output, report)
    if isinstance(run.model, PeftModel):
        if Path(run.settings.model).is_dir():
            # peft would record the path on this machine; the bare name might be that of a repository on the Hub.
            for adapter in run.model.peft_config.values():
                adapter.base_model_name_or_path = f"{report['base']['source']} (a local folder)"
        write("adapter", partial(run.model.save_pretrained, save_embedding_layers=False))
    if merge:
        check_same_base(run.settings, run.output)
        whole = merged(run.settings, run.output / "adapter")
        check_finite(whole, "the merged model", "Its dtype is too narrow: merge the adapter in float32.")
        write("model", whole.save_pretrained)
    elif not isinstance(run.model, PeftModel):
        write("model", run.model.save_pretrained)
    write_json(run.output / "report.json", report)
