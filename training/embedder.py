"""Finetune an embedder: from settings and pairs of texts to a folder that sentence-transformers loads.

    from ssm_zoo.training.embedder import finetune_embedder
    from ssm_zoo.training.embedder_settings import parse_embedder_settings

    settings = parse_embedder_settings({"model": "runs/lm/model", "train": ["pairs.jsonl"], "heldout": ["test.jsonl"]})
    report = finetune_embedder(settings, "runs/embedder")

The output folder contains `run.json` (the description of the run), `coverage.json` (gradients of the adapters),
`before.json` (retrieval before training) and `checkpoints/`; at the end also `model/`, with adapters merged into the
weights, `report.json` and `plots/loss.png`. A run with the same settings in the same folder resumes from the last
complete checkpoint.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, set_seed

from ..conversion.load_model import check_finite, load_config
from ..evaluation.embedder import make_embedder, require_sentence_transformers
from ..evaluation.retrieval import RetrievalData, chance_levels, embedder_scores, evaluate_retrieval
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, write_json
from ..modeling.backbone import ZooModel
from ..modeling.selective_attention import SelectiveAttention
from ..reports.embedder_card import write_embedder_card
from ..reports.training_plots import write_embedder_plot
from .adapters import adapter_coverage, add_adapters, check_same_base, pinned
from .checkpoints import check_numbers
from .embedder_settings import EmbedderSettings
from .model_limits import check_positions
from .pairs import Pairs, read_pairs
from .report import (
    base_report,
    measured_coverage,
    measured_once,
    report_head,
    write_folder,
    write_plots,
)
from .sources import public_sources
from .texts import check_ids
from .trainer import check_trackers, compute_dtype, computing, processes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND = "ssm-zoo finetuning of an embedder"
_FIELDS = ("train", "heldout")


@dataclass
class EmbedderRun:
    """State of an embedder's finetuning.

    Attributes:
        settings: settings of the run.
        output: folder of the run.
        embedder: the embedder, on its device.
        pairs: pairs for "train" and "heldout".
        lengths: result of :func:`_lengths` for "train" and "heldout".
        state: accelerate's view of the processes.
    """

    settings: EmbedderSettings
    output: Path
    embedder: SentenceTransformer
    pairs: dict[str, Pairs]
    lengths: dict[str, dict[str, Any]]
    state: PartialState

    @property
    def model(self) -> Any:
        """Model inside the embedder."""
        return backbone_of(self.embedder)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training. All batches are full: the remaining pairs of an epoch are skipped."""
        settings = self.settings
        batches = len(self.pairs["train"]) // (settings.batch_size * self.state.num_processes)
        return settings.steps or math.ceil(settings.epochs * batches)

    @property
    def heldout(self) -> RetrievalData:
        return heldout_retrieval(self.pairs["heldout"])

    @property
    def pool(self) -> int:
        return min(self.settings.pool_size, self.heldout.largest_pool)

    def evaluate(self, name: str, embedder: SentenceTransformer) -> dict[str, Any]:
        """Return an embedder's results of `evaluate_retrieval`, with a name for the report."""
        settings, data = self.settings, self.heldout
        with computing(settings.dtype, embedder.device):
            scores = embedder_scores(embedder, data, batch_size=settings.mini_batch_size or settings.batch_size)
        measured = evaluate_retrieval(data, scores, pools=[self.pool], seed=settings.seed)
        check_numbers(measured, name)
        if self.state.is_main_process:
            accuracy = measured["pools"][0]["accuracy"]
            tqdm.write(f"{name}: nDCG@10 {measured['ndcg@10']:.4f}, {accuracy:.1%} right among {self.pool}")
        return {"name": name, **measured}


def heldout_retrieval(pairs: Pairs) -> RetrievalData:
    """Return retrieval data with every anchor once as a query, and every positive and negative once as a document."""
    documents = {text: f"d{index}" for index, text in enumerate(pairs.documents)}
    queries = {text: f"q{index}" for index, text in enumerate(dict.fromkeys(pairs.anchors))}
    relevant: dict[str, set[str]] = {identity: set() for identity in queries.values()}
    for anchor, positive in zip(pairs.anchors, pairs.positives, strict=True):
        relevant[queries[anchor]].add(documents[positive])
    return RetrievalData(
        {identity: text for text, identity in queries.items()},
        {identity: text for text, identity in documents.items()},
        {identity: frozenset(found) for identity, found in relevant.items()},
    )


