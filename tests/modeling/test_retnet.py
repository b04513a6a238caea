"""RetNet and retention: the published equations, three forms of one recurrence, and the normalisation of scores."""

import math
from typing import Any

import pytest
import retnet
import torch
from families import VOCAB, draw_ids, make_config, make_head, make_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from ssm_zoo.modeling import ZooRetNetConfig
from ssm_zoo.modeling.configuration_retnet import torchscale_rope_theta
from ssm_zoo.modeling.retention import Retention, decay_sums, log_decays
from ssm_zoo.modeling.rollback import restore, snapshot
from ssm_zoo.modeling.token_layout import Sequence, make_sequence

WIDTH, HEADS, P, V = 16, 4, 6, 9
OPTIONS: dict[str, dict[str, Any]] = {
    "torchscale": {},
    "fla": {"normalize_scores": False, "elementwise_affine": True, "num_key_value_heads": 2},
    "plain": {"use_output_gate": False, "num_key_value_heads": 1, "mlp_type": "plain", "embedding_multiplier": 3.0},
}
SEQ_IDX = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, -1], [0, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1, 2, 2]])
# Rows with different amounts of padding on the left, on the right and in between.
MASK = torch.ones(4, 13, dtype=torch.long)
MASK[0, :5] = MASK[1, :1] = MASK[2, 6:9] = MASK[2, 12] = 0


def mixer_of(options: str = "torchscale", **changes: Any) -> Retention:
    """A mixer in float64."""
    model = make_head(AutoModel, "retnet", **OPTIONS[options], **changes)
    return model.layers[1].mixer.double()


def sizes_of(mixer: Retention, **changes: Any) -> retnet.Sizes:
    angles = retnet.torchscale_angles(mixer.head_dim)
    settings = {"normalize": mixer.normalize_scores, "bidirectional": mixer.bidirectional, "angles": angles}
    return retnet.Sizes(mixer.num_heads, mixer.num_kv_heads, mixer.group_norm.eps, **settings | changes)


def weights_of(mixer: Retention) -> dict[str, Tensor]:
    return {name: part.weight for name in "qkvgo" if (part := getattr(mixer, f"{name}_proj")) is not None}


def expected(mixer: Retention, x: Tensor, first: int = 0) -> Tensor:
    """The (L, D) output for one document by the reference."""
    return retnet.retention(
        x, weights_of(mixer), sizes_of(mixer), norm=getattr(mixer.group_norm, "weight", None), first=first
    )


def layout(x: Tensor, cache: Any = None, **arguments: Tensor) -> Sequence:
    """The sequence of (B, L, D) inputs, with rotary tables in float64."""
    sequence = make_sequence(*x.shape[:2], x.device, past_key_values=cache, **arguments)
    turn = sequence.position_ids[..., None].double() * torch.cat([retnet.torchscale_angles(P)] * 2)
    sequence.rotary = turn.cos(), turn.sin()
    return sequence


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unnormed(mixer: Retention, run: Any) -> Tensor:
    """(B, L, H, V) outputs of the heads before their norm, which would hide a wrong scale, while `run` runs."""
    seen: list[Tensor] = []
    hook = mixer.group_norm.register_forward_hook(lambda _, inputs, outputs: seen.append(inputs[0]))
    run()
    hook.remove()
    return torch.cat(seen, dim=1)


