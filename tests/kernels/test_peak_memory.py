"""Peak memory of the recurrences: inputs, outputs, their gradients and the states between chunks, and little else.

Mixing has no states, and no second copy of its weights.
"""

import pytest
import torch
from torch import Tensor

from peak_memory import IdleKernel, PeakMemory, nbytes, peak_of_gradients
from ssm_zoo.kernels import causal_conv1d_triton, position_mix_triton, selective_scan_triton
from ssm_zoo.kernels._triton import HAS_TRITON
from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from ssm_zoo.kernels.position_mix import masked_mix
from ssm_zoo.kernels.selective_scan import selective_scan
from ssm_zoo.kernels.ssd import ssd

LENGTH = 4096


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def test_the_measure() -> None:
    """Two of three buffers live at once; views are free; what was there before counts."""
    held = torch.zeros(10)
    with PeakMemory(held) as memory:
        first = torch.zeros(100)
        view = first[:50]
        del first, view
        second = torch.zeros(70)
        third = second + 1
        del second, third
    assert memory.peak == 4 * (10 + 140)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ssd(gated: bool) -> None:
    heads, width, size, chunk = 4, 32, 32, 64
    x, B, C = draw(1, LENGTH, heads, width), draw(1, LENGTH, 1, size), draw(1, LENGTH, 1, size)
    inputs = leaves(x, draw(1, LENGTH, heads), -draw(heads).exp(), B, C, draw(heads), draw(1, LENGTH, heads, width))

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        result = ssd(x, dt, A, B, C, D=D, z=z, dt_softplus=True, return_final_state=True, chunk_size=chunk)
        assert isinstance(result, tuple)
        return result

    def plain(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, ...]:
        result = ssd(x, dt, A, B, C, D=D, dt_softplus=True, return_final_state=True, chunk_size=chunk)
        assert isinstance(result, tuple)
        return result

    peak, needed = peak_of_gradients(op, inputs) if gated else peak_of_gradients(plain, inputs[:-1])
    states = 4 * (LENGTH // chunk) * heads * width * size
    assert peak <= 1.2 * (needed + states), (peak, needed, states)


def test_selective_scan() -> None:
    channels, size = 64, 16
    x, dt, z = draw(1, LENGTH, channels), draw(1, LENGTH, channels), draw(1, LENGTH, channels)
    B, C = draw(1, LENGTH, 1, size), draw(1, LENGTH, 1, size)
    inputs = leaves(x, dt, -draw(channels, size).exp(), B, C, draw(channels), z)

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        result = selective_scan(x, dt, A, B, C, D=D, z=z, dt_softplus=True, return_final_state=True)
        assert isinstance(result, tuple)
        return result

    peak, needed = peak_of_gradients(op, inputs)
    states = 4 * (LENGTH // 32) * channels * size
    assert peak <= 1.2 * (needed + states), (peak, needed, states)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "size"),
    [(1, 512, 1024, 16), (1, 8192, 1024, 16), (8, 2048, 1536, 16), (1, 4096, 1024, 64), (2, 4096, 1024, 1)],
)
def test_kernels_of_the_selective_scan(
    batch: int, length: int, channels: int, size: int, gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without storage and without kernels."""
    for name in ("summary", "carry", "forward", "backward"):
        monkeypatch.setattr(selective_scan_triton, f"{name}_kernel", IdleKernel())

    def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device="meta").requires_grad_()

    wide, maps = (batch, length, channels), (batch, length, 1, size)
    inputs = [zeros(*sizes, dtype=dtype) for sizes in (wide, wide, maps, maps, *([wide] if gated else []))]
    inputs += [zeros(channels, size), zeros(channels), zeros(channels)]

    def op(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *gate, A, D, bias = rest
        z = gate[0] if gate else None
        return selective_scan_triton.selective_scan_triton(
            x, dt, A, B, C, D, z, bias, None, dt_softplus=True, real=None, first=None
        )

    peak, needed = peak_of_gradients(op, inputs)
    states = 4 * batch * -(-length // selective_scan_triton._SPAN) * channels * size
    assert peak <= 1.2 * (needed + states), (peak, needed, states)


def test_convolution() -> None:
    channels = 512

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = causal_conv1d(x, weight, bias, activation="silu")
        assert isinstance(y, Tensor)
        return (y,)

    peak, needed = peak_of_gradients(op, leaves(draw(1, LENGTH, channels), draw(channels, 4), draw(channels)))
    assert peak <= 1.2 * needed


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("batch", "length"), [(8, 2048), (1, 16384), (64, 64)])
def test_kernels_of_the_convolution(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without storage and without kernels: beyond what is needed, the sums of each span."""
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(causal_conv1d_triton, name, IdleKernel())

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.bfloat16, device="meta").requires_grad_()

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (causal_conv1d_triton.causal_conv1d_triton(x, weight, bias, "silu", None, None, False)[0],)

    peak, needed = peak_of_gradients(op, [zeros(batch, length, 4352), zeros(4352, 4), zeros(4352)])
    assert peak <= 1.2 * needed, (peak, needed)


def test_masked_mixing_copies_a_panel_of_its_weights() -> None:
    length, width = 2048, 64

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (masked_mix(x, weight, bias),)

    x, weight, bias = draw(1, length, 1, width), draw(1, length, length), draw(1, length)
    peak, needed = peak_of_gradients(op, leaves(x, weight, bias))
    assert peak <= 1.2 * needed
    with torch.no_grad(), PeakMemory(x, weight, bias) as memory:
        (y,) = op(x, weight, bias)
    assert memory.peak <= nbytes(x, weight, bias, y) + nbytes(weight) // 3


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dimensions", [1, 2], ids=["by-distance", "by-position"])
@pytest.mark.parametrize(("batch", "length"), [(128, 512), (16, 4096)])
def test_kernels_of_mixing(batch: int, length: int, dimensions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without storage and without kernels: beyond what is needed, tiles of weights that are still to be summed."""
    for name in ("mix", "band", "weight_products", "dense_gradient", "toeplitz_gradient", "share_sums"):
        monkeypatch.setattr(position_mix_triton, f"{name}_kernel", IdleKernel())

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.bfloat16, device="meta").requires_grad_()

    inputs = [zeros(batch, length, 1, 1024), zeros(1, *[length] * dimensions), zeros(1, length)]

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (position_mix_triton.mix_triton(x, weight, bias, None),)

    peak, needed = peak_of_gradients(op, inputs)
    tiles = length // 128
    programs = max(position_mix_triton._PROGRAMS, tiles * (tiles + 1) // 2)
    assert peak <= 1.02 * needed + 4 * 128 * 128 * programs


def test_memory_without_gradients_does_not_grow_with_the_states() -> None:
    """A forward alone holds one state."""
    heads, width, size = 2, 32, 128
    x, B, C = draw(1, LENGTH, heads, width), draw(1, LENGTH, 1, size), draw(1, LENGTH, 1, size)
    dt, A = draw(1, LENGTH, heads).exp(), -draw(heads).exp()
    with torch.no_grad(), PeakMemory(x, dt, A, B, C) as memory:
        y = ssd(x, dt, A, B, C)
    assert isinstance(y, Tensor)
    assert memory.peak <= 1.2 * nbytes(x, dt, A, B, C, y)
