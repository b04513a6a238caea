"""Prefixes in both directions: the mixers against their definition, who sees whom, caches, and what is refused."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import PREFIXED, VOCAB, draw_ids, make_config, make_head, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, DynamicCache, StaticCache

from ssm_zoo.kernels.causal_conv1d import causal_conv1d_reference
from ssm_zoo.kernels.rms_norm import rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan_reference
from ssm_zoo.kernels.ssd import ssd_reference
from ssm_zoo.modeling import ZooHybridConfig, ZooMamba2Config
from ssm_zoo.modeling.attention import Attention
from ssm_zoo.modeling.discrete_mamba2 import DiscreteMamba2Mixer
from ssm_zoo.modeling.modeling_mamba import MambaMixer
from ssm_zoo.modeling.modeling_mamba2 import Mamba2Mixer
from ssm_zoo.modeling.prefix import read_prefix
from ssm_zoo.modeling.retention import Retention
from ssm_zoo.modeling.token_layout import make_sequence

LENGTH, PREFIX = 13, 8
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=PREFIXED)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def marked(*prefixes: int, length: int = LENGTH) -> Tensor:
    """(B, L) masks of prefixes at the start of unpadded rows."""
    return (torch.arange(length) < torch.tensor(prefixes)[:, None]).long()


def whole(model: Any, ids: Tensor, prefix: int) -> Tensor:
    """(B, L, V) logits of unpadded rows with equal prefixes."""
    with torch.no_grad():
        return model(ids, prefix_mask=marked(prefix, length=ids.shape[1]).expand_as(ids), use_cache=False).logits


# The definition of every mixer, for one document in float64


def convolved(scan: Any, x: Tensor, activation: str | None = "silu") -> Tensor:
    return causal_conv1d_reference(x, scan.conv1d.weight[:, 0], scan.conv1d.bias, activation=activation)


def s6(scan: Any, x: Tensor) -> Tensor:
    x = convolved(scan, x)
    dt, B, C = scan.x_proj(x).split(scan.split, dim=-1)
    dt, B, C = scan.dt_proj(dt), B[:, :, None], C[:, :, None]
    return selective_scan_reference(x, dt, -scan.A_log.exp(), B, C, D=scan.D, dt_softplus=True)


def ssd(scan: Any, xBC: Tensor, dt: Tensor) -> Tensor:
    x, B, C = convolved(scan, xBC).split(scan.conv_split, dim=-1)
    heads = {"x": x.unflatten(-1, (scan.num_heads, -1)), "dt": dt, "A": -scan.A_log.exp()}
    maps = {"B": B.unflatten(-1, (scan.n_groups, -1)), "C": C.unflatten(-1, (scan.n_groups, -1))}
    steps = {"dt_bias": scan.dt_bias, "dt_softplus": True, "dt_limit": scan.time_step_limit}
    return ssd_reference(**heads, **maps, D=scan.D, **steps).flatten(2)


def both_ways(scan: Any, mixer: Any, inputs: tuple[Tensor, ...], prefix: int) -> Tensor:
    """Forwards over everything, and backwards over the prefix, which the rest is not part of."""
    forward = scan(mixer, *inputs)
    if prefix == 0:
        return forward
    backward = scan(mixer.reverse, *(x[:, :prefix].flip(1) for x in inputs)).flip(1)
    return forward + F.pad(backward, (0, 0, 0, forward.shape[1] - prefix))


def decays(log_decay: Tensor, prefix: int) -> Tensor:
    """(B, H, L, L) products of decays, pair by pair; 0 where a token does not see another."""
    batch, length, heads = log_decay.shape
    rows = []
    for n, m in itertools.product(range(length), repeat=2):
        if m <= n:
            rows.append(log_decay[:, m + 1 : n + 1].sum(1).exp())
        elif n < prefix and m < prefix:
            rows.append(log_decay[:, n:m].sum(1).exp())
        else:
            rows.append(log_decay.new_zeros(batch, heads))
    return torch.stack(rows, -1).unflatten(-1, (length, length))


def defined(mixer: Any, hidden: Tensor, sequence: Any, prefix: int) -> Tensor:
    """The mixer's (B, L, D) outputs by its definition."""
    if isinstance(mixer, MambaMixer):
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        return mixer.out_proj(both_ways(s6, mixer, (x,), prefix) * F.silu(z))
    if isinstance(mixer, Mamba2Mixer):
        z, xBC, dt = mixer.in_proj(hidden).split(mixer.split, dim=-1)
        y = both_ways(ssd, mixer, (xBC, dt), prefix)
        norm = mixer.norm
        return mixer.out_proj(rms_norm_reference(y, norm.weight, norm.eps, z=z, group_size=norm.group_size))
    if isinstance(mixer, DiscreteMamba2Mixer):
        xBC, z, a = mixer.in_proj(hidden).split(mixer.split, dim=-1)
        x, B, C, log_decay = mixer.recurrence_inputs(convolved(mixer, xBC, None), a, sequence)
        matrix = torch.einsum("blhn,bmhn->bhlm", C, B) * decays(log_decay, prefix)
        y = torch.einsum("bhlm,bmhp->blhp", matrix / matrix.sum(-1, keepdim=True), x) + mixer.D[:, None] * x
        return mixer.out_proj(y.flatten(2) * F.silu(z + mixer.z_bias))
    if isinstance(mixer, Retention):
        length, (cos, sin) = hidden.shape[1], sequence.rotary_tables(mixer.positions)
        q, k = (layer(hidden).unflatten(-1, (-1, mixer.head_dim)) for layer in (mixer.q_proj, mixer.k_proj))
        half = mixer.head_dim // 2
        q, k = (x * cos[:, :, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, :, None] for x in (q, k))
        k, v = (mixer.for_all_heads(x) for x in (k, mixer.v_proj(hidden).unflatten(-1, (-1, mixer.v_head_dim))))
        gamma = (1 - 2.0 ** (-5 - torch.arange(mixer.num_heads, dtype=torch.float64))).log()
        decay = decays(gamma.expand(hidden.shape[0], length, -1), prefix)
        matrix = torch.einsum("blhp,bmhp->bhlm", q, k) * mixer.head_dim**-0.5
        matrix = matrix * decay / decay.sum(-1, keepdim=True).sqrt()
        matrix = matrix / matrix.sum(-1, keepdim=True).abs().clamp(min=1).detach()
        o = torch.einsum("bhlm,bmhv->blhv", matrix, v)
        y = (o * (o.square().mean(-1, keepdim=True) + mixer.group_norm.eps).rsqrt()).flatten(2)
        return mixer.o_proj(y if mixer.g_proj is None else F.silu(mixer.g_proj(hidden)) * y)
    assert isinstance(mixer, Attention)
    q = mixer.to_heads(mixer.q_proj(hidden), None, sequence)
    k = mixer.to_heads(mixer.k_proj(hidden), None, sequence).repeat_interleave(mixer.num_key_value_groups, 2)
    v = mixer.v_proj(hidden).unflatten(-1, (-1, mixer.head_dim)).repeat_interleave(mixer.num_key_value_groups, 2)
    place = torch.arange(hidden.shape[1])
    distance = place[:, None] - place
    seen = (distance >= 0) | ((place < prefix)[:, None] & (place < prefix))
    seen &= distance.abs() < (mixer.window or 10**6)
    scores = torch.einsum("blhp,bmhp->bhlm", q, k) * mixer.scaling
    matrix = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return mixer.o_proj(torch.einsum("bhlm,bmhp->blhp", matrix, v).flatten(2))


