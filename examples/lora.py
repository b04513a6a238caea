"""Train LoRA adapters on a model of the zoo with peft and transformers' Trainer, on packed rows without padding.

    python examples/lora.py --tiny                         # seconds, random base model
    python examples/lora.py --model runs/distilled/student # the student of distil_your_transformer.py

`ssm-zoo finetune lm MODEL OUTPUT --train ... --heldout ...` does the same in one command, with a report and a card.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_inputs import paragraphs, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ssm_zoo.training.packing import PackingCollator


def main() -> None:
    """Train the adapters, compare the held-out loss before and after, and save the merged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/distilled/student", help="folder or Hub id of a zoo model")
    parser.add_argument("--output", type=Path, default=Path("runs/lora"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = save_tiny_model(options.output.parent / "tiny-model"), 20

    # The package is installed, so the zoo's own classes are used and no code of the checkpoint has to be run.
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)

    # "all-linear" reaches every projection of every family, because each is called as a module.
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32))
    model.print_trainable_parameters()

    def tokenised(name: str, number: int) -> list[dict[str, list[int]]]:
        texts = [text + tokenizer.eos_token for text in paragraphs(name, number)]
        return [{"input_ids": tokenizer(text, truncation=True, max_length=1024).input_ids} for text in texts]

    # The collator puts several paragraphs into a row of `budget` tokens. The models read where each one starts, so
    # paragraphs do not see each other, and no attention mask is needed.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2 if options.tiny else 2e-4,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
        ),
        train_dataset=tokenised("train", 40 if options.tiny else 2000),
        eval_dataset=tokenised("heldout", 8 if options.tiny else 100),
        data_collator=PackingCollator(budget=1024, pad_token_id=0),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")

    # Save the adapter (small), and the model with the adapter in its weights (loads without peft and without ssm-zoo).
    model.save_pretrained(options.output / "adapter")
    model.merge_and_unload().save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")


if __name__ == "__main__":
    main()
