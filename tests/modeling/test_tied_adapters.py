"""Adapters over tied embeddings: what a merged model computes is what the model with adapters does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TIED = [name for name in FAMILIES if make_model(name).config.tie_word_embeddings]
TARGETS = {"embeddings": ["embeddings"], "head": ["lm_head"], "both": ["embeddings", "lm_head"]}


def adapted(model: Any, targets: list[str], **options: Any) -> Any:
    """With LoRA that does something, on these layers and on some of a mixer."""
    torch.manual_seed(0)
    mixers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    own = {name.rpartition(".")[2] for name in mixers[:1]}
    found = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[*targets, *own], **options))
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return found.eval()


@pytest.mark.filterwarnings("ignore:Model (has|with)", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_keeps_the_logits(name: str, targets: list[str], tmp_path: Path) -> None:
    model, ids = make_model(name), draw_ids(2, 8)
    with torch.no_grad():
        base = model(ids).logits
        found = adapted(model, targets)
        expected = found(ids).logits
        assert (expected - base).abs().max() > 0.1
        found.save_pretrained(tmp_path / "adapter")
        merged = found.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
        assert merged.config.tie_word_embeddings is False
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-4)
        again = PeftModel.from_pretrained(make_model(name), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model (has|with)", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", ["mamba", "taipan", "sliding-discrete"])
def test_merging_in_place_weighted_adapters_and_tied_ones(name: str) -> None:
    ids = draw_ids(2, 8)
    with torch.no_grad():
        found = adapted(make_model(name), ["embeddings"])
        expected = found(ids).logits
        found.merge_adapter()
        torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-4)
        found.unmerge_adapter()
        torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-4)
        found.add_adapter("second", copy.deepcopy(found.peft_config["default"]))
        found.add_weighted_adapter(["default", "second"], [0.5, 1.0], "sum", combination_type="linear")
        found.set_adapter("sum")
        expected = found(ids).logits
        torch.testing.assert_close(found.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-4)

        found = adapted(make_model(name), ["embeddings"], ensure_weight_tying=True)
        expected = found(ids).logits
        torch.testing.assert_close(found.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TIED)
def test_adapters_elsewhere_leave_the_weights_tied(name: str) -> None:
    model, ids = make_model(name), draw_ids(2, 8)
    with torch.no_grad():
        found = adapted(model, [])
        assert model.lm_head.weight is model.backbone.embeddings.weight
        expected = found(ids).logits
        merged = found.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.backbone.embeddings.weight
    assert not hasattr(merged, "peft_config")


@pytest.mark.filterwarnings("ignore:Model (has|with)")
def test_adapters_taken_out_again_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model, ids = make_model("mamba"), draw_ids(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        plain = adapted(model, ["embeddings"]).unload()
        assert torch.equal(plain(ids).logits, expected)
        plain.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
