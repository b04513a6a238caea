"""A program, run by `export.verify_export`, that loads an exported folder while `ssm_zoo` cannot be imported.

    python -P isolated_load.py FOLDER AUTO_CLASS TRUST THREADS INPUT OUTPUT

TRUST is "trusted" if the tokenizer's code may be run; the model's code, which the exporter has written, always is.
INPUT and OUTPUT are safetensors files: INPUT holds the model's arguments by name, usually (1, L) "input_ids"; its first
output is written to OUTPUT as "output". Standard input is a pipe from the parent.
"""

import os
import sys
import threading
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


class _NoPackage:
    """Prevents the import of ssm_zoo, whether or not it is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "ssm_zoo":
            raise ModuleNotFoundError(f"an exported folder must not need {name}", name=name)


def end_with_parent() -> None:
    """End this process when standard input ends, since the parent, which holds the other end of the pipe, has ended."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def first_output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits for the inputs, or the last hidden states of a model without a head.

    A loaded weight is a view into its file, aligned to 8 bytes only, and the summation order of a matrix product may
    depend on alignment. The weights are copied to memory that torch allocates, so that outputs are equal bit for bit.
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
