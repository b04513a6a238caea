"""Finetune a student on prompts and their completions with TRL's SFTTrainer; only the completions are trained on.

    pip install trl
    python examples/sft.py --tiny                          # seconds, untrained student of a random teacher
    python examples/sft.py --model runs/distilled/student  # the student of distil_your_transformer.py

The texts are beginnings of paragraphs and their rest. Give your own as rows {"prompt": ..., "completion": ...}; both
may also be lists of chat messages. `ssm-zoo finetune lm --examples prompt_completion` does the same without TRL.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tiny_inputs import paragraphs, save_tiny_student
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def examples(name: str, number: int, characters: int) -> Dataset:
    """Return beginnings of paragraphs as prompts, and as many characters that follow as completions."""
    texts = paragraphs(name, number)
    halves = [(text[: characters // 2], text[characters // 2 : characters]) for text in texts]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in halves])


def main() -> None:
    """Train, compare the held-out loss of the completions before and after, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/distilled/student", help="folder or Hub id of a student")
    parser.add_argument("--output", type=Path, default=Path("runs/sft"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="an untrained tiny student and a few steps")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = save_tiny_student(options.output.parent / "tiny-student"), 20

    # The package is installed, so the zoo's own classes are used and no code of the checkpoint has to be run.
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    characters = 96 if options.tiny else 800
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3 if options.tiny else 2e-5,
            max_length=1024,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=examples("train", 64 if options.tiny else 2000, characters),
        eval_dataset=examples("heldout", 16 if options.tiny else 100, characters),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output / "model")  # with its code: a self-contained Hub folder
    tokenizer.save_pretrained(options.output / "model")
    print(f"held-out loss: {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
