"""Finetune a reranker: from settings and judged queries to a folder that sentence-transformers loads.

    from ssm_zoo.training.reranker import finetune_reranker
    from ssm_zoo.training.reranker_settings import parse_reranker_settings

    settings = parse_reranker_settings({"model": "runs/lm/model", "train": ["beir/scifact,train"],
                                        "heldout": ["beir/scifact,test"]})
    report = finetune_reranker(settings, "runs/reranker")

The output folder contains `run.json` (the description of the run), `coverage.json` (gradients of the adapters),
`before.json` (ranking before training) and `checkpoints/`; at the end also `model/`, with adapters merged into the
weights, `report.json` and `plots/loss.png`. If a part of the training queries was held out, `heldout.txt` has their
ids, for `ssm-zoo evaluate rerank --queries`. A run with the same settings in the same folder resumes from the last
complete checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import set_seed

from ..conversion.load_model import check_finite
from ..evaluation.embedder import require_sentence_transformers
from ..evaluation.metrics.metric import require_package
from ..evaluation.reranking import check_queries, means, measure_run, pair_lengths, rerank
from ..evaluation.reranking_data import without_list
from ..harness.fingerprint import claim_run, fingerprint
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.run_folder import check_output_folder, claimed_folders_end, write_json
from ..harness.whole_files import write_text_whole
from ..modeling.pretrained import is_bidirectional
from ..reports.reranker_card import write_reranker_card
from ..reports.training_plots import write_reranker_plot
from .adapters import adapter_coverage, check_same_base, pinned
from .checkpoints import check_numbers
from .ranking_groups import RankingData, read_ranking_data
from .report import (
    base_report,
    measured_coverage,
    measured_once,
    report_head,
    write_folder,
    write_plots,
)
from .reranker_settings import RerankerSettings
from .sources import public_sources
from .texts import check_ids
from .trainer import check_trackers, computing, optimiser_steps, processes

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

KIND = "ssm-zoo finetuning of a reranker"
HELD_OUT = "heldout.txt"
"""Name of the file in the run's folder with the ids of the queries that the seed held out."""


@dataclass
class RerankerRun:
    """State of a reranker's finetuning.

    Attributes:
        settings: settings of the run.
        output: folder of the run.
        reranker: the reranker, on its device.
        data: groups and held-out lists.
        lengths: result of :func:`_lengths`.
        state: accelerate's view of the processes.
    """

    settings: RerankerSettings
    output: Path
    reranker: CrossEncoder
    data: RankingData
    lengths: dict[str, float]
    state: PartialState

    @property
    def model(self) -> Any:
        """Model inside the reranker."""
        transformer: Any = self.reranker[0]
        return transformer.model

    @property
    def depth(self) -> int | None:
        """Documents of each held-out list that are re-ranked; None: all, in groups from files, which have no order."""
        return None if self.data.first_stage is None else self.settings.depth

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return optimiser_steps(self.settings, len(self.data.groups), self.state.num_processes)

    @property
    def collator(self) -> Any:
        """Collator of the groups."""
        from .reranker_trainer import GroupCollator

        return GroupCollator(self.reranker.tokenizer, self.settings.rule, self.settings.packing)

    def evaluate(self, name: str, reranker: CrossEncoder) -> dict[str, Any]:
        """Return the means of `measure_run` for the held-out lists, re-ranked, with a name for the report."""
        settings, data = self.settings, self.data
        model: Any = reranker[0].model
        training = model.training
        model.eval()
        with computing(settings.dtype, reranker.device):
            ranked = rerank(
                reranker,
                data.collection,
                data.run,
                depth=self.depth,
                rule=settings.rule,
                batch_size=settings.batch_size * 4,
            )
        model.train(training)
        measured = means(measure_run(data.collection, ranked, self.depth))
        check_numbers(measured, name)
        if self.state.is_main_process:
            tqdm.write(f"{name}: nDCG@10 {measured['ndcg@10']:.4f}, MRR@10 {measured['mrr@10']:.4f}")
        return {"name": name, **measured}


@claimed_folders_end()
def finetune_reranker(settings: RerankerSettings, output: str | Path) -> dict[str, Any]:
    """Run or resume the finetuning of a reranker.

    Args:
        settings: settings of the run.
        output: a new or empty folder, or the folder of an unfinished run with the same settings.

    Returns:
        The report, as in `report.json`. Ranking after training is measured with the saved weights.

    Raises:
        ValueError: if a package is not installed, or settings, model, data and folder do not fit together (nothing is
            written in these cases); if the base model has changed since the run was started; or if the loss, the
            gradient, a weight or a score is not finite.
    """
    require_sentence_transformers()
    require_package("ir_measures", "ir-measures", "reranking")
    from .reranker_model import finished_reranker
    from .reranker_trainer import train_reranker

    check_trackers(settings.report_to)
    state = processes()
    if state.is_main_process:
        check_output_folder(output)
    data = read_ranking_data(settings)
    run = _prepare(pinned(settings, Path(output)), Path(output), data, state)
    # Read now: the source may be gone when the training ends.
    origin = provenance(settings.model, run.settings.revision)
    coverage = measured_coverage(run, lambda: _coverage(run))
    before = measured_once(run, "before", lambda: run.evaluate("before", run.reranker))
    transformer: Any = run.reranker[0]
    transformer.model, history = train_reranker(
        run.model, run.collator, data.groups, run.settings, run.steps, run.output, run.reranker.device
    )
    if settings.method == "lora":
        check_same_base(run.settings, run.output)
    finished = finished_reranker(run.reranker, run.settings)
    check_finite(finished, "the finished reranker", "Lower learning_rate.")
    after = run.evaluate("after", finished)
    report = _report(run, origin, [{**before, "step": 0}, {**after, "step": run.steps}], coverage, history)
    if state.is_main_process:
        _write_results(run, report, finished)
    state.wait_for_everyone()
    return report


