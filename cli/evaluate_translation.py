"""`ssm-zoo evaluate translation`: measure a model's translations, next to the untranslated source."""

from typing import Annotated, Any

import typer

from .evaluation_report import Overwrite, Report, check_output, check_picture, model_name, write_report
from .options import Dtype, Revision, TrustRemoteCode
from .sources import model_source

_KIND = "translation"


def translation(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model, or folder of a run.")],
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="PAIRS",
            help="Texts and references: SOURCE,TARGET (two files, a text on every line), .tsv, .jsonl (also with .gz), "
            ".parquet, or datasets:PATH,SPLIT.",
        ),
    ],
    source_field: Annotated[
        str | None,
        typer.Option(
            "--source-field", metavar="NAME", help="Field of the texts to translate; in a .tsv file its column."
        ),
    ] = None,
    target_field: Annotated[
        str | None,
        typer.Option("--target-field", metavar="NAME", help="Field of the references; in a .tsv file its column."),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Translate from the target to the source.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first pairs.")] = None,
    training_pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--training-pairs",
            metavar="PAIRS",
            help="Pairs that the model was trained on, to divide entities by their frequency; may be repeated.",
        ),
    ] = None,
    beams: Annotated[int, typer.Option("--beams", help="Beams of the search; 1 is greedy.")] = 5,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            "--length-penalty",
            help="Exponent of the number of generated tokens by which the score of a hypothesis is divided; only with "
            "beams.  [default: 1]",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Number of tokens at which a translation without an end is cut.")
    ] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts that are translated together.")] = 32,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="WORDS", help="Bounds between the bins of source length, in words.")
    ] = "10,20,40,80",
    tokenize: Annotated[
        str, typer.Option("--tokenize", metavar="NAME", help="sacrebleu's tokenizer for BLEU, e.g. 13a, zh, ja-mecab.")
    ] = "13a",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure translations: BLEU and chrF of the whole corpus, by source length, and the recall of names and numbers.

    The scores of the sources themselves, as if nothing was translated, stand beside them. With --output the
    translations are written, too, and a picture with the same name. Needs sacrebleu (the extra "metrics").
    """
    check_output(output, _KIND, overwrite)
    picture = check_picture(output, overwrite)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    bounds = [_bound(text) for text in lengths.split(",")] if lengths else []
    place = model_source(model, revision)
    from ..evaluation.compare_rerankers import new_names
    from ..evaluation.metrics.metric import require_package
    from ..evaluation.translation import check_decoding, translate
    from ..evaluation.translation_scores import check_lengths, count_entities, score_translations, shared_entities

    require_package("sacrebleu", "sacrebleu", "evaluate translation")
    check_lengths(bounds)
    check_decoding(beams, length_penalty, max_new_tokens, batch_size)
    _check_tokenizer(tokenize)
    from ..training.parallel_text import read_parallel
    from ..training.sources import public_sources

    reading: Any = {"source_field": source_field, "target_field": target_field, "reverse": reverse}
    texts = read_parallel(pairs, "pairs", **reading)
    sources, references = texts.sources[:limit], texts.targets[:limit]
    counts = None
    if training_pairs:
        seen = read_parallel(training_pairs, "training_pairs", **reading)
        entities = [shared_entities(source, target) for source, target in zip(sources, references, strict=True)]
        counts = count_entities(seen.sources, seen.targets, entities)
    loaded, form = _load(place, dtype, revision, trust_remote_code)
    searching = {"beams": beams, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    found = translate(loaded, form, sources, **searching, batch_size=batch_size, progress=True)
    scoring: Any = {"training_counts": counts, "lengths": bounds, "tokenize": tokenize}
    copy, name = new_names(["copy", model_name(model)])
    systems = {
        name: score_translations(found.texts, sources, references, **scoring),
        copy: score_translations(sources, sources, references, **scoring),
    }
    generation = {
        "texts": len(sources),
        "tokens": found.tokens,
        "hit_the_limit": found.finished.count(False),
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
    }
    _print(systems, generation, max_new_tokens)
    if picture is None or output is None:
        return
    from ..harness.published import decoration
    from ..reports.translation_plots import write_translation_plot

    settings = {
        "model": model_name(model),
        "pairs": public_sources(pairs),
        "training_pairs": public_sources(training_pairs or []),
        **reading,
        "limit": limit,
        **searching,
        "batch_size": batch_size,
        "lengths": bounds,
        "tokenize": tokenize,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    results = {"systems": systems, "generation": generation, "translations": found.texts}
    write_report(output, _KIND, settings, results)
    with decoration("the picture"):
        write_translation_plot(results, picture)
        typer.echo(f"picture: {picture}")


def _load(source: str, dtype: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the model, on its device, and the format of its sequences."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ..conversion.load_model import load_config, load_model, load_tokenizer
    from ..evaluation.translation_format import translation_format

    loading: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(source, **loading)
    form = translation_format(load_tokenizer(source, **loading), config, "MODEL")
    auto_class = AutoModelForSeq2SeqLM if form.is_encoder_decoder else AutoModelForCausalLM
    model: Any = load_model(source, auto_class, dtype=dtype, **loading)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), form


def _bound(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"`lengths` must be numbers of words, e.g. 10,20, got {text!r}.") from None


def _check_tokenizer(name: str) -> None:
    from sacrebleu.metrics.bleu import BLEU

    if name not in BLEU.TOKENIZERS:
        raise ValueError(f"`tokenize` must be among {', '.join(sorted(BLEU.TOKENIZERS))}, got {name!r}.")
    try:
        BLEU(tokenize=name)
    except (ImportError, RuntimeError, OSError, AssertionError) as error:  # a package, or a file to download
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"`tokenize`: sacrebleu cannot use {name!r}: {reason}") from None


def _print(systems: dict[str, dict[str, Any]], generation: dict[str, Any], limit: int) -> None:
    from rich.console import Console
    from rich.table import Table

    measured = list(systems.values())
    table = Table(title=f"{generation['texts']:,} texts", title_justify="left")
    for heading in ("", *systems):
        table.add_column(heading, justify="right" if heading else "left")
    for name, key in (("BLEU", "bleu"), ("chrF", "chrf")):
        table.add_row(name, *(f"{system[key]:.2f}" for system in measured))
    for row in zip(*(system["by_length"] for system in measured), strict=True):
        words = f"{row[0]['from']}+" if row[0]["to"] is None else f"{row[0]['from']}-{row[0]['to']}"
        cells = [f"{one['bleu']:.2f} / {one['chrf']:.2f}" for one in row]
        table.add_row(f"BLEU / chrF of {row[0]['texts']:,} with {words} words", *cells)
    entities = [system["entities"] for system in measured]
    for name in ("", "unseen", "regular", "frequent"):
        found = [one.get(name) if name else one for one in entities]
        if found[0] is not None and found[0]["recall"] is not None:
            title = f"recall of {found[0]['entities']:,} {name + ' ' if name else ''}entities"
            table.add_row(title, *(f"{one['recall']:.4f}" for one in found))
    console = Console()
    console.print(table)
    for key in ("bleu_signature", "chrf_signature"):
        typer.echo(f"{key.partition('_')[0]}: {measured[0][key]}")
    typer.echo(
        f"{generation['hit_the_limit']:,} of {generation['texts']:,} translations hit the limit of {limit:,} tokens; "
        f"{generation['tokens']:,} tokens in {generation['seconds']:.1f} s, {generation['tokens_per_second']:,.0f} a "
        "second"
    )