@pytest.mark.parametrize("prefix", [0, 1, PREFIX, LENGTH])
@pytest.mark.parametrize("name", ["prefix-hybrid", "prefix-mamba", "prefix-mamba2", "prefix-retnet"])
def test_mixers_and_their_gradients_are_their_definition(name: str, prefix: int) -> None:
    """In float64, with loops over time or matrices made pair by pair."""
    model = make_model(name).double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, LENGTH, 16, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, LENGTH, 16, generator=generator, dtype=torch.float64)
    for block in model.backbone.layers[-4:]:
        mixer, results = block.mixer, []
        for forward in (lambda x, s, m: m(x, s)[0], lambda x, s, m: defined(m, x, s, prefix)):
            leaf = hidden.clone().requires_grad_()
            sequence = model.backbone.sequence_of(leaf)
            sequence.prefix = read_prefix(marked(prefix, prefix), sequence, model.config)
            y = forward(leaf, sequence, mixer)
            parameters = dict(mixer.named_parameters())
            gradients = torch.autograd.grad((y * weights).sum(), [leaf, *parameters.values()], allow_unused=True)
            names = ["hidden_states", *parameters]
            results.append((y, {n: g for n, g in zip(names, gradients, strict=True) if g is not None and g.any()}))
        (y, gradients), (expected, of_definition) = results
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
        assert gradients.keys() == of_definition.keys()
        assert prefix == 0 or not hasattr(mixer, "reverse") or "reverse.conv1d.weight" in gradients
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, of_definition[key], rtol=1e-5, atol=1e-6, msg=key)