def _prepare(settings: RerankerSettings, output: Path, data: RankingData, state: PartialState) -> RerankerRun:
    """Load and check everything, then claim the folder."""
    from .reranker_model import adapt, load_reranker_to_train

    reranker = load_reranker_to_train(settings)
    lengths = _lengths(reranker, data, settings)
    set_seed(settings.seed)
    if settings.method == "lora":
        adapt(reranker, settings)
    assert state.device is not None
    reranker.to(state.device)
    if state.is_main_process:
        sources = {"model": fingerprint(settings.model, settings.revision)}
        claim_run(output, {**settings.identity, "data": data.fingerprints()}, sources, KIND)
        if not settings.heldout:
            write_text_whole(output / HELD_OUT, "".join(f"{query}\n" for query in data.collection.queries))
    state.wait_for_everyone()
    return RerankerRun(settings, output, reranker, data, lengths, state)


def _lengths(reranker: CrossEncoder, data: RankingData, settings: RerankerSettings) -> dict[str, float]:
    """Return the mean "tokens" of the texts of the training pairs and the share of pairs that are "cut".

    See :func:`ssm_zoo.evaluation.reranking.pair_lengths`.

    Raises:
        ValueError: if a query leaves no room for a document, or the model has no embedding for a token.
    """
    tokenizer: Any = reranker.tokenizer
    transformer: Any = reranker[0]
    vocabulary = transformer.model.config.vocab_size
    check_queries(tokenizer, {group.query for group in data.groups}, settings.limit)
    check_queries(tokenizer, set(data.collection.queries.values()), settings.limit)
    pairs = [(group.query, document) for group in data.groups for document in group.documents]
    found = pair_lengths(tokenizer, pairs, settings.rule, settings.limit)
    check_ids([int(found.pop("largest"))], vocabulary)
    return found


def _coverage(run: RerankerRun) -> dict[str, Any]:
    """Compute the coverage of the adapters on the first groups."""
    from .reranker_trainer import group_loss

    batch: Any = send_to_device(run.collator(run.data.groups[: run.settings.batch_size]), run.reranker.device)
    with computing(run.settings.dtype, run.reranker.device):
        return adapter_coverage(run.model, batch, lambda: group_loss(run.model, batch, run.settings.loss))


def _report(
    run: RerankerRun,
    origin: tuple[str, str | None],
    evaluations: list[dict[str, Any]],
    coverage: dict[str, Any] | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    from .reranker_model import template_of

    settings, data, config = run.settings, run.data, run.model.config
    head = report_head(run, KIND, command_line(sys.argv[1:]), "peft", "sentence-transformers", "ir-measures", "bm25s")
    # The name of a file, without the folders of this machine.
    files = {key: None if file is None else Path(file).name for key, file in _run_files(settings).items()}
    head["settings"] |= files
    first = None
    if data.first_stage is not None:
        first = {"name": data.first_stage, **means(measure_run(data.collection, data.run, run.depth))}
    listed = sum(len(documents) for documents in data.run.values())
    return {
        **head,
        **base_report(settings, head, config.model_type, origin),
        "template": template_of(run.reranker.tokenizer, is_bidirectional(config)),
        "reranking": {**settings.rule.entry(), "max_tokens": settings.limit},
        "coverage": coverage,
        "data": {
            "train": {
                "sources": public_sources(settings.train),
                "groups": len(data.groups),
                "queries": len({group.query for group in data.groups}),
                "pairs": sum(len(group.documents) for group in data.groups),
                "left_out": {reason: number for reason, number in data.left_out.items() if number},
                **run.lengths,
            },
            "heldout": {
                "sources": public_sources(settings.heldout or settings.train),
                "split": not settings.heldout,
                "queries": len(data.collection.queries),
                "pairs": listed,
                "without_list": without_list(data.run),
            },
        },
        "first_stage": first,
        "evaluations": evaluations,
        "steps": run.steps,
        "seconds": history[-1]["seconds"],
        "history": history,
    }


def _run_files(settings: RerankerSettings) -> dict[str, str | None]:
    return {"run": settings.run, "heldout_run": settings.heldout_run}


def _write_results(run: RerankerRun, report: dict[str, Any], finished: CrossEncoder) -> None:
    """Write the plot, the folder of the reranker, which appears complete or not at all, and the report."""
    write_plots(run.output, report, write_reranker_plot)
    save = partial(finished.save_pretrained, create_model_card=False)
    write_folder(run.output, "model", save, write_reranker_card, report)
    write_json(run.output / "report.json", report)
