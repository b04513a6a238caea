"""Packed rows on a GPU: a training step reads nothing from the device, so that a CUDA graph can capture it."""

import contextlib

import pytest
import torch
from as_on_a_gpu import WAITS, as_on_a_gpu
from families import FAMILIES, draw_ids, make_model

from with_triton import NEEDS_TRITON

# Kinds of layers and models that read from the device, and why.
READING = {
    "zoo_bounded": "documents are cut into chunks",
    "zoo_history": "documents are laid out by their lengths",
    "zoo_attention_history": "as in zoo_history",
    "selective_attention": "the selected tokens are counted",
    "taipan": "as in selective_attention",
}
DOCUMENTS = {"seq_idx": torch.tensor([[0] * 5 + [1] * 7]), "cu_seqlens": torch.tensor([0, 5, 12])}


@NEEDS_TRITON
@pytest.mark.parametrize("packing", DOCUMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_training_step_does_not_wait(name: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name).train()
    given = {"input_ids": draw_ids(1, 12, seed=1), packing: DOCUMENTS[packing]}
    weights = {key: value.detach() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    config, launched = model.config, []
    reads = READING.keys() & {config.model_type, *config.layer_types, *(getattr(config, "mixer_types", None) or [])}
    with as_on_a_gpu(monkeypatch, weights | given, lambda *args, **_: launched.append(args)) as values:
        inputs = {key: values.pop(key) for key in given} | {"use_cache": False}
        for key, _ in model.named_parameters():
            values[key].requires_grad_()
        with pytest.raises(WAITS) if reads else contextlib.nullcontext():
            loss = torch.func.functional_call(model, values, (), inputs | {"labels": inputs["input_ids"]}).loss
            loss.backward()
    assert launched or reads