# Who sees whom

SEQ_IDX = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0]])
PACKED_PREFIX = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
LAYOUTS = [
    pytest.param({"prefix_mask": marked(PREFIX)}, id="whole"),
    pytest.param({"prefix_mask": PACKED_PREFIX, "seq_idx": SEQ_IDX}, id="packed"),
    pytest.param({"prefix_mask": marked(9), "attention_mask": PADDING}, id="padded"),
    pytest.param(
        {"prefix_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0]])}
        | {"attention_mask": PADDING, "seq_idx": SEQ_IDX},
        id="packed-and-padded",
    ),
]


@pytest.mark.parametrize("arguments", LAYOUTS)
def test_a_prefix_sees_itself_and_the_rest_what_is_behind_it(model: Any, arguments: dict[str, Tensor]) -> None:
    ids = draw_ids(1, LENGTH)
    document = arguments.get("seq_idx", torch.zeros(1, LENGTH))[0]
    real = arguments.get("attention_mask", torch.ones(1, LENGTH))[0] != 0
    prefix = (arguments["prefix_mask"][0] != 0) & real
    place = torch.arange(LENGTH)
    with torch.no_grad():
        logits = model(ids, **arguments).logits
        assert logits.isfinite().all()
        for t in range(LENGTH):
            changed = ids.clone()
            changed[0, t] = ids[0, t] % (VOCAB - 1) + 1
            differs = (model(changed, **arguments).logits != logits).any(-1)[0]
            sees = (place >= t) | (prefix & prefix[t])
            assert torch.equal(differs[real], (sees & (document == document[t]) & real[t])[real])


def test_packed_and_padded_documents_are_as_alone(model: Any) -> None:
    """Padding before, within and behind documents, within prefixes too; also documents without a prefix."""
    rows, prefixes = [draw_ids(1, n, seed=n) for n in (5, 7, 1, 70)], (3, 0, 1, 66)
    columns: list[tuple[int, int, int]] = [(7, -1, 0)]  # id, document, prefix
    for document, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        for t, token in enumerate(row[0].tolist()):
            columns += [(token, document, int(t < prefix))] + ([(7, -1, t % 2)] if t in (1, 4) else [])
    ids, seq_idx, prefix_mask = torch.tensor(columns).T[:, None]
    with torch.no_grad():
        logits = model(ids, seq_idx=seq_idx, prefix_mask=prefix_mask).logits
    alone = [whole(model, row, prefix)[0] for row, prefix in zip(rows, prefixes, strict=True)]
    close(logits[0, seq_idx[0] >= 0], torch.cat(alone))


def test_without_a_prefix_the_model_is_causal(model: Any) -> None:
    ids = draw_ids(2, LENGTH)
    with torch.no_grad():
        causal = model(ids).logits
        close(whole(model, ids, 0), causal)
        close(model(ids[:, :5]).logits, causal[:, :5])
        assert ((whole(model, ids, PREFIX) - causal).abs().amax(-1) > 1e-4)[:, : PREFIX + 1].all()


# Caches


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[PREFIX, 1, 1, 1, 1, 1], [PREFIX, 3, 1, 1], [10, 2, 1]])
def test_prefill_and_decoding_are_the_whole(model: Any, lengths: list[int], kind: type) -> None:
    ids = draw_ids(2, LENGTH)
    cache = kind(config=model.config, **({"max_cache_len": LENGTH + 2} if kind is StaticCache else {}))
    logits = []
    with torch.no_grad():
        for index, piece in enumerate(ids.split(lengths, dim=1)):
            prefix = {} if index else {"prefix_mask": marked(PREFIX, PREFIX, length=piece.shape[1])}
            logits.append(model(piece, past_key_values=cache, use_cache=True, **prefix).logits)
    close(torch.cat(logits, dim=1), whole(model, ids, PREFIX))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_decoded_as_alone(model: Any, side: str) -> None:
    rows, prefixes, new = [draw_ids(1, n, seed=n) for n in (9, 4, 1)], (7, 4, 1), draw_ids(3, 5, seed=99)
    ids, mask, prefix_mask = torch.full((3, 9), 7), torch.zeros(3, 9).long(), torch.zeros(3, 9).long()
    for i, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        start = 0 if side == "right" else 9 - row.shape[1]
        place = slice(start, start + row.shape[1])
        ids[i, place], mask[i, place], prefix_mask[i, start : start + prefix] = row[0], 1, 1
    logits: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prefix_mask=prefix_mask, use_cache=True)
        for i in range(3):
            logits[i].append(output.logits[i, mask[i] == 1])
        for t in range(5):
            mask = F.pad(mask, (0, 1), value=1)
            output = model(new[:, t : t + 1], attention_mask=mask, past_key_values=output.past_key_values)
            for i in range(3):
                logits[i].append(output.logits[i])
    for i, prefix in enumerate(prefixes):
        tokens = torch.cat([rows[i], new[i : i + 1]], dim=1)
        close(torch.cat(logits[i]), whole(model, tokens, prefix)[0])


