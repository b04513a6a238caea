"""A reranker of a base model with a chat template: its pairs have the template of pairs, and are no messages."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from embedding_pairs import save_model
from ranking_data import reranker_values, write_beir

from ssm_zoo.training.reranker_model import load_reranker_to_train
from ssm_zoo.training.reranker_settings import parse_reranker_settings

PAIRS = [("find aaaa", "aaaa x1 no"), ("b", "cccc " * 30)]


def test_a_base_model_with_a_chat_template_reads_pairs(tmp_path: Path) -> None:
    save_model(tmp_path / "mamba2", "mamba2")
    write_beir(tmp_path / "beir")
    settings = parse_reranker_settings(reranker_values(tmp_path, "mamba2"))
    plain = load_reranker_to_train(settings).predict(PAIRS)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "mamba2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "mamba2")
    assert load_reranker_to_train(settings).predict(PAIRS).tolist() == plain.tolist()
