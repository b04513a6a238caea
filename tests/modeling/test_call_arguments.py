"""What a forward is called with: names that it does not read are refused, whoever passes them."""

from typing import Any

import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_head, make_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

HEADS: list[Any] = [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]
MISSPELT = {
    "seq_index": "seq_idx",
    "seq_ids": "seq_idx",
    "cu_seq_lens": "cu_seqlens",
    "past_key_value": "past_key_values",
    "attention_masks": "attention_mask",
    "input_embeds": "inputs_embeds",
    "position_id": "position_ids",
    "output_attention": "output_attentions",
    "use_caches": "use_cache",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_under_its_name_in_transformers_mamba_is_continued(name: str) -> None:
    model, ids = make_model(name), draw_ids(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :6], cache_params=cache, use_cache=True)
        assert cache.get_seq_length() == 6
        rest = model(ids[:, 6:], cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", ["past_key_values", "cache"])
def test_two_caches_are_refused(other: str) -> None:
    model = make_model("mamba2")
    caches = {name: DynamicCache(config=model.config) for name in ("cache_params", other)}
    with pytest.raises(ValueError, match=f"pass the cache as either `{other}` or `cache_params`, got both"):
        model(draw_ids(1, 4), **caches)


@pytest.mark.parametrize(("given", "meant"), MISSPELT.items())
@pytest.mark.parametrize("name", ["mamba", "mamba2", "all-four", "taipan", "mixer"])
def test_a_misspelt_name_is_refused_with_the_closest_right_one(name: str, given: str, meant: str) -> None:
    model = make_model(name)
    with pytest.raises(TypeError, match=f"^.*Model.forward has no argument `{given}`. Did you mean `{meant}`"):
        model(draw_ids(1, 4), **{given: torch.ones(1, 4)})


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_every_head_refuses_a_misspelt_name(auto_class: Any, name: str) -> None:
    with pytest.raises(TypeError, match=r"has no argument `seq_index`\. Did you mean `seq_idx`"):
        make_head(auto_class, name)(draw_ids(1, 4), seq_index=torch.zeros(1, 4, dtype=torch.long))


def test_the_masked_language_model_refuses_a_misspelt_name() -> None:
    with pytest.raises(TypeError, match=r"has no argument `attention_masks`\. Did you mean `attention_mask`"):
        make_head(AutoModelForMaskedLM, "mamba2-encoder")(draw_ids(1, 4), attention_masks=torch.ones(1, 4))


def test_a_name_like_no_other_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"has no argument `zzz`\. It takes input_ids, attention_mask, "):
        make_model("mamba")(draw_ids(1, 4), zzz=1)


def test_a_backbone_has_no_labels() -> None:
    ids = draw_ids(1, 4)
    with pytest.raises(TypeError, match=r"ZooMamba2Model\.forward has no argument `labels`"):
        make_model("mamba2").backbone(ids, labels=ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_and_peft_pass_changes_nothing(name: str) -> None:
    model, ids = make_model(name), draw_ids(1, 6)
    bounds = torch.tensor([0, 6])
    passed = {
        "num_items_in_batch": torch.tensor(5),
        "token_type_ids": torch.zeros_like(ids),
        "cu_seq_lens_k": bounds,
        "max_length_q": 6,
        "max_length_k": 6,
        "cache_position": torch.arange(6),
        "output_router_logits": True,
        "task_ids": None,
    }
    with torch.no_grad():
        assert torch.equal(model(ids, **passed).logits, model(ids).logits)


@pytest.mark.parametrize("auto_class", HEADS[2:], ids=lambda auto_class: auto_class.__name__)
def test_labels_of_another_shape_with_as_many_numbers_are_refused(auto_class: Any) -> None:
    ids = draw_ids(2, 6)
    for model in (make_model("mamba2"), make_head(auto_class, "mamba2")):
        with pytest.raises(ValueError, match=r"labels must be \(B, L\) = \(2, 6\), .* got \(6, 2\)"):
            model(ids, labels=torch.zeros(6, 2, dtype=torch.long))
