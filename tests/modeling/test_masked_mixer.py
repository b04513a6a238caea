"""Masked mixers: what their equations say, against loops over positions in float64, in one direction and in both."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, draw_ids, perturb
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from ssm_zoo.kernels.position_mix import masked_mix, toeplitz_mix
from ssm_zoo.kernels.ssd import ssd_log_decay
from ssm_zoo.modeling import (
    MaskedMixerConfig,
    MaskedMixerForCausalLM,
    MaskedMixerForMaskedLM,
    MaskedMixerModel,
    ZooHybridConfig,
    ZooHybridForCausalLM,
    position_mixers,
)
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

N = 12
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-heads": {"num_heads": 4},
    "dense-kernel": {"num_heads": 2, "kernel_size": 4, "use_projections": False},
    "dense-expanded": {"expanded": True},
    "toeplitz": {"mixing": "toeplitz"},
    "toeplitz-kernel": {"mixing": "toeplitz", "num_heads": 2, "kernel_size": 3},
    "toeplitz-expanded": {"mixing": "toeplitz", "num_heads": 2, "expanded": True},
    "rows": {"mixing": "row_repeat", "num_heads": 2, "kernel_size": 2},
    "columns": {"mixing": "column_repeat", "use_decay": False},
    "columns-kernel": {"mixing": "column_repeat", "num_heads": 2, "kernel_size": 3},
    "mixed": {"mixing": "mixed_repeat", "num_heads": 4, "kernel_size": 2},
    "combined": {"mixing": "combined_repeat", "num_heads": 2},
    "combined-kernel": {"mixing": "combined_repeat", "kernel_size": 2, "mlp_first": False, "norm_type": "rms_norm"},
    "series": {"attention": "series", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "parallel": {"mixing": "mixed_repeat", "num_heads": 2, "attention": "parallel", "attention_bias": True},
}


def make(kind: type = MaskedMixerForCausalLM, **changes: Any) -> Any:
    """A tiny model in evaluation mode with weights of which none is trivial."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": N}
    torch.manual_seed(0)
    model = kind(MaskedMixerConfig(**(sizes | {"intermediate_size": 20, "initializer_range": 0.02} | changes)))
    perturb(model)
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


# The definition


