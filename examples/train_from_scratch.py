"""Train a small Mamba-2 from scratch on text, with a tokenizer learnt from the same text, and generate with it.

    python examples/train_from_scratch.py --tiny              # seconds
    python examples/train_from_scratch.py --steps 2000        # 9 million parameters; about an hour on two CPU cores

Replace the configuration by any preset (`ssm_zoo.modeling.preset`) or family, e.g. `model_type: taipan`.
"""

import argparse
import json
import subprocess
from pathlib import Path

from tiny_inputs import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = {"model_type": "zoo_mamba2", "hidden_size": 256, "num_hidden_layers": 8, "head_dim": 64, "state_size": 64}
TINY = {"model_type": "zoo_mamba2", "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "state_size": 16}


def main() -> None:
    """Write the configuration, train, and continue a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=TEXTS / "train.txt", help="training text: .txt or .jsonl")
    parser.add_argument("--heldout", type=Path, default=TEXTS / "heldout.txt", help="text for the evaluation")
    parser.add_argument("--output", type=Path, default=Path("runs/from-scratch"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps")
    parser.add_argument("--tiny", action="store_true", help="a much smaller model, a few steps on the held-out text")
    options = parser.parse_args()

    # The configuration holds the keys that differ from the family's defaults. The vocabulary's size and the special
    # tokens follow from the tokenizer.
    options.output.parent.mkdir(parents=True, exist_ok=True)
    config = options.output.parent / f"{options.output.name}.json"
    config.write_text(json.dumps(TINY if options.tiny else SMALL), encoding="utf-8")

    vocabulary, steps, row_tokens = ("300", "15", "128") if options.tiny else ("8000", str(options.steps), "512")
    train = options.heldout if options.tiny else options.train
    # In a .txt file, documents are separated by the text given with --separator: here a blank line.
    command = ["ssm-zoo", "train", str(config), str(options.output), "--separator", r"\n\n"]
    command += ["--train", str(train), "--heldout", str(options.heldout), "--train-tokenizer", vocabulary]
    command += ["--steps", steps, "--row-tokens", row_tokens, "--learning-rate", "3e-3"]
    subprocess.run(command, check=True)

    # The run's folder holds the model with its card, the report, and the loss curve as a plot.
    report = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    before, after = (report["evaluations"][index]["loss"] for index in (0, -1))
    print(f"held-out loss: {before:.3f} -> {after:.3f}")

    # The model is an ordinary Hub folder with its own code: this part needs torch and transformers only.
    folder = options.output / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("The game was released in", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=True)[0]))


if __name__ == "__main__":
    main()