@claimed_folders_end()
def finetune_embedder(settings: EmbedderSettings, output: str | Path) -> dict[str, Any]:
    """Run or resume the finetuning of an embedder.

    Args:
        settings: settings of the run.
        output: a new or empty folder, or the folder of an unfinished run with the same settings.

    Returns:
        The report, as in `report.json`. Retrieval after training is measured with the saved weights.

    Raises:
        ValueError: if sentence-transformers is not installed, or settings, model, pairs and folder do not fit together
            (nothing is written in these cases); if the base model has changed since the run was started; or if the
            loss, the gradient, a weight or an embedding is not finite.
    """
    require_sentence_transformers()
    from .embedder_trainer import check_batches, train_embedder, training_rows

    pairs = {
        field: read_pairs(
            getattr(settings, field),
            field,
            anchor=settings.anchor,
            positive=settings.positive,
            negatives=settings.negatives,
        )
        for field in _FIELDS
    }
    check_trackers(settings.report_to)
    rows, state = training_rows(pairs["train"]), processes()
    if state.is_main_process:
        check_output_folder(output)
    check_batches(rows, settings, state.num_processes)
    run = _prepare(pinned(settings, Path(output)), Path(output), pairs, state)
    # Read now: the source may be gone when the training ends.
    origin = provenance(settings.model, run.settings.revision)
    coverage = measured_coverage(run, lambda: _coverage(run))
    before = measured_once(run, "before", lambda: run.evaluate("before", run.embedder))
    history = train_embedder(
        run.embedder, rows, run.settings, run.steps, run.output, run.embedder.device, state.num_processes
    )
    if settings.method == "lora":
        check_same_base(run.settings, run.output)
    finished = finished_embedder(run.embedder, run.settings)
    check_finite(finished, "the finished embedder", "Lower learning_rate.")
    after = run.evaluate("after", finished)
    report = _report(run, origin, [{**before, "step": 0}, {**after, "step": run.steps}], coverage, history)
    if state.is_main_process:
        _write_results(run, report, finished)
    state.wait_for_everyone()
    return report


def _prepare(settings: EmbedderSettings, output: Path, pairs: dict[str, Pairs], state: PartialState) -> EmbedderRun:
    """Load and check everything, then claim the folder."""
    if heldout_retrieval(pairs["heldout"]).largest_pool < 2:
        raise ValueError("`heldout` must have, for every anchor, a text that does not belong to it; add other pairs.")
    embedder = load_embedder_to_train(settings)
    lengths = {field: _lengths(embedder, pairs[field], settings, field) for field in _FIELDS}
    set_seed(settings.seed)
    if settings.method == "lora":
        adapt(embedder, settings)
    _check_choices(backbone_of(embedder), settings)
    assert state.device is not None
    embedder.to(state.device)
    if state.is_main_process:
        fingerprints = {field: found.fingerprint() for field, found in pairs.items()}
        sources = {"model": fingerprint(settings.model, settings.revision)}
        claim_run(output, {**settings.identity, "data": fingerprints}, sources, KIND)
    state.wait_for_everyone()
    return EmbedderRun(settings, output, embedder, pairs, lengths, state)


def _lengths(embedder: SentenceTransformer, pairs: Pairs, settings: EmbedderSettings, field: str) -> dict[str, Any]:
    """Return the mean number of "tokens" per text (with its prompt) and the share of texts that are "cut".

    Returns:
        These two numbers for "anchors" and "documents".

    Raises:
        ValueError: if a text has no tokens, or the model has no embedding for a token or no weights for its position.
    """
    tokenizer: Any = embedder.tokenizer
    config: Any = backbone_of(embedder).config
    found = {}
    texts = {
        "anchors": (settings.query_prompt, pairs.anchors),
        "documents": (settings.document_prompt, pairs.documents),
    }
    for kind, (prompt, given) in texts.items():
        encoded = tokenizer([prompt + text for text in given], truncation=False, verbose=False)["input_ids"]
        for text, ids in zip(given, encoded, strict=True):
            if not ids:
                raise ValueError(f"{field}: the model's tokenizer has no token for the text {text!r}.")
        check_ids(map(max, encoded), config.vocab_size)
        counts = [len(ids) for ids in encoded]
        check_positions(config, min(max(counts), settings.max_tokens), "Lower `max_tokens`.")
        cut = sum(count > settings.max_tokens for count in counts) / len(counts)
        found[kind] = {"tokens": sum(counts) / len(counts), "cut": cut}
    return found


def _check_choices(model: nn.Module, settings: EmbedderSettings) -> None:
    selects = any(isinstance(module, SelectiveAttention) for module in model.modules())
    if selects and settings.mini_batch_size is not None:
        raise ValueError(
            "`mini_batch_size` must be left out for a model with selective attention, whose gate needs whole "
            f"batches, got {settings.mini_batch_size}."
        )


