"""Keys and values of 8 bits: the rounding, and attention whose memory holds them."""

from typing import Any

import pytest
import torch

from ssm_zoo.kernels.bounded_attention import BoundedMemory, bounded_attention, bounded_attention_step
from ssm_zoo.kernels.int8_rows import dequantise_rows, quantise_rows, round_rows

OPTIONS: dict[str, Any] = {"window": 6, "slots": [3, 9], "sinks": 2, "chunk_size": 4, "decay": [0.9, 1.0]}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Vectors whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10 ** (3 * torch.randn(*shape[:-1], 1, generator=generator))


def test_a_number_is_off_by_at_most_half_a_scale() -> None:
    x = draw(50, 64)
    integers, scales = quantise_rows(x)
    assert integers.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert (integers.abs().amax(-1) == 127).all()
    # The scale is rounded to 2^-9: the largest numbers may be off by as much of 127 integers.
    allowed = x.abs().amax(-1, keepdim=True) / 127 * (0.5 * (1 + 2**-8))
    assert ((dequantise_rows(integers, scales, torch.float32) - x).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounded_vectors_are_quantised_as_they_are(dtype: torch.dtype) -> None:
    x = draw(20, 12).clamp(-6e4, 6e4).to(dtype)
    rounded = round_rows(x)
    assert rounded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for first, second in zip(quantise_rows(x), quantise_rows(rounded), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(dequantise_rows(*quantise_rows(rounded), rounded.dtype), rounded)


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(4, 5)
    x[0], x[1, 2], x[2, 2], x[3, 2] = 0.0, float("nan"), float("inf"), -float("inf")
    rounded = round_rows(x)
    assert torch.equal(rounded[0], x[0])
    assert not rounded[1:].isfinite().all(-1).any()


def test_the_gradient_passes_through_the_rounding() -> None:
    x = draw(3, 4, 8).requires_grad_()
    rounded = round_rows(x)
    assert torch.equal(rounded, round_rows(x.detach()))
    cotangent = torch.randn_like(rounded)
    assert torch.equal(torch.autograd.grad(rounded, x, cotangent)[0], cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_quantised_memory_goes_on_as_the_one_of_rounded_rows(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 60, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    v = (v * 3).flip(1)
    q, k, v = q.to(dtype), round_rows(k.to(dtype)), round_rows(v.to(dtype))
    expected, whole = bounded_attention(q, k, v, **OPTIONS)
    for start in (1, 13, 37):
        _, memory = bounded_attention(q[:, :start], k[:, :start], v[:, :start], **OPTIONS)
        memory = memory.quantised()
        assert memory.keys.dtype == memory.values.dtype == torch.int8
        rest, _ = bounded_attention(q[:, start:], k[:, start:], v[:, start:], initial_state=memory, **OPTIONS)
        torch.testing.assert_close(rest, expected[:, start:], rtol=0, atol=1e-5)
        for t in range(start, 60):
            output = bounded_attention_step(q[:, t], k[:, t], v[:, t], memory, **OPTIONS)
            torch.testing.assert_close(output, expected[:, t], rtol=0, atol=1e-5)
        after = memory.dequantised(dtype)
        assert isinstance(after, BoundedMemory) and after.keys_scales is None
        for mine, other in ((after.keys, whole.keys), (after.values, whole.values)):
            assert torch.equal(mine.flatten(1).sort(1).values, other.flatten(1).sort(1).values)
