"""Mamba-1's step sizes in half precision: `dt_proj`, called as a module, loses no more than the official scan."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import draw_ids, make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssm_zoo.modeling import ZooMambaConfig, ZooMambaForCausalLM
from ssm_zoo.modeling.modeling_mamba import StepProjection

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def projection(tmp_path: Path) -> StepProjection:
    """That of an initialised model, loaded in bfloat16."""
    torch.manual_seed(0)
    config = ZooMambaConfig(vocab_size=8, hidden_size=256, num_hidden_layers=1, time_step_rank=16)
    ZooMambaForCausalLM(config).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).backbone.layers[0].mixer.dt_proj


def error(steps: Tensor, low_rank: Tensor, projection: StepProjection) -> float:
    """Largest relative error of the step sizes."""
    exact = F.softplus(F.linear(low_rank.double(), projection.weight.double(), projection.bias.double()))
    return ((F.softplus(steps.double()) - exact) / exact).abs().max().item()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_step_sizes_lose_the_rounding_of_the_product_alone(projection: StepProjection, how: str) -> None:
    assert (projection.weight.dtype, projection.bias.dtype) == (torch.bfloat16, torch.float32)
    low_rank = (0.1 * torch.randn(2, 50, 16)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        if how == "autocast":
            projection.float()
        steps = projection(low_rank)
    product = F.linear(low_rank.float(), projection.weight.float())
    assert steps.dtype == torch.float32
    bound = product.abs().max().item() * 2**-8
    assert error(steps, low_rank, projection) < bound < 0.002
    assert error(steps.bfloat16(), low_rank, projection) > 0.01  # what a sum in bfloat16 would be off


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_a_bfloat16_model(tmp_path: Path, dora: bool) -> None:
    """The base's weights in bfloat16, its step bias and the adapters in float32."""
    make_model("mamba-options").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["dt_proj"], "use_dora": dora, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**settings))
    steps: list[Tensor] = []
    adapted.base_model.model.backbone.layers[0].mixer.dt_proj.register_forward_hook(lambda *call: steps.append(call[2]))
    ids = draw_ids(2, 7)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert steps[0].dtype == torch.float32
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        assert merged.backbone.layers[0].mixer.dt_proj.bias.dtype == torch.float32
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=0.06)
