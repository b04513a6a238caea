"""Mamba-2 decodes a token by `mamba2_step`, with states and counts that stay in the cache."""

from functools import partial
from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from transformers import DynamicCache

from ssm_zoo.kernels import mamba2_step_triton
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.modeling import modeling_mamba2
from with_triton import DEVICE, NEEDS_TRITON


def decoded(name: str, rows: int = 2) -> tuple[list[torch.Tensor], Any]:
    """Logits of three tokens after a prompt, and the cache after them."""
    model = make_model(name).to(DEVICE)
    ids = draw_ids(rows, 8).to(DEVICE)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        return [model(ids[:, t : t + 1], cache=cache).logits for t in range(5, 8)], cache


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups", "mamba2-full"])
def test_the_kernel_decodes_as_torch_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_mamba2, "mamba2_step", partial(mamba2_step, implementation="torch"))
    expected, before = decoded(name)
    launches = []
    launch = mamba2_step_triton.mamba2_step_triton

    def counted(*args: Any) -> torch.Tensor:
        launches.append(args)
        return launch(*args)

    monkeypatch.setattr("ssm_zoo.kernels.mamba2_step.mamba2_step_triton", counted)
    monkeypatch.setattr(modeling_mamba2, "mamba2_step", partial(mamba2_step, implementation="triton"))
    found, cache = decoded(name)
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_state")]
    assert layers and len(launches) == 3 * len(layers)
    for layer, other in zip(layers, [layer for layer in before.layers if hasattr(layer, "conv_state")], strict=True):
        torch.testing.assert_close(layer.conv_state, other.conv_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.recurrent_state, other.recurrent_state, rtol=1e-4, atol=1e-4)
        counts = [args[-1] for args in launches if args[1] is layer.conv_state]
        assert len(counts) == 3 and all(each is counts[0] for each in counts) and not counts[0].any()
