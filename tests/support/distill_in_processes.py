"""One of several processes that distil together; started by test_several_processes.py through `accelerate launch`.

`distill_in_processes.py FOLDER RECIPE:OUTPUT:STOP ...` carries out recipes one after the other, in a folder that holds
what they read: RECIPE.yaml, each into its own OUTPUT, until STOP, a stage and a step such as "logits/3", or a file of
the teacher's text such as "text/1" ("-": to its end). After the word "fsdp", weights are sharded as
`examples/launch/fsdp2_1x8.yaml` has it. The main process writes OUTPUT.saved.json: for each call of a layer in a
layer-wise stage, how many tensors of layers before it are kept for a backward pass, and for each step the largest
number that was kept in it. Every process writes OUTPUT.rows-NUMBER.json, the windows whose stored logits it read, and
OUTPUT.wrote-NUMBER.json, the files of the teacher's text that it wrote.
"""

import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from torch import Tensor

from ssm_zoo.distill import objectives, pseudo_labels, streaming
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.stored_logits import StoredLogits

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


class _Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class KeptTensors:
    """Counts the tensors that graphs keep for their backward passes within :meth:`counting`."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.at_layers: list[int] = []
        self.of_steps: list[int] = []

    def keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self.release)
        return kept

    def release(self) -> None:
        self.now -= 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.most = self.now
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor):
            yield
        self.of_steps.append(self.most)


def watch(patch: pytest.MonkeyPatch) -> KeptTensors:
    """Count what layer-wise stages keep."""
    kept, called = KeptTensors(), streaming._called_instead

    def counted(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def within(*arguments: Any, **options: Any) -> Tensor:
            with kept.counting():
                return mean(*arguments, **options)

        return within

    @contextmanager
    def entered(*arguments: Any) -> Iterator[None]:
        kept.at_layers.append(kept.now)
        with called(*arguments):
            yield

    for name in ("mean_over_layers", "mean_over_own_stream"):
        patch.setattr(objectives, name, counted(getattr(objectives, name)))
    patch.setattr(streaming, "_called_instead", entered)
    return kept


def run_until(recipe: str, output: str, stop: str) -> None:
    """Carry out a recipe until a step of a stage, counted from 0, or to its end."""
    stage, _, step = stop.partition("/")
    inner = Distiller.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.stage_name == f"stages.{stage}: " and self.state.global_step == int(step):
            raise KeyboardInterrupt
        return inner(self, *arguments, **options)

    rows: list[int] = []
    row = StoredLogits.row

    def reading(self: StoredLogits, stage: int, item: int) -> dict[str, Tensor]:
        rows.append(item)
        return row(self, stage, item)

    wrote: list[int] = []
    write = pseudo_labels.write_batch

    def writing(*arguments: Any) -> dict[str, Tensor]:
        if stage == "text" and arguments[-1] == int(step):
            raise KeyboardInterrupt
        wrote.append(arguments[-1])
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        kept = watch(patch)
        patch.setattr(pseudo_labels, "write_batch", writing)
        patch.setattr(StoredLogits, "row", reading)
        patch.setattr(Distiller, "training_step", stopping)
        if stop == "-":
            distill(load_recipe(f"{recipe}.yaml"), output)
        else:
            with pytest.raises(KeyboardInterrupt):
                distill(load_recipe(f"{recipe}.yaml"), output)
    Path(f"{output}.rows-{PartialState().process_index}.json").write_text(json.dumps(rows), encoding="utf-8")
    Path(f"{output}.wrote-{PartialState().process_index}.json").write_text(json.dumps(wrote), encoding="utf-8")
    if PartialState().is_main_process:
        found = {"at_layers": kept.at_layers, "of_steps": kept.of_steps}
        Path(f"{output}.saved.json").write_text(json.dumps(found), encoding="utf-8")


def shard() -> None:
    """Set what `accelerate launch --config_file examples/launch/fsdp2_1x8.yaml` sets."""
    settings = yaml.safe_load((LAUNCH / "fsdp2_1x8.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    os.environ |= {name.upper(): str(value) for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        if job == "fsdp":
            shard()
        else:
            run_until(*job.split(":"))
