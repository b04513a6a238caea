"""torch.compile and torch.export of every family: one graph for all lengths and masks, with eager's numbers."""

from typing import Any

import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_head, make_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel

ALL = [*FAMILIES, *ENCODERS]


def build(name: str) -> Any:
    """A tiny model in float64: in float32 sums in another order differ by more than 1e-5 in some gradients."""
    model = make_head(AutoModel, name) if name in ENCODERS else make_model(name)
    return model.double()


def padded(length: int, side: str) -> dict[str, Any]:
    """Two rows, of which one is padded."""
    ids = draw_ids(2, length, seed=length)
    mask = torch.ones_like(ids)
    mask[:1, : 4 if side == "left" else 0] = 0
    mask[1:, length - (3 if side == "right" else 0) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the model computes at real tokens."""
    found = model(**inputs)
    states = found.logits if "logits" in found else found.last_hidden_state
    return states[inputs["attention_mask"].bool()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_one_graph_serves_lengths_and_padding_and_has_the_gradients_of_eager(name: str) -> None:
    torch._dynamo.reset()
    model = build(name).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length, side in ((9, "left"), (12, "right"), (14, "none")):
        found = []
        for call in (compiled, model):
            model.zero_grad()
            torch.manual_seed(0)
            y = outputs(call, padded(length, side))
            y.square().sum().backward()
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            found.append((y.detach(), gradients))
        (y, gradients), (expected, slopes) = found
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == slopes.keys()
        for key, slope in slopes.items():
            torch.testing.assert_close(gradients[key], slope, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    # A window or a context splits the lengths into two ranges at most.
    assert counter.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba2", "taipan", "mixer"])
def test_an_exported_program_serves_another_length(name: str) -> None:
    model = build(name).eval()
    length = torch.export.Dim("length", min=6, max=100)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), kwargs=padded(9, "left"), dynamic_shapes=shapes)
    for inputs in (padded(9, "left"), padded(13, "right")):
        with torch.no_grad():
            torch.testing.assert_close(outputs(program.module(), inputs), outputs(model, inputs), rtol=1e-5, atol=1e-5)
