"""A whole finetuning of an embedder: from settings and pairs of texts to a folder that sentence-transformers loads.

    from ssm_zoo.training.embedder import finetune_embedder
    from ssm_zoo.training.embedder_settings import parse_embedder_settings

    settings = parse_embedder_settings({"model": "runs/lm/model", "train": ["pairs.jsonl"], "heldout": ["test.jsonl"]})
    report = finetune_embedder(settings, "runs/embedder")

The output folder holds `run.json` (what the run is), `coverage.json` (which adapters learn), `before.json` (retrieval
before training), `checkpoints/` (the Trainer's), and at the end `model/`, with adapters in its weights, `report.json`
and `plots/loss.png`. Starting the same settings on the same folder goes on at the last whole checkpoint.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, set_seed

from ..conversion.load_model import check_finite, load_config
from ..evaluation.embedder import make_embedder, require_sentence_transformers
from ..evaluation.retrieval import RetrievalData, chance_levels, embedder_scores, evaluate_retrieval
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.published import decoration
from ..harness.run_folder import check_output_folder, claimed_folders_end, read_json_or_none, write_json
from ..harness.whole_files import new_folder
from ..modeling.backbone import ZooModel
from ..modeling.selective_attention import SelectiveAttention
from ..reports.embedder_card import write_embedder_card
from ..reports.training_plots import write_embedder_plot
from .adapters import adapter_coverage, add_adapters, pinned, print_coverage
from .checkpoints import check_numbers
from .embedder_settings import EmbedderSettings
from .pairs import Pairs, read_pairs
from .report import public_sources, report_head
from .trainer import check_trackers, compute_dtype, computing, processes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND = "ssm-zoo finetuning of an embedder"
_FIELDS = ("train", "heldout")


@dataclass
class EmbedderRun:
    """What a finetuning of an embedder works with.

    Attributes:
        settings: what to do.
        output: the folder of the run.
        embedder: on its device.
        pairs: for "train" and "heldout".
        lengths: for "train" and "heldout" what :func:`_lengths` says.
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
        """The model inside the embedder."""
        return backbone_of(self.embedder)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training. Batches are full, hence what is left of an epoch is not trained on."""
        settings = self.settings
        batches = len(self.pairs["train"]) // (settings.batch_size * self.state.num_processes)
        return settings.steps or math.ceil(settings.epochs * batches)

    @property
    def heldout(self) -> RetrievalData:
        return heldout_retrieval(self.pairs["heldout"])

    @property
    def pool(self) -> int:
        return min(self.settings.pool_size, self.heldout.largest_pool)

    def before(self) -> dict[str, Any]:
        """Retrieval before training, in `before.json`: that of the first start, if it has measured it."""
        found = read_json_or_none(self.output / "before.json")
        self.state.wait_for_everyone()  # all have looked before the first one writes
        if found is None:
            found = self.evaluate("before", self.embedder)
            if self.state.is_main_process:
                write_json(self.output / "before.json", found)
        return found

    def evaluate(self, name: str, embedder: SentenceTransformer) -> dict[str, Any]:
        """What `evaluate_retrieval` says of an embedder, under a name."""
        settings, data = self.settings, self.heldout
        with computing(settings, embedder.device):
            scores = embedder_scores(embedder, data, batch_size=settings.mini_batch_size or settings.batch_size)
        measured = evaluate_retrieval(data, scores, pools=[self.pool], seed=settings.seed)
        check_numbers(measured, name)
        if self.state.is_main_process:
            accuracy = measured["pools"][0]["accuracy"]
            tqdm.write(f"{name}: nDCG@10 {measured['ndcg@10']:.4f}, {accuracy:.1%} right among {self.pool}")
        return {"name": name, **measured}


def heldout_retrieval(pairs: Pairs) -> RetrievalData:
    """Every anchor once as a query, every positive and negative once as a document."""
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
    """Carry out a finetuning, or go on with it.

    Args:
        settings: what to do.
        output: a new or empty folder, or the folder of an earlier start with the same settings.

    Returns:
        The report, as in `report.json`. Retrieval after training is measured on what is saved.

    Raises:
        ValueError: if sentence-transformers is not installed, or settings, model, pairs and folder do not fit together,
            before anything is written; if the base model has changed since the run was started; or if the loss, the
            gradient, a weight or an embedding is not finite.
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
    # Now, since a training that has ended should depend on nothing that may have gone meanwhile.
    origin = provenance(settings.model, run.settings.revision)
    coverage = _coverage(run)
    before = run.before()
    history = train_embedder(
        run.embedder, rows, run.settings, run.steps, run.output, run.embedder.device, state.num_processes
    )
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
        raise ValueError("heldout: some anchor belongs to every text there is; accepted: texts that are not its own")
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
    """Mean "tokens" of a text with its prompt, and the share that is "cut", for "anchors" and "documents".

    Raises:
        ValueError: if a text has no tokens, or the model has no embedding for one.
    """
    tokenizer: Any = embedder.tokenizer
    vocabulary, found = backbone_of(embedder).config.vocab_size, {}
    texts = {
        "anchors": (settings.query_prompt, pairs.anchors),
        "documents": (settings.document_prompt, pairs.documents),
    }
    for kind, (prompt, given) in texts.items():
        encoded = tokenizer([prompt + text for text in given], truncation=False, verbose=False)["input_ids"]
        for text, ids in zip(given, encoded, strict=True):
            if not ids:
                raise ValueError(f"{field}: the model's tokenizer has no token for the text {text!r}")
            if max(ids) >= vocabulary:
                raise ValueError(
                    f"model: its tokenizer gave the id {max(ids)}, but its vocab_size is {vocabulary}; the tokenizer "
                    "and the model do not belong together"
                )
        counts = [len(ids) for ids in encoded]
        cut = sum(count > settings.max_tokens for count in counts) / len(counts)
        found[kind] = {"tokens": sum(counts) / len(counts), "cut": cut}
    return found


