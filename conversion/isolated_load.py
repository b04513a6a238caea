"""Load an exported folder where `ssm_zoo` cannot be imported: a program that `export.verify_export` runs.

    python -P isolated_load.py FOLDER AUTO_CLASS TRUST THREADS INPUT OUTPUT

TRUST is "trusted" if a tokenizer's code may be run; the model's, which the exporter has written, always is. INPUT and
OUTPUT are safetensors files: arguments of the model by their names, (1, L) "input_ids" mostly, and its first output for
them under "output". Standard input is a pipe from the parent.
"""

import os
import sys
import threading
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


class _NoPackage:
    """Keeps the import system from finding ssm_zoo, installed or not."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "ssm_zoo":
            raise ModuleNotFoundError(f"an exported folder must not need {name}", name=name)


def end_with_parent() -> None:
    """End this process when standard input ends: the parent, which holds the other end of the pipe, is gone then."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def first_output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits for the inputs, or the last hidden states of a model without a head.

    A loaded weight is a view into its file, at any multiple of 8 bytes, and a matrix product may sum in another
    order at another alignment. To be comparable bit for bit, the weights are moved to where torch allocates.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    options = {"use_cache": False} if "input_ids" in inputs else {}
    with torch.no_grad():
        return model.eval()(**inputs, **options)[0].contiguous()


def main(folder: str, auto_class: str, trust: str, threads: str, input_file: str, output_file: str) -> None:
    """Load the tokenizer, if there is one, and the model with the folder's own code; write its output."""
    sys.meta_path.insert(0, _NoPackage)
    torch.set_num_threads(int(threads))
    if (Path(folder) / "tokenizer_config.json").is_file():
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust == "trusted")
    model = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, dtype="auto", use_safetensors=True
    )
    save_file({"output": first_output(model, load_file(input_file))}, output_file)


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
