"""The threshold by which Taipan's gate selects as many tokens as its capacity says, and what attention is worth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_ids
from selective_models import block_of, make_model, sequence_of, states
from torch import Tensor

from ssm_zoo.modeling import TaipanForCausalLM
from ssm_zoo.modeling.selective_attention import without_attention
from ssm_zoo.training.heldout import heldout_loss


@pytest.mark.parametrize("padded", [False, True])
def test_a_pass_asks_for_a_correction_and_the_next_one_makes_it(padded: bool) -> None:
    mixer = block_of(attention_capacity=0.25).mixer
    margin, real = states(2, 10, seed=4), None
    mixer.threshold.fill_(0.1)
    known = margin.flatten()
    if padded:
        real = torch.arange(10) < torch.tensor([[10], [3]])
        known = margin[real]
        margin = torch.where(real, margin, 70.0)  # what stands at padding has no say
    for _ in range(2):  # gradient checkpointing repeats a pass
        above = mixer.over_threshold(margin, real)
        torch.testing.assert_close(above, margin - 0.1, rtol=0, atol=1e-6)
    # A twentieth of the tokens, rounded up to one, is beyond the next margin above the threshold or the next below.
    nearest = min((known[known > 0.1] - 0.1).min(), (0.1 - known[known <= 0.1]).min())
    expected = 0.05 * ((known > 0.1).double().mean() - 0.25) * nearest / 0.05
    assert mixer.correction.item() == pytest.approx(expected.item(), rel=1e-5) and mixer.threshold.item() < 0.11
    mixer.eval()
    torch.testing.assert_close(mixer.over_threshold(margin, real), margin - 0.1 - expected, rtol=0, atol=1e-6)
    mixer.train().begin_pass(sequence_of(1))
    assert mixer.threshold.item() == pytest.approx(0.1 + expected.item()) and mixer.correction == 0


def test_the_length_of_a_step_is_an_average_over_earlier_batches() -> None:
    """The batch that has too many tokens has no say in how far its surplus moves the threshold."""
    mixer = block_of(attention_capacity=0.25).mixer
    lengths: list[float] = []
    for seed in range(4):
        margin = states(2, 10, seed=seed) * (seed + 1)
        threshold = mixer.threshold.item()
        above = margin > threshold
        nearest = min((margin[above] - threshold).min().item(), (threshold - margin[~above]).min().item())
        mixer.over_threshold(margin, None)
        average = nearest / 0.05
        for i, length in enumerate(lengths):
            average = length if i == 0 else 0.9 * average + 0.1 * length
        assert mixer.correction.item() == pytest.approx(
            0.05 * (above.double().mean().item() - 0.25) * average, rel=1e-5
        )
        mixer.begin_pass(sequence_of(1))
        assert mixer.threshold.item() == pytest.approx(
            threshold + 0.05 * (above.double().mean().item() - 0.25) * average
        )
        lengths.append(nearest / 0.05)
    before = mixer.stride.clone()
    mixer.over_threshold(states(2, 10, seed=4), torch.zeros(2, 10, dtype=torch.bool))  # padding only
    mixer.begin_pass(sequence_of(1))
    assert mixer.correction == 0 and mixer.stride[1] == before[1]


def test_the_threshold_has_the_derivative_of_a_soft_choice() -> None:
    mixer = block_of(attention_capacity=0.4, gumbel_tau=0.6).mixer
    mixer.threshold.zero_()
    margin = states(1, 9, seed=4).requires_grad_()

    def solved(values: Tensor) -> float:
        low, high = -20.0, 20.0
        wanted = (margin.detach() / 0.6).sigmoid().sum()
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if ((values - middle) / 0.6).sigmoid().sum() > wanted else (low, middle)
        return low

    (found,) = torch.autograd.grad(mixer.over_threshold(margin, None)[0, 0], margin)
    for i in range(9):
        step = torch.zeros(1, 9, dtype=torch.float64)
        step[0, i] = 1e-5
        slope = (solved(margin.detach() + step) - solved(margin.detach() - step)) / 2e-5
        assert found[0, i].item() == pytest.approx((i == 0) - slope, abs=1e-7)


def test_without_a_real_token_the_threshold_stays() -> None:
    for batch, length in ((0, 5), (2, 5)):
        model = make_model("taipan").train()
        mixer = model.backbone.layers[2].mixer
        mixer.threshold.fill_(0.2)
        ids = draw_ids(batch, length)
        for _ in range(2):
            output = model(ids, attention_mask=torch.zeros_like(ids))
        assert output.selection_rate.item() == 0 and mixer.threshold.item() == pytest.approx(0.2)


def test_the_threshold_does_not_jump_over_margins_that_lie_close_together() -> None:
    """Those of 0.4 of the tokens in every other batch, 0.2 in the others, are within 0.003 of 1."""
    mixer = block_of(attention_capacity=0.25).mixer.train()
    mixer.threshold.fill_(0.9)
    generator = torch.Generator().manual_seed(0)
    rates = []
    for step in range(600):
        mixer.begin_pass(sequence_of(1))
        near = 1 + 0.001 * torch.randn(1, 400 - 200 * (step % 2), generator=generator)
        margin = torch.cat([near, torch.randn(1, 600, generator=generator) - 6], dim=1)
        rates.append((mixer.over_threshold(margin, None) > 0).float().mean().item())
    assert rates[0] == pytest.approx(0.4) and all(0.15 < rate < 0.37 for rate in rates[300:])
    assert sum(rates[300:]) / 300 == pytest.approx(0.25, abs=0.02)


def test_a_threshold_beyond_all_margins_comes_back() -> None:
    for start, share in ((50.0, 0.3), (-50.0, 0.3), (50.0, 1.0)):
        mixer = block_of(attention_capacity=share).mixer.train()
        mixer.threshold.fill_(start)
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            mixer.begin_pass(sequence_of(1))
            above = mixer.over_threshold(torch.randn(2, 100, generator=generator), None) > 0
        assert above.float().mean().item() == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("name", ["taipan", "taipan-options", "selective-mamba2"])
def test_the_rate_becomes_the_capacity_in_training_and_in_evaluation(name: str) -> None:
    model, ids = make_model(name, attention_capacity=0.5), draw_ids(8, 32)
    assert ((model(ids).selection_rate - 0.5).abs() > 0.05).any()
    model.train()
    for _ in range(150):
        rates = model(ids).selection_rate
    torch.testing.assert_close(rates, torch.full_like(rates, 0.5), rtol=0, atol=0.02)
    model.eval()
    output = model(ids)
    torch.testing.assert_close(output.selection_rate, rates, rtol=0, atol=0.04)
    for scores, rate in zip(output.router_logits, output.selection_rate, strict=True):
        assert (scores[..., 1] > scores[..., 0]).float().mean() == rate


def test_the_share_falls_in_the_warm_up_and_there_is_no_capacity_loss() -> None:
    model, ids = make_model("taipan", attention_capacity=0.25, sal_warmup_steps=4).train(), draw_ids(1, 16)
    mixer = model.backbone.layers[2].mixer
    for share in (1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25):
        output = model(ids)
        assert float(mixer.share()) == share
        assert output.aux_loss is None
    assert model.eval().backbone.layers[2].mixer.share() == 0.25


def test_a_frozen_gate_keeps_its_threshold() -> None:
    """Adapters are saved without the threshold, so training them may not move it."""
    model, ids = make_model("taipan"), draw_ids(2, 16)
    mixer = model.backbone.layers[2].mixer
    mixer.threshold.fill_(0.1)
    mixer.gate.requires_grad_(False)
    expected = model(ids).selection_rate
    model.train()
    for _ in range(2):
        assert torch.equal(model(ids).selection_rate, expected)
    assert mixer.threshold.item() == pytest.approx(0.1) and mixer.passes == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_checkpointing_repeats_a_pass_with_its_own_threshold_after_a_later_pass(dense: bool, reentrant: bool) -> None:
    """As a loss of pairs has it, whose two sides are two passes before one backward pass."""
    found = []
    for checkpointing in (False, True):
        model = make_model("taipan", attention_capacity=0.25, sal_dense_training=dense, sal_warmup_steps=9).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        sides = [draw_ids(4, 32, seed=seed) for seed in (1, 2)]
        for ids in (sides[0], sides[0]):
            model(ids)
        torch.stack([model(ids, labels=ids).loss for ids in sides]).sum().backward()
        mixer = model.backbone.layers[2].mixer
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {name: buffer.clone() for name, buffer in mixer.named_buffers()})
    assert found[0].keys() == found[1].keys() and found[0]["correction"] != 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_pass_without_gradients_leaves_the_threshold(way: str) -> None:
    """A model in training mode that generates text, or is measured, learns nothing from it."""
    model, ids = make_model("taipan", sal_warmup_steps=50).train(), draw_ids(2, 12)
    model(ids)
    mixer = model.backbone.layers[2].mixer
    before = {name: buffer.clone() for name, buffer in mixer.named_buffers()}
    assert before["correction"] != 0 and before["passes"] == 1
    for _ in range(2):
        if way == "generate":
            model.generate(ids, max_new_tokens=5, do_sample=False)
        else:
            with torch.no_grad():
                rate = model(ids).selection_rate
            assert torch.equal(rate, model.eval()(ids).selection_rate)
            model.train()
    for name, buffer in before.items():
        assert torch.equal(mixer.get_buffer(name), buffer), name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("passes", [0, 2])
def test_a_token_that_is_not_finite_does_not_reach_the_threshold(passes: int, value: float) -> None:
    """A step that a scaler of gradients skips must not leave a saved threshold that is no number."""
    mixer = block_of(attention_capacity=0.25).mixer
    for seed in range(passes):
        mixer.over_threshold(states(2, 10, seed=seed), None)
        mixer.begin_pass(sequence_of(1))
    before, margin = mixer.threshold.item(), states(2, 10, seed=4)
    damaged, real = margin.clone(), torch.ones(2, 10, dtype=torch.bool)
    damaged[0, 3], real[0, 3] = value, False
    mixer.over_threshold(margin, real)
    expected = {name: buffer.clone() for name, buffer in mixer.named_buffers()}
    above = mixer.over_threshold(damaged, None)
    for name, buffer in expected.items():
        assert torch.equal(mixer.get_buffer(name), buffer), name
    assert not above[0, 3].isfinite() and above.isfinite().sum() == 19
    mixer.begin_pass(sequence_of(1))
    assert mixer.threshold.isfinite() and mixer.threshold != before


@pytest.mark.parametrize("broken", ["gate", "threshold"])
@pytest.mark.parametrize("training", [False, True])
def test_a_gate_of_nan_is_not_a_closed_gate(training: bool, broken: str) -> None:
    """Otherwise such a model would compute finite logits, without its attention."""
    model, ids = make_model("taipan", sal_dense_training=False).train(training), draw_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mixer = model.backbone.layers[2].mixer
    with torch.no_grad():
        (mixer.gate.weight if broken == "gate" else mixer.threshold).fill_(float("nan"))
    output = model(ids, attention_mask=mask)
    assert output.logits[mask == 1].isnan().any(-1).all() and output.selection_rate.isnan().all()


def test_the_threshold_is_saved_and_stays_float32(tmp_path: Path) -> None:
    model = make_model("taipan", attention_capacity=0.25)
    ids = draw_ids(2, 16)
    model.train()(ids)
    model.save_pretrained(tmp_path)
    mixer = model.backbone.layers[2].mixer
    loaded = TaipanForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).backbone.layers[2].mixer
    for name in ("threshold", "correction", "stride", "passes"):
        assert torch.equal(getattr(loaded, name), getattr(mixer, name)), name
    assert mixer.correction != 0 and loaded.gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["taipan", "selective-mamba2"])
def test_without_attention_is_a_gate_that_never_opens(name: str) -> None:
    model, ids = make_model(name), draw_ids(2, 13)
    before = model(ids).logits
    with without_attention(model) as layers:
        closed = model(ids)
    assert closed.selection_rate.max() == 0 and torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for layer in layers:
            layer.gate.bias.copy_(torch.tensor([60.0, -60.0]))
    assert torch.equal(model(ids).logits, closed.logits) and not torch.equal(before, closed.logits)


@pytest.mark.parametrize("name", ["taipan", "mamba2"])
def test_the_held_out_loss_tells_what_attention_is_worth(name: str) -> None:
    class Rows(list[Tensor]):
        targets = 3 * 10

    def collate(rows: list[Tensor]) -> Any:
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids, "seq_idx": torch.zeros_like(ids)}

    model, rows = make_model(name).train(), Rows(draw_ids(3, 11))
    found = heldout_loss(model, rows, collate, 2)
    assert model.training
    ids = torch.stack(rows)
    model.eval()
    assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    with without_attention(model):
        expected = model(ids, labels=ids).loss.item()
    if name == "taipan":
        assert found["loss_without_attention"] == pytest.approx(expected, rel=1e-5)
        assert abs(expected - found["loss"]) > 1e-3 and found["selection_rate"][0] > 0
    else:
        assert "loss_without_attention" not in found
