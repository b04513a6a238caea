"""Train transformers' own Mamba on a CPU, on packed rows, with peft and the Trainer: two lines of this package.

    python examples/native_mamba_cpu.py --tiny                  # seconds, random weights
    python examples/native_mamba_cpu.py --steps 100             # state-spaces/mamba-130m-hf from the Hub

The result is a model of transformers as before. So are Mamba-2, FalconMamba, Jamba, Zamba, Zamba2, Bamba, FalconH1,
GraniteMoeHybrid and NemotronH: docs/kernels.md, "Train Mamba on a CPU".
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from tiny_inputs import paragraphs, save_tiny_mamba
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ssm_zoo.modeling.native_models import accelerate_transformers


def main() -> None:
    """Train adapters on the model's projections, compare the held-out loss, and save the merged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="state-spaces/mamba-130m-hf", help="folder or Hub id of a Mamba")
    parser.add_argument("--output", type=Path, default=Path("runs/native-mamba"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = save_tiny_mamba(options.output.parent / "tiny-mamba"), 20

    print(accelerate_transformers(["mamba"]))
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
    # With our ops an adapter on dt_proj has an effect too. peft itself does not allow LoRA on out_proj of Mamba.
    model = get_peft_model(model, LoraConfig(target_modules=["in_proj", "x_proj", "dt_proj"], r=16))

    def tokenised(name: str, number: int) -> list[dict[str, list[int]]]:
        texts = [text + tokenizer.eos_token for text in paragraphs(name, number)]
        return [{"input_ids": tokenizer(text, truncation=True, max_length=512).input_ids} for text in texts]

    # Four paragraphs make a row. Positions that start again keep them apart, in the convolution and in the scan.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=3e-2 if options.tiny else 3e-4,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=tokenised("train", 40 if options.tiny else 2000),
        eval_dataset=tokenised("heldout", 8 if options.tiny else 50),
        data_collator=DataCollatorWithFlattening(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    model.merge_and_unload().save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
