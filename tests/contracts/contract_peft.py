"""peft's own tests of causal language models, run on every family."""

import atexit
import itertools
import shutil
import tempfile
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_config
from library_tests import PEFT
from peft import IA3Config, PeftConfig, PromptLearningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssm_zoo.modeling import selective_attention

decoders = PEFT.module("test_decoder_models")

WHOLE_GRID = ("mamba", "taipan")
"""Families that meet every method; the others those in `EVERYWHERE`."""

EVERYWHERE = ("LoraConfig", "PromptTuningConfig", "PrefixTuningConfig")


MODELS = Path(tempfile.mkdtemp(prefix="contracts-"))
"""Each family's tiny model, by name, as peft's tests load it."""
atexit.register(shutil.rmtree, MODELS, ignore_errors=True)


def write_model(name: str) -> str:
    """Write a family's model, with a tokenizer of a few words; the name of its folder."""
    torch.manual_seed(0)
    folder = MODELS / name
    FAMILIES[name].causal_lm(make_config(name, pad_token_id=0)).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "This", "is", "a", "test", "prompt"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return str(folder)


def applied(method: type[PeftConfig], settings: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """Settings with the layers named: peft knows by the model's type where to put adapters in its own list only."""
    settings = dict(settings)
    names = {field.name for field in fields(method)}
    if not issubclass(method, PromptLearningConfig) and "target_modules" in names:
        settings["target_modules"] = settings.get("target_modules") or list(layers)
    if issubclass(method, IA3Config):
        settings["feedforward_modules"] = settings.get("feedforward_modules") or []
    return settings


def wide_layers(name: str) -> list[str]:
    """Names of the linear layers that peft's ranks and blocks, of 4 and 8, fit into."""
    found = FAMILIES[name].backbone(make_config(name)).named_modules()
    wide = {path.rpartition(".")[2]: layer for path, layer in found if isinstance(layer, torch.nn.Linear)}
    return [key for key, layer in wide.items() if all(size >= 8 and size % 4 == 0 for size in layer.weight.shape)]


def cases(name: str, values: list) -> list:
    """The (method, settings) pairs of one of peft's grids that a family meets."""
    kept, layers = [], wide_layers(name)
    for value in values:
        method, settings = value.values[:2] if hasattr(value, "values") else value[:2]
        if name in WHOLE_GRID or method.__name__ in EVERYWHERE:
            kept.append((method, applied(method, settings, layers)))
    return kept


def retargeted(function: types.FunctionType, name: str, folder: str) -> types.FunctionType | None:
    """A test of peft's with its list of models replaced by one family; None where it is about a model of its own."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    if not any(mark.args[0] == "model_id" for mark in marks):
        return None
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.pytestmark = [mark for mark in function.pytestmark if mark.name != "parametrize"]  # pyright: ignore
    for mark in marks:
        arguments, values = mark.args[:2]
        if arguments == "model_id":
            values, identifiers = [folder], [name]
        elif str(arguments).replace(" ", "") == "config_cls,config_kwargs":
            values = cases(name, list(values))
            counts = itertools.count()
            identifiers = [f"{method.__name__}{next(counts)}" for method, _ in values]
        else:
            identifiers = None
        copy = pytest.mark.parametrize(arguments, values, ids=identifiers)(copy)
    return copy


@pytest.fixture(autouse=True)
def no_noise_of_the_gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two passes in training mode, whose gradients the test compares, select the same tokens."""
    if "gradient_checkpointing" in request.node.name:
        monkeypatch.setattr(selective_attention, "logistic_noise", torch.zeros_like)


def contract(name: str) -> type:
    base, folder = decoders.TestDecoderModels, write_model(name)
    body: dict[str, Any] = {"__module__": __name__}
    for test, function in vars(base).items():
        if test.startswith("test_"):
            body[test] = retargeted(function, name, folder)
    return type(f"Test_{name}", (base,), body)


for _name in FAMILIES:
    globals()[f"Test_{_name}"] = contract(_name)
