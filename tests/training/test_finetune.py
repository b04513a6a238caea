"""A finetuning from settings to folder: loss, resumption, merging, cards; and settings that are refused."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, make_model
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama, save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ssm_zoo.conversion.export import verify_export
from ssm_zoo.modeling.position_mixers import PositionMixer
from ssm_zoo.training.adapters import load_base, load_tokenizer
from ssm_zoo.training.language_model import finetune_language_model
from ssm_zoo.training.settings import parse_settings
from ssm_zoo.training.texts import encode, read_documents
from ssm_zoo.training.trainer import ZooTrainer

TEXT = Path(__file__).resolve().parents[2] / "distill" / "data" / "wikitext2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with a tokenizer of characters, and a little real text of one paragraph a document."""
    made = tmp_path_factory.mktemp("finetune")
    for name in ("all-four", "mamba2"):
        make_model(name).save_pretrained(made / name)
        save_tokenizer(made / name)
    for split, paragraphs in (("train", 12), ("heldout", 4)):
        text = (TEXT / f"{split}.txt").read_text(encoding="utf-8").lower()
        documents = [" ".join(re.sub(r"[^a-z .,]", "", part).split())[:120] for part in text.split("\n\n")]
        kept = [part for part in documents if len(part) > 60][:paragraphs]
        (made / f"{split}.txt").write_text("\n\n".join(kept), encoding="utf-8")
    return made


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "all-four"),
        "train": [str(folder / "train.txt")],
        "heldout": [str(folder / "heldout.txt")],
        "separator": "\n\n",
        "rank": 4,
        "dropout": 0.2,
        "row_tokens": 128,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "steps": 10,
        "learning_rate": 3e-2,
        "checkpoint_every": 4,
        **changes,
    }


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run with a merged model."""
    finetune_language_model(parse_settings(values(folder)), folder / "run", merge=True)
    return folder / "run"


def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 41).view(2, 20) % VOCAB
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def counted(monkeypatch: pytest.MonkeyPatch, most: int = 1000) -> list[None]:
    """The Trainer's forwards from now on; it is killed after so many."""
    calls, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(None)
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", counting)
    return calls


# Training


