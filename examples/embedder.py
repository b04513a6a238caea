"""Train an embedder on pairs of texts that belong together, and search with it.

    pip install -e '.[embed]'
    python examples/embedder.py --tiny                         # seconds, random base model
    python examples/embedder.py --model runs/distilled/student # the student of distil_your_transformer.py

The toy task needs no labels: the first sentence of a paragraph has to find the rest of it.
"""

import argparse
import json
import subprocess
from pathlib import Path

from sentence_transformers import SentenceTransformer
from tiny_inputs import paragraphs, save_tiny_model


def write_pairs(path: Path, name: str, number: int) -> None:
    """Write one JSON object per line: "anchor" is what to search with, "positive" what it should find."""
    rows = {}
    for text in paragraphs(name, number):
        anchor, _, positive = text.partition(". ")
        if positive:
            rows.setdefault(anchor, positive)
    lines = [json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in rows.items()]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Train the embedder, and find the paragraph that belongs to a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/distilled/student", help="folder or Hub id of a zoo model")
    parser.add_argument("--output", type=Path, default=Path("runs/embedder"), help="folder of the run")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()

    data = options.output.parent / "pairs"
    data.mkdir(parents=True, exist_ok=True)
    write_pairs(data / "train.jsonl", "train", 60 if options.tiny else 2000)
    write_pairs(data / "heldout.jsonl", "heldout", 20 if options.tiny else 200)

    # Every anchor is compared with its own positive and with those of the rest of the batch (InfoNCE). The command
    # measures retrieval on the held-out pairs before and after. LoRA is the default; --method full trains all weights.
    model = save_tiny_model(options.output.parent / "tiny-model") if options.tiny else options.model
    command = ["ssm-zoo", "finetune", "embed", str(model), str(options.output), "--pooling", "mean"]
    command += ["--train", str(data / "train.jsonl"), "--heldout", str(data / "heldout.jsonl")]
    if options.tiny:
        command += ["--steps", "6", "--batch-size", "8", "--max-tokens", "64", "--learning-rate", "1e-2"]
        command += ["--pool-size", "8"]
    subprocess.run(command, check=True)

    # The result is an ordinary sentence-transformers folder with its own code.
    embedder = SentenceTransformer(str(options.output / "model"), trust_remote_code=True)
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = embedder.encode_document([row["positive"] for row in rows])
    query = embedder.encode_query(rows[0]["anchor"])
    best = embedder.similarity(query, documents)[0].argmax().item()
    print(f"query: {rows[0]['anchor'][:100]}\nfound: {rows[best]['positive'][:100]}")


if __name__ == "__main__":
    main()