def in_chunks(mixer: Retention, x: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    """The mixer's outputs, with a cache from one chunk to the next."""
    cache, parts, start = a_cache(), [], 0
    for length in lengths:
        columns = {} if mask is None else {"attention_mask": mask[:, : start + length]}
        part = x[:, start : start + length]
        parts.append(mixer(part, layout(part, cache, **columns), cache)[0])
        start += length
    assert start == x.shape[1]
    return torch.cat(parts, dim=1)


def a_cache() -> DynamicCache:
    """A cache for `mixer_of`'s mixer, which is the model's last: the first layer counts columns for `make_sequence`."""
    cache = DynamicCache(config=make_config("retnet"))
    cache.layers[0] = cache.layers[1]
    return cache


# The published equations


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 13, 64, 65, 131])
def test_the_mixer_is_the_published_equations(options: str, length: int) -> None:
    mixer, x = mixer_of(options), draw(2, length, WIDTH)
    with torch.no_grad():
        actual = mixer(x, layout(x))[0]
        for row in range(2):
            torch.testing.assert_close(actual[row], expected(mixer, x[row]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradients_are_those_of_the_published_equations(options: str) -> None:
    mixer, x, weight = mixer_of(options), draw(67, WIDTH), draw(67, WIDTH, seed=1)
    parameters = dict(mixer.named_parameters())
    found = []
    for run in (lambda x: mixer(x[None], layout(x[None]))[0][0], lambda x: expected(mixer, x)):
        inputs = x.clone().requires_grad_()
        loss = (run(inputs) * weight).sum()
        found.append(torch.autograd.grad(loss, [inputs, *parameters.values()]))
    for name, actual, wanted in zip(["x", *parameters], *found, strict=True):
        assert wanted.abs().max() > 1e-3, name
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()), msg=name)


def test_the_matrix_alone_can_be_trained() -> None:
    """Its gradients, those of the normalisation included, which is not without effect without the norm of the heads."""
    mixer, x = mixer_of(), (2 * draw(1, 5, WIDTH)).requires_grad_()
    assert (mixer.hidden_attention(x, layout(x)).sum(-1).abs() > 1 - 1e-9).any()
    assert torch.autograd.gradcheck(lambda x: mixer.hidden_attention(x, layout(x)), x)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_model_is_the_published_equations(options: str) -> None:
    model, ids = make_model("retnet", **OPTIONS[options]), draw_ids(2, 23)
    config = model.config
    sizes = sizes_of(model.backbone.layers[0].mixer, embed_scale=config.embedding_multiplier)
    with torch.no_grad():
        logits = model(ids).logits.double()
        for row in range(2):
            wanted = retnet.decoder(model.state_dict(), retnet.ZOO, ids[row], sizes)
            assert wanted.std() > 0.2
            torch.testing.assert_close(logits[row], wanted, rtol=0, atol=1e-5)


def test_the_rotary_embedding_has_torchscales_frequencies() -> None:
    for width in (2, 6, 128, 256):
        config = ZooRetNetConfig(hidden_size=2 * width)
        turns = AutoModel.from_config(ZooRetNetConfig(hidden_size=2 * width, num_hidden_layers=1)).rotary_emb.inv_freq
        assert config.head_dim == width
        torch.testing.assert_close(turns.double(), retnet.torchscale_angles(width), rtol=1e-6, atol=0)


# One recurrence


SPLITS = [pytest.param([1] * 13, id="recurrent"), pytest.param([5, 1, 7], id="chunkwise")]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [*SPLITS, pytest.param([64, 1, 66], id="long-chunks")])
def test_parallel_recurrent_and_chunkwise_agree_before_the_norm(options: str, lengths: list[int]) -> None:
    mixer, x = mixer_of(options), draw(2, sum(lengths), WIDTH)
    with torch.no_grad():
        whole = unnormed(mixer, lambda: mixer(x, layout(x)))
        parts = unnormed(mixer, lambda: in_chunks(mixer, x, lengths))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
        mixer.float()
        single = in_chunks(mixer, x.float(), lengths)
        torch.testing.assert_close(single, mixer(x.float(), layout(x))[0], rtol=0, atol=1e-5)


