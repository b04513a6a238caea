"""A tiny judged collection in BEIR's layout that a tiny model learns to rank, and the settings of short runs on it."""

import json
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijkl"


def write_beir(folder: Path, *, queries: int = 12, split: str = "test", graded: bool = False) -> Path:
    """A query names a letter; of six documents with this letter the relevant ones end with "yes".

    All six share the query's word, so that BM25 lists them in an order that says nothing.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus, asked, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for index in range(queries):
        word = LETTERS[index % 12] * 3 + LETTERS[index // 12]
        asked.append({"_id": f"q{index}", "text": f"find {word}"})
        for number in range(6):
            relevant = number < 2
            corpus.append({"_id": f"d{index}-{number}", "text": f"{word} x{number} {'yes' if relevant else 'no'}"})
            if relevant:
                judged.append(f"q{index}\td{index}-{number}\t{2 - number if graded else 1}")
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(judged))
    return folder


def reranker_values(folder: Path, model: str = "mamba2", **changes: Any) -> dict[str, Any]:
    """Settings of a short run on `folder`'s model and its folder `beir`."""
    return {
        "model": str(folder / model),
        "train": [str(folder / "beir")],
        "batch_size": 8,
        "negatives": 3,
        "steps": 6,
        "learning_rate": 1e-2,
        "max_tokens": 64,
        "checkpoint_every": 2,
        **changes,
    }
