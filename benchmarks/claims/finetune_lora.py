"""Pretrain a small Mamba-2 on one text, then finetune it with LoRA on another: what the adapters gain, on a CPU.

Both runs are `ssm-zoo finetune lm`. The base is a toy: 2.8 M parameters, a vocabulary of 2,048 learnt from the text,
one or two passes over WikiText-2's validation part (distill/data/wikitext2). The second text is cut into documents at
blank lines; its last tenth is held out. What is shown is that the machinery works and the loss falls, no useful model.

    python benchmarks/claims/finetune_lora.py tinyshakespeare.txt --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, positive
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2ForCausalLM

TEXT = Path(__file__).resolve().parents[2] / "distill" / "data" / "wikitext2"
VOCABULARY = 2048


def save_untrained(folder: Path) -> None:
    """Return a tokenizer learnt from the training text, and a model with random weights."""
    backend = ByteLevelBPETokenizer()
    backend.train([str(TEXT / "train.txt")], VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = ZooMamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=10,
        state_size=32,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    ZooMamba2ForCausalLM(config).save_pretrained(folder)


def save_texts(source: Path, folder: Path) -> None:
    """Return the articles of WikiText-2 as documents, and the documents of `source`, its last tenth held out."""
    for name in ("train", "heldout"):
        text = (TEXT / f"{name}.txt").read_text(encoding="utf-8")
        (folder / f"wikitext2-{name}.txt").write_text(text.replace("\n= ", "\n\n\n= "), encoding="utf-8")
    documents = source.read_text(encoding="utf-8").split("\n\n")
    held_out = len(documents) // 10
    for name, part in (("train", documents[:-held_out]), ("heldout", documents[-held_out:])):
        (folder / f"{source.stem}-{name}.txt").write_text("\n\n".join(part), encoding="utf-8")


def run(folder: Path, threads: int, *arguments: str) -> None:
    """Run `ssm-zoo finetune lm` in a folder, so that its report names no path of this machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "ssm_zoo.cli.main", "finetune", "lm", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("text", type=Path, help="to finetune on")
    parser.add_argument("--base-steps", type=positive, default=500)
    parser.add_argument("--steps", type=positive, default=400, help="of the finetuning")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    rows = ["--row-tokens", "512", "--batch-size", "2"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, name = Path(temporary), options.text.stem
        save_untrained(folder / "untrained")
        save_texts(options.text, folder)
        texts = ["--train", "wikitext2-train.txt", "--heldout", "wikitext2-heldout.txt", "--separator", r"\n\n\n"]
        full = ["--method", "full", "--learning-rate", "3e-3", "--steps", str(options.base_steps)]
        run(folder, options.threads, "untrained", "base", *texts, *rows, *full)
        shutil.copytree(folder / "base" / "model", folder / "toy-mamba2")  # a name for the report
        texts = ["--train", f"{name}-train.txt", "--heldout", f"{name}-heldout.txt", "--separator", r"\n\n"]
        lora = ["--rank", "16", "--learning-rate", "2e-3", "--steps", str(options.steps), "--merge"]
        run(folder, options.threads, "toy-mamba2", "lora", *texts, *rows, *lora)
        report = json.loads((folder / "lora" / "report.json").read_text(encoding="utf-8"))
        pretraining = json.loads((folder / "base" / "report.json").read_text(encoding="utf-8"))
        about = (
            "A toy, to show the machinery at work: the base model toy-mamba2 is what the run under 'pretraining' made "
            "of random weights. One seed."
        )
        stem = f"finetune_lora-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        text = json.dumps({"about": about, **report, "pretraining": pretraining}, indent=1, allow_nan=False)
        (options.output / f"{stem}.json").write_text(f"{text}\n", encoding="utf-8")
        shutil.copyfile(folder / "lora" / "plots" / "loss.png", options.output / f"{stem}.png")
    print(f"wrote {options.output / stem}.json and .png")


if __name__ == "__main__":
    main(sys.argv[1:])
