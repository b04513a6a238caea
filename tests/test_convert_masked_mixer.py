"""Checkpoints of masked, Toeplitz and recurrent mixers, made from the published names, against forwards in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from masked_mixers import LLAMA_CONFIG, MASKED, D, Kind, N, V, outputs, save, tensors
from safetensors.torch import load_file
from structured_mixers import RMS, STRUCTURED
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ssm_zoo.conversion.convert import convert

KINDS = MASKED | STRUCTURED | RMS
WEIGHTS = "model.safetensors"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def load(folder: Path, kind: Kind) -> Any:
    classes = {"decoderblocks": AutoModel, "convr": AutoModelForMaskedLM}
    found = [cls for part, cls in classes.items() if any(part in key for key in kind.shapes)]
    return (found or [AutoModelForCausalLM])[0].from_pretrained(folder).eval()


def computed(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


def ids_of(length: int = N) -> Tensor:
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1))


def test_a_kind_computes_what_is_published(kind: Kind, tmp_path: Path) -> None:
    weights = tensors(kind)
    report = convert(save(tmp_path / "theirs", weights), tmp_path / "ours", settings=kind.settings)
    unused = [key for key in weights if key.startswith(kind.unused)] if kind.unused else []
    assert report.keys_read == len(weights) - len(unused)
    assert [f"left out: {len(unused)} tensors" in line for line in report.lines()].count(True) == bool(unused)
    model = load(tmp_path / "ours", kind)
    assert model.config.model_type == "masked_mixer"
    assert {name: getattr(model.config, name) for name in kind.config} == kind.config
    expected = outputs(kind, weights, ids_of())
    assert expected.std() > 0.3
    torch.testing.assert_close(computed(model, ids_of()), expected.float(), rtol=1e-5, atol=1e-5)
