"""`output_attentions`: the matrix of every token mixer, applied to the mixer's values, is the mixer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, draw_ids, make_model
from torch import Tensor, nn

from ssm_zoo.kernels.int8_rows import round_rows
from ssm_zoo.modeling.attention import Attention
from ssm_zoo.modeling.bounded_memory import BoundedAttention
from ssm_zoo.modeling.discrete_mamba2 import DiscreteMamba2Mixer
from ssm_zoo.modeling.linear_attention import LinearAttention
from ssm_zoo.modeling.modeling_mamba import MambaMixer
from ssm_zoo.modeling.modeling_mamba2 import Mamba2Mixer
from ssm_zoo.modeling.position_mixers import PositionMixer
from ssm_zoo.modeling.retention import Retention
from ssm_zoo.modeling.selective_attention import SelectiveAttention

LENGTH = 13
SEQ_IDX = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]])
INPUTS = [
    pytest.param({}, id="whole"),
    pytest.param({"seq_idx": SEQ_IDX}, id="packed"),
    pytest.param({"attention_mask": MASK}, id="padded"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def run(model: Any, **arguments: Any) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Mixer, its input, its output and its matrix, for every block; where that has attention besides, for both."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(mixer: nn.Module, inputs: tuple, options: dict, outputs: tuple) -> None:
        output = outputs[0]
        if options.get("stream") is not None:  # attention replaces a share of the stream: what it adds itself
            output = output + share_of(mixer, inputs[0], outputs[3])[..., None] * options["stream"]
        seen.append((inputs[0], output))

    pairs = [[block.attention, block.mixer] if attends(block) else [block.mixer] for block in model.backbone.layers]
    mixers = [mixer for pair in pairs for mixer in pair]
    hooks = [mixer.register_forward_hook(record, with_kwargs=True) for mixer in mixers]
    with torch.no_grad():
        blocks = model(draw_ids(1, LENGTH), output_attentions=True, **arguments).attentions
    for hook in hooks:
        hook.remove()
    assert len(blocks) == len(pairs)
    matrices = []
    for pair, matrix in zip(pairs, blocks, strict=True):
        matrices += matrix.split([heads_of(mixer) for mixer in pair], dim=1) if len(pair) > 1 else [matrix]
    return [(mixer, *pair, matrix) for mixer, pair, matrix in zip(mixers, seen, matrices, strict=True)]


def attends(block: Any) -> bool:
    return getattr(block, "attention", None) is not None


def heads_of(mixer: Any) -> int:
    if isinstance(mixer, MambaMixer):
        return len(mixer.D)
    return mixer.num_heads * (mixer.taps if isinstance(mixer, PositionMixer) else 1)


def positions_of(seq_idx: Tensor | None) -> Tensor:
    """(L) place of each token in its document, any number at padding."""
    documents = [0] * LENGTH if seq_idx is None else seq_idx[0].tolist()
    return torch.tensor([documents[:t].count(document) for t, document in enumerate(documents)])


def share_of(mixer: Any, hidden_states: Tensor, decision: Tensor) -> Tensor:
    """(1, L) weight of selective attention's output, 0 where a token passes by."""
    return decision * mixer.gate(hidden_states).softmax(-1)[..., 1]


