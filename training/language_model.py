"""A whole finetuning of a language model: from settings to a folder with an adapter or a model, and a report.

The output folder holds `run.json` (what the run is), `coverage.json` (which adapters learn), `before.json` (the loss
before training), `checkpoints/` (the Trainer's), and at the end `adapter/`, `model/` if all weights were trained or the
adapter was merged, `report.json` and `plots/loss.png`. Starting the same settings on the same folder goes on at the
last whole checkpoint.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from ..conversion.load_model import check_finite
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, read_json_or_none, write_json
from ..reports.training_card import write_card
from .adapters import adapter_coverage, add_adapters, load_base, load_tokenizer, merged, pinned, print_coverage
from .report import common_report, write_folder, write_plots
from .settings import LanguageModelSettings
from .texts import make_rows, read_texts_or_examples
from .trainer import TrainingRun, check_trackers, processes, train

KIND = "ssm-zoo finetuning of a language model"


@claimed_folders_end()
def finetune_language_model(
    settings: LanguageModelSettings, output: str | Path, *, merge: bool = False
) -> dict[str, Any]:
    """Carry out a finetuning, or go on with it.

    Args:
        settings: what to do.
        output: a new or empty folder, or the folder of an earlier start with the same settings.
        merge: also write the model with the adapter merged into its weights, as a self-contained folder.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: if settings, model, texts and folder do not fit together, before anything is written; if the base
            model has changed since the run was started; or if the loss, the gradient or a weight is not finite.
    """
    if merge and settings.method == "full":
        raise ValueError("merge: got True; accepted: False with method 'full', which leaves nothing to merge")
    run = _prepare(pinned(settings, Path(output)), Path(output))
    # Now, since a training that has ended should depend on nothing that may have gone meanwhile.
    origin = provenance(settings.model, run.settings.revision)
    coverage = _coverage(run)
    before = run.before()
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
    set_seed(settings.seed)
    trained = add_adapters(model, settings) if settings.method == "lora" else model
    if not settings.load_in_4bit:
        trained.to(state.device)  # pyright: ignore[reportArgumentType]
    if state.is_main_process:
        sources = {"model": fingerprint(settings.model, settings.revision)}
        claim_run(output, {**settings.identity, "data": rows.fingerprints}, sources, KIND)
    state.wait_for_everyone()
    return TrainingRun(settings, output, tokenizer, trained, rows, state)


def _coverage(run: TrainingRun[LanguageModelSettings]) -> dict[str, Any] | None:
    """Which adapters learn, printed; as the first start found it, if it has. None without adapters."""
    if not isinstance(run.model, PeftModel):
        return None
    coverage = read_json_or_none(run.output / "coverage.json")
    run.state.wait_for_everyone()  # all have looked before the first one writes
    if coverage is None:
        rows = run.rows.first(run.settings.batch_size)
        batch = {key: tensor.to(run.device) for key, tensor in run.collator(rows).items()}
        with run.compute():
            coverage = adapter_coverage(run.model, batch)
        if run.state.is_main_process:
            write_json(run.output / "coverage.json", coverage)
    if run.state.is_main_process:
        print_coverage(coverage, Console())
    return coverage


def _report(
    run: TrainingRun[LanguageModelSettings],
    origin: tuple[str, str | None],
    evaluations: list[dict[str, Any]],
    coverage: Mapping[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    settings = run.settings
    source, licence = origin
    base: Any = run.model.get_base_model() if isinstance(run.model, PeftModel) else run.model
    report = common_report(run, KIND, command_line(sys.argv[1:]), evaluations, history, "peft")
    named = {"model": source, "learning_rate": settings.peak_learning_rate}
    return {
        **report,
        "settings": {"model": source} | report["settings"] | named,
        "base": {
            "source": source,
            "revision": settings.revision,
            "model_type": base.config.model_type,
            "licence": licence,
        },
        "coverage": coverage,
    }


def _write_results(run: TrainingRun[LanguageModelSettings], report: dict[str, Any], merge: bool) -> None:
    """The report, and the adapter and the model as folders that appear whole."""
    write_plots(run, report)
    if isinstance(run.model, PeftModel):
        if Path(run.settings.model).is_dir():
            # peft would name the folder, and so the machine; the bare name might be that of somebody's repository.
            for adapter in run.model.peft_config.values():
                adapter.base_model_name_or_path = f"{report['base']['source']} (a local folder)"
        save = partial(run.model.save_pretrained, save_embedding_layers=False)
        write_folder(run, "adapter", save, write_card, report)
    if merge:
        whole = merged(run.settings, run.output / "adapter")
        check_finite(whole, "the merged model", "Its dtype is too narrow: merge the adapter in float32.")
        write_folder(run, "model", whole.save_pretrained, write_card, report)
    elif not isinstance(run.model, PeftModel):
        write_folder(run, "model", run.model.save_pretrained, write_card, report)
    write_json(run.output / "report.json", report)