def test_scores_are_normalised_in_both_ways() -> None:
    """Rows are divided by the root of their decay sum, and some by the size of their sum: neither is trivial here."""
    mixer, plain = mixer_of(), mixer_of(normalize_scores=False)
    x = 3 * draw(1, 40, WIDTH)
    with torch.no_grad():
        matrix, raw = (each.hidden_attention(x, layout(x))[0] for each in (mixer, plain))
        scale = retnet.torchscale_scale(40, HEADS).T
        sums = raw.sum(-1) / scale.sqrt()
        assert (sums.abs() > 1.2).any() and (sums.abs() < 0.8).any()
        wanted = raw / (scale.sqrt() * sums.abs().clamp(min=1))[..., None]
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-12)
        assert matrix.sum(-1).abs().max() <= 1 + 1e-12


def test_sums_of_decays_are_torchscales_running_scale() -> None:
    log_decay = log_decays(HEADS, torch.zeros((), dtype=torch.float64))
    actual = decay_sums(log_decay, torch.arange(500)[None])[0]
    torch.testing.assert_close(actual, retnet.torchscale_scale(500, HEADS), rtol=1e-12, atol=0)
    far = decay_sums(log_decays(HEADS, torch.zeros(())), torch.tensor([[10**6]]))
    torch.testing.assert_close(far[0, 0], 2.0 ** torch.arange(5.0, 5 + HEADS))


def test_decays_of_many_heads_do_not_round_to_one() -> None:
    wanted = [math.log1p(-(2.0 ** (-5 - head))) for head in range(32)]
    torch.testing.assert_close(log_decays(32, torch.zeros(())), torch.tensor(wanted), rtol=1e-6, atol=0)
    assert log_decays(32, torch.zeros((), dtype=torch.bfloat16)).dtype == torch.float32


# The cached scale: padding, chunked prefill, beams


@pytest.mark.parametrize("lengths", [*SPLITS, pytest.param([13], id="whole"), pytest.param([3, 4, 1, 5], id="others")])
def test_padding_does_not_count(lengths: list[int]) -> None:
    """Rows with different padding, which also ends within a chunk, each as the row alone without padding."""
    mixer, x = mixer_of(), draw(4, 13, WIDTH)
    poisoned = x.masked_fill((MASK == 0)[..., None], math.nan)
    with torch.no_grad():
        heads = unnormed(mixer, lambda: in_chunks(mixer, poisoned, lengths, MASK))
        for row in range(4):
            real = MASK[row] == 1
            alone = x[row : row + 1, real]
            wanted = unnormed(mixer, lambda alone=alone: mixer(alone, layout(alone)))
            torch.testing.assert_close(heads[row, real], wanted[0], rtol=0, atol=1e-12)


def test_a_scale_that_counts_padding_would_be_noticed() -> None:
    """torchscale keeps one scale for the whole batch. The norm hides most of the error; the test above shows it."""
    mixer, x = mixer_of(), draw(4, 13, WIDTH)

    def last(wrong: bool) -> Tensor:
        cache = a_cache()
        mixer(x[:, :12], layout(x[:, :12], cache, attention_mask=MASK[:, :12]), cache)
        if wrong:
            cache.layers[1].counts.fill_(12)
        return unnormed(mixer, lambda: mixer(x[:, 12:], layout(x[:, 12:], cache, attention_mask=MASK), cache))

    with torch.no_grad():
        difference = (last(False) - last(True)).abs().flatten(1).amax(1)
    assert difference[0] > 1e-3 and difference[3] == 0