def applied(mixer: Any, hidden_states: Tensor, matrix: Tensor, seq_idx: Tensor | None) -> Tensor:
    """What the mixer gives for (1, L, D) hidden states, by its (1, H, L, L) matrix."""

    def mixed(values: Tensor) -> Tensor:
        return torch.einsum("bhls,bshp->blhp", matrix, values).flatten(2)

    if isinstance(mixer, (Attention, BoundedAttention, LinearAttention, SelectiveAttention)):
        values = mixer.v_proj(hidden_states)
        if isinstance(mixer, Attention) and mixer.conv1d is not None:
            parts = [mixer.q_proj(hidden_states), mixer.k_proj(hidden_states), values]
            values = mixer.conv1d(torch.cat(parts, dim=-1), seq_idx=seq_idx)[0][..., -values.shape[-1] :]
        values = values.unflatten(-1, (mixer.num_kv_heads, mixer.head_dim))
        if isinstance(mixer, BoundedAttention) and mixer.settings.kv_dtype == "int8":
            values = round_rows(values)
        output = mixer.o_proj(mixed(values.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=2)))
        if not isinstance(mixer, SelectiveAttention):
            return output
        selected = matrix.any(-1).any(1)  # the rows of the others are zero
        return output * share_of(mixer, hidden_states, selected)[..., None]
    if isinstance(mixer, PositionMixer):
        x = hidden_states if mixer.in_proj is None else mixer.in_proj(hidden_states)
        x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
        wide = F.pad(x, (mixer.left, mixer.taps - 1 - mixer.left))
        taps = [wide[..., tap : tap + mixer.head_dim] for tap in range(mixer.taps)]
        y = mixed(torch.cat(taps, dim=2)).unflatten(-1, (mixer.taps, mixer.num_heads, mixer.head_dim)).sum(2)
        y = (y + mixer.bias.T[positions_of(seq_idx)][..., None]).flatten(2)
        return y if mixer.out_proj is None else mixer.out_proj(y)
    if isinstance(mixer, Mamba2Mixer):
        z, xBC, _ = mixer.in_proj(hidden_states).split(mixer.split, dim=-1)
        x = mixer.conv1d(xBC, seq_idx=seq_idx)[0].split(mixer.conv_split, dim=-1)[0]
        return mixer.out_proj(mixer.norm(mixed(x.unflatten(-1, (mixer.num_heads, mixer.head_dim))), z))
    if isinstance(mixer, MambaMixer):
        x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
        return mixer.out_proj(mixed(mixer.conv1d(x, seq_idx=seq_idx)[0][..., None]) * F.silu(z))
    if isinstance(mixer, Retention):
        values = mixer.v_proj(hidden_states).unflatten(-1, (mixer.num_kv_heads, mixer.v_head_dim))
        heads = mixed(values.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=2))
        y = mixer.group_norm(heads.unflatten(-1, (mixer.num_heads, -1))).flatten(2)
        return mixer.o_proj(y if mixer.g_proj is None else y * F.silu(mixer.g_proj(hidden_states)))
    assert isinstance(mixer, DiscreteMamba2Mixer), f"say here what {type(mixer).__name__} does with its matrix"
    xBC, z, _ = mixer.in_proj(hidden_states).split(mixer.split, dim=-1)
    x = mixer.conv1d(xBC, seq_idx=seq_idx)[0].split(mixer.conv_split, dim=-1)[0]
    y = mixed(x.unflatten(-1, (mixer.num_heads, mixer.head_dim)))
    return mixer.out_proj(y * F.silu(z + mixer.z_bias))


@pytest.mark.parametrize("arguments", INPUTS)
def test_the_matrix_applied_to_the_values_is_the_mixer(model: Any, arguments: dict[str, Tensor]) -> None:
    real = arguments.get("attention_mask", torch.ones(1, LENGTH)) != 0
    seq_idx = arguments.get("seq_idx")
    if "attention_mask" in arguments:
        seq_idx = real.int() - 1
    for mixer, inputs, outputs, matrix in run(model, **arguments):
        assert matrix.shape == (1, heads_of(mixer), LENGTH, LENGTH)
        assert matrix.dtype == torch.float32
        with torch.no_grad():
            actual = applied(mixer, inputs, matrix, seq_idx)
        torch.testing.assert_close(actual[real], outputs[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", INPUTS)
def test_the_matrix_is_causal_and_keeps_documents_and_padding_apart(model: Any, arguments: dict[str, Tensor]) -> None:
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    real = torch.ones(LENGTH, dtype=torch.bool)
    if "seq_idx" in arguments:
        allowed &= SEQ_IDX[0][:, None] == SEQ_IDX[0][None]
    if "attention_mask" in arguments:
        real = MASK[0] == 1
        allowed &= real[None]
    for mixer, _, _, matrix in run(model, **arguments):
        reachable = allowed.clone()
        if isinstance(mixer, (Attention, SelectiveAttention)) and mixer.window is not None:
            order = real.cumsum(0)
            reachable &= order[:, None] - order[None] < mixer.window
        if isinstance(mixer, SelectiveAttention):
            selected = matrix[0].any(-1).any(0)
            assert selected.sum() < real.sum() and (selected.any() or "attention_mask" in arguments)
            reachable &= selected[:, None]
            if mixer.key_source == "selected":
                reachable &= selected[None]
        seen = matrix[0, :, real] != 0
        if isinstance(mixer, BoundedAttention):  # of what is reachable, the window and the slots
            settings = mixer.settings
            places = torch.tensor([int(allowed[t, :t].sum()) for t in range(LENGTH)])[real]
            capacity = torch.tensor(settings.slots_of(mixer.layer_idx, mixer.num_kv_heads)) + settings.sinks
            most = capacity + settings.window
            most[settings.exact_of(mixer.layer_idx)] = LENGTH
            members = mixer.num_heads // mixer.num_kv_heads
            most = most.repeat_interleave(members)
            assert (seen <= reachable[real]).all()
            assert (seen.sum(-1) <= most[:, None]).all()
            for head in settings.exact_of(mixer.layer_idx):
                assert (seen[head * members : (head + 1) * members] == reachable[real]).all()
            assert (seen.sum(-1) == places + 1)[:, places < settings.window - settings.chunk_size + 1].all()
            continue
        assert (seen == reachable[real]).all()


def test_rows_of_softmax_attention_sum_to_one(model: Any) -> None:
    for mixer, _, _, matrix in run(model):
        if isinstance(mixer, (Attention, BoundedAttention, LinearAttention, SelectiveAttention)):
            sums = torch.ones(1, mixer.num_heads, LENGTH)
            if isinstance(mixer, SelectiveAttention):
                sums = sums * matrix.any(-1)
            torch.testing.assert_close(matrix.sum(-1), sums)
            assert (matrix >= 0).all()


def test_rows_of_normalized_discrete_mamba2_sum_to_one() -> None:
    model = make_model("sliding-discrete")
    mixer = model.backbone.layers[1].mixer
    mixer.D.data.zero_()
    matrix = run(model)[1][3]
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, mixer.num_heads, LENGTH))
    assert (matrix >= 0).all()