def test_the_loss_falls_on_real_text(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    before, after = report["evaluations"]
    assert after["loss"] < before["loss"] - 0.3
    assert before["tokens"] == after["tokens"] == report["data"]["heldout"]["targets"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert [point["step"] for point in report["history"]] == list(range(1, 11))
    assert report["history"][-1]["loss"] < report["history"][0]["loss"]
    seconds = [point["seconds"] for point in report["history"]]
    assert 0 < seconds[0] < seconds[-1] == report["seconds"]
    assert report["data"]["train"]["documents"] == 12
    assert 0.5 < report["data"]["train"]["filled"] <= 1
    assert report["parameters"]["trained"] == report["coverage"]["trainable_parameters"]
    assert json.loads((run / "coverage.json").read_text()) == report["coverage"]
    assert report["coverage"]["dead"] == []
    assert {"peft", "torch", "transformers", "accelerate"} <= report["versions"].keys()


def test_the_measured_loss_is_that_of_separate_documents(folder: Path, run: Path) -> None:
    settings = parse_settings(values(folder))
    base: Any = load_base(settings).eval()
    texts = read_documents(settings.heldout, "heldout", separator="\n\n")
    tokenizer = load_tokenizer(settings)
    total = targets = 0.0
    for ids in encode(texts, tokenizer, VOCAB, progress=False):
        assert ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            scores = base(input_ids=ids[None].long()).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(scores, ids[1:].long(), reduction="sum").item()
        targets += len(ids) - 1
    before = json.loads((run / "before.json").read_text())
    assert (before["tokens"], before["loss"]) == (targets, pytest.approx(total / targets, abs=1e-5))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, run: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 7, and in the middle of the checkpoint of step 8, with a dropout that depends on the generator."""
    if method == "lora":
        settings, expected = values(folder), run
    else:
        settings = values(folder, method="full", weight_decay=0.1)
        settings = {key: value for key, value in settings.items() if key not in ("rank", "dropout")}
        expected = tmp_path / "whole"
        finetune_language_model(parse_settings(settings), expected)
    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        counted(patch, 2 * 6)
        with pytest.raises(KeyboardInterrupt):
            finetune_language_model(parse_settings(settings), output)
    assert not (output / "report.json").exists()
    torn = shutil.copytree(output / "checkpoints" / "checkpoint-4", output / "checkpoints" / "checkpoint-8")
    (torn / "trainer_state.json").unlink()
    forwards = counted(monkeypatch)
    finetune_language_model(parse_settings(settings), output)
    assert len(forwards) == 2 * (10 - 4)
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    ours, theirs = load_file(output / weights), load_file(expected / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (output / "coverage.json").exists() == (method == "lora")
    if method == "full":
        assert json.loads((output / "model" / "config.json").read_text())["use_cache"]
    reports = [json.loads((path / "report.json").read_text()) for path in (output, expected)]
    for key in ("evaluations", "coverage", "steps"):
        assert reports[0][key] == reports[1][key]
    curves = [[(point["step"], point["loss"], point["grad_norm"]) for point in r["history"]] for r in reports]
    assert curves[0] == curves[1]


def test_a_finished_run_is_not_trained_further(folder: Path, run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "model")
    report = finetune_language_model(parse_settings(values(folder)), again)
    before = json.loads((run / "report.json").read_text())
    assert (report["history"], report["evaluations"]) == (before["history"], before["evaluations"])
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (again, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (again / "model").exists()


def test_a_run_of_other_settings_is_refused(folder: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="rank: 4 there, 5 here"):
        finetune_language_model(parse_settings(values(folder, rank=5)), run)
    with pytest.raises(ValueError, match=r"data\.train: '\w+' there, '\w+' here"):
        finetune_language_model(parse_settings(values(folder, separator=" the ")), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_merged_computes_what_the_adapter_does(folder: Path, run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "all-four")
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(run / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "model"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert (merged - plain).abs().max() > 0.1
    assert verify_export(run / "model")["bit_equal"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dora": True, "gradient_checkpointing": True},
        {"packing": False, "schedule": "constant", "target_modules": ["in_proj", "mlp.up_proj"]},
        {"dtype": "bfloat16", "schedule": "linear"},
    ],
    ids=["dora-checkpointing", "padded-constant-targets", "bfloat16-linear"],
)
def test_other_ways_learn_too(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    report = finetune_language_model(parse_settings(values(folder, steps=5, **changes)), tmp_path / "run")
    assert report["evaluations"][1]["loss"] < report["evaluations"][0]["loss"] - 0.1
    rates = [point["learning_rate"] for point in report["history"]]
    assert (rates[-1] == rates[0]) == (changes.get("schedule") == "constant")
    kinds = {entry["kind"] for entry in report["coverage"]["adapters"]}
    assert ("out_proj" in kinds) == ("target_modules" not in changes)
    assert report["compute_dtype"] == changes.get("dtype", "float32")


@pytest.mark.parametrize("name", ["mamba", "mamba2", "all-four", "mixer-options", "mixer-columns"])
def test_weight_decay_is_of_projections_mixing_weights_and_embeddings_alone(name: str, tmp_path: Path) -> None:
    """Mamba-1's decay rates are a matrix, and yet no weights."""
    model = make_model(name)
    trainer = ZooTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    layers = (torch.nn.Linear, torch.nn.Embedding, PositionMixer)
    weights = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, layers)}
    assert set(trainer.get_decay_parameter_names(model)) == weights & dict(model.named_parameters()).keys()


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+. Lower learning_rate"):
        finetune_language_model(parse_settings(values(folder, learning_rate=1e30)), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


# Cards


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_card_says_what_was_done(run: Path, kind: str) -> None:
    report = json.loads((run / "report.json").read_text())
    card = ModelCard.load(run / kind / "README.md")
    before, after = (f"{evaluation['loss']:,.4f}" for evaluation in report["evaluations"])
    parts = [before, after, "`all-four`", "zoo_hybrid", "LoRA of rank 4", "`train.txt`", "12 documents", "`in_proj`"]
    parts += [report["versions"]["peft"], report["versions"]["torch"], report["hardware"]["cpu"], "row_tokens: 128"]
    parts += ["PeftModel.from_pretrained" if kind == "adapter" else "merged into the weights"]
    for part in parts:
        assert part in card.text, part
    assert card.data.to_dict()["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert (run / kind / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(run.parent) not in card.content
    assert str(run.parent) not in (run / "report.json").read_text()


# Texts


def test_documents_of_every_kind_of_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n\n \n\n")
    (tmp_path / "b.jsonl").write_text('{"body": "three\u2028four", "id": 1}\n\n{"body": "five"}\n', encoding="utf-8")
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    found = read_documents(sources, "train", separator="\n\n", text_field="body")
    assert found == ["one", "two", "three\u2028four", "five"]
    assert read_documents(sources[:1], "train") == ["one\n\ntwo\n\n \n\n"]


def test_documents_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "one", "id": 1}\n{"body": "two", "id": 2}\n')
    source = f"datasets:{tmp_path / 'data'},train"
    assert read_documents([source], "train", text_field="body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"train: 'datasets:.*', row 1: `id` must be a text, got 1"):
        read_documents([source], "train", text_field="id")
    with pytest.raises(ValueError, match=r"`heldout` must be 'datasets:PATH,SPLIT' .*, got 'datasets:x'"):
        read_documents(["datasets:x"], "heldout")


# What is refused: a change of the settings or of the model's folder, and what the message says.
MISTAKES: list[Any] = [
    pytest.param({"rank": 0}, "^`rank` must be at least 1, got 0$", id="rank"),
    pytest.param({"alpha": -1.0}, "^`alpha` must be above 0, got -1.0$", id="alpha"),
    pytest.param({"dropout": 1.0}, "^`dropout` must be below 1, got 1.0$", id="dropout"),
    pytest.param({"learning_rate": math.inf}, "^`learning_rate` must be a finite number, got inf$", id="rate"),
    pytest.param({"row_tokens": 1}, "^`row_tokens` must be at least 2, got 1$", id="row-tokens"),
    pytest.param({"method": "prefix"}, "^`method` must be 'lora' or 'full', got 'prefix'$", id="method"),
    pytest.param({"schedule": "step"}, "^`schedule` must be 'cosine', 'linear' or .*, got 'step'$", id="schedule"),
    pytest.param({"warmup": 0.9}, "^`warmup` must be at most 0.5, got 0.9$", id="warmup"),
    pytest.param({"dora": "yes"}, "^`dora` must be true or false, got 'yes'$", id="dora"),
    pytest.param({"train": []}, "^`train` must be .*at least 1 item, got \\[\\]$", id="no-train"),
    pytest.param({"heldout": None}, "^`heldout` must be a list, got None$", id="no-heldout"),
    pytest.param(
        {"target_modules": 3}, "^`target_modules` must be 'all-linear', or a list of .*, got 3$", id="targets-3"
    ),
    pytest.param(
        {"target_modules": []}, r"^`target_modules` must be 'all-linear', or a list.*, got \[\]$", id="no-targets"
    ),
    pytest.param({"epochs": 1.0}, "^`steps` must be left out where `epochs` is given, got 10$", id="steps-and-epochs"),
    pytest.param({"method": "full"}, "^`rank` has no effect with method 'full', .*, got 4$", id="full-rank"),
    pytest.param({"ranks": 4}, "^`ranks` is unknown .*; did you mean 'rank'", id="unknown"),
    pytest.param({"rank": 0, "seed": -1}, r"^`rank` must be [^\n]*, got 0\n`seed` must be [^\n]*, got -1$", id="two"),
    pytest.param({"target_modules": ["nope"]}, "`target_modules` must be among down_proj, .*, got 'nope'", id="target"),
    pytest.param({"target_modules": ["conv1d"]}, "`target_modules` must be among .*, got 'conv1d'", id="convolution"),
    pytest.param({"train": ["nope.txt"]}, "train: there is no file 'nope.txt'", id="missing-file"),
    pytest.param(
        {"train": ["nope.csv"]}, "`train` must be a .txt, .jsonl or .parquet file, .*, got 'nope.csv'", id="csv"
    ),
    pytest.param({"heldout": ["bad.jsonl"]}, "heldout: 'bad.jsonl', line 2: `text` is missing", id="jsonl"),
    pytest.param({"heldout": ["torn.jsonl"]}, "heldout: 'torn.jsonl', line 1 must be JSON: ", id="not-json"),
    pytest.param({"heldout": ["latin.txt"]}, r"heldout: 'latin.txt' is not UTF-8 text \(byte 3", id="latin"),
    pytest.param({"heldout": ["empty.txt"]}, "heldout: 'empty.txt' has no text", id="empty"),
    pytest.param(
        {"model": "llama"},
        "`model` must be a causal language model of the zoo, got .*llama of model_type 'llama'",
        id="llama",
    ),
    pytest.param({"model": "lacking"}, "model: lacking has 1 missing weights: backbone.norm_f", id="weight-missing"),
    pytest.param({"model": "small"}, r"model: .* below the model's vocab_size, 28, got \d+", id="tokenizer"),
    pytest.param({"model": "bounded"}, r"model: a text must have at most 8 tokens, .*, got \d+. Lower", id="positions"),
    pytest.param({"model": "left"}, "model: `pad_mode` must be 'shift' for this training, got 'as_trained'", id="left"),
    pytest.param({"load_in_4bit": True}, "`load_in_4bit` needs", id="4-bit"),
]


@pytest.fixture(scope="module")
def mistakes(folder: Path) -> Path:
    """A folder with files and models that are wrong, each in one way."""
    made = folder / "mistakes"
    made.mkdir()
    (made / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (made / "torn.jsonl").write_text('{"text": "a"\n')
    (made / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (made / "empty.txt").write_text(" \n\n ")
    save_llama(made / "llama")
    make_model("mamba2").save_pretrained(made / "lacking")
    weights = load_file(made / "lacking" / "model.safetensors")
    del weights["backbone.norm_f.weight"]
    save_file(weights, made / "lacking" / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(made / "lacking")
    tiny = {
        "small": make_model("mamba2", vocab_size=28),
        "bounded": make_model("mixer", max_position_embeddings=8),
        "left": make_model("mixer", pad_mode="as_trained", pad_token_id=0),
    }
    for name, model in tiny.items():
        model.save_pretrained(made / name)
        save_tokenizer(made / name)
    return made


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    folder: Path, mistakes: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mistakes)
    with pytest.raises(ValueError, match=message):
        finetune_language_model(parse_settings(values(folder, **changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_merging_needs_an_adapter(folder: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in values(folder, method="full").items() if key not in ("rank", "dropout")}
    with pytest.raises(ValueError, match="`merge` must be False with method 'full'"):
        finetune_language_model(parse_settings(settings), tmp_path / "run", merge=True)
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_a_tied_head_is_refused(folder: Path, tmp_path: Path) -> None:
    """Merged, it would change the embeddings too."""
    changed = values(folder, model=str(folder / "mamba2"), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="`target_modules` must not name 'lm_head', whose weight is tied"):
        finetune_language_model(parse_settings(changed), tmp_path / "run")
