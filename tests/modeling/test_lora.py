"""peft's adapters on every projection of every family: trained, saved, merged, used by `generate`."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("without_gate_noise"),
]

PROJECTIONS = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "g_proj",
    "gate",
    "in_proj",
    "out_proj",
    "x_proj",
    "dt_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}
IDS = draw_ids(2, 12)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers, but for the head."""
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in named if name != "lm_head"]


def adapted(name: str, *, dora: bool = False, targets: list[str] | str = "all-linear") -> Any:
    torch.manual_seed(1)
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=targets, use_dora=dora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(make_model(name), config)


def train(model: Any, steps: int) -> list[float]:
    """Losses on one batch, before each step."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_there_are_no_other_projections(name: str) -> None:
    """The list that recipes may name."""
    assert {path.rpartition(".")[2] for path in projections(make_model(name))} <= PROJECTIONS


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("how", ["all-linear", "listed"])
def test_adapters_on_every_projection_are_trained(name: str, how: str, dora: bool) -> None:
    paths = projections(make_model(name))
    targets = how if how == "all-linear" else sorted({path.rpartition(".")[2] for path in paths})
    model = adapted(name, dora=dora, targets=targets)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    parts = ["lora_A.default.weight", "lora_B.default.weight"]
    parts += ["lora_magnitude_vector.default.weight"] if dora else []
    assert before.keys() == {f"base_model.model.{path}.{part}" for path in paths for part in parts}
    plain = logits(make_model(name))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)  # B is zero
    losses = train(model, 2)
    assert losses[1] < losses[0]
    for key, parameter in model.named_parameters():
        if key in before:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key
            assert not torch.equal(parameter, before[key]), key
        else:
            assert parameter.grad is None, key
    assert (logits(model) - plain).abs().max() > 1e-2


def test_the_convolution_carries_no_adapter(name: str) -> None:
    convolutions = [path for path, module in make_model(name).named_modules() if isinstance(module, nn.Conv1d)]
    if not convolutions:
        pytest.skip(f"{name} has no convolution")
    assert not any("conv1d" in key for key, parameter in adapted(name).named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_loss_falls(name: str, dora: bool) -> None:
    losses = train(adapted(name, dora=dora), 15)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_and_saved(name: str, dora: bool, tmp_path: Path) -> None:
    """The adapter by itself, and a merged model that is again a model like any other."""
    model = adapted(name, dora=dora)
    train(model, 3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded), expected)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    tokens = model.generate(input_ids=IDS, **settings)
    merged = model.merge_and_unload()
    assert type(merged) is FAMILIES[name].causal_lm
    assert not any("lora" in key for key, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert torch.equal(merged.generate(input_ids=IDS, **settings), tokens)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))


def test_an_adapter_finds_its_base_model(name: str, tmp_path: Path) -> None:
    """By the path in the adapter's configuration, with peft's Auto class and with transformers' own loading."""
    make_model(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(model, 2)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers' add_adapter asks for peft {MIN_PEFT_VERSION}",
)
def test_an_adapter_added_to_the_model_itself_is_saved_alone(name: str, tmp_path: Path) -> None:
    """transformers' `add_adapter`: neither weights nor code of the base model belong beside the adapter."""
    model = make_model(name)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    train(model, 2)
    model.save_pretrained(tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    other = make_model(name)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    """With frozen embeddings: a reentrant checkpoint needs an input that asks for gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert any(gradient.any() for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5)
