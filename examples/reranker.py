"""Train a reranker: a model that scores how well a document answers a query, with sentence-transformers.

    pip install -e '.[embed]'
    python examples/reranker.py --tiny                         # seconds, random base model
    python examples/reranker.py --model runs/distilled/student # the student of distil_your_transformer.py

The toy task needs no labels: a query is the first sentence of a paragraph, and the document is the rest of it.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from tiny_inputs import paragraphs, save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def pairs(name: str, number: int) -> list[tuple[str, str]]:
    """Return (query, document) pairs: the first sentence of a paragraph and the rest, both cut to 200 characters."""
    parts = [text.partition(". ") for text in paragraphs(name, number)]
    return [(query[:200], document[:200]) for query, _, document in parts if document]


def main() -> None:
    """Train the reranker, save it, and order the documents of one query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/distilled/student", help="folder or Hub id of a zoo model")
    parser.add_argument("--output", type=Path, default=Path("runs/reranker"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = save_tiny_model(options.output.parent / "tiny-model"), 6

    # The score is read at the last real token, so both texts of a pair have to end with a token of their own. Most
    # tokenizers of causal models add none: say so here. With the document first, the query is read with it in mind.
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$B {end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )

    # A causal checkpoint loads into a classifier of one label. Its head is new, which transformers reports.
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=1, pad_token_id=tokenizer.pad_token_id, trust_remote_code=False
    )
    base = options.output / "untrained"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    reranker = CrossEncoder(str(base), trust_remote_code=True)

    # Each query is shown with its own document (label 1) and with the document of another query (label 0).
    found = pairs("train", 60 if options.tiny else 2000)
    rows = [{"query": q, "document": d, "label": 1.0} for q, d in found]
    rows += [{"query": q, "document": found[i - 1][1], "label": 0.0} for i, (q, _) in enumerate(found)]
    arguments = CrossEncoderTrainingArguments(output_dir=str(options.output / "checkpoints"), max_steps=options.steps)
    arguments.save_strategy, arguments.report_to = "no", []
    data = Dataset.from_list(rows)
    CrossEncoderTrainer(reranker, arguments, train_dataset=data, loss=BinaryCrossEntropyLoss(reranker)).train()
    reranker.save_pretrained(str(options.output / "reranker"))

    heldout = pairs("heldout", 8)
    for hit in reranker.rank(heldout[0][0], [document for _, document in heldout], return_documents=True)[:3]:
        print(f"{hit['score']:.3f}  {hit['text'][:80]}")


if __name__ == "__main__":
    main()
