"""Convert a published checkpoint to the zoo and back to transformers' own format, which other runtimes serve.

    python examples/convert_and_serve.py --tiny                                   # seconds, random weights
    python examples/convert_and_serve.py --source state-spaces/mamba2-130m        # downloads 0.5 GB
    python examples/convert_and_serve.py --tiny --serve                           # an OpenAI-compatible server

--serve needs `pip install 'transformers[serving]'`. vLLM serves the same folder: `vllm serve runs/served/transformers`.
"""

import argparse
import subprocess
from pathlib import Path

import torch
from tiny_inputs import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Convert in both directions, compare the models, and start a server if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="state-spaces/mamba2-130m", help="folder or Hub id of a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/served"), help="folder to write to")
    parser.add_argument("--tokenizer", default="EleutherAI/gpt-neox-20b", help="for a source that brings none")
    parser.add_argument("--serve", action="store_true", help="serve the converted model until interrupted")
    parser.add_argument("--tiny", action="store_true", help="convert a tiny random model")
    options = parser.parse_args()
    zoo, theirs = options.output / "zoo", options.output / "transformers"

    if options.tiny:
        save_tiny_model(zoo)
    else:
        # Into the zoo. The state-spaces checkpoints are pickles; --allow-pickle reads those that hold only tensors.
        subprocess.run(["ssm-zoo", "convert", options.source, str(zoo), "--allow-pickle"], check=True)
        if not (zoo / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(zoo)

    # From the zoo to transformers' own classes. The command compares the logits of both and prints the difference.
    subprocess.run(["ssm-zoo", "convert", str(zoo), str(theirs), "--to", "transformers"], check=True)

    # The zoo's model runs anywhere with its own code; the converted one is a plain `Mamba2ForCausalLM`.
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    inputs = tokenizer("Mamba is a", return_tensors="pt")
    answers = []
    for folder, trust in ((zoo, True), (theirs, False)):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
        with torch.no_grad():
            answers.append(model(**inputs).logits)
        print(f"{type(model).__name__}: {tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0])!r}")
    print(f"largest difference of the logits: {(answers[0] - answers[1]).abs().max():.1e}")

    if options.serve:
        # Ask it from another terminal:
        #   curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
        #     -d '{"model": "runs/served/transformers", "messages": [{"role": "user", "content": "Hello"}]}'
        subprocess.run(["transformers", "serve", str(theirs)], check=True)


if __name__ == "__main__":
    main()
