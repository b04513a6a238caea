"""A finetuning of a reranker from settings to folder: template, packing, learning, resumption, what is saved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from families import make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_checkpoints import save_llama, save_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")
pytest.importorskip("bm25s", reason="bm25s is not installed")

from embedding_pairs import save_model
from ranking_data import reranker_values, write_beir
from sentence_transformers import CrossEncoder

from ssm_zoo.evaluation.reranking import load_reranker, means, measure_run, rerank
from ssm_zoo.evaluation.reranking_data import bm25_run, read_judged
from ssm_zoo.reports.reranker_card import _evaluations
from ssm_zoo.training.ranking_groups import Group, read_ranking_data
from ssm_zoo.training.reranker import RerankerRun, finetune_reranker
from ssm_zoo.training.reranker_model import adapt, backbone_of, finished_reranker, load_reranker_to_train
from ssm_zoo.training.reranker_settings import parse_reranker_settings
from ssm_zoo.training.reranker_trainer import GroupCollator, RerankerTrainer, group_loss, train_reranker

LORA = {"rank": 8, "dropout": 0.05, "learning_rate": 2e-2}
PAIRS = [("find aaaa", "aaaa x1 no"), ("b", "cccc " * 30), ("a much longer query", "d")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reranker")
    for name in ("mamba2", "mamba2-encoder", "all-four"):
        save_model(made / name, name)
    write_beir(made / "beir", graded=True)
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run: adapters with dropout."""
    finetune_reranker(parse_reranker_settings(reranker_values(folder, **LORA)), folder / "run")
    return folder / "run"


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


# The template


def untrained(folder: Path, model: str = "mamba2", **changes: Any) -> CrossEncoder:
    return load_reranker_to_train(parse_reranker_settings(reranker_values(folder, model, **changes)))


def test_a_pair_is_document_then_query_and_end(folder: Path) -> None:
    tokenizer: Any = untrained(folder).tokenizer
    plain = AutoTokenizer.from_pretrained(folder / "mamba2")
    ids = tokenizer("find a", "some text")["input_ids"]
    assert ids == plain("Document:\nsome text\n\nQuery:\nfind a")["input_ids"] + [plain.eos_token_id]
    tokenizer = untrained(folder, "mamba2-encoder").tokenizer
    ids = tokenizer("find a", "some text")["input_ids"]
    assert ids == plain("Query:\nfind a\n\nDocument:\nsome text")["input_ids"] + [plain.eos_token_id]


def test_only_the_document_is_cut(folder: Path) -> None:
    reranker = untrained(folder, max_tokens=40)
    ids: Any = reranker.preprocess([("find aaaa", "b" * 99)])["input_ids"][0]
    plain = AutoTokenizer.from_pretrained(folder / "mamba2")
    before, b, after = (plain(text)["input_ids"] for text in ("Document:\n", "b", "\n\nQuery:\nfind aaaa"))
    assert ids.tolist() == before + b * (39 - len(before) - len(after)) + after + [plain.eos_token_id]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("own_pad", [False, True])
