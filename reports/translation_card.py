"""The model card of a translating model, filled in from the report of its training and from nothing else."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from ..harness.published import without_folders
from .card_parts import (
    LOADED_ALONE,
    OUR_CODE,
    licence_sentences,
    linked_source,
    repetition,
    write_trained_card,
)
from .markdown import code, count, fenced, number, percent, seconds, table
from .training_card import adapters_of, base_fields, dead_adapters, method_of

_LOAD = """\
import torch
from transformers import {auto_class}, AutoTokenizer

repository, revision = "{repository}", "main"
model = {auto_class}.from_pretrained(repository, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision, trust_remote_code=True)

source = tokenizer("A text to translate.", add_special_tokens=False)["input_ids"]
prompt = torch.tensor([[{before}*source, tokenizer.{after}]])
written = model.generate(prompt, attention_mask=torch.ones_like(prompt), num_beams=5)
print(tokenizer.decode(written[0{skipped}], skip_special_tokens=True))"""


def write_translation_card(folder: Path, report: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md into the folder of a translating model, so that it is never seen half-written.

    Args:
        folder: a folder that `save_pretrained` wrote.
        report: report of the run; see `ssm_zoo.training.translation`.
        repo_id: the repository of the card, if known, for the title and the example.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="translation",
        tags=["ssm-zoo", report["model"]["model_type"], "custom_code"],
        **(base_fields(report) if report["base"] else {}),
    )
    write_trained_card(folder, metadata, _sections(report, repo_id))


def _sections(report: dict[str, Any], repo_id: str | None) -> dict[str, str]:
    """Return Markdown for each placeholder of the template."""
    base, model_type = report["base"], report["model"]["model_type"]
    own = f"{without_folders(base['source']).rpartition('/')[2]}, a translator" if base else f"{model_type}, translator"
    shared = repetition(report)
    if not base:
        config = fenced(yaml.safe_dump(report["model"]["config"], sort_keys=False), "yaml")
        shared["settings"] = "\n\n".join([shared["settings"], "MODEL, with what the tokenizer decided:", config])
    return {
        **shared,
        "title": code(repo_id.rpartition("/")[2] if repo_id else own),
        "introduction": _introduction(report),
        "summary": _summary(report),
        "loading": LOADED_ALONE,
        "snippet": fenced(_snippet(report, repo_id or "<this repository>"), "python"),
        "data": f"To train on: {_pairs(report, 'train')} Held out: {_pairs(report, 'heldout')} {_tokenizer(report)}",
        "training": _training(report),
        "adapters": adapters_of(report),
        "evaluations": _evaluations(report),
        "figure": "Training loss over the steps, and the held-out loss before and after.",
        "limits": "\n".join(f"- {sentence}" for sentence in _limits(report)),
        "licence": _licence(report),
    }


def _introduction(report: dict[str, Any]) -> str:
    model_type, base = code(report["model"]["model_type"]), report["base"]
    kind = "an encoder-decoder" if report["model"]["encoder_decoder"] else "a decoder-only model"
    if base is None:
        parameters = count(report["parameters"]["all"])
        return f"A {model_type} with {parameters} parameters, {kind}, trained from scratch to translate with ssm-zoo."
    merged = "" if report["settings"]["method"] == "full" else ", merged into the weights"
    return (
        f"{linked_source(base['source'])} ({model_type}), {kind}, finetuned to translate with ssm-zoo: "
        f"{method_of(report)}{merged}."
    )


def _snippet(report: dict[str, Any], repository: str) -> str:
    both, tokenizer = report["model"]["encoder_decoder"], report["tokenizer"]
    return _LOAD.format(
        repository=repository,
        auto_class="AutoModelForSeq2SeqLM" if both else "AutoModelForCausalLM",
        before="tokenizer.bos_token_id, " if tokenizer["prompt_starts"] else "",
        after="eos_token_id" if both else "sep_token_id",
        skipped="" if both else ", prompt.shape[1] :",
    )


def _summary(report: dict[str, Any]) -> str:
    before, after = report["evaluations"][0]["loss"], report["evaluations"][-1]["loss"]
    change = "fell" if after < before else "did not fall"
    return (
        f"The held-out loss {change}: {number(before)} before, {number(after)} after (nats per token of the "
        "translations). `ssm-zoo evaluate translation` measures BLEU, chrF and the recall of names."
    )


def _pairs(report: dict[str, Any], field: str) -> str:
    data, settings = report["data"][field], report["settings"]
    most, joined = settings["max_tokens"], settings["concatenate"]
    lengths = f"{data['source_tokens']:.0f} and {data['target_tokens']:.0f} tokens on average"
    together = (
        f", joined at random to {count(data['pairs'] + data['dropped'])} of 1 to {count(joined)} consecutive ones"
        if field == "train" and joined > 1
        else ""
    )
    sides = f"a side of more than {count(most)} tokens"
    left_out = f"; {count(data['dropped'])} with {sides} were left out" if data["dropped"] else ""
    cut = f"; {count(data['cut'])} with {sides} were cut" if data["cut"] else ""
    trained = f" {count(data['in_training'])} of them are also trained on." if data.get("in_training") else ""
    names = ", ".join(map(code, data["sources"]))
    return f"{names}, {count(data['read'])} pairs{together} ({lengths}{left_out}{cut}).{trained}"


def _tokenizer(report: dict[str, Any]) -> str:
    tokenizer, entries = report["tokenizer"], count(report["tokenizer"]["entries"])
    after = code(str(tokenizer["separator"]))
    if report["base"] is None:
        kind = f"a byte-level BPE of {entries} entries after NFKC, learnt from both sides of the training pairs"
    else:
        kind = f"the base model's, {entries} entries"
    added = (
        ", which was added to it; its embedding started as the mean of the others"
        if tokenizer["separator_added"]
        else ""
    )
    return f"Tokenizer: {kind}. After a source stands {after}{added}."


def _training(report: dict[str, Any]) -> str:
    settings = report["settings"]
    rows = settings["batch_size"] * settings["gradient_accumulation"] * report["processes"]
    how = f"packed rows of up to {count(settings['row_tokens'])} tokens" if settings["packing"] else "padded pairs"
    warmup = settings["warmup"]
    rising = f"{count(warmup)} steps" if isinstance(warmup, int) else f"{percent(warmup)} of the steps"
    smoothing = f", label smoothing {settings['label_smoothing']:g}" if settings["label_smoothing"] else ""
    dropout = f", residual dropout {settings['residual_dropout']:g}" if settings["residual_dropout"] else ""
    return (
        f"Loss on the translations only; AdamW, {count(report['steps'])} steps of {count(rows)} {how}, peak learning "
        f"rate {settings['learning_rate']:g} reached in {rising}, {code(settings['schedule'])} schedule, weight decay "
        f"{settings['weight_decay']:g}{smoothing}{dropout}, computed in {code(report['compute_dtype'])}, seed "
        f"{settings['seed']}; {count(report['tokens'])} tokens predicted in {seconds(report['seconds'])} seconds."
    )


def _evaluations(report: dict[str, Any]) -> str:
    rows = [
        (part["name"], number(part["loss"]), number(part["perplexity"], 2), count(part["tokens"]))
        for part in (report["evaluations"][0], report["evaluations"][-1])
    ]
    return table(("Held-out pairs", "Loss (nats per token)", "Perplexity", "Predictions"), rows)


def _limits(report: dict[str, Any]) -> list[str]:
    sentences = [
        "One run with one seed; the held-out pairs are what was given for it, and no other text was translated.",
        "A fluent translation may be wrong: have it checked before anything depends on it.",
    ]
    if report["base"]:
        sentences.append("What the base model should not be used for, this one should not either.")
    if report["evaluations"][-1]["loss"] >= report["evaluations"][0]["loss"]:
        sentences.insert(0, "**The held-out loss did not fall.**")
    return dead_adapters(report) + sentences


def _licence(report: dict[str, Any]) -> str:
    if report["base"] is not None:
        return licence_sentences(report["base"]["licence"], "the base model's")
    return (
        "The licence of the training text is not known to ssm-zoo: find out before you use or share the weights. "
        f"{OUR_CODE}"
    )
