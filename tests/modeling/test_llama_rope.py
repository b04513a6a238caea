"""Every rotary embedding that transformers' Llama takes, in a student of which no layer is converted."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from teachers import draw_ids, make_teacher
from transformers import LlamaConfig

from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import MaskedMixerConfig
from ssm_zoo.modeling.layers import llama_rope_parameters

SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "none-of-it": {"rope_type": "default", "partial_rotary_factor": 0.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": SHORT,
        "long_factor": LONG,
    },
    "longrope-open": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": SHORT,
        "long_factor": LONG,
    },
    "llama3": {"rope_type": "llama3"} | LLAMA3,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("length", [10, 40])
@pytest.mark.parametrize("mixer", ["discrete_mamba2", "masked_mixing"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_student_turns_as_llama_does(rope: dict[str, Any], mixer: str, length: int) -> None:
    """A student with masked mixing has fewer positions than its teacher: that must not change the scaling."""
    positions = 32 if rope["rope_type"] == "dynamic" and mixer != "masked_mixing" else 64
    teacher = make_teacher(max_position_embeddings=positions, rope_parameters={"rope_theta": 100.0} | rope)
    spec = StudentSpec(mixer=mixer, positions=48) if mixer == "masked_mixing" else StudentSpec(mixer=mixer)
    student = build_student(Teacher(teacher), spec, [])
    ids = draw_ids(2, length)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=1e-5)


def test_positions_beyond_those_of_a_dynamic_teacher_are_refused() -> None:
    teacher = make_teacher(max_position_embeddings=32, rope_parameters={"rope_theta": 100.0} | ROPES["dynamic"])
    with pytest.raises(ValueError, match=r"`student\.positions` must be at most 32, .* got 48"):
        build_student(Teacher(teacher), StudentSpec(mixer="masked_mixing", positions=48), [0])


def test_a_setting_that_changes_the_turn_is_kept() -> None:
    config = LlamaConfig(rope_parameters={"rope_theta": 100.0, "rope_type": "linear", "factor": 2.0})
    assert llama_rope_parameters(config) == config.rope_parameters
    config = LlamaConfig(rope_parameters={"rope_theta": 100.0} | ROPES["partial"])
    assert llama_rope_parameters(config) == {"rope_theta": 100.0, "rope_type": "default"}


def test_a_masked_mixer_turns_whole_heads_and_refuses_another_share() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"rope_parameters\['partial_rotary_factor'\] must be 1, .* got 0\.5"
    ):
        MaskedMixerConfig(attention="series", num_attention_heads=4, hidden_size=16, rope_parameters=rope)
