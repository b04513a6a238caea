"""Distil a Transformer of the Llama family into a student whose cache does not grow, and generate with the result.

    python examples/distil_your_transformer.py --tiny                                     # seconds, random teacher
    python examples/distil_your_transformer.py --teacher HuggingFaceTB/SmolLM2-135M       # minutes on a CPU

Give your own texts with --train and --heldout. Run the same command again to continue an interrupted run.
"""

import argparse
import json
import subprocess
from pathlib import Path

from tiny_inputs import TEXTS, save_tiny_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

# What --tiny changes in the recipe: a few steps on short sequences.
TINY = [
    "data.sequence_length=64",
    "stages.0.sequence_length=64",
    "stages.0.tokens=2048",
    "evaluation.tokens=1024",
    "evaluation.sequence_length=64",
    "evaluation.repeat_distance=64",
    "evaluation.final=false",
]


def main() -> None:
    """Run the distillation, print what the report says, and continue a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M", help="folder, Hub id or .gguf file")
    parser.add_argument("--train", type=Path, default=TEXTS / "train.txt", help="training text")
    parser.add_argument("--heldout", type=Path, default=TEXTS / "heldout.txt", help="text for the evaluation")
    parser.add_argument("--output", type=Path, default=Path("runs/distilled"), help="folder of the run")
    parser.add_argument("--tiny", action="store_true", help="distil a tiny random teacher instead")
    options = parser.parse_args()

    settings = [f"data.train={options.train}", f"data.heldout={options.heldout}"]
    if options.tiny:
        teacher = save_tiny_teacher(options.output.parent / "tiny-teacher")
        settings += [f"teacher={teacher}", *TINY]
    else:
        settings += [f"teacher={options.teacher}"]

    # The recipe "zoo" bounds the memory of every attention layer: a window, the first tokens, and slots that are
    # divided among the heads by what each needs. The student starts close to its teacher; the stage refines it.
    command = ["ssm-zoo", "distill", "zoo", str(options.output)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True)

    # The report compares the student with the teacher before and after every stage.
    report = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    for evaluation in report["evaluations"]:
        print(f"{evaluation['name']:40} held-out loss {evaluation['loss']:.4f}")

    # The student is an ordinary Hub folder with its own code: this part needs torch and transformers only.
    student = options.output / "student"
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True)
    inputs = tokenizer("The largest city in the north of England is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main()
