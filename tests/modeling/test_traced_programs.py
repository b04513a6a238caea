"""torch.export and torch.jit.trace of every family: a program made at one length and padding serves others."""

from typing import Any

import pytest
import torch
from test_compile import ALL, build, outputs, padded


@pytest.mark.parametrize("name", ALL)
def test_an_exported_program_serves_another_length_and_padding(name: str) -> None:
    model = build(name).eval()
    length = torch.export.Dim("length", min=6, max=100)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), kwargs=padded(9, "left"), dynamic_shapes=shapes).module()
    for inputs in (padded(9, "left"), padded(13, "right"), padded(8, "none")):
        with torch.no_grad():
            torch.testing.assert_close(outputs(program, inputs), outputs(model, inputs), rtol=1e-5, atol=1e-5)


class Traceable(torch.nn.Module):
    """A model for torch.jit.trace, which takes and returns tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_a_jit_trace_serves_another_length_and_padding(name: str) -> None:
    model = Traceable(build(name)).eval()
    with torch.no_grad():
        first = padded(9, "left")
        traced = torch.jit.trace(model, (first["input_ids"], first["attention_mask"]), check_trace=False)
        other = padded(13, "right")
        ids, mask = other["input_ids"], other["attention_mask"]
        real = mask.bool()
        torch.testing.assert_close(traced(ids, mask)[real], model(ids, mask)[real], rtol=1e-5, atol=1e-5)
