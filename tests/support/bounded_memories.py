"""Inputs and options of attention over a bounded memory."""

import pytest
import torch
from torch import Tensor

OPTIONS = [
    pytest.param({"window": 1, "slots": [0, 0], "chunk_size": 1}, id="itself"),
    pytest.param({"window": 6, "slots": [3, 5], "sinks": 2, "chunk_size": 4}, id="ragged"),
    pytest.param({"window": 8, "slots": [2, 2], "chunk_size": 3, "decay": [0.9, 1.0]}, id="decays"),
    pytest.param({"window": 4, "slots": [0, 1], "sinks": 5, "chunk_size": 4, "decay": 0.95}, id="sinks-before-slots"),
    pytest.param({"window": 6, "slots": [3, 5], "sinks": 2, "chunk_size": 4, "softcap": 0.7}, id="capped"),
    pytest.param({"window": 4, "slots": [0, 0], "sinks": 3, "chunk_size": 2, "decay": [0.9, 1.0]}, id="sinks-only"),
    pytest.param({"window": 7, "slots": [0, 0], "sinks": 9, "chunk_size": 3, "softcap": 0.7}, id="late-sinks"),
    pytest.param({"window": 6, "slots": [0, 0], "chunk_size": 4, "decay": 0.9}, id="window-only"),
    pytest.param({"window": 32, "slots": [8, 8], "sinks": 4, "chunk_size": 16}, id="as-in-models"),
]
SEQ_IDX = torch.tensor([[-1, -1, *[0] * 7, *[3] * 11, *[-1] * 17], [*[0] * 34, -1, 1, 1]])


def draw(batch: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(B, L, 4, 6) queries, and keys and values of 2 heads."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    return [
        torch.randn(batch, length, heads, 6, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
