"""`ssm-zoo finetune`: train a model of the zoo further."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.processes import process_number
from ..training.embedder_settings import EmbedderSettings, parse_embedder_settings
from ..training.reranker_settings import RerankerSettings, parse_reranker_settings
from ..training.settings import LanguageModelSettings, parse_settings
from ..training.translation_settings import TranslationSettings, parse_translation_settings
from .computing import ComputingCommand
from .options import Output, Private, PushToHub, with_settings
from .push import announce, check_push_options, push_folder
from .sources import model_folder, model_source
from .train import print_losses

finetune = typer.Typer(no_args_is_help=True, help="Train a model further, with adapters or all weights.")


@finetune.command("lm", cls=ComputingCommand)
@with_settings(LanguageModelSettings)
def language_model(
    values: dict[str, Any],
    output: Output,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write the model with the adapter merged into its weights.")
    ] = False,
    repo: PushToHub = None,
    private: Private = False,
) -> None:
    """Finetune on text as a language model. Measures the held-out loss before and after.

    --push-to-hub uploads the adapter, or the model if it was merged or all weights were trained. The same command
    resumes an unfinished run at its last checkpoint.
    """
    settings = parse_settings({**values, "model": model_source(values["model"])})
    whole = merge or settings.method == "full"
    if repo is not None and not whole and Path(settings.model).is_dir():
        raise ValueError(
            f"--push-to-hub: the adapter's base is the folder {settings.model}, which others do not have. Push the "
            "base first and name its Hub id, or push the merged model with --merge."
        )
    check_push_options(repo, private=private)
    from ..training.language_model import finetune_language_model

    report = finetune_language_model(settings, output, merge=merge)
    if process_number():  # of several processes the first one speaks
        return
    folder = output / ("model" if whole else "adapter")
    print_losses(report, output, folder)
    if repo is not None:
        from ..reports.training_card import write_card

        write_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


@finetune.command("embed", cls=ComputingCommand)
@with_settings(EmbedderSettings)
def embed(values: dict[str, Any], output: Output, repo: PushToHub = None, private: Private = False) -> None:
    """Finetune to embed texts, by InfoNCE on pairs of texts that belong together.

    Needs sentence-transformers (the extra "embed"), which also loads the result. Measures retrieval on the held-out
    pairs before and after. The same command resumes an unfinished run at its last checkpoint.
    """
    settings = parse_embedder_settings({**values, "model": model_source(values["model"])})
    check_push_options(repo, private=private)
    from ..training.embedder import finetune_embedder

    report = finetune_embedder(settings, output)
    if process_number():  # of several processes the first one speaks
        return
    folder, (before, after) = output / "model", report["evaluations"]
    typer.echo(f"held-out nDCG@10: {before['ndcg@10']:.4f} before, {after['ndcg@10']:.4f} after")
    typer.echo(f"report: {output / 'report.json'}   model: {folder}")
    if repo is not None:
        from ..reports.embedder_card import write_embedder_card

        write_embedder_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


@finetune.command("translate", cls=ComputingCommand)
@with_settings(TranslationSettings)
def translate(values: dict[str, Any], output: Output, repo: PushToHub = None, private: Private = False) -> None:
    """Train to translate, from pairs of texts: a pretrained model, or with --train-tokenizer a new one.

    Measures the held-out loss before and after; `ssm-zoo evaluate translation` measures the translations. The same
    command resumes an unfinished run at its last checkpoint.
    """
    if values.get("train_tokenizer") is None:
        values["model"] = model_source(values["model"])
    elif Path(values["model"]).is_dir():
        values["model"] = str(model_folder(Path(values["model"])))
    settings = parse_translation_settings(values)
    check_push_options(repo, private=private)
    from ..training.translation import finetune_translation

    report = finetune_translation(settings, output)
    if process_number():  # of several processes the first one speaks
        return
    folder = output / "model"
    for field, data in report["data"].items():
        if data["dropped"] or data["cut"]:
            what = "pairs" if field == "heldout" or settings.concatenate == 1 else "concatenated pairs"
            typer.echo(f"{field}: {data['dropped']:,} {what} left out and {data['cut']:,} cut as too long")
    print_losses(report, output, folder)
    if repo is not None:
        from ..reports.translation_card import write_translation_card

        write_translation_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))


@finetune.command("rerank", cls=ComputingCommand)
@with_settings(RerankerSettings)
def rerank(values: dict[str, Any], output: Output, repo: PushToHub = None, private: Private = False) -> None:
    """Finetune to score how well documents answer queries: a cross-encoder of any family.

    Needs sentence-transformers (the extra "rerank"), which also loads the result. Re-ranks held-out lists before and
    after. The same command resumes an unfinished run at its last checkpoint.
    """
    settings = parse_reranker_settings({**values, "model": model_source(values["model"])})
    check_push_options(repo, private=private)
    from ..training.reranker import finetune_reranker

    report = finetune_reranker(settings, output)
    if process_number():  # of several processes the first one speaks
        return
    folder, (before, after) = output / "model", report["evaluations"]
    first = report["first_stage"]
    beside = f", {first['ndcg@10']:.4f} in the order of {first['name']}" if first else ""
    typer.echo(f"held-out nDCG@10: {before['ndcg@10']:.4f} before, {after['ndcg@10']:.4f} after{beside}")
    typer.echo(f"report: {output / 'report.json'}   model: {folder}")
    if repo is not None:
        from ..reports.reranker_card import write_reranker_card

        write_reranker_card(folder, report, repo_id=repo)
        announce(push_folder(folder, repo, private=private))
