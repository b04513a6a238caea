"""Every family of teachers: equal logits in `zoo_hybrid`, through padding, cache and `generate`, and exactly back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import TINY, VARIANTS, draw_ids, make_any_teacher
from transformers import AutoConfig, AutoModelForCausalLM

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.formats import FORMATS, TEACHERS
from ssm_zoo.conversion.formats.transformer_blocks import BLOCK_SETTINGS
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM

CASES = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in TEACHERS
    for name, changes in {"plain": {}, **VARIANTS.get(family, {})}.items()
]


def student_of(teacher: Any) -> Any:
    return build_student(Teacher(teacher), StudentSpec(), [])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_tiny_configurations_are_of_registered_families() -> None:
    assert TINY.keys() | VARIANTS.keys() <= TEACHERS.keys()


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_without_converted_layers_the_student_is_the_teacher(family: str, changes: dict[str, Any]) -> None:
    teacher = make_any_teacher(family, **changes)
    student, ids = student_of(teacher), draw_ids(2, 24)
    whole = teacher(input_ids=ids).logits
    assert whole.abs().max() > 0.5
    close(student(ids).logits, whole)
    assert student.num_parameters() == teacher.num_parameters()
    for padding in (slice(0, 7), slice(17, None)):  # on the left, on the right
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` passes them
        expected = teacher(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        close(student(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_the_cache_of_the_student_goes_on_as_its_teacher(family: str, changes: dict[str, Any]) -> None:
    teacher = make_any_teacher(family, **changes)
    student, ids = student_of(teacher), draw_ids(2, 14)
    cache, parts = None, []
    for piece in ids.split([8, 1, 1, 4], dim=1):
        output = student(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    close(torch.cat(parts, dim=1), teacher(input_ids=ids).logits)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": ids[:, :10], "attention_mask": mask}
    assert torch.equal(student.generate(**prompt, **options), teacher.generate(**prompt, **options))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_conversion_comes_back_to_the_native_format_with_the_same_tensors(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    teacher = make_any_teacher(family, **changes)
    teacher.save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5
    ours = AutoConfig.from_pretrained(tmp_path / "ours")
    student = student_of(teacher)
    of_files = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
    given, made = ours.to_dict(), student.config.to_dict()
    assert {key for key in given | made if given.get(key) != made.get(key)} <= of_files
    report = convert(tmp_path / "ours", tmp_path / "back")
    assert report.target == f"transformers {family}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    before, after = teacher.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ids = draw_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_a_phi3_reads_its_text_again_where_longrope_changes() -> None:
    teacher = make_any_teacher("phi3", **VARIANTS["phi3"]["longrope"])
    student, ids = student_of(teacher), draw_ids(1, 10).clamp(min=1)  # 0 would be padding
    assert student.config.recompute_length == 16
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    made, expected = (
        model.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **options) for model in (student, teacher)
    )
    assert torch.equal(made.sequences, expected.sequences)
    close(torch.stack(made.logits), torch.stack(expected.logits))
    student.config.recompute_length = None
    other = student.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **options)
    assert (torch.stack(other.logits) - torch.stack(expected.logits)).abs().max() > 1e-3


def test_settings_of_blocks_keep_a_model_out_of_formats_that_lack_them() -> None:
    neutral = ZooHybridConfig(num_hidden_layers=2)
    changes = {
        "norm_type": "layer_norm",
        "bidirectional": True,
        "prefix_bidirectional": True,
        "norm_placement": "after",
        "qk_norm": "head",
        "use_parallel_residual": True,
        "attention_output_bias": True,
        "lm_head_bias": True,
        "learned_positions": True,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 3.0,
        "embedding_multiplier": 2.0,
        "recompute_length": 64,
        "position_types": ["none", "rope"],
        "mlp_types": ["plain", "plain"],
    }
    accepted = [form.name for form in FORMATS if form.zoo_class is ZooHybridForCausalLM and form.writes(neutral)]
    assert {"transformers llama", "transformers mistral", "transformers bamba", "cartesia llamba"} <= {*accepted}
    for name, value in changes.items():
        config = ZooHybridConfig(num_hidden_layers=2, **{name: value})  # pyright: ignore[reportArgumentType]
        writing = {form.name for form in FORMATS if form.zoo_class is ZooHybridForCausalLM and form.writes(config)}
        lacking = {"transformers llama", "transformers mistral", "transformers bamba", "cartesia llamba"}
        assert not writing & lacking, name
    left = {"attention_bias", "mlp_bias", "share_norm", "local_rope_parameters"}  # no setting alone, or a Llama's
    assert BLOCK_SETTINGS.keys() == (changes.keys() | left) - {"mlp_types"}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "`scale_attn_by_inverse_layer_idx` must be False",
        ),
        ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` must be False, got True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, r"`layer_types` must be \['full_attention'\]"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, r"`layer_types` must be \['full_attention'\]"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` must be None or False"),
    ],
)
def test_what_zoo_hybrid_cannot_express_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    form = TEACHERS[family]
    assert form.model_class is not None
    config: Any = make_any_teacher(family).config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        form.zoo_config(config)


def test_a_pythia_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Its head had another name, and its masks and frequencies were saved."""
    teacher = make_any_teacher("gpt_neox")
    teacher.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("embed_out.weight", None)
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight") if head is None else head
    for layer in range(4):
        prefix = f"gpt_neox.layers.{layer}.attention."
        extra = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.ones(()), "rotary_emb.inv_freq": torch.ones(2)}
        tensors |= {prefix + name: tensor for name, tensor in extra.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours", verify=False)
    ours = ZooHybridForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = draw_ids(2, 24)
    with torch.no_grad():
        close(ours(ids).logits, teacher(input_ids=ids).logits)
