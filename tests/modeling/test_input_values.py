"""Values that were read wrongly without a word: documents beyond 32 bits, additive masks, NaN at padding, overflow."""

from typing import Any

import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_head, make_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from ssm_zoo.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from ssm_zoo.modeling import RetrievalMixer, RetrievalMixerConfig
from ssm_zoo.modeling.call_arguments import read_mask
from ssm_zoo.modeling.layers import LayerNorm
from with_triton import NEEDS_TRITON, with_triton

ALL = [*FAMILIES, *ENCODERS]
LENGTH = 9
TRITON = pytest.param(with_triton(rms_norm), id="triton", marks=NEEDS_TRITON)
TRITON_OF_A_SUM = pytest.param(with_triton(add_rms_norm), id="triton", marks=NEEDS_TRITON)


def backbone(name: str) -> Any:
    return make_head(AutoModel, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_beyond_32_bits_are_told_apart(name: str) -> None:
    model, ids = make_model(name), draw_ids(2, LENGTH)
    small = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 3 + [3] * 4])
    large = small.where(small < 0, small * 2**32 + 7)  # as 32-bit integers all are 7
    with torch.no_grad():
        expected = model(ids, seq_idx=small).logits
        assert torch.equal(model(ids, seq_idx=large).logits, expected)
        one = model(ids, seq_idx=small.clamp(max=0)).logits
    assert (one - expected)[0, 4:].abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_starts_and_documents_and_positions_must_be_integers(name: str) -> None:
    model, ids = backbone(name), draw_ids(1, LENGTH)
    for starts in (torch.tensor([0.0, 4.5, 9.0]), torch.tensor([0.0, torch.nan, 9.0])):
        with pytest.raises(ValueError, match=r"cu_seqlens must have an integer dtype, got torch\.float32"):
            model(ids, cu_seqlens=starts)
        with pytest.raises(ValueError, match=r"cu_seqlens must have an integer dtype, got torch\.float32"):
            model(ids, cu_seq_lens_q=starts)
    for other in (torch.zeros(1, LENGTH), torch.zeros(1, LENGTH, dtype=torch.bool)):
        with pytest.raises(ValueError, match="seq_idx must have an integer dtype"):
            model(ids, seq_idx=other)
        with pytest.raises(ValueError, match="position_ids must have an integer dtype"):
            model(ids, position_ids=other)


@pytest.mark.parametrize("starts", [[0, 5, 3, 9], [1, 9], [0, 8], [0, 4, 10]])
def test_starts_that_do_not_cover_the_row_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to L = 9 over a single row, got "):
        make_model("mamba2")(draw_ids(1, LENGTH), cu_seqlens=torch.tensor(starts))
    with pytest.raises(ValueError, match=r"cu_seqlens .* got shape \(1,\) for 1 rows"):
        make_model("mamba2")(draw_ids(1, LENGTH), cu_seqlens=torch.tensor([0]))


@pytest.mark.parametrize("name", ALL)
def test_an_additive_mask_is_refused_and_one_of_ones_and_zeros_is_read(name: str) -> None:
    model, ids = backbone(name), draw_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        for kind in (torch.float32, torch.bfloat16, torch.bool, torch.uint8):
            assert torch.equal(model(ids, attention_mask=mask.to(kind)).last_hidden_state, expected)
    for lowest in (-torch.inf, torch.finfo(torch.float32).min, -1e4, torch.nan):
        additive = torch.zeros(2, LENGTH).masked_fill(mask == 0, lowest)
        with pytest.raises(ValueError, match=r"attention_mask must be non-zero .* as in an additive mask"):
            model(ids, attention_mask=additive)
    with pytest.raises(ValueError, match="attention_mask must be non-zero at real tokens"):
        model(ids, attention_mask=mask - 1)


def test_values_are_not_looked_at_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    additive = torch.full((1, 3), -torch.inf)
    with pytest.raises(ValueError, match="attention_mask"):
        read_mask(additive)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert read_mask(additive) is not None