def test_beam_search_scores_are_those_of_the_sequences(model: Any) -> None:
    """With left padding; without the cache the prompt's mask is extended."""
    rows, prefixes, new = [draw_ids(1, 8), draw_ids(1, 3, seed=1)], (8, 2), 4
    ids, mask, prefix_mask = torch.full((2, 8), 7), torch.zeros(2, 8).long(), torch.zeros(2, 8).long()
    for i, row in enumerate(rows):
        start = 8 - row.shape[1]
        ids[i, start:], mask[i, start:], prefix_mask[i, start : start + prefixes[i]] = row[0], 1, 1
    settings = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 1.0}
    settings |= {"max_new_tokens": new, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    given = {"attention_mask": mask, "prefix_mask": prefix_mask, **settings}
    found = model.generate(ids, **given)
    for beam, continuation in enumerate(found.sequences[:, 8:]):
        row = torch.cat([rows[beam // 3], continuation[None]], dim=1)
        logp = whole(model, row, prefixes[beam // 3])[0, -new - 1 : -1].log_softmax(-1)
        close(found.sequences_scores[beam], logp.gather(1, continuation[:, None]).sum() / new)
    assert torch.equal(model.generate(ids, use_cache=False, **given).sequences, found.sequences)


def test_generate_refuses_to_read_a_prefix_in_chunks() -> None:
    model, ids = make_model("prefix-mamba2"), draw_ids(1, 8)
    given = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"cannot be read in several chunks\. Leave out prefill_chunk_size"):
        model.generate(ids, prefix_mask=marked(7, length=8), prefill_chunk_size=4, **given)
    one = model.generate(ids, prefix_mask=marked(4, length=8), prefill_chunk_size=4, **given)
    assert torch.equal(one, model.generate(ids, prefix_mask=marked(4, length=8), **given))


# Matrices, training, saving


@pytest.mark.parametrize("name", ["prefix-hybrid", "prefix-mambas", "prefix-retnet"])
def test_matrices_show_what_a_prefix_sees_and_those_of_a_cache_are_the_same(name: str) -> None:
    model, ids = make_model(name), draw_ids(1, LENGTH)
    place = torch.arange(LENGTH)
    sees = (place[:, None] >= place) | ((place < PREFIX)[:, None] & (place < PREFIX))
    with torch.no_grad():
        matrices = model(ids, prefix_mask=marked(PREFIX), output_attentions=True).attentions
        first = model(ids[:, :10], prefix_mask=marked(PREFIX)[:, :10], output_attentions=True, use_cache=True)
        rest = model(ids[:, 10:], past_key_values=first.past_key_values, output_attentions=True)
    for kind, matrix, later in zip(model.config.layer_types, matrices, rest.attentions, strict=True):
        seen = (matrix[0] != 0).any(0)
        assert torch.equal(seen, sees if kind != "zoo_window" else seen & sees)
        close(later, matrix[:, :, 10:])


def batch() -> dict[str, Tensor]:
    ids, prefix_mask = draw_ids(2, LENGTH), marked(PREFIX, 5)
    return {"input_ids": ids, "prefix_mask": prefix_mask, "labels": ids.masked_fill(prefix_mask == 1, -100)}


@pytest.mark.parametrize("name", ["prefix-hybrid", "prefix-mambas"])
def test_every_parameter_is_trained_and_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch()).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    # Of the last block's prefix the loss reads the last token, before which the backward scan has read nothing.
    idle = f"layers.{model.config.num_hidden_layers - 1}.mixer.reverse.A_log"
    for key, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all() and (gradient.any() or key.endswith(idle)), key
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5)


def test_a_saved_model_reads_prefixes_without_the_package(tmp_path: Path) -> None:
    model, ids = make_model("prefix-hybrid"), draw_ids(1, LENGTH)
    model.save_pretrained(tmp_path)
    torch.save({"input_ids": ids, "prefix_mask": marked(PREFIX)}, tmp_path / "inputs.pt")
    script = """if True:
        import sys, torch
        sys.modules["ssm_zoo"] = None
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            torch.save(model(**torch.load(f"{folder}/inputs.pt"), use_cache=False).logits, f"{folder}/logits.pt")
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], check=True, env=environment, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), whole(model, ids, PREFIX))


def test_a_causal_checkpoint_goes_on_with_prefixes(tmp_path: Path) -> None:
    """The forward direction keeps its weights; a retention has no others."""
    causal, ids = make_model("mamba2"), draw_ids(1, LENGTH)
    causal.save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, prefix_bidirectional=True, output_loading_info=True)
    assert all(".reverse." in key for key in report["missing_keys"]) and report["missing_keys"]
    with torch.no_grad():
        close(model.eval()(ids).logits, causal(ids).logits)
    assert make_model("prefix-retnet").state_dict().keys() == make_model("retnet").state_dict().keys()


def test_other_heads_take_the_mask() -> None:
    model, ids = make_head(AutoModelForTokenClassification, "prefix-mambas"), draw_ids(1, LENGTH)
    with torch.no_grad():
        assert not torch.equal(model(ids, prefix_mask=marked(LENGTH)).logits, model(ids).logits)


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix_mask": torch.ones(1, 4).long()}, r"prefix_mask must be \(B, L\) = \(2, 13\), got \(1, 4\)"),
        ({"prefix_mask": torch.ones(2, LENGTH)}, "prefix_mask must have an integer dtype, got torch.float32"),
        ({"prefix_mask": 1 - marked(3, 13)}, "prefix_mask must mark the first tokens of each document"),
        ({"prefix_mask": marked(9, 9), "seq_idx": SEQ_IDX.expand(2, -1)}, None),
        (
            {"prefix_mask": torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1]] * 2)}
            | {"seq_idx": SEQ_IDX.expand(2, -1)},
            "got a marked token behind one that is not marked",
        ),
        ({"prefix_mask": marked(2, 2), "labels": draw_ids(2, LENGTH)}, "labels must be -100 at the tokens"),
    ],
)
def test_wrong_masks_are_errors(arguments: dict[str, Tensor], message: str | None) -> None:
    model = make_model("prefix-mamba2")
    if message is None:  # the prefixes of three documents have 5, 3 and 1 tokens
        assert model(draw_ids(2, LENGTH), **arguments).logits.isfinite().all()
        return
    with pytest.raises(ValueError, match=message):
        model(draw_ids(2, LENGTH), **arguments)


def test_a_prefix_is_not_continued() -> None:
    model, ids = make_model("prefix-mamba2"), draw_ids(1, LENGTH)
    cache = model(ids[:, :4], prefix_mask=marked(4, length=4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pass the whole prefix in the first forward"):
        model(ids[:, 4:], past_key_values=cache, prefix_mask=marked(3, length=9))


def test_causal_models_and_mixers_refuse_the_mode() -> None:
    with pytest.raises(ValueError, match="prefix_mask must be None for this zoo_mamba2"):
        make_model("mamba2")(draw_ids(1, LENGTH), prefix_mask=marked(3))
    with pytest.raises(Exception, match="bidirectional must be False with prefix_bidirectional=True"):
        ZooMamba2Config(bidirectional=True, prefix_bidirectional=True)
    with pytest.raises(Exception, match="with the causal mixer_types bounded_attention, got True"):
        ZooHybridConfig(num_hidden_layers=1, mixer_types=["bounded_attention"], prefix_bidirectional=True)
    config = make_config("taipan")
    config.prefix_bidirectional = True
    with pytest.raises(ValueError, match="`prefix_bidirectional` must be left out, got True: taipan"):
        AutoModelForCausalLM.from_config(config)


def test_flash_attention_has_no_mask_for_a_prefix() -> None:
    model = make_model("prefix-hybrid")
    attention = model.backbone.layers[1].mixer
    sequence = model.backbone.sequence_of(torch.zeros(1, LENGTH, 16))
    sequence.prefix = read_prefix(marked(3), sequence, model.config)
    attention.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be 'sdpa', 'eager' or 'flex_attention'"):
        attention(torch.zeros(1, LENGTH, 16), sequence)


def test_read_prefix_leaves_out_padding() -> None:
    sequence = make_sequence(1, LENGTH, torch.device("cpu"), attention_mask=PADDING)
    prefix = read_prefix(marked(9), sequence, make_config("prefix-mamba"))
    assert prefix is not None and torch.equal(prefix[0], (torch.arange(LENGTH) < 9) & (PADDING[0] == 1))