def _coverage(run: EmbedderRun) -> dict[str, Any]:
    """Compute the coverage of the adapters on the first pairs."""
    from .embedder_trainer import infonce

    settings, embedder = run.settings, run.embedder
    first: Any = [texts[: min(settings.batch_size, 4)] for texts in run.pairs["train"].columns.values()]
    batches = [send_to_device(embedder.preprocess(texts), embedder.device) for texts in first]
    loss = infonce(embedder, settings.model_copy(update={"mini_batch_size": None}), 1)
    with computing(settings.dtype, embedder.device):
        ids = {"input_ids": batches[0]["input_ids"]}
        return adapter_coverage(run.model, ids, lambda: loss(batches, torch.empty(0)))


def _report(
    run: EmbedderRun,
    origin: tuple[str, str | None],
    evaluations: list[dict[str, Any]],
    coverage: dict[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    settings, data = run.settings, run.heldout
    config = run.model.config
    head = report_head(run, KIND, command_line(sys.argv[1:]), "peft", "sentence-transformers")
    return {
        **head,
        **base_report(settings, head, config.model_type, origin),
        "embedding": {"size": config.hidden_size, "pooling": settings.pooling, "max_tokens": settings.max_tokens},
        "coverage": coverage,
        "data": {
            field: {
                "sources": public_sources(getattr(settings, field)),
                "pairs": len(pairs),
                "negatives": len(pairs.negatives),
                "queries": len(set(pairs.anchors)),
                "documents": len(pairs.documents),
                "lengths": run.lengths[field],
            }
            for field, pairs in run.pairs.items()
        },
        "evaluations": evaluations,
        "chance": chance_levels(data, [run.pool]),
        "steps": run.steps,
        "seconds": history[-1]["seconds"],
        "history": history,
    }


def _write_results(run: EmbedderRun, report: dict[str, Any], finished: SentenceTransformer) -> None:
    """Write the plot, the folder of the embedder, which appears complete or not at all, and the report."""
    write_plots(run.output, report, write_embedder_plot)
    save = partial(finished.save_pretrained, create_model_card=False)
    write_folder(run.output, "model", save, write_embedder_card, report)
    write_json(run.output / "report.json", report)


def load_embedder_to_train(settings: EmbedderSettings) -> SentenceTransformer:
    """Load the base model with the package's own class, without its head and with a pooling, on the CPU.

    The weights are float32 if they are trained or if the run computes in float32. Otherwise (under adapters) they keep
    the checkpoint's dtype.

    Raises:
        ValueError: if it is not a model of the zoo, or weights are missing.
    """
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooModel)):
        raise ValueError(
            f"`model` must be a model of the zoo, got {settings.model} of model_type {config.model_type!r}. Convert it "
            "first with `ssm-zoo convert`."
        )
    master = settings.method == "full" or compute_dtype(settings.dtype) == torch.float32
    return _make(settings, "cpu", torch.float32 if master else "auto")


def _make(settings: EmbedderSettings, device: str | torch.device, dtype: torch.dtype | str) -> SentenceTransformer:
    return make_embedder(
        settings.model,
        revision=settings.revision,
        pooling=settings.pooling,
        max_tokens=settings.max_tokens,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        device=device,
        dtype=dtype,
        trust_remote_code=settings.trust_remote_code,
    )


def backbone_of(embedder: SentenceTransformer) -> ZooModel | PeftModel:
    """Return the model inside an embedder, with its adapters if it has any."""
    transformer: Any = embedder[0]
    return transformer.model


def adapt(embedder: SentenceTransformer, settings: EmbedderSettings) -> None:
    """Put adapters into an embedder; see `ssm_zoo.training.adapters.add_adapters`."""
    transformer: Any = embedder[0]
    transformer.model = add_adapters(transformer.model, settings, "FEATURE_EXTRACTION")


def finished_embedder(embedder: SentenceTransformer, settings: EmbedderSettings) -> SentenceTransformer:
    """Return the embedder to save: the trained one, or the reloaded base model with the adapters merged.

    Merged weights have the checkpoint's dtype.
    """
    trained = backbone_of(embedder)
    if not isinstance(trained, PeftModel):
        return embedder
    whole = _make(settings, embedder.device, "auto")
    adapt(whole, settings)
    transformer: Any = whole[0]
    transformer.model.to(embedder.device)
    set_peft_model_state_dict(transformer.model, get_peft_model_state_dict(trained, save_embedding_layers=False))
    transformer.model = transformer.model.merge_and_unload()
    return whole