def test_the_score_is_read_at_the_end_token_on_either_side(
    folder: Path, tmp_path: Path, side: str, own_pad: bool
) -> None:
    """Also where padding is the end token itself."""
    shutil.copytree(folder / "mamba2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = "a" if own_pad else "</s>"
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": side}))
    reranker = untrained(tmp_path, "model", train=[str(folder / "beir")])
    assert (reranker.tokenizer.pad_token == "a") == own_pad and reranker.tokenizer.padding_side == side
    model: Any = backbone_of(reranker).eval()
    assert (model.config.pad_token_id is None) != own_pad
    for query, document in PAIRS[:2]:
        ids = reranker.tokenizer(query, document, truncation="only_second", return_tensors="pt")["input_ids"]
        assert ids[0, -1] == 0
        with torch.no_grad():
            states = model.backbone(ids).last_hidden_state
            alone = model.score(states[:, -1])[0, 0]
        together = reranker.predict(PAIRS, convert_to_tensor=True)[PAIRS.index((query, document))]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_template_stays_whatever_class_the_tokenizer_had(folder: Path, tmp_path: Path) -> None:
    """A class that adds tokens itself when it is loaded would replace the template."""
    shutil.copytree(folder / "mamba2", tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model", add_bos_token=True, bos_token="a")
    tokenizer.save_pretrained(tmp_path / "model")
    reranker = untrained(tmp_path, "model", train=[str(folder / "beir")])
    expected = reranker.tokenizer("b", "c")["input_ids"]
    reranker.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("b", "c")["input_ids"] == expected
    assert CrossEncoder(str(tmp_path / "saved"), device="cpu").tokenizer("b", "c")["input_ids"] == expected


# Packing


@pytest.mark.parametrize("loss", ["lce", "lambda"])
@pytest.mark.parametrize("model", ["mamba2", "mamba2-encoder", "all-four"])
def test_packed_groups_are_padded_ones(folder: Path, model: str, loss: str) -> None:
    """Loss and gradients, with passages, and groups of different sizes."""
    changes = {"loss": loss, "documents": "maxp", "passage_tokens": 6, "stride": 4, "max_passages": 2}
    settings = parse_reranker_settings(reranker_values(folder, model, **changes))
    groups = read_ranking_data(settings).groups[:3]
    groups[1] = type(groups[1])(groups[1].query, groups[1].documents[:2], groups[1].labels[:2])
    reranker = load_reranker_to_train(settings)
    net: Any = backbone_of(reranker).eval()
    losses, gradients = [], []
    for packing in (True, False):
        net.zero_grad()
        batch = GroupCollator(reranker.tokenizer, settings.rule, packing)(groups)
        assert batch["slots"].shape[0] == 3 and batch["slots"].shape[2] == 2
        value = group_loss(net, batch, loss)
        value.backward()
        losses.append(value)
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert batch["input_ids"].shape[0] > 8  # a row for each passage
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert "score.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_document_learns_by_its_best_passage(folder: Path) -> None:
    settings = parse_reranker_settings(
        reranker_values(folder, documents="maxp", passage_tokens=6, stride=3, max_passages=3)
    )
    groups = read_ranking_data(settings).groups[:2]
    reranker = load_reranker_to_train(settings)
    model: Any = backbone_of(reranker).eval()
    rows = []
    for group in groups:
        parts = [settings.rule.parts(reranker.tokenizer, document) for document in group.documents]
        assert all(len(texts) > 1 for texts in parts)
        rows.append([max(reranker.predict([(group.query, text) for text in texts])) for texts in parts])
    expected = -torch.tensor(rows).log_softmax(1)[:, 0].mean()
    batch = GroupCollator(reranker.tokenizer, settings.rule, True)(groups)
    torch.testing.assert_close(group_loss(model, batch, "lce").detach(), expected, rtol=0, atol=1e-5)


# Training


def test_it_learns_and_is_measured_before_and_after(folder: Path, run: Path) -> None:
    report = read_report(run)
    before, after = report["evaluations"]
    assert after["ndcg@10"] > before["ndcg@10"] + 0.1 and after["ndcg@10"] > report["first_stage"]["ndcg@10"]
    assert report["history"][-1]["loss"] < 0.8 * report["history"][0]["loss"]
    assert [point["step"] for point in report["history"]] == list(range(1, 7))
    assert report["first_stage"]["name"] == "BM25"
    assert report["data"]["train"]["groups"] == 20 and report["data"]["train"]["pairs"] == 80
    assert report["data"]["heldout"] == {
        "sources": ["beir"],
        "split": True,
        "queries": 2,
        "pairs": 12,
        "without_list": 0,
    }
    assert report["coverage"]["dead"] == []
    whole = [entry for entry in report["coverage"]["without_adapter"] if entry["reason"] == "trained whole"]
    assert [entry["module"] for entry in whole] == ["score"]
    assert str(folder) not in json.dumps(report)
    held = (run / "heldout.txt").read_text().split()
    judged = read_judged(folder / "beir").only(held)
    reranker = load_reranker(str(run / "model"), device="cpu")
    measured = means(measure_run(judged, rerank(reranker, judged, bm25_run(judged, 100)), 100))
    assert measured == pytest.approx({key: after[key] for key in measured})


def killed_after(monkeypatch: pytest.MonkeyPatch, most: int) -> list[None]:
    """The Trainer's steps from now on; it is killed in the one after so many."""
    calls, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(None)
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", counting)
    return calls


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, run: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 6, after the checkpoint of step 4, which is in the middle of the second epoch."""
    if method == "lora":
        settings, expected = parse_reranker_settings(reranker_values(folder, **LORA)), run
    else:
        values = reranker_values(folder, method="full", weight_decay=0.1, loss="listnet", batch_size=4)
        settings, expected = parse_reranker_settings(values), tmp_path / "whole"
        finetune_reranker(settings, expected)
    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            finetune_reranker(settings, output)
    assert not (output / "report.json").exists()
    forwards = killed_after(monkeypatch, 1000)
    finetune_reranker(settings, output)
    assert len(forwards) == 6 - 4
    assert json.loads((output / "model" / "config.json").read_text())["use_cache"]
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (output, expected))
    assert ours.keys() == theirs.keys() and "score.weight" in ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    reports = [read_report(path) for path in (output, expected)]
    for key in ("evaluations", "coverage", "steps", "data", "first_stage"):
        assert reports[0][key] == reports[1][key]
    curves = [[(point["step"], point["loss"], point["grad_norm"]) for point in r["history"]] for r in reports]
    assert curves[0] == curves[1]


def test_a_run_of_other_settings_or_judgements_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"skip: 0 there, 1 here"):
        finetune_reranker(parse_reranker_settings(reranker_values(folder, **LORA, skip=1)), run)
    shutil.copytree(folder / "beir", tmp_path / "beir")
    (folder / "beir" / "qrels" / "test.tsv").rename(folder / "kept.tsv")
    lines = (folder / "kept.tsv").read_text().splitlines()
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(lines[:-1]))
    try:
        with pytest.raises(ValueError, match=r"data\.\w+: '\w+' there, '\w+' here"):
            finetune_reranker(parse_reranker_settings(reranker_values(folder, **LORA)), run)
    finally:
        (folder / "kept.tsv").rename(folder / "beir" / "qrels" / "test.tsv")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("mamba2-encoder", {"method": "full", "loss": "binary", "gradient_accumulation": 2}),
        ("all-four", {"dtype": "bfloat16", "packing": False, "loss": "lambda"}),
        ("mamba2", {"documents": "maxp", "passage_tokens": 8, "stride": 4, "gradient_checkpointing": True}),
    ],
    ids=["encoder-binary-accumulated", "hybrid-bfloat16-padded-lambda", "maxp-checkpointing"],
)
def test_other_ways_learn_too(folder: Path, tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    settings = parse_reranker_settings(reranker_values(folder, model, steps=None, epochs=1.5, **changes))
    report = finetune_reranker(settings, tmp_path / "run")
    groups = report["data"]["train"]["groups"]
    batches = -(-groups // (8 * settings.gradient_accumulation))
    assert report["steps"] == -(-3 * batches // 2)
    assert report["history"][-1]["loss"] < report["history"][0]["loss"]
    assert report["compute_dtype"] == changes.get("dtype", "float32")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["reranking"] == settings.rule.entry() and config["reranking"]["rule"] == settings.documents


def first_point(
    folder: Path, output: Path, model: str = "mamba2", sizes: tuple[int, ...] = (), **changes: Any
) -> dict[str, Any]:
    """The curve of a single step of all weights, without the measurements around it; `sizes`: only groups of these."""
    values = reranker_values(folder, model, method="full", steps=1, warmup=0.0, **changes)
    settings = parse_reranker_settings(values)
    reranker = load_reranker_to_train(settings)
    collator = GroupCollator(reranker.tokenizer, settings.rule, settings.packing)
    groups = read_ranking_data(settings).groups
    if sizes:
        groups = [
            Group(group.query, group.documents[:size], group.labels[:size])
            for group, size in zip(groups, sizes, strict=False)
        ]
    _, history = train_reranker(
        backbone_of(reranker), collator, groups, settings, 1, output, torch.device(reranker.device)
    )
    return history[0]


@pytest.mark.parametrize("loss", ["binary", "lambda"])
def test_accumulated_batches_are_one(folder: Path, tmp_path: Path, loss: str) -> None:
    """Groups of different sizes; the last step of an epoch has fewer batches than the others."""
    points = [
        first_point(
            *(folder, tmp_path / str(size)),
            sizes=(2, 4, 3),
            batch_size=size,
            gradient_accumulation=4 // size,
            loss=loss,
        )
        for size in (4, 2, 1)
    ]
    assert points[0]["grad_norm"] == pytest.approx(points[2]["grad_norm"], rel=1e-3)
    assert points[0]["loss"] == pytest.approx(points[1]["loss"], abs=1e-4)
    assert points[0]["grad_norm"] == pytest.approx(points[1]["grad_norm"], rel=1e-3)


def test_processes_share_the_terms_of_a_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two processes, which gradients are averaged to, is the loss of all groups together."""
    settings = parse_reranker_settings(reranker_values(folder, loss="binary"))
    reranker = load_reranker_to_train(settings)
    model: Any = backbone_of(reranker).eval()
    collator = GroupCollator(reranker.tokenizer, settings.rule, True)
    first, second = read_ranking_data(settings).groups[:2]
    second = Group(second.query, second.documents[:2], second.labels[:2])
    batches = [collator([first]), collator([second])]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = RerankerTrainer(model=model, args=arguments, loss="binary")
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    losses = []
    for batch, of_the_other in zip(batches, (2, 4), strict=True):
        reduced = lambda tensor, reduction, other=of_the_other: tensor + other  # noqa: E731
        monkeypatch.setattr(trainer.accelerator, "reduce", reduced)
        _, terms = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert terms == 6
        losses.append(trainer.compute_loss(model, batch, num_items_in_batch=terms))
    torch.testing.assert_close(torch.stack(losses).mean(), group_loss(model, collator([first, second]), "binary"))


def test_held_out_lists_of_files_are_ranked_whole(folder: Path, tmp_path: Path) -> None:
    """The first-stage lists are cut; a file has no order by which the relevant document could be cut off."""
    row = {"query": "held", "positive": "aaaa yes", "negatives": [f"aaaa {letter} no" for letter in "bcdef"]}
    (tmp_path / "held.jsonl").write_text(json.dumps(row))
    settings = parse_reranker_settings(reranker_values(folder, heldout=[str(tmp_path / "held.jsonl")], depth=3))
    data, state = read_ranking_data(settings), PartialState(cpu=True)
    run = RerankerRun(settings, tmp_path, load_reranker_to_train(settings), data, {}, state)
    measured = run.evaluate("before", run.reranker)
    assert measured["recall@10"] == 1 and measured["map"] >= 1 / 6 and "recall@3" not in measured
    report = {"evaluations": [measured, measured], "first_stage": None, "settings": settings.model_dump()}
    assert "first stage" not in _evaluations(report) and "recall@3" not in _evaluations(report).lower()


def test_the_auxiliary_loss_of_a_model_that_chooses_tokens_is_added(folder: Path, tmp_path: Path) -> None:
    """The point of the curve is the ranking loss alone; the gradient has both."""
    points = {}
    for weight in (0.0, 3.0):
        save_model(
            tmp_path / f"model-{weight}", "selective-mamba2", sal_selection="gumbel", router_aux_loss_coef=weight
        )
        # Two groups are one batch, fewer than the two that a step may have.
        train = {"train": [str(folder / "beir")], "batch_size": 2, "gradient_accumulation": 2, "sizes": (4, 4)}
        points[weight] = first_point(tmp_path, tmp_path / f"run-{weight}", f"model-{weight}", **train)
    assert points[3.0]["loss"] == pytest.approx(points[0.0]["loss"], abs=1e-3)
    assert points[3.0]["grad_norm"] != pytest.approx(points[0.0]["grad_norm"], rel=1e-4)
    assert points[3.0]["aux_loss"] > 0 and len(points[3.0]["selection_rate"]) == 2


def test_what_is_finished_computes_what_the_adapters_do(folder: Path) -> None:
    settings = parse_reranker_settings(reranker_values(folder, rank=3))
    reranker = load_reranker_to_train(settings)
    plain = reranker.predict(PAIRS, convert_to_tensor=True)
    adapt(reranker, settings)
    torch.testing.assert_close(reranker.predict(PAIRS, convert_to_tensor=True), plain)
    with torch.no_grad():
        for name, parameter in backbone_of(reranker).named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    finished = finished_reranker(reranker, settings)
    assert type(backbone_of(finished)).__name__ == "ZooMamba2ForSequenceClassification"
    adapted = reranker.predict(PAIRS, convert_to_tensor=True)
    torch.testing.assert_close(finished.predict(PAIRS, convert_to_tensor=True), adapted, rtol=0, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.05


# What is saved

LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
pairs = [("find aaaa", "aaaa x1 no"), ("b", "cccc " * 30), ("a much longer query", "d")]
reranker = CrossEncoder("model", trust_remote_code=True, device="cpu")
model = AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True)
assert all(type(one).__module__.startswith("transformers_modules") for one in (reranker[0].model, model))
tokenizer = AutoTokenizer.from_pretrained("model")
queries, documents = map(list, zip(*pairs))
inputs = tokenizer(queries, documents, return_tensors="pt", padding=True, truncation="only_second")
with torch.no_grad():
    scores = model(**inputs).logits[:, 0]
save_file({"reranker": reranker.predict(pairs, convert_to_tensor=True), "model": scores}, "found")
"""


def test_what_is_saved_loads_without_the_package(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD], cwd=tmp_path, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = load_reranker(str(run / "model"), device="cpu").predict(PAIRS, convert_to_tensor=True)
    for tensor in load_file(tmp_path / "found").values():
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-2


def test_the_card_says_what_was_done(folder: Path, run: Path) -> None:
    report = read_report(run)
    card = ModelCard.load(run / "model" / "README.md")
    before, after = (f"{evaluation['ndcg@10']:,.4f}" for evaluation in report["evaluations"])
    for part in (
        before,
        after,
        "`mamba2`",
        "LoRA of rank 8",
        "Trained whole: `score`",
        "20 groups of 10 queries",
        "`Document:\\n{document}\\n\\nQuery:\\n{query}</s>`",
        "in the order of BM25",
        "CrossEncoder(repository",
        report["versions"]["sentence-transformers"],
        "negatives: 3",
    ):
        assert part in card.text, part
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("sentence-transformers", "text-ranking")
    assert (run / "model" / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for path in (run / "model").rglob("*"):
        assert path.is_dir() or str(folder).encode() not in path.read_bytes(), path


# Mistakes


@pytest.fixture(scope="module")
def mistakes(folder: Path) -> Path:
    """A folder with models and data that are wrong, each in one way."""
    made = folder / "mistakes"
    made.mkdir()
    save_llama(made / "llama")
    make_model("mamba2", vocab_size=5).save_pretrained(made / "small")
    save_tokenizer(made / "small")
    save_model(made / "endless", "mamba2")
    tokenizer = AutoTokenizer.from_pretrained(made / "endless")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(made / "endless")
    write_beir(made / "broken")
    (made / "broken" / "qrels" / "test.tsv").write_text("a\tb\tc\nq0\td9-9\t1\n")
    return made


MISTAKES = [
    pytest.param(
        {"model": "llama"}, "`model` must be a model of the zoo, got .*llama of model_type 'llama'", id="llama"
    ),
    pytest.param({"model": "small"}, r"model: .* below the model's vocab_size, 5, got \d+", id="vocabulary"),
    pytest.param({"model": "endless"}, r"`model` must have a tokenizer with an end-of-text token", id="no-end"),
    pytest.param({"train": ["broken"]}, r"test.tsv', line 2: corpus.jsonl has no id 'd9-9'", id="judgement"),
    pytest.param({"train": ["nowhere"]}, r"`train` must be an existing folder, got 'nowhere'", id="folder"),
    pytest.param({"run": "nowhere.trec"}, r"run: there is no file 'nowhere.trec'", id="run"),
    pytest.param({"max_tokens": 20}, r"`max_tokens`, 20, must leave room for a document .* have 23 tokens", id="room"),
    pytest.param({"target_modules": ["nope"]}, "`target_modules` must be among in_proj, .*, got 'nope'", id="target"),
    pytest.param({"revision": "v1"}, "`revision` must be left out for the folder .*mamba2, got 'v1'", id="revision"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    folder: Path, mistakes: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mistakes)
    with pytest.raises(ValueError, match=message):
        finetune_reranker(parse_reranker_settings(reranker_values(folder) | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plain_language_model_is_no_reranker(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .*mamba2 has 1 missing weights: score.weight"):
        load_reranker(str(folder / "mamba2"))
