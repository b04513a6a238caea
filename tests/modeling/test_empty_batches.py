"""Batches without rows, rows without tokens, mixers without a model, and peft's prompt learning."""

import copy
import math
from typing import Any

import peft
import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_config, make_head, make_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.position_mix import masked_mix, masked_mix_step, toeplitz_mix, toeplitz_mix_step
from ssm_zoo.kernels.rms_norm import add_rms_norm, rms_norm
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_step
from ssm_zoo.kernels.ssd import ssd, ssd_log_decay, ssd_log_decay_step, ssd_matrix, ssd_step
from ssm_zoo.kernels.window_attention import window_attention, window_attention_matrix

ALL = [*FAMILIES, *ENCODERS]
NO_ROWS = torch.zeros(0, 5, dtype=torch.long)


@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "trained"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_rows_give_no_logits_a_loss_of_zero_and_gradients_of_zero(name: str, training: bool) -> None:
    model = make_model(name).train(training)
    output = model(NO_ROWS, labels=NO_ROWS, attention_mask=NO_ROWS)
    assert output.logits.shape == (0, 5, 61)
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_rows_are_continued_from_a_cache(name: str) -> None:
    model = make_model(name)
    with torch.no_grad():
        output = model(NO_ROWS, use_cache=True, output_attentions=True, output_hidden_states=True)
        cache = output.past_key_values
        assert max(layer.get_seq_length() for layer in cache.layers) == 5  # transformers' own say 0
        longer = torch.zeros(0, 8, dtype=torch.long)
        assert all(attention.shape[0] == 0 for attention in output.attentions if attention is not None)
        for _ in range(2):
            output = model(NO_ROWS[:, :1], past_key_values=output.past_key_values, use_cache=True)
            assert output.logits.shape == (0, 1, 61)
        output = model(longer[:, :1], past_key_values=cache, attention_mask=longer)
        assert output.logits.shape == (0, 1, 61)
        assert model(NO_ROWS[:, :3], past_key_values=cache).logits.shape == (0, 3, 61)
        assert model(NO_ROWS, seq_idx=NO_ROWS).logits.shape == (0, 5, 61)


@pytest.mark.parametrize("name", ALL)
def test_no_rows_in_the_other_heads(name: str) -> None:
    rows = make_head(AutoModelForSequenceClassification, name)(NO_ROWS, labels=NO_ROWS[:, 0])
    tokens = make_head(AutoModelForTokenClassification, name)(NO_ROWS, labels=NO_ROWS)
    assert (rows.logits.shape, tokens.logits.shape) == ((0, 2), (0, 5, 2))
    assert rows.loss.item() == tokens.loss.item() == 0.0
    (rows.loss + tokens.loss).backward()
    if name in ENCODERS:
        assert make_head(AutoModelForMaskedLM, name)(NO_ROWS, labels=NO_ROWS).loss.item() == 0.0


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("name", ALL)
def test_rows_without_tokens_are_refused(name: str, batch: int) -> None:
    nothing = torch.zeros(batch, 0, dtype=torch.long)
    message = rf"a row must hold at least one token, got \(B, L\) = \({batch}, 0\)"
    for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        with pytest.raises(ValueError, match=message):
            make_head(auto_class, name)(nothing)
    if name in FAMILIES:
        model = make_model(name)
        cache = model(draw_ids(max(batch, 1), 3)[:batch], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=message):
            model(nothing, past_key_values=cache)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


