"""Attention over a bounded memory in Triton against torch: prompts with their gradients, and decode steps."""

from typing import Any

import pytest
import torch
from bounded_memories import OPTIONS, SEQ_IDX, draw
from torch import Tensor

from ssm_zoo.kernels import bounded_attention_chunks, bounded_attention_triton
from ssm_zoo.kernels.bounded_attention import BoundedMemory, bounded_attention, bounded_attention_step
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON, moved


def memory_of(dtype: torch.dtype, lengths: tuple[int, int], int8: bool, options: dict[str, Any]) -> BoundedMemory:
    """The memory of two rows after as many tokens."""
    inputs = draw(2, 40, dtype)
    parts = [
        bounded_attention(*[x[row : row + 1, :length] for x in inputs], **options)[1]
        for row, length in enumerate(lengths)
    ]
    memory = BoundedMemory(*[torch.cat(each).detach() for each in zip(*[part[:4] for part in parts], strict=True)])
    return memory.quantised() if int8 else memory


def on_device(memory: BoundedMemory) -> BoundedMemory:
    return BoundedMemory(*[None if part is None else moved(part.clone(), DEVICE) for part in memory])


def in_order(memory: BoundedMemory, options: dict[str, Any]) -> list[Tensor]:
    """All parts of the memory, the rows of each head in order of their positions, without those that are empty."""
    found, first = [], 0
    for number in options["slots"]:
        rows = slice(first, first + number + options.get("sinks", 0) + options["window"])
        first = rows.stop
        order = memory.positions[:, rows].argsort(dim=1, stable=True)
        held = memory.positions[:, rows].gather(1, order) >= 0
        for part in memory:
            if part is not None:
                index = order[..., None].expand(-1, -1, part.shape[-1]) if part.ndim == 3 else order
                found.append(part[:, rows].gather(1, index)[held])
    return found


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("case", "dtype", "int8", "lengths"),
    [
        pytest.param(1, torch.float32, True, (3, 17), id="8 bits"),
        pytest.param(2, torch.float32, False, (17, 17), id="decays"),
        pytest.param(3, torch.bfloat16, False, (1, 9), id="bfloat16, a head without slots"),
        pytest.param(4, torch.bfloat16, True, (2, 8), id="bfloat16 of 8 bits, capped"),
        pytest.param(0, torch.float32, False, (1, 2), id="itself"),
    ],
)
@torch.no_grad()
def test_triton_steps_are_those_of_torch(
    case: int, dtype: torch.dtype, int8: bool, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16 rows and of one or two more; rows whose chunks are complete at different steps; two runs equal."""
    monkeypatch.setitem(bounded_attention_triton._ROWS, 64, (16, 4))
    options = OPTIONS[case].values[0]
    assert isinstance(options, dict)
    if case == 1:
        options = options | {"slots": [12, 0], "sinks": 0}
    start = memory_of(dtype, lengths, int8, options)
    memories = [start._replace(**{name: part.clone() for name, part in start._asdict().items() if part is not None})]
    memories += [on_device(start), on_device(start)]
    inputs = draw(2, 40, dtype)
    for step in range(6):
        now = [torch.stack([x[row, length + step] for row, length in enumerate(lengths)]) for x in inputs]
        expected = bounded_attention_step(*now, memories[0], **options, implementation="torch")
        there = [moved(x, DEVICE) for x in now]
        found = [bounded_attention_step(*there, each, **options, implementation="triton") for each in memories[1:]]
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(found[0].cpu(), expected, rtol=rtol, atol=atol)
        assert torch.equal(*found) and found[0].dtype == dtype
    mine = in_order(BoundedMemory(*[moved(part, "cpu") for part in memories[1]]), options)
    for part, wanted in zip(mine, in_order(memories[0], options), strict=True):
        if part.dtype == torch.float32 and part.ndim == 1:  # scores
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(part, wanted)
    for part, again in zip(memories[1], memories[2], strict=True):
        assert part is again is None or torch.equal(part, again)


def without_departed(memory: BoundedMemory, options: dict[str, Any]) -> BoundedMemory:
    """The memory without the scores of rows whose positions have left the window: nothing reads them any more."""
    now, chunk = memory.positions.amax(1, keepdim=True) + 1, options["chunk_size"]
    first, scores = 0, memory.scores.detach().clone()
    for number in options["slots"]:
        near = slice(
            first + number + options.get("sinks", 0), first + number + options.get("sinks", 0) + options["window"]
        )
        first = near.stop
        left = memory.positions[:, near] < (now // chunk + 1) * chunk - options["window"]
        scores[:, near] = scores[:, near].masked_fill(left, 0)
    return memory._replace(scores=scores)


@NEEDS_TRITON
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("options", "how"),
    [
        pytest.param({"window": 1, "slots": [2, 1], "chunk_size": 1}, "whole", id="chunks of one token"),
        pytest.param({"window": 4, "slots": [20, 1], "chunk_size": 3}, "continued", id="slots left empty, continued"),
        pytest.param(OPTIONS[1].values[0], "packed", id="ragged, packed"),
        pytest.param(OPTIONS[2].values[0], "continued", id="decays, continued"),
        pytest.param(OPTIONS[3].values[0], "packed", id="a head without slots, packed"),
        pytest.param(OPTIONS[4].values[0], "continued", id="capped, continued"),
        pytest.param(OPTIONS[8].values[0], "whole", id="several blocks of queries"),
    ],
)
def test_triton_reads_a_prompt_as_torch_does(
    options: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, memory and all gradients, with tiles of 16 rows and of 16 queries; two runs are equal."""
    monkeypatch.setitem(bounded_attention_triton._CHUNKS, 64, (16, 16, 4))
    launch, launched = bounded_attention_chunks.bounded_attention_chunks_triton, []
    monkeypatch.setattr(
        bounded_attention_chunks, "bounded_attention_chunks_triton", lambda *given: launched.append(1) or launch(*given)
    )
    ragged = options is OPTIONS[1].values[0]
    dtype = torch.bfloat16 if ragged else torch.float32
    inputs = draw(2, 37, dtype)
    more: dict[str, Any] = {"seq_idx": SEQ_IDX} if how == "packed" else {}
    held: list[Tensor] = []
    if how == "continued":
        memory = bounded_attention(*[x[:, :21] for x in draw(2, 40, dtype)], **options, implementation="torch")[1]
        keys, values = (x.detach().requires_grad_() for x in memory[:2])
        held = [keys, values]
    cotangent = torch.randn(2, 37, 4, 6, generator=torch.Generator().manual_seed(1))

    def run(implementation: str, device: str | torch.device) -> tuple[Tensor, BoundedMemory, tuple[Tensor, ...]]:
        there = [x.detach().to(device).requires_grad_() for x in (*inputs, *held)]
        state = {}
        if held:
            rest = [moved(x, device) for x in memory[2:4]]
            state = {"initial_state": BoundedMemory(there[3], there[4], rest[0], rest[1])}
        given = {name: moved(x, device) for name, x in more.items()} | state
        output, after = bounded_attention(*there[:3], **options, **given, implementation=implementation)
        total = (output * moved(cotangent, device)).sum() + (after.keys + after.values.square()).sum()
        return output, after, torch.autograd.grad(total, there)

    expected, wanted, gradients = run("torch", "cpu")
    found, mine, found_gradients = run("triton", DEVICE)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=atol)
    for part, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(part.cpu(), other, rtol=rtol, atol=max(atol, 1e-5))
    memories = [
        without_departed(BoundedMemory(*[moved(x, "cpu") for x in each[:4]]), options) for each in (mine, wanted)
    ]
    for part, other in zip(*[in_order(each, options) for each in memories], strict=True):
        torch.testing.assert_close(part, other, rtol=max(rtol, 1e-4) if part.dtype == dtype else 1e-4, atol=1e-5)
    assert launched
    if ragged:
        again, also, _ = run("triton", DEVICE)
        assert torch.equal(found, again) and all(torch.equal(*each) for each in zip(mine[:4], also[:4], strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (1, 1)])