def test_beams_take_their_counts_along() -> None:
    mixer, x = mixer_of(), draw(4, 13, WIDTH)
    order = torch.tensor([2, 0, 0, 3])
    first, last = x[:, :12], x[order, 12:]
    with torch.no_grad():
        cache = a_cache()
        mixer(first, layout(first, cache, attention_mask=MASK[:, :12]), cache)
        assert cache.layers[1].counts.tolist() == MASK[:, :12].sum(1).tolist()
        saved = snapshot(cache)
        cache.layers[1].reorder_cache(order)
        mask = torch.cat([MASK[order, :12], torch.ones(4, 1, dtype=torch.long)], dim=1)
        heads = unnormed(mixer, lambda: mixer(last, layout(last, cache, attention_mask=mask), cache))
        for beam, row in enumerate(order.tolist()):
            alone = torch.cat([x[row, :12][MASK[row, :12] == 1], last[beam]])[None]
            wanted = unnormed(mixer, lambda alone=alone: mixer(alone, layout(alone)))
            torch.testing.assert_close(heads[beam, 0], wanted[0, -1], rtol=0, atol=1e-12)
        restore(cache, saved)
        assert cache.layers[1].counts.tolist() == MASK[:, :12].sum(1).tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_documents_are_documents_alone(options: str) -> None:
    mixer, x = mixer_of(options), draw(2, 13, WIDTH)
    weight = draw(2, 13, WIDTH, seed=1)
    packed = x.clone().requires_grad_()
    actual = mixer(packed, layout(x, seq_idx=SEQ_IDX))[0]
    real = SEQ_IDX >= 0
    (gradient,) = torch.autograd.grad((actual * weight)[real].sum(), packed)
    assert not gradient[~real].any()
    for row in range(2):
        for document in SEQ_IDX[row][real[row]].unique():
            columns = SEQ_IDX[row] == document
            alone = x[row, columns].clone().requires_grad_()
            wanted = expected(mixer, alone)
            torch.testing.assert_close(actual[row, columns], wanted, rtol=0, atol=1e-11)
            (own,) = torch.autograd.grad((wanted * weight[row, columns]).sum(), alone)
            torch.testing.assert_close(gradient[row, columns], own, rtol=0, atol=1e-9)


def test_gradients_flow_to_the_initial_state() -> None:
    """Of all parameters through a cache: those of the whole."""
    mixer, x, weight = mixer_of(), draw(2, 13, WIDTH), draw(2, 13, WIDTH, seed=1)
    found = []
    for run in (lambda: mixer(x, layout(x))[0], lambda: in_chunks(mixer, x, [5, 1, 7])):
        found.append(torch.autograd.grad((run() * weight).sum(), list(mixer.parameters())))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


def test_generation_with_padding_and_beams_is_generation_without() -> None:
    model = make_model("retnet")
    ids = draw_ids(3, 9)
    ids[0, :4] = ids[1, :1] = 0
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "num_beams": 3}
    together = model.generate(ids, attention_mask=(ids != 0).long(), **settings)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, ids[row] != 0], **settings)
        assert torch.equal(together[row, 9:], alone[0, -8:])


def test_an_empty_batch_and_a_single_token() -> None:
    mixer, cache = mixer_of(), a_cache()
    empty = draw(0, 5, WIDTH)
    assert mixer(empty, layout(empty), None)[0].shape == (0, 5, WIDTH)
    assert mixer(empty, layout(empty, cache), cache)[0].shape == (0, 5, WIDTH)
    x = draw(1, 1, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, layout(x))[0][0], expected(mixer, x[0]), rtol=0, atol=1e-12)


def test_the_cache_does_not_grow() -> None:
    model = make_model("retnet")
    with torch.no_grad():
        layers = [model(draw_ids(2, length), use_cache=True).past_key_values.layers for length in (3, 50)]
    for short, long in zip(*layers, strict=True):
        assert long.recurrent_state.shape == short.recurrent_state.shape == (2, HEADS, V + 1, P)
        assert long.counts.tolist() == [50, 50]


# Both directions


@pytest.mark.parametrize("options", OPTIONS)
def test_an_encoder_decays_by_distance(options: str) -> None:
    mixer, x = mixer_of(options, bidirectional=True), draw(2, 13, WIDTH)
    with torch.no_grad():
        actual, matrix = mixer(x, layout(x, seq_idx=SEQ_IDX), None, True)
        torch.testing.assert_close(mixer.hidden_attention(x, layout(x, seq_idx=SEQ_IDX)), matrix)
        assert matrix.shape == (2, HEADS, 13, 13)
        for row in range(2):
            for document in SEQ_IDX[row][SEQ_IDX[row] >= 0].unique():
                columns = SEQ_IDX[row] == document
                alone = x[row, columns]
                torch.testing.assert_close(actual[row, columns], expected(mixer, alone), rtol=0, atol=1e-11)
                projected = (alone @ part.weight.T for part in (mixer.q_proj, mixer.k_proj))
                wanted = retnet.retention_matrix(*projected, sizes_of(mixer))
                own = matrix[row][:, columns]
                torch.testing.assert_close(own[:, :, columns], wanted, rtol=0, atol=1e-12)
                assert not own[:, :, ~columns].any()