INDEX = torch.zeros(0, dtype=torch.long)
OPS: dict[str, Any] = {
    "causal_conv1d": lambda: causal_conv1d(zeros(0, 5, 6), zeros(6, 4), zeros(6), return_final_state=True),
    "causal_conv1d-packed": lambda: causal_conv1d(zeros(0, 5, 6), zeros(6, 4), seq_idx=NO_ROWS),
    "causal_conv1d_step": lambda: causal_conv1d_step(zeros(0, 6), torch.zeros(0, 6, 3), zeros(6, 4)),
    "selective_scan": lambda: selective_scan(
        zeros(0, 5, 6), zeros(0, 5, 6), zeros(6, 3), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3), return_final_state=True
    ),
    "selective_scan_step": lambda: selective_scan_step(
        torch.zeros(0, 6, 3), zeros(0, 6), zeros(0, 6), zeros(6, 3), zeros(0, 1, 3), zeros(0, 1, 3)
    ),
    "ssd": lambda: ssd(
        zeros(0, 5, 2, 4), zeros(0, 5, 2), zeros(2), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3), return_final_state=True
    ),
    "ssd-packed": lambda: ssd(
        zeros(0, 5, 2, 4), zeros(0, 5, 2), zeros(2), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3), seq_idx=NO_ROWS
    ),
    "ssd_log_decay": lambda: ssd_log_decay(zeros(0, 5, 2, 4), zeros(0, 5, 2), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3)),
    "ssd_log_decay with row sums": lambda: ssd_log_decay(
        *(zeros(0, 5, 2, 4), zeros(0, 5, 2), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3)),
        return_final_state=True,
        row_sums=True,
    ),
    "ssd_matrix": lambda: ssd_matrix(zeros(0, 5, 2), zeros(0, 5, 1, 3), zeros(0, 5, 1, 3)),
    "ssd_step": lambda: ssd_step(
        torch.zeros(0, 2, 4, 3), zeros(0, 2, 4), zeros(0, 2), zeros(2), zeros(0, 1, 3), zeros(0, 1, 3)
    ),
    "ssd_log_decay_step": lambda: ssd_log_decay_step(
        torch.zeros(0, 2, 4, 3), zeros(0, 2, 4), zeros(0, 2), zeros(0, 1, 3), zeros(0, 1, 3)
    ),
    "ssd_log_decay_step with row sums": lambda: ssd_log_decay_step(
        *(torch.zeros(0, 2, 5, 3), zeros(0, 2, 4), zeros(0, 2), zeros(0, 1, 3), zeros(0, 1, 3)), row_sums=True
    ),
    "mamba2_step": lambda: mamba2_step(
        zeros(0, 14), torch.zeros(0, 14, 3), torch.zeros(0, 2, 4, 3), zeros(0, 2), zeros(14, 4), zeros(14), zeros(2)
    ),
    "rms_norm": lambda: rms_norm(zeros(0, 5, 6), zeros(6), 1e-5, z=zeros(0, 5, 6)),
    "add_rms_norm": lambda: add_rms_norm(zeros(0, 5, 6), zeros(0, 5, 6), zeros(6), 1e-5),
    "masked_mix": lambda: masked_mix(zeros(0, 5, 2, 4), zeros(2, 7, 7), zeros(2, 7)),
    "masked_mix-packed": lambda: masked_mix(zeros(0, 5, 2, 4), zeros(2, 7, 7), seq_idx=NO_ROWS),
    "masked_mix_step": lambda: masked_mix_step(zeros(0, 5, 2, 4), zeros(2, 7, 7), zeros(2, 7), INDEX),
    "toeplitz_mix": lambda: toeplitz_mix(zeros(0, 5, 2, 4), zeros(2, 7), zeros(2, 7)),
    "toeplitz_mix_step": lambda: toeplitz_mix_step(zeros(0, 5, 2, 4), zeros(2, 7), zeros(2, 7), INDEX),
    "window_attention": lambda: window_attention(
        zeros(0, 2, 4), zeros(0, 5, 1, 4), zeros(0, 5, 1, 4), window=3, index=INDEX
    ),
    "window_attention_matrix": lambda: window_attention_matrix(
        zeros(0, 2, 4), zeros(0, 5, 1, 4), window=3, index=INDEX
    ),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_gives_no_rows_for_none(op: Any) -> None:
    results = op()
    for result in results if isinstance(results, tuple) else (results,):
        assert result.shape[0] == 0
        if result.requires_grad:
            result.sum().backward(retain_graph=True)


def test_the_parameters_of_an_op_on_no_rows_have_gradients_of_zero() -> None:
    A, D = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    maps = zeros(0, 5, 1, 3), zeros(0, 5, 1, 3)
    y, state = ssd(zeros(0, 5, 2, 4), zeros(0, 5, 2), A, *maps, D=D, return_final_state=True)
    assert (y.shape, state.shape) == ((0, 5, 2, 4), (0, 2, 4, 3))
    (y.sum() + state.sum()).backward()
    assert A.grad is not None
    assert not A.grad.any()
    assert D.grad is not None


def mixers_of(model: nn.Module) -> list[nn.Module]:
    return [module for key, module in model.named_modules() if key.rpartition(".")[2] in ("mixer", "reverse")]


@pytest.mark.parametrize("name", ALL)
def test_a_mixer_that_is_built_alone_has_the_initial_values_of_one_in_a_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory that holds NaN: what nobody sets shows."""
    config = make_config(name)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    torch.manual_seed(0)
    in_model = mixers_of(AutoModel.from_config(config))
    kind = type(make_head(AutoModel, name))
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(kind, "post_init", lambda self: None)
    alone = mixers_of(kind(config))
    assert in_model
    for built, right in zip(alone, in_model, strict=True):
        for (key, parameter), (_, expected) in zip(built.named_parameters(), right.named_parameters(), strict=True):
            assert parameter.isfinite().all(), key
            if key.endswith(("D", "z_bias", "decay_value")):
                assert torch.equal(parameter, expected), key
            elif key.endswith("A_log"):
                assert (parameter >= 0).all(), key
                assert (parameter <= math.log(16)).all(), key
            elif key.endswith(("dt_bias", "dt_proj.bias")) and hasattr(built, "A_log"):
                steps = nn.functional.softplus(parameter)
                assert (steps > 9e-5).all(), key
                assert (steps < 0.11).all(), key
            elif key == "weight":
                assert 0.5 < parameter.std() / expected.std() < 2, key


@pytest.mark.parametrize("name", ["mamba2", "all-four", "mixer"])
def test_building_a_mixer_leaves_the_generator_where_a_model_expects_it(name: str) -> None:
    """What a seed gives is not changed by values that a model draws again."""
    torch.manual_seed(0)
    kind = type(make_head(AutoModel, name))
    torch.manual_seed(0)
    first = kind(make_config(name)).state_dict()
    torch.manual_seed(0)
    second = kind(make_config(name)).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


PROMPTS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}
ATTENTION = ["full_attention", "full_attention"]


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_learned_prompts_have_gradients_and_generate(name: str, kind: str) -> None:
    ids = draw_ids(2, 6)
    model = peft.get_peft_model(make_model(name), PROMPTS[kind]())
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    learned = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert learned
    assert all(gradient is not None and gradient.any() for gradient in learned)
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert new.shape == (2, 9)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_of_keys_and_values_is_refused_without_attention_everywhere(name: str) -> None:
    ids = draw_ids(2, 6)
    model = peft.get_peft_model(make_model(name), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="peft's prefix tuning, needs full attention in every layer"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_prefix_trains_where_there_is_attention_everywhere() -> None:
    ids = draw_ids(2, 6)
    base = make_model("full-discrete", mixer_types=ATTENTION)
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