def test_triton_reads_prompts_of_no_tokens_or_one(batch: int, length: int) -> None:
    options = OPTIONS[1].values[0]
    assert isinstance(options, dict)
    inputs = [moved(x.detach(), DEVICE) for x in draw(batch, length, torch.float32)]
    found, memory = bounded_attention(*inputs, **options, implementation="triton")
    expected, wanted = bounded_attention(*[x.cpu() for x in inputs], **options, implementation="torch")
    torch.testing.assert_close(found.cpu(), expected)
    assert torch.equal(memory.positions.cpu(), wanted.positions)


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_a_value_that_is_not_a_number_stays_in_a_slot_of_triton() -> None:
    """As in torch, since its score cannot be compared with others; the other slots are filled as usual."""
    q, k, v = (x.detach() for x in draw(1, 40, torch.float32))
    v[0, 2] = torch.nan
    options: dict[str, Any] = {"window": 4, "slots": [3, 3], "chunk_size": 2}
    found = bounded_attention(*[moved(x, DEVICE) for x in (q, k, v)], **options, implementation="triton")[1]
    positions = found.positions.cpu().view(2, 7)[:, :3]
    assert (positions == 2).any(1).all() and (positions >= 0).all()


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_not_a_number_is_not_hidden_by_triton(where: str) -> None:
    """The queries that see it give NaN, and its share of the scores is NaN, as in torch."""
    q, k, v = (x.detach() for x in draw(1, 14, torch.float32))
    (q if where == "q" else k)[0, 4] = torch.nan
    options: dict[str, Any] = {"window": 2, "slots": [3, 3], "sinks": 1, "chunk_size": 2}
    for device, implementation in ((DEVICE, "triton"), ("cpu", "torch")):
        given = [moved(x, device) for x in (q, k, v)]
        output, memory = bounded_attention(*given, **options, implementation=implementation)
        assert output[0, 4].isnan().all() and output[0, :4].isfinite().all(), implementation
        assert memory.scores.isnan().any(), implementation


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@torch.no_grad()
def test_triton_quantises_a_new_row_to_the_bit() -> None:
    """Ties, zeros, numbers whose scale underflows, infinity and NaN."""
    options: dict[str, Any] = {"window": 2, "slots": [0], "chunk_size": 1, "scale": 1.0}
    ties = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5, 3.25])
    rows = [ties, 0 * ties, 1e-42 * ties, ties.where(ties != 1.5, torch.inf), ties.where(ties != 1.5, torch.nan)]
    x = torch.stack([*rows, 0.013 * ties])[:, None]
    empty = [torch.zeros(len(x), 2, 6), torch.zeros(len(x), 2, 6), torch.zeros(len(x), 2)]
    memory = BoundedMemory(*empty, torch.tensor([0, -1]).repeat(len(x), 1)).quantised()
    there = on_device(memory)
    bounded_attention_step(x, x, x.flip(-1), memory, **options, implementation="torch")
    bounded_attention_step(
        *[moved(part, DEVICE) for part in (x, x, x.flip(-1))], there, **options, implementation="triton"
    )
    for mine, wanted in zip(there, memory, strict=True):
        if mine is not None and mine is not there.scores:
            torch.testing.assert_close(mine.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert memory.keys[0, 1].tolist() == [127, 0, 2, -2, -126, 3]


@pytest.mark.parametrize("why", ["wide", "strided"])
def test_what_triton_does_not_support_is_refused(why: str) -> None:
    width = 257 if why == "wide" else 6
    part = torch.zeros(1, 3, width)
    keys = part.mT.contiguous().mT if why == "strided" else part
    memory = BoundedMemory(keys, part.clone(), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long))
    q = torch.zeros(1, 2, width)
    options: dict[str, Any] = {"window": 2, "slots": [1], "chunk_size": 2}
    with pytest.raises(ValueError, match="'triton' of bounded_attention_step is not available for these arguments"):
        bounded_attention_step(q, q[:, :1], q[:, :1], memory, **options, implementation="triton")


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@torch.no_grad()
def test_a_head_of_what_is_not_a_number_leaves_the_rows_of_others_alone() -> None:
    """Where no position can be told from another, as many are dropped as enter the slots."""
    options: dict[str, Any] = {"window": 4, "slots": [3, 2], "sinks": 1, "chunk_size": 4}
    rows, results = 3 + 1 + 4, []
    for broken in (False, True):
        q, k, v = (moved(x.detach(), DEVICE) for x in draw(1, 24, torch.float32))
        if broken:
            k[:, :, 1] = torch.nan
        _, memory = bounded_attention(q[:, :3], k[:, :3], v[:, :3], **options)
        outputs = []
        for token in range(3, 24):
            given = q[:, token], k[:, token], v[:, token]
            outputs.append(bounded_attention_step(*given, memory, **options, implementation="triton"))
        results.append((torch.stack(outputs)[:, :, :2], *(part[:, :rows] for part in memory if part is not None)))
        positions = memory.positions[0, rows:].tolist()
        assert len(set(positions[:3])) == 3 and positions[0] == 0  # the slots, and the sink in the first of them
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