def test_a_causal_checkpoint_has_all_weights_of_an_encoder() -> None:
    causal, encoder = make_config("retnet"), make_config("retnet-encoder")
    states = [AutoModel.from_config(config).state_dict() for config in (causal, encoder)]
    assert states[0].keys() == states[1].keys()


# Configuration and initialisation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 5}, "head_dim must be even, for the rotary embedding, got 5"),
        ({"num_attention_heads": 3}, r"num_attention_heads must divide hidden_size \(512\)"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads"),
        ({"v_head_dim": 0}, "v_head_dim must be at least 1, got 0"),
        ({"mlp_type": "none"}, "mlp_type must be one of gated, plain, got 'none'"),
        ({"hidden_act": "swoosh"}, "hidden_act must be an activation of transformers, got 'swoosh'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
        ({"embedding_multiplier": 0}, "embedding_multiplier must be positive, got 0"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_parameters\['rope_type'\] must be 'default', got 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"rope_parameters\['partial_rotary_factor'\] must be 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ZooRetNetConfig(**changes)


def test_initial_weights_are_torchscales() -> None:
    torch.manual_seed(0)
    config = ZooRetNetConfig(vocab_size=VOCAB, hidden_size=128, intermediate_size=8, num_hidden_layers=1)
    mixer = AutoModelForCausalLM.from_config(config).backbone.layers[0].mixer
    for name in "qkvgo":
        weight = getattr(mixer, f"{name}_proj").weight
        bound = (2**-1 if name == "o" else 2**-2.5) * math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert mixer.group_norm.eps == 1e-6


@torch.no_grad()
def test_sums_beyond_float16_are_divided_before_they_are_rounded() -> None:
    config = ZooRetNetConfig(vocab_size=4, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids, mixer = torch.zeros(1, 512, dtype=torch.long), model.layers[0].mixer
    # One token again and again, with large queries, keys and values of one direction.
    state = torch.nn.functional.normalize(model.embeddings.weight[0], dim=0)
    for name, size in (("q_proj", 3.0), ("k_proj", 3.0), ("v_proj", 4.0)):
        getattr(mixer, name).weight.copy_(size * state.expand_as(getattr(mixer, name).weight))
    exact = unnormed(mixer, lambda: model(ids, use_cache=False))
    model.half()
    found = unnormed(mixer, lambda: model(ids, use_cache=False))
    assert found.dtype == torch.float16 and found.isfinite().all()
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-2)
    cache = DynamicCache(config=config)
    steps = unnormed(mixer, lambda: [model(part, past_key_values=cache) for part in ids[:, :40].split(1, dim=1)])
    torch.testing.assert_close(steps.float(), exact[:, :40], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias must be left out"),
        ({"qk_norm": "head"}, "qk_norm must be left out"),
        ({"position_types": ["none", "rotary"]}, "position_types must be left out"),
    ],
)
def test_options_of_attention_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZooRetNetConfig(**changes)


def test_a_base_of_the_rotary_embedding_is_kept() -> None:
    theta = torchscale_rope_theta(256)
    assert ZooRetNetConfig().rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert ZooRetNetConfig(rope_parameters={"rope_type": "default"}).rope_parameters["rope_theta"] == theta
    assert ZooRetNetConfig(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    with pytest.raises(ValueError, match="num_attention_heads must be at most 144"):
        Retention(ZooRetNetConfig(hidden_size=292, num_attention_heads=146), 0, v_head_dim=2)
