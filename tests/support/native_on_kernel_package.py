"""A program that runs transformers' own models on a kernel package, where ssm_zoo cannot be imported.

    python native_on_kernel_package.py FOLDER

transformers accepts a range of versions of `kernels`. Releases on PyPI may be outside of it (5.24 asks for 0.18.2, and
PyPI had 0.17.2 at the end of November 2026); the program then tells transformers that the version is accepted.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import utils
from transformers.utils import import_utils

if not import_utils.is_kernels_available():
    import_utils.is_kernels_available = utils.is_kernels_available = lambda *versions: True  # type: ignore[assignment]

from native_configurations import SIZES, VOCABULARY, tiny_native
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from kernels import LocalLayerRepository, Mode, kernelize, register_kernel_mapping, use_kernel_mapping

LAYERS = ("RMSNorm", "RMSNormGated", "causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined")
LAYERS += ("mamba_inner_fn", "mamba_split_conv1d_scan_combined", "selective_scan_fn", "selective_state_update")
FUNCTIONS = {
    "mamba": [
        *(modeling_mamba.causal_conv1d_fn, modeling_mamba.causal_conv1d_update, modeling_mamba.mamba_inner_fn),
        *(modeling_mamba.mamba_selective_scan, modeling_mamba.mamba_selective_state_update),
    ],
    "mamba2": [
        *(modeling_mamba2.causal_conv1d_fn, modeling_mamba2.causal_conv1d_update, modeling_mamba2.mamba2_chunk_scan),
        *(modeling_mamba2.mamba2_selective_state_update, modeling_mamba2.mamba2_split_conv1d_scan_combined),
    ],
}
STEPS = ("causal_conv1d_update", "selective_state_update")


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def trained(model: PreTrainedModel, rows: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return the gradients of all parameters in a training step."""
    model.train()
    model.zero_grad()
    model(rows, labels=rows, **inputs).loss.backward()
    model.eval()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def outcome(model: PreTrainedModel) -> dict[str, Any]:
    """Return logits of padded rows, tokens of `generate`, and gradients."""
    rows, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = model(rows, attention_mask=mask).logits * mask[..., None]
        generated = model.generate(rows, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return {"logits": logits, "generated": generated, "gradients": trained(model, rows)}


def running(model_type: str) -> dict[str, bool]:
    """Return for each function of a model type whether it runs on the package."""
    return {
        type(function).kernel_layer_name: function.forward.__func__.__module__.endswith(".layers")
        for function in FUNCTIONS[model_type]
    }


def main(folder: str) -> None:
    """Compare each model before and after the replacement of its functions."""
    sys.modules["ssm_zoo"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    others = {model_type: tiny_native(model_type) for model_type in SIZES.keys() - FUNCTIONS.keys()}
    logits = {model_type: model(tokens(2, 9)).logits for model_type, model in others.items()}
    models = {model_type: tiny_native(model_type) for model_type in FUNCTIONS}
    before = {model_type: outcome(model) for model_type, model in models.items()}
    row, documents = tokens(1, 11), torch.tensor([[0] * 4 + [1] * 7], dtype=torch.int32)
    backbone = models["mamba2"].backbone  # the model with a head does not pass documents on
    repositories = {name: LocalLayerRepository(Path(folder), layer_name=name) for name in LAYERS}
    mapping = {name: {"cpu": repository} for name, repository in repositories.items()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(models["mamba"], mode=Mode.TRAINING, device="cpu")
        assert {name for name, ours in running("mamba").items() if not ours} == set(STEPS), running("mamba")
        kernelize(models["mamba"], mode=Mode.INFERENCE, device="cpu")
    register_kernel_mapping(mapping)
    models["mamba2"].set_use_kernels(True)
    for model_type, model in models.items():
        assert all(running(model_type).values()), running(model_type)
        torch.testing.assert_close(outcome(model), before[model_type], rtol=1e-5, atol=1e-5)
    for model_type, model in others.items():
        model.set_use_kernels(True)
        torch.testing.assert_close(model(tokens(2, 9)).logits, logits[model_type], rtol=1e-5, atol=1e-5)

    for training in (True, False):
        # Changing the mode chooses anew. The steps have no gradient, so that a training takes transformers' own.
        models["mamba2"].train(training)
        theirs = {name for name, ours in running("mamba2").items() if not ours}
        assert theirs == (set(STEPS) if training else set()), running("mamba2")
        apart = [backbone(part, use_cache=False).last_hidden_state for part in row.split([4, 7], dim=1)]
        for packing in ({"seq_idx": documents}, {"cu_seq_lens_q": torch.tensor([0, 4, 11], dtype=torch.int32)}):
            packed = backbone(row, use_cache=False, **packing).last_hidden_state
            torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-5, atol=1e-5)
            assert packed.requires_grad


if __name__ == "__main__":
    main(*sys.argv[1:])