def matrices(mixer: Any, config: MaskedMixerConfig, weight: Tensor) -> Tensor:
    """(k, H, N, N) matrices of a mixer, entry by entry."""
    taps, heads = config.kernel_size, config.num_heads
    if config.mixing == "dense":
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        return weight.masked_fill(hidden, 0).view(taps, heads, N, N)
    rows = [[torch.zeros((), dtype=weight.dtype)] * N for _ in range(N)]
    if config.mixing == "toeplitz":
        found = []
        for vector in weight:
            for i in range(N):
                rows[i] = [vector[i - j] if j <= i else vector.new_zeros(()) for j in range(N)]
            found.append(torch.stack([torch.stack(row) for row in rows]))
        return torch.stack(found).view(taps, heads, N, N)
    recurrences = len(weight) // taps
    decays = torch.ones(recurrences, dtype=weight.dtype)
    if config.use_decay:
        decays = mixer.decay_value.clamp(0.9, 1)
    kinds = {"row_repeat": "r" * heads, "column_repeat": "c" * heads, "combined_repeat": "c" * heads + "r" * heads}
    kinds["mixed_repeat"] = "c" * (heads // 2) + "r" * (heads // 2)
    found = []
    for index, vector in enumerate(weight):
        recurrence = index % recurrences
        for i in range(N):
            rows[i] = [
                vector[j if kinds[config.mixing][recurrence] == "r" else i] * decays[recurrence] ** (i - j)
                if j <= i
                else vector.new_zeros(())
                for j in range(N)
            ]
        found.append(torch.stack([torch.stack(row) for row in rows]))
    stacked = torch.stack(found).view(taps, recurrences, N, N)
    return stacked[:, :heads] + stacked[:, heads:] if config.mixing == "combined_repeat" else stacked


def mixed(mixer: Any, config: MaskedMixerConfig, x: Tensor) -> Tensor:
    """The mixer for (L, D) inputs."""
    x = mixer.in_proj(x) if config.use_projections else x
    if config.expanded:
        act = F.gelu if config.hidden_act == "gelu" else F.silu
        x = act(summed(mixer, config, x, mixer.inner_weight, mixer.inner_bias))
    y = summed(mixer, config, x, mixer.weight, mixer.bias)
    return mixer.out_proj(y) if config.use_projections else y


def summed(mixer: Any, config: MaskedMixerConfig, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One mixing for (L, D) inputs: channel by channel."""
    length, width = len(x), config.hidden_size // config.num_heads
    left = (config.kernel_size - 1) // 2 if config.mixing == "dense" else config.kernel_size - 1
    weights = matrices(mixer, config, weight)[..., :length, :length]
    columns = []
    for head in range(config.num_heads):
        for channel in range(width):
            column = bias[head, :length]
            for tap in range(config.kernel_size):
                source = channel + tap - left
                if 0 <= source < width:
                    column = column + weights[tap, head] @ x[:, head * width + source]
            columns.append(column)
    return torch.stack(columns, dim=1)


def attended(attention: Any, config: MaskedMixerConfig, x: Tensor) -> Tensor:
    """Softmax attention with rotary positions for (L, D) inputs."""
    length, dim = len(x), int(config.head_dim or 0)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies

    def turned(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    groups = config.num_attention_heads // int(config.num_key_value_heads or 1)
    outputs = []
    for head in range(config.num_attention_heads):
        mine, shared = slice(head * dim, (head + 1) * dim), slice(head // groups * dim, (head // groups + 1) * dim)
        q, k = turned(attention.q_proj(x)[:, mine]), turned(attention.k_proj(x)[:, shared])
        scores = q @ k.T / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        outputs.append(scores.softmax(-1) @ attention.v_proj(x)[:, shared])
    return attention.o_proj(torch.cat(outputs, dim=-1))


def norm_of(norm: Any, config: MaskedMixerConfig, x: Tensor) -> Tensor:
    if config.norm_type == "rms_norm":
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight + norm.bias


def channels(block: Any, config: MaskedMixerConfig, x: Tensor) -> Tensor:
    """The MLP of a block, norm included."""
    x, mlp = norm_of(block.channel_norm, config, x), block.mlp
    act = F.gelu if config.hidden_act == "gelu" else F.silu
    if config.mlp_type == "gated":
        return mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
    return mlp.down_proj(act(mlp.up_proj(x)))


def by_the_equations(model: Any, ids: Tensor) -> Tensor:
    """(L, V) logits of (L) tokens."""
    config = model.config
    x = model.backbone.embeddings.weight[ids]
    for block in model.backbone.layers:
        if config.mlp_first:
            x = x + channels(block, config, x)
        if config.attention == "series":
            x = x + attended(block.attention, config, norm_of(block.attention_norm, config, x))
        inputs = norm_of(block.token_norm, config, x)
        if config.attention == "parallel":
            x = x + attended(block.attention, config, inputs)
        x = x + mixed(block.mixer, config, inputs)
        if not config.mlp_first:
            x = x + channels(block, config, x)
    if config.final_norm:
        x = norm_of(model.backbone.norm_f, config, x)
    return model.lm_head(x)


@pytest.mark.parametrize("length", [1, 7, N])
def test_a_model_is_its_equations_in_value_and_every_gradient(kind: dict[str, Any], length: int) -> None:
    model, ids = make(**kind).double(), draw_ids(2, length)
    actual, expected = model(ids, use_cache=False).logits, torch.stack([by_the_equations(model, row) for row in ids])
    # Rotary tables are float32 whatever the model is.
    limits = {"rtol": 1e-5, "atol": 1e-5} if "attention" in kind else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(actual, expected, **limits)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((actual * weights).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, materialize_grads=True)
    for name, one, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, other, **limits, msg=lambda text, name=name: f"{name}: {text}")
        used = "decay_value" not in name and ".q_proj" not in name and ".k_proj" not in name
        assert one.any() or (length == 1 and not used), name


def test_float32_is_within_its_tolerance_of_the_equations(kind: dict[str, Any]) -> None:
    model, ids = make(**kind), draw_ids(1, N)
    with torch.no_grad():
        actual = model(ids).logits[0]
        expected = by_the_equations(model.double(), ids[0])
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def test_what_is_hidden_is_not_read_and_does_not_move() -> None:
    """The upper triangle: whatever stands there, nothing changes, and no optimiser touches it."""
    model, ids = make(num_heads=2, kernel_size=2).train(), draw_ids(3, N)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    expected = model(ids).logits
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.weight[:, hidden] = 1e4
    assert torch.equal(model(ids).logits, expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        for block in model.backbone.layers:
            gradient = block.mixer.weight.grad
            assert (gradient[:, hidden] == 0).all() and (gradient[:, ~hidden] != 0).any()
        optimizer.step()
    for block in model.backbone.layers:
        assert (block.mixer.weight[:, hidden] == 1e4).all()


def test_an_expanded_mixer_has_no_matrix() -> None:
    model, cache = make(expanded=True), DynamicCache(config=make().config)
    with pytest.raises(
        ValueError, match="output_attentions must be False for an expanded mixer, which is not a matrix, got True"
    ):
        model(draw_ids(1, 5), output_attentions=True, past_key_values=cache)
    assert int(cache.get_seq_length()) == 0 and cache.layers[0].history is None


def test_decays_outside_their_bounds_are_at_them() -> None:
    model, ids = make(mixing="row_repeat"), draw_ids(1, N)
    found = []
    with torch.no_grad():
        for value in (0.2, 0.9, 1.0, 3.0):
            for block in model.backbone.layers:
                block.mixer.decay_value.fill_(value)
            found.append(model(ids).logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[1], found[2])


def test_decays_are_slower_in_a_longer_context() -> None:
    mixer = make(mixing="row_repeat", max_position_embeddings=2048).backbone.layers[0].mixer
    with torch.no_grad():
        mixer.decay_value.fill_(0.95)
        torch.testing.assert_close(mixer.log_decay(torch.zeros(1, 3, 16)).exp(), torch.full((1, 3, 1), 0.95**0.25))


# One answer, however the tokens come (the eight ways for every family stand in test_eight_ways.py)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prefixes_decoding_and_padding_give_the_same_up_to_the_last_position(kind: dict[str, Any]) -> None:
    model, ids = make(**kind), draw_ids(2, N)
    whole = model(ids, use_cache=False).logits
    for length in range(1, N):
        close(model(ids[:, :length], use_cache=False).logits, whole[:, :length])
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    close(torch.cat(steps, dim=1), whole)
    for side in ("left", "right"):
        place = slice(3, None) if side == "left" else slice(None, N - 3)
        padded, mask = torch.full((2, N), 7), torch.zeros(2, N, dtype=torch.long)
        padded[0, place], mask[0, place] = ids[0, : N - 3], 1
        padded[1], mask[1] = ids[1], 1
        logits = model(padded, attention_mask=mask, use_cache=False).logits
        close(logits[0, place], whole[0, : N - 3])
        close(logits[1], whole[1])


def test_saved_and_loaded(kind: dict[str, Any], tmp_path: Any) -> None:
    model, ids = make(**kind), draw_ids(2, N)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@NEEDS_TRITON
def test_triton_gives_the_logits_and_every_gradient(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for wrap in (lambda op: op, with_triton):
        monkeypatch.setattr(position_mixers, "masked_mix", wrap(masked_mix))
        monkeypatch.setattr(position_mixers, "toeplitz_mix", wrap(toeplitz_mix))
        monkeypatch.setattr(position_mixers, "ssd_log_decay", wrap(ssd_log_decay))
        model, ids = make(**kind).train(), draw_ids(2, 11)
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    close(found[1][0], found[0][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_attention_in_series_is_half_a_block_of_the_hybrid_before_one_with_mixing() -> None:
    model, ids = make(**KINDS["series"]), draw_ids(2, N)
    hybrid = ZooHybridForCausalLM(
        ZooHybridConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=4,
            mixer_types=["full_attention", "masked_mixing"] * 2,
            mlp_types=["none", "gated"] * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            max_position_embeddings=N,
        )
    ).eval()
    states = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            half = 0 if parts[3].startswith("attention") else 1
            parts[2] = str(2 * int(parts[2]) + half)
            names = {"attention_norm": "input_layernorm", "attention": "mixer", "token_norm": "input_layernorm"}
            parts[3] = (names | {"channel_norm": "post_attention_layernorm"}).get(parts[3], parts[3])
        states[".".join(parts)] = value
    hybrid.load_state_dict(states)
    with torch.no_grad():
        close(hybrid(ids).logits, model(ids).logits)


# Both directions


def ahead(mixer: Any, config: MaskedMixerConfig, x: Tensor) -> Tensor:
    """The second stream's mixer for (L, D) inputs: position by position from the end."""
    length = len(x)
    y = mixer.bias[0, :length].flip(0)[:, None].expand(length, x.shape[1]).clone()
    for i in range(length):
        for j in range(i + config.lookahead, length):
            row, column = length - 1 - i, length - 1 - j
            entry = mixer.weight[0, row, column] if config.mixing == "dense" else mixer.weight[0, row - column]
            y[i] = y[i] + entry * x[j]
    return y


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("mixing", ["dense", "toeplitz"])
@pytest.mark.parametrize("length", [1, 2, 9, N])
def test_an_encoder_is_two_streams_that_meet_behind_the_last_block(mixing: str, lookahead: int, length: int) -> None:
    model = make(MaskedMixerModel, bidirectional=True, mixing=mixing, lookahead=lookahead).double()
    config, ids = model.config, draw_ids(1, length)
    x = y = model.embeddings.weight[ids[0]]
    for block in model.layers:
        if config.mlp_first:
            x, y = x + channels(block, config, x), y + channels(block, config, y)
        x = x + mixed(block.mixer, config, norm_of(block.token_norm, config, x))
        y = y + ahead(block.reverse, config, norm_of(block.reverse_norm, config, y))
        if not config.mlp_first:
            x, y = x + channels(block, config, x), y + channels(block, config, y)
    torch.testing.assert_close(model(ids).last_hidden_state[0], x + y)


def test_in_a_full_row_the_second_stream_is_an_upper_triangle_turned_around() -> None:
    """The authors' weights: rows are targets, the triangle starts at the second diagonal."""
    mixer = make(MaskedMixerModel, bidirectional=True, lookahead=2).layers[0].reverse
    weight, bias = torch.randn(N, N), torch.randn(N)
    x = torch.randn(1, N, 16)
    with torch.no_grad():
        mixer.weight.copy_(weight.flip(0, 1)[None])
        mixer.bias.copy_(bias.flip(0)[None])
        model = make(MaskedMixerModel, bidirectional=True)
        turned = mixer(x.flip(1), model.sequence_of(x))[0].flip(1)
    torch.testing.assert_close(turned[0], weight.triu(2) @ x[0] + bias[:, None], rtol=1e-4, atol=1e-5)


def test_with_lookahead_2_a_token_does_not_see_the_next_one_which_it_predicts() -> None:
    model, ids = make(MaskedMixerForMaskedLM, bidirectional=True, lookahead=2), draw_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        for t in range(9):
            changed = ids.clone()
            changed[:, t] = ids[:, t] % (VOCAB - 1) + 1
            differs = ((model(changed).logits - logits).abs() > 1e-7).any(-1)
            assert differs.sum() == 2 * (8 if t else 9) and (t == 0 or not differs[:, t - 1].any())
        loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_a_causal_checkpoint_loads_into_an_encoder_and_the_second_stream_is_new(tmp_path: Any) -> None:
    causal = make(num_heads=2)
    causal.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, found = AutoModelForMaskedLM.from_pretrained(tmp_path, bidirectional=True, output_loading_info=True)
    of_its_own = ["reverse_norm.weight", "reverse_norm.bias", "reverse.weight", "reverse.bias"]
    of_its_own += [f"reverse.{name}_proj.{part}" for name in ("in", "out") for part in ("weight", "bias")]
    assert set(found["missing_keys"]) == {f"backbone.layers.{i}.{key}" for i in range(2) for key in of_its_own}
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    for block in model.backbone.layers:
        weight = block.reverse.weight
        assert not weight.triu(0).any() and weight.tril(-1).abs().max() <= N**-0.5


def test_matrices_of_an_encoder_look_back_and_ahead() -> None:
    model, ids = make(MaskedMixerModel, bidirectional=True, num_heads=2, lookahead=2), draw_ids(2, 9)
    with torch.no_grad():
        matrix = model(ids, output_attentions=True).attentions[1]
    back, forth = matrix.chunk(2, dim=1)
    assert matrix.shape == (2, 4, 9, 9)
    assert ((back != 0) == torch.ones(9, 9).tril().bool()).all()
    assert ((forth != 0) == torch.ones(9, 9).triu(2).bool()).all()
    mixer = model.layers[1].reverse
    torch.testing.assert_close(forth[0].flip(1, 2), mixer.weight[:, :9, :9].tril(-2).detach())
