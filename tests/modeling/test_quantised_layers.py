"""Layers that are quantised after a model is made: heads, norms and mixers never take a weight's dtype for theirs.

8-bit layers are emulated as bitsandbytes makes them (an int8 weight and a scale), as layers with 8-bit floats, and by
torch's own dynamic quantisation, whose `weight` is a method.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import ENCODERS, FAMILIES, draw_ids, make_head, make_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from ssm_zoo.modeling import RetrievalMixer, RetrievalMixerConfig

FEW = ["mamba", "mamba-options", "mamba2", "all-four", "taipan", "mixer-series", "hybrid-mixers"]


class EightBitLinear(nn.Linear):
    """As of bitsandbytes: one scale for each output, inputs as they come."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 127
        weight = (layer.weight.detach().float() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        assert input.is_floating_point(), f"inputs of {input.dtype}"
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, (self.weight.float() * self.scale).to(input.dtype), bias)


class EightBitFloatLinear(EightBitLinear):
    """As of transformers' `FP8Linear`: the weight is of an 8-bit floating-point dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        scale = layer.weight.detach().float().abs().amax() / 448
        self.weight = nn.Parameter((layer.weight.detach().float() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = scale


def quantise(model: Any, kind: type[EightBitLinear], *only: str) -> Any:
    """A copy with all its linear layers, or those of some names, replaced."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and (not only or name in only):
                setattr(parent, name, kind(layer))
    return model


def cosine(left: Tensor, right: Tensor) -> float:
    return float(F.cosine_similarity(left.flatten().float(), right.flatten().float(), dim=0))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", [EightBitLinear, EightBitFloatLinear])
def test_a_quantised_head_gives_the_logits(name: str, kind: type[EightBitLinear]) -> None:
    model, ids = make_model(name), draw_ids(2, 8)
    with torch.no_grad():
        exact = model(ids).logits
        logits = quantise(model, kind, "lm_head")(ids).logits
    assert logits.dtype == torch.float32
    assert cosine(logits, exact) > 0.998


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_quantised_gives_nearly_the_logits_and_decodes(name: str) -> None:
    model, ids = make_model(name, tie_word_embeddings=False), draw_ids(2, 8)
    with torch.no_grad():
        exact = model(ids).logits
        small = quantise(model, EightBitLinear)
        whole = small(ids).logits
        assert cosine(whole, exact) > 0.99
        first = small(ids[:, :5], use_cache=True)
        rest = small(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-4)


def test_llama_of_transformers_is_no_better_off() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).eval()
    ids = draw_ids(2, 8)
    with torch.no_grad():
        assert cosine(quantise(model, EightBitLinear, "lm_head")(ids).logits, model(ids).logits) > 0.998


@pytest.mark.parametrize("name", [*FEW, "mamba2-encoder"])
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_other_heads_too(auto_class: Any, name: str) -> None:
    model, ids = make_head(auto_class, name), draw_ids(2, 8)
    with torch.no_grad():
        assert cosine(quantise(model, EightBitLinear, "score")(ids).logits, model(ids).logits) > 0.998


@pytest.mark.parametrize("name", ENCODERS)
def test_the_masked_language_models_too(name: str) -> None:
    model, ids = make_head(AutoModelForMaskedLM, name), draw_ids(2, 8)
    with torch.no_grad():
        assert cosine(quantise(model, EightBitLinear, "lm_head")(ids).logits, model(ids).logits) > 0.998


def retrieval_mixer() -> RetrievalMixer:
    torch.manual_seed(0)
    return RetrievalMixer(RetrievalMixerConfig(hidden_size=16, num_hidden_layers=2, max_position_embeddings=6)).eval()


def test_the_retrieval_mixer_too() -> None:
    model = retrieval_mixer()
    inputs = torch.randn(2, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        exact = model(*inputs).logits
        assert cosine(quantise(model, EightBitLinear)(*inputs).logits, exact) > 0.998
        assert cosine(dynamically_quantised(model)(*inputs).logits, exact) > 0.99


def dynamically_quantised(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_quantisation_by_torch(name: str) -> None:
    model, ids = make_model(name, tie_word_embeddings=False), draw_ids(2, 8)
    small = dynamically_quantised(model)
    assert callable(small.lm_head.weight)
    with torch.no_grad():
        assert cosine(small(ids).logits, model(ids).logits) > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_a_quantised_head_on_a_model_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model, ids = make_model(name), draw_ids(2, 8)
    with torch.no_grad():
        exact = model(ids).logits
        small = quantise(model, EightBitLinear, "lm_head")
        for module in small.modules():
            if not isinstance(module, EightBitLinear):
                module._parameters.update(
                    {key: as_half(key, value, dtype) for key, value in module._parameters.items()}
                )
        logits = small(ids).logits
    assert logits.dtype in (dtype, torch.float32)
    assert cosine(logits, exact) > 0.995


def as_half(key: str, value: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    if value is None or key in ("A_log", "D", "dt_bias", "decay_value"):
        return value
    return nn.Parameter(value.to(dtype))


def test_a_head_of_another_floating_point_dtype_gets_its_own() -> None:
    """As `prepare_model_for_kbit_training` leaves it: float32 over a model in bfloat16."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(make_model("mamba2").config, dtype=torch.bfloat16).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.float())
    assert model(draw_ids(1, 4)).logits.dtype == torch.float32