def test_the_recurrence_alone_is_asked_for_its_matrix(model: Any) -> None:
    """Without the rest of the mixer, as matrix orientation does."""
    for mixer, inputs, _, matrix in run(model):
        if hasattr(mixer, "hidden_attention"):
            with torch.no_grad():
                alone = mixer.hidden_attention(inputs, model.backbone.sequence_of(inputs))
            torch.testing.assert_close(alone, matrix, rtol=0, atol=1e-6)


def test_decays_are_those_of_the_matrix(model: Any) -> None:
    """`log_decay` against the matrix of ones as maps: its entry (i, i - 1) is one token's decay."""
    for mixer, inputs, _, _ in run(model):
        if not isinstance(mixer, (DiscreteMamba2Mixer, Mamba2Mixer)):
            continue
        with torch.no_grad():
            log_decay = mixer.log_decay(inputs)
            assert log_decay.shape == (1, LENGTH, mixer.num_heads) and (log_decay < 0).all()
            sequence = model.backbone.sequence_of(inputs)
            ones = torch.ones(1, LENGTH, 1, 1)
            if isinstance(mixer, Mamba2Mixer):
                dt = mixer.in_proj(inputs)[..., -mixer.num_heads :]
                matrix = mixer.mixing_matrix(dt, -mixer.A_log.exp(), ones, ones, sequence)
                steps = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit).transpose(1, 2)
                matrix = (matrix - torch.diag_embed(mixer.D[:, None].expand(-1, LENGTH))) / steps[:, :, None]
            else:
                mixer.normalize, normalize = False, mixer.normalize
                matrix = mixer.mixing_matrix(log_decay, ones, ones, sequence)
                mixer.normalize = normalize
        below = matrix.diagonal(offset=-1, dim1=-2, dim2=-1).transpose(1, 2)
        torch.testing.assert_close(below, log_decay[:, 1:].exp(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["full-discrete", "sliding-discrete", "all-four", "exact-heads"])
@pytest.mark.parametrize("arguments", INPUTS)
def test_eager_attention_is_sdpa(name: str, arguments: dict[str, Tensor]) -> None:
    model, eager = make_model(name), make_model(name, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager" != model.config._attn_implementation
    ids = draw_ids(1, LENGTH)
    real = arguments.get("attention_mask", torch.ones(1, LENGTH)) != 0
    with torch.no_grad():
        expected, actual = model(ids, **arguments).logits, eager(ids, **arguments).logits
    assert actual.isfinite().all()  # the softmax of a padding token's row is over something
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-5)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(eager.generate(ids, **settings), model.generate(ids, **settings))
