"""Train a model to translate: from settings and pairs of texts to a model's folder and a report.

    from ssm_zoo.training.translation import finetune_translation
    from ssm_zoo.training.translation_settings import parse_translation_settings

    pairs = {"train": ["train.en,train.de"], "heldout": ["val.en,val.de"]}
    settings = parse_translation_settings({"model": "mamba2-130m", "train_tokenizer": 8000, **pairs})
    report = finetune_translation(settings, "runs/en-de")

The output folder contains `run.json` (the description of the run), `coverage.json` (gradients of the adapters, if there
are any), `before.json` (the loss before training) and `checkpoints/`; at the end also `model/`, with adapters merged
into the weights, `report.json` and `plots/loss.png`. A run with the same settings in the same folder resumes from the
last complete checkpoint.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..conversion.load_model import check_finite, load_config, load_model, load_tokenizer
from ..evaluation.translation_format import TranslationFormat, translation_format
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, write_json
from ..modeling.pretrained import ZooPreTrainedModel
from ..reports.translation_card import write_translation_card
from .adapters import adapter_coverage, add_adapters, check_same_base, pinned
from .checkpoints import check_numbers
from .heldout import heldout_loss
from .model_limits import check_prefixes, check_rows
from .new_model import changed_keys, configuration_commit, entries_of, is_configuration, resolve_configuration
from .packing import Row, RowCollator
from .parallel_text import ParallelText, concatenated, read_parallel
from .report import (
    base_report,
    measured_coverage,
    measured_once,
    report_head,
    write_folder,
    write_plots,
)
from .residual_dropout import add_residual_dropout
from .sources import public_sources
from .trainer import check_trackers, compute_dtype, computing, optimiser_steps, processes
from .translation_data import PackedPairCollator, PackedPairs, TranslationRows, make_translation_rows
from .translation_settings import TranslationSettings
from .translation_tokenizer import Separator, fit_embeddings, learn_joint_vocabulary, set_separator
from .translation_trainer import train_translation

KIND = "ssm-zoo training to translate"
_FIELDS = ("train", "heldout")


@dataclass
class TranslationRun:
    """State of a training to translate.

    Attributes:
        settings: settings of the run.
        output: folder of the run.
        form: how texts become ids, with the tokenizer.
        separator: the separator of a pretrained tokenizer; None for a new model and for an encoder-decoder.
        model: the model, on its device.
        rows: rows for "train" and "heldout".
        state: accelerate's view of the processes.
    """

    settings: TranslationSettings
    output: Path
    form: TranslationFormat
    separator: Separator | None
    model: Any
    rows: dict[str, TranslationRows]
    state: PartialState

    @property
    def device(self) -> torch.device:
        assert self.state.device is not None
        return self.state.device

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def collator(self) -> Callable[..., Row]:
        if not self.form.is_encoder_decoder:
            return RowCollator(self.form.padding)
        assert self.form.start is not None
        return PackedPairCollator(self.form.padding, self.form.start)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return optimiser_steps(self.settings, len(self.rows["train"]), self.state.num_processes)

    def evaluate(self, name: str) -> dict[str, Any]:
        """Return the results of `heldout_loss`, per token of the targets and their ends, with a name for the report."""
        rows = self.rows["heldout"].rows
        with computing(self.settings.dtype, self.device):
            measured = heldout_loss(self.model, rows, self.collator, self.settings.batch_size)
        check_numbers(measured, name)
        if self.state.is_main_process:
            tqdm.write(f"{name}: held-out loss {measured['loss']:.4f}")
        return {"name": name, **measured}


@claimed_folders_end()
def finetune_translation(settings: TranslationSettings, output: str | Path) -> dict[str, Any]:
    """Run or resume a training to translate.

    Args:
        settings: settings of the run.
        output: a new or empty folder, or the folder of an unfinished run with the same settings.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: if settings, model, pairs and folder do not fit together (nothing is written in this case); if the
            base model has changed since the run was started; or if the loss, the gradient or a weight is not finite.
    """
    output = Path(output)
    check_trackers(settings.report_to)
    pairs = {field: read_parallel(getattr(settings, field), field, **settings.reading) for field in _FIELDS}
    read = {field: {"read": len(found)} for field, found in pairs.items()}
    read["heldout"]["in_training"] = trained = pairs["heldout"].also_in(pairs["train"])
    pairs["train"] = concatenated(pairs["train"], settings.concatenate, settings.seed)
    state = processes()
    if state.is_main_process:
        check_output_folder(output)
        if trained:
            of = f"{trained:,} of {len(pairs['heldout']):,}"
            tqdm.write(f"heldout: {of} pairs are also in train, so the held-out loss is too low")
    run = _prepare(settings, output, pairs, state)
    settings = run.settings
    # Read now: the source may be gone when the training ends.
    origin = None if settings.is_new else provenance(settings.model, settings.revision)
    coverage = measured_coverage(run, lambda: _coverage(run))
    before = measured_once(run, "before", lambda: run.evaluate("before"))
    dropped = add_residual_dropout(run.model, settings.residual_dropout)
    run.model, history, on_the_way = train_translation(
        run.model,
        run.rows["train"],
        settings,
        run.collator,
        run.steps,
        output,
        run.device,
        main=state.is_main_process,
        evaluate=run.evaluate,
    )
    after = run.evaluate("after")
    evaluations = [{**before, "step": 0}, *on_the_way, {**after, "step": run.steps}]
    report = _report(run, origin, evaluations, coverage, history, read) | {"dropped_modules": dropped}
    if state.is_main_process:
        _write_results(run, report)
    state.wait_for_everyone()
    return report


def _prepare(
    settings: TranslationSettings, output: Path, pairs: dict[str, ParallelText], state: PartialState
) -> TranslationRun:
    """Load and check everything, then claim the folder."""
    make = _new if settings.is_new else _pretrained
    settings, model, tokenizer, separator, recipe, sources = make(settings, output, pairs["train"], state)
    form = translation_format(tokenizer, model.config, "model")
    own = max(getattr(stack, "hidden_dropout", 0) for stack in _stacks(model.config))
    if settings.residual_dropout and own:
        raise ValueError(
            f"`residual_dropout` must be 0 for a model with its own hidden_dropout, {own}, got "
            f"{settings.residual_dropout}."
        )
    settings = settings.check_row_tokens(form.longest(settings.max_tokens))
    rows = {
        field: make_translation_rows(found, form, settings, model.config.vocab_size, field)
        for field, found in pairs.items()
    }
    for found in rows.values():
        _check_lengths(model.config, found)
    # Raises an error now, rather than when the training begins, if the warm-up is too long.
    settings.warmup_steps(optimiser_steps(settings, len(rows["train"]), state.num_processes))
    model.to(state.device)
    if state.is_main_process:
        fingerprints = {field: found.fingerprint for field, found in rows.items()}
        claim_run(output, {**settings.identity, **recipe, "data": fingerprints}, sources, KIND)
    state.wait_for_everyone()
    return TranslationRun(settings, output, form, separator, model, rows, state)


def _stacks(config: Any) -> list[Any]:
    """Return the configuration of each stack of blocks: of an encoder-decoder, that of the encoder is the first."""
    return [config.encoder_config(), config] if config.is_encoder_decoder else [config]


def _check_lengths(config: Any, found: TranslationRows) -> None:
    """Raise a ValueError if the model, or one of its stacks, cannot read the longest pair."""
    remedy = "Lower `max_tokens`."
    lengths = found.rows.longest if isinstance(found.rows, PackedPairs) else [found.rows.longest]
    for stack, longest in zip(_stacks(config), lengths, strict=True):
        check_rows(stack, longest, remedy)


def _new(settings: TranslationSettings, output: Path, pairs: ParallelText, state: PartialState) -> tuple[Any, ...]:
    """Return settings with a pinned revision, a new model and tokenizer, no separator, recipe and sources of a run."""
    entries = settings.train_tokenizer
    assert entries is not None
    commit = configuration_commit(settings.model, settings.revision, output)
    settings = settings.model_copy(update={"revision": commit})
    texts = [*pairs.sources, *pairs.targets]
    tokenizer = learn_joint_vocabulary(texts, entries, progress=state.is_main_process)
    config = resolve_configuration(
        settings.model, settings.overrides, tokenizer, revision=commit, encoder_decoders=True
    )
    check_prefixes(config, there=False)
    set_seed(settings.seed)
    model = _auto_class(config, settings.model).from_config(config, trust_remote_code=False)
    sources = {} if commit is None else {"config": fingerprint(settings.model, commit)}
    return settings, model, tokenizer, None, {"config": changed_keys(config)}, sources


def _pretrained(
    settings: TranslationSettings, output: Path, _pairs: ParallelText, _state: PartialState
) -> tuple[Any, ...]:
    """Return settings with a pinned revision, the base model (with adapters), its tokenizer and separator, and more."""
    if is_configuration(settings.model):
        raise ValueError(
            f"`model` must be a model with weights, got {settings.model!r}. Give --train-tokenizer N to train a new "
            "model of these sizes."
        )
    settings = pinned(settings, output)
    master = settings.method == "full" or compute_dtype(settings.dtype) == torch.float32
    model, tokenizer, separator = _load(settings, torch.float32 if master else "auto")
    set_seed(settings.seed)
    if settings.method == "lora":
        model = add_adapters(model, settings, _task(model.config))
    return settings, model, tokenizer, separator, {}, {"model": fingerprint(settings.model, settings.revision)}


def _load(
    settings: TranslationSettings, dtype: torch.dtype | str
) -> tuple[ZooPreTrainedModel, PreTrainedTokenizerBase, Separator | None]:
    """Load the base model with the package's own class and its tokenizer, with a separator if it needs one."""
    config = load_config(settings.model, revision=settings.revision)
    auto_class = _auto_class(config, settings.model)
    model = load_model(settings.model, auto_class, config=config, revision=settings.revision, dtype=dtype)
    assert isinstance(model, ZooPreTrainedModel)
    tokenizer = load_tokenizer(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if config.is_encoder_decoder:
        if settings.separator is not None:
            raise ValueError(f"`separator` has no effect on an encoder-decoder, got {settings.separator!r}.")
        return model, tokenizer, None
    separator = set_separator(tokenizer, settings.separator)
    fit_embeddings(model, separator)
    return model, tokenizer, separator


def _auto_class(config: PreTrainedConfig, name: str) -> Any:
    """Return the Auto class of a zoo model that writes text."""
    known = {
        AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    for auto_class, classes in known.items():
        kind = classes.get(type(config), None)
        if isinstance(kind, type) and issubclass(kind, ZooPreTrainedModel):
            return auto_class
    raise ValueError(
        f"`model` must be a causal language model or an encoder-decoder of the zoo, got {name} of model_type "
        f"{config.model_type!r}. Convert it first with `ssm-zoo convert`."
    )


def _task(config: PreTrainedConfig) -> str:
    """Return peft's name of the task."""
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def _coverage(run: TranslationRun) -> dict[str, Any]:
    """Compute the coverage of the adapters on the first rows."""
    rows = run.rows["train"].rows
    first = [rows[index] for index in range(min(run.settings.batch_size, len(rows)))]
    batch = {key: tensor.to(run.device) for key, tensor in run.collator(first).items()}
    with computing(run.settings.dtype, run.device):
        return adapter_coverage(run.model, batch)


def _report(
    run: TranslationRun,
    origin: tuple[str, str | None] | None,
    evaluations: list[dict[str, Any]],
    coverage: Mapping[str, Any] | None,
    history: list[dict[str, Any]],
    read: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    settings, config = run.settings, run.config
    tokenizer: Any = run.form.tokenizer
    head = report_head(run, KIND, command_line(sys.argv[1:]), "peft", "tokenizers")
    common = {
        **head,
        "model": {"model_type": config.model_type, "encoder_decoder": run.form.is_encoder_decoder},
        "tokenizer": {
            "entries": entries_of(tokenizer),
            "prompt_starts": [tokenizer.convert_ids_to_tokens(token) for token in run.form.before],
            "separator": tokenizer.convert_ids_to_tokens(run.form.after),
            "separator_added": run.separator is not None and run.separator.added,
        },
        "coverage": coverage,
        "data": {
            field: {
                "sources": public_sources(getattr(settings, field)),
                **read[field],
                "rows": len(rows),
                **rows.counts,
            }
            for field, rows in run.rows.items()
        },
        "evaluations": evaluations,
        "steps": run.steps,
        "tokens": history[-1]["tokens"],
        "seconds": history[-1]["seconds"],
        "history": history,
    }
    public: dict[str, Any] = {field: public_sources(getattr(settings, field)) for field in _FIELDS}
    if origin is not None:
        based = base_report(settings, common, config.model_type, origin)
        return {**common, **based, "settings": based["settings"] | public}
    name = Path(settings.model).name if Path(settings.model).exists() else settings.model
    public |= {"model": name, "learning_rate": settings.peak_learning_rate}
    common["model"]["config"] = changed_keys(config)
    return {**common, "base": None, "settings": common["settings"] | public}


def _write_results(run: TranslationRun, report: dict[str, Any]) -> None:
    """Write the plots, the folder of the model, which appears complete or not at all, and the report."""
    write_plots(run.output, report)
    whole = _finished(run)
    check_finite(whole, "the finished model", "Lower learning_rate.")
    _set_generation(whole, run)
    write_folder(
        run.output, "model", whole.save_pretrained, write_translation_card, report, tokenizer=run.form.tokenizer
    )
    write_json(run.output / "report.json", report)


def _finished(run: TranslationRun) -> Any:
    """Return the trained model, or the reloaded base in the checkpoint's dtype with the adapters merged."""
    if not isinstance(run.model, PeftModel):
        return run.model
    check_same_base(run.settings, run.output)
    base, _, _ = _load(run.settings, "auto")
    whole: Any = add_adapters(base, run.settings, _task(base.config))
    set_peft_model_state_dict(whole, get_peft_model_state_dict(run.model, save_embedding_layers=False))
    return whole.merge_and_unload()


def _set_generation(model: Any, run: TranslationRun) -> None:
    """Let `generate` stop where a translation ends, and pad without effect.

    Nothing else of the base model's settings is kept: with `do_sample` of a chat model translations would be random.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=run.form.end,
        pad_token_id=run.form.padding,
        decoder_start_token_id=run.form.start,
        max_new_tokens=run.settings.max_tokens + 1,
    )
