"""Inputs sought for hidden states: perfect where these hold everything, chance where they hold nothing."""

from typing import Any

import pytest
import torch
from families import VOCAB, draw_ids, make_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ssm_zoo.evaluation.hidden_states import block_output, blocks_of
from ssm_zoo.evaluation.inversion import Inversion, invert_representation

WIDTH = 64  # at least the vocabulary: then the pseudo-inverse reads every embedding rightly


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **(sizes | changes))
    return LlamaForCausalLM(config).eval()


def identity(name: str = "mamba2", scale: float = 0.0) -> Any:
    """A model of the zoo with embeddings of the size of the noise, whose blocks add nothing, or little."""
    model = make_model(name, hidden_size=WIDTH)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(15)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj.bias")):
                parameter.mul_(scale)
    return model


def forgetful() -> Any:
    """A model whose last block puts out the same whatever it is given."""
    model = llama()
    block: Any = model.model.layers[-1]
    block.forward = lambda hidden_states, *_, **__: 0 * hidden_states + 1
    return model


def brief(model: Any, ids: Tensor, **changes: Any) -> Inversion:
    return invert_representation(model, ids, **({"steps": 60, "learning_rate": 0.15} | changes))


# What is found


@pytest.mark.parametrize("reading", ["pinv", "cosine"])
def test_blocks_that_add_nothing_are_inverted_perfectly(reading: Any) -> None:
    ids = draw_ids(3, 9)
    found = brief(identity(), ids, reading=reading)
    assert (found.hamming, found.accuracy, found.readable) == (0, 1, 1)
    assert torch.equal(found.tokens[..., 0], ids)
    assert torch.equal(found.row_hamming, torch.zeros(3))
    assert found.trace.shape == (3, 61)
    assert torch.equal(found.trace[:, 0], found.initial) and torch.equal(found.trace[:, -1], found.objective)
    # Every coordinate ends within the last step, a tenth of the first one.
    assert (found.objective <= 9 * WIDTH * 0.15 * 0.12).all() and (found.objective < 0.02 * found.initial).all()


def test_a_block_that_forgets_everything_gives_chance() -> None:
    ids = draw_ids(12, 40)
    for k in (1, 5):
        found = brief(forgetful(), ids, steps=3, top_k=k)
        assert found.readable == 1
        assert found.chance == k / VOCAB
        # 480 tokens, four standard errors.
        assert abs(found.accuracy - found.chance) < 4 * (found.chance / 480) ** 0.5
        assert torch.equal(found.trace, torch.zeros(12, 4))
        assert found.tokens.shape == (12, 40, k)


def test_the_last_place_alone_tells_nothing_of_the_others_where_no_token_is_moved() -> None:
    found = brief(identity(), draw_ids(8, 12), positions="last")
    ids = draw_ids(8, 12)
    right = found.tokens[..., 0] == ids
    assert right[:, -1].all()
    assert right[:, :-1].double().mean() < 0.1


@pytest.mark.parametrize("name", ["mamba", "all-four", "taipan"])
def test_blocks_that_add_little_are_inverted(name: str) -> None:
    ids = draw_ids(2, 8)
    found = brief(identity(name, 0.1), ids, learning_rate=0.1, steps=40)
    assert (found.objective < 0.3 * found.initial).all()
    assert found.accuracy > 0.7


def test_a_model_with_position_embeddings_is_inverted() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, bos_token_id=None, eos_token_id=None)).eval()
    found = brief(model, draw_ids(2, 8), initial_std=None, steps=150, learning_rate=0.001)
    assert found.accuracy > 0.8
    weight = model.get_input_embeddings().weight
    start = found.initial / (2 * weight.square().mean().sqrt() * WIDTH * 8 / torch.pi**0.5)
    assert ((start > 0.5) & (start < 2)).all()


# Targets


def test_the_target_of_a_block_is_its_output_before_the_final_norm() -> None:
    model, ids = llama(), draw_ids(2, 6)
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
        last = block_output(model, 2, input_ids=ids)
        torch.testing.assert_close(block_output(model, 1, input_ids=ids), whole.hidden_states[1])
        torch.testing.assert_close(model.model.norm(last), whole.hidden_states[2])
    noise = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for target, number in ((-1, 2), (2, 2), (1, 1)):
            expected = (
                block_output(model, number, inputs_embeds=noise) - block_output(model, number, input_ids=ids)
            ).abs()
            found = brief(model, ids, steps=1, target=target)
            torch.testing.assert_close(found.initial, expected.sum((1, 2)))
        normed = model.model(inputs_embeds=noise).last_hidden_state - whole.hidden_states[2]
    torch.testing.assert_close(brief(model, ids, steps=1, target="head").initial, normed.abs().sum((1, 2)))


def test_the_objective_of_the_last_place_is_of_the_last_real_one() -> None:
    model, ids = llama(), draw_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    noise = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        differences = block_output(model, 2, inputs_embeds=noise, attention_mask=mask) - block_output(
            model, 2, input_ids=ids, attention_mask=mask
        )
    expected = torch.stack([differences[0, 5].abs().sum(), differences[1, 3].abs().sum()])
    torch.testing.assert_close(brief(model, ids, steps=1, attention_mask=mask, positions="last").initial, expected)


def test_a_list_within_a_block_is_no_list_of_blocks() -> None:
    model = llama()
    model.model.layers[0].heads = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert blocks_of(model) is model.model.layers
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="must have one list of 2 modules, its blocks, but LlamaForCausalLM has 2"):
        blocks_of(model)


