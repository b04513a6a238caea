"""Teacher adapters against transformers' own modules, and the streaming of activations."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ssm_zoo.distill.attention_view import AttentionView
from ssm_zoo.distill.teacher import CAPTURES, Teacher

LENGTH = 11
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = [
    pytest.param({}, id="one key head per query head"),
    pytest.param({"num_key_value_heads": 2}, id="grouped"),
    pytest.param({"num_key_value_heads": 1}, id="one key head"),
    pytest.param({"num_key_value_heads": 2, "attention_bias": True}, id="grouped with bias"),
    pytest.param({"num_key_value_heads": 2, "head_dim": 6}, id="head_dim is not D over H"),
    pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, id="linear rope"),
    pytest.param({"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}, id="llama3 rope"),
    pytest.param({"rope_parameters": YARN_ROPE}, id="yarn rope scales cos and sin"),
]


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of three layers whose every parameter, biases and norms included, is random and of working size."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": 40, "max_position_embeddings": 64, **sizes, **changes})
    return filled(LlamaForCausalLM(config))


def filled(model: Any) -> Any:
    """Give every parameter random values of working size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def token_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


def attention_records(model: LlamaForCausalLM, **inputs: Tensor) -> list[dict[str, Tensor]]:
    """What every attention module of a forward read, weighted by, fed to its output projection, and gave."""
    model.set_attn_implementation("eager")
    records: list[dict[str, Tensor]] = []
    handles = []
    for block in model.model.layers:

        def heads_hook(_, args):
            records.append({"heads": args[0]})

        def module_hook(_, args, kwargs, output):
            records[-1] |= {"hidden": kwargs["hidden_states"], "output": output[0], "matrix": output[1]}

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(heads_hook))
        handles.append(block.self_attn.register_forward_hook(module_hook, with_kwargs=True))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return records


def assert_rebuilt(model, records, rows=None, **options):
    """The view gives what the modules gave, in the rows (B, L) that count."""
    adapter = Teacher(model)
    assert adapter.num_layers == len(records) == 3
    for layer, record in enumerate(records):
        hidden = record["hidden"]
        rows = torch.ones(hidden.shape[:2], dtype=torch.bool) if rows is None else rows
        matrix = adapter.attention_matrix(layer, hidden, **options)
        heads = adapter.attention(layer).head_outputs(hidden, **options)
        output = adapter.attention(layer).attention_output(hidden, **options)
        assert heads.shape == (*hidden.shape[:2], 4, adapter.zoo_config.head_dim)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(matrix.transpose(1, 2)[rows], record["matrix"].transpose(1, 2)[rows], **close)
        torch.testing.assert_close(heads.flatten(2)[rows], record["heads"][rows], **close)
        torch.testing.assert_close(output[rows], record["output"][rows], **close)


