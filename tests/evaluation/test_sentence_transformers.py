"""sentence-transformers on exported folders: a reranker and embedders, scored, trained, saved and loaded again.

Everything runs with classes from the folders, in one process that cannot import ssm_zoo: `main` below.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

MODELS = ["mamba2-groups", "all-four", "mamba2-encoder", "mixer"]
SIDES = ["left", "right"]
WORDS = ["sea", "ship", "wave", "sail", "bread", "oven", "flour", "yeast"]
PAIRS = [
    ("sea ship", "wave sail sail"),
    ("oven", "sea"),
    ("bread flour yeast oven bread", "flour"),
    ("wave", "ship sea wave sail ship sea bread"),
]
TEXTS = [text for pair in PAIRS for text in pair]


def make_tokenizer(side: str) -> Any:
    """Words; a pair is document, then query, and each ends with a token that is the padding, too."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", pair="$B <end> $A <end>", special_tokens=[("<end>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<end>",
        eos_token="<end>",
        unk_token="<unknown>",
        padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(folder: str) -> None:
    """The user's process: works on `folder`/<model>-<rerank or embed>-<side>, writes `folder`/report.json."""
    sys.modules["ssm_zoo"] = None  # importing it raises  # pyright: ignore[reportArgumentType]
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sentence_transformer import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.set_num_threads(1)
    root, report, remote = Path(folder), {}, {"trust_remote_code": True}
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": len(PAIRS),
        "learning_rate": 0.01,
        "seed": 0,
    }
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    settings |= {"output_dir": str(root / "run"), "lr_scheduler_type": "constant"}

    pairs = [{"query": query, "document": document} for query, document in PAIRS]
    labelled = [pair | {"label": index % 2.0} for index, pair in enumerate(pairs)]

    def scores(model: Any, rows: list) -> list:
        return model.predict(rows, activation_fn=torch.nn.Identity()).tolist()

    def embeddings(model: Any, rows: list) -> list:
        return model.encode(rows).tolist()

    def examined(model: Any, run: Any, rows: list) -> dict[str, Any]:
        """Module of the model's class, and `run` on the batch and on its rows alone."""
        single = [run(model, [row])[0] for row in rows]
        return {"module": type(model[0].model).__module__, "batch": run(model, rows), "single": single}

    def trained(model: Any, run: Any, rows: list, trainer: Any, path: str) -> dict[str, Any]:
        """Losses of a training, and `run` after it, from the model and from what it saved."""
        trainer.train()
        model.save_pretrained(path)
        again = type(model)(path, trust_remote_code=True, device="cpu")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"losses": losses, "trained": run(model, rows), "again": run(again, rows)}

    for name, side in itertools.product(MODELS, SIDES):
        path = str(root / f"{name}-rerank-{side}")
        model = CrossEncoder(path, trust_remote_code=True, device="cpu")
        found = examined(model, scores, PAIRS)
        if side == "left":
            trainer = CrossEncoderTrainer(
                model=model,
                args=CrossEncoderTrainingArguments(**settings),
                train_dataset=Dataset.from_list(labelled),
                loss=BinaryCrossEntropyLoss(model),
            )
            found |= trained(model, scores, PAIRS, trainer, f"{path}-trained")
        report[f"{name}-rerank-{side}"] = found
        for pooling in ("lasttoken", "mean"):
            path = str(root / f"{name}-embed-{side}")
            transformer = Transformer(path, model_kwargs=remote, config_kwargs=remote)
            modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
            model = SentenceTransformer(modules=modules, device="cpu")
            found = examined(model, embeddings, TEXTS)
            if side == "left":
                trainer = SentenceTransformerTrainer(
                    model=model,
                    args=SentenceTransformerTrainingArguments(**settings),
                    train_dataset=Dataset.from_list(pairs),
                    loss=MultipleNegativesRankingLoss(model),
                )
                found |= trained(model, embeddings, TEXTS, trainer, f"{path}-{pooling}")
            report[f"{name}-{pooling}-{side}"] = found
    options = {"model_kwargs": remote, "config_kwargs": remote | {"num_labels": 1}, "processor_kwargs": remote}
    transformer = Transformer(str(root / "causal"), transformer_task="sequence-classification", **options)
    model = CrossEncoder(modules=[transformer], device="cpu")
    report["causal"] = {"class": type(model[0].model).__name__, "scores": scores(model, PAIRS)}
    (root / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from families import make_head, make_model
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        for side in SIDES:
            for task, head in (("rerank", AutoModelForSequenceClassification), ("embed", AutoModel)):
                path = folder / f"{name}-{task}-{side}"
                make_head(head, name, num_labels=1, pad_token_id=0).save_pretrained(path)
                make_tokenizer(side).save_pretrained(path)
    make_model("mamba2").save_pretrained(folder / "causal")
    make_tokenizer("right").save_pretrained(folder / "causal")
    variables = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", __file__, str(folder)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(params=[f"{name}-{task}" for name in MODELS for task in ("rerank", "lasttoken", "mean")])
def task(request: pytest.FixtureRequest) -> str:
    return request.param


def close(actual: list, expected: list) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_folders_own_code_was_run(report: dict[str, dict[str, Any]], task: str) -> None:
    for side in SIDES:
        assert report[f"{task}-{side}"]["module"].startswith("transformers_modules.")


def test_a_batch_padded_on_either_side_is_as_its_rows_alone(report: dict[str, dict[str, Any]], task: str) -> None:
    expected = report[f"{task}-left"]["single"]
    assert torch.tensor(expected).std(0).min() > 1e-2
    for side in SIDES:
        close(report[f"{task}-{side}"]["single"], expected)
        close(report[f"{task}-{side}"]["batch"], expected)


def test_it_learns_and_is_saved(report: dict[str, dict[str, Any]], task: str) -> None:
    found = report[f"{task}-left"]
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert (torch.tensor(found["trained"]) - torch.tensor(found["batch"])).abs().max() > 1e-2
    assert found["again"] == found["trained"]


def test_a_causal_checkpoint_becomes_a_reranker(report: dict[str, dict[str, Any]]) -> None:
    assert report["causal"]["class"] == "ZooMamba2ForSequenceClassification"
    assert len(set(report["causal"]["scores"])) == len(PAIRS)


if __name__ == "__main__":
    main(sys.argv[1])