# The descent


def test_the_steps_are_those_of_a_descent_written_out() -> None:
    model, ids = identity(), draw_ids(2, 5)
    wanted = model.get_input_embeddings()(ids).detach()
    states = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    trace = [(states - wanted).abs().sum((1, 2))]
    for step in range(4):
        states = states - (0.4 - (0.4 - 0.04) * step / 4) * (states - wanted).sign()
        trace.append((states - wanted).abs().sum((1, 2)))
    found = brief(model, ids, steps=4, learning_rate=0.4, seed=3)
    torch.testing.assert_close(found.trace, torch.stack(trace, 1), rtol=1e-5, atol=1e-4)


def test_every_text_takes_the_attempt_that_ends_closest() -> None:
    model, ids = llama(), draw_ids(4, 6)
    rates = [0.002, 0.05]
    both = brief(model, ids, steps=20, learning_rate=rates, restarts=3)
    # The third start cannot be asked for alone, so the attempts are compared by their objectives.
    one = [brief(model, ids, steps=20, learning_rate=rate) for rate in rates]
    assert (both.objective <= torch.stack([single.objective for single in one]).amin(0)).all()
    first = both.attempt < 2
    for row in range(4):
        if first[row]:
            single = one[int(both.attempt[row])]
            assert torch.equal(both.trace[row], single.trace[row])
            assert torch.equal(both.tokens[row], single.tokens[row])
    assert len(set(both.attempt.tolist())) > 1


def test_padding_is_neither_counted_nor_compared() -> None:
    model, ids = identity(), draw_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3], mask[1, 5:] = 0, 0
    found = brief(model, ids, attention_mask=mask)
    assert found.accuracy == 1 and torch.equal(found.row_hamming, torch.zeros(2))
    right = found.tokens[..., 0] == ids
    assert right[mask == 1].all() and not right[mask == 0].any()
    other = ids.clone()
    other[mask == 0] = (other[mask == 0] + 1) % VOCAB
    again = brief(model, other, attention_mask=mask)
    assert torch.equal(again.trace, found.trace) and torch.equal(again.tokens[mask == 1], found.tokens[mask == 1])


def test_two_runs_are_the_same_and_another_seed_is_not() -> None:
    model, ids = make_model("all-four"), draw_ids(2, 6)
    first, again, other = (brief(model, ids, steps=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.trace, again.trace) and torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.trace, other.trace)


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("mamba2").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanting = [parameter.requires_grad for parameter in model.parameters()]
    brief(model, draw_ids(1, 4), steps=2)
    assert model.training and all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanting
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Errors

IDS = draw_ids(2, 4)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        pytest.param(IDS[0], {}, r"`input_ids` must be int64 \(B, L\), got torch.int64 of shape \(4,\)", id="shape"),
        pytest.param(IDS.float(), {}, "`input_ids` must be int64 .*, got torch.float32 of shape", id="dtype"),
        pytest.param(IDS + VOCAB, {}, f"`input_ids` must be from 0 to {VOCAB - 1}, got ", id="vocabulary"),
        pytest.param(IDS, {"attention_mask": torch.ones(2, 3)}, r"must have shape \(2, 4\), got \(2, 3\)", id="mask"),
        pytest.param(
            IDS,
            {"attention_mask": torch.zeros(2, 4)},
            "`attention_mask` must .* got a text of padding only",
            id="padding",
        ),
        pytest.param(IDS, {"steps": 0}, "`steps` must be at least 1, got 0", id="steps"),
        pytest.param(IDS, {"restarts": 0}, "`restarts` must be at least 1, got 0", id="restarts"),
        pytest.param(IDS, {"top_k": VOCAB + 1}, f"`top_k` must be from 1 to {VOCAB}, got {VOCAB + 1}", id="top-k"),
        pytest.param(
            IDS, {"learning_rate": [0.1, 0]}, r"`learning_rate` must be a positive .*, got \[0.1, 0\]", id="rate"
        ),
        pytest.param(IDS, {"learning_rate": []}, r"`learning_rate` must be a positive .*, got \[\]", id="no-rate"),
        pytest.param(IDS, {"initial_std": 0.0}, "`initial_std` must be a positive number or None, got 0.0", id="std"),
        pytest.param(IDS, {"target": 3}, "`target` must be from 1 to 2, from -2 to -1, or 'head', got 3", id="target"),
        pytest.param(IDS, {"target": 0}, "`target` must be from 1 to 2, .* got 0", id="target-0"),
        pytest.param(
            IDS, {"target": "tail"}, "`target` must be the number of a block or 'head', got 'tail'", id="target-text"
        ),
        pytest.param(IDS, {"positions": "first"}, "`positions` must be 'all' or 'last', got 'first'", id="positions"),
        pytest.param(IDS, {"reading": "dot"}, "`reading` must be 'pinv' or 'cosine', got 'dot'", id="reading"),
        pytest.param(IDS, {"learning_rate": 1e38}, "`learning_rate` must be smaller, .* text 0 is not", id="diverges"),
    ],
)
def test_a_mistake_is_named(ids: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        brief(llama(), ids, **({"steps": 2} | changes))


def test_an_encoder_without_a_head_has_blocks_alone() -> None:
    model = llama().model
    assert brief(model, IDS, steps=2).trace.shape == (2, 3)
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        brief(model, IDS, steps=2, target="head")