@pytest.mark.parametrize("changes", FAMILIES)
def test_attention_is_rebuilt_from_the_view(changes):
    model = tiny_llama(**changes)
    assert_rebuilt(model, attention_records(model, input_ids=token_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_qwen2_is_rebuilt_from_the_view(dtype):
    """Its output projection has no bias, and its configuration no width of a head."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, vocab_size=40, num_key_value_heads=2, max_position_embeddings=64)
    model = filled(Qwen2ForCausalLM(config)).to(dtype)
    view = Teacher(model).attention(1)
    assert view.o_bias is None and view.q_bias.abs().max() > 0 and view.q_bias.dtype == dtype
    if dtype == torch.float32:
        assert_rebuilt(model, attention_records(model, input_ids=token_ids()))


def test_a_qwen2_with_a_sliding_window_is_refused():
    config = Qwen2Config(
        hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=40
    )
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.sliding_window = 4
    with pytest.raises(ValueError, match=r"`layer_types` must be \['full_attention'\], got .*sliding_attention"):
        Teacher(Qwen2ForCausalLM(config))


def test_heads_of_the_test_model_differ():
    matrix = attention_records(tiny_llama(num_key_value_heads=2), input_ids=token_ids())[0]["matrix"]
    for head in range(1, 4):
        assert (matrix[:, head] - matrix[:, 0]).abs().max() > 1e-2


def test_attention_is_rebuilt_at_given_positions():
    model = tiny_llama(num_key_value_heads=2)
    positions = torch.tensor([[0, 1, 2, 5, 6, 9, 14, 15, 20, 21, 30]])
    records = attention_records(model, input_ids=token_ids(1), position_ids=positions, attention_mask=torch.ones(1, 11))
    assert_rebuilt(model, records, position_ids=positions)
    without = Teacher(model).attention_matrix(0, records[0]["hidden"])
    assert (without - records[0]["matrix"]).abs().max() > 1e-3


@pytest.mark.parametrize("left", [True, False], ids=["left padding", "right padding"])
def test_attention_is_rebuilt_with_padding(left):
    model = tiny_llama(num_key_value_heads=2)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(0, 4) if left else slice(7, None)] = 0
    records = attention_records(model, input_ids=token_ids(), attention_mask=mask)
    assert_rebuilt(model, records, rows=mask.bool(), mask=mask)


def test_attention_is_rebuilt_for_packed_documents():
    model = tiny_llama(num_key_value_heads=2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    document = torch.tensor([[0] * 4 + [1] * 7])
    records = attention_records(model, input_ids=token_ids(1), position_ids=positions)
    assert_rebuilt(model, records, position_ids=positions, mask=document[:, :, None] == document[:, None, :])
    assert records[0]["matrix"][:, :, 4:, :4].abs().max() == 0


def test_rows_that_may_look_nowhere_are_zero():
    view = Teacher(tiny_llama()).attention(0)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    matrix = view.attention_matrix(hidden, mask=mask)
    assert matrix[0, :, :2].abs().max() == 0
    assert view.head_outputs(hidden, mask=mask)[0, :2].abs().max() == 0
    torch.testing.assert_close(matrix[0, :, 2:].sum(-1), torch.ones(4, 3))


def test_attention_matrix_is_float32_for_bfloat16_teachers():
    model = tiny_llama(num_key_value_heads=2)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    exact = Teacher(model).attention_matrix(1, hidden)
    rounded = Teacher(model.bfloat16()).attention_matrix(1, hidden.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.sum(-1), torch.ones(2, 4, 5))
    assert (rounded - exact).abs().max() < 0.05


def test_queries_keys_and_values_give_the_heads():
    view = Teacher(tiny_llama(num_key_value_heads=2, attention_bias=True)).attention(1)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    queries, keys = view.queries_keys(hidden)
    scores = (torch.einsum("bihp,bjhp->bhij", queries, keys) * view.scaling).double()
    weights = scores.exp() * torch.ones(5, 5).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhp->bihp", weights, view.values(hidden).double())
    torch.testing.assert_close(view.head_outputs(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_expand_heads_repeats_heads_and_not_rows():
    view = Teacher(tiny_llama(num_key_value_heads=2, head_dim=4)).attention(0)
    assert view.expand_heads(torch.arange(8)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    expanded = view.expand_heads(view.k)
    assert expanded.shape == (16, 32)
    for head in range(4):
        group = head // 2
        torch.testing.assert_close(expanded[4 * head : 4 * head + 4], view.k[4 * group : 4 * group + 4])
    assert expanded.data_ptr() != view.k.data_ptr()


def test_view_shares_the_teachers_weights_without_gradients():
    model = tiny_llama(attention_bias=True)
    module = model.model.layers[2].self_attn
    view = Teacher(model).attention(2)
    for name in "qkvo":
        projection = getattr(module, f"{name}_proj")
        assert getattr(view, name).data_ptr() == projection.weight.data_ptr()
        assert getattr(view, f"{name}_bias").data_ptr() == projection.bias.data_ptr()
        assert not getattr(view, name).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"num_key_value_heads": 3}, r"num_key_value_heads must divide num_heads \(4\), got 3", id="groups"
        ),
        pytest.param({"k": torch.zeros(5, 32)}, r"k must be of shape \(32, 32\), got \(5, 32\)", id="weight"),
        pytest.param({"o_bias": torch.zeros(5)}, r"o_bias must be of shape \(32,\), got \(5,\)", id="bias"),
    ],
)
def test_view_refuses_weights_that_do_not_fit(change, message):
    view = Teacher(tiny_llama()).attention(0)
    with pytest.raises(ValueError, match=message):
        AttentionView(**{**vars(view), **change})


def test_unknown_families_layers_and_masks_are_refused():
    bloom = BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(ValueError, match=r"teacher must be a model of type .*llama.*, got 'bloom'"):
        Teacher(bloom)
    model = tiny_llama()
    with pytest.raises(ValueError, match="teacher must be a LlamaForCausalLM, got a LlamaModel"):
        Teacher(model.model)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer must be from 0 to 2, got {layer}"):
            Teacher(model).attention(layer)
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 5\) or \(2, 5, 5\), got \(3, 5\)"):
        Teacher(model).attention_matrix(0, torch.zeros(2, 5, 32), mask=torch.ones(3, 5))


def test_capture_hands_over_what_the_layers_computed():
    model, ids = tiny_llama(num_key_value_heads=2), token_ids()
    records = attention_records(model, input_ids=ids)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last of transformers' hidden states is behind the final norm.
        final_norm = model.model.norm
    seen: dict[int, dict[str, Tensor]] = {}
    result = Teacher(model).capture(
        ids, [2, 0, 1], CAPTURES, on_layer=lambda layer, **tensors: seen.update({layer: tensors})
    )
    assert result is None
    assert list(seen) == [0, 1, 2]
    for layer, tensors in seen.items():
        assert set(tensors) == set(CAPTURES)
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors.values())
        torch.testing.assert_close(tensors["block_input"], states[layer])
        torch.testing.assert_close(tensors["normed_input"], records[layer]["hidden"])
        torch.testing.assert_close(tensors["attention_output"], records[layer]["output"])
        output = tensors["block_output"] if layer < 2 else final_norm(tensors["block_output"])
        torch.testing.assert_close(output, states[layer + 1])


@pytest.mark.parametrize("name", CAPTURES)
def test_capture_hands_over_one_kind(name):
    seen: list[tuple[int, list[str]]] = []
    Teacher(tiny_llama()).capture(
        token_ids(),
        [1],
        [name],
        on_layer=lambda layer, **tensors: seen.append((layer, list(tensors))),
    )
    assert seen == [(1, [name])]


def run_counter(model: LlamaForCausalLM) -> list[str]:
    """Names of the modules that run from now on, in order of completion."""
    names: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.append(name))
    return names


def test_capture_stops_after_the_last_chosen_layer():
    model = tiny_llama()
    ran = run_counter(model)
    Teacher(model).capture(token_ids(), [0, 1], ["attention_output"], on_layer=lambda *_, **__: None)
    assert "model.layers.0" in ran
    assert "model.layers.1.self_attn" in ran
    for name in ("model.layers.1.mlp", "model.layers.2.input_layernorm", "model.norm", "lm_head"):
        assert name not in ran


def test_capture_can_go_on_to_the_logits():
    model, ids = tiny_llama(), token_ids()
    seen: list[int] = []
    output = Teacher(model).capture(
        ids, [0], ["normed_input"], on_layer=lambda layer, **_: seen.append(layer), stop_after_last=False
    )
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(input_ids=ids).logits)
    assert seen == [0]
    assert not output.logits.requires_grad


def test_capture_passes_mask_and_positions_on():
    model, ids = tiny_llama(), token_ids(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    seen: list[Tensor] = []
    options: dict[str, Any] = {"on_layer": lambda _, block_output: seen.append(block_output)}
    Teacher(model).capture(ids, [1], ["block_output"], position_ids=positions, **options)
    Teacher(model).capture(ids[:, 4:], [1], ["block_output"], **options)
    torch.testing.assert_close(seen[0][:, 4:], seen[1], rtol=1e-5, atol=1e-5)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :4] = 0
    Teacher(model).capture(ids, [1], ["block_output"], attention_mask=mask, **options)
    torch.testing.assert_close(seen[2][:, 4:], seen[1], rtol=1e-5, atol=1e-5)


def test_capture_keeps_nothing_after_the_callback():
    model = tiny_llama()
    earlier: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def on_layer(layer: int, **tensors: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in earlier))
        # A block's output is the next one's input, so it may live until the next callback, but no longer.
        earlier.extend(weakref.ref(tensors[name]) for name in ("normed_input", "attention_output"))

    Teacher(model).capture(token_ids(), [0, 1, 2], ["normed_input", "attention_output"], on_layer=on_layer)
    assert alive == [0, 0, 0]
    assert [reference() for reference in earlier] == [None] * 6


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "caller in inference mode"])
def test_a_student_can_be_trained_inside_the_callback(inference):
    model = tiny_llama().requires_grad_(False)
    student = torch.nn.Linear(32, 32)
    losses: list[Tensor] = []

    def on_layer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        loss = (student(normed_input) - attention_output).square().mean()
        loss.backward()
        losses.append(loss)

    with torch.inference_mode(inference):
        Teacher(model).capture(token_ids(), [0, 2], ["normed_input", "attention_output"], on_layer=on_layer)
    assert len(losses) == 2
    assert student.weight.grad is not None
    assert student.weight.grad.abs().max() > 0


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_capture_removes_its_hooks():
    model = tiny_llama()
    before = hook_count(model)
    during: list[int] = []

    def fail(layer: int, **_: Tensor) -> None:
        during.append(hook_count(model))
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        Teacher(model).capture(token_ids(), [0, 2], CAPTURES, on_layer=fail)
    assert during == [before + 8]
    assert hook_count(model) == before
    Teacher(model).capture(token_ids(), [0, 2], CAPTURES, on_layer=lambda *_, **__: None)
    assert hook_count(model) == before
    with torch.no_grad():
        assert model(input_ids=token_ids()).logits.shape == (2, LENGTH, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"layers": []}, r"layers must name at least one .*, got \[\]", id="no layer"),
        pytest.param({"layers": [1, 1]}, r"layers must name .* each once, got \[1, 1\]", id="layer twice"),
        pytest.param({"layers": [0, 3]}, r"layer must be from 0 to 2, got 3", id="layer out of range"),
        pytest.param({"what": []}, r"what must name at least one of .*normed_input.*, got \[\]", id="nothing"),
        pytest.param({"what": ["logits"]}, r"what must name .*block_output.*, got \['logits'\]", id="unknown"),
        pytest.param({"what": "normed_input"}, r"what must name .*, got 'normed_input'", id="text for a list"),
        pytest.param(
            {"input_ids": torch.zeros(5).long()}, r"input_ids must be .*, got torch.int64 of shape \(5,\)", id="one row"
        ),
        pytest.param(
            {"input_ids": torch.zeros(1, 5)}, r"input_ids must be .*, got torch.float32 of shape", id="floats"
        ),
    ],
)
def test_capture_refuses_bad_input_before_running(change, message):
    model = tiny_llama()
    ran = run_counter(model)
    arguments: dict[str, Any] = {"input_ids": token_ids(), "layers": [0], "what": ["normed_input"], **change}
    with pytest.raises(ValueError, match=message):
        Teacher(model).capture(on_layer=lambda *_, **__: None, **arguments)
    assert ran == []


def test_capture_refuses_a_teacher_in_training_mode():
    model = tiny_llama().train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        Teacher(model).capture(token_ids(), [0], ["normed_input"], on_layer=lambda *_, **__: None)