def padded(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings and a mask with padding left, right and in between."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3], mask[1, 6:], mask[2, 4] = 0, 0, 0
    return torch.randn(3, LENGTH, 16, generator=torch.Generator().manual_seed(seed)), mask


def gradients(model: Any, embeds: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs at real tokens, and the gradients of a loss over them."""
    embeds = embeds.clone().requires_grad_()
    model.zero_grad()
    y = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask != 0]
    y.square().sum().backward()
    assert embeds.grad is not None
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return y.detach(), [embeds.grad[mask != 0], embeds.grad[mask == 0], *found]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_stands_at_padding_reaches_no_real_token_and_no_gradient(name: str, value: float) -> None:
    model, (embeds, mask) = backbone(name), padded()
    expected, expected_gradients = gradients(model, embeds, mask)
    y, found = gradients(model, embeds.masked_fill(mask[..., None] == 0, value), mask)
    assert torch.equal(y, expected)
    assert not found[1].any()
    for gradient, right in zip(found, expected_gradients, strict=True):
        assert torch.equal(gradient, right)


@pytest.mark.parametrize("name", ALL)
def test_a_padding_token_with_no_embedding_reaches_no_real_token(name: str) -> None:
    """With the cache too: a prompt that is padded, then a token."""
    model, ids = backbone(name), draw_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    cached = name in FAMILIES
    with torch.no_grad():
        results = []
        for value in (0.5, torch.nan):
            model.embeddings.weight[0] = value
            output = model(ids, attention_mask=mask, use_cache=cached)
            results.append([output.last_hidden_state[mask != 0]])
            if cached:
                longer = torch.cat([mask, mask[:, -1:]], dim=1)
                cache = output.past_key_values
                results[-1].append(model(ids[:, -1:], attention_mask=longer, past_key_values=cache).last_hidden_state)
    for fine, spoilt in zip(*results, strict=True):
        assert torch.equal(fine, spoilt)


@pytest.mark.parametrize("name", ALL)
def test_a_mixer_by_itself_leaves_padding_out(name: str) -> None:
    """What a padding token has become on its way, in half precision an overflow, say, is not mixed either."""
    model, (embeds, mask) = backbone(name), padded()
    seen: list[str] = []

    def spoil(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(type(module).__name__)
        return inputs[0].masked_fill(mask[..., None] == 0, torch.nan), *inputs[1:]

    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask != 0]
        for key, module in model.named_modules():
            if key.rpartition(".")[2] in ("mixer", "attention"):
                module.register_forward_pre_hook(spoil)
        y = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask != 0]
    assert seen
    assert torch.equal(y, expected)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads_train_with_nan_at_padding(auto_class: Any) -> None:
    model, (embeds, mask) = make_head(auto_class, "all-four"), padded()
    labels = torch.zeros(3, dtype=torch.long)
    if auto_class is AutoModelForTokenClassification:
        labels = torch.zeros_like(mask).masked_fill(mask == 0, -100)
    spoilt = embeds.masked_fill(mask[..., None] == 0, torch.nan)
    model(inputs_embeds=spoilt, attention_mask=mask, labels=labels).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_missing_candidate_may_be_anything() -> None:
    torch.manual_seed(0)
    model = RetrievalMixer(RetrievalMixerConfig(hidden_size=16, num_hidden_layers=2, max_position_embeddings=6))
    query, candidates = torch.randn(2, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    results = []
    for value in (0.0, torch.nan):
        model.zero_grad()
        given = candidates.masked_fill(mask[..., None] == 0, value)
        output = model(query, given, candidate_mask=mask, labels=torch.tensor([1, 1]))
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in model.parameters())])
    for fine, spoilt in zip(*results, strict=True):
        assert torch.equal(fine, spoilt)


@pytest.mark.parametrize("name", ALL)
def test_norms_that_overflow_do_not_give_numbers_that_look_healthy(name: str) -> None:
    """Squares beyond the range of float32: divided by an infinite root, the states would be exactly zero."""
    model, ids = backbone(name), draw_ids(1, LENGTH)
    if isinstance(model.norm_f, nn.Identity):
        model.embeddings.weight.data *= 1e30  # masked mixers have norms in their blocks alone
    else:
        model.layers[-1].register_forward_hook(lambda *call: (call[2][0] * 1e30, *call[2][1:]))
    with torch.no_grad():
        assert model(ids).last_hidden_state.isnan().any()


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference, TRITON])
def test_a_norm_gives_nan_where_its_squares_overflow_and_only_there(norm: Any) -> None:
    x = torch.tensor(
        [[1.0, -2.0, 3.0, 4.0], [1e20, 1.0, 1.0, 1.0], [torch.inf, 1.0, 1.0, 1.0], [1e18, -1e18, 0.0, 0.0]]
    )
    y = norm(x, torch.ones(4), 1e-5)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[3], torch.tensor([1.0, -1.0, 0.0, 0.0]) * 2**0.5)
    torch.testing.assert_close(y[0], x[0] * 7.5**-0.5)
    groups = norm(x, torch.ones(4), 1e-5, z=torch.ones_like(x), group_size=2)
    assert groups[1, :2].isnan().all()
    assert groups[1, 2:].isfinite().all()


@pytest.mark.parametrize("norm", [add_rms_norm, TRITON_OF_A_SUM])
def test_the_norm_of_a_sum_gives_nan_where_it_overflows(norm: Any) -> None:
    x = torch.full((2, 4), 1e19)
    y, total = norm(x, torch.tensor([[1e19], [-1e19]]).expand(2, 4), torch.ones(4), 1e-5)
    assert y[0].isnan().all()
    assert not y[1].any()
    assert total.isfinite().all()


@pytest.mark.parametrize("width", [4, 64, 768])
def test_a_layer_norm_gives_nan_where_its_variance_overflows_and_is_torchs_elsewhere(width: int) -> None:
    norm = LayerNorm(width, 1e-5)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e20
    x[2, 0] = 1e21
    y = norm(x)
    assert y[1:3].isnan().all()
    expected = nn.functional.layer_norm(x, (width,), norm.weight, norm.bias, 1e-5)
    assert torch.equal(y[[0, 3, 4]], expected[[0, 3, 4]])
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
