"""Train a student on preferences with TRL's DPOTrainer (direct preference optimisation).

    pip install trl
    python examples/dpo.py --tiny                   # seconds, untrained student of a random teacher
    python examples/dpo.py --model runs/sft/model   # the student after sft.py

The preferences stand in for yours: a paragraph's continuation is preferred to the same in capital letters. Give your
own as rows {"prompt": ..., "chosen": ..., "rejected": ...}; all three may also be lists of chat messages.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tiny_inputs import paragraphs, save_tiny_student
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def preferences(name: str, number: int, characters: int) -> Dataset:
    """Return beginnings of paragraphs with their continuation, and with the same in capital letters."""
    half, rows = characters // 2, []
    for text in paragraphs(name, number):
        continuation = text[half:characters]
        rows.append({"prompt": text[:half], "chosen": continuation, "rejected": continuation.upper()})
    return Dataset.from_list(rows)


def main() -> None:
    """Train, compare the held-out loss before and after, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/sft/model", help="folder or Hub id of a student")
    parser.add_argument("--output", type=Path, default=Path("runs/dpo"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="an untrained tiny student and a few steps")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = save_tiny_student(options.output.parent / "tiny-student"), 20

    # The package is installed, so the zoo's own classes are used and no code of the checkpoint has to be run.
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model, reference = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
        for _ in range(2)
    )
    characters = 96 if options.tiny else 800
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,  # the student before training, or its teacher if the tokenizers are the same
        args=DPOConfig(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3 if options.tiny else 5e-7,
            beta=0.1,
            max_length=1024,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=preferences("train", 64 if options.tiny else 2000, characters),
        eval_dataset=preferences("heldout", 16 if options.tiny else 100, characters),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]  # log 2: model and reference are the same
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output / "model")  # with its code: a self-contained Hub folder
    tokenizer.save_pretrained(options.output / "model")
    print(f"held-out loss: {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
