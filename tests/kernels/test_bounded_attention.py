"""Attention over a bounded memory against its definition: whole, in parts, by steps, packed, and its gradients."""

import math
from typing import Any

import pytest
import torch
from bounded_memories import OPTIONS, SEQ_IDX, draw
from torch import Tensor

from ssm_zoo.kernels import bounded_attention_chunks
from ssm_zoo.kernels.bounded_attention import (
    BoundedMemory,
    bounded_attention,
    bounded_attention_matrix,
    bounded_attention_reference,
    bounded_attention_step,
)
from with_triton import DEVICE, NEEDS_TRITON


def in_parts(inputs: list[Tensor], lengths: list[int], options: dict[str, Any]) -> tuple[Tensor, BoundedMemory]:
    memory, outputs, start = None, [], 0
    for length in lengths:
        part = [tensor[:, start : start + length] for tensor in inputs]
        output, memory = bounded_attention(*part, initial_state=memory, **options)
        outputs.append(output)
        start += length
    assert memory is not None
    return torch.cat(outputs, dim=1), memory


def slots_of(memory: BoundedMemory, options: dict[str, Any]) -> list[Tensor]:
    """The positions and scores in the slots of each head, in order of the positions."""
    found, first = [], 0
    for number in options["slots"]:
        rows = slice(first, first + number + options["sinks"])
        positions, order = memory.positions[:, rows].sort(1)
        found += [positions, memory.scores[:, rows].gather(1, order)]
        first = rows.stop + options["window"]
    return found


@pytest.mark.parametrize("length", [1, 5, 23, 37])
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_definition(options: dict[str, Any], length: int) -> None:
    inputs = draw(2, length)
    expected = bounded_attention_reference(*inputs, **options)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad(expected, inputs, cotangent)
    parts = [[length], [1] * length] if length < 23 else [[length], [1] * length, [7, 1, 1, length - 9]]
    for lengths in parts:
        output, _ = in_parts(inputs, lengths, options)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        for found, wanted in zip(torch.autograd.grad(output, inputs, cotangent), gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_and_padding_stay_apart(options: dict[str, Any]) -> None:
    inputs = draw(2, 37)
    for tensor in inputs:
        tensor.data[SEQ_IDX < 0] = torch.nan
    clean = [tensor.detach().nan_to_num().requires_grad_() for tensor in inputs]
    output, memory = bounded_attention(*inputs, seq_idx=SEQ_IDX, **options)
    expected = bounded_attention_reference(*clean, seq_idx=SEQ_IDX, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(output.sum(), inputs)
    for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), clean), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
    alone = [tensor.detach()[:1, 9:20] for tensor in clean]  # the last document of the first row
    for mine, its in zip(memory[:4], bounded_attention(*alone, **options)[1][:4], strict=True):  # without scales
        torch.testing.assert_close(mine[:1], its)


@pytest.mark.parametrize("continued", [False, True], ids=["packed", "continued"])
def test_heads_first_in_memory_have_the_same_gradients(continued: bool) -> None:
    """Rotary embeddings often leave (B, H, L, P) in memory, of which the op is given a view."""
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    inputs = draw(2, 37)
    _, memory = bounded_attention(*[tensor.detach() for tensor in inputs], **options)
    where = {"initial_state": memory} if continued else {"seq_idx": SEQ_IDX}
    views = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs]
    gradients = []
    for given in (inputs, views):
        output, _ = bounded_attention(*given, **where, **options)
        gradients.append(torch.autograd.grad(output.square().sum(), given))
    for mine, other in zip(*gradients, strict=True):
        assert mine.any()
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_matrix_has_the_weights(options: dict[str, Any]) -> None:
    q, k, v = draw(2, 37)
    values = v.repeat_interleave(2, dim=2)
    matrix = bounded_attention_matrix(q, k, v, **options)
    output, _ = bounded_attention(q, k, v, **options)
    torch.testing.assert_close(torch.einsum("bhlm,bmhp->blhp", matrix, values), output, rtol=0, atol=1e-12)
    most = torch.tensor(options["slots"]).repeat_interleave(2) + options.get("sinks", 0) + options["window"]
    assert ((matrix > 0).sum(-1) <= most[:, None]).all()


def test_the_matrix_has_the_gradients_of_the_outputs() -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    q, k, v = draw(2, 37)
    output, _ = bounded_attention(q, k, v, seq_idx=SEQ_IDX, **options)
    matrix = bounded_attention_matrix(q, k, v, seq_idx=SEQ_IDX, **options)
    column = (SEQ_IDX >= 0).cumsum(1).sub(1).clamp(min=0)  # of each token; padding has no weight of its own
    real = (SEQ_IDX >= 0)[:, None, None]
    values = v.repeat_interleave(2, dim=2)
    weights = matrix.gather(3, column[:, None, None].expand(-1, *matrix.shape[1:3], -1)) * real
    expected = torch.einsum("bhlm,bmhp->blhp", weights, values)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    wanted = torch.autograd.grad(expected, [q, k, v], cotangent)
    for mine, other in zip(torch.autograd.grad(output, [q, k, v], cotangent), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3])