def _check_choices(model: nn.Module, settings: EmbedderSettings) -> None:
    chooses = any(isinstance(module, SelectiveAttention) for module in model.modules())
    if chooses and settings.mini_batch_size is not None:
        raise ValueError(
            f"mini_batch_size: got {settings.mini_batch_size}; accepted with a model that chooses tokens: none, since "
            "its auxiliary loss is of whole batches"
        )


def _coverage(run: EmbedderRun) -> dict[str, Any] | None:
    """Which adapters learn, printed; as the first start found it, if it has. None without adapters."""
    if not isinstance(run.model, PeftModel):
        return None
    coverage = read_json_or_none(run.output / "coverage.json")
    run.state.wait_for_everyone()  # all have looked before the first one writes
    if coverage is None:
        from .embedder_trainer import infonce

        settings, embedder = run.settings, run.embedder
        first: Any = {name: texts[: min(settings.batch_size, 4)] for name, texts in run.pairs["train"].columns.items()}
        features = [embedder.preprocess(texts) for texts in first.values()]
        batches = [
            {
                key: value.to(embedder.device) if isinstance(value, torch.Tensor) else value
                for key, value in part.items()
            }
            for part in features
        ]
        loss = infonce(embedder, settings.model_copy(update={"mini_batch_size": None}), 1)
        with computing(settings, embedder.device):
            coverage = adapter_coverage(
                run.model, {"input_ids": batches[0]["input_ids"]}, lambda: loss(batches, torch.empty(0))
            )
        if run.state.is_main_process:
            write_json(run.output / "coverage.json", coverage)
    if run.state.is_main_process:
        print_coverage(coverage, Console())
    return coverage


def _report(
    run: EmbedderRun,
    origin: tuple[str, str | None],
    evaluations: list[dict[str, Any]],
    coverage: dict[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    settings, data = run.settings, run.heldout
    source, licence = origin
    config = run.model.config
    head = report_head(run, KIND, command_line(sys.argv[1:]), "peft", "sentence-transformers")
    named = {"model": source, "learning_rate": settings.peak_learning_rate}
    return {
        **head,
        "settings": {"model": source} | head["settings"] | named,
        "base": {
            "source": source,
            "revision": settings.revision,
            "model_type": config.model_type,
            "licence": licence,
        },
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
    """The plot, the embedder as a folder that appears whole, and the report."""
    plots = run.output / "plots"
    with decoration("the plot"):
        plots.mkdir(exist_ok=True)
        write_embedder_plot(report, plots / "loss.png")
    with new_folder(run.output / "model", overwrite=True) as folder:
        finished.save_pretrained(str(folder), create_model_card=False)
        with decoration("the plot in the model's folder"):
            shutil.copytree(plots, folder / "plots")
        with decoration("the model card"):
            write_embedder_card(folder, report)
    write_json(run.output / "report.json", report)


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TASK = "FEATURE_EXTRACTION"


def load_embedder_to_train(settings: EmbedderSettings) -> SentenceTransformer:
    """The base model, by the package's own class and without its head, with a pooling; on the CPU.

    Its weights are float32 where they are trained or computing is in float32; otherwise, under adapters, they keep the
    checkpoint's dtype.

    Raises:
        ValueError: if it is no model of the zoo, or weights are missing.
    """
    _check_backbone(settings)
    master = settings.method == "full" or compute_dtype(settings) == torch.float32
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


def _check_backbone(settings: EmbedderSettings) -> None:
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooModel)):
        raise ValueError(f"model: {settings.model} is of model_type {config.model_type!r}; accepted: one of the zoo")


def backbone_of(embedder: SentenceTransformer) -> ZooModel | PeftModel:
    """The model inside, or the one with adapters around it."""
    transformer: Any = embedder[0]
    return transformer.model


def adapt(embedder: SentenceTransformer, settings: EmbedderSettings) -> None:
    """Put adapters into an embedder; see `ssm_zoo.training.adapters.add_adapters`."""
    transformer: Any = embedder[0]
    transformer.model = add_adapters(transformer.model, settings, _TASK)


def finished_embedder(embedder: SentenceTransformer, settings: EmbedderSettings) -> SentenceTransformer:
    """What is saved of a trained embedder: itself, or the base model, read anew, with the adapters in its weights.

    These are in the dtype of the checkpoint.
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