def test_the_matrix_of_less_than_a_chunk_has_gradients(length: int) -> None:
    q, k, v = draw(2, length)
    options: dict[str, Any] = {"window": 6, "slots": [3, 5], "sinks": 2, "chunk_size": 4}
    weights = bounded_attention_matrix(q, k, v, **options)
    cotangent = torch.randn(weights.shape, dtype=weights.dtype, generator=torch.Generator().manual_seed(7))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    scores = torch.einsum("blhp,bmhp->bhlm", q, k.repeat_interleave(2, dim=2)) / 6**0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, [q, k], cotangent)
    for mine, other in zip(torch.autograd.grad(weights, [q, k], cotangent), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2**19], ids=["a-chunk-at-a-time", "chunks-together"])
@pytest.mark.parametrize("padding", [0, 2**20], ids=["apart", "padded"])
def test_heads_and_chunks_may_be_computed_together_or_apart(
    padding: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three key-value heads with few, many and few slots: in one group, or the first with the last and one alone."""
    monkeypatch.setattr(bounded_attention_chunks, "_PADDING", padding)
    monkeypatch.setattr(bounded_attention_chunks, "_BLOCK", block)
    options: dict[str, Any] = {"window": 5, "slots": [2, 19, 2], "sinks": 1, "chunk_size": 3, "decay": [0.9, 1.0, 0.8]}
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 37, heads, 4, dtype=torch.float64, generator=generator).requires_grad_() for heads in (6, 3, 3)
    ]
    cotangent = torch.randn(2, 37, 6, 4, dtype=torch.float64, generator=generator)
    _, whole = in_parts(inputs, [1] * 37, options)
    for seq_idx, lengths in ((None, [37]), (None, [8, 1, 28]), (SEQ_IDX, None)):
        expected = bounded_attention_reference(*inputs, seq_idx=seq_idx, **options)
        if lengths is None:
            output, _ = bounded_attention(*inputs, seq_idx=seq_idx, **options)
            matrix = bounded_attention_matrix(*inputs, seq_idx=seq_idx, **options)
        else:
            output, memory = in_parts(inputs, lengths, options)
            for mine, other in zip(slots_of(memory, options), slots_of(whole, options), strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
            matrix = bounded_attention_matrix(*inputs, **options)
            values = inputs[2].repeat_interleave(2, dim=2)
            torch.testing.assert_close(torch.einsum("bhlm,bmhp->blhp", matrix, values), output, rtol=0, atol=1e-12)
        real = torch.ones(2, 37, dtype=torch.bool) if seq_idx is None else seq_idx >= 0
        sums = real[:, None].expand(-1, 6, -1).double()
        torch.testing.assert_close(matrix.sum(-1), sums, rtol=0, atol=1e-12)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        wanted = torch.autograd.grad(expected, inputs, cotangent)
        for mine, other in zip(torch.autograd.grad(output, inputs, cotangent), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("begun", [0, 6, 8])
def test_rows_without_tokens_return_the_memory_that_they_continue(begun: int) -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    inputs = draw(2, 30)
    _, memory = bounded_attention(*[tensor[:, : begun + 10] for tensor in inputs], **options)
    padding = torch.full((2, 3), -1)
    more = [tensor[:, begun + 10 : begun + 13] for tensor in inputs]
    output, after = bounded_attention(*more, initial_state=memory, seq_idx=padding, **options)
    assert not output.any()
    assert torch.equal(after.positions.sort(1).values, memory.positions.sort(1).values)
    expected, _ = bounded_attention(*more, initial_state=memory, **options)
    torch.testing.assert_close(bounded_attention(*more, initial_state=after, **options)[0], expected)


@pytest.mark.parametrize("start", [1, 7, 13])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_steps_go_on_from_a_prompt_and_leave_the_same_memory(options: dict[str, Any], start: int) -> None:
    inputs = draw(2, 60)
    expected, whole = bounded_attention(*inputs, **options)
    _, memory = bounded_attention(*[tensor[:, :start] for tensor in inputs], **options)
    for t in range(start, 60):
        output = bounded_attention_step(*[tensor[:, t] for tensor in inputs], memory, **options)
        torch.testing.assert_close(output, expected[:, t], rtol=0, atol=1e-12)
    first = 0
    for slots in options["slots"]:
        rows = slice(first, first + slots + options.get("sinks", 0) + options["window"])
        first = rows.stop
        order, its = memory.positions[:, rows].argsort(1), whole.positions[:, rows].argsort(1)
        assert torch.equal(memory.positions[:, rows].gather(1, order), whole.positions[:, rows].gather(1, its))
        for mine, other in ((memory.keys, whole.keys), (memory.values, whole.values)):
            wide = [index[..., None].expand(-1, -1, 6) for index in (order, its)]
            torch.testing.assert_close(mine[:, rows].gather(1, wide[0]), other[:, rows].gather(1, wide[1]))


def test_the_last_of_many_documents_is_found() -> None:
    """Writing all documents of a row to one place would leave any of them there if several threads write."""
    many = torch.arange(300_000).expand(2, -1).clone()
    many[0, 100_000:] = -1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(10):
            plan = bounded_attention_chunks.Plan(2, 300_000, None, many, 4, 0, [1], 2, many.device)
            assert plan.last.tolist() == [99_999, 399_999]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("quantised", [False, True])
def test_steps_record_no_gradient(quantised: bool, implementation: str) -> None:
    """Otherwise one of two steps would change what the gradient of the other needs."""
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    inputs = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in draw(2, 9)]
    memories = []
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            _, memory = bounded_attention(*[tensor[:, :7] for tensor in inputs], **options)
            memory = memory.quantised() if quantised else memory
            for token in (7, 8):
                output = bounded_attention_step(
                    *[tensor[:, token] for tensor in inputs], memory, **options, implementation=implementation
                )
                assert not output.requires_grad
        memories.append(memory)
    for mine, other in zip(*memories, strict=True):
        assert mine is other is None or torch.equal(mine, other)


def test_rows_of_different_lengths_step_together() -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    with torch.no_grad():
        inputs = draw(2, 30)
        lengths = (9, 14)
        memories = [
            bounded_attention(*[tensor[row : row + 1, :length] for tensor in inputs], **options)[1]
            for row, length in enumerate(lengths)
        ]
        memory = BoundedMemory(*[torch.cat(parts) for parts in zip(*[each[:4] for each in memories], strict=True)])
        expected = bounded_attention(*inputs, **options)[0]
        for step in range(15):
            now = [torch.stack([tensor[row, length + step] for row, length in enumerate(lengths)]) for tensor in inputs]
            output = bounded_attention_step(*now, memory, **options)
            wanted = torch.stack([expected[row, length + step] for row, length in enumerate(lengths)])
            torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("slots", "change", "message"),
    [
        pytest.param([1], {}, r"slots must be 2 numbers, one for each key-value head, got \[1\]", id="slots"),
        pytest.param([], {}, r"slots must be 2 numbers, one for each key-value head, got \[\]", id="no slots"),
        pytest.param([1, 2], {}, r"keys must be \(B, N, P\) = \(1, 7, 6\), got shape \(1, 6, 6\)", id="rows"),
        pytest.param(
            [1, 1], {"values_scales": None}, "keys_scales and values_scales must both be given", id="one of the scales"
        ),
        pytest.param([1, 1], {"keys_scales": torch.zeros(1, 5)}, r"keys_scales must be \(B, N\)", id="scales"),
        pytest.param([1, 1], {"values": torch.zeros(1, 6, 6)}, "values must have an integer dtype", id="dtype"),
    ],
)
def test_a_step_refuses_what_does_not_fit_its_memory(slots: list[int], change: dict[str, Any], message: str) -> None:
    part, numbers = torch.zeros(1, 6, 6), torch.zeros(1, 6)
    memory = BoundedMemory(part, part, numbers, numbers.long()).quantised()._replace(**change)
    before = memory.positions.clone()
    token = torch.ones(1, 2, 6)
    with pytest.raises(ValueError, match=message):
        bounded_attention_step(token, token, token, memory, window=2, slots=slots, chunk_size=2)
    assert torch.equal(memory.positions, before)


def test_attention_is_exact_while_the_memory_holds_everything() -> None:
    q, k, v = draw(2, 40)
    output, _ = bounded_attention(q, k, v, window=8, slots=[32, 40], chunk_size=4)
    heads = [tensor.transpose(1, 2) for tensor in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    exact = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(output, exact, rtol=0, atol=1e-12)


def test_what_was_attended_most_stays() -> None:
    """One early key that all queries look for is kept by one slot through 500 others, behind a window of 4."""
    generator = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 500, 1, 6, generator=generator)
    k[:, 3] = torch.tensor([9.0, 0, 0, 0, 0, 0])
    q = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(1, 500, 1, 6)
    v = torch.nn.functional.normalize(torch.randn(1, 500, 1, 6, generator=generator), dim=-1)
    _, memory = bounded_attention(q, k, v, window=4, slots=[1], chunk_size=2)
    assert memory.positions[0, 0] == 3
    torch.testing.assert_close(memory.keys[0, 0], k[0, 3, 0])


def test_the_memory_does_not_grow() -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    shapes = {tuple(bounded_attention(*draw(1, length), **options)[1].keys.shape) for length in (1, 10, 200)}
    assert shapes == {(1, 3 + 5 + 2 * (2 + 6), 6)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_sums_in_float32(dtype: torch.dtype) -> None:
    options = OPTIONS[-1].values[0]
    assert isinstance(options, dict)
    inputs = draw(1, 64, dtype)
    output, memory = bounded_attention(*inputs, **options)
    assert output.dtype == memory.keys.dtype == memory.values.dtype == dtype and memory.scores.dtype == torch.float32
    exact = bounded_attention(*[tensor.detach().float() for tensor in inputs], **options)[0]
    torch.testing.assert_close(output.float(), exact, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("begun", [0, 6])
def test_no_tokens_leave_the_memory_as_it_is(begun: int) -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    start = [tensor.detach()[:, :begun] for tensor in draw(2, 9)]
    _, memory = bounded_attention(*start, **options)
    inputs, none = draw(2, 0), torch.zeros(2, 0, dtype=torch.long)
    output, after = bounded_attention(*inputs, initial_state=memory if begun else None, seq_idx=none, **options)
    assert output.shape == (2, 0, 4, 6)
    for mine, other in zip(after[:4], memory[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    matrix = bounded_attention_matrix(*inputs, initial_state=memory if begun else None, seq_idx=none, **options)
    assert matrix.shape == (2, 4, 0, begun)
    for gradient in torch.autograd.grad(output.sum() + matrix.sum(), inputs[:2]):
        assert gradient.shape[1] == 0


def test_no_rows_give_no_rows_and_gradients_of_zero() -> None:
    inputs = draw(0, 5)
    output, memory = bounded_attention(*inputs, window=4, slots=[1, 2], chunk_size=2)
    assert output.shape == (0, 5, 4, 6) and memory.keys.shape == (0, 11, 6)
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "window must be at least 4, got 3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"slots": [1]}, "slots must be 2 numbers of at least 0, one for each key-value head, got \\[1\\]"),
        ({"slots": [1, -1]}, "slots must be 2 numbers"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"softcap": math.nan}, "softcap must be positive or None, got nan"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1, .* got 0.0"),
        ({"decay": [0.9]}, "one or one for each of 2 key-value heads, got \\[0.9\\]"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, Any], message: str) -> None:
    options = {"window": 6, "slots": [3, 5], "sinks": 2, "chunk_size": 4} | change
    with pytest.raises(ValueError, match=message):
        bounded_attention(*draw(1, 9), **options)


def test_two_documents_cannot_continue_one_memory() -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    _, memory = bounded_attention(*draw(1, 9), **options)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="seq_idx must hold one document in each row"):
        bounded_attention(*draw(1, 5), initial_state=memory, seq_idx=seq_idx, **options)


def test_positions_that_float32_does_not_hold_are_refused() -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    _, memory = bounded_attention(*draw(1, 9), **options)
    far = memory._replace(positions=torch.where(memory.positions >= 0, memory.positions + 2**24 - 13, -1))
    bounded_attention(*draw(1, 3), initial_state=far, **options)
    with pytest.raises(ValueError, match=r"must be below 16777211 for 5 more tokens, .* got 16777211"):
        bounded_attention(*draw(1, 5), initial_state=far, **options)


@pytest.mark.parametrize(
    ("quantised", "name", "change", "message"),
    [
        (False, "positions", lambda x: x[:, 1:], r"positions must be \(B, N\) = \(1, 24\), got shape \(1, 23\)"),
        (False, "positions", lambda x: x.float(), "positions must have an integer dtype, got torch.float32"),
        (False, "positions", lambda x: x.to("meta"), "positions must be on the device of q, cpu, got meta"),
        (False, "keys", lambda x: x.to("meta"), "keys must be on the device of q, cpu, got meta"),
        (False, "values", lambda x: x[:, :, 1:], r"values must be \(B, N, P\) = \(1, 24, 6\), got shape"),
        (True, "values", lambda x: x[:, :, 1:], r"values must be \(B, N, P\) = \(1, 24, 6\), got shape"),
        (True, "keys_scales", lambda x: x[:, 1:], r"keys_scales must be \(B, N\) = \(1, 24\), got shape"),
        (True, "keys_scales", lambda x: None, "keys must be floating point, got torch.int8"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(quantised: bool, name: str, change: Any, message: str) -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    _, memory = bounded_attention(*draw(1, 9), **options)
    memory = memory.quantised() if quantised else memory
    memory = memory._replace(**{name: change(getattr(memory, name))})
    with pytest.raises(ValueError, match=f"initial_state.{message}"):
        bounded_attention(*draw(1, 5), initial_state=memory, **options)
